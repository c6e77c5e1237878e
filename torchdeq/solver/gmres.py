"""GMRES for (I − L) u = b: the u in the Krylov space of smallest residual.

    A V_j = V_{j+1} H_j,   A = I − L;   y = argmin ‖β e₁ − H_j y‖;   u = u₀ + V_j y.

Source: Saad and Schultz (1986), doi 10.1137/0907058. H is reduced to triangular form as it grows, by one Givens
rotation per step, kept as an accumulated orthogonal matrix, so that a step costs a fixed number of operations.
Departures: one Krylov space per sample, all in one batch; orthogonalised twice, against loss of orthogonality.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from torchdeq._state import per_sample
from torchdeq.solver.affine import AffineSolver

#: Rows of so many numbers are aligned in memory; then products of matrices round alike for any size of the batch.
_ALIGNED = 16


class GMRESState(NamedTuple):
    """The Arnoldi basis and the triangular factor, j columns in use."""

    probe: Tensor  # (B, D), the basis vector A is wanted at
    basis: Tensor  # (B, capacity, D), orthonormal rows, and zeros for alignment
    r: Tensor  # (B, capacity, capacity), upper triangular
    rotation: Tensor  # (B, capacity, capacity), product of the Givens rotations
    j: int


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
        capacity = 4
        basis = r.new_zeros(r.shape[0], capacity, r.shape[1] + -r.shape[1] % _ALIGNED)
        basis[:, 0, : r.shape[1]] = r
        square = r.new_zeros(r.shape[0], capacity, capacity)
        rotation = torch.eye(capacity, dtype=r.dtype, device=r.device).expand_as(square).clone()
        return GMRESState(r, basis, square, rotation, 0)

    def advance(self, ap: Tensor, state: GMRESState) -> tuple[GMRESState, Tensor]:
        """One Arnoldi step and one Givens rotation."""
        _, basis, r, rotation, j = _with_room(state)
        v = basis[:, : j + 1]
        w = torch.nn.functional.pad(ap, (0, -ap.shape[1] % _ALIGNED))[:, None]
        h = torch.bmm(w, v.mT)  # (B, 1, j + 1)
        w = torch.baddbmm(w, h, v, alpha=-1)
        again = torch.bmm(w, v.mT)  # "twice is enough"
        w = torch.baddbmm(w, again, v, alpha=-1)[:, 0]
        h = (h + again)[:, 0]
        # What is left below rounding of A is no new direction: the space is exhausted.
        size = per_sample(ap)
        pivots = r[:, : j + 1, : j + 1].diagonal(dim1=1, dim2=2)  # (B, j + 1), the last still 0
        rounding = torch.finfo(w.dtype).eps * torch.maximum(size, pivots.amax(dim=1))
        rest = per_sample(w)
        goes_on = (rest > 10 * rounding) & rest.isfinite()
        rest = torch.where(goes_on, rest, 0.0)
        column = torch.cat([h, rest[:, None]], dim=1)  # (B, j + 2)
        # A sum: matrix products of rows that are not aligned round by the size of the batch.
        column = (rotation[:, : j + 2, : j + 2] * column[:, None]).sum(dim=2)
        a, b = column[:, j], column[:, j + 1]
        length = torch.hypot(a, b)
        c = torch.where(length > 0, a / length, 1.0)
        s = torch.where(length > 0, b / length, 0.0)
        upper, lower = rotation[:, j].clone(), rotation[:, j + 1].clone()
        rotation[:, j] = c[:, None] * upper + s[:, None] * lower
        rotation[:, j + 1] = c[:, None] * lower - s[:, None] * upper
        r[:, :j, j] = column[:, :j]
        r[:, j, j] = length
        probe = torch.where(goes_on[:, None], w / rest[:, None], 0.0)
        basis[:, j + 1] = probe
        probe = probe[:, : ap.shape[1]].contiguous()
        # An exhausted space holds the solution, unless its last pivot vanishes too: then I − L is singular.
        solves = goes_on | (length > 10 * rounding)
        estimate = torch.where(solves, rotation[:, j + 1, 0], upper[:, 0]).abs()
        estimate = torch.where(size.isfinite(), estimate, torch.nan)
        return GMRESState(probe, basis, r, rotation, j + 1), estimate

    def correction(self, state: GMRESState, steps: Tensor) -> Tensor:
        """V_j y with R y = Q e₁."""
        y = _back_substitute(state.r, state.rotation[:, :, 0], steps)
        if (
            y.dtype == torch.float64 and y.device.type == "cpu"
        ):  # where a product would round by how many rows are unused
            return (y[:, :, None] * state.basis).sum(dim=1)[:, : state.probe.shape[1]]
        return torch.bmm(y[:, None], state.basis)[:, 0, : state.probe.shape[1]]


def _back_substitute(r: Tensor, b: Tensor, steps: Tensor) -> Tensor:
    """y with R y = b in the leading `steps` unknowns of each sample and y = 0 in the others.

    Arguments:
        r: upper triangular, (B, n, n). A pivot that is zero to rounding gives y_i = 0.
        b: (B, n).
        steps: how many unknowns count, (B,).
    """
    used = torch.arange(b.shape[1], device=b.device) < steps[:, None]  # (B, n)
    pivots = r.diagonal(dim1=1, dim2=2).masked_fill(~used, 0.0)
    floor = 10 * torch.finfo(r.dtype).eps * pivots.abs().amax(dim=1, keepdim=True)
    used = used & (pivots.abs() > floor)
    r = torch.where(used[:, None, :] & used[:, :, None], r, 0.0)
    r = torch.diagonal_scatter(r, torch.where(used, pivots, 1.0), dim1=1, dim2=2)
    y = torch.where(used, b, 0.0)
    # Column by column, since a solve by blocks would round by how many unknowns the neighbours use.
    for i in reversed(range(y.shape[1])):
        y[:, i] /= r[:, i, i]
        y[:, :i] -= r[:, :i, i] * y[:, i, None]
    return y


def _with_room(state: GMRESState) -> GMRESState:
    """The state with room for one more column; capacity doubles, so memory follows use."""
    probe, basis, r, rotation, j = state
    batch, capacity, _ = basis.shape
    if j + 2 <= capacity:
        return state
    basis = torch.cat([basis, torch.zeros_like(basis)], dim=1)
    wider = rotation.new_zeros(batch, 2 * capacity, 2 * capacity)
    wider.diagonal(dim1=1, dim2=2).fill_(1)
    wider[:, :capacity, :capacity] = rotation
    r = torch.nn.functional.pad(r, (0, capacity, 0, capacity))
    return GMRESState(probe, basis, r, wider, j)
