"""Jacobian-free backpropagation: the cotangent in the place of the adjoint solution.

    û = g,   dL/dθ ≈ Bᵀ g,   B = ∂f/∂θ at z*.

u = g + Jᵀ u for the exact adjoint u, so ‖û − u‖ ≤ γ ‖u‖ and cos(û, u) ≥ √(1 − γ²) with γ = ‖J‖, which is sharp: where
γ < 1, û is at an acute angle to u. Sources: Fung, Heaton, Li, McKenzie, Osher and Yin (2022), arXiv 2103.12803; the
one-step gradient of Geng et al. (2021), arXiv 2109.04553.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from torchdeq._state import Map
from torchdeq.grad.base import GradMethod, OnBackward
from torchdeq.grad.phantom import PhantomGrad


@dataclass(frozen=True, kw_only=True, repr=False)
class JFB(GradMethod):
    """One tracked step from the solved state, `PhantomGrad(steps=1)` by its other name.

    Bias: ‖û − u‖ ≤ γ ‖u‖ and cos(û, u) ≥ √(1 − γ²) with γ = ‖J‖ < 1. Memory: one graph of f. Cost: one tracked call of
    f; in a backward pass one product with Bᵀ. Differentiated again, it gives the derivative of the one step. After a
    fixed count of plain iteration, `Unroll(last=1)` tracks the last evaluation of the solve and needs none besides.

    Example:
        >>> import torch
        >>> a = torch.tensor(0.5, requires_grad=True)
        >>> z, = JFB().attach(lambda z: a * z + 1, torch.full((1, 1), 2.0))
        >>> z.sum().backward()
        >>> a.grad.item()  # B g with B = z* = 2 and g = 1; the exact one is 4
        2.0
    """

    def attach(self, f: Map, z: Tensor, *, on_backward: OnBackward | None = None) -> list[Tensor]:
        """See `GradMethod.attach`. Returns [f(z)]; there is no adjoint solve, so `on_backward` is not called."""
        return PhantomGrad().attach(f, z)
