"""How many states do solvers hold, ours and those of torchdeq 0.1.0? A part of `memory.py`.

A state is B D numbers. What is counted begins after the start z0, which is the caller's, and leaves out what f needs
within a call.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from allocator import CALL, Allocations, Marked, allocations
from report import grid
from torchdeq import (
    GMRES,
    AffineMap,
    Anderson,
    BiCGSTAB,
    Broyden,
    FixedPointIteration,
    Multisecant,
    SimpleFixedPointIteration,
    Solver,
)

#: One solve of so many evaluations, from a start.
Solve = Callable[[Callable[[Tensor], Tensor], Tensor, int], Any]

OURS: tuple[Solver, ...] = (
    FixedPointIteration(),
    SimpleFixedPointIteration(),
    Anderson(m=5),
    Broyden(),
    Broyden(m=10),
    Multisecant(),
    Multisecant(m=20),
)
ADJOINT: tuple[Solver, ...] = (GMRES(), GMRES(m=10), BiCGSTAB())
#: Of 0.1.0: the function, its options, and how many evaluations more than `max_iter` it makes.
OLD: tuple[tuple[str, dict[str, int], int], ...] = (
    ("fixed_point_iter", {}, 0),
    ("anderson_solver", {"m": 5}, 0),
    ("broyden_solver", {}, 1),
    ("broyden_solver", {"LBFGS_thres": 10}, 1),
)


class States(NamedTuple):
    """In multiples of the state."""

    held: float  # the most when f is called
    peak: float  # the most between calls
    ahead: float  # held at the sixth call


def solvers(old: ModuleType | None) -> dict[str, Solve]:
    """What is compared, by name. `old` is the module of 0.1.0's solvers, if there is one."""

    def ours(f: Callable[[Tensor], Tensor], z0: Tensor, count: int, *, solver: Solver) -> Any:
        return solver.replace(max_iter=count, tol=0.0, patience=0).run(f, z0, together=False)

    def adjoint(f: Callable[[Tensor], Tensor], z0: Tensor, count: int, *, solver: Solver) -> Any:
        shift = torch.ones_like(z0)
        return solver.replace(max_iter=count, tol=1e-30).run(AffineMap(f, shift), together=False)

    def theirs(
        f: Callable[[Tensor], Tensor],
        z0: Tensor,
        count: int,
        *,
        name: str,
        options: dict[str, int],
        more: int,
    ) -> Any:
        return getattr(old, name)(f, z0, max_iter=count - more, tol=0.0, **options)

    found: dict[str, Solve] = {repr(s): functools.partial(ours, solver=s) for s in OURS}
    if old is not None:
        for name, options, more in OLD:
            shown = f"0.1.0 {name}({', '.join(f'{k}={v}' for k, v in options.items())})"
            found[shown] = functools.partial(theirs, name=name, options=options, more=more)
    return found | {f"{s!r}, adjoint": functools.partial(adjoint, solver=s) for s in ADJOINT}


def measure(solve: Solve, f: Callable[[Tensor], Tensor], z0: Tensor, count: int) -> States:
    """One solve of `count` evaluations, watched at the allocator after one that was not."""
    marked = Marked(f)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        solve(f, z0, 3)
        memory = allocations(lambda: solve(marked, z0, count))
    return in_states(memory, count, z0.numel() * z0.element_size())


def in_states(memory: Allocations, count: int, state: int) -> States:
    """Of the first `count` calls: after them a solve that fell short looks for the reason."""
    calls = memory.spans[CALL][:count]
    held = [memory.at(begin) for begin, _ in calls]
    between = [memory.between(end, begin) for (_, end), (begin, _) in itertools.pairwise(calls)]
    return States(max(held) / state, max(between) / state, held[min(5, len(held) - 1)] / state)


def run(
    f: Callable[[Tensor], Tensor], z0: Tensor, counts: Sequence[int], old: ModuleType | None
) -> dict[str, list[States]]:
    """For each solver one measurement per count."""
    return {name: [measure(solve, f, z0, count) for count in counts] for name, solve in solvers(old).items()}


def section(found: dict[str, list[States]], counts: Sequence[int], shape: torch.Size) -> list[str]:
    """The lines of the report."""
    columns = {
        "held": lambda s: s.held,
        "held at the sixth": lambda s: s.ahead,
        "peak between calls": lambda s: s.peak,
    }
    rows = [
        [f"`{name}`", *(" / ".join(f"{what(s):.1f}" for s in states) for what in columns.values())]
        for name, states in found.items()
    ]
    return [
        f"States ({' × '.join(map(str, shape))} numbers each) at {' / '.join(map(str, counts))} evaluations, beyond "
        "the start. *Held* is the most there was when f was called, *held at the sixth* what there was at the sixth "
        "call. Small systems count too: one of n unknowns per sample is n²/D states.",
        "",
        *grid(["solver", *columns], rows),
    ]
