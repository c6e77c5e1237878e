"""A solve as a part of a graph, for `torch.export`: the loop is a `while_loop`, and the host reads nothing.

    while some sample is active and k < max_iter:    carry ← turn(carry)

`torchdeq.solver.traced` has `turn`. So the evaluations are those of the loop of `torchdeq.solver.base`. What that
loop does by looking at numbers and choosing in Python is left out: it leaves no finished samples out of the batch
(`compact`), asks after every evaluation whether to stop (`check_every`), and does not solve again with the batch as one
sample where f turns out to couple the samples. Autograd's derivative of a `while_loop` is not to be relied on, so none
is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import optree
import torch
from torch import Tensor, nn
from torch._higher_order_ops import while_loop
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from torchdeq._held import modules_of
from torchdeq._state import FlatMap, Layout, Tree
from torchdeq._weights import lists_in
from torchdeq.solution import Solution
from torchdeq.solver.base import SolverLoop, checked_record
from torchdeq.solver.graph_map import GraphMap
from torchdeq.solver.registry import SOLVERS
from torchdeq.solver.traced import Carry, begin, goes_on, turn
from torchdeq.solver.watch import Iterate, Samples, leaf_max


@torch.no_grad()
def solve_exported(
    f: Callable[[Tree], Tree],
    layout: Layout,
    start: Tensor,
    solver: SolverLoop,
    *,
    record: Sequence[int] = (),
    modules: Sequence[nn.Module] | None = None,
) -> Solution:
    """Solve z = f(z) from the flat start (B, D), as a part of the graph that is being exported.

    Arguments:
        f, modules: see `torchdeq.DEQ`.
        layout: the layout of the state.
        start: where to begin, (B, D).
        solver: one that `can_be_exported`.
        record: evaluations after which to keep the best state so far.

    Returns:
        A `Solution` of flat states. Its `nfe` is a tensor (), and its traces hold the final residual only.

    Raises:
        TypeError: a step of the solver is not one graph.
        RuntimeError: under autocast.
    """
    if not can_be_exported(solver):
        classes = [one for one in SOLVERS.values() if isinstance(one, type) and can_be_exported(one)]
        names = dict.fromkeys(one.__name__ for one in classes)
        raise TypeError(
            f"{solver!r} cannot be exported: its steps differ in shape, or in what they do. Solvers that can be "
            f"are {', '.join(names)}. Set one for inference: DEQ(…, eval_solver=Anderson())."
        )
    if torch.is_autocast_enabled(start.device.type):
        raise RuntimeError(
            "a solve cannot be exported under torch.autocast, which the loop of a graph does not keep. Call "
            "torch.autocast in f, around what is to be computed in less precision; or export model.to(dtype)."
        )
    record = checked_record(record, solver.max_iter)
    with evaluated(f, modules):
        with disable_proxy_modes_tracing():  # what is wrong with f is said here, outside of the graph
            FlatMap(f, layout)(start)
        map_ = GraphMap(f, layout)
        known, k, states = _looped(solver, map_, start, record)
        final, nfe = _final(solver, map_, known, k)
    count: Any = nfe
    late = [torch.where(k < r, final.z, z) for r, z in zip(record, states, strict=True)]
    return solver._solution(
        final,
        known.failed,
        known.nstep,
        count,
        [(final.size, final.scale)],
        [*late],
        stalled=known.stalled,
    )


def can_be_exported(solver: SolverLoop | type[SolverLoop]) -> bool:
    """Whether all that a solver does is one step of fixed shape after each evaluation.

    Example:
        >>> from torchdeq import Anderson, NewtonKrylov
        >>> can_be_exported(Anderson()), can_be_exported(NewtonKrylov())
        (True, False)
    """
    kind = solver if isinstance(solver, type) else type(solver)
    own = any(
        getattr(kind, name) is not getattr(SolverLoop, name) for name in ("run", "_run", "_loop", "_iterate")
    )
    return solver.fixed_shape and not own


@contextmanager
def evaluated(f: Callable[..., Any], modules: Sequence[nn.Module] | None) -> Iterator[None]:
    """Within, code that is traced finds each parametrized weight of f evaluated."""
    outer = modules_of(f) if modules is None else modules
    lists = lists_in(dict.fromkeys(inner for module in outer for inner in module.modules()))
    try:
        for one in lists:
            one.prepare()
            one.__dict__["given"] = one.evaluate()  # past `Module.__setattr__`: it may be a parameter
        yield
    finally:
        for one in lists:
            one.__dict__.pop("given", None)


def _looped(
    solver: SolverLoop, f: GraphMap, start: Tensor, record: Sequence[int]
) -> tuple[Samples, Tensor, list[Tensor]]:
    """What is known after the last evaluation, its number (), and the states asked for, (B, D) each."""
    map_: Any = f
    first: Any = (begin(solver, start, map_, solver.max_iter), [start.clone() for _ in record])
    leaves: list[Any]
    leaves, spec = optree.tree_flatten(first)
    skeleton = optree.tree_unflatten(spec, range(len(leaves)))

    def whole(tensors: Sequence[Tensor]) -> tuple[Carry, list[Tensor]]:
        structure: Any = optree.tree_structure(skeleton)
        out: Any = optree.tree_unflatten(structure, list(tensors))
        carry, states = out
        return carry, states

    def more(*tensors: Tensor) -> Tensor:
        return goes_on(whole(tensors)[0], solver.max_iter)

    def one(*tensors: Tensor) -> tuple[Tensor, ...]:
        now, states = whole(tensors)
        # A step writes into its histories; a graph must not write into what it is given.
        own = now._replace(state=optree.tree_map(torch.clone, now.state))
        after: Any = turn(solver, map_, own, f.resolution)
        states = [
            torch.where(after.k == r, after.known.best.z, z) for r, z in zip(record, states, strict=True)
        ]
        out: Any = (after, states)
        return _apart(tensors, optree.tree_leaves(out))

    end, states = whole(while_loop(more, one, tuple(leaf.contiguous() for leaf in leaves)))
    return end.known, end.k, states


def _apart(given: Sequence[Tensor], out: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What goes out of a graph: none of it what came in, nor the same twice."""
    seen, apart = list(given), []
    for tensor in out:
        apart.append(tensor.clone() if any(tensor is other for other in seen) else tensor)
        seen.append(tensor)
    return tuple(apart)


def _final(solver: SolverLoop, f: GraphMap, known: Samples, k: Tensor) -> tuple[Iterate, Tensor]:
    """What is returned, as in `SolverLoop._final`, and the number of evaluations, ()."""
    now, best = known.now, known.best
    if solver.return_final:
        return now.where(~known.failed, best), k
    finite = now.measure.isfinite()
    arrived = (now.measure <= solver.tol) & ~known.failed & known.coupled
    mixed = now.where(finite & ((now.measure <= best.measure) | arrived), best)
    single = known.single.where(~known.failed, best)
    one_will_do = (single.measure <= mixed.measure).all()
    map_: Any = f

    def measured_together() -> tuple[Tensor, ...]:
        again = solver._measured(mixed.z, f(mixed.z), map_)
        scale = leaf_max(again.scale) if solver.stop_mode == "abs" else 1.0
        noise = 64 * torch.finfo(mixed.size.dtype).eps * scale
        holds = (again.measure <= 1.5 * mixed.measure + noise) | known.failed
        return tuple(again.where(~known.failed, mixed).where(holds.all().expand(holds.shape[0]), single))

    final = torch.cond(one_will_do, lambda: tuple(part.clone() for part in single), measured_together, ())
    return Iterate(*final), k + (~one_will_do).long()
