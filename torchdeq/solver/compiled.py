"""The loop as one graph for `torch.compile`: `torchdeq.solver.traced.turn` under a `while_loop`.

    while some sample is active and k < limit:    carry ← turn(carry)

f is captured with the loop, so that nothing of an iteration is left to Python. A solve is one call of the graph; with a
history that grows as it is used it is a few, with room for more each time. The loop asks after each evaluation, and so
makes those that the eager loop makes.

Products with Jᵀ need what f has left for its backward pass, which a loop of a graph cannot see. So an adjoint solve
goes in chunks of a few products, written out one after the other; the host reads one flag after each, and f is
evaluated once for each. Turns too many change nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchdeq._state import FlatMap, Layout, Map
from torchdeq.solution import Solution
from torchdeq.solver.affine import AffineSolver
from torchdeq.solver.base import SolverLoop, start_of
from torchdeq.solver.graphs import Graphs, captured
from torchdeq.solver.maps import AffineMap, Tally
from torchdeq.solver.packing import Packing
from torchdeq.solver.products import Product, Weighted
from torchdeq.solver.programs import CHUNK, Ours, Search, Seen, chunked, looped, searched
from torchdeq.solver.secant import SecantSolver
from torchdeq.solver.traced import account, begin

#: Turns that a growing history has room for at first; each time it doubles. A multiple of the chunk.
_ROOM = 24


class Compiled(SolverLoop):
    """A solver whose `run` is compiled, together with f.

    Arguments:
        solver: one of `fixed_shape`.
        graphs: what has been compiled before, and how.

    Raises:
        TypeError: a step of the solver is not one graph.
    """

    def __init__(self, solver: SolverLoop, graphs: Graphs):
        if not solver.fixed_shape or solver.compact:
            raise TypeError(
                f"{solver!r} cannot be compiled: its steps differ in shape, or in what they do. FixedPointIteration, "
                f"Anderson, Broyden and Multisecant can, with compact=False, and in the adjoint GMRES too. Or compile "
                f"f alone: DEQ(compile=False) and torch.compile(f)."
            )
        if isinstance(solver, torch.nn.Module):
            raise TypeError(
                f"{solver!r} cannot be compiled: a solver that is a module may change, and a graph would keep the "
                f"numbers that it had. Use DEQ(compile=False)."
            )
        self.solver = solver
        self.graphs = graphs

    def run(
        self,
        f: Map,
        z0: Tensor | None = None,
        *,
        record: Sequence[int] = (),
        layout: Layout | None = None,
        together: bool = True,
    ) -> Solution:
        """See `SolverLoop.run`. A map that is neither f itself nor its adjoint is solved without a graph."""
        solver: SolverLoop = self.solver
        loop: _Forward | _Adjoint | None = None
        if isinstance(f, FlatMap) and z0 is not None and z0.numel():
            loop = _Forward(solver, self.graphs, f)
        elif isinstance(f, AffineMap) and z0 is None and f.shift.numel():
            linear = f.linear
            if not (isinstance(linear, Weighted) and isinstance(linear.linear, Product)):
                pass
            elif isinstance(solver, AffineSolver):
                f = dataclasses.replace(f, linear=Searched(linear, self.graphs))
            else:
                loop = _Adjoint(solver, self.graphs, linear)
        with torch.no_grad():  # in which a graph's loop may write to what it has been given
            return solver._run(f, z0, record, layout, together, None, loop)

    def replace(self, **options: Any) -> Compiled:
        """See `SolverLoop.replace`."""
        return Compiled(self.solver.replace(**options), self.graphs)

    def __repr__(self) -> str:
        return repr(self.solver)


class _Forward:
    """`SolverLoop._loop` by a program: one call, or several where states are recorded or a history grows.

    Arguments:
        solver, graphs: see `Compiled`.
        f: the user's map.
    """

    def __init__(self, solver: SolverLoop, graphs: Graphs, f: FlatMap):
        self.solver, self.graphs, self.f = solver, graphs, f

    def __call__(self, tally: Tally, z0: Tensor | None, record: Sequence[int]) -> Solution:
        assert z0 is not None
        solver, limit, grows = self.solver, tally.limit, _grows(self.solver, z0)
        room = min(_ROOM, limit) if grows else limit
        plan = self._plan(tally, z0, room)
        histories = [row.repeat(len(z0), *[1] * (row.dim() - 1)) for row in plan.rows]
        trace = z0.new_empty(2, limit, *plan.count(len(z0)))
        states: list[Tensor] = []
        at: Any = z0
        with captured(self.f, z0) as f:
            while True:
                ahead = record[len(states)] if len(states) < len(record) else limit
                stop = torch.tensor(min(room, ahead) if grows else ahead, device=z0.device)
                make = functools.partial(plan.make, first=at is z0)
                program = self.graphs((plan.key, at is z0), make, stored=plan.wide)
                at, told = program(f, at, histories, trace, stop)
                k, on, coupled, mixed = told[-1].tolist()
                if k == ahead and len(states) < len(record):
                    states.append(plan.packing.unpack(at, histories).known.best.z)
                if not on or k >= limit:
                    break
                if grows and k >= room:
                    carry = plan.packing.unpack(at, histories)
                    carry = carry._replace(state=solver.room(carry.state, room))
                    mark_growing(carry.state)
                    at, histories = plan.packing.pack(carry)
                    room *= 2
        tally.calls = k
        if mixed:  # which one evaluation more has to show
            known = plan.packing.unpack(at, histories).known
            sizes = [(size, scale) for size, scale in trace[:, :k].unbind(1)]
            solution = account(solver, tally, known, k, sizes)
            solution = dataclasses.replace(solution, nfe=tally.calls)
        else:
            z, absolute, relative, status, nstep, abs_trace, rel_trace, _ = told
            solution = Solution(
                z=z,
                abs_residual=absolute,
                rel_residual=relative,
                stop_mode=solver.stop_mode,
                tol=solver.tol,
                status=status,
                nstep=nstep,
                nfe=k,
                abs_trace=abs_trace[:k],
                rel_trace=rel_trace[:k],
                coupled=bool(coupled),
            )
        states += [solution.z] * (len(record) - len(states))
        return dataclasses.replace(solution, states=states) if record else solution

    def _plan(self, tally: Tally, z0: Tensor, room: int) -> Plan:
        layout, amp = self.f.layout, tally.amp
        shapes = tuple(tuple(shape)[layout.depth == 1 :] for shape in layout.shapes)
        form = (layout.spec, shapes, layout.dtypes, layout.dtype, layout.depth)
        key = (self.solver, *form, amp, room, z0.device)
        plan: Plan = self.graphs.kept(key, lambda: Plan(key, self.solver, Seen(layout, amp), z0, room))
        return plan


class Plan:
    """What is known of a forward solve before it begins, whatever the batch.

    Arguments:
        key: what it is made for.
        solver, seen: see `Ours`.
        z0: a start, (B, D).
        room: how many turns the histories have room for at first.
    """

    def __init__(self, key: Any, solver: SolverLoop, seen: Seen, z0: Tensor, room: int):
        one: Any = seen
        carry = begin(solver, z0[:1].expand(3, -1), one, room)  # of a size that nothing else has
        self.key, self.room, self.leaves = key, room, carry.known.now.size.shape[1:]
        self.packing = Packing(carry)
        self.rows = [history[:1] for history in self.packing.pack(carry)[1]]
        self.ours = Ours(solver, seen, self.packing)
        self.wide = any(row.shape[1] > 8 for row in self.rows)

    def make(self, *, first: bool) -> Any:
        """The function that is compiled."""
        return looped(self.ours, self.room, first=first)

    def count(self, batch: int) -> tuple[int, ...]:
        """How many norms there are after an evaluation."""
        return (batch, *self.leaves)


class _Adjoint:
    """`SolverLoop._loop` for u ↦ Jᵀu + b, by a program for each chunk, called until nobody goes on.

    Arguments:
        solver, graphs: see `Compiled`.
        adjoint: the products.
    """

    def __init__(self, solver: SolverLoop, graphs: Graphs, adjoint: Weighted):
        self.solver, self.graphs, self.adjoint = solver, graphs, adjoint

    def __call__(self, tally: Tally, z0: Tensor | None, record: Sequence[int]) -> Solution:
        solver, adjoint, limit = self.solver, self.adjoint, tally.limit
        start = start_of(tally.f)
        product: Any = adjoint.linear
        at = (product.z, adjoint.weight, start)
        seen: Any = Seen(product.f.layout, product.amp)
        grows = _grows(solver, start)
        room = min(_ROOM, limit) if grows else limit + CHUNK
        turns = 0
        carry = begin(solver, start, seen, room)
        size = carry.known.now.size
        trace = torch.zeros(2, limit + 1, *size.shape, dtype=size.dtype, device=size.device)
        stop = torch.tensor(limit, device=size.device)
        with captured(product.f, product.z) as f:
            while True:
                packing = Packing(carry)
                ours = Ours(solver, seen, packing)
                key = (chunked, solver, seen.key, packing.key)
                program = self.graphs(key, functools.partial(chunked, ours))
                if grows:
                    mark_growing(carry.state)
                tensors, histories = packing.pack(carry)
                carry = packing.unpack(program(f, at, tensors, histories, trace, stop), histories)
                k, on = torch.stack((carry.k, carry.known.active.any().long())).tolist()
                if not on or k >= limit:
                    break
                turns += CHUNK  # a chunk has room for all its turns, and those after the limit change nothing
                if turns >= room:
                    carry = carry._replace(state=solver.room(carry.state, room))
                    room *= 2
        tally.calls = k
        solution = account(solver, tally, carry.known, k, [(a, b) for a, b in trace[:, :k].unbind(1)])
        return dataclasses.replace(solution, nfe=tally.calls)


class Searched:
    """Products with Jᵀ, with which Krylov spaces are searched by a program. `AffineSolver` asks it to.

    Arguments:
        adjoint: the products.
        graphs: see `Compiled`.
    """

    def __init__(self, adjoint: Weighted, graphs: Graphs):
        self.adjoint, self.graphs = adjoint, graphs

    def __call__(self, u: Tensor) -> Tensor:
        return self.adjoint(u)

    def search(
        self,
        solver: AffineSolver,
        tally: Tally,
        unit: Tensor,
        start: Tensor,
        active: Tensor,
        limit: Tensor,
        until: int,
    ) -> tuple[Search, list[Tensor]]:
        """Search one space, from unit residuals (B, D); the rest as in `AffineSolver._space`.

        Returns:
            The search when it is done, and the residual norm after each product.
        """
        adjoint: Any = self.adjoint.linear
        seen = Seen(adjoint.f.layout, adjoint.amp)
        most = until - tally.calls if solver.cycle is None else min(until - tally.calls, solver.cycle)
        none = torch.zeros_like(active)
        steps = torch.zeros_like(active, dtype=torch.int64)
        k = torch.zeros((), dtype=torch.int64, device=unit.device)
        search = Search(solver.room(solver.first(unit), CHUNK), active, none, steps, start, k)
        trace = torch.zeros(most + 1, len(unit), dtype=unit.dtype, device=unit.device)
        at = (adjoint.z, self.adjoint.weight, torch.zeros_like(unit), start, limit)
        stop = torch.full((), most, device=unit.device)
        made, on = 0, most > 0 and bool(active.any())
        with captured(adjoint.f, adjoint.z) as f:
            while on:
                packing = Packing(search)
                ours = Ours(solver, seen, packing)
                program = self.graphs(
                    (searched, solver, seen.key, packing.key), functools.partial(searched, ours)
                )
                mark_growing(search.state)
                tensors, histories = packing.pack(search)
                search = packing.unpack(program(f, at, tensors, histories, trace, stop), histories)
                made, on = torch.stack((search.k, search.active.any().long())).tolist()
                on = on and made < most
                if on:
                    search = search._replace(state=solver.room(search.state, CHUNK))
        tally.calls += made
        return search, list(trace[:made].unbind(0))


#: The dimensions of a solver's state, by its fields, that grow.
_GROWS = {"v": (1,), "u": (1,), "k": (2, 3), "valid": (1,), "basis": (1,), "h": (1, 2), "t": (1,)}


def mark_growing(state: Any) -> None:
    """Tell the compiler which sizes will change."""
    for name, dims in _GROWS.items():
        tensor = getattr(state, name, None)
        if isinstance(tensor, Tensor):
            torch._dynamo.maybe_mark_dynamic(tensor, list(dims))


def _grows(solver: SolverLoop, z: Tensor) -> bool:
    """Whether a solver's memory follows its use."""
    return isinstance(solver, SecantSolver) and solver._depth(z.shape[1]) > _ROOM
