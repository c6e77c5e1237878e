"""A reversible equilibrium model of small images: a few steps that can be undone, differentiated as they are.

    y ← (1 − β) y + β f(z),   z ← (1 − β) z + β f(y),
    f(z) = n₃(relu(z + n₂(x̂ + W₂ relu(n₁(W₁ z))))),   x̂ = n₀(W₀ x),   logits = A pool(z) + a,

n₀ … n₃ are group normalisations, W₀, W₁ and W₂ convolutions of 3×3. Nothing makes f a contraction, and nothing is asked
of the fixed point: the gradient is that of the steps, whether they have come near it or not. A backward pass rebuilds
the states, see `torchdeq.Reversible`, so that memory does not grow with their number.

Source: McCallum, Arora and Foster (2025), arXiv 2509.12917, and their code for one block. Departures: what is
returned is f(z) after the last step rather than z, which makes an odd number of evaluations; β = 0.5 for their 0.8,
as at 0.5 a float64 state is rebuilt to the last bit of what an f in float32 sees.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from torchdeq import DEQ, Reversible, SimpleFixedPointIteration, Solution


class ReversibleDEQ(nn.Module):
    """Classifies (B, 1, size, size) images by a few reversible steps of one residual block.

    Arguments:
        deq: the equilibrium layer. None: four steps of two evaluations and one more, in float64 with β = 0.5, without
            a look at the residual. Any other layer works on the same network, such as `DEQ(Anderson(), IFT())`.
        channels: of the state, a multiple of `groups`.
        groups: of each normalisation.
        classes: how many logits.

    Raises:
        ValueError: the channels do not fall into the groups.

    Example:
        >>> model = ReversibleDEQ(channels=4)
        >>> logits, solution = model(torch.rand(5, 1, 8, 8))
        >>> logits.sum().backward()
        >>> logits.shape, solution.nfe
        (torch.Size([5, 10]), 9)
    """

    def __init__(self, deq: DEQ | None = None, *, channels: int = 16, groups: int = 2, classes: int = 10):
        super().__init__()
        if channels < 1 or groups < 1 or channels % groups:
            raise ValueError(
                f"ReversibleDEQ(channels={channels!r}, groups={groups!r}): expected a positive multiple of groups."
            )
        # No tolerance: the steps are the model, and there is nothing that they could fail to reach.
        self.deq = deq or DEQ(
            SimpleFixedPointIteration(max_iter=9, tol=math.inf), Reversible(dtype=torch.float64)
        )
        self.inject = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.GroupNorm(groups, channels))
        self.first = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.GroupNorm(groups, channels), nn.ReLU()
        )
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.inner, self.outer = nn.GroupNorm(groups, channels), nn.GroupNorm(groups, channels)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * channels, classes))

    def forward(self, x: Tensor) -> tuple[Tensor, Solution]:
        """The logits (B, classes) of images x (B, 1, size, size), and the `Solution` of the steps."""
        x = self.inject(x)
        z, solution = self.deq(lambda z: self.block(z, x), torch.zeros_like(x))
        return self.head(z), solution

    def block(self, z: Tensor, x: Tensor) -> Tensor:
        """f(z) for x̂; both (B, channels, size, size)."""
        return self.outer(relu(z + self.inner(x + self.second(self.first(z)))))
