"""A convolutional equilibrium model of small grey images, a contraction by construction.

    z = relu(W z + c + x̂),   x̂ = groupnorm(U₂ relu(U₁ x)),   ‖W‖₂ ≤ ρ < 1,
    logits = A pool(batchnorm(z)) + a.

relu does not expand distances, so f contracts by ρ whatever the weights are: z* exists, is unique, and the adjoint
system is well conditioned. W is a convolution with kernel K whose input channels are scaled:

    W = ρ K D,   D_jj = (Σ_{i,δ} |K^T ⋆ K|_{ij}(δ))^(−1/2)   ⇒   ‖K D‖₂ ≤ 1.

Source of D: Prach and Lampert (2022), arXiv 2208.03160, theorem 1. It is differentiable, has no state, and costs
about as much as a convolution of one image.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, relu

from torchdeq import DEQ, GMRES, IFT, Anderson, Solution


class DigitsDEQ(nn.Module):
    """Classifies (B, 1, H, W) images by the equilibrium of one convolutional block.

    Arguments:
        deq: the equilibrium layer. None: Anderson and implicit differentiation, both to relative 1e-2.
        channels: channels of the state, a multiple of 4.
        contraction: ρ in (0, 1). Nearer to 1 the block sees farther and needs more evaluations.
        classes: how many logits.

    Raises:
        ValueError: `contraction` or `channels` is out of range.

    Example:
        >>> model = DigitsDEQ(channels=8)
        >>> logits, solution = model(torch.rand(5, 1, 8, 8))
        >>> logits.shape, bool(solution.converged.all())
        (torch.Size([5, 10]), True)
    """

    def __init__(
        self, deq: DEQ | None = None, *, channels: int = 32, contraction: float = 0.9, classes: int = 10
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
            nn.BatchNorm2d(channels),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(16 * channels, classes),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Solution]:
        """The logits (B, classes) of images x (B, 1, H, W), and the `Solution` of the solve."""
        x = self.inject(x)
        weight = self.contraction * nonexpansive(self.block.weight)  # once, not in every evaluation

        def f(z: Tensor) -> Tensor:
            return relu(conv2d(z, weight, self.block.bias, padding=1) + x)

        z, solution = self.deq(f, torch.zeros_like(x))
        return self.head(z), solution


def nonexpansive(kernel: Tensor) -> Tensor:
    """The kernel scaled per input channel so that convolving with it, zero padded, has operator norm at most 1.

    Arguments:
        kernel: (C_out, C_in, k, k). Input channels with next to no weight are not scaled up to 1.

    Example:
        >>> bool((nonexpansive(torch.eye(2)[..., None, None]) == torch.eye(2)[..., None, None]).all())
        True
    """
    by_input = kernel.transpose(0, 1)  # (C_in, C_out, k, k)
    gram = conv2d(by_input, by_input, padding=kernel.shape[-1] - 1)  # (C_in, C_in, 2k − 1, 2k − 1)
    size = gram.abs().sum(dim=(0, 2, 3))  # (C_in,); gram is symmetric up to a flip, so either side sums alike
    scale = size.clamp_min(torch.finfo(size.dtype).eps).rsqrt()
    return kernel * scale[:, None, None]
