"""Solvers in torchdeq 0.1.0's call form: `z, states, info = anderson_solver(f, x0, …)`.

Translation only: each builds the solver object, runs it, and returns its `Solution` as 0.1.0 did.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchdeq._state import Layout, Map, Tree, layout_of
from torchdeq.solution import Solution, Status
from torchdeq.solver import anderson, broyden, fp_iter
from torchdeq.solver.anderson import Anderson
from torchdeq.solver.base import (
    Solver,
    SolverLoop,
    checked_record,
    flatten_map,
    layout_of_map,
    start_of,
    unravel_solution,
)
from torchdeq.solver.broyden import Broyden
from torchdeq.solver.fp_iter import FixedPointIteration, SimpleFixedPointIteration
from torchdeq.solver.registry import as_solver, look_up
from torchdeq.solver.stat import SolverStat

Result = tuple[Tree, list[Tree], SolverStat]
StateMap = Callable[[Tree], Tree]


def _run(solver: SolverLoop, func: StateMap, x0: Tree, indexing: Sequence[int] | None) -> Result:
    solution = solver(func, x0, record=indexing or ())
    return solution.z, solution.states, SolverStat.from_solution(solution)


def anderson_solver(
    func: StateMap,
    x0: Tree,
    max_iter: int = 50,
    tol: float = 1e-3,
    stop_mode: str = "abs",
    indexing: Sequence[int] | None = None,
    m: int = 6,
    lam: float = 1e-4,
    tau: float = 1.0,
    return_final: bool = False,
    **kwargs: Any,
) -> Result:
    """`Anderson`, in 0.1.0's call form.

    Arguments:
        func: the map f.
        x0: the start, (B, …) or a pytree of such tensors.
        max_iter, tol, stop_mode, return_final: see `Solver`.
        indexing: evaluations after which to sample the best state so far.
        m, lam, tau: see `Anderson`. lam is relative here, where 0.1.0's was absolute.
        **kwargs: hyperparameters under another name of theirs; unknown ones raise a TypeError.

    Returns:
        The best state; the sampled states; a `SolverStat`.

    Example:
        >>> import torch
        >>> z, states, info = anderson_solver(torch.cos, torch.zeros(1, 1), indexing=[2, 4])
        >>> len(states), bool(info['abs_lowest'] < 1e-3)
        (2, True)
    """
    solver = as_solver(
        Anderson(),
        max_iter=max_iter,
        tol=tol,
        stop_mode=stop_mode,
        m=m,
        lam=lam,
        tau=tau,
        return_final=return_final,
        **kwargs,
    )
    return _run(solver, func, x0, indexing)


def broyden_solver(
    func: StateMap,
    x0: Tree,
    max_iter: int = 50,
    tol: float = 1e-3,
    stop_mode: str = "abs",
    indexing: Sequence[int] | None = None,
    LBFGS_thres: int | None = None,
    ls: bool = False,
    return_final: bool = False,
    **kwargs: Any,
) -> Result:
    """`Broyden`, in 0.1.0's call form.

    Arguments:
        func, x0, max_iter, tol, stop_mode, indexing, return_final: see `anderson_solver`.
        LBFGS_thres: `Broyden.m`, the memory limit.
        ls: `Broyden.ls`, the line search.
        **kwargs: as in `anderson_solver`.

    Returns:
        The best state; the sampled states; a `SolverStat`.

    Example:
        >>> import torch
        >>> z, _, info = broyden_solver(torch.cos, torch.zeros(2, 1), tol=1e-5)
        >>> bool((info['abs_lowest'] < 1e-5).all())
        True
    """
    solver = as_solver(
        Broyden(),
        max_iter=max_iter,
        tol=tol,
        stop_mode=stop_mode,
        m=LBFGS_thres,
        ls=ls,
        return_final=return_final,
        **kwargs,
    )
    return _run(solver, func, x0, indexing)


def fixed_point_iter(
    func: StateMap,
    x0: Tree,
    max_iter: int = 50,
    tol: float = 1e-3,
    stop_mode: str = "abs",
    indexing: Sequence[int] | None = None,
    tau: float = 1.0,
    return_final: bool = False,
    **kwargs: Any,
) -> Result:
    """`FixedPointIteration`, in 0.1.0's call form.

    Arguments:
        func, x0, max_iter, tol, stop_mode, indexing, return_final: see `anderson_solver`.
        tau: the damping.
        **kwargs: as in `anderson_solver`.

    Returns:
        The best state; the sampled states; a `SolverStat`.

    Example:
        >>> import torch
        >>> z, _, info = fixed_point_iter(torch.cos, torch.zeros(()))
        >>> z.shape, info['abs_lowest'].shape
        (torch.Size([]), torch.Size([1]))
    """
    solver = as_solver(
        FixedPointIteration(),
        max_iter=max_iter,
        tol=tol,
        stop_mode=stop_mode,
        tau=tau,
        return_final=return_final,
        **kwargs,
    )
    return _run(solver, func, x0, indexing)


def simple_fixed_point_iter(
    func: StateMap,
    x0: Tree,
    max_iter: int = 50,
    tau: float = 1.0,
    indexing: Sequence[int] | None = None,
    **kwargs: Any,
) -> Result:
    """`max_iter` steps of damped Picard iteration and nothing else, in 0.1.0's call form.

    Unlike the other forms it returns the last image, f applied `max_iter` times (with τ = 1), and under
    grad mode it keeps the graph of all steps, as in 0.1.0. `info` describes the iterate before it.

    Arguments:
        func, x0, max_iter: see `anderson_solver`.
        tau: the damping.
        indexing: steps to sample.
        **kwargs: tol and stop_mode are accepted and change only `info['converged']`.

    Returns:
        The last state; the sampled states; a `SolverStat`.

    Example:
        >>> import torch
        >>> z, states, _ = simple_fixed_point_iter(lambda z: z / 2, torch.ones(1, 1), max_iter=3, indexing=[1])
        >>> z, states
        (tensor([[0.1250]]), [tensor([[0.5000]])])
    """
    solver = as_solver(SimpleSteps(), max_iter=max_iter, tau=tau, **kwargs)
    layout = layout_of(x0)
    start = layout.ravel(x0, source="x0")
    solution = unravel_solution(solver.run(flatten_map(func, layout), start, record=indexing or ()), layout)
    return solution.z, solution.states, SolverStat.from_solution(solution)


@dataclass(frozen=True, kw_only=True, repr=False)
class SimpleSteps(SimpleFixedPointIteration):
    """Simple iteration as in 0.1.0: `max_iter` steps, and the state after the last of them.

    The other solvers return an iterate whose residual they know. Programs for 0.1.0 run this one for a fixed number
    of steps, and expect f applied so many times. The residual is that of the iterate before, as it was there.

    Example:
        >>> import torch
        >>> SimpleSteps(max_iter=3).run(lambda z: z / 2, torch.ones(1, 1), record=[1]).z
        tensor([[0.1250]])
    """

    def run(
        self,
        f: Map,
        z0: Tensor | None = None,
        *,
        record: Sequence[int] = (),
        layout: Layout | None = None,
        together: bool = True,
    ) -> Solution:
        """See `SolverLoop.run`; `record` counts steps."""
        steps = checked_record(record, self.max_iter)
        images: dict[int, Tensor] = {}
        last, count = start_of(f) if z0 is None else z0, 0

        def watched(z: Tensor) -> Tensor:
            """f, noting the step it leads to: the loop's own record is of iterates it has measured."""
            nonlocal last, count
            fz = f(z)
            last, count = self.step(f, z, fz, None)[0], count + 1
            if count in steps:
                images[count] = last
            return fz

        solution = super().run(watched, z0, layout=layout or layout_of_map(f), together=together)
        failed = (solution.status == Status.NON_FINITE)[:, None]
        return dataclasses.replace(
            solution, z=torch.where(failed, solution.z, last), states=[images[k] for k in steps]
        )


@dataclass(frozen=True)
class SolverFunction:
    """A registered solver in 0.1.0's call form; what `get_solver` gives for names that 0.1.0 did not have.

    Example:
        >>> import torch
        >>> z, _, info = SolverFunction('fixed_point_iter')(torch.cos, torch.zeros(1, 1), tol=1e-4)
        >>> bool(info['converged'])
        True
    """

    name: str

    @property
    def __name__(self) -> str:
        """As a function has one."""
        return self.name

    @property
    def solver_class(self) -> Any:
        """The registry's entry."""
        return look_up(self.name)

    def __call__(
        self, func: StateMap, x0: Tree, indexing: Sequence[int] | None = None, **options: Any
    ) -> Result:
        """See `anderson_solver`; `options` are the solver's hyperparameters."""
        return _run(as_solver(self.name, **options), func, x0, indexing)


_FUNCTIONS: dict[str, Callable[..., Result]] = {
    "anderson": anderson_solver,
    "broyden": broyden_solver,
    "fixed_point_iter": fixed_point_iter,
    "simple_fixed_point_iter": simple_fixed_point_iter,
}


def get_solver(key: str) -> Callable[..., Result]:
    """The solver registered as `key`, in torchdeq 0.1.0's call form.

    `torchdeq.as_solver(key)` gives it as an object instead, and `torchdeq.SOLVERS` lists the names.

    Raises:
        ValueError: there is no such solver; the nearest name is given.

    Example:
        >>> get_solver('anderson') is anderson_solver
        True
    """
    registered = look_up(key)
    form = _FUNCTIONS.get(key)
    if form is not None and registered is SOLVER_CLASSES[form]:
        return form
    if not isinstance(registered, SolverLoop) and not isinstance(registered, type):
        return registered  # registered as a function of this form
    return SolverFunction(key)


#: Which solver each function stands for, so that a function of ours given as `b_solver` becomes an object.
SOLVER_CLASSES: dict[Callable[..., Any], type[Solver]] = {
    anderson_solver: Anderson,
    broyden_solver: Broyden,
    fixed_point_iter: FixedPointIteration,
    simple_fixed_point_iter: SimpleFixedPointIteration,
}
for _form, _class in SOLVER_CLASSES.items():
    _form.solver_class = _class  # type: ignore[attr-defined]

# 0.1.0 had each function in the module of its method, and programs import it from there.
for _module, _form in (
    (anderson, anderson_solver),
    (broyden, broyden_solver),
    (fp_iter, fixed_point_iter),
    (fp_iter, simple_fixed_point_iter),
):
    setattr(_module, _form.__name__, _form)
