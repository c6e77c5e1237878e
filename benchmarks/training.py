"""A whole training step of z = tanh(W z + U x + b): ours, torchdeq 0.1.0, jaxopt and optimistix, at equal residual.

    python benchmarks/training.py [--quick] [--rounds N] [--peers WHEEL] [--jax-python PATH] [--out benchmarks/results]
    python benchmarks/training.py --redraw       # report and plot again, from the numbers of the last run

writes training.json, the raw times, and from it training.md and training.png. See README.md here for what is measured.
"""

from __future__ import annotations

import argparse
import functools
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from jax_peer import JaxError, JaxPeer, python_with_jax
from layers import Step
from overhead import SOLVERS, Calls, first_line, found_old, pure_turns
from peers import Peers
from report import environment
from timing import Turn, clocked, load, rounded, save, take_turns
from torchdeq import DEQ, GMRES, IFT, Anderson, ConvergenceWarning, Multisecant, Solver
from training_report import write_plot, write_report

GOAL = 1e-5  # relative residual, of the forward and of the adjoint solve, of the worst sample
MOST = 100  # evaluations
SLOW = (
    20  # a setting of jax that takes so many times as long as the fastest takes few turns, after the others
)
LONGEST = 2.0  # seconds; a step that takes longer is not looked at further

#: Solves z = f(z) from z0, with its derivative.
Layer = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


@dataclass(frozen=True)
class Setting:
    """A library with its solvers; `layer(tol, b_tol)` makes the layer. One of jax has none and goes by its name."""

    name: str
    group: str
    describe: str
    layer: Callable[[float, float], Layer] | None = None
    like: str | None = (
        None  # takes the tolerances of this setting, as looking for them would compile each time
    )


def ours(forward: type[Solver], backward: type[Solver], **options: Any) -> Callable[[float, float], Layer]:
    def layer(tol: float, b_tol: float) -> Layer:
        adjoint = IFT(solver=backward(tol=b_tol, stop_mode="abs", max_iter=MOST))
        deq = DEQ(forward(tol=tol, stop_mode="rel", max_iter=MOST), adjoint, **options)
        return lambda f, z0: deq(f, z0)[0]

    return layer


def theirs(old: ModuleType, name: str) -> Callable[[float, float], Layer]:
    def layer(tol: float, b_tol: float) -> Layer:
        deq = old.get_deq(
            ift=True,
            f_solver=name,
            b_solver=name,
            f_tol=tol,
            b_tol=b_tol,
            f_stop_mode="rel",
            b_stop_mode="rel",
            f_max_iter=MOST,
            b_max_iter=MOST,
        )
        return lambda f, z0: deq(f, z0)[0][0]

    return layer


def settings(old: ModuleType | None, jax: JaxPeer | None, *, compiled: bool = False) -> list[Setting]:
    """Everybody who takes part."""
    found = []
    if old is not None:
        for name, (_, other) in SOLVERS.items():
            text = f"`get_deq(ift=True, f_solver='{other}', b_solver='{other}', f_stop_mode='rel', b_stop_mode='rel')`"
            found.append(Setting(f"0.1.0 {name}", "0.1.0", text, theirs(old, other)))
    pairs = {name: (kind, kind) for name, (kind, _) in SOLVERS.items()}
    pairs |= {"Anderson, GMRES": (Anderson, GMRES), "default": (Multisecant, GMRES)}
    for group, options in {"ours": {}, **({"ours, compiled": {"compile": True}} if compiled else {})}.items():
        for name, (forward, backward) in pairs.items():
            extra = ", compile=True" if options else ""
            text = f"`DEQ({forward.__name__}(stop_mode='rel'), IFT(solver={backward.__name__}()){extra})`"
            made = ours(forward, backward, **options)
            found.append(Setting(f"{group} {name}", group, text, made, f"ours {name}" if options else None))
    if jax is not None:
        found += [Setting(name, name.partition(" ")[0], text) for name, text in jax.settings.items()]
    return found


class TooSlow(JaxError):  # noqa: N818 - it is how a setting ends, and reports no error of ours
    """A step takes so long that it is no contender."""


# A step, and what it reaches ----------------------------------------------------------------------------------------


def take(step: Step, layer: Layer) -> None:
    """Forward, loss, backward."""
    for parameter in step.parameters:
        parameter.grad = None
    c = step.injection
    layer(lambda z: step.f(c, z), torch.zeros_like(step.x)).square().mean().backward()


def residuals(step: Step, layer: Layer) -> tuple[float, float]:
    """Of the state and of the adjoint state, measured; see `Step.residuals`."""
    c = step.injection
    z = layer(lambda z: step.f(c, z), torch.zeros_like(step.x))
    (c_grad,) = torch.autograd.grad(z.square().mean(), c)
    return step.residuals(z, c_grad, at_image=True)


def counts(step: Step, layer: Layer) -> tuple[int, int]:
    """Calls of f, the tracked ones too, and products with Jᵀ."""
    c = step.injection
    calls = Calls(functools.partial(step.f, c))
    layer(calls, torch.zeros_like(step.x)).square().mean().backward()
    return calls.forward, calls.backward


def loosest(reached: Callable[[float], float], probes: int = 7) -> float:
    """The largest tolerance with which at most `GOAL` is reached: decade by decade, then by bisection.

    Raises:
        JaxError: with none. A tolerance that is beyond the precision may make a solver break down, so that the
            smallest is not tried first.
    """
    why = f"does not reach {GOAL:g}"

    def arrives(exponent: float) -> bool:
        nonlocal why
        try:
            return reached(10.0**exponent) <= GOAL
        except TooSlow:
            raise
        except JaxError as error:
            why = str(error)
            return False

    low = next((float(exponent) for exponent in range(-2, -9, -1) if arrives(exponent)), None)
    if low is None:
        raise JaxError(why)
    high = low + 1
    for _ in range(probes):
        middle = (low + high) / 2
        low, high = (middle, high) if arrives(middle) else (low, middle)
    return 10**low


def tolerances(measured: Callable[[float, float], tuple[float, float]]) -> tuple[float, float]:
    """The loosest tolerances, forward and adjoint, with which the measured residuals are what is asked for."""
    tol = loosest(lambda t: measured(t, 1e-3)[0])
    return tol, loosest(lambda t: measured(tol, t)[1])


# A case ---------------------------------------------------------------------------------------------------------------


def account(
    step: Step, setting: Setting, jax: JaxPeer | None, known: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """A setting's tolerances, and what is reached with them, by how many evaluations."""
    row = {"name": setting.name, "group": setting.group, "describe": setting.describe, "failed": None}
    compiled = setting.like is not None

    asked = 0

    def measured(tol: float, b_tol: float) -> tuple[float, float]:
        nonlocal asked
        if setting.layer is not None:
            return residuals(step, setting.layer(tol, b_tol))
        assert jax is not None
        began = time.perf_counter()
        found = jax.residuals(step, setting.name, tol, b_tol)
        took, asked = time.perf_counter() - began, asked + 1
        if asked > 1 and took > LONGEST:  # the first step is also compiled
            raise TooSlow(f"a step takes {took:.1f} s")
        return found

    try:
        like = next((one for one in known if one["name"] == setting.like), None)
        tol, b_tol = (like["tol"], like["b_tol"]) if like else tolerances(measured)
        reached = measured(tol, b_tol)
    except Exception as error:
        if not (compiled or isinstance(error, JaxError)):
            raise
        return {**row, "failed": str(error) if isinstance(error, JaxError) else first_line(error)}
    calls = products = None
    if setting.layer is not None and not compiled:
        calls, products = counts(step, setting.layer(tol, b_tol))
    return {**row, "tol": tol, "b_tol": b_tol, "reached": reached, "calls": calls, "products": products}


def case(
    batch: int, n: int, rounds: int, old: ModuleType | None, jax: JaxPeer | None, *, compiled: bool
) -> dict[str, Any]:
    """All settings on one problem: first what each needs for equal residuals, then their times, in turn."""
    step, title = Step.make(batch, n), f"{batch}×{n}"
    if jax is not None:
        jax.prepare(step)
    rows: list[dict[str, Any]] = []
    turns: dict[str, Turn] = {}
    processor: dict[str, list[float]] = {}
    for setting in tqdm(settings(old, jax, compiled=compiled), desc=title, leave=False, disable=None):
        row = account(step, setting, jax, rows)
        rows.append(row)
        if row["failed"]:
            continue
        if setting.layer is None:
            assert jax is not None
            processor[setting.name] = []
            turns[setting.name] = jax.turn(setting.name, row["tol"], row["b_tol"], processor[setting.name])
        else:
            action = functools.partial(take, step, setting.layer(row["tol"], row["b_tol"]))
            turns[setting.name] = clocked(lambda action=action: action)
    once = {name: min(turn(), turn()) for name, turn in turns.items()}
    slow = [name for name in processor if once[name] > SLOW * min(once.values())]
    pure = pure_turns(step.layer)
    seconds = take_turns(
        pure | {name: turn for name, turn in turns.items() if name not in slow}, rounds, title
    )
    if slow:
        seconds |= take_turns({name: turns[name] for name in slow}, 3, f"{title}, slow", warm=0)
    seconds = rounded(seconds)
    for row in rows:
        row["seconds"] = seconds.get(row["name"])
        row["slow"] = row["name"] in slow
        row["processor"] = max(processor.get(row["name"], [0.0]))
    return {"case": title, "rounds": rounds, "pure": {name: seconds[name] for name in pure}, "rows": rows}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tiny layer, no peers, nothing compiled")
    parser.add_argument("--redraw", action="store_true", help="only the report and the plot")
    parser.add_argument(
        "--no-compile", action="store_true", help="without what torch.compile takes minutes for"
    )
    parser.add_argument("--rounds", type=int, help="turns of each setting (default: 20 to 60)")
    parser.add_argument("--peers", type=Path, nargs="*", default=[], help="a wheel of torchdeq 0.1.0")
    parser.add_argument("--jax-python", type=Path, help="an interpreter with jax, jaxopt and optimistix")
    parser.add_argument("--out", type=Path, help="where to write (default: results/, or with --quick runs/)")
    args = parser.parse_args(argv)
    args.out = args.out or (Path("runs") if args.quick else Path(__file__).parent / "results")
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.redraw:
        torch.set_num_threads(1)
        with ExitStack() as stack:
            old, jax, missing = None, None, ["all peers: --quick"]
            if not args.quick:
                old, missing = found_old(args.peers)
                try:
                    jax = stack.enter_context(JaxPeer(python_with_jax(args.jax_python)))
                except JaxError as error:
                    missing.append(f"jaxopt, optimistix: skipped, {error}")
            versions = {} if old is None else {"torchdeq (peer)": "0.1.0"}
            where = environment(Peers([], [], versions | (jax.versions if jax else {}), missing))
            shapes = [(2, 8, 2)] if args.quick else [(32, 64, 60), (32, 512, 30), (128, 512, 20)]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # in the search for tolerances
                compiled = not (args.quick or args.no_compile)
                cases = [
                    case(batch, n, args.rounds or rounds, old, jax, compiled=compiled)
                    for batch, n, rounds in shapes
                ]
        save(args.out / "training.json", {"circumstances": where, "goal": GOAL, "cases": cases})
    results = load(args.out / "training.json")
    print(write_report(args.out / "training.md", results))
    write_plot(args.out / "training.png", results)


if __name__ == "__main__":
    main()
