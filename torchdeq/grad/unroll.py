"""Unrolling: back-propagation through the steps of the solver.

    z_{j+1} = τ f(z_j) + (1 − τ) z_j,   j < N,   all of them in the graph, or the last k of them.

The derivative of the program rather than of the fixed point. In full it is right to any order, in reverse and forward
mode, as the iteration converges, at a memory of one graph of f per evaluation. It is the yardstick for the methods
that do without that memory.

Cut to k evaluations (truncated back-propagation through time) it has a bias. With M = (1 − τ) I + τ Jᵀ, which is
‖M‖ ≤ μ < 1 on the way, J Lipschitz with constant L, and τ = 1,

    ‖û − u‖ ≤ μ^k ‖u‖ + L ‖z_{N−k} − z*‖ ‖g‖ / (1 − μ)²,

where û stands for the exact adjoint u: the gradient is Bᵀ û if B = ∂f/∂θ does not depend on z, and otherwise differs
from it by the change of B, which is of first order in ‖z_{N−k} − z*‖ too. See `PhantomGrad` for the first term.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from torchdeq._modes import without_tangents
from torchdeq._state import FlatMap, Map, layout_of
from torchdeq.grad.base import GradMethod, OnBackward
from torchdeq.grad.fingerprint import Fingerprint
from torchdeq.grad.phantom import PhantomGrad
from torchdeq.solution import Solution, Status
from torchdeq.solver.base import SolverLoop, checked_record, layout_of_map
from torchdeq.solver.fp_iter import FixedPointIteration


@dataclass(frozen=True, kw_only=True, repr=False)
class Unroll(GradMethod):
    """Differentiate through the steps of a (damped) Picard iteration.

    In full, derivatives of any order, also in forward mode, as right as the iteration has converged. Works with
    `FixedPointIteration` and its simple form, whose steps build nothing but the graph of f.

    What is returned is f of the last iterate, without grad mode too, as it is the value of the steps.

    Memory: one graph of f per evaluation, k graphs with `last`, with `checkpoint` one state for each. Cost: the solve
    and one tracked call of f; in a backward pass one through each tracked call, which is made again with `checkpoint`.

    Arguments:
        last: k ≥ 1, how many evaluations are tracked. None: all. `SimpleFixedPointIteration`, whose count is known,
            tracks the last k of its max_iter evaluations. With a stop test the end is not known beforehand: the solve
            runs without a graph for max_iter − k evaluations at most, and k tracked ones go on from where it stopped.
            The returned state is f of the last iterate, and k evaluations old is where its graph begins. It has the
            bias of a phantom gradient, ‖M‖^k ‖u‖, and one of first order in the distance of that state from z*.
        checkpoint: keep the argument of each tracked evaluation rather than its graph, and evaluate f again in the
            backward pass, with the same random numbers and autocast state (`torch.utils.checkpoint`). The same
            gradient, for one more evaluation of f each.

    Raises:
        ValueError: `last` is out of its range.
        TypeError: the solver is another one.
        RuntimeError: in forward mode, where `last` makes the tangent a part of it; in a backward pass with
            `checkpoint`, when f gives another value than before.

    Example:
        >>> import torch, torchdeq
        >>> a = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        >>> deq = torchdeq.DEQ(FixedPointIteration(tol=1e-12), Unroll())
        >>> z, _ = deq(lambda z: a * z + 1, torch.zeros(1, 1, dtype=torch.float64))
        >>> (g,) = torch.autograd.grad(z.sum(), a, create_graph=True)
        >>> (h,) = torch.autograd.grad(g, a)
        >>> round(g.item(), 6), round(h.item(), 6)  # 1/(1 − a)² and 2/(1 − a)³
        (4.0, 16.0)
    """

    own_steps: ClassVar[bool] = True

    last: int | None = None
    checkpoint: bool = False

    def __post_init__(self) -> None:
        self.require(
            self.last is None or (type(self.last) is int and self.last >= 1),
            f"last counts tracked evaluations of f and must be an integer of at least 1, or None for all of them, "
            f"got {self.last!r}",
        )

    def attach(self, f: Map, z: Tensor, *, on_backward: OnBackward | None = None) -> list[Tensor]:
        """`last` tracked steps, undamped; one if that is None, as a state that is solved already has no other graph."""
        return PhantomGrad(steps=self.last or 1).attach(self._steps(f, z, False), z)

    def __call__(
        self,
        f: Map,
        z0: Tensor,
        solver: SolverLoop,
        *,
        record: Sequence[int] = (),
        on_backward: OnBackward | None = None,
    ) -> tuple[list[Tensor], Solution]:
        """Solve from z0 with the graph of the evaluations kept."""
        picard = plain_iteration(self, solver)
        if self.last is not None:
            out, solution = self._cut(self._steps(f, z0, False), z0, picard, self.last, record)
            return [out], solution
        steps = self._steps(f, z0, True)
        solution = picard.run(steps, z0, record=record)
        return [steps(solution.z)], solution.detach()

    def without_grad(
        self, f: Map, z0: Tensor, solver: SolverLoop, *, record: Sequence[int] = ()
    ) -> tuple[Tensor, Solution]:
        """The same value, of as many evaluations; what another solver makes of it, if it is another."""
        if not isinstance(solver, FixedPointIteration):
            return super().without_grad(f, z0, solver, record=record)
        if self.last is not None:
            return self._cut(f, z0, solver, min(self.last, solver.max_iter), record)
        solution = solver.run(f, z0, record=record)
        return f(solution.z), solution

    def _steps(self, f: Map, z: Tensor, tangents: bool) -> FlatMap:
        inner, layout = (f.f, f.layout) if isinstance(f, FlatMap) else (f, layout_of(z))
        return _Steps(inner, layout, tangents, self.checkpoint)

    def _cut(
        self, f: Map, z0: Tensor, solver: FixedPointIteration, last: int, record: Sequence[int]
    ) -> tuple[Tensor, Solution]:
        spare = solver.max_iter - last
        self.require(
            spare >= 0,
            f"last tracked evaluations are more than max_iter={solver.max_iter} of {solver!r}. Raise max_iter, or "
            f"use Unroll(), which tracks all",
        )
        if not solver.monitors or spare == 0:
            return run_to_the_end(f, z0, solver, last, record)
        record = checked_record(record, solver.max_iter)
        early, late = [r for r in record if r <= spare], [r - spare for r in record if r > spare]
        with torch.no_grad(), without_tangents():
            first = solver.replace(max_iter=spare, min_iter=min(solver.min_iter, spare)).run(
                f, z0, record=early
            )
        out, end = run_to_the_end(f, first.z, solver.replace(max_iter=last, min_iter=1), last, late)
        failed = first.status == Status.NON_FINITE
        return out, dataclasses.replace(
            end,
            status=torch.where(failed, first.status, end.status),
            nstep=first.nstep + end.nstep,
            nfe=first.nfe + end.nfe,
            abs_trace=torch.cat([first.abs_trace, end.abs_trace]),
            rel_trace=torch.cat([first.rel_trace, end.rel_trace]),
            states=first.states + end.states,
        )


def plain_iteration(method: GradMethod, solver: SolverLoop) -> FixedPointIteration:
    """`solver`, which must be plain iteration.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(solver, FixedPointIteration):
        name = type(method).__name__
        raise TypeError(
            f"{name} differentiates the steps of FixedPointIteration, whose iterates are functions of f alone; got "
            f"{solver!r}. Use DEQ(FixedPointIteration(), {name}()), or SimpleFixedPointIteration for a fixed count."
        )
    return solver


def run_to_the_end(
    f: Map, z0: Tensor, solver: FixedPointIteration, last: int, record: Sequence[int] = ()
) -> tuple[Tensor, Solution]:
    """All of the solver's `max_iter` evaluations from z0, without a stop test, the last of them tracked.

    Arguments:
        f: the map, (B, D) -> (B, D).
        z0: the start, (B, D); it gets no gradient.
        solver: its max_iter is how many evaluations there are.
        last: how many are tracked, 1 … max_iter.
        record: evaluations to sample.

    Returns:
        The image of the last iterate (B, D), whose graph is that of `last` evaluations, and the `Solution` of that
        iterate, whose residual that evaluation has measured. No evaluation is made twice.
    """
    end = _End(f, solver.max_iter - last)
    whole = solver.replace(return_final=True, patience=0, compact=False)
    solution = whole.run(end, z0.detach(), record=record, layout=layout_of_map(f))
    # If no sample is finite any more, the loop ends before it has come to the tracked part.
    fz = end.fz if end.calls == solver.max_iter else f(solution.z.detach())
    return fz, solution.detach()


class _End:
    """f, of which only the evaluations after the first `skip` are tracked."""

    def __init__(self, f: Map, skip: int):
        self.f, self.skip, self.calls = f, skip, 0

    def __call__(self, z: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > self.skip:
            self.fz = self.f(z)
        else:
            with torch.no_grad(), without_tangents():
                self.fz = self.f(z)
        return self.fz


class _Steps(FlatMap):
    """f as it is unrolled.

    Arguments:
        f, layout: see `FlatMap`.
        tangents: whether tangents go through it, to be those of the whole program.
        again: whether it keeps its argument rather than its graph.
    """

    def __init__(self, f: Any, layout: Any, tangents: bool, again: bool):
        super().__init__(f, layout)
        self.tangents, self.again = tangents, again

    def __call__(self, z: Tensor) -> Tensor:
        step = self.dual if self.tangents else super().__call__
        if not (self.again and torch.is_grad_enabled()):
            return step(z)
        before: list[Fingerprint] = []

        def compared(z: Tensor) -> Tensor:
            fz = step(z)
            if before:
                before[0].check(fz, "Unroll(checkpoint=True)")
            else:
                before.append(Fingerprint.of(fz, self.layout))
            return fz

        with set_checkpoint_early_stop(False):  # which would leave f before its value is there
            out: Tensor = checkpoint(compared, z, use_reentrant=False)
        return out

    def select(self, rows: Tensor) -> FlatMap:
        few = super().select(rows)
        return _Steps(few.f, few.layout, self.tangents, self.again)
