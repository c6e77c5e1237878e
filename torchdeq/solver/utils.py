"""The helpers of torchdeq 0.1.0's solvers, which solvers written for it import: `torchdeq.solver.utils`.

Bookkeeping of the best state so far, per sample. New solvers need none of it: see `Solver`, whose loop does this.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchdeq.solver.stat import SolverStat, solver_stat_from_final_step

__all__ = [
    "batch_flatten",
    "batch_masked_mixing",
    "dummy_solver_stat",
    "init_solver_info",
    "solver_stat_from_final_step",
    "solver_stat_from_info",
    "update_state",
]

Record = dict[str, Tensor]
MODES = ("abs", "rel")


def init_solver_info(
    bsz: int, device: torch.device | str | None, init_loss: float = 1e8
) -> tuple[dict[str, list[Tensor]], Record, Record]:
    """The records of a solve of `bsz` samples before its first step: traces, lowest residuals, and their steps.

    Example:
        >>> traces, lowest, steps = init_solver_info(2, 'cpu')
        >>> lowest['abs'].tolist(), steps['rel'].tolist(), len(traces['abs'])
        ([100000000.0, 100000000.0], [0.0, 0.0], 1)
    """
    worst = torch.full((bsz,), init_loss, device=device)
    return (
        {mode: [worst.clone()] for mode in MODES},
        {mode: worst.clone() for mode in MODES},
        {mode: torch.zeros(bsz, device=device) for mode in MODES},
    )


def batch_masked_mixing(mask: Tensor, mask_var: Tensor | float, orig_var: Tensor | float) -> Tensor:
    """`mask_var` where the mask (B,) holds, elsewhere `orig_var`; one of them is a tensor (B, …).

    A value that is not finite does no harm where it is not chosen.

    Raises:
        ValueError: neither is a tensor.

    Example:
        >>> batch_masked_mixing(torch.tensor([True, False]), torch.ones(2, 2), torch.zeros(2, 2))
        tensor([[1., 1.],
                [0., 0.]])
    """
    like = mask_var if isinstance(mask_var, Tensor) else orig_var
    if not isinstance(like, Tensor):
        raise ValueError(
            f"batch_masked_mixing chooses between two values of which one must be a tensor, got {mask_var!r} and "
            f"{orig_var!r}."
        )
    return torch.where(mask.reshape(-1, *[1] * (like.dim() - 1)), mask_var, orig_var)


def batch_flatten(x: Tensor) -> Tensor:
    """x (B, …) as (B, D); a tensor of fewer than two dimensions as (n, 1).

    Example:
        >>> batch_flatten(torch.ones(2, 3, 4)).shape, batch_flatten(torch.ones(5)).shape
        (torch.Size([2, 12]), torch.Size([5, 1]))
    """
    return x.flatten(start_dim=1) if x.dim() >= 2 else x.reshape(-1, 1)


def update_state(
    lowest_xest: Tensor,
    x_est: Tensor,
    nstep: int,
    stop_mode: str,
    abs_diff: Tensor,
    rel_diff: Tensor,
    trace_dict: dict[str, list[Tensor]],
    lowest_dict: Record,
    lowest_step_dict: Record,
    return_final: bool = False,
) -> Tensor:
    """Take one step into the records, which change in place.

    Arguments:
        lowest_xest: the best state so far, (B, …).
        x_est: the new state, (B, …).
        nstep: the number of the step.
        stop_mode: 'abs' or 'rel', the residual that decides which state is best.
        abs_diff, rel_diff: the residuals of the new state, (B,).
        trace_dict, lowest_dict, lowest_step_dict: the records, as `init_solver_info` makes them.
        return_final: count the new state as the best, whatever its residual.

    Returns:
        The best state now, without a graph, (B, …).

    Example:
        >>> records = init_solver_info(1, 'cpu')
        >>> r = torch.tensor([0.5])
        >>> update_state(torch.zeros(1, 1), torch.ones(1, 1), 1, 'abs', r, r, *records)
        tensor([[1.]])
        >>> records[1]['abs'], len(records[0]['abs'])
        (tensor([0.5000]), 2)
    """
    for mode, diff in zip(MODES, (abs_diff, rel_diff), strict=True):
        trace_dict[mode].append(diff)
        better = (diff < lowest_dict[mode]) | return_final
        if mode == stop_mode:
            lowest_xest = batch_masked_mixing(better, x_est, lowest_xest).detach()
        lowest_dict[mode] = batch_masked_mixing(better, diff, lowest_dict[mode])
        lowest_step_dict[mode] = batch_masked_mixing(better, float(nstep), lowest_step_dict[mode])
    return lowest_xest


def solver_stat_from_info(
    stop_mode: str, lowest_dict: Record, trace_dict: dict[str, list[Tensor]], lowest_step_dict: Record
) -> SolverStat:
    """`SolverStat.from_solver_info`, under its 0.1.0 name.

    Example:
        >>> traces, lowest, steps = init_solver_info(3, 'cpu')
        >>> solver_stat_from_info('abs', lowest, traces, steps)['abs_trace'].shape
        torch.Size([3, 1])
    """
    return SolverStat.from_solver_info(stop_mode, lowest_dict, trace_dict, lowest_step_dict)


def dummy_solver_stat() -> SolverStat:
    """A `SolverStat` of nothing: every entry is −1.

    Example:
        >>> dummy_solver_stat()['nstep']
        tensor([-1.])
    """
    return SolverStat()
