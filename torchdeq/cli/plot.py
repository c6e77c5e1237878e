"""The picture of a run: how it learnt, and how its test set converges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from torchdeq.cli.errors import need

INK, GREY, BLUE, ORANGE = "#1f2933", "#7b8794", "#1f6fb2", "#d9601a"
STYLE = {
    "font.size": 13,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 2.5,
}


def plot_run(
    path: Path,
    *,
    title: str,
    history: Sequence[Mapping[str, float]],
    traces: Mapping[str, Tensor],
    tol: float,
) -> None:
    """Draw loss and accuracy per epoch beside the residual of the test set per evaluation.

    Arguments:
        path: the PNG to write.
        title: over the panels.
        history: of `Run`.
        traces: relative residual at each evaluation, (N, B), by the solver's name. The first is drawn with its
            spread over samples.
        tol: the tolerance at evaluation.
    """
    matplotlib, figures = need("matplotlib"), need("matplotlib.figure")
    with matplotlib.rc_context(STYLE):
        figure = figures.Figure(figsize=(12, 5.4), dpi=150, layout="constrained")
        panels = figure.subplot_mosaic([["loss", "solve"], ["test", "solve"]], width_ratios=[1, 1.35])
        figure.suptitle(title, fontsize=17, fontweight="bold", x=0.01, ha="left")
        _per_epoch(panels["loss"], [h["loss"] for h in history], "training loss", "{:.3f}", ORANGE)
        _plain_log_scale(panels["loss"].yaxis)
        panels["loss"].sharex(panels["test"])
        panels["loss"].tick_params(labelbottom=False)
        _per_epoch(panels["test"], [h["test_accuracy"] for h in history], "test accuracy", "{:.4f}", BLUE)
        panels["test"].set_xlabel("epoch")
        panels["test"].xaxis.get_major_locator().set_params(integer=True)
        _solve(panels["solve"], traces, tol)
        figure.savefig(path, format="png")


def _per_epoch(axes: Any, values: Sequence[float], label: str, form: str, colour: str) -> None:
    axes.plot(range(1, len(values) + 1), values, color=colour, marker="o", markersize=5)
    axes.set_title(label, loc="left", color=colour)
    axes.set_title(form.format(values[-1]), loc="right", color=colour, fontweight="bold")
    axes.grid(axis="y", alpha=0.25)


def _plain_log_scale(axis: Any) -> None:
    """Logarithmic, with ticks such as 0.05 rather than 5 × 10⁻²."""
    ticker = need("matplotlib.ticker")
    axis.axes.set_yscale("log")
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(ticker.NullLocator())


def _solve(axes: Any, traces: Mapping[str, Tensor], tol: float) -> None:
    for i, (name, trace) in enumerate(traces.items()):
        at, middle = range(1, len(trace) + 1), trace.median(dim=1).values
        if i:
            axes.plot(at, middle, color=GREY, linestyle="--", label=f"{name}, median")
            continue
        axes.plot(at, middle, color=BLUE, label=f"{name}, median")
        low, high = trace.amin(dim=1), trace.amax(dim=1)
        everyone = f"{name}, all {trace.shape[1]} samples"
        axes.fill_between(at, low, high, color=BLUE, alpha=0.2, linewidth=0, label=everyone)
    axes.axhline(tol, color=ORANGE, linewidth=1.8, linestyle=":", label=f"tolerance {tol:g}")
    axes.set_yscale("log")
    axes.set_title("test samples on the way to their equilibrium", loc="left")
    axes.set_xlabel("evaluations of f")
    axes.set_ylabel("relative residual  ‖f(z) − z‖ / ‖f(z)‖")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.margins(x=0)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
