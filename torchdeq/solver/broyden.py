"""Broyden's ("good") method on r(z) = f(z) − z, with the inverse Jacobian as a sum of rank-one terms.

    d = −H r,   z⁺ = z + α d,   s = z⁺ − z,   y = r⁺ − r,
    H⁺ = H + (s − H y) vᵀ / (vᵀ y),   v = Hᵀ s,   H₀ = −I  (so that the first step is Picard's).

Sources: Broyden (1965); the product form in Kelley, Iterative Methods for Linear and Nonlinear Equations
(1995), chapter 7; in deep equilibrium models Bai, Kolter and Koltun (2019), arXiv 1909.01377. Departures: at the
memory limit the memory is emptied rather than overwritten (a term of the sum depends on those before it, so
no single one may be replaced); the line search backtracks per sample without evaluations of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from torchdeq._state import Map, per_sample
from torchdeq.solver.base import Solver

_DECREASE = 1e-4  # Armijo's constant: accept α when ‖r⁺‖ ≤ (1 − 1e-4 α) ‖r‖
_SMALLEST = 1 / 64  # … or when α has become this small


class BroydenState(NamedTuple):
    """What Broyden remembers. H = −I + Σ_{i<n} us_i vs_iᵀ."""

    z: Tensor  # (B, D), the last accepted iterate
    r: Tensor  # (B, D), its residual
    d: Tensor  # (B, D), the direction taken from it
    alpha: Tensor  # (B,), the step length tried along d
    us: Tensor  # (B, capacity, D)
    vs: Tensor  # (B, capacity, D)
    n: int  # terms in use; −1 before the first step


@dataclass(frozen=True, kw_only=True, repr=False)
class Broyden(Solver):
    """Broyden's method. One evaluation per step; memory two states per step since the last restart.

    Arguments:
        m: the largest number of rank-one terms before a restart, at least 1. None: never restart. Memory
            grows as it is used.
        ls: backtrack along the direction, per sample, until the residual decreases (Armijo). Every trial is
            one of the counted evaluations.

    Example:
        >>> import torch
        >>> a = torch.tensor([[0.5, 0.4], [-0.3, 0.9]], dtype=torch.float64)
        >>> sol = Broyden(tol=1e-12)(lambda z: z @ a.T + 1, torch.zeros(1, 2, dtype=torch.float64))
        >>> sol.nfe <= 2 * 2 + 1  # a linear problem of n unknowns ends within 2n steps (Gay, 1979)
        True
    """

    m: int | None = None
    ls: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.m is None or (isinstance(self.m, int) and self.m >= 1),
            f"the memory limit m must be None or an integer of at least 1, got {self.m!r}",
        )

    def init(self, z: Tensor) -> BroydenState:
        """An empty memory."""
        none = z.new_zeros(z.shape[0], 0, z.shape[1])
        return BroydenState(z, z, z, z.new_ones(z.shape[0]), none, none, -1)

    def step(self, f: Map, z: Tensor, fz: Tensor, state: BroydenState) -> tuple[Tensor, BroydenState]:
        """One secant update where the last trial was accepted; a shorter trial where it was not."""
        r = fz - z
        if state.n < 0:
            return z + r, state._replace(z=z, r=r, d=r, n=0)
        accepted = self._accepted(r, state)
        us, vs, n = state.us, state.vs, state.n
        if n == (self.m or self.max_iter):  # empty the memory: H = −I again, for all
            us, vs, n = us[:, :0], vs[:, :0], 0
            if accepted is not None:
                z = torch.where(accepted[:, None], z, state.z)
                r = torch.where(accepted[:, None], r, state.r)
            return z + r, BroydenState(z, r, r, torch.ones_like(state.alpha), us, vs, n)
        else:
            us, vs = _with_room(us, n), _with_room(vs, n)
            u, v = us[:, :n], vs[:, :n]
            s, y = z - state.z, r - state.r
            hr = _times(u, v, r)  # H r⁺
            hy = hr + state.d  # H y, since H r = −d
            vt = _times(v, u, s)  # Hᵀ s
            # (B, 2): vᵀy, and vᵀr for the new direction
            vy, vr = torch.bmm(torch.stack((y, r), dim=1), vt[:, :, None])[:, :, 0].unbind(1)
            # Near 0 the secant equation says nothing; its usual size is ‖s‖², which it has at H = J⁻¹.
            info = torch.finfo(z.dtype)
            safe = vy.abs() > (info.eps * per_sample(s).square()).clamp_min(info.tiny / info.eps)
            inverse = torch.where(safe if accepted is None else safe & accepted, 1 / vy, 0.0)
            us[:, n] = w = (s - hy) * inverse[:, None]
            vs[:, n] = vt
            d = -(hr + w * vr[:, None])
            n += 1
        if accepted is not None:
            keep = accepted[:, None]
            alpha = torch.where(accepted, 1.0, state.alpha / 2)
            base, r, d = (
                torch.where(keep, z, state.z),
                torch.where(keep, r, state.r),
                torch.where(keep, d, state.d),
            )
            return base + alpha[:, None] * d, BroydenState(base, r, d, alpha, us, vs, n)
        return z + d, BroydenState(z, r, d, state.alpha, us, vs, n)

    def _accepted(self, r: Tensor, state: BroydenState) -> Tensor | None:
        """Which samples' last trial is kept, (B,); None for all of them."""
        if not self.ls:
            return None
        enough = per_sample(r) <= (1 - _DECREASE * state.alpha) * per_sample(state.r)
        return enough | (state.alpha <= _SMALLEST)


def _times(us: Tensor, vs: Tensor, x: Tensor) -> Tensor:
    """(−I + Σ us_i vs_iᵀ) x, per sample, (B, D)."""
    if us.shape[1] == 0:
        return -x
    inner = torch.bmm(x[:, None], vs.mT)  # (B, 1, n)
    return torch.baddbmm(x[:, None], inner, us, beta=-1)[:, 0]


def _with_room(buffer: Tensor, n: int) -> Tensor:
    """The buffer (B, capacity, D) with capacity above n; capacity doubles, so memory follows use."""
    batch, capacity, size = buffer.shape
    if n < capacity:
        return buffer
    return torch.cat([buffer, buffer.new_zeros(batch, max(4, capacity), size)], dim=1)
