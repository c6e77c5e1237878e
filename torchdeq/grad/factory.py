"""`backward_factory`: the gradient methods behind torchdeq 0.1.0's contract. Translation only."""

from __future__ import annotations

import dataclasses
import numbers
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torchdeq._state import FlatMap, Tree, layout_of
from torchdeq._suggest import did_you_mean
from torchdeq.grad.base import GradMethod
from torchdeq.grad.ift import ADJOINT_REMEDY, IFT
from torchdeq.grad.phantom import PhantomGrad
from torchdeq.grad.registry import GRADS, as_grad
from torchdeq.grad.shine import SHINE
from torchdeq.grad.unroll import Unroll
from torchdeq.solution import Reporter, Solution
from torchdeq.solver.base import SOLVER_REMEDY, Solver, SolverLoop
from torchdeq.solver.fp_iter import SimpleFixedPointIteration
from torchdeq.solver.registry import as_solver
from torchdeq.solver.stat import SolverStat

Writer = Callable[[SolverStat], Any]
_PARAMETERS = ("grad_type", "hook_ift", "b_solver", "b_solver_kwargs", "sup_gap", "sup_loc", "tau")


@dataclass(frozen=True)
class GradFunctor:
    """What `backward_factory` returns: a gradient method in 0.1.0's call form. Pickles, compares, prints.

    Arguments:
        method: the gradient method.
        solver: for a method that makes the solve itself, the solver that it runs from `z_pred`; None for the others.

    Example:
        >>> functor = backward_factory(3, tau=0.7)
        >>> functor.method
        PhantomGrad(steps=3, tau=0.7)
        >>> import torch
        >>> [z.shape for z in functor(None, torch.cos, torch.zeros(2, 3))]
        [torch.Size([2, 3])]
    """

    method: GradMethod
    solver: SolverLoop | None = None
    reporter: Reporter = field(default_factory=lambda: Reporter(ADJOINT_REMEDY), compare=False, repr=False)

    def __call__(
        self,
        trainer: Any,
        func: Callable[[Tree], Tree],
        z_pred: Tree,
        writer: Writer | None = None,
        **kwargs: Any,
    ) -> list[Tree]:
        """States with gradients, made from the solved state `z_pred`.

        Arguments:
            trainer: ignored; nothing is kept on it. May be None.
            func: f in z = f(z).
            z_pred: the solved state, a tensor (B, …) or a pytree of such. Not changed. With a `solver` the state from
                which it solves.
            writer: called with a `SolverStat` of the adjoint solve, once per backward pass.
            **kwargs: ignored, as 0.1.0 did, with a warning.

        Returns:
            The sampled states, the final one last and once.
        """
        if kwargs:
            warnings.warn(f"{self!r} ignores the keywords {sorted(kwargs)}.", UserWarning, stacklevel=2)
        layout = layout_of(z_pred)
        f, z = FlatMap(func, layout), layout.ravel(z_pred, source="z_pred")
        report = BackwardReport(self.reporter, writer)
        if self.solver is None:
            states = self.method.attach(f, z, on_backward=report)
        else:
            states, solution = self.method(f, z.detach(), self.solver, on_backward=report)
            if isinstance(self.method, SHINE) and bool((solution.nstep <= 1).all()):
                raise ValueError(
                    f"{self!r}: z_pred meets the tolerance of b_solver as it is, so its solve has learned nothing, "
                    f"and SHINE would be the one-step gradient. Give the state from which to solve, or use "
                    f"torchdeq.DEQ(solver, grad={self.method!r})."
                )
            Reporter(SOLVER_REMEDY)(solution)
        return [layout.unravel(z) for z in states]

    def __repr__(self) -> str:
        method = self.method
        if isinstance(method, IFT):
            hook = "hook_ift=True, " if method.hook else ""
            order = f", order={method.order}" if method.order != 1 else ""
            return f"backward_factory('ift', {hook}b_solver={method.solver!r}{order})"
        if isinstance(method, PhantomGrad):
            rest = [
                f"{name}={getattr(method, name)!r}"
                for name in ("sup_gap", "sup_loc", "tau")
                if getattr(method, name) != PhantomGrad.__dataclass_fields__[name].default
            ]
            return f"backward_factory({', '.join([str(method.steps), *rest])})"
        solver = "" if self.solver is None else f", b_solver={self.solver!r}"
        return f"backward_factory({method!r}{solver})"


def make_pair(target: Sequence[Any], source: Sequence[Any]) -> list[Any]:
    """`source` with as many entries as `target`: as it is, or its only entry repeated.

    Raises:
        ValueError: it has another number of entries.

    Example:
        >>> make_pair([10, 20, 30], [1])
        [1, 1, 1]
    """
    if len(source) not in (1, len(target)):
        raise ValueError(
            f"make_pair: expected one entry, or one for each of the {len(target)} of {list(target)!r}, got "
            f"{len(source)}: {list(source)!r}."
        )
    return list(source) if len(source) == len(target) else list(source) * len(target)


@dataclass(frozen=True)
class BackwardReport:
    """Hands an adjoint `Solution` to the convergence report and, as a `SolverStat`, to a 0.1.0-style writer."""

    reporter: Reporter
    writer: Writer | None = None

    def __call__(self, solution: Solution) -> None:
        if self.writer is not None:
            self.writer(SolverStat.from_solution(solution))
        self.reporter(solution)


def backward_factory(
    grad_type: str | int | GradMethod = "ift",
    hook_ift: bool = False,
    b_solver: str | Solver | Callable[..., Any] | None = None,
    b_solver_kwargs: Mapping[str, Any] | None = {},
    sup_gap: int = -1,
    sup_loc: Sequence[int] | None = None,
    tau: float = 1.0,
    **grad_factory_kwargs: Any,
) -> GradFunctor:
    """A gradient functor for z = f(z): implicit differentiation, a phantom gradient, or any other method by name.

    Arguments:
        grad_type: 'ift' for implicit differentiation; an integer k ≥ 1 for a phantom gradient of k steps
            (k = 1 is the one-step gradient, JFB); another name of `GRADS`; or a `GradMethod`.
        hook_ift: solve the adjoint on the graph of the forward's last call of f, in a tensor hook: one
            graph in all. False rebuilds f once in the backward, in an autograd Function.
        b_solver: the adjoint solver: a registered name, a `Solver`, a function of 0.1.0's form, or None for
            that of the method, `GMRES(tol=1e-5)` for 'ift'. For 'unroll', 'shine' and 'reversible', which make the
            forward solve themselves, the solver of that, which begins at `z_pred`. 'unroll' and 'reversible' then make
            all its evaluations, also from a solved state, as each of them adds to the gradient; 'shine' needs a state
            that is not solved, to learn from. 'unroll' makes fifty steps unless one is given; the others need one.
        b_solver_kwargs: hyperparameters for it, such as max_iter, tol (relative to the cotangent), stop_mode.
        sup_gap: for a phantom gradient, also return the states after every `sup_gap`-th step.
        sup_loc: for a phantom gradient, also return the states after these steps.
        tau: damping of the phantom gradient.
        **grad_factory_kwargs: further options of the method that is named, such as terms=5 of 'phantom_neumann'.
            What it has not is ignored, with a warning.

    Returns:
        A functor `(trainer, func, z_pred, writer=None) -> list of states`; see `GradFunctor`.

    Raises:
        ValueError: an unknown `grad_type` or solver, or a value out of range.
        TypeError: an option that the solver or the method does not have; an option beside a `GradMethod`, which has
            its own; 'shine' or 'reversible' without a solver.

    What 0.1.0 took and ignored is ignored with a warning: `hook_ift` of any method but 'ift', the adjoint solver of a
    phantom gradient, `sup_gap`, `sup_loc` and `tau` of 'ift'.

    Example:
        >>> import torch
        >>> a = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        >>> f = lambda z: a * z + 1
        >>> z_star = torch.full((1, 1), 2.0, dtype=torch.float64)
        >>> z, = backward_factory('ift', b_solver='anderson')(None, f, z_star)
        >>> z.sum().backward()
        >>> round(a.grad.item(), 6)
        4.0
        >>> backward_factory(5, tau=0.5, sup_loc=[2])
        backward_factory(5, sup_loc=(2,), tau=0.5)
        >>> backward_factory('phantom_neumann', terms=3, tau=0.5).method
        NeumannPhantom(terms=3, tau=0.5)
    """
    b_solver_kwargs = _checked_options(b_solver_kwargs)
    loc = tuple(int(at) for at in sup_loc) if sup_loc is not None else ()
    values = (hook_ift, b_solver, b_solver_kwargs, sup_gap, loc, tau)
    given = {
        name: value for name, value in zip(_PARAMETERS[1:], values, strict=True) if value != _NEUTRAL[name]
    }
    known = _options_of(grad_type)
    options = {name: value for name, value in grad_factory_kwargs.items() if name in known}
    for name in grad_factory_kwargs:
        if name not in known:
            hint = did_you_mean(name, [*_PARAMETERS, *known])
            warnings.warn(f"backward_factory ignores the keyword {name!r}.{hint}", UserWarning, stacklevel=2)
    method = as_grad(grad_type) if isinstance(grad_type, str) and grad_type in GRADS else grad_type
    if isinstance(method, GradMethod) and (method.needs_solve or isinstance(method, Unroll)):
        others = {name: value for name, value in given.items() if name not in ("b_solver", "b_solver_kwargs")}
        if method is grad_type:
            _as_it_is(method, others)
        else:
            _warn_of_no_use(grad_type, given, ("hook_ift", "tau", "sup_gap", "sup_loc"))
        method = method.replace(**options)
        return GradFunctor(method, _forward_solver(method, b_solver, b_solver_kwargs))
    if isinstance(grad_type, GradMethod):
        return GradFunctor(_as_it_is(grad_type, given))
    if isinstance(grad_type, numbers.Integral) and not isinstance(grad_type, bool):
        _warn_of_no_use(int(grad_type), given, ("hook_ift", "b_solver", "b_solver_kwargs"))
        phantom = PhantomGrad(steps=int(grad_type), tau=tau, sup_gap=int(sup_gap), sup_loc=loc)
        return GradFunctor(phantom)
    if grad_type == "ift":
        _warn_of_no_use("ift", given, ("sup_gap", "sup_loc", "tau"))
        solver = as_solver(IFT().solver if b_solver is None else b_solver, **b_solver_kwargs)
        return GradFunctor(IFT(solver=solver, hook=hook_ift, **options))
    if isinstance(grad_type, str) and grad_type in GRADS:
        _warn_of_no_use(grad_type, given, ("hook_ift",))
        options |= {name: given[name] for name in ("tau", "sup_gap", "sup_loc") if name in given}
    return GradFunctor(_with_solver(as_grad(grad_type, **options), b_solver, b_solver_kwargs))


_NEUTRAL: dict[str, Any] = {
    "hook_ift": False,
    "b_solver": None,
    "b_solver_kwargs": {},
    "sup_gap": -1,
    "sup_loc": (),
    "tau": 1.0,
}


def _checked_options(b_solver_kwargs: Mapping[str, Any] | None) -> Mapping[str, Any]:
    if b_solver_kwargs is None:
        return {}
    if not isinstance(b_solver_kwargs, Mapping):
        raise TypeError(
            f"backward_factory(b_solver_kwargs={b_solver_kwargs!r}): expected a mapping of option names of the "
            f"adjoint solver to values, such as {{'max_iter': 50}}."
        )
    return b_solver_kwargs


def _as_it_is(method: GradMethod, given: Mapping[str, Any]) -> GradMethod:
    """The method, beside which no options may be given."""
    if given:
        options = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise TypeError(
            f"backward_factory({method!r}, {options}): a GradMethod has its options already, and these would change "
            f"nothing. Set them on the method, as in {type(method).__name__}(…); or give its name or, for a phantom "
            f"gradient, its number of steps."
        )
    return method


def _forward_solver(
    method: GradMethod, b_solver: str | Solver | Callable[..., Any] | None, b_solver_kwargs: Mapping[str, Any]
) -> SolverLoop | None:
    """What a method that makes the forward solve runs."""
    if b_solver is not None:
        solver = as_solver(b_solver, **b_solver_kwargs)
        return solver if isinstance(method, SHINE) else solver.replace(return_final=True)
    if isinstance(method, Unroll):
        full = method.last is None or b_solver_kwargs
        return SimpleFixedPointIteration().replace(**b_solver_kwargs) if full else None
    raise TypeError(
        f"backward_factory: {method!r} needs the forward solve, and a functor gets a solved state alone. Use "
        f"torchdeq.DEQ(solver, grad={method!r}), which runs both; or give the solver as b_solver=…, which then begins "
        f"at z_pred."
    )


def _warn_of_no_use(grad_type: Any, given: Mapping[str, Any], names: Sequence[str]) -> None:
    """0.1.0 ignored what a method has no use for, and so may programs that pass everything."""
    idle = [name for name in names if name in given]
    if idle:
        warnings.warn(
            f"backward_factory({grad_type!r}) ignores {' and '.join(idle)}: {_WHY[idle[0]]}",
            UserWarning,
            stacklevel=3,
        )


_ADJOINT = "only a method that solves an adjoint system, such as 'ift', has a use for it."
_PHANTOM = "it is for the steps of a phantom gradient; this method returns one state, the solution."
_WHY = {
    "hook_ift": "only 'ift' has a hook.",
    "b_solver": _ADJOINT,
    "b_solver_kwargs": _ADJOINT,
    "sup_gap": _PHANTOM,
    "sup_loc": _PHANTOM,
    "tau": _PHANTOM,
}


def _with_solver(
    method: GradMethod, b_solver: str | Solver | Callable[..., Any] | None, b_solver_kwargs: Mapping[str, Any]
) -> GradMethod:
    """The method with this solver of its own; with its own one under these options if none is given."""
    if b_solver is None and not b_solver_kwargs:
        return method
    inner = getattr(method, "solver", None)
    if inner is None:
        raise TypeError(
            f"{method!r} has no solver of an adjoint system, got b_solver={b_solver!r} and "
            f"b_solver_kwargs={dict(b_solver_kwargs)!r}. Leave them out, or use grad_type='ift'."
        )
    return method.replace(solver=as_solver(b_solver or inner, **b_solver_kwargs))


def _options_of(grad_type: str | int | GradMethod) -> set[str]:
    """What a method that is given by its name takes beyond the parameters of `backward_factory`."""
    if not isinstance(grad_type, str) or grad_type not in GRADS:
        return set()
    return {f.name for f in dataclasses.fields(as_grad(grad_type))} - {"solver", "hook"}
