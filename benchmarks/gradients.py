"""What does each gradient method cost, and how far is its gradient from the exact one, on three trained models?

    python benchmarks/gradients.py [--quick] [--seed N] [--out benchmarks/results]

writes gradients.md and gradients.png. See README.md here for what is measured and how.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from tqdm import tqdm

import models
from models import Task
from peers import Peers
from report import environment, grid
from torchdeq import (
    DEQ,
    GMRES,
    IFT,
    JFB,
    SHINE,
    Broyden,
    ConvergenceWarning,
    CouplingWarning,
    FixedPointIteration,
    GradMethod,
    NeumannPhantom,
    PhantomGrad,
    Reversible,
    SimpleFixedPointIteration,
    Solver,
    TruncatedCycle,
    Unroll,
)
from torchdeq.diagnostics import Candidate, Row, compare_gradients, spectral_radius

TOLERANCES = (1e-2, 1e-4)  # of the forward and the adjoint solve, relative, beside the model's own
EXACT = 1e-10
RATES = (1e-2, 3e-2)  # of the training comparison
TRAINED = (
    "IFT()",
    "JFB()",
    "PhantomGrad(steps=5)",
    "PhantomGrad(steps=5, tau=0.5)",
    "SHINE()",
    "Unroll(last=5)",
    "TruncatedCycle(cycles=10, grad_steps=5)",
)


def methods(solver: Solver) -> list[Candidate]:
    """All methods, for a model whose forward solver is `solver`, with adjoint solves to its tolerance."""
    stop: dict[str, Any] = {"tol": solver.tol, "stop_mode": solver.stop_mode}
    gmres = GMRES(tol=solver.tol)
    broyden = Broyden(max_iter=solver.max_iter, **stop)
    picard = FixedPointIteration(max_iter=400, **stop)

    def method(name: str, grad: GradMethod, own: Solver = solver) -> Candidate:
        return Candidate(name=name, grad=grad, solver=own)

    return [
        method("IFT()", IFT(solver=gmres)),
        method("IFT(hook=True)", IFT(solver=gmres, hook=True)),
        method("IFT(order=2)", IFT(solver=gmres, order=2)),
        method("JFB()", JFB()),
        method("PhantomGrad(steps=5)", PhantomGrad(steps=5)),
        method("PhantomGrad(steps=5, tau=0.5)", PhantomGrad(steps=5, tau=0.5)),
        method("NeumannPhantom(terms=5)", NeumannPhantom(terms=5)),
        method("SHINE()", SHINE()),
        method("SHINE(fallback=math.inf)", SHINE(fallback=math.inf)),
        method("SHINE(), Broyden", SHINE(), broyden),
        method("SHINE(refine=GMRES())", SHINE(refine=gmres)),
        method("SHINE(refine=GMRES()), Broyden", SHINE(refine=gmres), broyden),
        method("Unroll()", Unroll(), picard),
        method("Unroll(checkpoint=True)", Unroll(checkpoint=True), picard),
        method("Unroll(last=5)", Unroll(last=5), picard),
        method("Reversible()", Reversible(dtype=torch.float64), picard.replace(max_iter=43)),
        method(
            "TruncatedCycle(cycles=10, grad_steps=5)",
            TruncatedCycle(grad_steps=5),
            SimpleFixedPointIteration(max_iter=15, **stop),
        ),
    ]


class Counting(DEQ):
    """A layer that counts the calls of f, and the passes back through one."""

    calls = passes = 0

    def forward(self, f: Callable[[Tensor], Tensor], z0: Tensor, **overrides: Any) -> Any:
        def counted(z: Tensor) -> Tensor:
            self.calls += 1
            out = f(z)
            if out.requires_grad:
                out.register_hook(self._note)
            return out

        out = super().forward(counted, z0, **overrides)
        self.f, self.z = f, out[0].detach()
        return out

    def _note(self, _: Tensor) -> None:
        self.passes += 1


class Measured(NamedTuple):
    """A row of a table: what `compare_gradients` says of a method, and what a step of it calls."""

    row: Row
    calls: int
    passes: int

    def cells(self) -> list[str]:
        name, row = f"`{self.row.name}`", self.row
        if row.failure:
            return [name, "failed", *["–"] * 6]
        _, ms, _, _, residual, saved, error, cosine = row.cells()
        return [name, str(self.calls), str(self.passes), ms, saved, residual, error, cosine]


HEAD = ("method", "calls of f", "VJPs", "ms per step", "saved MiB", "residual", "gradient error", "cosine")


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was measured of one model: rows by tolerance, and what it is."""

    task: Task
    tables: dict[float, list[Measured]]
    parameters: int
    accuracy: float
    radius: Tensor


class Trained(NamedTuple):
    """Of one method and learning rate: means over the seeds, and the smallest and largest accuracy."""

    name: str
    lr: float
    loss: float
    accuracy: float
    worst: float
    best: float
    milliseconds: float


def measure(
    task: Task, model: nn.Module, inputs: Any, tol: float, repeats: int, tick: Callable[[], object]
) -> list[Measured]:
    """One table."""
    candidates = methods(task.solver.replace(tol=tol))
    counts = [count(task, model, inputs, c) for c in candidates]
    tick()
    table = compare_gradients(
        model, models.loss_of, *inputs, candidates=candidates, repeats=repeats, exact_tol=EXACT
    )
    tick()
    return [Measured(row, deq.calls, deq.passes) for row, deq in zip(table.rows, counts, strict=True)]


def count(task: Task, model: nn.Module, inputs: Any, candidate: Candidate) -> Counting:
    """A step of the method on a copy of the model, whose layer counts."""
    twin = copy.deepcopy(model)
    twin.deq = Counting(candidate.solver, candidate.grad, batch_dims=task.batch_dims)
    models.loss_of(twin, *inputs).backward()
    return twin.deq


def tolerances(task: Task, quick: bool) -> list[float]:
    return [task.solver.tol] if quick else sorted({task.solver.tol, *TOLERANCES}, reverse=True)


def measure_task(task: Task, seed: int, quick: bool, repeats: int, bar: tqdm) -> Result:
    """Train, then compare at each tolerance."""
    own = task.solver.tol
    bar.set_description(f"{task.name}, training")
    layer = DEQ(task.solver, IFT(solver=GMRES(tol=own)), batch_dims=task.batch_dims)
    model = models.train(task, layer, seed, bar.update)
    _, accuracy = models.score(model, *task.test)
    # Held out: on what it was trained on a gradient may be near zero, and then any error is large beside it.
    inputs = tuple(t[: task.probe] for t in task.test)
    tables = {}
    for tol in tolerances(task, quick):
        bar.set_description(f"{task.name}, {tol:g}")
        tables[tol] = measure(task, model, inputs, tol, repeats, bar.update)
    solved = count(task, model, inputs, methods(task.solver.replace(tol=1e-5))[0])
    generator = Generator().manual_seed(seed)
    rho = spectral_radius(solved.f, solved.z, batch_dims=task.batch_dims, generator=generator)
    return Result(
        task=task,
        tables=tables,
        parameters=sum(p.numel() for p in model.parameters()),
        accuracy=accuracy,
        radius=rho,
    )


def train_with_each(quick: bool, seeds: Sequence[int], bar: tqdm) -> list[Trained]:
    """The graph network, trained by each of some methods; equal steps, each seed its own graph and start."""
    tasks = {seed: models.graph(quick, seed) for seed in seeds}
    return [train_with(name, lr, tasks, bar) for name in TRAINED for lr in RATES]


def train_with(name: str, lr: float, tasks: dict[int, Task], bar: tqdm) -> Trained:
    bar.set_description(f"training with {name}")
    losses, accuracies, seconds = [], [], []
    for seed, task in tasks.items():
        (method,) = (c for c in methods(task.solver) if c.name == name)
        assert method.solver is not None
        layer = DEQ(method.solver, method.grad, batch_dims=task.batch_dims)
        start = time.perf_counter()
        model = models.train(task, layer, seed, bar.update, lr)
        seconds.append((time.perf_counter() - start) / task.steps)
        losses.append(models.score(model, *task.draw(Generator()))[0])
        accuracies.append(models.score(model, *task.test)[1])
    return Trained(
        name, lr, mean(losses), mean(accuracies), min(accuracies), max(accuracies), 1e3 * mean(seconds)
    )


def write_report(
    path: Path,
    results: Sequence[Result],
    trained: Sequence[Trained],
    seeds: Sequence[int],
    repeats: int,
    about: list[str],
) -> None:
    lines = [
        "# What gradients cost, and how far off they are",
        "",
        "Written by `benchmarks/gradients.py`; `benchmarks/README.md` says what is measured.",
        "",
        *about,
        f"- seed {seeds[0]}; time: median and quartiles of {repeats} steps, methods in turn",
        "- stopping rule: ‖f(z) − z‖ / ‖f(z)‖ of each sample at most the tolerance; the adjoint solve, by GMRES, to "
        f"the same tolerance relative to the cotangent; the exact gradient in float64, both solves to {EXACT:g}",
        "- forward solver: the model's own where the method allows it; Broyden where it says so; plain iteration for "
        "`Unroll` (at most 400 evaluations) and `Reversible` (at most 43, states in float64); 10 + 5 plain evaluations "
        "for `TruncatedCycle`",
        "- * a solve did not converge, ° and memory that autograd does not count",
        "",
        "![Gradient error against calls of f and products](gradients.png)",
        "",
    ]
    for result in results:
        lines += [
            f"## {result.task.name.capitalize()}",
            "",
            f"{result.task.about[0].upper()}{result.task.about[1:]}; {result.parameters} parameters, trained for "
            f"{result.task.steps} steps by `IFT`, held-out accuracy {result.accuracy:.3f}. Forward solver "
            f"`{result.task.solver!r}`. At the fixed point the spectral radius of J is "
            f"{radius(result)}.",
            "",
        ]
        for tol, rows in result.tables.items():
            own = ", the model's own" if tol == result.task.solver.tol else ""
            failures = [f"`{m.row.name}`: {m.row.failure}" for m in rows if m.row.failure]
            lines += [f"### Tolerance {tol:g}{own}", "", *grid(HEAD, [m.cells() for m in rows]), ""]
            lines += [line for failure in failures for line in (failure, "")]
    steps = results[-1].task.steps
    lines += [
        "## Training",
        "",
        f"The graph network again, trained for {steps} steps by each method at the tolerance of the model, "
        f"{results[-1].task.solver.tol:g}; seeds {', '.join(map(str, seeds))}, each with a graph, labels and a start "
        "of its own; two learning rates. Means over the seeds, and smallest … largest. The model is tested with the "
        "layer that it was trained with.",
        "",
        *grid(
            ("method", "learning rate", "training loss", "held-out accuracy", "over seeds", "ms per step"),
            [
                [
                    f"`{t.name}`",
                    f"{t.lr:g}",
                    f"{t.loss:.3f}",
                    f"{t.accuracy:.3f}",
                    f"{t.worst:.3f} … {t.best:.3f}",
                    f"{t.milliseconds:.1f}",
                ]
                for t in trained
            ],
        ),
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def radius(result: Result) -> str:
    """The spectral radius in words."""
    rho = result.radius
    return f"{rho.median():.2f}" + (
        f" (median over samples; largest {rho.max():.2f})" if len(rho) > 1 else ""
    )


#: How a method looks in the figure: its label, colour and marker. What is not here coincides with one that is.
LOOKS = {
    "IFT()": ("IFT", "#0072b2", "o"),
    "JFB()": ("JFB", "#e69f00", "v"),
    "PhantomGrad(steps=5)": ("phantom, 5 steps", "#d55e00", "s"),
    "PhantomGrad(steps=5, tau=0.5)": ("phantom, 5 damped", "#d55e00", "D"),
    "NeumannPhantom(terms=5)": ("Neumann phantom, 5", "#d55e00", "P"),
    "SHINE()": ("SHINE", "#009e73", "^"),
    "SHINE(refine=GMRES())": ("SHINE, refined", "#009e73", "X"),
    "Unroll()": ("unrolled", "#7b4fa3", "o"),
    "Unroll(checkpoint=True)": ("unrolled, checkpoint", "#7b4fa3", "s"),
    "Unroll(last=5)": ("unrolled, last 5", "#cc79a7", "^"),
    "Reversible()": ("reversible", "#555555", "*"),
    "TruncatedCycle(cycles=10, grad_steps=5)": ("truncated cycle, 10 + 5", "#56a0d3", "p"),
}


def write_plot(path: Path, results: Sequence[Result]) -> None:
    """Error against calls and products: from the loosest tolerance, hollow, to the tightest, filled."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(12, 5.8), layout="constrained", facecolor="white")
    for axis, result in zip(axes, results, strict=True):
        for name in LOOKS:
            plot_method(
                axis, name, [m for rows in result.tables.values() for m in rows if m.row.name == name]
            )
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_title(f"{result.task.name}, ρ = {result.radius.median():.2f}", fontsize=13)
        axis.set_xlabel("calls of f + VJPs in one step", fontsize=12)
        wide = axis.get_xlim()[1] > 50 * axis.get_xlim()[0]
        axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axis.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 3) if wide else (1, 2, 5)))
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=11)
    axes[0].set_ylabel("relative error of the gradient", fontsize=12)
    if all(len(result.tables) > 1 for result in results):
        loose, tight = max(TOLERANCES), min(TOLERANCES)
        figure.suptitle(f"hollow: tolerance {loose:g}, filled: {tight:g}", fontsize=12, color="0.3")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=12)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_method(axis: Any, name: str, found: Sequence[Measured]) -> None:
    """One method: a mark at the first and at the last tolerance, and a line from the one to the other."""
    found = [m for m in found if not m.row.failure]
    if not found:
        return
    label, colour, marker = LOOKS[name]
    work, errors = [m.calls + m.passes for m in found], [m.row.error for m in found]
    style: dict[str, Any] = {"color": colour, "marker": marker, "ms": 14 if marker == "*" else 9, "mew": 1.4}
    axis.plot(work, errors, color=colour, lw=1, alpha=0.5)
    axis.plot(work[:1], errors[:1], ls="", mfc="white", **style)
    axis.plot(work[-1:], errors[-1:], ls="", label=label, **style)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny models: a test that it runs")
    parser.add_argument(
        "--seed", type=int, default=0, help="of weights and batches; training takes three from it on"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="where to write")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    about = environment(Peers([], [], {}, []))
    seeds = range(args.seed, args.seed + (1 if args.quick else 3))
    repeats = 2 if args.quick else 7
    tasks = [models.digits(args.quick), models.language(args.quick), models.graph(args.quick, args.seed)]
    steps = sum(t.steps + 2 * len(tolerances(t, args.quick)) for t in tasks)
    steps += len(TRAINED) * len(RATES) * len(seeds) * tasks[-1].steps
    with warnings.catch_warnings(), tqdm(total=steps, unit="step") as bar:
        warnings.simplefilter("ignore", ConvergenceWarning)  # a star in the tables says it
        warnings.simplefilter("ignore", CouplingWarning)
        results = [measure_task(task, args.seed, args.quick, repeats, bar) for task in tasks]
        trained = train_with_each(args.quick, seeds, bar)
    args.out.mkdir(parents=True, exist_ok=True)
    write_report(args.out / "gradients.md", results, trained, seeds, repeats, about)
    write_plot(args.out / "gradients.png", results)


if __name__ == "__main__":
    main()
