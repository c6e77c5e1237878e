"""The batch as one sample, for maps f that couple the samples of a batch.

Coefficients per sample are right only where f treats samples separately. Batch normalisation, message passing or a
state laid out as (features, nodes) couples them; then a per-sample method may end short of the tolerance for no
other reason, and the batch is solved again as the one system it is.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchdeq._state import Map, per_sample
from torchdeq.solution import CouplingWarning, Solution, callers_level
from torchdeq.solver.maps import AffineMap, Tally

if TYPE_CHECKING:
    from torchdeq.solver.base import SolverLoop


def mixes_samples(f: Map, z: Tensor) -> bool:
    """Whether f(z) of some samples changes when others do. Three evaluations.

    The samples are divided in two halves, at random but always alike. A coupling within both halves only is not seen.

    Arguments:
        f: (B, D) -> (B, D).
        z: where to look, (B, D), finite.

    Example:
        >>> z = torch.ones(4, 2)
        >>> mixes_samples(torch.cos, z), mixes_samples(lambda z: z - z.mean(0), z)
        (False, True)
    """
    count, size = z.shape
    generator = torch.Generator().manual_seed(0)
    half = torch.randperm(count, generator=generator).to(z.device) < (count + 1) // 2  # (B,)
    noise = torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z)
    level = per_sample(z) / max(size, 1) ** 0.5
    moved = z + noise * torch.where(level > 0, level, level.mean().clamp_min(1e-6))[:, None]
    here, others, both = f(z), f(torch.where(half[:, None], z, moved)), f(moved)
    apart = torch.where(half, per_sample(others - here), per_sample(both - others))
    allowed = math.sqrt(torch.finfo(z.dtype).eps) * (per_sample(here) + per_sample(both))
    return bool((apart > allowed).any())


def solve_together(solver: SolverLoop, f: Tally, short: Solution) -> Solution:
    """Solve again with the whole batch as one sample, from where `short` ended, and say so in a warning.

    Returns:
        The better of the two, `nfe` counting both. The residual and the status are those of the whole batch, the
        same for each sample.
    """
    warnings.warn(
        "f couples the samples of the batch, so coefficients found for each sample alone did not lead to the fixed "
        "point. It is solved again with the batch as one system, at the cost of a second solve. Say batch_dims=0 if "
        "the state is one system, and this costs nothing; coupling through batch normalisation in training mode goes "
        "away with another normalisation.",
        CouplingWarning,
        stacklevel=callers_level(),
    )
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
    return spread(solution, shape)


class _AsOne:
    """A map (B, D) -> (B, D) on one sample (1, B D)."""

    def __init__(self, f: Map, shape: torch.Size):
        self.f, self.shape = f, shape

    def __call__(self, z: Tensor) -> Tensor:
        return self.f(z.reshape(self.shape)).reshape(1, -1)


def spread(solution: Solution, shape: torch.Size) -> Solution:
    """The solution of one sample (1, B D) as one of B samples that share its residual and its status."""
    count = shape[0]
    return dataclasses.replace(
        solution,
        z=solution.z.reshape(shape),
        abs_residual=solution.abs_residual.expand(count),
        rel_residual=solution.rel_residual.expand(count),
        status=solution.status.expand(count),
        nstep=solution.nstep.expand(count),
        abs_trace=solution.abs_trace.expand(-1, count),
        rel_trace=solution.rel_trace.expand(-1, count),
        coupled=True,
    )
