"""GMRES for (I − L) u = b: the u in the Krylov space of smallest residual.

    A V_j = V_{j+1} H_j,   A = I − L;   y = argmin ‖β e₁ − H_j y‖;   u = u₀ + V_j y.

Source: Saad and Schultz (1986), doi 10.1137/0907058. The residual norm along the way is β / ‖t‖ with the t that has
tᵀH_j = 0 and t₁ = 1: of the columns of H_j each gives the next number of t. The rotations that make H_j triangular
follow from t alone. So they are made once, at the end, and all at a time.
Departures: one Krylov space per sample, all in one batch; orthogonalised twice, against loss of orthogonality.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from torchdeq._state import rough_norm
from torchdeq.solver.affine import AffineSolver
from torchdeq.solver.secant import longer, precise

#: Rows of so many numbers are aligned in memory; then products of matrices round alike for any size of the batch.
_ALIGNED = 16
#: For infinity in t, where the space holds the solution. Its square is still a float32.
_ENDLESS = 1e18


class GMRESState(NamedTuple):
    """The Arnoldi basis and H, j columns in use. In a graph that serves every step j is a tensor (1,)."""

    probe: Tensor  # (B, D), the basis vector A is wanted at
    basis: Tensor  # (B, capacity, D), orthonormal rows, and zeros for alignment
    h: Tensor  # (B, capacity, capacity), its rows are the columns of H
    t: Tensor  # (B, capacity)
    squares: Tensor  # (B,), ‖t‖²
    largest: Tensor  # (B,), the largest ‖A v‖
    used: Tensor  # (B,), int64, how many columns count
    alive: Tensor  # (B,), whether there was a new direction
    j: int | Tensor


@dataclass(frozen=True, kw_only=True, repr=False)
class GMRES(AffineSolver):
    """GMRES, per sample; the default solver of adjoint systems.

    No method that sees only products with L needs fewer of them for the same residual. Memory: one state
    per step. A singular I − L gives the least-squares solution in the Krylov space.

    Arguments:
        m: the number of steps before a restart, at least 1, which bounds the memory. Each restart begins at the true
            residual, which costs one more product. None: no restart. Restarts lose what was learned: with m ≤ 10 a
            nonnormal J, one with ‖J‖ far above its spectral radius, often stalls. `BiCGSTAB` needs no basis at all.

    Example:
        >>> import torch
        >>> from torchdeq import AffineMap
        >>> a = torch.diag(torch.tensor([0.9, -0.9, 0.5], dtype=torch.float64))
        >>> f = AffineMap(lambda u: u @ a.T, torch.ones(1, 3, dtype=torch.float64))
        >>> sol = GMRES(tol=1e-10)(f, torch.zeros(1, 3, dtype=torch.float64))
        >>> [round(x, 6) for x in sol.z[0].tolist()]
        [10.0, 0.526316, 2.0]
        >>> sol.nstep.item()  # three distinct eigenvalues, three steps
        3
    """

    m: int | None = None

    monotone: ClassVar[bool] = True
    fixed_shape: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.m is None or (isinstance(self.m, int) and self.m >= 1),
            f"m, the number of steps before a restart, must be an integer of at least 1 or None, got {self.m!r}",
        )

    @property
    def cycle(self) -> int | None:
        """See `AffineSolver.cycle`."""
        return self.m

    def first(self, r: Tensor) -> GMRESState:
        """The first basis vector is the unit residual."""
        capacity, row = 4, r.new_zeros(r.shape[0])
        basis = r.new_zeros(r.shape[0], capacity, r.shape[1] + -r.shape[1] % _ALIGNED)
        basis[:, 0, : r.shape[1]] = r
        square = r.new_zeros(r.shape[0], capacity, capacity)
        t = square[:, 0].clone()
        t[:, 0] = 1
        used = torch.zeros_like(row, dtype=torch.int64)
        return GMRESState(r, basis, square, t, row + 1, row, used, used == 0, 0)

    def room(self, state: GMRESState, steps: int) -> GMRESState:
        """See `SolverLoop.room`."""
        if isinstance(state.j, int):
            state = state._replace(j=torch.full((1,), state.j, device=state.h.device))
            return _widened(state, steps + 1) if steps >= state.t.shape[1] else state
        return _widened(state, state.t.shape[1] + steps)

    def alive(self, state: GMRESState) -> Tensor:
        """See `AffineSolver.alive`."""
        return state.alive

    def advance(self, ap: Tensor, state: GMRESState) -> tuple[GMRESState, Tensor]:
        """One Arnoldi step, and the next number of t."""
        j, size = state.j, ap.shape[1]
        if isinstance(j, int):
            if j + 2 > state.t.shape[1]:
                state = _widened(state, state.t.shape[1] + min(state.t.shape[1], 8))
            v, t = state.basis[:, : j + 1], state.t[:, : j + 1]
        else:
            v, t = state.basis, state.t
        extra = -size % _ALIGNED
        w = (torch.nn.functional.pad(ap, (0, extra)) if extra else ap)[:, None]
        h = torch.bmm(w, v.transpose(1, 2))  # (B, 1, j + 1)
        w = torch.baddbmm(w, h, v, alpha=-1)
        again = torch.bmm(w, v.transpose(1, 2))  # "twice is enough"
        w = torch.baddbmm(w, again, v, alpha=-1)[:, 0]
        h = (h + again)[:, 0]
        largest = torch.maximum(state.largest, rough_norm(ap))
        # What is left below rounding of A is no new direction: the space is exhausted.
        rest, noise = rough_norm(w), 10 * torch.finfo(w.dtype).eps * largest
        pull = (h * t).sum(dim=1)  # tᵀH without its last number
        alive = (rest > noise) & (rest < math.inf)
        next_t = pull / -rest
        if w.device.type == "cpu" and not torch.compiler.is_compiling() and bool(alive.all()):
            used, squares = state.used + 1, torch.addcmul(state.squares, next_t, next_t)
            estimate, length = squares.rsqrt(), rest
        else:
            # An exhausted space holds the solution, unless H is singular; then its last column is of no use.
            solves = ~alive & (pull.abs() > noise * state.squares.sqrt())
            rest = torch.where(alive, rest, 0.0)
            next_t = torch.where(solves, _ENDLESS, torch.where(alive, next_t, 0.0))
            w = torch.where(alive[:, None], w, 0.0)
            squares = torch.addcmul(state.squares, next_t, next_t)
            used = state.used + (alive | solves)
            estimate = torch.where(solves, 0.0, torch.where(largest < math.inf, squares.rsqrt(), math.nan))
            length = torch.where(alive, rest, 1.0)
        probe = w / length[:, None]
        if isinstance(j, int):
            state.basis[:, j + 1] = probe
            state.h[:, j, : j + 1] = h
            state.h[:, j, j + 1] = rest
            state.t[:, j + 1] = next_t
        else:
            after = torch.arange(state.t.shape[1], device=j.device) == j + 1
            state.basis.index_copy_(1, j + 1, probe[:, None])
            state.h.index_copy_(1, j, torch.where(after, rest[:, None], h)[:, None])
            state.t.index_copy_(1, j + 1, next_t[:, None])
        probe = probe[:, :size].contiguous() if extra else probe
        state = state._replace(probe=probe, squares=squares, largest=largest, used=used, alive=alive, j=j + 1)
        return state, estimate

    def correction(self, state: GMRESState, steps: Tensor) -> Tensor:
        """V_j y with the y of the smallest ‖e₁ − H_j y‖."""
        n = state.j if isinstance(state.j, int) else state.t.shape[1] - 1
        y = _least_squares(state.h[:, :n, : n + 1], state.t[:, : n + 1], state.used)
        y, basis, size = y.to(state.basis.dtype), state.basis[:, :n], state.probe.shape[1]
        if y.dtype == torch.float64 and y.device.type == "cpu":
            # A product would round by how many rows are unused.
            return (y[:, :, None] * basis).sum(dim=1)[:, :size]
        return torch.bmm(y[:, None], basis)[:, 0, :size]


def _least_squares(h: Tensor, t: Tensor, used: Tensor) -> Tensor:
    """argmin ‖e₁ − H y‖ over the first `used` unknowns of each sample; the others are 0.

    Rotation k makes row k of H into c tᵀ/τ_k H + s h_{k+1}, with s = τ_k/τ_{k+1}, c = −t_{k+1}/τ_{k+1} and the norm τ_k
    of the first k numbers of t. The sums grow from column to column, so that they round alike for any n.

    Arguments:
        h: the columns of H, (B, n, n + 1).
        t: (B, n + 1).
        used: (B,).
    """
    h, t = h.to(precise(h)), t.to(precise(t))
    n = h.shape[1]
    counts = torch.arange(n, device=h.device) < used[:, None]  # (B, n)
    h = torch.where(counts[:, :, None], h, 0.0)  # a product that was not finite is not counted
    norm = (t * t).cumsum(dim=1).sqrt()
    before, after = norm[:, :-1], norm[:, 1:]
    b = -t[:, 1:] / (before * after)
    r = (t[:, None] * h).cumsum(dim=2)[:, :, :-1] * b[:, None] + h[:, :, 1:] * (before / after)[:, None]
    pivots = torch.where(counts, r.diagonal(dim1=1, dim2=2), 1.0)
    r, y = r / pivots[:, None], torch.where(counts, b, 0.0) / pivots  # r: the columns of R, rows scaled
    if y.dtype == torch.float64 and y.device.type == "cpu" and not torch.compiler.is_compiling():
        # Column by column, as a solve by blocks would round by how many unknowns the neighbours use.
        for i in range(n - 1, 0, -1):
            y[:, :i].addcmul_(r[:, i, :i], y[:, i : i + 1], value=-1)
        return y
    return torch.linalg.solve_triangular(r.mT, y[:, :, None], upper=True, unitriangular=True)[:, :, 0]


def _widened(state: GMRESState, capacity: int) -> GMRESState:
    """The state with room for more columns; memory follows use."""
    more = capacity - state.t.shape[1]
    pad = torch.nn.functional.pad
    return state._replace(
        basis=longer(state.basis, capacity),
        h=pad(state.h, (0, more, 0, more)),
        t=pad(state.t, (0, more)),
    )
