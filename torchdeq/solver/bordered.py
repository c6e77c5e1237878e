"""The step of a secant method as a part of a graph: K⁻¹ is kept and bordered, so that nothing has to be factored.

A graph has no cheap way to a small solve, but sums of products of small tensors are fused into one loop. When slot j
of K gets a new pair, with row ρ, column κ and corner c,

    M ← M − M e_j e_jᵀ M / M_jj            the inverse of K without the old pair,
    M ← M + (M κ − e_j)(ρ M − e_jᵀ) / s,   s = c − ρ M κ.

The second is the inverse of a bordered matrix. Rows not in use are those of the identity. M is in float64, where the
device has it. A pair that would make K singular, s = 0 to rounding, does not count. Sources: the inverse of a bordered
matrix is that of Frobenius and Schur, as in Horn and Johnson, Matrix Analysis, 0.7.3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchdeq._state import Map, per_sample
from torchdeq.solver.maps import residual_of

if TYPE_CHECKING:
    from torchdeq.solver.secant import SecantSolver, SecantState

#: s within so many units of rounding of what it is the difference of is rounding: the sums in it have some tens of
#: products each, whose factors have such sums behind them.
_ROUNDING = 512


def bordered_step(
    solver: SecantSolver, f: Map, z: Tensor, fz: Tensor, state: SecantState
) -> tuple[Tensor, SecantState]:
    """`SecantSolver.step` with tensors for what is a number there.

    Arguments:
        solver: one of `fixed_shape`.
        f: the map, (B, D) -> (B, D).
        z, fz: the state and f(z), (B, D).
        state: with tensors for `pairs`, `valid` and `skip`. `state.k` holds M. It and the histories are written to.

    Returns:
        The next state, (B, D), and the solver's. A sample whose γ is not finite makes a Picard step, and begins anew.
    """
    assert isinstance(state.pairs, Tensor)
    assert state.valid is not None
    assert state.skip is not None
    r, size = residual_of(f, z, fz)
    n, begun = state.v.shape[1], state.pairs >= 0  # (1,)
    slot = state.pairs.clamp_min(0) % min(n, solver._depth(z.shape[1]))
    s, y = z - state.z, r - state.r
    length = per_sample(y)
    info = torch.finfo(z.dtype)
    void = (length <= (info.eps * size).clamp_min(info.tiny)) | (state.skip > 0) | ~begun
    weight = torch.where(void, 0.0, length.reciprocal())[:, None]
    s, y = s * weight, y * weight
    _write(state.v, slot, y if solver.keeps_y else s)
    _write(state.u, slot, torch.add(s, y, alpha=solver.tau))

    here = torch.arange(n, device=z.device) == slot  # (n,)
    grew = (size > solver.growth * state.size) & begun
    others = state.valid & ~grew[:, None] & ~here
    row, column, corner, b = solver.entries(state.v, state.u, s, y, r)
    inverse, counts = border(
        state.k[:, :, :n, :n], others, here, row, column, corner, void, solver.ridge(z.dtype)
    )
    more = solver.notice(size, state.size, state.more)
    if isinstance(more, Tensor):  # before the first evaluation there is nothing to notice
        more = torch.where(begun, more, state.more)
    valid = others | (here & (counts & begun & ~grew)[:, None])
    gamma = _chosen(inverse, b, valid, solver.of_y(more))
    sound = gamma.isfinite().all(dim=1, keepdim=True)  # a pivot of M was zero where an old pair left
    gamma, valid = torch.where(sound, gamma, 0.0), valid & sound
    state.k[:, :, :n, :n] = inverse

    step = torch.add(z, r, alpha=solver.tau)
    step = torch.where(grew[:, None], torch.add(z, r, alpha=solver.tau / 2), step)
    u = state.u if state.u.shape[2] == z.shape[1] else state.u[:, :, : z.shape[1]]
    z_next = step - torch.bmm(gamma.to(z.dtype)[:, None], u)[:, 0]
    return z_next, state._replace(
        z=z,
        r=r,
        size=size,
        more=more,
        pairs=state.pairs + 1,
        valid=valid,
        skip=(state.skip - 1).clamp_min(0),
    )


def border(
    inverse: Tensor,
    others: Tensor,
    here: Tensor,
    row: Tensor,
    column: Tensor,
    corner: float | None,
    void: Tensor,
    ridge: tuple[float, ...],
) -> tuple[Tensor, Tensor]:
    """M after a pair has come into a slot.

    Arguments:
        inverse: M, (B, matrices, n, n).
        others: which of the other pairs count, (B, n). If none does, M begins anew.
        here: the slot, (n,), bool.
        row, column: of K, (B, matrices, n). corner: K where they meet; None: what stands in the column.
        void: which samples have no pair, (B,).
        ridge: what is added to the diagonal of each matrix, where there is no corner.

    Returns:
        M, and whose pair counts, (B,).

    Example:
        >>> k = torch.tensor([[2.0, 1.0], [0.5, 3.0]], dtype=torch.float64)
        >>> m = torch.eye(2, dtype=torch.float64)[None, None].clone()
        >>> m[..., 0, 0] = 1 / 2
        >>> others, here = torch.tensor([[True, False]]), torch.tensor([False, True])
        >>> m, _ = border(m, others, here, k[None, None, 1], k[None, None, :, 1], None, torch.tensor([False]), (0.0,))
        >>> torch.allclose(m[0, 0], k.inverse())
        True
    """
    dtype = inverse.dtype
    one, unit = torch.eye(here.shape[0], dtype=dtype, device=here.device), here.to(dtype)
    m = torch.where(others.any(dim=1)[:, None, None, None], inverse, one)
    at, below = (m * unit).sum(3), (m * unit[:, None]).sum(2)  # M e_j and e_jᵀ M, (B, matrices, n)
    m = m - at[..., None] * below[:, :, None] / (at * unit).sum(2)[..., None, None]
    lone = void[:, None, None]
    if corner is None:
        extra = torch.tensor(ridge, dtype=dtype, device=here.device)
        c = torch.where(void[:, None], 1.0, (column.to(dtype) * unit).sum(2) + extra)
    else:
        c = torch.full_like(at[..., 0], corner)
    keep = others[:, None] & ~lone
    rho, kappa = torch.where(keep, row.to(dtype), 0.0), torch.where(keep, column.to(dtype), 0.0)
    p, q = (m * kappa[:, :, None]).sum(3), (m * rho[..., None]).sum(2)
    taken = (rho * p).sum(2)
    s = c - taken  # (B, matrices)
    noise = _ROUNDING * torch.finfo(dtype).eps
    counts = (s.abs() > noise * (c.abs() + taken.abs())).all(dim=1)
    alone = ~counts[:, None]
    s = torch.where(alone, 1.0, s)
    p, q = (torch.where(alone[..., None], 0.0, part) - unit for part in (p, q))
    return m + p[..., None] * (q / s[..., None])[:, :, None], counts & ~void


def _chosen(inverse: Tensor, b: Any, valid: Tensor, of_y: Tensor | bool) -> Tensor:
    """γ = M b, (B, n); of two matrices that of Y Yᵀ, where V is Y."""
    parts = b if isinstance(b, tuple) else (b,)
    found = [
        (inverse[:, i] * torch.where(valid, part, 0.0).to(inverse.dtype)[:, None]).sum(2)
        for i, part in enumerate(parts)
    ]
    if len(found) == 1:
        return found[0]
    assert isinstance(of_y, Tensor)
    return torch.where(of_y[:, None], found[0], found[1])


def _write(history: Tensor, slot: Tensor, row: Tensor) -> None:
    """Write a row (B, D) into a history (B, n, D), which may have zeros for alignment."""
    extra = history.shape[2] - row.shape[1]
    row = torch.nn.functional.pad(row, (0, extra)) if extra else row
    history.index_copy_(1, slot, row[:, None])
