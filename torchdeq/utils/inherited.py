"""What classes that were derived from torchdeq 0.1.0's DEQ classes find in them: `produce_grad`, `indexing`, and the
pieces that 0.1.0's `forward` was made of.

A class that has a `forward` of its own, in 0.1.0's manner, goes on as it was: it wraps f with
`torchdeq.utils.layer_utils.deq_decorator`, calls `_solve_fixed_point` or `f_solver`, and gives the state to
`produce_grad`. A class that replaces `_solve_fixed_point` and counts on the inherited `forward` to call it is refused,
since the `forward` of today does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from torchdeq.diagnostics.spectral import spectral_radius
from torchdeq.grad.base import GradMethod
from torchdeq.grad.factory import GradFunctor
from torchdeq.solution import Reporter
from torchdeq.solver.base import SolverLoop
from torchdeq.solver.stat import SolverStat


class Inherited:
    """The part that `DEQBase` has."""

    forward: Callable[..., Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        replaced = getattr(cls, "_solve_fixed_point", None)
        if replaced and not _is_of_this_library(replaced) and _is_of_this_library(cls.forward):
            raise TypeError(
                f"{cls.__name__} defines _solve_fixed_point, which the forward of torchdeq 0.1.0 called. The forward "
                f"of this version does not, so it would change nothing. Define forward as well; or train_states, which "
                f"this version calls, see torchdeq.DEQBase; or make a solver of it with torchdeq.register_solver."
            )

    def _compute_f_iter(self, f_max_iter: int) -> list[int]:
        """The evaluations of each solve in a training step."""
        return [f_max_iter]

    def _sradius(self, deq_func: Callable[..., Any], z_star: Any) -> Tensor:
        """The spectral radius of the Jacobian at z_star, (B,)."""
        return spectral_radius(deq_func, z_star)


class InheritedSampling(Inherited):
    """The part that `DEQIndexing` and `DEQSliced` share."""

    f_max_iter: int
    training: bool
    _own_grads: list[GradFunctor]
    methods: Callable[[int], list[GradMethod]]
    _solver: Callable[[int, Mapping[str, Any]], SolverLoop]
    _backward_report: Reporter

    @property
    def indexing(self) -> list[int]:
        """The evaluations that are sampled ('indexing'), or those of each slice ('sliced')."""
        return self._compute_f_iter(self.f_max_iter)

    @property
    def produce_grad(self) -> tuple[GradFunctor, ...]:
        """The gradient of each state, as what `backward_factory` returns. A sequence of such may be assigned."""
        methods = self.methods(len(self.indexing))
        return tuple(GradFunctor(method, reporter=self._backward_report) for method in methods)

    @produce_grad.setter
    def produce_grad(self, functors: Sequence[GradFunctor]) -> None:
        count = len(self.indexing)
        if len(functors) != count or not all(isinstance(one, GradFunctor) for one in functors):
            raise TypeError(
                f"{type(self).__name__}.produce_grad takes what backward_factory returns, one for each of the {count} "
                f"sampled states, got {functors!r}. For a gradient of your own define a torchdeq.GradMethod."
            )
        self._own_grads = list(functors)

    def _solved(
        self,
        deq_func: Callable[..., Any],
        z_init: Any,
        f_max_iter: int | None,
        indexing: Sequence[int] | None,
        solver_kwargs: Mapping[str, Any] | None,
    ) -> tuple[Any, list[Any], SolverStat]:
        options = {name: value for name, value in (solver_kwargs or {}).items() if name != "f_max_iter"}
        solver = self._solver(self.f_max_iter if f_max_iter is None else f_max_iter, options)
        solution = solver(deq_func, z_init, record=(indexing or ()) if self.training else ())
        return solution.z, solution.states, SolverStat.from_solution(solution)


def _is_of_this_library(method: Any) -> bool:
    return bool(method.__module__.partition(".")[0] == "torchdeq")
