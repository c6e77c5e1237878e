"""Other libraries behind one form: torchdeq 0.1.0, jaxopt and SciPy. None is needed; what is missing is named.

A forward method is a function of a `Problem`, which returns the curve of `record.curves_of`. An adjoint method is a
function of an `Adjoint` and the levels, which returns a count for each. Settings are stated in `Method.setting`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import math
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from problems import Adjoint, Problem
from record import Enough, Record, count, curves_of, worst

CACHE = Path(__file__).parent / ".cache"
SLACK = 1.001  # of a residual that a peer has found to be at the level by an estimate of its own
WHEEL = "torchdeq-0.1.0-py3-none-any.whl"
# What is raised where a peer cannot be had.
UNREACHABLE = (ImportError, OSError, subprocess.SubprocessError)
# What a solver may raise when it breaks down. What it had reached before counts.
BREAKDOWNS = (Enough, ValueError, ArithmeticError, RuntimeError, torch.linalg.LinAlgError)


@dataclass(frozen=True)
class Method:
    """A solver in one setting. `group` is 'ours', 'as shipped' or 'tuned'."""

    name: str
    setting: str
    group: str
    run: Callable[..., Any]


@dataclass(frozen=True)
class Peers:
    """What was found: methods for both tables, versions, and why something is missing."""

    forward: list[Method]
    adjoint: list[Method]
    versions: dict[str, str]
    missing: list[str]


def find_peers(paths: Sequence[Path], goal: float) -> Peers:
    """Look for peers, in `paths` first.

    Arguments:
        paths: a wheel of torchdeq 0.1.0, or folders with installed packages.
        goal: the smallest residual that is asked for in a forward solve.
    """
    sys.path[:0] = [str(path) for path in paths if path.is_dir()]
    wheels = [path for path in paths if path.suffix == ".whl"]
    found = Peers([], [], {}, [])
    for name, load in {
        "torchdeq 0.1.0": lambda: _torchdeq_methods(goal, wheels),
        "jaxopt": lambda: _jaxopt_methods(goal),
        "scipy": lambda: _scipy_methods(goal),
    }.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # jaxopt's, that it is no longer maintained
                forward, adjoint, versions = load()
        except UNREACHABLE as error:
            found.missing.append(f"{name}: skipped, {error}")
            continue
        found.forward.extend(forward)
        found.adjoint.extend(adjoint)
        found.versions.update(versions)
    return found


def version(package: str) -> str:
    return importlib.metadata.version(package)


# torchdeq 0.1.0 -------------------------------------------------------------------------------------------------------


def _torchdeq_methods(
    goal: float, wheels: Sequence[Path]
) -> tuple[list[Method], list[Method], dict[str, str]]:
    solver = old_torchdeq(wheels).solver

    def method(name: str, group: str, **options: Any) -> tuple[Method, Method]:
        solve = functools.partial(getattr(solver, name), tol=0.0, **options)
        setting = f"`{name}({', '.join(f'{k}={v}' for k, v in options.items())})`"
        short = f"0.1.0 {name.split('_')[0]}"
        return (
            Method(short, setting, group, functools.partial(_old_forward, solve, goal)),
            Method(short, setting, group, functools.partial(_old_adjoint, solve)),
        )

    pairs = [
        method("anderson_solver", "as shipped"),
        method("broyden_solver", "as shipped"),
        method("fixed_point_iter", "as shipped"),
        method("anderson_solver", "tuned", lam=1e-8),
    ]
    forward, adjoint = zip(*pairs, strict=True)
    return list(forward), [m for m in adjoint if "fixed" not in m.name], {"torchdeq (peer)": "0.1.0"}


def old_torchdeq(wheels: Sequence[Path]) -> ModuleType:
    """torchdeq 0.1.0, as the package torchdeq_peer; its modules import relatively, so that works."""
    home = CACHE / "torchdeq_peer"
    if not home.is_dir():
        CACHE.mkdir(exist_ok=True)
        if not wheels:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(CACHE)]
            subprocess.run([*pip, "torchdeq==0.1.0"], check=True, capture_output=True, timeout=120)
        with (
            zipfile.ZipFile(wheels[0] if wheels else CACHE / WHEEL) as archive,
            tempfile.TemporaryDirectory(dir=CACHE) as unpacked,
        ):
            archive.extractall(unpacked)
            Path(unpacked, "torchdeq").rename(home)
    if str(CACHE) not in sys.path:
        sys.path.append(str(CACHE))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its docstrings have invalid escapes
        return importlib.import_module("torchdeq_peer")


def _quietly(run: Callable[[], Any]) -> Any:
    """What `run` returns; None if it breaks down or is interrupted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return run()
        except BREAKDOWNS:
            return None


def _old_forward(solve: Callable[..., Any], goal: float, problem: Problem) -> Tensor:
    record = Record(problem.f, cap=problem.cap, goal=goal, interrupt=True)
    _quietly(lambda: solve(record, problem.z0, max_iter=problem.cap))
    return curves_of([record.best])


def _old_adjoint(solve: Callable[..., Any], problem: Adjoint, levels: Sequence[float]) -> list[float]:
    """From 0, as it does in its own backward pass."""
    record = Record(
        lambda u: problem.vjp(u) + problem.g, cap=problem.cap, goal=levels[-1], scale=1.0, interrupt=True
    )
    _quietly(lambda: solve(record, torch.zeros_like(problem.g), max_iter=problem.cap))
    curve = worst(curves_of([record.best]))
    return [count(curve, level) for level in levels]


# jaxopt ---------------------------------------------------------------------------------------------------------------


def _jaxopt_methods(goal: float) -> tuple[list[Method], list[Method], dict[str, str]]:
    import jax
    import jaxopt

    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_cpu_enable_async_dispatch", False)

    def method(name: str, group: str, **options: Any) -> Method:
        setting = f"`jaxopt.{name}({', '.join(f'{k}={v}' for k, v in options.items())})`"
        short = "jaxopt Anderson" if "Anderson" in name else "jaxopt FPI"
        return Method(short, setting, group, _Jaxopt(getattr(jaxopt, name), goal, options))

    forward = [
        method("AndersonAcceleration", "as shipped"),
        method("FixedPointIteration", "as shipped"),
        method("AndersonAcceleration", "tuned", ridge=1e-10),
    ]
    return forward, [], {name: version(name) for name in ("jax", "jaxopt")}


class _Jaxopt:
    """A jaxopt solver on all samples of a batch at once, each with its own coefficients, by `jax.vmap`.

    f stays in torch and is called back. The state is float64 in any case. The call of f in `init_state`, whose value is
    not used, does not count.
    """

    def __init__(self, kind: Callable[..., Any], goal: float, options: dict[str, Any]):
        import jax

        self.goal, self.record = goal, None
        solver = kind(fixed_point_fun=self._f, implicit_diff=False, jit=False, **options)
        self.init = jax.jit(jax.vmap(solver.init_state))
        self.update = jax.jit(jax.vmap(solver.update))

    def _f(self, z: Any) -> Any:
        import jax

        return jax.pure_callback(
            self._call, jax.ShapeDtypeStruct(z.shape, z.dtype), z, vmap_method="broadcast_all"
        )

    def _call(self, z: Any) -> Any:
        import numpy as np

        state = torch.from_numpy(np.array(z)).to(self.dtype)
        return self.record(state).double().numpy()

    def __call__(self, problem: Problem) -> Tensor:
        self.record = Record(problem.f, cap=problem.cap, goal=self.goal)
        self.dtype = problem.x.dtype
        z = problem.z0.double().numpy()
        state = self.init(z)
        self.record.clear()
        while not (self.record.residuals and self.record.enough):
            z, state = self.update(z, state)
        return curves_of([self.record.best])


# SciPy ----------------------------------------------------------------------------------------------------------------


def _scipy_methods(goal: float) -> tuple[list[Method], list[Method], dict[str, str]]:
    importlib.import_module("scipy.optimize")

    def root(name: str, group: str, picard: bool = False, **options: Any) -> Method:
        given = "".join(f", {key}={value}" for key, value in options.items())
        setting = f"`scipy.optimize.root(method={name!r}{given})`" + " from f(0)" * picard
        run = functools.partial(_scipy_forward, name, options, picard, goal)
        return Method(f"scipy {name}", setting, group, run)

    def linear(name: str, group: str, **options: Any) -> Method:
        setting = f"`scipy.sparse.linalg.{name}({', '.join(f'{k}={v}' for k, v in options.items())})`"
        return Method(f"scipy {name}", setting, group, functools.partial(_scipy_adjoint, name, options))

    forward = [
        *(root(name, "as shipped") for name in ("anderson", "broyden1", "broyden2", "krylov", "df-sane")),
        root("anderson", "tuned", line_search=None, jac_options={"alpha": 1, "M": 10}),
        root("broyden1", "tuned", line_search=None, jac_options={"alpha": 1}),
        root("broyden2", "tuned", line_search=None, jac_options={"alpha": 1}),
        root("krylov", "tuned", picard=True, jac_options={"method": "gmres", "inner_rtol": 0.5}),
    ]
    adjoint = [
        *(linear(name, "as shipped") for name in ("gmres", "bicgstab", "lgmres")),
        linear("gmres", "tuned", restart=200),
    ]
    return forward, adjoint, {"scipy": version("scipy")}


def _scipy_forward(
    method: str, options: dict[str, Any], picard: bool, goal: float, problem: Problem
) -> Tensor:
    """Each sample is solved on its own, in the dtype of f, from 0 or after one step of Picard's.

    The equation is f(z) − z = 0, so that with alpha=1 the first step is Picard's; for df-sane, whose first step is −F,
    it is z − f(z) = 0.
    """
    from scipy.optimize import root

    sign = -1 if method == "df-sane" else 1
    stop = {"maxfev": 10**6, "ftol": 0.0} if method == "df-sane" else {"maxiter": 10**6, "fatol": 0.0}

    def solve(one: Problem) -> Tensor:
        record = Record(one.f, cap=one.cap, goal=goal, interrupt=True)

        def equation(z: Any) -> Any:
            state = torch.from_numpy(z).view(one.x.shape)
            return (sign * (record(state) - state)).flatten().numpy()

        def run() -> None:
            start = record(one.z0) if picard else one.z0
            root(equation, start.flatten().numpy(), method=method, options={**options, **stop})

        _quietly(run)
        return record.best

    return curves_of([solve(one) for one in problem.samples()])


def _scipy_adjoint(
    name: str, options: dict[str, Any], problem: Adjoint, levels: Sequence[float]
) -> list[float]:
    """Each right-hand side on its own; the largest count. A final product that measures the residual is counted."""
    return [max(_scipy_products(name, options, problem, g, level) for g in problem.g) for level in levels]


def _scipy_products(name: str, options: dict[str, Any], problem: Adjoint, g: Tensor, level: float) -> float:
    import scipy.sparse.linalg

    seen: list[Tensor] = []

    def product(u: Any) -> Any:
        seen.append(torch.from_numpy(u.copy()).flatten())
        if len(seen) > problem.cap:
            raise Enough
        return (seen[-1] - problem.vjp(seen[-1])).numpy()

    operator = scipy.sparse.linalg.LinearOperator((len(g), len(g)), matvec=product, dtype="float64")
    solve = getattr(scipy.sparse.linalg, name)
    found = _quietly(lambda: solve(operator, g.numpy(), rtol=level, atol=0.0, **options))
    if found is None:
        return math.inf
    u = torch.from_numpy(found[0])
    residual = (g + problem.vjp(u) - u).norm()
    measured = bool(seen) and torch.equal(seen[-1], u)
    products = len(seen) + (not measured)
    return products if residual <= level * SLACK and products <= problem.cap else math.inf
