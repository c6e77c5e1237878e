"""The batch as one sample, for maps f that couple the samples of a batch.

Coefficients per sample are right only where f treats samples separately. Batch normalisation, message passing or a
state laid out as (features, nodes) couples them; then a per-sample method may end short of the tolerance for no
other reason, and the batch is solved again as the one system it is.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchdeq._state import Map
from torchdeq.solution import CouplingWarning, Solution, callers_level
from torchdeq.solver.maps import AffineMap, Tally

if TYPE_CHECKING:
    from torchdeq.solver.base import SolverLoop


def solve_together(solver: SolverLoop, f: Tally, short: Solution) -> Solution:
    """Solve again with the whole batch as one sample, from where `short` ended, and say so in a warning.

    Returns:
        The better of the two, `nfe` counting both. The residual and the status are those of the whole batch, the
        same for each sample.
    """
    warn_of_coupling("a solve")
    shape = short.z.shape
    whole = Tally(_AsOne(f.f, shape), f.amp, f.calls + solver.max_iter)
    if isinstance(f.f, AffineMap):
        whole.f = AffineMap(_AsOne(f.f.linear, shape), f.f.shift.reshape(1, -1))
    whole.calls = f.calls
    solution = solver._loop(whole, short.z.reshape(1, -1), ())
    f.calls = solution.nfe
    total = torch.linalg.vector_norm(short.abs_residual.double())
    if not bool(solution.converged.all()) and bool(total <= solution.abs_residual.double()):
        return dataclasses.replace(short, nfe=solution.nfe, coupled=True)
    return spread(solution, solution.z.reshape(shape))


def warn_of_coupling(what: str) -> None:
    """Say that `what` is done again with the batch as one sample, and how to avoid it."""
    warnings.warn(
        f"f couples the samples of the batch, so coefficients found for each sample alone did not do, and {what} is "
        f"done again with the batch as one system. Say batch_dims=0 if the state is one system, and this costs "
        f"nothing; a coupling through batch normalisation in training mode goes away with another normalisation.",
        CouplingWarning,
        stacklevel=callers_level(),
    )


class _AsOne:
    """A map (B, D) -> (B, D) on one sample (1, B D)."""

    def __init__(self, f: Map, shape: torch.Size):
        self.f, self.shape = f, shape

    def __call__(self, z: Tensor) -> Tensor:
        return self.f(z.reshape(self.shape)).reshape(1, -1)


def spread(solution: Solution, z: Tensor) -> Solution:
    """The solution of one sample (1, B D) as that of the B samples z, which share its residual and its status."""
    count = z.shape[0]
    return dataclasses.replace(
        solution,
        z=z,
        abs_residual=solution.abs_residual.expand(count),
        rel_residual=solution.rel_residual.expand(count),
        status=solution.status.expand(count),
        nstep=solution.nstep.expand(count),
        abs_trace=solution.abs_trace.expand(-1, count),
        rel_trace=solution.rel_trace.expand(-1, count),
        coupled=True,
    )
