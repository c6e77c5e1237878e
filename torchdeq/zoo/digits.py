"""A convolutional equilibrium model of small grey images, a contraction by construction.

    z = relu(W z + b + x̂),   x̂ = groupnorm(U₂ relu(U₁ x)),   ‖W‖₂ = ρ < 1,
    logits = A pool(batchnorm(z)) + a.

relu does not expand distances, so f contracts by ρ: z* exists, is unique, and the adjoint system is well conditioned.
W = ρ K / ‖K‖₂ with K a 3×3 convolution, whose norm as an operator on images is followed by one step of power
iteration per training step, as in Miyato et al. (2018), arXiv 1802.05957, on the convolution itself rather than on
the kernel as a matrix.

On scikit-learn's digits the equilibrium is worth about two images in 360: over seeds 0 to 3 `torchdeq train digits`
ends at a mean accuracy of .9937, and at .9882 with ρ = 1e-6, where nothing is left to iterate.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d, relu

from torchdeq import DEQ, GMRES, IFT, Anderson, Solution


class DigitsDEQ(nn.Module):
    """Classifies (B, 1, size, size) images by the equilibrium of one convolutional block.

    Arguments:
        deq: the equilibrium layer. None: Anderson and implicit differentiation, both to relative 1e-2.
        channels: channels of the state, a multiple of 4.
        contraction: ρ in (0, 1). Nearer to 1 the block sees farther and needs more evaluations.
        classes: how many logits.
        size: height and width of the images, at least 4; ‖K‖₂ depends on it.

    Raises:
        ValueError: `contraction` or `channels` is out of range.

    Example:
        >>> model = DigitsDEQ(channels=8)
        >>> logits, solution = model(torch.rand(5, 1, 8, 8))
        >>> logits.shape, bool(solution.converged.all())
        (torch.Size([5, 10]), True)
    """

    u: Tensor  # (1, C, size, size), left singular vector of the convolution
    v: Tensor  # (1, C, size, size), right singular vector

    def __init__(
        self,
        deq: DEQ | None = None,
        *,
        channels: int = 24,
        contraction: float = 0.9,
        classes: int = 10,
        size: int = 8,
    ):
        super().__init__()
        if not 0 < contraction < 1:
            raise ValueError(
                f"DigitsDEQ(contraction={contraction!r}): expected ρ in (0, 1); at 1 and above a fixed point "
                f"need not exist."
            )
        if channels < 4 or channels % 4:
            raise ValueError(f"DigitsDEQ(channels={channels!r}): expected a positive multiple of 4.")
        self.deq = deq or DEQ(Anderson(tol=1e-2, stop_mode="rel"), IFT(solver=GMRES(tol=1e-2)))
        self.contraction = contraction
        self.inject = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(4, channels),
        )
        self.block = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.orthogonal_(self.block.weight)
        self.head = nn.Sequential(
            nn.BatchNorm2d(channels), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * channels, classes)
        )
        self.register_buffer("u", torch.randn(1, channels, size, size))
        self.register_buffer("v", torch.randn(1, channels, size, size))
        for _ in range(30):
            self._power_step()

    def forward(self, x: Tensor) -> tuple[Tensor, Solution]:
        """The logits (B, classes) of images x (B, 1, size, size), and the `Solution` of the solve."""
        x = self.inject(x)
        weight = self._weight()  # once, not in every evaluation

        def f(z: Tensor) -> Tensor:
            return relu(conv2d(z, weight, self.block.bias, padding=1) + x)

        z, solution = self.deq(f, torch.zeros_like(x))
        return self.head(z), solution

    def _weight(self) -> Tensor:
        """The kernel of W, (C, C, 3, 3)."""
        if self.training:
            self._power_step()
        kernel = self.block.weight
        norm = (self.u * conv2d(self.v, kernel, padding=1)).sum()
        return self.contraction / norm.clamp_min(torch.finfo(norm.dtype).tiny) * kernel

    @torch.no_grad()
    def _power_step(self) -> None:
        # New tensors each time: a backward pass may still need the old ones.
        self.v = unit(conv_transpose2d(self.u, self.block.weight, padding=1))
        self.u = unit(conv2d(self.v, self.block.weight, padding=1))


def unit(t: Tensor) -> Tensor:
    """t at norm 1; zero stays zero.

    Example:
        >>> unit(torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])
    """
    return t / t.norm().clamp_min(torch.finfo(t.dtype).tiny)
