"""A continuous Hopfield memory, and the ways to differentiate it: recurrent back-propagation and its variants.

    h = [x, z],   z = W_zx σ(b x) + W_zz σ(b z),   W = V + Vᵀ without its diagonal,   y = the last units of z.

The units x are clamped to an image, and of the free units z the last show the image that is recalled. With D the
diagonal of b σ′(b z), J = W_zz D, which is similar to a symmetric matrix: its eigenvalues are real. Nothing keeps them
below 1 in training, but ‖W_zz‖₂ < 4 / b is enough for plain iteration to converge.

The gradient wants u = Jᵀu + g. After K steps or terms

    RBP          u ← Jᵀu + g from a random start u₀        error (Jᵀ)ᴷ (u₀ − u)
    Neumann-RBP  g + Jᵀg + … + (Jᵀ)ᴷ⁻¹ g                   error −(Jᵀ)ᴷ u
    TBPTT        the last K steps of z ← f(z), unrolled     the same, at memory K
    CG-RBP       ((I − J)(I − Jᵀ) + η I) u = (I − J) g by K steps of conjugate gradients
    BPTT         all steps, unrolled.

Source: Liao, Xiong, Fetaya, Zhang, Yoon, Pitkow, Urtasun and Zemel (2018), arXiv 1803.06396, and their code, which
has b = 0.5, no leak, and the random start. Departures: K terms in both Neumann-RBP and TBPTT, so that they can be
compared, where that code has K + 1 and K; CG stops at a relative residual of 1e-4 if it gets there earlier.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchdeq import (
    CGNR,
    DEQ,
    IFT,
    GradMethod,
    NeumannPhantom,
    SimpleFixedPointIteration,
    Solution,
    Unroll,
)


class HopfieldMemory(nn.Module):
    """Recalls images x (B, pixels) in [0, 1], of which a part may be missing.

    Arguments:
        deq: the equilibrium layer. None: 50 steps of plain iteration, and Neumann-RBP of 20 terms.
        pixels: units that are clamped to the image, and as many that show what is recalled.
        hidden: free units in between.
        gain: b > 0. A larger one needs smaller weights for the same slope.
        scale: standard deviation of the weights V at the start. Small, so that the memory begins as a contraction.

    Raises:
        ValueError: a size or the gain is not positive; or x has another number of pixels.

    Example:
        >>> memory = HopfieldMemory(pixels=4, hidden=6)
        >>> shown, solution = memory(torch.eye(4)[:2])
        >>> shown.shape, bool(solution.residual.max() < 1e-5)
        (torch.Size([2, 4]), True)
    """

    def __init__(
        self,
        deq: DEQ | None = None,
        *,
        pixels: int = 64,
        hidden: int = 128,
        gain: float = 0.5,
        scale: float = 1e-3,
    ):
        super().__init__()
        for name, value in (("pixels", pixels), ("hidden", hidden), ("gain", gain)):
            if not value > 0:
                raise ValueError(f"HopfieldMemory({name}={value!r}): expected a positive number.")
        self.deq = deq or DEQ(SimpleFixedPointIteration(max_iter=50), NeumannPhantom(terms=20))
        self.pixels = pixels
        self.hidden = hidden
        self.gain = gain
        units = 2 * pixels + hidden
        self.v = nn.Parameter(scale * torch.randn(units, units))  # V

    def forward(self, x: Tensor) -> tuple[Tensor, Solution]:
        """What is recalled for x (B, pixels), of the same shape and not yet rounded to black and white; the solve."""
        f, start = self.dynamics(x)
        z, solution = self.deq(f, start)
        return z[:, -self.pixels :], solution

    def dynamics(self, x: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """f on the free units z (B, hidden + pixels) under the clamped x (B, pixels), and where they start, at 0."""
        if x.dim() != 2 or x.shape[1] != self.pixels:
            raise ValueError(
                f"HopfieldMemory(pixels={self.pixels}): expected images (B, {self.pixels}), got {tuple(x.shape)}. "
                f"Flatten them: x.flatten(1)."
            )
        weight = self.v + self.v.T
        weight = weight - weight.diag().diag()
        from_x, from_z = weight[self.pixels :].split([self.pixels, len(weight) - self.pixels], dim=1)
        drive = torch.sigmoid(self.gain * x) @ from_x.T  # (B, hidden + pixels)

        def f(z: Tensor) -> Tensor:
            return drive + torch.sigmoid(self.gain * z) @ from_z.T

        return f, torch.zeros_like(drive)

    @torch.no_grad()
    def recall(self, x: Tensor) -> Tensor:
        """Black and white (B, pixels): what is recalled for x, at a threshold of 1/2."""
        return (self(x)[0] >= 0.5).to(x.dtype)


@dataclass(frozen=True, kw_only=True, repr=False)
class RandomStart(SimpleFixedPointIteration):
    """u ← L u + b, from a start whose numbers are uniform in (0, spread). For affine maps only.

    A gradient method hands its cotangent on at norm 1. So a start uniform in (0, 1) for a cotangent g is one of
    spread 1/‖g‖ here.

    Example:
        >>> from torchdeq import AffineMap
        >>> f = AffineMap(lambda u: 0.5 * u, torch.ones(1, 2))
        >>> RandomStart(max_iter=40, spread=10.0).run(f).z  # 1 + 1/2 + 1/4 + …, whatever the start
        tensor([[2., 2.]])
    """

    spread: float = 1.0

    def run(self, f: Any, z0: Tensor | None = None, **options: Any) -> Solution:
        """See `Solver.run`. A start that is given is taken."""
        return super().run(f, self.spread * torch.rand_like(f.shift) if z0 is None else z0, **options)


def methods(steps: int = 20, *, spread: float = 8.0, eta: float = 1e-5) -> dict[str, GradMethod]:
    """The paper's gradient methods, by its names.

    Arguments:
        steps: K, the steps or terms of each but BPTT.
        spread: of RBP's start, see `RandomStart`. The gradient of a mean absolute error over 64 pixels has norm 1/8.
        eta: η of CG-RBP.

    Example:
        >>> methods(20)["Neumann-RBP"]
        NeumannPhantom(terms=20)
    """
    counted: dict[str, Any] = {"max_iter": steps + 1, "tol": math.inf, "return_final": True}
    return {
        "BPTT": Unroll(),
        "TBPTT": Unroll(last=steps),
        "RBP": IFT(solver=RandomStart(**counted, spread=spread)),
        # A product with I − Jᵀ and one with I − J a step, and two for the first and the last residual.
        "CG-RBP": IFT(solver=CGNR(max_iter=2 * steps + 2, tol=1e-4, eta=eta)),
        "Neumann-RBP": NeumannPhantom(terms=steps),
    }
