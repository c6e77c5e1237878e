"""What the DEQ classes of torchdeq 0.1.0 share: options, solvers, and the solve in eval mode. Translation only.

The options, their order and their defaults come from the table in `torchdeq.utils.options`; the work is done by
`torchdeq.deq.solve_and_attach`.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from torchdeq._held import hold
from torchdeq._state import Tree
from torchdeq.deq import FORWARD_REMEDY, noise_in, solve_and_attach
from torchdeq.grad.base import GradMethod
from torchdeq.grad.factory import BackwardReport, Writer
from torchdeq.grad.ift import ADJOINT_REMEDY, IFT
from torchdeq.solution import Reporter, Solution
from torchdeq.solver.base import SolverLoop
from torchdeq.solver.fp_iter import FixedPointIteration
from torchdeq.solver.functional import (
    SOLVER_CLASSES,
    SimpleSteps,
    fixed_point_iter,
    get_solver,
    simple_fixed_point_iter,
)
from torchdeq.solver.registry import as_solver
from torchdeq.solver.stat import SolverStat
from torchdeq.utils.config import DEQConfig
from torchdeq.utils.inherited import Inherited
from torchdeq.utils.options import NAMES, OPTIONS, check_keywords, warn_near_misses

States = list[Any]


class DEQBase(Inherited, nn.Module):
    """What the cores of torchdeq 0.1.0 share: their options, and the solve in eval mode.

    Derive from it to define another computational graph; `register_deq` then makes it known to `get_deq`.

    Arguments:
        args: options in an argparse.Namespace, a mapping, or any object with attributes. It is copied, and
            may hold keys of other programs.
        **kwargs: the options by name. One that is given here wins over `args`.

    Raises:
        TypeError: an option that does not exist was given by name; the nearest is named.
        ValueError: a value is out of range.

    The options and their defaults are those of `add_deq_args`. Attributes such as `f_max_iter`, `f_tol` and
    `eval_f_max_iter` may be changed at any time. Derivatives follow `torch.is_grad_enabled()`, in eval mode too.

    Example:
        >>> from torchdeq import get_deq
        >>> deq = get_deq(f_solver='anderson', f_tol=1e-5, ift=True)
        >>> layer = torch.nn.Linear(4, 4)
        >>> states, info = deq(lambda z: torch.tanh(0.4 * layer(z)), torch.ones(2, 4))
        >>> len(states), info['abs_lowest'].shape
        (1, torch.Size([2]))
    """

    #: The signature of `__init__`, made from the table of options at the end of this file.
    accepts: ClassVar[inspect.Signature]

    def _configure(self, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        super().__init__()
        given = dict(self.accepts.bind(self, *positional, **keywords).arguments)
        del given["self"]
        given |= given.pop("kwargs", {})
        config = DEQConfig(given.pop("args", None)).config
        name = type(self).__name__
        check_keywords(given, NAMES, name)
        warn_near_misses(config, NAMES)
        values = dict(_DEFAULTS)
        values |= {k: v for k, v in config.items() if k in values}
        values |= given
        self.args = DEQConfig({**config, **given})

        # A name becomes a function of 0.1.0's call form, as programs call `deq.f_solver(f, x0=…)`.
        self.f_solver, self.b_solver = _in_call_form(values["f_solver"]), _in_call_form(values["b_solver"])
        for prefix in ("f", "b"):  # a Solver object keeps its own settings unless others are given
            solver = as_solver(values[f"{prefix}_solver"])
            for option in ("max_iter", "tol", "stop_mode"):
                key = f"{prefix}_{option}"
                own = isinstance(values[f"{prefix}_solver"], SolverLoop) and key not in given
                setattr(self, key, getattr(solver, option) if own else values[key])
        self.f_max_iter: int = int(self.f_max_iter)
        self.b_max_iter: int = int(self.b_max_iter)
        self.no_stat = values["no_stat"]
        if self.no_stat and self.f_solver not in (fixed_point_iter, simple_fixed_point_iter):
            raise ValueError(
                f"{name}(no_stat=True, f_solver={values['f_solver']!r}): only Picard iteration can do without "
                f"residuals. Use f_solver='fixed_point_iter', or leave no_stat out."
            )
        eval_max_iter, factor = values["eval_f_max_iter"], values["eval_factor"]
        self.eval_f_max_iter = eval_max_iter if eval_max_iter > 0 else int(self.f_max_iter * factor)
        self._told = False
        self._forward_report = Reporter(FORWARD_REMEDY)
        self._backward_report: Reporter = Reporter(ADJOINT_REMEDY)
        self._options(values)
        self._solver(self.f_max_iter, {})  # so that a wrong value raises here, not at the first call

    def _options(self, values: Mapping[str, Any]) -> None:
        """Read what a subclass adds."""

    def _solver(self, max_iter: int, solver_kwargs: Mapping[str, Any]) -> SolverLoop:
        """The forward solver with these settings."""
        solver: Any = self.f_solver
        if self.no_stat and solver is fixed_point_iter:
            solver = simple_fixed_point_iter
        options: dict[str, Any] = {
            "max_iter": int(max_iter),
            "tol": self.f_tol,
            "stop_mode": self.f_stop_mode,
        }
        if max_iter == 0:  # no step: the start is the solution, with the residual that it has
            return FixedPointIteration().replace(**{**options, "max_iter": 1})
        options |= self._for_this_solver(solver, solver_kwargs)
        if solver is simple_fixed_point_iter and (self.training or not torch.is_grad_enabled()):
            # All the steps, and then those of the gradient. In eval mode under grad the gradient makes the last one.
            solver = SimpleSteps()
        return as_solver(solver, **options)

    def _for_this_solver(self, solver: Any, solver_kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The options without those of another of 0.1.0's solvers, which it ignored: scripts pass them to whatever
        `--f_solver` names."""
        own = inspect.signature(solver).parameters if solver in SOLVER_CLASSES else None
        if own is None:
            return solver_kwargs
        idle = [name for name in solver_kwargs if name in _OPTIONS_OF_SOLVERS and name not in own]
        if idle and not self._told:
            self._told = True
            warnings.warn(
                f"{solver.__name__} has no use for {' and '.join(idle)} in solver_kwargs, an option of another solver. "
                f"It is ignored.",
                UserWarning,
                stacklevel=4,
            )
        return {name: value for name, value in solver_kwargs.items() if name not in idle}

    def _ift(self, hook: bool) -> IFT:
        solver = as_solver(
            self.b_solver, max_iter=self.b_max_iter, tol=self.b_tol, stop_mode=self.b_stop_mode
        )
        return IFT(solver=solver, hook=hook)

    def __repr__(self) -> str:
        config = self.args.config
        given = [f"{k}={config[k]!r}" for k in NAMES if k in config and config[k] != _DEFAULTS[k]]
        return f"{type(self).__name__}({', '.join(given)})"

    def train_states(
        self, f: StateMap, z0: Tree, f_max_iter: int, solver_kwargs: Mapping[str, Any], report: Any
    ) -> tuple[list[Tree], Solution]:
        """The states of a training step, the final one last, and the `Solution` of the last solve."""
        raise NotImplementedError(
            f"{type(self).__name__} must define train_states (or forward): DEQBase only holds what the cores "
            f"share. Use get_deq() for a ready-made module."
        )

    def last_method(self) -> GradMethod:
        """The gradient method of the final state."""
        return self._ift(hook=False)

    def forward(
        self,
        func: Callable[..., Any],
        z_init: Tree,
        solver_kwargs: Mapping[str, Any] | None = None,
        sradius_mode: bool = False,
        backward_writer: Writer | None = None,
        **kwargs: Any,
    ) -> tuple[States, SolverStat]:
        """Solve z = f(z).

        Arguments:
            func: f. A tuple or list state is passed as so many arguments, any other state as one.
            z_init: the start: a tensor (B, …), or a tuple, list, dict or other pytree of such.
            solver_kwargs: settings of the forward solver for this call: f_max_iter, tol, m, …
            sradius_mode: in eval mode, add the spectral radius of the Jacobian, (B,), as info['sradius'].
            backward_writer: called with a `SolverStat` of the adjoint solve, once per backward pass.
            **kwargs: `writer`, another name of `backward_writer`.

        Returns:
            The states, each a tensor, or a list of tensors for a tuple or list state: in training mode all
            sampled ones, the final and best last; in eval mode that one. And the statistics of the forward
            solve.
        """
        check_keywords(kwargs, ("writer",), f"{type(self).__name__}.forward")
        if "writer" in kwargs and backward_writer is not None:
            raise TypeError("writer and backward_writer are two names of one argument; give one of them.")
        report = BackwardReport(self._backward_report, kwargs.get("writer", backward_writer))
        options = dict(solver_kwargs or {})
        max_iter = options.pop("f_max_iter", self.f_max_iter if self.training else self.eval_f_max_iter)
        unpacked = isinstance(z_init, tuple | list)
        f = _Unpacked(func) if unpacked else func
        if self.training:
            states, solution = self.train_states(f, z_init, int(max_iter), options, report)
        else:
            solver = self._solver(max_iter, options)
            states, solution = solve_and_attach(f, z_init, solver, [self.last_method()], on_backward=report)
        self._forward_report(solution, lambda: noise_in(f, z_init))
        monitors = len(solution.abs_trace) > 1 or solution.nfe == 1
        steps = self._compute_f_iter(int(max_iter))[-1] if self.training else int(max_iter)
        info = SolverStat.from_solution(solution, steps if monitors else 0)
        if not self.training:
            # Held and not released: to look at f changes no buffer.
            info["sradius"] = self._sradius(hold(f), solution.z) if sradius_mode else torch.zeros(1)
        return [list(z) if unpacked else z for z in states], info


def _in_call_form(solver: Any) -> Any:
    return get_solver(solver) if isinstance(solver, str) else solver


StateMap = Callable[[Tree], Tree]
_OPTIONS_OF_SOLVERS = {name for form in SOLVER_CLASSES for name in inspect.signature(form).parameters}
_DEFAULTS = {o.name: o.in_signature for o in OPTIONS}


@dataclass(frozen=True)
class _Unpacked:
    """f(z₁, z₂, …) as a map of one argument, the tuple of them."""

    func: Callable[..., Any]

    def __call__(self, z: Sequence[Any]) -> Any:
        try:
            return self.func(*z)
        except TypeError as error:
            if self._takes_one(z):
                raise TypeError(
                    f"f takes one argument, and is called with {len(z)}: the modules of get_deq hand a tuple or list "
                    f"over as several arguments. Write f(a, b, …), or give lambda *state: f(state); torchdeq.DEQ hands "
                    f"it over as it is."
                ) from error
            raise

    def _takes_one(self, z: Sequence[Any]) -> bool:
        """Whether func takes the state as one argument, and not as several."""
        try:
            signature = inspect.signature(self.func)
            signature.bind(z)
        except (TypeError, ValueError):
            return False
        try:
            signature.bind(*z)
        except TypeError:
            return True
        return False


def _signature(*groups: str) -> inspect.Signature:
    """The signature of a DEQ class that takes `args`, the options of these groups, and others as keywords."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    named = [o for group in groups for o in OPTIONS if o.where == group]
    return inspect.Signature(
        [
            inspect.Parameter("self", kind),
            inspect.Parameter("args", kind, default=None),
            *(inspect.Parameter(o.name, kind, default=o.in_signature) for o in named),
            inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD),
        ]
    )


def give_signature(cls: type[DEQBase], *groups: str) -> None:
    """Give a DEQ class the signature that 0.1.0's has, from the table of options."""
    cls.accepts = _signature(*groups)

    def __init__(self: DEQBase, *positional: Any, **keywords: Any) -> None:  # noqa: N807
        self._configure(positional, keywords)

    __init__.__signature__ = cls.accepts  # type: ignore[attr-defined]
    cls.__init__ = __init__  # type: ignore[assignment, method-assign]


give_signature(DEQBase, "base")
