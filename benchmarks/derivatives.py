"""What do exact derivatives cost: of first order, by each form, against the tensor hook; and of second order?

    python benchmarks/derivatives.py [--quick] [--out benchmarks/results]

writes derivatives.md. See README.md here for what is measured and how.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad
from tqdm import trange

from peers import Peers
from report import environment, grid
from torchdeq import DEQ, GMRES, IFT, FixedPointIteration, Multisecant, Solver, Unroll, fixed_point
from torchdeq.grad import GradMethod

TOL = 1e-4
SOLVERS = (Multisecant(tol=TOL, stop_mode="rel"), FixedPointIteration(tol=TOL, stop_mode="rel", max_iter=100))
ADJOINT = GMRES(tol=TOL)


class Problem:
    """f(z) = tanh(z Wᵀ + x), W (n, n) of gain 0.7 and x (B, n), float32; counts its calls."""

    def __init__(self, batch: int, n: int):
        generator = torch.Generator().manual_seed(0)
        self.w = (torch.randn(n, n, generator=generator) * 0.7 / n**0.5).requires_grad_()
        self.x = torch.randn(batch, n, generator=generator).requires_grad_()
        self.v = torch.randn(batch, n, generator=generator)
        self.start = torch.zeros(batch, n)
        self.calls = self.solves = 0

    def f(self, z: Tensor, w: Tensor, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(z @ w.T + x)

    def count(self, solution) -> None:
        self.solves += solution.nfe

    def solved(self, method: GradMethod | None, solver: Solver) -> Callable[[Tensor, Tensor], Tensor]:
        """(W, x) -> z*, by a module with this gradient method, or by `fixed_point`."""
        if method is None:
            return lambda w, x: fixed_point(
                self.f, self.start, w, x, solver=solver, adjoint=ADJOINT, batch_dims=1, on_backward=self.count
            )
        deq = DEQ(solver, method, on_backward=self.count)
        return lambda w, x: deq(lambda z: self.f(z, w, x), self.start)[0]


def gradient(problem: Problem, solve: Callable[[Tensor, Tensor], Tensor]) -> Sequence[Tensor]:
    """Of the mean square, with respect to W and x."""
    loss = solve(problem.w, problem.x).square().mean()
    return torch.autograd.grad(loss, (problem.w, problem.x))


def twice(problem: Problem, solve: Callable[[Tensor, Tensor], Tensor]) -> Sequence[Tensor]:
    """The gradient of ½‖∂L/∂x‖², as a penalty on it in training would take: reverse over reverse."""
    loss = solve(problem.w, problem.x).square().sum()
    (g,) = torch.autograd.grad(loss, problem.x, create_graph=True)
    return torch.autograd.grad(g.square().sum() / 2, (problem.w, problem.x))


def along(problem: Problem, solve: Callable[[Tensor, Tensor], Tensor]) -> Sequence[Tensor]:
    """The derivative of the gradient along a direction of x: forward over reverse."""
    with forward_ad.dual_level():
        loss = solve(problem.w, forward_ad.make_dual(problem.x, problem.v)).square().sum()
        grads = torch.autograd.grad(loss, (problem.w, problem.x), create_graph=True)
        return [forward_ad.unpack_dual(g).tangent for g in grads]


@dataclass
class Row:
    """A form of the derivative, and what a step with it took."""

    name: str
    step: Callable[[], Sequence[Tensor]]
    calls: int = 0  # of f, tracked ones included
    products: int = 0  # with J or Jᵀ, in the linear solves
    seconds: tuple[float, ...] = ()


def measured(problem: Problem, rows: list[Row], repeats: int, title: str) -> list[Row]:
    """The rows, timed in turn, after a step that is counted and not timed."""
    for row in rows:
        problem.calls = problem.solves = 0
        row.step()
        row.calls, row.products = problem.calls, problem.solves
    for _ in trange(repeats, desc=title, leave=False):
        for row in rows:
            began = time.perf_counter()
            row.step()
            row.seconds += (time.perf_counter() - began,)
    return rows


def table(rows: list[Row]) -> list[str]:
    """Times in milliseconds, and their ratio to the first row's of the same round."""

    def cells(row: Row) -> list[str]:
        low, middle, high = statistics.quantiles(row.seconds, n=4)
        ratios = [a / b for a, b in zip(row.seconds, rows[0].seconds, strict=True)]
        r_low, r_middle, r_high = statistics.quantiles(ratios, n=4)
        return [
            row.name,
            str(row.calls),
            str(row.products),
            f"{1e3 * middle:.2f} ({1e3 * low:.2f}–{1e3 * high:.2f})",
            f"{r_middle:.2f} ({r_low:.2f}–{r_high:.2f})",
        ]

    return grid(
        ["form", "calls of f", "products in solves", "ms", "to the first row"], [cells(r) for r in rows]
    )


def forms(
    problem: Problem, take: Callable, methods: dict[str, GradMethod | None], solver: Solver
) -> list[Row]:
    return [
        Row(name, functools.partial(take, problem, problem.solved(method, solver)))
        for name, method in methods.items()
    ]


def run(problem: Problem, repeats: int) -> list[str]:
    """The sections of the report."""
    first = {
        "`IFT(hook=True)`": IFT(solver=ADJOINT, hook=True),
        "`IFT()`": IFT(solver=ADJOINT),
        "`IFT(order=2)`": IFT(solver=ADJOINT, order=2),
        "`IFT(order=3)`": IFT(solver=ADJOINT, order=3),
        "`fixed_point`": None,
    }
    second = {"`IFT(order=2)`": IFT(solver=ADJOINT, order=2), "`fixed_point`": None}
    lines = []
    for solver in SOLVERS:
        lines += ["", f"## A first derivative, `{solver!r}`", ""]
        lines += table(measured(problem, forms(problem, gradient, first, solver), repeats, "first"))
    picard = SOLVERS[1]
    lines += ["", f"## The gradient of a squared gradient, `{picard!r}`", ""]
    rows = forms(problem, twice, {**second, "`Unroll()`": Unroll()}, picard)
    lines += table(measured(problem, rows, repeats, "second"))
    lines += ["", f"## The tangent of a gradient, `{picard!r}`", ""]
    rows = forms(problem, along, {"`IFT()`": IFT(solver=ADJOINT), **second, "`Unroll()`": Unroll()}, picard)
    lines += table(measured(problem, rows, repeats, "forward over reverse"))
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tiny map: a test that it runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="where to write")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    problem, repeats = (Problem(2, 8), 2) if args.quick else (Problem(64, 256), 60)
    where = environment(Peers([], [], {}, []))  # before the run, for the code that is loaded
    sections = run(problem, repeats)
    batch, n = problem.x.shape
    lines = [
        "# What exact derivatives cost",
        "",
        "Written by `benchmarks/derivatives.py`; `benchmarks/README.md` says what is measured.",
        "",
        *where,
        f"- state {batch} × {n}, float32, adjoint `{ADJOINT!r}`",
        f"- median and quartiles of {repeats} steps, the forms taking turns; a ratio is that of two steps of one turn",
        *sections,
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "derivatives.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
