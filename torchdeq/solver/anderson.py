"""Anderson acceleration, in difference form.

With residuals r_k = f(z_k) − z_k and the last m differences ΔR = [Δr_1 … Δr_m], ΔZ likewise,

    z_{k+1} = z_k + τ r_k − (ΔZ + τ ΔR) γ,

    type II:  γ = argmin ‖r_k − ΔR γ‖²          type I:  ΔZᵀ (r_k − ΔR γ) = 0.

Sources: Anderson (1965); Walker and Ni (2011), doi 10.1137/10078356X, for the difference form; Fang and Saad (2009),
doi 10.1002/nla.617, for type I. Departures: differences of unit norm, and a small multiple `lam` of the identity
added to their Gram matrix, so that the regularisation is relative and the iterates do not change when f is rescaled;
coefficients are per sample; with type II a residual that has more than doubled empties the history of its sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torchdeq._state import Map
from torchdeq.solver.maps import Tally, residual_of
from torchdeq.solver.secant import Entries, SecantSolver, SecantState, against, is_small, weight_of, with_room


@dataclass(frozen=True, kw_only=True, repr=False)
class Anderson(SecantSolver):
    """Anderson acceleration. One evaluation per step; memory 2m states.

    Arguments:
        m: the history length, the number of differences, at least 1. 5 is a good compromise; more helps on
            ill-conditioned maps and costs memory.
        lam: the regularisation relative to the unit diagonal of the scaled Gram matrix, at least 0. None:
            1e-8 in float64, 1e-6 in float32. Values between 1e-8 and 1e-4 behave alike. Type I has none.
        tau: the mixing τ in (0, 2).
        type: 2 makes the predicted residual smallest; 1 lets the last m secant equations hold, which does better far
            from a contraction and worse on one.

    Complex states are pairs of real numbers here: their inner products are the real parts of the Hermitian ones, and
    γ is real, which is right also for an f that conjugates.

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
    tau: float = 1.0  # type: ignore[misc] # a class variable of the family, a field here
    type: Literal[1, 2] = 2

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
        self.require(self.type in (1, 2), f"type must be 1 or 2, got {self.type!r}")

    @property
    def depth(self) -> int:
        """m."""
        return self.m

    @property
    def growth(self) -> float:  # type: ignore[override]
        """Type I often grows on its way and comes back; to forget then does harm."""
        return 2.0 if self.type == 2 else math.inf

    @property
    def keeps_y(self) -> bool:  # type: ignore[override]
        """V is Y for type II, and S for type I."""
        return self.type == 2

    @property
    def needs_s(self) -> bool:  # type: ignore[override]
        """Only type I multiplies with differences of z."""
        return self.type == 1

    @property
    def positive(self) -> bool:  # type: ignore[override]
        """K is Y Yᵀ + λ I for type II."""
        return self.type == 2

    def step(self, f: Map, z: Tensor, fz: Tensor, state: SecantState) -> tuple[Tensor, SecantState]:
        """The step, by the quick way where every residual has clearly fallen."""
        if isinstance(f, Tally) and f.fell and self.type == 2 and self.is_usual(z, state):
            z_next, after = self._quick_step(f, z, fz, state)
            if z_next is not None:
                return z_next, after
        return super().step(f, z, fz, state)

    def _quick_step(
        self, f: Tally, z: Tensor, fz: Tensor, state: SecantState
    ) -> tuple[Tensor | None, SecantState]:
        """What `SecantSolver.step` does where no difference is void and no residual has grown, to the last bit, in half
        the operations.

        Written into the histories at once; by views that are made once; and by Cholesky's method. None if K, rounded,
        is not positive definite.
        """
        r, size = residual_of(f, z, fz)
        pairs, depth = int(state.pairs), self._depth(z.shape[1])
        n, slot = min(pairs + 1, depth), pairs % depth
        state = with_room(state, n, depth)
        views: Views = state.quick
        if views is None or views.n != n or views.k is not state.k or views.v is not state.v:
            views = Views(state, n)
            state = state._replace(quick=views)
        y, u, row_y, row, column, corner = views.slots[slot]
        torch.sub(r, state.r, out=y)
        torch.sub(z, state.z, out=u).add_(y, alpha=self.tau)
        weight, _ = weight_of(f, y, size)
        y.mul_(weight)
        u.mul_(weight)
        torch.bmm(row_y, views.history, out=views.yy)
        torch.bmm(r[:, None], views.history, out=views.yr)
        row.copy_(views.new)
        column.copy_(views.new)
        corner.fill_(1 + (default_lam(y.dtype) if self.lam is None else self.lam))
        views.b.copy_(views.yr)
        factor, info = torch.linalg.cholesky_ex(views.system)
        if any(info.tolist()):
            return None, state
        torch.cholesky_solve(views.right, factor, out=views.solution)
        views.gamma.copy_(views.found)
        step = torch.add(z, r, alpha=self.tau)
        if views.small is None:
            step[:, None].baddbmm_(views.gamma, views.u, alpha=-1)
        else:
            torch.bmm(views.twice, views.u, out=views.small)
            step.sub_(views.small[:, 0])
        return step, state._replace(z=z, r=r, size=size, pairs=pairs + 1)

    def entries(self, v: Tensor, u: Tensor, s: Tensor, y: Tensor, r: Tensor) -> Entries:
        """(Y Yᵀ + λ I) γ = Y r, or S Yᵀ γ = S r."""
        if self.type == 2:
            yy, yr = against(v, y, r)
            lam = default_lam(y.dtype) if self.lam is None else self.lam
            return Entries(yy, yy, 1 + lam, yr[:, 0])
        sy, sr, ss = against(v, y, r, s)
        (us,) = against(u, s)
        return Entries((us - ss) / self.tau, sy, None, sr[:, 0])


class Views:
    """Parts of the histories and of the small system, and memory for what a quick step needs for a moment.

    To make a view takes the host as long as an operation on a small batch.

    Arguments:
        state: whose histories they are.
        n: how many rows are in use.
    """

    def __init__(self, state: SecantState, n: int):
        batch, _, d = state.v.shape
        self.n, self.v, self.k = n, state.v, state.k
        v, self.u, self.system = state.v[:, :n], state.u[:, :n], state.k[:, 0]
        self.history = v.transpose(1, 2)
        used = self.system[:, :n, :n]
        rows, columns, corners = used.unbind(1), used.unbind(2), used.diagonal(dim1=1, dim2=2).unbind(1)
        #: For the pair of each number: where y and u go, (B, D); y again, (B, 1, D); and row, column, corner of K.
        self.slots = list(
            zip(v.unbind(1), self.u.unbind(1), v.split(1, dim=1), rows, columns, corners, strict=True)
        )
        self.products = v.new_empty(batch, 2, n)  # Y y and Y r
        self.yy, self.yr = self.products.split(1, dim=1)
        self.new = self.yy[:, 0]
        self.right = self.system.new_zeros(batch, self.system.shape[1], 1)
        self.solution = torch.empty_like(self.right)
        self.b, self.found = self.right[:, :n].mT, self.solution[:, :n].mT  # (B, 1, n)
        # Two rows, of which one is zero, where one is so small that torch would make the product without BLAS.
        self.small = v.new_empty(batch, 2, d) if is_small(self.u) else None
        self.twice = v.new_zeros(batch, 2, n)
        self.gamma = self.twice[:, :1]


def regularised(gram: Tensor, lam: float | None = None) -> Tensor:
    """The Gram matrix of unit vectors (B, n, n) + λ I; λ by dtype if it is None."""
    gram = gram.clone()
    gram.diagonal(dim1=1, dim2=2).add_(default_lam(gram.dtype) if lam is None else lam)
    return gram


def default_lam(dtype: torch.dtype) -> float:
    """λ for unit vectors of this dtype."""
    return 1e-8 if dtype == torch.float64 else 1e-6
