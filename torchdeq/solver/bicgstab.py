"""BiCGSTAB for (I − L) u = b: two products per iteration and no basis.

    α = ⟨r̂, r⟩ / ⟨r̂, A p⟩,        s = r − α A p,       u ← u + α p,      A = I − L,
    ω = ⟨A s, s⟩ / ‖A s‖²,         r ← s − ω A s,       u ← u + ω s,
    β = (⟨r̂, r⟩_new / ⟨r̂, r⟩)(α / ω),                   p ← r + β (p − ω A p).

Source: van der Vorst (1992), doi 10.1137/0913035. Departures: one recurrence per sample, all in one batch. It may
stop after half an iteration. Where ⟨r̂, A p⟩, ⟨r̂, r⟩ or ω vanishes to rounding, that sample begins again with its
current residual as the shadow residual r̂.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from torchdeq._state import per_sample
from torchdeq.solver.affine import AffineSolver, dot, ratio


class BiCGSTABState(NamedTuple):
    """The iterate, its residual and the search direction; per sample."""

    probe: Tensor  # (B, D), p in the first half of an iteration, s in the second
    u: Tensor  # (B, D)
    r: Tensor  # (B, D), s in the second half
    p: Tensor  # (B, D), the search direction
    ap: Tensor  # (B, D), A p
    shadow: Tensor  # (B, D), r̂
    rho: Tensor  # (B,), ⟨r̂, r⟩
    alpha: Tensor  # (B,); 0 where ⟨r̂, A p⟩ vanished
    half: bool  # in the second half


@dataclass(frozen=True, kw_only=True, repr=False)
class BiCGSTAB(AffineSolver):
    """BiCGSTAB, per sample. Two products per iteration; memory six states, however long it runs.

    For a nonsymmetric L where the basis of `GMRES` is too large. It needs 1.1 to 2.2 times as many products; where L
    is strongly nonnormal, more than `Neumann`. Its residual goes up and down; the best iterate, also one of half an
    iteration, is returned. It fails where ⟨A r, r⟩ is near zero, as for an I − L that is nearly skew: use `GMRES`
    there.

    Example:
        >>> import torch
        >>> from torchdeq import AffineMap
        >>> a = torch.tensor([[0.5, 0.4], [-0.2, 0.3]], dtype=torch.float64)
        >>> sol = BiCGSTAB(tol=1e-10).run(AffineMap(lambda u: u @ a.T, torch.ones(1, 2, dtype=torch.float64)))
        >>> [round(x, 6) for x in sol.z[0].tolist()], sol.nstep.item()
        ([2.55814, 0.697674], 3)
    """

    def first(self, r: Tensor) -> BiCGSTABState:
        """Shadow residual and direction are the residual."""
        zero = torch.zeros_like(r)
        rho = dot(r, r)
        return BiCGSTABState(r, zero, r, r, zero, r, rho, torch.zeros_like(rho), False)

    def advance(self, ap: Tensor, state: BiCGSTABState) -> tuple[BiCGSTABState, Tensor]:
        """Half an iteration."""
        state = _second_half(ap, state) if state.half else _first_half(ap, state)
        return state, per_sample(state.r)

    def correction(self, state: BiCGSTABState, steps: Tensor) -> Tensor:
        """The iterate."""
        return state.u


def _first_half(ap: Tensor, state: BiCGSTABState) -> BiCGSTABState:
    """The step along p. Where ⟨r̂, A p⟩ vanishes there is none, and the second half begins at r."""
    sigma = dot(state.shadow, ap)
    alpha = ratio(state.rho, sigma, _distinct(sigma, state.shadow, ap))
    s = state.r - alpha[:, None] * ap
    return state._replace(probe=s, u=state.u + alpha[:, None] * state.p, r=s, ap=ap, alpha=alpha, half=True)


def _second_half(at: Tensor, state: BiCGSTABState) -> BiCGSTABState:
    """The step along s, to the smallest residual, and the next direction."""
    s = state.r
    descent = dot(at, s)
    descends = _distinct(descent, at, s)
    omega = ratio(descent, dot(at, at), descends)
    r = s - omega[:, None] * at
    u = state.u + omega[:, None] * s
    rho = dot(state.shadow, r)
    goes_on = descends & (state.alpha != 0) & _distinct(rho, state.shadow, r)
    beta = ratio(rho, state.rho, goes_on) * ratio(state.alpha, omega, goes_on)
    p = r + beta[:, None] * (state.p - omega[:, None] * state.ap)
    stuck = ~descends & (state.alpha == 0)  # both steps were zero, and would be again
    return BiCGSTABState(
        probe=torch.where(stuck[:, None], 0.0, p),
        u=u,
        r=r,
        p=p,
        ap=state.ap,
        shadow=torch.where(goes_on[:, None], state.shadow, r),
        rho=torch.where(goes_on, rho, dot(r, r)),
        alpha=state.alpha,
        half=False,
    )


def _distinct(product: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Whether ⟨a, b⟩ = product (B,) is more than the rounding of its sum."""
    return product.abs() > 10 * torch.finfo(a.dtype).eps * per_sample(a) * per_sample(b)
