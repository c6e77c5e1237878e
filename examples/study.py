"""What the studies of this folder share: their options, seeds with their spread, and what is written of them.

A study measures one work for one seed, and says what its paper claims and how that looks in what was measured.
`Study.main` runs it:

    python examples/NAME.py [--seed N | --seeds N N N] [--quick] [--solver S] [--grad G] [--device D] [--out FOLDER]

and prints a table "claim / paper / ours / does it show?". It writes NAME.md, NAME.json and NAME.png.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from tqdm import tqdm

from torchdeq import DEQ, GRADS, SOLVERS, GradMethod, Solver, as_grad, as_solver
from torchdeq.solver import AffineSolver

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes to stderr

#: What was measured for a seed: numbers, or lists of numbers for curves, by name.
Measured = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a study is to be run.

    Arguments:
        seed: of data, weights and batches.
        quick: tiny sizes: does it run?
        solver, grad: names in `SOLVERS` and `GRADS`, in place of the study's own; None: the study's own.
        device: where to.
    """

    seed: int = 0
    quick: bool = False
    solver: str | None = None
    grad: str | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def forward(self, own: Solver) -> Any:
        """The forward solver: that of the option with the limits of the study's own, or the study's own."""
        if self.solver is None:
            return own
        return as_solver(self.solver, max_iter=own.max_iter, tol=own.tol, stop_mode=own.stop_mode)

    def gradient(self, own: GradMethod) -> GradMethod:
        """The gradient method, likewise."""
        return own if self.grad is None else as_grad(self.grad)

    def deq(self, solver: Solver, grad: GradMethod, **options: Any) -> DEQ:
        """A layer of both."""
        return DEQ(self.forward(solver), self.gradient(grad), **options)


class Progress:
    """A bar over what a study has to do for a seed, in steps that it announces."""

    def __init__(self, title: str):
        self.title = title
        self.bar: Any = None

    def begin(self, total: int) -> None:
        """So many steps are to come."""
        self.bar = tqdm(total=total, desc=self.title, leave=False, disable=None, dynamic_ncols=True)

    def step(self, what: str = "") -> None:
        """One is done; what is being done, and how it goes."""
        if self.bar is not None:
            self.bar.set_postfix_str(what, refresh=False)
            self.bar.update()

    def end(self) -> None:
        """No more."""
        if self.bar is not None:
            self.bar.close()


class Spread:
    """A number over the seeds: mean, and the smallest and largest."""

    def __init__(self, values: Sequence[float]):
        self.values = [float(value) for value in values]
        self.mean = statistics.fmean(self.values)

    def cell(self, digits: int = 3, scale: float = 1.0, *, scientific: bool = False) -> str:
        """As "0.981 (0.975–0.986)", or without a range where there is none."""
        kind = "e" if scientific else "f"
        mean, *ends = (
            f"{scale * v:.{digits}{kind}}" for v in (self.mean, min(self.values), max(self.values))
        )
        return mean if ends[0] == ends[1] else f"{mean} ({ends[0]}–{ends[1]})"


Results = Mapping[str, Spread]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a paper says, and how to see it here.

    Arguments:
        text: the claim, in a few words.
        paper: the paper's numbers for it.
        ours: ours, from the results over the seeds.
        shows: whether it shows at this scale; None where that cannot be said, or in words where it does in part.
    """

    text: str
    paper: str
    ours: Callable[[Results], str]
    shows: Callable[[Results], bool | str | None]


@dataclass(frozen=True, kw_only=True)
class Study:
    """A work, as it is reproduced here.

    Arguments:
        name: of the file.
        title: what is studied.
        source: the paper.
        replaces: what `--solver` and `--grad` are in the place of.
        smaller: what was made smaller, or is artificial.
        claims: of the paper, each compared with what was measured.
        measure: measures for one seed. A number gets a mean and a range over seeds; a list is a curve, for the figure.
        tables: titles and tables (head first) of the results, below the claims.
        draw: draws the figure from what was measured for each seed.
    """

    name: str
    title: str
    source: str
    replaces: str
    smaller: Sequence[str]
    claims: Sequence[Claim]
    measure: Callable[[Options, Progress], Measured]
    tables: Callable[[Results], Sequence[tuple[str, Sequence[Sequence[str]]]]]
    draw: Callable[[Any, Sequence[Measured]], None]

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Measure for each seed, print, write; returns 0."""
        parser = self.parser()
        args = parser.parse_args(arguments)
        out = args.out or Path("runs") / ("quick" if args.quick else "")
        out.mkdir(parents=True, exist_ok=True)  # an error here is better than one at the end
        began, found = (time.perf_counter(), time.process_time()), []
        seeds = args.seeds if args.seeds is not None else [args.seed]
        for seed in seeds:
            options = Options(
                seed=seed, quick=args.quick, solver=args.solver, grad=args.grad, device=args.device
            )
            progress = Progress(f"{self.name}, seed {seed}")
            torch.manual_seed(seed)
            try:
                found.append(self.measure(options, progress))
            finally:
                progress.end()
        words = sys.argv[1:] if arguments is None else arguments
        spent = time.perf_counter() - began[0], time.process_time() - began[1]
        text = self.report(found, seeds, words, spent, args)
        print(text)
        (out / f"{self.name}.md").write_text(text + "\n")
        raw = {"seeds": list(seeds), "measured": found}
        (out / f"{self.name}.json").write_text(json.dumps(raw) + "\n")
        self.figure(out / f"{self.name}.png", found)
        print(f"Written: {', '.join(str(out / f'{self.name}.{kind}') for kind in ('md', 'json', 'png'))}")
        return 0

    def parser(self) -> argparse.ArgumentParser:
        """Of the options that all studies have."""
        parser = argparse.ArgumentParser(
            prog=f"{self.name}.py",
            description=f"{self.title.rstrip('?.')}. {self.source}",
            epilog=self.replaces,
        )
        one = parser.add_mutually_exclusive_group()
        one.add_argument("--seed", type=int, default=0, help="of data, weights and batches (default: 0)")
        one.add_argument("--seeds", type=int, nargs="+", help="several, for the spread")
        parser.add_argument("--quick", action="store_true", help="tiny sizes, in seconds: does it run?")
        parser.add_argument(
            "--solver", choices=forward_solvers(), help="the forward solver (default: the study's)"
        )
        parser.add_argument(
            "--grad", choices=sorted(GRADS), help="the gradient method (default: the study's)"
        )
        parser.add_argument("--device", type=usable, default=torch.device("cpu"), help="default: cpu")
        parser.add_argument(
            "--out", type=Path, help="folder to write to (default: runs, and runs/quick with --quick)"
        )
        return parser

    def report(
        self,
        found: Sequence[Measured],
        seeds: Sequence[int],
        words: Sequence[str],
        spent: tuple[float, float],
        args: argparse.Namespace,
    ) -> str:
        """Everything in Markdown. `spent` are the seconds that it took, and those of the processor."""
        results = spreads(found)
        head = ["claim", "paper", "ours", "shows here?"]
        rows = [
            [c.text, c.paper, c.ours(results), "quick" if args.quick else said(c.shows(results))]
            for c in self.claims
        ]
        notes = []
        if args.quick:
            notes.append(
                "**A quick run: it shows that the study runs. Its numbers, of tiny sizes, say nothing.**"
            )
        given = [f"--{n} {getattr(args, n)}" for n in ("solver", "grad") if getattr(args, n) is not None]
        if given:
            notes.append(f"**With {' '.join(given)}.** {self.replaces}")
        command = " ".join(["python", f"examples/{self.name}.py", *words])
        lines = [
            f"# {self.title}",
            "",
            self.source,
            "",
            *(line for note in notes for line in (note, "")),
            "<!-- --8<-- [start:claims] -->",
            "",
            *grid([head, *rows]),
            "",
            "Made smaller, or artificial:",
            "",
            *(f"- {line}" for line in self.smaller),
            "",
            "<!-- --8<-- [end:claims] -->",
            "",
        ]
        for title, table in self.tables(results):
            lines += [f"## {title}", "", *grid(table), ""]
        lines += [
            f"![Figure]({self.name}.png)",
            "",
            f"`{command}`; {seeded(seeds)}. "
            f"{datetime.date.today().isoformat()}, commit {commit()}, torch {torch.__version__}, python "
            f"{platform.python_version()}, {torch.get_num_threads()} thread(s), {spent[0]:.0f} s, "
            f"of the processor {spent[1]:.0f} s.",
        ]
        return "\n".join(lines)

    def figure(self, path: Path, found: Sequence[Measured]) -> None:
        """Draw it into a file."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 4), layout="constrained", dpi=110)
        self.draw(figure, found)
        figure.savefig(path)


def clock(device: torch.device) -> float:
    """Seconds. On a CPU with one thread those of this process alone, so that neighbours on the machine do not count."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def peaks(runs: Sequence[Callable[[], Any]], device: torch.device) -> list[float]:
    """The most MiB that were allocated while each ran, above what there was."""
    runs[0]()  # what is made only once does not count
    if device.type == "cuda":
        found = []
        for run in runs:
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            run()
            found.append((torch.cuda.max_memory_allocated(device) - before) / 2**20)
        return found
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
        for i, run in enumerate(runs):
            with record_function(f"run {i}"):
                run()
    events = watch.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    spans = {e.name(): (e.start_ns(), e.end_ns()) for e in events if e.name().startswith("run ")}
    found = []
    for i in range(len(runs)):
        begin, end = spans[f"run {i}"]
        inside = [change for when, change in changes if begin <= when <= end]
        found.append(max(itertools.accumulate(inside, initial=0)) / 2**20)
    return found


def spreads(found: Sequence[Measured]) -> Results:
    """The numbers that each seed has, over the seeds."""
    names = [name for name, value in found[0].items() if isinstance(value, int | float)]
    return {name: Spread([one[name] for one in found]) for name in names}


def grid(rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table with aligned columns, head first."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return [lines[0], "| " + " | ".join("-" * w for w in widths) + " |", *lines[1:]]


def seeded(seeds: Sequence[int]) -> str:
    """Which seeds, and what the numbers are of several."""
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    return f"seeds {', '.join(map(str, seeds))}: the mean, and the smallest and largest"


def forward_solvers() -> list[str]:
    """The names of those that take any map."""
    return sorted(name for name in SOLVERS if not isinstance(as_solver(name), AffineSolver))


def usable(name: str) -> torch.device:
    """The device of that name.

    Raises:
        argparse.ArgumentTypeError: it is not there.
    """
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{name!r} cannot be used: {str(error).splitlines()[0]}") from error


def said(shows: bool | str | None) -> str:
    """yes, no, in part, or cannot be said."""
    if isinstance(shows, str):
        return shows
    return "cannot be said" if shows is None else "yes" if shows else "**no**"


def commit() -> str:
    """The commit of this checkout, and whether what is tracked of the library or of the studies differs from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        name = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True
        )
        state = subprocess.run(
            [*git, "status", "--porcelain", "--", ":/torchdeq", ":/examples/*.py"],
            check=True,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return name.stdout.strip() + (" with changes" if state.stdout.strip() else "")
