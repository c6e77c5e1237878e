"""One turn of the loop as a function of tensors, for a graph: the body of a `while_loop`, or compiled in chunks.

It does what `SolverLoop._iterate` does, by the same `step`, `rescue` and `sort_out`. But shapes are fixed, the host
reads nothing, and one graph serves every turn. Samples that are done stay as they are; `advance`, for chunks, lets all
stay once `limit` evaluations were made, so that a turn too many changes nothing.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchdeq.solution import Solution
from torchdeq.solver.base import SolverLoop
from torchdeq.solver.maps import Tally
from torchdeq.solver.watch import Iterate, Samples, Watch, held, rounding_level, sort_out


class Carry(NamedTuple):
    """What goes from one turn to the next. All tensors are contiguous, and no two of them are the same at the start."""

    z: Tensor  # (B, D), to be evaluated next
    state: Any  # of the solver
    known: Samples
    k: Tensor  # (), int64, evaluations made


def begin(solver: SolverLoop, z0: Tensor, f: Tally, steps: int) -> Carry:
    """Before the first turn.

    Arguments:
        solver: one that is `fixed_shape`.
        z0: the start, (B, D).
        f: the map, for its layout.
        steps: how many turns the state must have room for.

    Raises:
        TypeError: a step of this solver is not one graph.
    """
    if not solver.fixed_shape:
        raise TypeError(
            f"{solver!r} cannot be one graph: its steps differ in shape or in what they do. Those of "
            f"FixedPointIteration, Anderson, Broyden and Multisecant do not. Or compile f alone, with torch.compile(f)."
        )
    z = z0.clone(memory_format=torch.contiguous_format)
    state = solver.room(solver.init(z.clone()), steps)
    count = (z.shape[0], len(f.sizes)) if solver._by_leaf(f) else (z.shape[0],)

    def unknown() -> Iterate:
        size = z.new_full(count, math.inf)
        return Iterate(z.clone(), size, torch.ones_like(size), z.new_full((z.shape[0],), math.inf))

    known = Samples.of(unknown())._replace(single=unknown(), now=unknown())
    own: dict[str, Any] = {name: t.clone() for name, t in known._asdict().items() if isinstance(t, Tensor)}
    return Carry(z, _apart(state), known._replace(**own), torch.zeros((), dtype=torch.int64, device=z.device))


def _apart(state: Any) -> Any:
    """The state, each of its tensors by itself."""
    if isinstance(state, tuple):
        parts = [_apart(part) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    return state.clone() if isinstance(state, Tensor) else state


def turn(solver: SolverLoop, f: Tally, carry: Carry, resolution: float) -> Carry:
    """One turn: evaluate, measure, sort out, step.

    Arguments:
        solver: see `begin`.
        f: the map.
        carry: what is known. The histories in its state may be written to.
        resolution: ε of the narrowest dtype that f computes in.
    """
    z, state, before, k = carry
    fz = f(z)
    now = solver._measured(z, fz, f)
    known = sort_out(solver, before, now, k + 1, rounding_level(resolution))
    if solver.recovers:
        z, fz, state = solver.rescue(z, fz, state, known.struck, known.strikes)
    z_next, state = solver.step(f, z, fz, state)
    return Carry(held(known, z_next, z), state, known, k + 1)


def advance(solver: SolverLoop, f: Tally, carry: Carry, limit: Tensor | int, resolution: float) -> Carry:
    """A turn that changes nothing of what is known once `limit` evaluations were made.

    Arguments:
        solver, f, carry, resolution: see `turn`.
        limit: the number of evaluations, an integer or a tensor ().
    """
    after = turn(solver, f, carry, resolution)
    more = carry.k < limit
    pairs: list[tuple[Any, Any]] = list(zip(after.known, carry.known, strict=True))
    kept: list[Any] = [
        new.where(more, old) if isinstance(new, Iterate) else torch.where(more, new, old)
        for new, old in pairs
    ]
    return after._replace(known=Samples(*kept), k=torch.where(more, after.k, carry.k))


def goes_on(carry: Carry, limit: Tensor | int) -> Tensor:
    """Whether another turn would change something, ()."""
    return carry.known.active.any() & (carry.k < limit)


def account(
    solver: SolverLoop, f: Tally, known: Samples, nfe: int, sizes: list[tuple[Tensor, Tensor]]
) -> Solution:
    """The `Solution` after the last turn. The host reads.

    Arguments:
        solver, f: see `begin`.
        known: what is known after the last turn.
        nfe: evaluations made.
        sizes: the norms of residual and state after each, `Samples.now.size` and `.scale`.
    """
    watch = Watch(solver, known.best, f.resolution(known.best.z))
    watch.samples = known
    watch.all_sound = False
    watch.flag.late = True  # what it knows is not up to date
    return solver._watched(solver._final(f, watch, nfe), watch, nfe, sizes, [])
