"""How much memory do solvers hold, and gradient methods between forward and backward? And torchdeq 0.1.0's?

    python benchmarks/memory.py [--quick] [--peers WHEEL] [--out benchmarks/results]

writes memory.md and memory.png. See README.md here for what is measured and how.
"""

from __future__ import annotations

import argparse
import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

import solver_memory
from allocator import allocations
from peers import UNREACHABLE, Peers, old_torchdeq
from report import environment, grid
from torchdeq import (
    DEQ,
    GMRES,
    IFT,
    Broyden,
    ConvergenceWarning,
    FixedPointIteration,
    PhantomGrad,
    Solver,
    Unroll,
)
from torchdeq.diagnostics import SavedBytes
from torchdeq.grad import JFB, SHINE, GradMethod, NeumannPhantom, Reversible, TruncatedCycle

COUNTS = (10, 30, 100)  # evaluations in the forward solve
MIB = 2**20

#: Every solve makes all its evaluations, by plain iteration where the method does not need another solver, so that
#: the work space of an accelerated solver is not taken for the method's.
METHODS: tuple[tuple[GradMethod, type[Solver]], ...] = (
    (IFT(), FixedPointIteration),
    (IFT(solver=FixedPointIteration(tol=1e-5, stop_mode="rel")), FixedPointIteration),
    (IFT(hook=True), FixedPointIteration),
    (IFT(order=2), FixedPointIteration),
    (JFB(), FixedPointIteration),
    (PhantomGrad(steps=5), FixedPointIteration),
    (NeumannPhantom(terms=5), FixedPointIteration),
    (SHINE(), Broyden),
    (SHINE(refine=GMRES(tol=1e-5)), Broyden),
    (Unroll(), FixedPointIteration),
    (Unroll(checkpoint=True), FixedPointIteration),
    (Unroll(last=5), FixedPointIteration),
    (Reversible(beta=0.2, dtype=torch.float64), FixedPointIteration),
    (TruncatedCycle(), FixedPointIteration),
)

#: Gradients of 0.1.0, by plain iteration too, which it uses in the backward pass if nothing is said.
OLD: tuple[dict[str, Any], ...] = ({"ift": True}, {"hook_ift": True}, {"grad": 1}, {"grad": 5})
#: The loss of a step.
Forward = Callable[[], Tensor]


class Bytes(NamedTuple):
    """What one step takes, beyond what was there before it."""

    forward: int  # the most at one time in the forward pass
    held: int  # after it: for the backward pass, and the loss
    backward: int  # the most in the backward pass, with the gradient it makes
    saved: int  # the most that autograd says it saves


@dataclass(frozen=True)
class Problem:
    """f(z) = tanh(z Wᵀ + x) with a contraction W (n, n) and x (B, n), float32."""

    w: Tensor
    x: Tensor

    @classmethod
    def make(cls, *, batch: int, n: int) -> Problem:
        generator = torch.Generator().manual_seed(0)
        w = torch.randn(n, n, generator=generator) * 0.5 / n**0.5
        return cls(w.requires_grad_(), torch.randn(batch, n, generator=generator))

    def __call__(self, z: Tensor) -> Tensor:
        return torch.tanh(z @ self.w.T + self.x)

    def forward(self, method: GradMethod, solver: Solver) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # tol=0 asks for all evaluations
            z, solution = DEQ(solver, method)(self, torch.zeros_like(self.x))
        assert solution.nfe + 1 >= solver.max_iter  # an iteration that stopped early would look small
        return z.square().sum()

    def forward_by(self, deq: torch.nn.Module) -> Tensor:
        """By a module of 0.1.0."""
        states, _ = deq(self, torch.zeros_like(self.x))
        return states[-1].square().sum()


class Checkpointed(Problem):
    """The same, evaluated again for its backward pass."""

    def __call__(self, z: Tensor) -> Tensor:
        image: Tensor = checkpoint(super().__call__, z, use_reentrant=False)
        return image


def measure(problem: Problem, method: GradMethod, solver: Solver) -> Bytes:
    """One step by a gradient method of ours."""
    return measure_step(problem, functools.partial(problem.forward, method, solver))


def measure_step(problem: Problem, forward: Forward) -> Bytes:
    """One step, watched at the allocator; before it one that is not, which makes what is made once."""
    saved = saved_bytes(problem, forward)

    def step() -> None:
        with record_function("the forward pass"):
            loss = forward()
        loss.backward()
        problem.w.grad = None

    memory = allocations(step, "the forward pass")
    ((begin, end),) = memory.spans["the forward pass"]
    return Bytes(memory.between(begin, end), memory.at(end), memory.after(end), saved)


def saved_bytes(problem: Problem, forward: Forward) -> int:
    with SavedBytes(ignore=[problem.w, problem.x]) as saved:
        forward().backward()
    problem.w.grad = None
    return saved.peak


def run(problem: Problem, counts: Sequence[int], old: ModuleType | None) -> dict[str, list[Bytes]]:
    """For each method one measurement per count."""

    def theirs(options: dict[str, Any], k: int) -> Forward:
        assert old is not None
        deq = old.get_deq(f_max_iter=k, f_tol=0.0, b_tol=1e-5, b_stop_mode="rel", **options)
        return functools.partial(problem.forward_by, deq)

    found = {
        repr(method): [measure(problem, method, kind(max_iter=k, tol=0.0, patience=0)) for k in counts]
        for method, kind in METHODS
    }
    # No graph at all is kept of an f that is checkpointed.
    bare = Checkpointed(problem.w, problem.x)
    found["IFT(), f checkpointed"] = [
        measure(bare, IFT(), FixedPointIteration(max_iter=k, tol=0.0, patience=0)) for k in counts
    ]
    for options in OLD if old is not None else ():
        name = f"0.1.0 get_deq({', '.join(f'{k}={v}' for k, v in options.items())})"
        found[name] = [measure_step(problem, theirs(options, k)) for k in counts]
    return found


def find_old(wheels: Sequence[Path]) -> tuple[ModuleType | None, list[str]]:
    """torchdeq 0.1.0, or why there is none."""
    try:
        return old_torchdeq(wheels), []
    except UNREACHABLE as error:
        return None, [f"torchdeq 0.1.0: skipped, {error}"]


def write_report(
    path: Path,
    problem: Problem,
    counts: Sequence[int],
    states: dict[str, list[solver_memory.States]],
    found: dict[str, list[Bytes]],
    missing: list[str],
) -> None:
    def cell(rows: list[Bytes], what: Callable[[Bytes], int]) -> str:
        return " / ".join(f"{what(row) / MIB:.2f}" for row in rows)

    columns: dict[str, Callable[[Bytes], int]] = {
        "held after forward": lambda row: row.held,
        "peak in forward": lambda row: row.forward,
        "peak in backward": lambda row: row.backward,
        "saved by autograd": lambda row: row.saved,
    }
    state, weights = (4 * t.numel() / 2**10 for t in (problem.x, problem.w))
    lines = [
        "# Memory of solvers and of a training step",
        "",
        "Written by `benchmarks/memory.py`; `benchmarks/README.md` says what is measured.",
        "",
        *environment(Peers([], [], {} if missing else {"torchdeq (peer)": "0.1.0"}, missing)),
        f"- state {state:g} KiB, parameters {weights:g} KiB, float32",
        "",
        "## Solvers",
        "",
        *solver_memory.section(states, counts, problem.x.shape),
        "",
        "## Gradient methods",
        "",
        "![Memory of gradient methods](memory.png)",
        "",
        f"MiB at {' / '.join(map(str, counts))} evaluations in the forward solve, beyond parameters and inputs. The "
        f"peak in backward includes the gradient, which is as large as the parameters; where several calls of f "
        f"contribute to it, a second one of that size; and the basis of GMRES.",
        "",
        *grid(
            ["method", *columns],
            [[f"`{name}`", *(cell(rows, what) for what in columns.values())] for name, rows in found.items()],
        ),
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_plot(path: Path, problem: Problem, counts: Sequence[int], found: dict[str, list[Bytes]]) -> None:
    """One row for each method: what is held, and the peak in backward, one dot per count."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, 2, figsize=(12, 0.36 * len(found) + 1.6), sharex=True, sharey=True, layout="constrained"
    )
    places = range(len(found))
    colours, sizes = ("#9ecae1", "#3182bd", "#08306b"), (150, 70, 22)  # dots in one place show as rings
    for axis, what in zip(axes, ("held", "backward"), strict=True):
        amounts = [[getattr(row, what) / MIB for row in rows] for rows in found.values()]
        axis.hlines(places, [min(a) for a in amounts], [max(a) for a in amounts], color="0.7", zorder=1)
        for i, count in enumerate(counts):
            axis.scatter(
                [a[i] for a in amounts],
                places,
                s=sizes[i],
                color=colours[i],
                label=f"{count} evaluations",
                zorder=2,
            )
        axis.set_xscale("log")
        axis.set_xlabel("MiB")
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_title("held between forward and backward", fontsize=11)
    axes[1].set_title("peak in backward (dotted: the gradient itself)", fontsize=11)
    axes[1].axvline(4 * problem.w.numel() / MIB, color="0.4", ls=":", lw=1.2)
    axes[0].set_yticks(places, list(found), fontfamily="monospace", fontsize=9)
    axes[0].set_ylim(len(found) - 0.4, -0.6)
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(counts), frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tiny map: a test that it runs")
    parser.add_argument("--peers", type=Path, nargs="*", default=[], help="a wheel of torchdeq 0.1.0")
    parser.add_argument("--out", type=Path, help="where to write (default: results/, or with --quick runs/)")
    args = parser.parse_args(argv)
    args.out = args.out or (Path("runs") if args.quick else Path(__file__).parent / "results")
    torch.set_num_threads(1)
    counts = (7, 9) if args.quick else COUNTS
    problem = Problem.make(batch=2, n=8) if args.quick else Problem.make(batch=32, n=512)
    old, missing = (None, ["all: --quick"]) if args.quick else find_old(args.peers)
    states = solver_memory.run(problem, torch.zeros_like(problem.x), counts, old and old.solver)
    found = run(problem, counts, old)
    args.out.mkdir(parents=True, exist_ok=True)
    write_report(args.out / "memory.md", problem, counts, states, found, missing)
    write_plot(args.out / "memory.png", problem, counts, found)
    print((args.out / "memory.md").read_text(encoding="utf-8"))
    print(f"Written: {args.out / 'memory.md'}, {args.out / 'memory.png'}")


if __name__ == "__main__":
    main()
