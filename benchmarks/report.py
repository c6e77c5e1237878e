"""The tables of counts, what they say about ours and peers, and the plot."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from peers import Method, Peers
from problems import Adjoint, Problem

GOAL = 1.2  # what the default solver may need, relative to the best of ours

#: Why a peer needs less, or the default solver much more than another of ours; by row. Written by hand, and printed
#: where the numbers say that it is so.
BAD = "Broyden's bad method with all differences is that little ahead; ours needs what SciPy's needs."
SHORT = "A short history, as of our Anderson(), is that little ahead."
ROUNDING = (
    "Rounding decides: multiplying x by 1 + 1e-6 moves such a median by up to a half. Sample by sample, over 200 of "
    "them, Broyden's good method has the same quartiles as implemented by us and by 0.1.0."
)
WHY = {
    "tanh gain 1.1": BAD,
    "tanh gain 1.5": BAD,
    "tanh gain 2, x std 3": BAD,
    "attention+MLP 0.3": "jaxopt begins with five Picard steps, which are as good as any here; our RRE does the same.",
    "conv+GroupNorm 0.5": SHORT,
    "attention+MLP 0.7": SHORT,
    "tanh gain 2.5, x std 3": BAD,
    "attention+MLP 1": "A short history wins: differences from far away mislead. Our Anderson(m=10) needs what SciPy's "
    "needs.",
    "attention+MLP 1.5": "To 1e-2 extrapolation from a few Picard steps is enough. Below, SciPy's is the method of our "
    "Broyden() under another rounding.",
    "attention+MLP 2": ROUNDING,
    "attention+MLP 3": ROUNDING,
}

PLOTTED = (
    "tanh gain 1.1",
    "attention+MLP 0.7",
    "conv+GroupNorm 0.5",
    "tanh gain 2.5, x std 3",
    "tanh gain 2.5, n=32",
    "attention+MLP 1.5",
)
COLOURS = {
    "Multisecant": "#d55e00",
    "Anderson": "#0072b2",
    "Broyden": "#009e73",
    "FixedPointIteration": "#e6a000",
    "NewtonKrylov": "#b0609a",
}
DASHES = {
    ("0.1.0 anderson", "as shipped"): (0, (5, 2)),
    ("0.1.0 broyden", "as shipped"): (0, (1, 1.5)),
    ("jaxopt Anderson", "as shipped"): (0, (6, 2, 1, 2)),
    ("scipy df-sane", "as shipped"): (0, (2, 4)),
}


@dataclass
class Table:
    """Counts by row and method: for each seed one per level."""

    title: str
    levels: Sequence[float]
    methods: Sequence[Method]
    counts: dict[str, dict[Method, list[list[float]]]] = field(default_factory=dict)
    caps: dict[str, int] = field(default_factory=dict)

    def add(self, problem: Problem | Adjoint, method: Method, counts: list[float]) -> None:
        self.counts.setdefault(problem.name, {}).setdefault(method, []).append(counts)
        self.caps[problem.name] = problem.cap

    def medians(self, row: str, method: Method) -> list[float]:
        return [median(counts) for counts in zip(*self.counts[row][method], strict=True)]

    def group(self, name: str) -> list[Method]:
        return [method for method in self.methods if method.group == name]

    def verdict(self, row: str, level: int) -> Verdict:
        """Compare the default solver, which is the first of ours, with the best of ours and of the peers."""

        def best(methods: Sequence[Method]) -> tuple[float, str]:
            medians = [(self.medians(row, m)[level], f"{m.name} ({m.group})") for m in methods]
            return min(medians, key=lambda pair: pair[0], default=(math.inf, ""))

        ours = self.group("ours")
        peers = [method for method in self.methods if method not in ours]
        return Verdict(self.medians(row, ours[0])[level], *best(ours), *best(peers))


class Verdict(NamedTuple):
    """Medians for one row and level, and who reached them."""

    default: float
    best: float
    winner: str
    peer: float
    rival: str

    @property
    def ratio(self) -> float:
        return 1.0 if self.default == self.best else self.default / self.best

    @property
    def mark(self) -> str:
        """'**' if a peer needs fewer than any of ours, '*' if fewer than the default, '.' if neither."""
        return "*" * ((self.peer < self.default) + (self.peer < self.best)) or "."

    def remark(self, level: float) -> str | None:
        """What is not as it should be, in words."""
        faults = []
        if self.ratio > GOAL:
            faults.append(f"{self.winner} {number(self.best)}")
        if self.peer < self.default:
            faults.append(f"{self.rival} {number(self.peer)}")
        return f"{level:g}: {number(self.default)}, but {', '.join(faults)}." if faults else None


def number(count: float) -> str:
    """A count; '–' for one beyond the cap."""
    return "–" if math.isinf(count) else f"{count:g}"


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table with aligned columns."""
    width = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [[cell.ljust(w) for cell, w in zip(row, width, strict=True)] for row in [head, *rows]]
    lines.insert(1, ["-" * w for w in width])
    return [f"| {' | '.join(line)} |" for line in lines]


def median_table(table: Table, methods: Sequence[Method]) -> list[str]:
    return grid(
        ["map", *(m.name for m in methods)],
        [[row, *("/".join(map(number, table.medians(row, m))) for m in methods)] for row in table.counts],
    )


def spread_table(table: Table, methods: Sequence[Method]) -> list[str]:
    """The smallest and largest count over the seeds."""

    def cell(row: str, method: Method) -> str:
        by_level = zip(*table.counts[row][method], strict=True)
        return " / ".join(f"{number(min(c))}…{number(max(c))}" for c in by_level)

    rows = [[row, *(cell(row, m) for m in methods)] for row in table.counts]
    return grid(["map", *(m.name for m in methods)], rows)


def tail_table(table: Table, methods: Sequence[Method], share: float) -> list[str]:
    """What is enough for this share of the samples."""

    def cell(row: str, method: Method) -> str:
        by_level = zip(*table.counts[row][method], strict=True)
        return "/".join(number(sorted(c)[math.ceil(share * len(c)) - 1]) for c in by_level)

    return grid(
        ["map", *(m.name for m in methods)], [[row, *(cell(row, m) for m in methods)] for row in table.counts]
    )


def comparison(table: Table, why: dict[str, str] = {}) -> list[str]:  # noqa: B006 - read only
    """The default solver, the best of ours and the best peer; below, each row where something is amiss."""
    default = table.group("ours")[0].name
    rows, notes = [], []
    for row in table.counts:
        verdicts = [table.verdict(row, i) for i in range(len(table.levels))]
        rows.append(
            [
                row,
                str(len(table.counts[row][table.methods[0]])),
                str(table.caps[row]),
                "/".join(number(v.default) for v in verdicts),
                "/".join(number(v.best) for v in verdicts),
                "/".join(f"{v.ratio:.2f}" + "!" * (v.ratio > GOAL) for v in verdicts),
                "/".join(number(v.peer) for v in verdicts),
                "/".join(v.mark for v in verdicts),
            ]
        )
        if remarks := [r for v, level in zip(verdicts, table.levels, strict=True) if (r := v.remark(level))]:
            notes.append(" ".join([f"- **{row}**:", *remarks, *([why[row]] if row in why else [])]))
    head = [
        "map",
        "cases",
        "cap",
        default,
        "best of ours",
        f"{default} / best of ours",
        "best peer",
        "verdict",
    ]
    return [*grid(head, rows), "", *(notes or ["No row is marked."])]


def settings(table: Table) -> list[str]:
    return grid(["column", "setting"], [[f"{m.name}, {m.group}", m.setting] for m in table.methods])


def environment(peers: Peers) -> list[str]:
    """Versions and circumstances; to be asked before the solves, for the code that is loaded."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchdeq": f"{importlib.metadata.version('torchdeq')}, commit {commit()}",
        **peers.versions,
    }
    return [
        f"- {', '.join(f'{name} {version}' for name, version in versions.items())}",
        f"- CPU, {torch.get_num_threads()} thread; {datetime.date.today().isoformat()}",
        *(f"- missing: {reason}" for reason in peers.missing),
    ]


def commit() -> str:
    """The commit of this checkout, and whether the library differs from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        name = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True
        )
        state = subprocess.run(
            [*git, "status", "--porcelain", "--", ":/torchdeq"], capture_output=True, text=True
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return name.stdout.strip() + (" with changes" if state.stdout.strip() else "")


def section(table: Table, what: str) -> list[str]:
    default = table.group("ours")[0].name
    lines = [
        f"## {table.title}",
        "",
        f"{what} {' / '.join(f'{level:g}' for level in table.levels)}. Numbers are medians over seeds (0, "
        "1, …), each of which is another map and input; – means not within the cap.",
        "",
        *comparison(table, WHY),
        "",
        f"`*`: a peer needs fewer than {default}; `**`: fewer than any of ours, be it by one evaluation. `!`: "
        f"{default} needs more than {GOAL:g} times the best of ours.",
        "",
    ]
    for group, title in {"ours": "Ours", "as shipped": "Peers as shipped", "tuned": "Peers, tuned"}.items():
        if methods := table.group(group):
            lines += [f"### {title}", "", *median_table(table, methods), ""]
            lines += ["Smallest … largest over the seeds:", "", *spread_table(table, methods), ""]
    return [*lines, "### Settings", "", *settings(table), ""]


def samples_section(table: Table) -> list[str]:
    """The hard rows again, each sample counted by itself."""
    lines = [
        f"## {table.title}",
        "",
        "The slowest of eight samples, which the table above counts, says little about a method where paths are "
        "chaotic. Here each sample of the hard rows counts by itself. Numbers are medians over all of them.",
        "",
        *comparison(table),
        "",
    ]
    groups = {"ours": "Ours", "as shipped": "Peers as shipped", "tuned": "Peers, tuned"}
    for group, title in groups.items():
        if methods := table.group(group):
            lines += [f"### {title}, samples", "", *median_table(table, methods), ""]
            lines += ["Enough for nine samples in ten:", "", *tail_table(table, methods, 0.9), ""]
    return lines


def write_report(
    path: Path, forward: Table, single: Table, adjoint: Table, circumstances: Sequence[str]
) -> None:
    evaluations = (
        "Evaluations of f until every sample of the batch has been seen with ‖f(z) − z‖ / ‖f(z)‖ at most the level. "
        f"Our solvers were given the tolerance {0.99 * forward.levels[-1]:g}, relative; peers were stopped from "
        "outside when they were there. Levels:"
    )
    products = (
        "Products with Jᵀ or J, by which the measured ‖g − (I − Jᵀ)u‖ / ‖g‖ of every sample is at most the level. Each "
        "solve has the level as its tolerance, and the product that measures the final residual is counted for every "
        "method. Levels:"
    )
    lines = [
        "# Evaluations to equal residual",
        "",
        "Written by `benchmarks/solvers.py`; `benchmarks/README.md` says what is counted.",
        "",
        *circumstances,
        "",
        "![Residual against evaluations](solvers.png)",
        "",
        *section(forward, evaluations),
        *samples_section(single),
        *section(adjoint, products),
    ]
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def write_plot(path: Path, table: Table, curves: dict[tuple[str, Method], list[float]]) -> None:
    """Residual against evaluations: ours in colour, peers dashed and grey."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in PLOTTED if row in table.counts] or list(table.counts)[:6]
    figure, axes = plt.subplots(2, 3, figsize=(12, 7), sharey=True, layout="constrained")
    for axis, row in zip(axes.flat, rows, strict=False):
        plot_row(axis, row, table, curves)
    for axis in axes[:, 0]:
        axis.set_ylabel("relative residual, worst sample")
    for axis in axes[-1]:
        axis.set_xlabel("evaluations of f")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_row(axis, row: str, table: Table, curves: dict[tuple[str, Method], list[float]]) -> None:
    for method in table.methods:
        curve = curves[row, method]
        steps = range(1, len(curve) + 1)
        if method.group == "ours" and method.name in COLOURS:
            width = 3 if method is table.methods[0] else 1.6
            axis.semilogy(steps, curve, color=COLOURS[method.name], lw=width, label=method.name)
        elif dash := DASHES.get((method.name, method.group)):
            axis.semilogy(steps, curve, color="0.25", lw=1.1, ls=dash, label=f"{method.name}, {method.group}")
    axis.set_title(row, fontsize=10)
    axis.set_ylim(0.9 * table.levels[-1], 1.5)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
