"""The report of benchmarks/training.py: what a training step takes, and how that compares with the goals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from report import grid
from timing import Spread, ratios

COLOURS = {
    "ours": "#0072b2",
    "ours, compiled": "#d55e00",
    "0.1.0": "#9aa5b1",
    "jaxopt": "#5c8a5a",
    "optimistix": "#b79bc4",
}
#: Speed-ups over 0.1.0 with solvers of the same names that are aimed at, at least.
SAME_NAMES = {
    "32×64": {"Picard": 3.0, "Anderson": 3.0, "Broyden": 3.0},
    "32×512": {"Picard": 1.2, "Anderson": 2.0, "Broyden": 3.0},
    "128×512": {"Picard": 1.2, "Anderson": 2.0, "Broyden": 3.0},
}
#: Our time over that of jaxopt's fastest setting, at most.
JAXOPT = {
    "32×64": {"ours": 4.0, "ours, compiled": 1.3},
    "32×512": {"ours": 1.0, "ours, compiled": 1.0},
    "128×512": {"ours": 1.0, "ours, compiled": 1.0},
}
DEFAULTS = ("Anderson, GMRES", "default")

Row = Mapping[str, Any]


class Comparison(NamedTuple):
    """Two settings of one case, and what their ratio should be."""

    what: str
    ratio: Spread
    goal: float
    at_least: bool

    @property
    def met(self) -> bool:
        return self.ratio.middle >= self.goal if self.at_least else self.ratio.middle <= self.goal

    def cells(self) -> list[str]:
        sign = "≥" if self.at_least else "≤"
        return [self.what, self.ratio.cell(), f"{sign} {self.goal:g}", "met" if self.met else "**missed**"]


def comparisons(case: Mapping[str, Any]) -> Iterator[Comparison]:
    """What the goals speak of, where the settings took part."""
    rows = {row["name"]: row for row in case["rows"] if row["seconds"] and not row["slow"]}

    def fastest(group: str) -> Row | None:
        members = (row for row in rows.values() if row["group"] == group)
        return min(members, key=lambda row: median(row["seconds"]), default=None)

    def against(mine: Row, other: Row) -> Spread:
        return ratios(mine["seconds"], other["seconds"])

    groups = [group for group in ("ours", "ours, compiled") if fastest(group)]
    for name, goal in SAME_NAMES.get(case["case"], {}).items():
        for group in groups:
            mine, old = rows.get(f"{group} {name}"), rows.get(f"0.1.0 {name}")
            if mine and old:
                yield Comparison(f"0.1.0 {name} / {mine['name']}", against(old, mine), goal, True)
    peer = fastest("jaxopt")
    for group, goal in JAXOPT.get(case["case"], {}).items():
        mine = fastest(group)
        if mine and peer:
            yield Comparison(f"{mine['name']} / {peer['name']}", against(mine, peer), goal, False)
    old = fastest("0.1.0")
    for group in groups:
        for name in DEFAULTS:
            mine = rows.get(f"{group} {name}")
            if mine and old:
                yield Comparison(f"{mine['name']} / {old['name']}", against(mine, old), 1.0, False)


def alone_of(case: Mapping[str, Any], row: Row) -> float:
    """What the calls of f and the products of a step would take by themselves, in our f: the limit."""
    pure = {name: median(seconds) for name, seconds in case["pure"].items()}
    return row["calls"] * pure["f"] + row["products"] * pure["product"] + pure["parameters"]


def table(case: Mapping[str, Any]) -> list[str]:
    """A row for each setting that arrived, from the fastest; then why others did not."""
    there = sorted((r for r in case["rows"] if r["seconds"]), key=lambda r: median(r["seconds"]))
    lines = []
    for row in there:
        time = (
            f"about {1e3 * median(row['seconds']):.0f}"
            if row["slow"]
            else Spread.of(row["seconds"]).cell(1e3)
        )
        forward, adjoint = row["reached"]
        alone = f"{1e3 * alone_of(case, row):.3g}" if row["calls"] else "–"
        calls = [("–" if row[key] is None else str(row[key])) for key in ("calls", "products")]
        tols = [f"{row[key]:.1e}" for key in ("tol", "b_tol")]
        lines.append([row["name"], time, alone, *calls, f"{forward:.1e}", f"{adjoint:.1e}", *tols])
    head = [
        "setting",
        "ms",
        "of it f",
        "calls of f",
        "products",
        "residual",
        "adjoint residual",
        "tol",
        "adjoint tol",
    ]
    failed = [f"- {row['name']}: {row['failed']}" for row in case["rows"] if row["failed"]]
    return [*grid(head, lines), *(["", "Not in the table:", "", *failed] if failed else [])]


def write_report(path: Path, results: Mapping[str, Any]) -> str:
    """Write it, and return its text."""
    lines = [
        "# A training step",
        "",
        "Written by `benchmarks/training.py`; `benchmarks/README.md` says what is measured. The raw times are in",
        "`training.json`.",
        "",
        *results["circumstances"],
        "",
        "![Time of a training step](training.png)",
        "",
        "z = tanh(W z + U x + b), L = mean z², batch × size, float32: forward and backward. Each setting has the",
        "loosest tolerances with which both relative residuals, measured in float64 from what it returns, are at most",
        f"{results['goal']:g} for every sample. Median and quartiles of a setting's turns; *about*: a slow one, of few",
        "turns. *of it f*: its calls of f and products with Jᵀ by themselves, timed in the same rounds.",
        "",
    ]
    missed = []
    for case in results["cases"]:
        lines += [f"## {case['case']}", "", f"{case['rounds']} rounds.", "", *table(case), ""]
        if found := list(comparisons(case)):
            head = ["ratio of times", "median (quartiles)", "goal", ""]
            lines += ["### Goals", "", *grid(head, [one.cells() for one in found]), ""]
            missed += [f"- {case['case']}: {' '.join(one.cells()[:3])}" for one in found if not one.met]
    if any(list(comparisons(case)) for case in results["cases"]):
        lines += ["## Goals missed", "", *(missed or ["None."]), ""]
    described = {row["name"]: row["describe"] for case in results["cases"] for row in case["rows"]}
    busy = max((row["processor"] for case in results["cases"] for row in case["rows"]), default=0.0)
    lines += [
        "## Settings",
        "",
        *grid(["setting", "what it is"], [list(item) for item in described.items()]),
        "",
    ]
    if busy:
        lines += [f"The process of jax took at most {busy:.2f} seconds of processor time in a second.", ""]
    text = "\n".join(lines).rstrip() + "\n"
    path.write_text(text, encoding="utf-8")
    return text


def write_plot(path: Path, results: Mapping[str, Any]) -> None:
    """Medians and quartiles of milliseconds, one panel for each case, the fastest on top."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    cases: Sequence[Mapping[str, Any]] = results["cases"]
    most = max(sum(1 for row in case["rows"] if row["seconds"]) for case in cases)
    figure, axes = plt.subplots(
        1, len(cases), figsize=(5.4 * len(cases), 0.25 * most + 1.6), layout="constrained", squeeze=False
    )
    for axis, case in zip(axes[0], cases, strict=True):
        rows = sorted((r for r in case["rows"] if r["seconds"]), key=lambda r: median(r["seconds"]))
        spreads = [Spread.of([1e3 * s for s in row["seconds"]]) for row in rows]
        places = range(len(rows))
        for place, row, spread in zip(places, rows, spreads, strict=True):
            colour = COLOURS[row["group"]]
            axis.hlines(place, spread.low, spread.high, color=colour, lw=5, alpha=0.35)
            axis.plot(spread.middle, place, "o", color=colour, ms=6)
            axis.annotate(
                f"{spread.middle:.3g}",
                (spread.high, place),
                xytext=(7, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        axis.set_yticks(places, [row["name"] for row in rows], fontsize=8)
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.set_xscale("log")
        axis.margins(x=0.15)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axis.xaxis.set_minor_formatter(lambda x, _: "")
        for tick, row in zip(axis.get_yticklabels(), rows, strict=True):
            tick.set_fontweight("bold" if row["group"].startswith("ours") else "normal")
        axis.set_xlabel("ms for a step")
        axis.set_title(case["case"], fontsize=11)
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    groups = [g for g in COLOURS if any(row["group"] == g for case in cases for row in case["rows"])]
    handles = [plt.Line2D([], [], marker="o", ls="", color=COLOURS[group]) for group in groups]
    figure.legend(handles, groups, loc="outside lower center", ncols=len(groups), frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
