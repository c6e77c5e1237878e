"""jaxopt and optimistix in a process of their own: takes training steps when it is told to.

Run by `jax_peer.py`, which says how many threads it may have, with the Python of an environment that has them; there is
no torch in it. It reads one JSON object
a line from standard input and answers each by one on standard output:

    {"do": "hello"}                                       -> {"versions": {…}, "settings": {name: description}}
    {"do": "prepare", "file": PATH}                       -> {}            the arrays w, u, x, b of a `layers.Step`
    {"do": "step", "setting": S, "tol": t, "b_tol": t, "file": PATH}  -> {"iterations": n}; writes z and c_grad
    {"do": "time", "setting": S, "tol": t, "b_tol": t, "repeat": n}   -> {"seconds": [wall, …], "cpu": [processor, …]}

An answer {"error": reason} says that it could not. The tolerances of a setting are arguments of its compiled step, so
that looking for the right ones compiles nothing.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jaxopt
import lineax
import numpy as np
import optimistix
from jaxopt import linear_solve

MOST = 200  # iterations

#: solve(z0, (W, c), tol, b_tol) -> z, iterations
Solve = Callable[..., tuple[jax.Array, jax.Array]]


def f(z: jax.Array, parameters: tuple[jax.Array, jax.Array]) -> jax.Array:
    """tanh(W z + c), of which every library here takes the whole batch as one system."""
    w, c = parameters
    return jnp.tanh(z @ w.T + c)


def with_jaxopt(kind: Any, linear: Callable[..., Any], **options: Any) -> Solve:
    root = kind is jaxopt.Broyden

    def solve(z0: jax.Array, parameters: Any, tol: Any, b_tol: Any) -> tuple[jax.Array, jax.Array]:
        map_ = (lambda z, p: f(z, p) - z) if root else f
        backward = functools.partial(linear, tol=b_tol)
        solver = kind(map_, tol=tol, maxiter=MOST, implicit_diff_solve=backward, **options)
        found = solver.run(z0, parameters)
        return found.params, found.state.iter_num

    return solve


def with_optimistix(forward: Callable[..., Any], linear: Callable[..., Any]) -> Solve:
    def solve(z0: jax.Array, parameters: Any, tol: Any, b_tol: Any) -> tuple[jax.Array, jax.Array]:
        # A cotangent of the mean square is as small as 1 / (B D), and so must be what is absolute.
        adjoint = optimistix.ImplicitAdjoint(linear(rtol=b_tol, atol=b_tol / z0.size))
        solver = forward(rtol=tol, atol=tol)
        found = optimistix.fixed_point(
            f, solver, z0, parameters, adjoint=adjoint, max_steps=MOST, throw=False
        )
        return found.value, found.stats["num_steps"]

    return solve


def _normal_cg(**tolerances: Any) -> Any:
    return lineax.Normal(lineax.CG(**tolerances))


def _newton(**tolerances: Any) -> Any:
    return optimistix.Newton(**tolerances, linear_solver=lineax.GMRES(rtol=0.1, atol=1e-6))


# It ends within a cycle of 20 steps when it is there; jax's default, "batched", does not.
_gmres = functools.partial(linear_solve.solve_gmres, solve_method="incremental")
_ANDERSON = {"history_size": 5, "ridge": 1e-10}
_BROYDEN = {"stepsize": 1.0, "history_size": 50}

#: By name: the solver, and how it is set up beyond tolerances and the number of iterations.
SETTINGS: dict[str, tuple[Solve, str]] = {
    "jaxopt FPI, normal CG": (
        with_jaxopt(jaxopt.FixedPointIteration, linear_solve.solve_normal_cg),
        "`FixedPointIteration()`, as shipped",
    ),
    "jaxopt FPI, GMRES": (
        with_jaxopt(jaxopt.FixedPointIteration, _gmres),
        "`FixedPointIteration(implicit_diff_solve=solve_gmres)`, incremental",
    ),
    "jaxopt FPI, BiCGSTAB": (
        with_jaxopt(jaxopt.FixedPointIteration, linear_solve.solve_bicgstab),
        "`FixedPointIteration(implicit_diff_solve=solve_bicgstab)`",
    ),
    "jaxopt Anderson, GMRES": (
        with_jaxopt(jaxopt.AndersonAcceleration, _gmres, **_ANDERSON),
        "`AndersonAcceleration(ridge=1e-10, implicit_diff_solve=solve_gmres)`, incremental",
    ),
    "jaxopt Anderson, BiCGSTAB": (
        with_jaxopt(jaxopt.AndersonAcceleration, linear_solve.solve_bicgstab, **_ANDERSON),
        "`AndersonAcceleration(ridge=1e-10, implicit_diff_solve=solve_bicgstab)`",
    ),
    "jaxopt Broyden, BiCGSTAB": (
        with_jaxopt(jaxopt.Broyden, linear_solve.solve_bicgstab, **_BROYDEN),
        "`Broyden(stepsize=1.0, history_size=50, implicit_diff_solve=solve_bicgstab)`; with its line search, which is "
        "the default, it does not arrive",
    ),
    "optimistix FPI, GMRES": (
        with_optimistix(optimistix.FixedPointIteration, lineax.GMRES),
        "`FixedPointIteration()`, `ImplicitAdjoint(GMRES())`",
    ),
    "optimistix FPI, normal CG": (
        with_optimistix(optimistix.FixedPointIteration, _normal_cg),
        "`FixedPointIteration()`, `ImplicitAdjoint(Normal(CG()))`",
    ),
    "optimistix Newton, GMRES": (
        with_optimistix(_newton, lineax.GMRES),
        "`Newton(linear_solver=GMRES(rtol=0.1))`, `ImplicitAdjoint(GMRES())`",
    ),
}


class Worker:
    """Answers requests; keeps the data and the compiled steps of the case that was prepared last."""

    def __init__(self) -> None:
        self.data: dict[str, jax.Array] = {}
        self.steps: dict[str, Any] = {}

    def hello(self) -> dict[str, Any]:
        versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxopt", "optimistix")}
        return {"versions": versions, "settings": {name: text for name, (_, text) in SETTINGS.items()}}

    def prepare(self, file: str) -> dict[str, Any]:
        with np.load(file) as arrays:
            self.data = {name: jnp.asarray(arrays[name]) for name in ("w", "u", "x", "b")}
        self.steps = {}
        return {}

    def step(self, setting: str, tol: float, b_tol: float, file: str) -> dict[str, Any]:
        ((_, (z, iterations)), grads) = self._run(setting, tol, b_tol)
        np.savez(file, z=np.asarray(z), c_grad=np.asarray(grads[3]))
        return {"iterations": int(iterations)}

    def time(self, setting: str, tol: float, b_tol: float, repeat: int) -> dict[str, Any]:
        seconds, processor = [], []
        for _ in range(repeat):
            began, spent = time.perf_counter(), time.process_time()
            self._run(setting, tol, b_tol)
            seconds.append(time.perf_counter() - began)
            processor.append(time.process_time() - spent)
        return {"seconds": seconds, "cpu": processor}

    def _run(self, setting: str, tol: float, b_tol: float) -> Any:
        if setting not in self.steps:
            self.steps[setting] = self._compiled(SETTINGS[setting][0])
        arrays = (self.data[name] for name in ("w", "u", "b", "x"))
        return jax.block_until_ready(self.steps[setting](*arrays, jnp.float32(tol), jnp.float32(b_tol)))

    @staticmethod
    def _compiled(solve: Solve) -> Any:
        def loss(trained: Any, x: jax.Array, tol: Any, b_tol: Any) -> tuple[jax.Array, Any]:
            w, u, b, extra = trained
            z, iterations = solve(jnp.zeros_like(x), (w, x @ u.T + b + extra), tol, b_tol)
            return jnp.mean(z**2), (z, iterations)

        def step(w: jax.Array, u: jax.Array, b: jax.Array, x: jax.Array, tol: Any, b_tol: Any) -> Any:
            # `extra` is zero and gets the gradient by U x + b, which is there anyway, as a result.
            trained = (w, u, b, jnp.zeros_like(x))
            return jax.value_and_grad(loss, has_aux=True)(trained, x, tol, b_tol)

        return jax.jit(step)


def answers(worker: Worker) -> Iterator[dict[str, Any]]:
    """One answer for each line of standard input."""
    for line in sys.stdin:
        request = json.loads(line)
        try:
            yield getattr(worker, request.pop("do"))(**request)
        except Exception as error:  # a solver that breaks down is a result too
            yield {"error": f"{type(error).__name__}: {_reason(str(error))}"}


def _reason(text: str) -> str:
    """The line that says it, of errors that come with a traceback inside."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if "Error: " in line or "failure" in line.lower()]
    return (told or lines or ["no reason given"])[-1].partition(". ")[0][:200]


if __name__ == "__main__":
    # Libraries may print; the channel is ours alone.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for answer in answers(Worker()):
        print(json.dumps(answer), file=channel, flush=True)
