"""The two cores of torchdeq 0.1.0, which sample states of a solve and give each its gradient. Translation only."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optree
import torch

from torchdeq._held import hold, release
from torchdeq._modes import in_dual_level
from torchdeq._state import Tree
from torchdeq.cores.base import DEQBase, StateMap, give_signature
from torchdeq.deq import solve_and_attach
from torchdeq.grad.base import GradMethod
from torchdeq.grad.factory import GradFunctor
from torchdeq.grad.phantom import PhantomGrad
from torchdeq.solution import Solution
from torchdeq.solver.base import SolverLoop, checked_record
from torchdeq.solver.stat import SolverStat
from torchdeq.utils.inherited import InheritedSampling


class _Sampling(InheritedSampling, DEQBase):
    """The options that `DEQIndexing` and `DEQSliced` share."""

    def _options(self, values: Mapping[str, Any]) -> None:
        name = type(self).__name__
        grad = values["grad"]
        if isinstance(grad, str):
            raise TypeError(
                f"{name}(grad={grad!r}): grad is a number of phantom steps, or one for each sampled state. ift=True is "
                f"for implicit differentiation; for other methods use torchdeq.DEQ(solver, as_grad({grad!r}))."
            )
        self.grad = [grad] if isinstance(grad, int) else list(grad)
        self.tau, self.sup_gap = values["tau"], values["sup_gap"]
        self.sup_loc = tuple(values["sup_loc"] or ())
        self.ift = bool(values["ift"] or values["hook_ift"])
        self.hook_ift = bool(values["hook_ift"])
        self.n_states = values["n_states"]
        self.arg_indexing = tuple(values["indexing"] or ())
        if not isinstance(self.n_states, int) or self.n_states < 1:
            raise ValueError(f"{name}(n_states={self.n_states!r}): expected an integer of at least 1.")
        self._own_grads = []
        count = len(self._compute_f_iter(self.f_max_iter))
        if len(self.grad) not in (1, count):
            raise ValueError(
                f"{name}(grad={self.grad}): expected one number of phantom steps, or one for each of the "
                f"{count} sampled states, got {len(self.grad)}."
            )
        if self.sup_loc and max(self.sup_loc) > max(self.grad):
            raise ValueError(
                f"{name}(sup_loc={list(self.sup_loc)}, grad={self.grad}): step {max(self.sup_loc)} is beyond the "
                f"last step of the phantom gradient."
            )
        self.methods(count)

    def sampled_at(self, f_max_iter: int) -> tuple[int, ...]:
        """The evaluations whose states are sampled, the last of them `f_max_iter`."""
        name, n = type(self).__name__, self.n_states
        if n > 1:
            if n > f_max_iter:
                raise ValueError(
                    f"{name}(n_states={n}): cannot sample {n} states from f_max_iter={f_max_iter} evaluations."
                )
            gap = f_max_iter // n
            return tuple(f_max_iter - gap * k for k in reversed(range(n)))
        inner = checked_record(self.arg_indexing, f_max_iter)
        return inner if inner and inner[-1] == f_max_iter else (*inner, f_max_iter)

    def methods(self, count: int) -> list[GradMethod]:
        """One gradient method per sampled state."""
        if self._own_grads:
            return [functor.method for functor in self._own_grads[:count]]
        steps = self.grad * count if len(self.grad) == 1 else self.grad
        methods: list[GradMethod] = [
            PhantomGrad(
                steps=k,
                tau=self.tau,
                sup_gap=self.sup_gap,
                sup_loc=tuple(at for at in self.sup_loc if at <= k),
            )
            for k in steps[:count]
        ]
        if self.ift:
            methods[-1] = self._ift(self.hook_ift)
        return methods

    def _attached(
        self,
        f: StateMap,
        z0: Tree,
        solver: SolverLoop,
        methods: Sequence[GradMethod],
        record: Sequence[int],
        report: Any,
    ) -> tuple[list[Tree], Solution]:
        """`solve_and_attach`, whose states and their number do not depend on grad mode, as in 0.1.0."""
        states, solution = solve_and_attach(f, z0, solver, methods, record=record, on_backward=report)
        if not (torch.is_grad_enabled() or in_dual_level()):
            pairs = zip(states, methods, strict=True)
            states = [state for z, method in pairs for state in GradFunctor(method)(None, f, z)]
        return states, solution

    def last_method(self) -> GradMethod:
        """In eval mode under grad: the last method, without further samples."""
        method = self.methods(len(self.grad))[-1]
        return PhantomGrad(steps=method.steps, tau=method.tau) if isinstance(method, PhantomGrad) else method


class DEQIndexing(_Sampling):
    """Samples one forward solve at several evaluations and gives each sample its gradient.

    Arguments: see `DEQBase`.

    The state sampled at evaluation k is the best one up to k. There are always as many states as asked for: a
    solve that converges early gives its solution for the rest. The last state is the solution, and `ift=True`
    differentiates it implicitly.

    Example:
        >>> deq = DEQIndexing(n_states=3, f_max_iter=30)
        >>> states, info = deq(lambda z: torch.cos(z), torch.zeros(2, 1))
        >>> len(states)
        3
    """

    def train_states(
        self, f: StateMap, z0: Tree, f_max_iter: int, solver_kwargs: Mapping[str, Any], report: Any
    ) -> tuple[list[Tree], Solution]:
        """See `DEQBase.train_states`."""
        at, held = self._compute_f_iter(f_max_iter), hold(f)
        solver = self._solver(f_max_iter, solver_kwargs)
        found = self._attached(held, z0, solver, self.methods(len(at)), at[:-1], report)
        if held is not f:
            release(held)
        return found

    def _compute_f_iter(self, f_max_iter: int) -> list[int]:
        """The evaluations that are sampled."""
        return list(self.sampled_at(f_max_iter))

    def _solve_fixed_point(
        self,
        deq_func: Callable[..., Any],
        z_init: Tree,
        f_max_iter: int | None = None,
        indexing: Sequence[int] | None = None,
        solver_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[Tree, list[Tree], SolverStat]:
        """A solve without gradients, for classes with a `forward` of their own."""
        return self._solved(deq_func, z_init, f_max_iter, indexing, solver_kwargs)


class DEQSliced(_Sampling):
    """Solves in slices: a part of the evaluations, a gradient, and on from its output.

    Arguments: see `DEQBase`.

    Each slice returns the output of its gradient method; `ift=True` differentiates the last one implicitly.

    Example:
        >>> deq = DEQSliced(indexing=[10, 20], f_max_iter=30)
        >>> states, info = deq(lambda z: torch.cos(z), torch.zeros(2, 1))
        >>> len(states)
        3
    """

    def train_states(
        self, f: StateMap, z0: Tree, f_max_iter: int, solver_kwargs: Mapping[str, Any], report: Any
    ) -> tuple[list[Tree], Solution]:
        """See `DEQBase.train_states`."""
        slices = self._compute_f_iter(f_max_iter)
        states: list[Tree] = []
        z, held = z0, hold(f)  # one update of the buffers for all slices
        for method, steps in zip(self.methods(len(slices)), slices, strict=False):
            found, solution = self._attached(
                held, z, self._solver(steps, solver_kwargs), [method], (), report
            )
            states += found
            z = _detached(found[-1])
        if held is not f:
            release(held)
        return states, solution

    def _compute_f_iter(self, f_max_iter: int) -> list[int]:
        """The evaluations of each slice."""
        if self.n_states > 1 and f_max_iter == 0:
            return [0] * self.n_states
        at = self.sampled_at(f_max_iter)
        if self.n_states > 1:
            return [f_max_iter // self.n_states] * self.n_states
        return [end - start for start, end in itertools.pairwise((0, *at))]

    def _solve_fixed_point(
        self,
        deq_func: Callable[..., Any],
        z_init: Tree,
        f_max_iter: int | None = None,
        solver_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[Tree, SolverStat]:
        """A solve without gradients, for classes with a `forward` of their own."""
        z, _, info = self._solved(deq_func, z_init, f_max_iter, None, solver_kwargs)
        return z, info


def _detached(state: Tree) -> Tree:
    return optree.tree_map(lambda t: t.detach(), state)


give_signature(DEQIndexing, "core")
give_signature(DEQSliced, "core")
