"""The report of benchmarks/scaling.py: a model of what a solver adds to an evaluation, and where it does not matter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import nnls

from report import grid

Row = Mapping[str, Any]

#: What an evaluation adds beyond f, in seconds, is a sum of these with coefficients that are not negative.
TERMS = {
    "a solve / K": lambda r: 1 / r["iterations"],
    "an evaluation": lambda r: 1.0,
    "B·D": lambda r: r["batch"] * r["size"],
    "h·B·D": lambda r: r["history"] * r["batch"] * r["size"],
    "B·h": lambda r: r["batch"] * r["history"],
    "B·h³": lambda r: r["batch"] * r["small"],
}
UNITS = {"a solve / K": (1e6, "µs"), "an evaluation": (1e6, "µs")}  # the others in nanoseconds
#: Tensors of more bytes than that are given back to the kernel and fetched again each time, which no sum describes.
KEPT = 2**25
SHARES = (0.5, 0.1)  # of the time of f
COLOURS = {
    "Picard": "#e6a000",
    "Anderson": "#0072b2",
    "Broyden": "#009e73",
    "Multisecant": "#d55e00",
    "GMRES": "#b0609a",
}


class Model(NamedTuple):
    """Seconds that a solver adds to an evaluation."""

    coefficients: dict[str, float]
    error: tuple[float, float]  # of the fit: the median and the nine in ten of |model / measured − 1|

    def __call__(self, row: Row) -> float:
        return sum(value * TERMS[name](row) for name, value in self.coefficients.items())


class LayerModel(NamedTuple):
    """Seconds of tanh(W z + x): a call, each of B·D numbers, each of D² weights, each of B·D² products."""

    coefficients: Sequence[float]
    error: tuple[float, float]

    @staticmethod
    def terms(row: Row) -> list[float]:
        batch, size = row["batch"], row["size"]
        return [1.0, batch * size, size**2, batch * size**2]

    def __call__(self, row: Row) -> float:
        return sum(c * t for c, t in zip(self.coefficients, self.terms(row), strict=True))


def fit(terms: Sequence[Sequence[float]], values: Sequence[float]) -> tuple[list[float], tuple[float, float]]:
    """Coefficients of at least 0 of least squares in the relative error, and that error.

    Arguments:
        terms: for each measurement its terms.
        values: the measurements, all positive.
    """
    rows = np.array(terms, dtype=float) / np.array(values, dtype=float)[:, None]
    scale = np.where(rows.any(axis=0), rows.max(axis=0), 1.0)
    found, _ = nnls(rows / scale, np.ones(len(rows)))
    coefficients = found / scale
    off = np.abs(rows @ coefficients - 1)
    return coefficients.tolist(), (float(np.median(off)), float(np.quantile(off, 0.9)))


def models(results: Mapping[str, Any]) -> dict[str, Model]:
    """By solver."""
    found = {}
    for solver in COLOURS:
        # Where f takes nearly all, the difference of two times is noise.
        rows = [r for r in results["rows"] if r["solver"] == solver and r["beyond"] > 0.02 * r["solve"]]
        rows = [r for r in rows if 4 * r["batch"] * r["size"] < KEPT]
        coefficients, error = fit(
            [[term(r) for term in TERMS.values()] for r in rows], [r["beyond"] for r in rows]
        )
        found[solver] = Model(dict(zip(TERMS, coefficients, strict=True)), error)
    return found


def layer_model(results: Mapping[str, Any]) -> LayerModel:
    rows = results["layer"]
    return LayerModel(*fit([LayerModel.terms(r) for r in rows], [r["f"] for r in rows]))


def vanishes(model: Model, layer: LayerModel, example: Row, share: float) -> float:
    """The size D from which on the model is below this share of the layer's time, at the example's batch; inf if it is
    not below at D = 10⁶. Powers of 2^¼ are tried, from the largest."""
    found = math.inf
    for exponent in range(80, 15, -1):
        row = {**example, "size": 2 ** (exponent / 4)}
        if model(row) > share * layer(row):
            break
        found = row["size"]
    return found


def example(results: Mapping[str, Any], solver: str) -> dict[str, Any]:
    """A row of the solver with the usual iterations and history."""
    usual = _usual(results, solver)
    return dict(usual[0])


def _usual(results: Mapping[str, Any], solver: str) -> list[Row]:
    """The rows of a solver that differ in batch and size only: those with its commonest iterations and history."""
    rows = [r for r in results["rows"] if r["solver"] == solver]
    kinds = [(r["iterations"], r["m"]) for r in rows]
    usual = max(set(kinds), key=kinds.count)
    return sorted(
        (r for r in rows if (r["iterations"], r["m"]) == usual), key=lambda r: (r["batch"], r["size"])
    )


def _size(value: float) -> str:
    if math.isinf(value):
        return "–"
    return "always" if value <= 2**4 else f"{value:.2g}" if value < 100 else f"{round(value, -1):.0f}"


def write_report(path: Path, results: Mapping[str, Any]) -> str:
    """Write it, and return its text."""
    found, layer = models(results), layer_model(results)
    batches = sorted({r["batch"] for r in results["rows"]})
    rows = results["rows"]

    def reach(key: str) -> str:
        values = sorted({r[key] for r in rows if r[key] is not None})
        return f"{values[0]} … {values[-1]}"

    lines = [
        "# What a solver adds to an evaluation",
        "",
        "Written by `benchmarks/scaling.py`; `benchmarks/README.md` says what is measured. The raw numbers are in",
        "`scaling.json`.",
        "",
        *results["circumstances"],
        f"- float32; {len(rows)} cells: B {reach('batch')}, D {reach('size')}, K {reach('iterations')}, "
        f"m {reach('m')}",
        "",
        "![Overhead by size](scaling.png)",
        "",
        "Dots are measured, hollow where the time of the layer is extrapolated; lines are the models below.",
        "",
        "## The model",
        "",
        "Of the time that a solve of K evaluations takes beyond f, per evaluation: the sum of the terms in the head,",
        "each times its coefficient. h is the mean number of differences, or of basis vectors, that an iteration works",
        "with. The first two coefficients are in µs, the others in ns; – is 0. *error*: |model / measured − 1|, the",
        "median and what nine in ten are within. States of 32 MiB and more are left out: the allocator gives them back",
        "to the kernel and fetches them again at every operation, which takes longer than the operation.",
        "",
    ]
    table = []
    for solver, model in found.items():
        cells = []
        for name, value in model.coefficients.items():
            scale = 1e6 if name in UNITS else 1e9
            cells.append("–" if value == 0 else f"{scale * value:.3g}")
        table.append([solver, *cells, f"{model.error[0]:.0%}, {model.error[1]:.0%}"])
    lines += grid(["solver", *TERMS, "error"], table)
    a, b, c, d = layer.coefficients
    lines += [
        "",
        f"The layer tanh(W z + x): {1e6 * a:.3g} µs + {1e9 * b:.3g} ns·B·D + {1e9 * c:.3g} ns·D² + "
        f"{1e9 * d:.3g} ns·B·D², error {layer.error[0]:.0%}, {layer.error[1]:.0%}. It is measured up to D = "
        f"{max(r['size'] for r in results['layer'])}.",
        "",
        "## Where it does not matter",
        "",
        f"The D from which on a solver adds less than {SHARES[0]:.0%} / {SHARES[1]:.0%} of the time of that layer, by",
        "both models; – is not up to a million.",
        "",
    ]
    table = []
    for solver, model in found.items():
        usual = example(results, solver)
        cells = []
        for batch in batches:
            at = {**usual, "batch": batch}
            cells.append(" / ".join(_size(vanishes(model, layer, at, share)) for share in SHARES))
        history = "" if usual["m"] is None else f", m = {usual['m']}"
        table.append([f"{solver}, K = {usual['iterations']}{history}", *cells])
    lines += grid(["solver", *(f"B = {batch}" for batch in batches)], table)
    lines += [
        "",
        "## Measured",
        "",
        "µs that an evaluation takes beyond f, at the K and m of the table above.",
        "",
    ]
    sizes = sorted({r["size"] for r in rows})
    for batch in batches:
        table = []
        for solver in found:
            at = {r["size"]: r["beyond"] for r in _usual(results, solver) if r["batch"] == batch}
            table.append([solver, *(f"{1e6 * at[s]:.3g}" if s in at else "–" for s in sizes)])
        lines += [*grid([f"B = {batch}", *(f"D = {s}" for s in sizes)], table), ""]
    text = "\n".join(lines).rstrip() + "\n"
    path.write_text(text, encoding="utf-8")
    return text


def write_plot(path: Path, results: Mapping[str, Any]) -> None:
    """What is added over the time of the layer, by size: dots measured, lines the model; one panel for each batch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found, layer = models(results), layer_model(results)
    batches = sorted({r["batch"] for r in results["rows"]})
    batches = [batches[0], batches[len(batches) // 2], batches[-1]] if len(batches) > 2 else batches
    known = {(r["batch"], r["size"]): r["f"] for r in results["layer"]}
    figure, axes = plt.subplots(
        1, len(batches), figsize=(4.6 * len(batches), 4.6), sharey=True, layout="constrained", squeeze=False
    )
    for axis, batch in zip(axes[0], batches, strict=True):
        for solver, model in found.items():
            usual = _usual(results, solver)
            first, last = min(r["size"] for r in usual), max(r["size"] for r in usual)
            line = [first * (last / first) ** (i / 60) for i in range(61)]
            at = [{**usual[0], "batch": batch, "size": size} for size in line]
            colour = COLOURS[solver]
            axis.plot(line, [model(r) / layer(r) for r in at], color=colour, lw=1.6, label=solver)
            here = [r for r in usual if r["batch"] == batch]
            dots = [(r["size"], r["beyond"] / known.get((batch, r["size"]), layer(r))) for r in here]
            filled = [(batch, size) in known for size, _ in dots]
            faces = [colour if full else "white" for full in filled]
            axis.scatter(*zip(*dots, strict=True), s=22, color=faces, edgecolors=colour, zorder=3)
        for share in SHARES:
            axis.axhline(share, color="0.35", lw=0.9, ls=":")
            axis.annotate(
                f"{share:.0%}",
                (1.0, share),
                xycoords=("axes fraction", "data"),
                fontsize=8,
                ha="right",
                va="bottom",
            )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axis.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        axis.set_xlabel("D, the size of a sample")
        axis.set_title(f"batch {batch}", fontsize=11)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("time beyond f / time of tanh(W z + x)")
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(found), frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
