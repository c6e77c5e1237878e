"""A fixed-point network of small grey images, for Jacobian-free backpropagation.

    v = Q(x),   z* = R(z*, v),   logits = S(z*),
    R(z, v) = φ(v + W₂ φ(W₁ (z + v) + b₁) + b₂),   ‖W₁‖, ‖W₂‖ ≤ √γ,   φ(t) = max(t, t/10).

φ does not expand distances, so R contracts z by γ: z* exists, is unique, and plain iteration finds it. With γ ≤ ½ the
cotangent g is near the adjoint solution u = (I − Jᵀ)⁻¹ g, cos(g, u) ≥ √(1 − γ²) ≥ 0.86, and the gradient of one step
of R from z* takes the place of the exact one: no system to solve, and the memory of one R.

Q is two convolutions with batch normalisation, R a residual block of two convolutions, S batch normalisation, a pool
and a linear map. `constrain` scales W₁ and W₂ down where their norms, as operators on images, have grown above √γ.

Source: Fung, Heaton, Li, McKenzie, Osher and Yin (2022), arXiv 2103.12803. Departures from its authors' program: there
R ends with a factor γ, and its Lipschitz constant is estimated from a random perturbation; here the norms of the
convolutions, which bound it for all z, are followed by power iteration, to some per cent in training. There R has batch
normalisation inside in Jacobian-free networks, but not in Jacobian-based ones, as it couples the images of a batch;
here it has none, so that both train one network.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d, leaky_relu

from torchdeq import DEQ, JFB, FixedPointIteration, Solution


class FixedPointNetwork(nn.Module):
    """Classifies (B, 1, size, size) images by the fixed point of a residual block.

    Arguments:
        deq: the equilibrium layer. None: plain iteration to relative 1e-3, and JFB.
        channels: C, those of the state, even.
        contraction: γ in (0, 1). JFB is for γ ≤ ½, as in the paper.
        classes: how many logits.
        size: height and width of the images, even; the norms of the convolutions depend on it.

    Raises:
        ValueError: `contraction`, `channels` or `size` is out of range; or images have another size.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = FixedPointNetwork(channels=8)
        >>> logits, solution = model(torch.rand(5, 1, 8, 8))
        >>> logits.shape, bool(solution.converged.all()), solution.nfe <= 10  # 2⁻¹⁰ < 1e-3
        (torch.Size([5, 10]), True, True)
    """

    vectors: Tensor  # (2, 1, C, size, size), right singular vectors of both convolutions

    def __init__(
        self,
        deq: DEQ | None = None,
        *,
        channels: int = 24,
        contraction: float = 0.5,
        classes: int = 10,
        size: int = 8,
    ):
        super().__init__()
        if not 0 < contraction < 1:
            raise ValueError(
                f"FixedPointNetwork(contraction={contraction!r}): expected γ in (0, 1), and at most 0.5 for JFB; at 1 "
                f"and above a fixed point need not exist."
            )
        for name, value in (("channels", channels), ("size", size)):
            if value < 2 or value % 2:
                raise ValueError(f"FixedPointNetwork({name}={value!r}): expected a positive even number.")
        self.size = size
        self.deq = deq or DEQ(FixedPointIteration(tol=1e-3, stop_mode="rel", max_iter=50), JFB())
        self.contraction = contraction
        self.inject = nn.Sequential(
            nn.Conv2d(1, channels // 2, 3, padding=1),
            nn.BatchNorm2d(channels // 2),
            nn.LeakyReLU(0.1),
            nn.Conv2d(channels // 2, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.LeakyReLU(0.1),
        )
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.head = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(channels * (size // 2) ** 2, classes),
        )
        self.register_buffer("vectors", torch.randn(2, 1, channels, size, size))
        self.constrain(steps=50)

    def forward(self, x: Tensor) -> tuple[Tensor, Solution]:
        """The logits (B, classes) of images x (B, 1, size, size), and the `Solution` of the solve."""
        if x.shape[1:] != (1, self.size, self.size):
            raise ValueError(
                f"FixedPointNetwork got images of shape {tuple(x.shape)}; expected (B, 1, {self.size}, "
                f"{self.size}). Their size is FixedPointNetwork(size=…)."
            )
        v = self.inject(x)
        z, solution = self.deq(lambda z: self.block(z, v), torch.zeros_like(v))
        return self.head(z), solution

    def explicit(self, x: Tensor) -> Tensor:
        """The logits of one step from zero: a residual network of the same layers. It needs no contraction."""
        v = self.inject(x)
        return self.head(self.block(torch.zeros_like(v), v))

    def block(self, z: Tensor, v: Tensor) -> Tensor:
        """R(z, v), all (B, C, size, size)."""
        return leaky_relu(v + self.second(leaky_relu(self.first(z + v), 0.1)), 0.1)

    @torch.no_grad()
    def constrain(self, steps: int = 50, tol: float = 1e-4) -> None:
        """Project W₁ and W₂ back to norms of at most √γ. To be called after each step of the optimiser.

        Arguments:
            steps: of power iteration, at most. It remembers where it was, so that it is short for weights that move
                slowly.
            tol: it ends where a step adds no more than this to the norm, relative.
        """
        for vector, conv in zip(self.vectors, (self.first, self.second), strict=True):
            before = 0.0
            for _ in range(steps):
                image = conv2d(vector / vector.norm(), conv.weight, padding=1)
                turned = conv_transpose2d(image, conv.weight, padding=1)
                norm = image.norm().item()
                if norm == 0:  # no weights, or none that the vector sees: it stays
                    break
                vector.copy_(turned)
                if norm <= (1 + tol) * before:
                    break
                before = norm
            if norm > self.contraction**0.5:
                conv.weight.mul_(self.contraction**0.5 / norm)
