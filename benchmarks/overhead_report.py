"""The report of benchmarks/overhead.py: what a solve takes over what its calls of f take, beside the goals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from report import grid
from timing import Spread, ratios

#: The most that time over (calls × time of a call) should be, by layer and solver: eager, compiled.
GOALS: dict[str, dict[str, tuple[float, float]]] = {
    "tanh 32×64": {"Picard": (4, 1.5), "Anderson": (10, 3), "Broyden": (12, 4)},
    "tanh 32×512": {"Picard": (1.3, 1.1), "Anderson": (1.6, 1.3), "Broyden": (2.0, 1.6)},
    "conv 32×16×16×16": {"Picard": (1.25, 1.15), "Anderson": (1.6, 1.5), "Broyden": (2.5, 2.2)},
}
COLOURS = {"0.1.0": "#9aa5b1", "ours": "#0072b2", "ours, DEQ": "#56b4e9", "ours, compiled": "#d55e00"}


def overhead(case: Mapping[str, Any], row: Mapping[str, Any]) -> Spread:
    """Time over that of the calls alone, round by round. The goals are judged on its median."""
    alone = zip(*(case["pure"][name] for name in ("f", "product", "parameters")), strict=True)
    return ratios(row["seconds"], [_calls_alone(case, row, *times) for times in alone])


def best(case: Mapping[str, Any], row: Mapping[str, Any]) -> float:
    """The shortest time over that of the calls alone by their shortest times: without the neighbours' share."""
    alone = (min(case["pure"][name]) for name in ("f", "product", "parameters"))
    return min(row["seconds"]) / _calls_alone(case, row, *alone)


def _calls_alone(
    case: Mapping[str, Any], row: Mapping[str, Any], f: float, product: float, parameters: float
) -> float:
    calls: int = row["calls"]
    return calls * product + f + parameters if case["backward"] else calls * f


def goal_of(case: Mapping[str, Any], row: Mapping[str, Any]) -> float | None:
    """None for a peer, and where no goal is set."""
    goals = GOALS.get(case["case"], {}).get(row["solver"])
    return goals["compiled" in row["who"]] if goals and row["who"] != "0.1.0" else None


def missed(results: Mapping[str, Any]) -> Iterator[str]:
    """Where the median is beyond the goal."""
    for case in results["cases"]:
        for row in case["rows"]:
            goal, found = goal_of(case, row), overhead(case, row).middle
            if goal is not None and found > goal:
                way = "backward" if case["backward"] else "forward"
                yield f"{case['case']}, {way}, {row['solver']}, {row['who']}: {found:.2f}, goal {goal:g}"


def table(case: Mapping[str, Any]) -> list[str]:
    """A case's rows; a median beyond the goal is marked."""
    lines = []
    for row in case["rows"]:
        spread, goal = overhead(case, row), goal_of(case, row)
        mark = " **missed**" if goal is not None and spread.middle > goal else ""
        lines.append(
            [
                row["solver"],
                row["who"],
                str(row["calls"]),
                f"{1e3 * median(row['seconds']):.3g}",
                spread.cell() + mark,
                f"{best(case, row):.2f}",
                "–" if goal is None else f"≤ {goal:g}",
                "–" if row["operations"] is None else f"{row['operations']:.1f}",
            ]
        )
    calls = "products" if case["backward"] else "calls of f"
    return grid(
        ["solver", "library", calls, "ms", "overhead", "overhead (best)", "goal", "operations"], lines
    )


def write_report(path: Path, results: Mapping[str, Any]) -> str:
    """Write it, and return its text."""
    lines = [
        "# The overhead of solvers",
        "",
        "Written by `benchmarks/overhead.py`; `benchmarks/README.md` says what is measured. The raw times are in",
        "`overhead.json`.",
        "",
        *results["circumstances"],
        "",
        "![Overhead](overhead.png)",
        "",
        "*overhead*: the time of a solve over that of its calls of f; of a backward pass over that of its products",
        "with Jᵀ, a call of f and a product that goes to the parameters. 1 is the limit. Median and quartiles of the",
        "ratios of the rounds; the goals are for the median. *best*: the ratio of the shortest times. The first says",
        "what was met on this machine, the second what is left of it when nobody else is busy. f is eager in all of",
        "them, those of *compiled* too. *operations*: what an iteration adds to those of f, in ATen operations. *ours*",
        "is the solver called by itself, as 0.1.0's is; *DEQ* is the module.",
        "",
    ]
    for case in results["cases"]:
        us = {name: f"{1e6 * median(seconds):.3g} µs" for name, seconds in case["pure"].items()}
        way = "backward" if case["backward"] else "forward"
        alone = f"f takes {us['f']}"
        if "f, compiled" in us:
            alone += f", by itself compiled {us['f, compiled']}"
        if case["backward"]:
            alone += f", a product {us['product']}, one that goes to the parameters {us['parameters']}"
        rounds = len(case["pure"]["f"])
        lines += [f"## {case['case']}, {way}", "", f"{alone}; {rounds} rounds.", "", *table(case), ""]
        lines += [f"- {name}: {reason}" for name, reason in case["failed"].items()]
        lines += [""] * bool(case["failed"])
        firsts = [f"{r['solver']} {r['first']:.1f} s" for r in case["rows"] if r["first"] is not None]
        if firsts:
            lines += [f"The first call of the compiled: {', '.join(firsts)}.", ""]
    if any(goal_of(case, row) for case in results["cases"] for row in case["rows"]):
        lines += ["## Goals missed", "", *([f"- {one}" for one in missed(results)] or ["None."]), ""]
    text = "\n".join(lines).rstrip() + "\n"
    path.write_text(text, encoding="utf-8")
    return text


def write_plot(path: Path, results: Mapping[str, Any]) -> None:
    """Bars by solver and library, one panel for each case; marks are the goals, and the ratios of shortest times."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases: Sequence[Mapping[str, Any]] = results["cases"]
    layers = list(dict.fromkeys(case["case"] for case in cases))
    figure, axes = plt.subplots(
        2, len(layers), figsize=(4.4 * len(layers), 7.2), layout="constrained", squeeze=False
    )
    for case in cases:
        axis = axes[int(case["backward"]), layers.index(case["case"])]
        _bars(axis, case)
    for row, way in zip(axes, ("forward", "backward"), strict=True):
        row[0].set_ylabel(f"{way}: time / time of its calls alone")
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        handles |= dict(reversed(pair) for pair in zip(*axis.get_legend_handles_labels(), strict=True))
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _bars(axis: Any, case: Mapping[str, Any]) -> None:
    from matplotlib.ticker import LogLocator

    solvers = list(dict.fromkeys(row["solver"] for row in case["rows"]))
    who = [name for name in COLOURS if any(row["who"] == name for row in case["rows"])]
    width = 0.8 / len(who)
    for row in case["rows"]:
        at = solvers.index(row["solver"]) + (who.index(row["who"]) - (len(who) - 1) / 2) * width
        spread = overhead(case, row)
        error = [[spread.middle - spread.low], [spread.high - spread.middle]]
        first = row["solver"] == next(r["solver"] for r in case["rows"] if r["who"] == row["who"])
        axis.bar(
            at,
            spread.middle,
            0.92 * width,
            yerr=error,
            color=COLOURS[row["who"]],
            error_kw={"lw": 0.9},
            label=row["who"] if first else None,
        )
        axis.plot(at, best(case, row), "D", color="white", mec="0.2", mew=0.8, ms=3.5, zorder=4)
        axis.annotate(
            f"{spread.middle:.3g}",
            (at, max(spread.high, best(case, row))),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            fontsize=7,
        )
        if (goal := goal_of(case, row)) is not None:
            axis.hlines(goal, at - width / 2, at + width / 2, color="black", lw=1.6, zorder=3)
    axis.hlines([], 0, 0, color="black", lw=1.6, label="goal")
    axis.plot([], [], "D", color="white", mec="0.2", mew=0.8, ms=3.5, label="best")
    axis.axhline(1, color="0.4", lw=0.8, ls=":")
    axis.set_xticks(range(len(solvers)), solvers)
    axis.set_yscale("log")
    axis.set_ylim(0.8, None)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axis.yaxis.set_minor_formatter(lambda y, _: "")
    axis.set_title(case["case"], fontsize=11)
    axis.grid(axis="y", alpha=0.25)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
