"""Anderson acceleration, type II, in difference form.

With residuals r_k = f(z_k) − z_k and the last m differences ΔR = [Δr_1 … Δr_m], ΔZ likewise,

    γ = argmin ‖r_k − ΔR γ‖² ,      z_{k+1} = z_k + τ r_k − (ΔZ + τ ΔR) γ.

Sources: Anderson (1965); Walker and Ni (2011), doi 10.1137/10078356X, for the difference form. Departures: the
columns of ΔR are scaled to unit norm before the normal equations are formed and a small multiple `lam` of
the identity is added to the scaled Gram matrix, so that the regularisation is relative and the iterates do
not change when f is rescaled; coefficients are per sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from torchdeq._state import Map
from torchdeq.solver.base import Solver


class AndersonState(NamedTuple):
    """What Anderson remembers. n counts the steps taken; slot n mod m is overwritten next."""

    r: Tensor  # (B, D), the previous residual
    y: Tensor  # (B, D), the previous plain step z + τ r
    dr: Tensor  # (B, m, D), differences of r
    dy: Tensor  # (B, m, D), differences of y, which are ΔZ + τ ΔR
    gram: Tensor  # (B, m, m), dr @ dr.mT, kept by updating one row
    n: int


@dataclass(frozen=True, kw_only=True, repr=False)
class Anderson(Solver):
    """Anderson acceleration. One evaluation per step; memory 2m states.

    Arguments:
        m: the history length, the number of differences, at least 1. 5 is a good compromise; more helps on
            ill-conditioned maps and costs memory.
        lam: the regularisation relative to the unit diagonal of the scaled Gram matrix, at least 0. None:
            1e-8 in float64, 1e-6 in float32. Values between 1e-8 and 1e-4 behave alike.
        tau: the mixing τ in (0, 2).

    Example:
        >>> import torch
        >>> from torchdeq import FixedPointIteration
        >>> f = lambda z: torch.cos(z + torch.tensor([0.0, 0.2, 0.4]))
        >>> z0 = torch.zeros(1, 3, dtype=torch.float64)
        >>> Anderson(tol=1e-8)(f, z0).nfe < FixedPointIteration(tol=1e-8)(f, z0).nfe
        True
    """

    m: int = 5
    lam: float | None = None
    tau: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            isinstance(self.m, int) and self.m >= 1,
            f"the history length m must be an integer of at least 1, got {self.m!r}. For plain "
            f"iteration use FixedPointIteration()",
        )
        self.require(
            self.lam is None or self.lam >= 0,
            f"lam is relative to a unit diagonal and must be at least 0, got {self.lam!r}",
        )
        self.require(0 < self.tau < 2, f"the mixing tau must lie in (0, 2), got {self.tau!r}")

    def init(self, z: Tensor) -> AndersonState:
        """An empty history, as wide as it can get used within `max_iter`."""
        m = max(1, min(self.m, self.max_iter - 1))
        batch, size = z.shape
        history = z.new_zeros(2, batch, m, size)
        return AndersonState(z, z, history[0], history[1], z.new_zeros(batch, m, m), 0)

    def step(self, f: Map, z: Tensor, fz: Tensor, state: AndersonState) -> tuple[Tensor, AndersonState]:
        """The minimiser over the last differences; the first step is Picard's."""
        r = fz - z
        y = torch.add(z, r, alpha=self.tau)
        n, dr, dy, gram = state.n, state.dr, state.dy, state.gram
        if n == 0:
            return y, state._replace(r=r, y=y, n=1)
        slot = (n - 1) % dr.shape[1]
        torch.sub(r, state.r, out=dr[:, slot])
        torch.sub(y, state.y, out=dy[:, slot])
        products = torch.bmm(torch.stack((dr[:, slot], r), dim=1), dr.mT)  # (B, 2, m): ΔRᵀΔr_k and ΔRᵀr
        gram[:, slot] = gram[:, :, slot] = products[:, 0]
        gamma = self._coefficients(gram, products[:, 1])
        z_next = torch.baddbmm(y[:, None], gamma[:, None], dy, alpha=-1)[:, 0]
        return z_next, AndersonState(r, y, dr, dy, gram, n + 1)

    def _coefficients(self, gram: Tensor, b: Tensor) -> Tensor:
        """(G + λ diag G) γ = b, (B, m): the problem with columns scaled to unit norm and λ I added, scaled back."""
        lam = self.lam
        if lam is None:
            lam = 1e-8 if gram.dtype == torch.float64 else 1e-6
        d = gram.diagonal(dim1=1, dim2=2)
        # An unused slot or a vanished difference has a zero row: 1 on its diagonal gives coefficient 0.
        h = gram + torch.diag_embed(torch.where(d > 0, lam * d, 1.0))
        gamma, info = torch.linalg.solve_ex(h, b)  # does not raise on a singular sample
        usable = (info == 0) & gamma.isfinite().all(dim=1)
        return torch.where(usable[:, None], gamma, 0.0)  # … which takes a plain step
