"""What is compiled of a solve: functions of f and of the tensors that go from turn to turn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._higher_order_ops import while_loop

from torchdeq._replay import AutocastState
from torchdeq._state import Layout, fits
from torchdeq.solution import Status
from torchdeq.solver.graph_map import GraphMap, leaves_of
from torchdeq.solver.packing import Packing
from torchdeq.solver.traced import Carry, advance, begin, goes_on, turn
from torchdeq.solver.watch import Samples, relative

#: Products with Jᵀ that are written out one after the other.
CHUNK = 4


class Seen:
    """How f is seen: as a map (B, D) -> (B, D), under the caller's autocast state.

    Arguments:
        layout: of the state.
        amp: the autocast state.
    """

    def __init__(self, layout: Layout, amp: AutocastState):
        self.map = GraphMap(_nothing, layout)
        self.sizes = self.map.sizes
        self.resolution = max(self.map.resolution, torch.finfo(amp.dtype).eps if amp.enabled else 0.0)
        self.amp = amp
        shapes = tuple(map(tuple, self.map.shapes))
        self.key = (layout.spec, shapes, layout.dtypes, layout.dtype, layout.depth, amp)


class Bound(GraphMap):
    """An f that is seen so. To `advance` it is what a `Tally` is."""

    def __init__(self, ours: Seen, user: Callable[..., Any]):  # what GraphMap's would make is there already
        self.user, self.amp = user, ours.amp
        given = ours.map
        self.sizes, self.batched, self.shapes, self.dtypes = (
            given.sizes,
            given.batched,
            given.shapes,
            given.dtypes,
        )
        self.real, self.narrow, self.whole, self.plan = given.real, given.narrow, given.whole, given.plan

    def __call__(self, z: Tensor) -> Tensor:
        if not self.amp.enabled:
            return super().__call__(z).to(z.dtype)
        with torch.autocast(self.amp.device_type, self.amp.dtype, cache_enabled=False):
            image = super().__call__(z)
        return image.to(z.dtype)

    def f(self, tree: Any) -> Any:
        """The user's f. What it returns is checked while it is traced."""
        image = self.user(tree)
        for new, old in zip(leaves_of(self.plan, image), leaves_of(self.plan, tree), strict=True):
            if new.shape != old.shape or not fits(new.dtype, old.dtype):
                raise ValueError("f changes shapes or dtypes of the state")  # FlatMap says it better
        return image


class Shifted:
    """u ↦ Jᵀ(w u) / w + b, likewise. f is evaluated when it is made."""

    def __init__(self, ours: Seen, user: Callable[..., Any], at: Sequence[Tensor]):
        self.map = Bound(ours, user)
        self.sizes = self.map.sizes
        z, self.weight, self.b = at[:3]
        made: Any = torch.func.vjp(self.map, z)
        self.fz, self.pull = made

    def product(self, u: Tensor) -> Tensor:
        """Jᵀ(w u) / w."""
        (ju,) = self.pull(u * self.weight)
        out: Tensor = ju / self.weight
        return out

    def __call__(self, u: Tensor) -> Tensor:
        return self.product(u) + self.b

    def residual(self, z: Tensor, fz: Tensor) -> Tensor:
        """As that of a `Tally`."""
        return fz - z

    def rounded(self, z: Tensor) -> Tensor:
        """As that of a `Tally`."""
        return self.map.rounded(z)


class Ours(NamedTuple):
    """What a program is made for. Guards on it are not needed."""

    solver: Any
    seen: Seen
    packing: Packing


def looped(ours: Ours, room: int, *, first: bool) -> Callable[..., Any]:
    """The forward solve, or a stage of it.

    Arguments:
        ours: see `Ours`.
        room: how many pairs the histories have room for.
        first: whether it begins at a state; otherwise it goes on with what is packed.
    """
    solver, packing = ours.solver, ours.packing

    def program(
        f: Callable[..., Any],
        start: Tensor | list[Tensor],
        histories: list[Tensor],
        trace: Tensor,
        limit: Tensor,
    ) -> Any:
        map_: Any = Bound(ours.seen, f)

        def more(*tensors: Tensor) -> Tensor:
            return goes_on(packing.unpack(tensors, histories), limit)

        def one(*tensors: Tensor) -> tuple[Tensor, ...]:
            carry: Carry = packing.unpack(tensors, histories)
            after = turn(solver, map_, carry, ours.seen.resolution)
            now = after.known.now
            trace.index_copy_(1, carry.k[None], torch.stack((now.size, now.scale))[:, None])
            out = packing.pack(after)[0]
            # A loop of a graph gives nothing back that came in.
            return tuple([t.clone() if any(t is other for other in tensors) else t for t in out])

        tensors = packing.pack(begin(solver, start, map_, room))[0] if isinstance(start, Tensor) else start
        end = while_loop(more, one, tuple(tensors))
        carry = packing.unpack(end, histories)
        return end, told(solver, carry.known, carry.k, trace)

    return program


def told(solver: Any, known: Samples, k: Tensor, trace: Tensor) -> tuple[Tensor, ...]:
    """What there is to tell after the last evaluation, as `SolverLoop._solution` would.

    Returns:
        z; its residuals, absolute and relative; status and nstep; both traces; and for the host, int64 (4,): how many
        evaluations were made, whether somebody goes on, whether f was seen to couple samples, and whether z is a
        mixture that has to be measured.
    """
    now, best = known.now, known.best
    finite = now.measure.isfinite()
    going = known.active
    failed = known.failed | (going & ~finite)
    if solver.return_final:
        final, mixed = now.where(~failed, best), going.new_zeros(())
    else:
        arrived = (now.measure <= solver.tol) & ~failed & known.coupled
        current = finite & ((now.measure <= best.measure) | arrived)
        single = known.single.where(~failed, best)
        mixture = now.where(current, best)
        enough = (single.measure <= mixture.measure).all()
        mixed = ~(current.all() | enough)
        final = mixture.where(current.all(), single.where(enough, mixture))
    met = (final.measure <= solver.tol) & ~failed
    status = torch.full_like(known.nstep, Status.MAX_ITER).masked_fill(known.stalled, Status.STALLED)
    status = status.masked_fill(met, Status.CONVERGED).masked_fill(failed, Status.NON_FINITE)
    size, scale = trace
    ratios = [relative(final.size, final.scale)[None], relative(size, scale)]
    sizes = [final.size[None], size]
    if size.dim() == 3:
        ratios, sizes = ([part.amax(dim=2) for part in parts] for parts in (ratios, sizes))
    (rel_residual, rel_trace), (abs_residual, abs_trace) = (
        [part.nan_to_num(nan=math.inf, posinf=math.inf) for part in parts] for parts in (ratios, sizes)
    )
    flags = torch.stack((k, going.any().long(), known.coupled.long(), mixed.long()))
    nstep = torch.where(going, k, known.nstep)
    return final.z, abs_residual[0], rel_residual[0], status, nstep, abs_trace, rel_trace, flags


def chunked(ours: Ours) -> Callable[..., Any]:
    """A chunk of an adjoint solve by iterations of u ↦ Jᵀu + b."""

    def program(
        f: Callable[..., Any],
        at: Sequence[Tensor],
        tensors: list[Tensor],
        histories: list[Tensor],
        trace: Tensor,
        limit: Tensor,
    ) -> Any:
        map_ = Shifted(ours.seen, f, at)
        for _ in range(CHUNK):
            tensors = turned(ours, map_, tensors, histories, trace, limit)
        return tensors

    return program


def turned(
    ours: Ours,
    map_: Any,
    tensors: Sequence[Tensor],
    histories: Sequence[Tensor],
    trace: Tensor,
    limit: Tensor,
) -> list[Tensor]:
    """A turn on what is packed. Norms go into the trace (2, N + 1, B), those of a turn too many into its last row."""
    carry: Carry = ours.packing.unpack(tensors, histories)
    after = advance(ours.solver, map_, carry, limit, ours.seen.resolution)
    now = after.known.now
    row = torch.where(carry.k < limit, carry.k, trace.shape[1] - 1)
    trace.index_copy_(1, row[None], torch.stack((now.size, now.scale))[:, None])
    return ours.packing.pack(after)[0]


class Search(NamedTuple):
    """A Krylov space that is being searched."""

    state: Any
    active: Tensor  # (B,), as in `AffineSolver._space`, and so the others
    failed: Tensor  # (B,)
    steps: Tensor  # (B,)
    size: Tensor  # (B,)
    k: Tensor  # (), products made


def searched(ours: Ours) -> Callable[..., Any]:
    """A chunk of such a search: what `AffineSolver._space` does."""

    def program(
        f: Callable[..., Any],
        at: Sequence[Tensor],
        tensors: list[Tensor],
        histories: list[Tensor],
        trace: Tensor,
        limit: Tensor,
    ) -> Any:
        map_ = Shifted(ours.seen, f, at)
        start, enough = at[3:]
        search: Search = ours.packing.unpack(tensors, histories)
        for _ in range(CHUNK):
            state, active, failed, steps, size, k = search
            active = active & (k < limit)
            state = state._replace(probe=torch.where(active[:, None], state.probe, 0.0))
            state, estimate = ours.solver.advance(state.probe - map_.product(state.probe), state)
            estimate = estimate * start
            finite = estimate.isfinite()
            failed = failed | (active & ~finite)
            taken = active & finite
            size = torch.where(taken, estimate, size)
            row = torch.where(k < limit, k, trace.shape[0] - 1)
            trace.index_copy_(0, row[None], size[None])
            goes = taken & (estimate > enough) & ours.solver.alive(state)
            active = torch.where(k < limit, goes, search.active)
            search = Search(state, active, failed, steps + taken, size, k + (k < limit))
        return ours.packing.pack(search)[0]

    return program


def _nothing(z: Any) -> Any:
    raise AssertionError("f comes with each call")
