"""The adjoint system (I − Jᵀ) u = g, solved as the fixed point u = Jᵀ u + g.

Tolerances are relative: each sample's cotangent is scaled to unit norm before the solve and back after it, so
that a gradient does not depend on the scale of the loss, nor one sample's accuracy on another's.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from torchdeq._state import Layout, Map, per_sample
from torchdeq.solution import Solution
from torchdeq.solver.base import SolverLoop
from torchdeq.solver.coupling import couples_samples
from torchdeq.solver.maps import AffineMap
from torchdeq.solver.products import Weighted
from torchdeq.solver.together import Whole, spread, warn_of_coupling


def solve_adjoint(
    vjp: Map,
    g: Tensor,
    solver: SolverLoop,
    layout: Layout | None = None,
    *,
    preconditioner: Map | None = None,
    scale: Tensor | None = None,
    clip: float | None = None,
) -> tuple[Tensor, Solution]:
    """Solve u = Jᵀ u + g.

    A Krylov space per sample is right only where f treats samples separately. Where a solve ends short of
    its tolerance and a probe shows that f couples samples, the system is solved again with the whole batch
    as one sample.

    Arguments:
        vjp: u -> Jᵀ u, (B, D) -> (B, D).
        g: the cotangent, (B, D). A sample's that is smaller than the largest by more than the square root of the
            dtype's smallest number (1e-19 in float32) counts as none.
        solver: any solver; its `tol` is relative to ‖g‖.
        layout: which leaves the D numbers belong to, for a solver with norm='max'; None if that is not known.
        preconditioner: a linear map near (I − Jᵀ)⁻¹, (B, D) -> (B, D), for a Krylov solver. The solution is the same.
        scale: (B,), what the tolerance is relative to where it is more than ‖g‖: the norm of what u is added to.
        clip: the largest ‖u‖ / ‖g‖, per sample, or of the batch if it is solved as one; longer u are shortened.

    Returns:
        u (B, D), and the `Solution`, whose residuals are ‖g − (I − Jᵀ) u‖ / ‖g‖ per sample. Clipping changes neither
        its z nor its residuals, which are those of the solve; `clipped` says which samples were.
    """
    u, solution = _solve(vjp, g, solver, layout, preconditioner, scale)
    return (u, solution) if clip is None else _clipped(u, solution, g, clip)


def scales_of(size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What each sample's cotangent is divided by before a solve, and at which weight it takes part in products.

    Arguments:
        size: the norms of the cotangents, (B,).

    Returns:
        The divisors, (B, 1), not zero; the weights, (B, 1), of which the largest is 1; and whose norm is finite, (B,).
    """
    # A cotangent that is not finite is its own sample's: what it asks for is not a number, and says nothing of others.
    known = size.isfinite()
    size = torch.where(known, size, 0.0)
    # A sample without a cotangent borrows the scale of the largest: if f couples samples its u is not zero.
    largest = size.amax() if size.numel() else size.sum()
    largest = torch.where(largest != 0, largest, 1.0)
    # What is further below the largest than this cannot be told from nothing in products that see both.
    size = torch.where(size != 0, size, largest).maximum(largest * torch.finfo(size.dtype).tiny ** 0.5)[
        :, None
    ]
    return size, size / largest, known


def _clipped(u: Tensor, solution: Solution, g: Tensor, clip: float) -> tuple[Tensor, Solution]:
    """u · min(1, clip ‖g‖ / ‖u‖) per sample, or with one factor if the batch was solved as one."""
    size, most = _norm(u), clip * _norm(g)
    if solution.coupled:
        size, most = _norm(size[None]).expand_as(size), _norm(most[None]).expand_as(most)
    clipped = size > most
    factor = torch.where(clipped, most, 1.0) / torch.where(clipped, size, 1.0)
    return u * factor[:, None], dataclasses.replace(solution, clipped=clipped)


def _solve(
    vjp: Map,
    g: Tensor,
    solver: SolverLoop,
    layout: Layout | None,
    preconditioner: Map | None,
    scale: Tensor | None,
) -> tuple[Tensor, Solution]:
    """The solve of `solve_adjoint`, without a bound."""
    size, weight, known = scales_of(_norm(g) if scale is None else torch.maximum(_norm(g), scale))
    unit = g / size  # (B, D); a NaN stays one
    linear = Weighted(vjp, weight)

    def precondition(p: Tensor) -> Tensor:
        assert preconditioner is not None
        return preconditioner(p * weight) / weight

    system = AffineMap(linear, unit, None if preconditioner is None else precondition)
    solution = solver.run(system, layout=layout, together=False)
    if g.shape[0] > 1 and not bool(solution.converged.all()):
        coupled = couples_samples(linear, unit)
        solution = dataclasses.replace(solution, nfe=solution.nfe + 2)
        if coupled:
            solution, u = _solve_together(vjp, g, solver, layout, solution.nfe, preconditioner)
            return u, solution
    return (solution.z * size).masked_fill(~known[:, None], torch.nan), solution


def _solve_together(
    vjp: Map,
    g: Tensor,
    solver: SolverLoop,
    layout: Layout | None,
    spent: int,
    preconditioner: Map | None,
) -> tuple[Solution, Tensor]:
    """The system with the batch as one sample; residuals relative to the norm of the whole g."""
    warn_of_coupling("the adjoint solve of a backward pass")
    one = Whole(g.shape, layout)
    size = _norm(one.joined(g))
    size = torch.where(size != 0, size, 1.0)[:, None]
    precondition = None if preconditioner is None else one.seen(preconditioner)
    system = AffineMap(one.seen(vjp), one.joined(g) / size, precondition)
    solution = solver.run(system, layout=one.layout, together=False)
    u = one.divided(solution.z * size)
    return dataclasses.replace(spread(solution, u), nfe=solution.nfe + spent), u


def _norm(g: Tensor) -> Tensor:
    """Norm per sample, (B,), that neither underflows nor overflows where g itself does not."""
    if g.shape[1] == 0:
        return g.new_zeros(g.shape[0])
    largest = g.abs().amax(dim=1)
    safe = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    return largest * per_sample(g / safe[:, None])
