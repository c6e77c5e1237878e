"""A convolutional equilibrium model of small grey images that nothing makes a contraction: one scale of MDEQ.

    z = g₃(relu(z + g₂(x̂ + W₂ relu(g₁(W₁ z))))),   x̂ = relu(g₀(U x)),   logits = A pool(relu(g₄(z*))) + a.

gᵢ is group normalisation with a learned scale and shift, W₁ and W₂ are 3×3 convolutions with weight normalisation. The
last normalisation keeps z bounded, so that a fixed point exists, by Brouwer; its Jacobian is free, and it is what an
inexact gradient has to live with. `torchdeq.zoo.digits.DigitsDEQ`, which is a contraction, would not show that.

Sources: Geng, Zhang, Bai, Wang and Lin (2021), arXiv 2111.05177, whose ablations train MDEQ-Tiny; the block is that of
Bai, Koltun and Kolter (2020), arXiv 2006.08656. Departures: one scale, no dropout.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from torchdeq import DEQ, Broyden, PhantomGrad, Solution, apply_norm


class ConvDEQ(nn.Module):
    """Classifies (B, 1, size, size) images by the equilibrium of one residual block of MDEQ.

    Arguments:
        deq: the equilibrium layer. None: Broyden to relative 1e-2 in at most 20 evaluations, and the paper's phantom
            gradient, 5 steps damped by ½.
        channels: C, those of the state, a multiple of `groups`.
        groups: of the normalisations.
        classes: how many logits.
        size: height and width of the images, even.

    Raises:
        ValueError: `channels` or `size` is out of range; or images have another size.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = ConvDEQ(channels=8)
        >>> logits, solution = model(torch.rand(5, 1, 8, 8))
        >>> logits.shape, bool((solution.residual < 0.1).all())
        (torch.Size([5, 10]), True)
    """

    def __init__(
        self,
        deq: DEQ | None = None,
        *,
        channels: int = 16,
        groups: int = 4,
        classes: int = 10,
        size: int = 8,
    ):
        super().__init__()
        if channels < groups or channels % groups:
            raise ValueError(
                f"ConvDEQ(channels={channels!r}, groups={groups!r}): expected a positive multiple of groups."
            )
        if size < 2 or size % 2:
            raise ValueError(f"ConvDEQ(size={size!r}): expected a positive even number.")
        self.size = size
        self.deq = deq or DEQ(Broyden(tol=1e-2, stop_mode="rel", max_iter=20), PhantomGrad(steps=5, tau=0.5))
        self.inject = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1), nn.GroupNorm(groups, channels), nn.ReLU()
        )
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.GroupNorm(groups, channels) for _ in range(3)])
        for conv in (self.first, self.second):
            nn.init.normal_(conv.weight, std=0.01)
            apply_norm(conv, "weight_norm")
        self.head = nn.Sequential(
            nn.GroupNorm(groups, channels),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(channels * (size // 2) ** 2, classes),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Solution]:
        """The logits (B, classes) of images x (B, 1, size, size), and the `Solution` of the solve."""
        if x.shape[1:] != (1, self.size, self.size):
            raise ValueError(
                f"ConvDEQ got images of shape {tuple(x.shape)}; expected (B, 1, {self.size}, {self.size}). Their size "
                f"is ConvDEQ(size=…)."
            )
        x = self.inject(x)
        z, solution = self.deq(lambda z: self.block(z, x), torch.zeros_like(x))
        return self.head(z), solution

    def block(self, z: Tensor, x: Tensor) -> Tensor:
        """f(z) with the injected input x, all (B, C, size, size)."""
        inside, added, last = self.norms
        y = relu(inside(self.first(z)))
        return last(relu(z + added(x + self.second(y))))
