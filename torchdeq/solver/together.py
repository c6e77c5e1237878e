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

from torchdeq._state import Layout, Map
from torchdeq.solution import CouplingWarning, Solution, callers_level
from torchdeq.solver.learned import Learned
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
    one = Whole(short.z.shape, f.layout)
    whole = Tally(one.seen(f.f), f.amp, f.calls + solver.max_iter, one.layout)
    whole.calls = f.calls
    whole.learned = None if f.learned is None else Learned()
    solution = solver._loop(whole, one.joined(short.z), ())
    f.calls = solution.nfe
    total = torch.linalg.vector_norm(short.abs_residual.double())
    if not bool(solution.converged.all()) and bool(total <= solution.abs_residual.double()):
        return dataclasses.replace(short, nfe=solution.nfe, coupled=True)
    if f.learned is not None and whole.learned is not None:
        f.learned.become(whole.learned, one)
    return dataclasses.replace(spread(solution, one.divided(solution.z)), states=short.states)


def warn_of_coupling(what: str) -> None:
    """Say that `what` is done again with the batch as one sample, and how to avoid it."""
    warnings.warn(
        f"f couples the samples of the batch, so coefficients found for each sample alone did not do, and {what} is "
        f"done again with the batch as one system. Say batch_dims=0 if the state is one system, and this costs "
        f"nothing; a coupling through batch normalisation in training mode goes away with another normalisation.",
        CouplingWarning,
        stacklevel=callers_level(),
    )


class Whole:
    """The samples of a batch (B, D) as one sample (1, B D), leaf after leaf.

    Arguments:
        shape: (B, D).
        layout: which leaves the D numbers belong to; None if that is not known.
    """

    def __init__(self, shape: torch.Size, layout: Layout | None):
        self.count, size = shape
        self.sizes = (size,) if layout is None else layout.sizes
        widths = tuple(self.count * s for s in self.sizes)
        self.widths = widths
        self.layout = None if layout is None else dataclasses.replace(layout, sizes=widths, batch=1)

    def joined(self, z: Tensor) -> Tensor:
        """(B, D) -> (1, B D)."""
        return torch.cat([leaf.reshape(1, -1) for leaf in z.split(self.sizes, dim=1)], dim=1)

    def divided(self, z: Tensor) -> Tensor:
        """(1, B D) -> (B, D)."""
        leaves = z.split(self.widths, dim=1)
        return torch.cat(
            [leaf.reshape(self.count, s) for leaf, s in zip(leaves, self.sizes, strict=True)], dim=1
        )

    def seen(self, f: Map) -> Map:
        """f, a map (B, D) -> (B, D), as a map of one sample; an affine map stays one."""
        if isinstance(f, AffineMap):
            return AffineMap(self.seen(f.linear), self.joined(f.shift))
        return lambda z: self.joined(f(self.divided(z)))


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
