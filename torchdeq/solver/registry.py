"""The names of solvers, and how a name, an object or a 0.1.0-style function becomes a `Solver`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchdeq._suggest import did_you_mean
from torchdeq.solution import Solution
from torchdeq.solver.anderson import Anderson
from torchdeq.solver.base import Solver, SolverLoop, start_of
from torchdeq.solver.bicgstab import BiCGSTAB
from torchdeq.solver.broyden import Broyden
from torchdeq.solver.cg import CG, CGNR
from torchdeq.solver.fp_iter import FixedPointIteration, SimpleFixedPointIteration
from torchdeq.solver.gmres import GMRES
from torchdeq.solver.maps import Tally
from torchdeq.solver.multisecant import Multisecant
from torchdeq.solver.neumann import Neumann
from torchdeq.solver.newton_krylov import NewtonKrylov
from torchdeq.solver.rre import RRE
from torchdeq.solver.squarem import SQUAREM

#: Registered solvers by name. Tests, the command line and the benchmarks read this table.
SOLVERS: dict[str, type[SolverLoop] | SolverLoop | Callable[..., Any]] = {
    "anderson": Anderson,
    "broyden": Broyden,
    "multisecant": Multisecant,
    "newton_krylov": NewtonKrylov,
    "squarem": SQUAREM,
    "rre": RRE,
    "fixed_point_iter": FixedPointIteration,
    "simple_fixed_point_iter": SimpleFixedPointIteration,
    "gmres": GMRES,
    "bicgstab": BiCGSTAB,
    "cg": CG,
    "cgnr": CGNR,
    "neumann": Neumann,
}

#: Hyperparameters under their 0.1.0 names.
_OLD_NAMES = {"LBFGS_thres": "m"}

#: Solvers without a name: they do not take any f, or need others. How to write one, and what it is for.
_OBJECTS = {
    "peacemanrachford": ("PeacemanRachford()", "monotone maps, as of MonotoneLinear"),
    "forwardbackward": ("ForwardBackward()", "monotone maps, as of MonotoneLinear"),
    "newtoncg": ("NewtonCG()", "minima"),
    "fallback": ("Fallback(Multisecant(), NewtonKrylov())", "trying several solvers in turn"),
}


@dataclass(frozen=True, kw_only=True, repr=False)
class FunctionSolver(Solver):
    """A solver given as a function of torchdeq 0.1.0's form.

    The function is called as `function(f, x0, max_iter=…, tol=…, stop_mode=…, **options)`, with `indexing=…` where
    states are to be sampled, and returns `(z, sampled states, info)`. As in 0.1.0 a state of one tensor keeps its
    shape and one of several is a (B, D) tensor. What it returns is measured here with one more evaluation of f, so
    that the residual that is reported is that of the state that is returned.

    Arguments:
        function: the solver function.
        options: further keywords for it.

    Example:
        >>> import torch
        >>> def halve(f, x0, max_iter=50, tol=1e-3, stop_mode='abs', indexing=None, **kwargs):
        ...     for _ in range(max_iter):
        ...         x0 = f(x0)
        ...     return x0, [], {}
        >>> sol = FunctionSolver(function=halve, max_iter=20)(lambda z: z / 2, torch.ones(1, 1))
        >>> sol.converged, sol.nfe
        (tensor([True]), 21)
    """

    function: Callable[..., Any] = field(kw_only=True)
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def replace(self, **options: Any) -> FunctionSolver:
        """As `Solver.replace`; a keyword that is no field is passed on to the function."""
        own = {k: v for k, v in options.items() if k in self.__dataclass_fields__}
        other = {k: v for k, v in options.items() if k not in own}
        return super().replace(**own, options={**self.options, **other} if other else self.options)

    def _loop(self, f: Tally, z0: Tensor | None, record: Sequence[int]) -> Solution:
        start = start_of(f.f) if z0 is None else z0
        shape = start.shape if f.layout is None else f.layout.shape(start)
        asked: dict[str, Any] = {"indexing": list(record)} if record else {}

        def as_it_was(x: Tensor, tau: float = 1.0) -> Tensor:
            """f as 0.1.0's solvers were given it: on the state's own shape, damped if they say so."""
            fx = f(x.reshape(start.shape)).reshape(shape)
            return fx if tau == 1 else tau * fx + (1 - tau) * x

        z, sampled, _ = self.function(
            as_it_was,
            start.reshape(shape),
            max_iter=self.max_iter,
            tol=self.tol,
            stop_mode=self.stop_mode,
            **asked,
            **self.options,
        )
        if z.shape != shape or sampled is None:
            raise ValueError(
                f"{self.function!r} must return (z, sampled states, info) with z of the shape of x0, got "
                f"z of shape {tuple(z.shape)}."
            )
        z, sampled = z.reshape(start.shape), [s.reshape(start.shape) for s in sampled]
        fz = f(z)
        final = self._measured(z, fz, f)
        failed = ~final.measure.isfinite()
        states = [*sampled[: len(record)], *[None] * (len(record) - len(sampled))]
        nstep = torch.full((z.shape[0],), f.calls, dtype=torch.int64, device=z.device)
        return self._solution(final, failed, nstep, f.calls, [(final.size, final.scale)], states)


def register_solver(solver_type: str, solver: type[SolverLoop] | SolverLoop | Callable[..., Any]) -> None:
    """Make a solver known under a name, to `as_solver`, `get_solver`, `b_solver`, `f_solver` and the command line.

    Arguments:
        solver_type: the name.
        solver: a `Solver` or `SolverModule` class, an object of one, or a function of torchdeq 0.1.0's form (see
            `FunctionSolver`).

    Raises:
        TypeError: the name is not a string, or the solver is none of these.

    Example:
        >>> register_solver('damped', FixedPointIteration(tau=0.5))
        >>> as_solver('damped', max_iter=10)
        FixedPointIteration(max_iter=10, tau=0.5)
        >>> _ = SOLVERS.pop('damped')
    """
    if not callable(solver):
        raise TypeError(
            f"register_solver({solver_type!r}, {solver!r}): expected a Solver, a Solver class, or a function of "
            f"torchdeq 0.1.0's form, solver(f, x0, max_iter=…, tol=…, **kwargs), got a {type(solver).__name__}."
        )
    if not isinstance(solver_type, str):
        raise TypeError(
            f"register_solver({solver_type!r}, …): the name must be a string, and comes first: "
            f"register_solver('mine', solver)."
        )
    SOLVERS[solver_type] = solver


def look_up(name: str) -> Any:
    """The entry of the registry called `name`.

    Raises:
        ValueError: there is none; the nearest name is given.
    """
    if name not in SOLVERS:
        if (given := _OBJECTS.get(str(name).lower().replace("_", "").replace("-", ""))) is not None:
            raise ValueError(
                f"the solver {name!r} has no name: it is for {given[1]}, and is given as an object, DEQ({given[0]}) or "
                f"get_deq(f_solver={given[0]}). Registered by name are {', '.join(SOLVERS)}."
            )
        raise ValueError(
            f"there is no solver called {name!r}.{did_you_mean(name, SOLVERS)} Registered are {', '.join(SOLVERS)}; "
            f"register_solver adds to them."
        )
    return SOLVERS[name]


def as_solver(solver: str | SolverLoop | type[SolverLoop] | Callable[..., Any], **options: Any) -> SolverLoop:
    """A `Solver` from a registered name, an object, a class, or a function of 0.1.0's form.

    Arguments:
        solver: what to make a solver of.
        **options: hyperparameters to set, under their own or their 0.1.0 names.

    Raises:
        ValueError: the name is not registered, or a value is out of range.
        TypeError: there is no such hyperparameter. The nearest is named.

    Example:
        >>> as_solver('broyden', LBFGS_thres=10, tol=1e-6)
        Broyden(tol=1e-06, m=10)
    """
    found = look_up(solver) if isinstance(solver, str) else solver
    options = {_OLD_NAMES.get(name, name): value for name, value in options.items()}
    form = getattr(found, "solver_class", None)  # one of the 0.1.0 functions of this library
    if form is not None:
        found = form
    if isinstance(found, type) and issubclass(found, SolverLoop):
        found = found()
    if isinstance(found, SolverLoop):
        return found.replace(**options)
    if not callable(found):
        raise TypeError(f"expected the name of a solver, a Solver or a solver function, got {solver!r}.")
    return FunctionSolver(function=found).replace(**options)
