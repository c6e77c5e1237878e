"""GMRES for (I − L) u = b: the u in the Krylov space of smallest residual.

    A V_j = V_{j+1} H_j,   A = I − L;   y = argmin ‖β e₁ − H_j y‖;   u = u₀ + V_j y.

Source: Saad and Schultz (1986), doi 10.1137/0907058. H is reduced to triangular form as it grows, by one Givens
rotation per step, kept as an accumulated orthogonal matrix, so that a step costs a fixed number of operations.
Departures: one Krylov space per sample, all in one batch; orthogonalised twice, against loss of orthogonality.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from torchdeq._state import per_sample
from torchdeq.solver.affine import AffineSolver, back_substitute


class GMRESState(NamedTuple):
    """The Arnoldi basis and the triangular factor, j columns in use."""

    basis: Tensor  # (B, capacity, D), orthonormal rows
    r: Tensor  # (B, capacity, capacity), upper triangular
    rotation: Tensor  # (B, capacity, capacity), product of the Givens rotations
    beta: Tensor  # (B,), norm of the first residual
    j: int
    probe: Tensor  # (B, D), the basis vector L is wanted at


@dataclass(frozen=True, kw_only=True, repr=False)
class GMRES(AffineSolver):
    """GMRES without restart, per sample; the default solver of adjoint systems.

    No method that sees only products with L needs fewer of them for the same residual. Memory: one state
    per step. A singular I − L gives the least-squares solution in the Krylov space.

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

    def first(self, r: Tensor) -> GMRESState:
        """The first basis vector is the residual, normalised; a zero residual gives a zero vector."""
        beta = per_sample(r)
        probe = _normalised(r, beta)
        capacity = 4
        basis = r.new_zeros(r.shape[0], capacity, r.shape[1])
        basis[:, 0] = probe
        square = r.new_zeros(r.shape[0], capacity, capacity)
        rotation = torch.eye(capacity, dtype=r.dtype, device=r.device).expand_as(square).clone()
        return GMRESState(basis, square, rotation, beta, 0, probe)

    def advance(self, lp: Tensor, state: GMRESState) -> tuple[GMRESState, Tensor]:
        """One Arnoldi step and one Givens rotation."""
        basis, r, rotation, beta, j, probe = _with_room(state)
        w = probe - lp  # A v_j
        size = per_sample(w)
        v = basis[:, : j + 1]
        h = torch.bmm(w[:, None], v.mT)  # (B, 1, j + 1)
        w = torch.baddbmm(w[:, None], h, v, alpha=-1)
        again = torch.bmm(w, v.mT)  # "twice is enough"
        w = torch.baddbmm(w, again, v, alpha=-1)[:, 0]
        h = (h + again)[:, 0]
        # What is left below rounding of A v_j is no new direction: the space is exhausted, the sample solved.
        rest = per_sample(w)
        goes_on = (rest > 10 * torch.finfo(w.dtype).eps * size) & rest.isfinite()
        rest = torch.where(goes_on, rest, 0.0)
        column = torch.cat([h, rest[:, None]], dim=1)  # (B, j + 2)
        column = torch.bmm(rotation[:, : j + 2, : j + 2], column[:, :, None])[:, :, 0]
        a, b = column[:, j], column[:, j + 1]
        length = torch.hypot(a, b)
        c = torch.where(length > 0, a / length, 1.0)
        s = torch.where(length > 0, b / length, 0.0)
        upper, lower = rotation[:, j].clone(), rotation[:, j + 1].clone()
        rotation[:, j] = c[:, None] * upper + s[:, None] * lower
        rotation[:, j + 1] = c[:, None] * lower - s[:, None] * upper
        r[:, :j, j] = column[:, :j]
        r[:, j, j] = length
        probe = _normalised(w, rest)
        basis[:, j + 1] = probe
        estimate = torch.where(size.isfinite(), beta * rotation[:, j + 1, 0].abs(), torch.nan)
        return GMRESState(basis, r, rotation, beta, j + 1, probe), estimate

    def correction(self, state: GMRESState, steps: Tensor) -> Tensor:
        """V_j y with R y = β Q e₁."""
        j = state.j
        right = state.beta[:, None] * state.rotation[:, :j, 0]
        y = back_substitute(state.r[:, :j, :j], right, steps)
        return torch.bmm(y[:, None], state.basis[:, :j])[:, 0]


def _normalised(w: Tensor, size: Tensor) -> Tensor:
    return torch.where((size > 0)[:, None], w / size[:, None], 0.0)


def _with_room(state: GMRESState) -> GMRESState:
    """The state with room for one more column; capacity doubles, so memory follows use."""
    basis, r, rotation, beta, j, probe = state
    batch, capacity, _ = basis.shape
    if j + 2 <= capacity:
        return state
    basis = torch.cat([basis, torch.zeros_like(basis)], dim=1)
    wider = rotation.new_zeros(batch, 2 * capacity, 2 * capacity)
    wider.diagonal(dim1=1, dim2=2).fill_(1)
    wider[:, :capacity, :capacity] = rotation
    r = torch.nn.functional.pad(r, (0, capacity, 0, capacity))
    return GMRESState(basis, r, wider, beta, j, probe)
