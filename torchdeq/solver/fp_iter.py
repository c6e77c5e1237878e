"""Picard iteration, damped: z_{k+1} = τ f(z_k) + (1 − τ) z_k.

Converges when |1 − τ + τλ| < 1 for every eigenvalue λ of the Jacobian J of f at the fixed point: for τ = 1
when the spectral radius of J is below 1; a τ below 1 helps against eigenvalues near −1 or below it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from torchdeq._state import Map
from torchdeq.solver.base import Solver


@dataclass(frozen=True, kw_only=True, repr=False)
class FixedPointIteration(Solver):
    """Picard iteration with damping. One evaluation and no memory per step.

    Arguments:
        tau: the damping τ in (0, 2). The residual, and so the meaning of `tol`, is that of f itself,
            whatever τ is.

    Example:
        >>> import torch
        >>> sol = FixedPointIteration(tol=1e-6)(torch.cos, torch.zeros(1, 1))
        >>> round(sol.z.item(), 4)
        0.7391
    """

    tau: float = 1.0

    separate: ClassVar[bool] = False
    fixed_shape: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            0 < self.tau < 2,
            f"the damping tau must lie in (0, 2), got {self.tau!r}; 1 is plain iteration",
        )

    def init(self, z: Tensor) -> None:
        """Picard iteration remembers nothing."""
        return None

    def step(self, f: Map, z: Tensor, fz: Tensor, state: None) -> tuple[Tensor, None]:
        """z + τ (f(z) − z)."""
        # A copy: f may write its next output into the same memory.
        return (fz.clone() if self.tau == 1 else z.lerp(fz, self.tau)), None


@dataclass(frozen=True, kw_only=True, repr=False)
class SimpleFixedPointIteration(FixedPointIteration):
    """Exactly `max_iter` evaluations of Picard iteration without looking at residuals on the way.

    Saves the residual norms and the stop test, one host read, per evaluation. The residual of the returned
    state is measured once, at the last evaluation; a sample that is not finite by then gets z0 back.

    Example:
        >>> import torch
        >>> SimpleFixedPointIteration(max_iter=30)(torch.cos, torch.zeros(1, 1)).nfe
        30
    """

    monitors: ClassVar[bool] = False
    fixed_shape: ClassVar[bool] = False
