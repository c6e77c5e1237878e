"""torchdeq 0.1.0's statistics dictionary, as a view of a `Solution`."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from torchdeq._state import layout_of
from torchdeq.solution import Solution


class SolverStat(dict[str, Any]):
    """Solver statistics under the keys of torchdeq 0.1.0, for B samples and N evaluations.

    Keys: 'abs_lowest' and 'rel_lowest' (B,), the residuals of the returned state; 'abs_trace' and
    'rel_trace' (B, N), the residuals at each evaluation, as many as were made; 'nstep' (B,), evaluations
    until a sample stopped; 'sradius', the spectral radius where it was asked for. New: 'converged' (B,), 1 or 0;
    'status' (B,), the number of a `Status`; and 'nfe' (B,), all calls of f, the same number for each sample. Keys that
    were not given hold −1 as in 0.1.0. Every value is a floating-point tensor whose first dimension is the batch, so
    that a logger can take the mean of each, and dictionaries of several solves can be concatenated.

    Example:
        >>> SolverStat()['nstep']
        tensor([-1.])
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for key in ("abs_lowest", "rel_lowest", "nstep", "sradius"):
            self.setdefault(key, torch.tensor([-1.0]))
        for key in ("abs_trace", "rel_trace"):
            self.setdefault(key, torch.tensor([[-1.0]]))

    @classmethod
    def from_solution(cls, solution: Solution, columns: int = 0) -> Self:
        """The dictionary for a `Solution`. A trace shorter than `columns` repeats its last value up to there."""

        def trace(steps: Tensor) -> Tensor:
            return torch.cat([steps, steps[-1:].expand(max(0, columns - len(steps)), -1)]).mT

        size = solution.abs_residual
        return cls(
            abs_lowest=size,
            rel_lowest=solution.rel_residual,
            abs_trace=trace(solution.abs_trace),
            rel_trace=trace(solution.rel_trace),
            nstep=solution.nstep.to(size.dtype),
            converged=solution.converged.to(size.dtype),
            status=solution.status.to(size.dtype),
            nfe=torch.full_like(size, solution.nfe),
        )

    @classmethod
    def from_final_step(cls, z: Any, fz: Any, nstep: int = 0) -> Self:
        """The dictionary for one evaluation fz = f(z); z and fz are states of the same structure."""
        layout = layout_of(z)
        flat, image = layout.ravel(z), layout.ravel(fz)
        size = (image - flat).norm(dim=1)
        relative = size / image.norm(dim=1).clamp_min(torch.finfo(size.dtype).tiny)
        return cls(
            abs_lowest=size,
            rel_lowest=relative,
            abs_trace=size[:, None],
            rel_trace=relative[:, None],
            nstep=torch.full_like(size, float(nstep)),
        )

    @classmethod
    def from_solver_info(
        cls,
        stop_mode: str,
        lowest_dict: dict[str, Tensor],
        trace_dict: dict[str, list[Tensor]],
        lowest_step_dict: dict[str, Tensor],
    ) -> Self:
        """The dictionary from the pieces that a solver written for 0.1.0 keeps."""
        return cls(
            abs_lowest=lowest_dict["abs"],
            rel_lowest=lowest_dict["rel"],
            abs_trace=torch.stack(trace_dict["abs"], dim=1),
            rel_trace=torch.stack(trace_dict["rel"], dim=1),
            nstep=lowest_step_dict[stop_mode],
        )


def solver_stat_from_final_step(z: Any, fz: Any, nstep: int = 0) -> SolverStat:
    """`SolverStat.from_final_step`, under its 0.1.0 name.

    >>> import torch
    >>> solver_stat_from_final_step(torch.ones(1, 2), torch.ones(1, 2), 3)['abs_lowest']
    tensor([0.])
    """
    return SolverStat.from_final_step(z, fz, nstep)
