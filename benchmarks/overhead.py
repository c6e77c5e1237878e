"""How much longer does a solve take than its evaluations of f, and a backward pass than its products with Jᵀ?

    python benchmarks/overhead.py [--quick] [--rounds N] [--peers WHEEL] [--out benchmarks/results]
    python benchmarks/overhead.py --redraw       # report and plot again, from the numbers of the last run

writes overhead.json, the raw times, and from it overhead.md and overhead.png. See README.md here for what is measured.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from layers import Layer, conv, dense
from overhead_report import best, overhead, write_plot, write_report
from peers import UNREACHABLE, Peers, old_torchdeq
from report import environment
from timing import Turn, clocked, load, operations, rounded, save, take_turns
from torchdeq import DEQ, GMRES, IFT, Anderson, Broyden, ConvergenceWarning, FixedPointIteration, Solver

ITERATIONS, FEWER = 20, 12  # of a solve; and of one that tells what an iteration more adds
#: By the name that both libraries share: ours, and the name in 0.1.0.
SOLVERS: dict[str, tuple[type[Solver], str]] = {
    "Picard": (FixedPointIteration, "fixed_point_iter"),
    "Anderson": (Anderson, "anderson"),
    "Broyden": (Broyden, "broyden"),
}
#: The ways of making our module.
MODULES: dict[str, dict[str, Any]] = {"ours, DEQ": {}, "ours, compiled": {"compile": True}}

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Contender:
    """A solver of a library. `make(f, iterations)` prepares a solve, which is not timed, and returns what is."""

    solver: str
    who: str
    make: Callable[[Map, int], Callable[[], Any]]

    @property
    def name(self) -> str:
        return f"{self.solver}, {self.who}"

    @property
    def compiled(self) -> bool:
        """Then nobody can count from outside, and the number of evaluations is what the library says."""
        return "compiled" in self.who


class Calls:
    """A layer that counts its calls, and the passes back through it to the state."""

    def __init__(self, layer: Layer):
        self.layer, self.forward, self.backward = layer, 0, 0

    def __call__(self, z: Tensor) -> Tensor:
        self.forward += 1
        return self.layer(_Noted.apply(z, self) if z.requires_grad else z)


class _Noted(torch.autograd.Function):
    """The identity, which notes when a gradient comes back."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, calls: Calls) -> Tensor:
        ctx.calls = calls
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.calls.backward += 1
        return grads[0], None


# Who takes part ------------------------------------------------------------------------------------------------------


def forward_contenders(layer: Layer, old: ModuleType | None, *, compiled: bool = False) -> list[Contender]:
    """Solves without derivatives, from 0. Each action returns how many evaluations were made, as it says."""
    z0 = torch.zeros_like(layer.x)
    found = []

    def theirs(name: str) -> Callable[[Map, int], Callable[[], Any]]:
        # Its modules call it without grad mode, as ours call themselves; left alone it would record a graph.
        solve = torch.no_grad()(old.solver.get_solver(name))  # type: ignore[union-attr]
        return lambda f, k: lambda: solve(f, z0, max_iter=k, tol=0.0)

    def solver(kind: type[Solver]) -> Callable[[Map, int], Callable[[], Any]]:
        return lambda f, k: lambda: kind(max_iter=k, tol=0.0)(f, z0).nfe

    def module(kind: type[Solver], options: dict[str, Any]) -> Callable[[Map, int], Callable[[], Any]]:
        deqs = {k: DEQ(kind(max_iter=k, tol=0.0), **options) for k in (ITERATIONS, FEWER)}

        def make(f: Map, k: int) -> Callable[[], Any]:
            @torch.no_grad()
            def solve() -> int:
                return deqs[k](f, z0)[1].nfe

            return solve

        return make

    for name, (kind, other) in SOLVERS.items():
        if old is not None:
            found.append(Contender(name, "0.1.0", theirs(other)))
        found.append(Contender(name, "ours", solver(kind)))
        found += [Contender(name, who, module(kind, options)) for who, options in ways(compiled).items()]
    return found


def backward_contenders(layer: Layer, old: ModuleType | None, *, compiled: bool = False) -> list[Contender]:
    """Backward passes at the solution. The forward pass before each has one evaluation and is not timed."""
    z0 = layer.solution
    once = FixedPointIteration(max_iter=1, tol=float("inf"))
    found = []

    def theirs(name: str) -> Callable[[Map, int], Callable[[], Any]]:
        options = {"f_max_iter": 1, "ift": True, "b_solver": name, "b_tol": 0.0, "b_stop_mode": "rel"}
        deqs = {k: old.get_deq(b_max_iter=k, **options) for k in (ITERATIONS, FEWER)}  # type: ignore[union-attr]
        return lambda f, k: deqs[k](f, z0)[0][0].square().mean().backward

    def ours(kind: type[Solver], options: dict[str, Any]) -> Callable[[Map, int], Callable[[], Any]]:
        said: list[int] = []
        options = {**options, "on_backward": lambda solution: said.append(solution.nfe)}
        deqs = {k: DEQ(once, IFT(solver=kind(max_iter=k, tol=0.0)), **options) for k in (ITERATIONS, FEWER)}

        def make(f: Map, k: int) -> Callable[[], Any]:
            loss = deqs[k](f, z0)[0].square().mean()

            def backward() -> int:
                loss.backward()
                return said.pop()

            return backward

        return make

    for name, (kind, other) in {**SOLVERS, "GMRES": (GMRES, "")}.items():
        if old is not None and other:
            found.append(Contender(name, "0.1.0", theirs(other)))
        found += [Contender(name, who, ours(kind, options)) for who, options in ways(compiled).items()]
    return found


def ways(compiled: bool) -> dict[str, dict[str, Any]]:
    """The ways of making our module that take part."""
    return {who: options for who, options in MODULES.items() if compiled or not options}


# What is measured ----------------------------------------------------------------------------------------------------


def pure_turns(layer: Layer) -> dict[str, Turn]:
    """What f itself costs, per call: an evaluation, a product with Jᵀ, a product that goes to the parameters.

    f gets its own output as in a solve, and so does the product.
    """
    at = layer.solution.clone().requires_grad_()
    image = layer(at)

    @torch.no_grad()
    def evaluations() -> None:
        z = layer.solution
        for _ in range(ITERATIONS):
            z = layer(z)

    def products() -> None:
        u = layer.x
        for _ in range(ITERATIONS):
            (u,) = torch.autograd.grad(image, at, u, retain_graph=True)

    def to_parameters() -> None:
        for _ in range(ITERATIONS):
            torch.autograd.grad(image, layer.parameters, layer.x, retain_graph=True)

    def per_call(action: Callable[[], None]) -> Turn:
        turn = clocked(lambda: action)
        return lambda: turn() / ITERATIONS

    actions = {"f": evaluations, "product": products, "parameters": to_parameters}
    return {name: per_call(action) for name, action in actions.items()}


def compiled_turn(layer: Layer) -> Turn:
    """What an evaluation costs by `torch.compile` of f alone; for reference, no overhead is a ratio to it."""
    f = torch.compile(lambda z: layer(z))

    @torch.no_grad()
    def evaluations() -> None:
        z = layer.solution
        for _ in range(ITERATIONS):
            z = f(z)

    evaluations()  # compiles, or raises
    turn = clocked(lambda: evaluations)
    return lambda: turn() / ITERATIONS


def operations_of_f(layer: Layer) -> dict[str, int]:
    """ATen operations of an evaluation, and of a product."""
    at = layer.solution.clone().requires_grad_()
    image = layer(at)
    return {
        "f": operations(lambda: layer(layer.solution)),
        "product": operations(lambda: torch.autograd.grad(image, at, layer.x)),
    }


def account(contender: Contender, layer: Layer, *, backward: bool) -> dict[str, Any]:
    """What is counted before anything is timed: calls, and the operations that an iteration adds beyond f's.

    Compiled, the first solve's seconds instead, in which it is compiled.
    """
    row: dict[str, Any] = {"solver": contender.solver, "who": contender.who}
    if contender.compiled:
        began = time.perf_counter()
        calls = contender.make(layer, ITERATIONS)()
        first = time.perf_counter() - began
        return {**row, "calls": calls, "operations": None, "first": first}

    def count(k: int) -> tuple[int, int]:
        contender.make(layer, k)()  # the first solve of a module that falls short looks for the reason
        seen = Calls(layer)
        action = contender.make(seen, k)
        seen.forward = seen.backward = 0
        action()
        return (seen.backward if backward else seen.forward), operations(contender.make(layer, k))

    (few, few_ops), (many, many_ops) = count(FEWER), count(ITERATIONS)
    own = operations_of_f(layer)["product" if backward else "f"]
    return {**row, "calls": many, "operations": (many_ops - few_ops) / (many - few) - own, "first": None}


def measure(layer: Layer, contenders: Sequence[Contender], rounds: int, *, backward: bool) -> dict[str, Any]:
    """A case: for each contender its account and its times, and the times of f in the same rounds."""
    title = f"{layer.name}, {'backward' if backward else 'forward'}"
    rows, failed, turns = {}, {}, pure_turns(layer)
    pure = list(turns)
    if not backward and any(c.compiled for c in contenders):
        try:
            turns["f, compiled"] = compiled_turn(layer)
            pure.append("f, compiled")
        except Exception as error:
            failed["f, compiled"] = first_line(error)
    for c in tqdm(contenders, desc=f"{title}, counting", leave=False, disable=None):
        try:
            rows[c.name] = account(c, layer, backward=backward)
        except Exception as error:
            if not c.compiled:
                raise
            failed[c.name] = first_line(error)  # what a compiler cannot do is a result
            continue
        turns[c.name] = clocked(lambda c=c: c.make(layer, ITERATIONS))
    seconds = rounded(take_turns(turns, rounds, title))
    for name, row in rows.items():
        row["seconds"] = seconds[name]
    case = {
        "case": layer.name,
        "backward": backward,
        "pure": {name: seconds[name] for name in pure},
        "rows": list(rows.values()),
        "failed": failed,
    }
    for row in rows.values():
        row["overhead"], row["overhead (best)"] = overhead(case, row).middle, best(case, row)
    return case


def first_line(error: Exception) -> str:
    """What an error says, in short."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:200]


def cases(quick: bool) -> list[tuple[Layer, int]]:
    """The layers, and how many rounds each needs for steady quartiles."""
    if quick:
        return [(dense(2, 8), 2), (conv(2, 3, 4), 2)]
    return [(dense(32, 64), 150), (dense(32, 512), 60), (conv(32, 16, 16), 30)]


def run(old: ModuleType | None, *, quick: bool, compiled: bool, rounds: int | None) -> list[dict[str, Any]]:
    """All cases, forward and backward."""
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # tol=0 asks for all iterations
        for layer, usual in cases(quick):
            for backward, contenders in ((False, forward_contenders), (True, backward_contenders)):
                who = contenders(layer, old, compiled=compiled)
                found.append(measure(layer, who, rounds or usual, backward=backward))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny layers, no peer, nothing compiled")
    parser.add_argument("--redraw", action="store_true", help="only the report and the plot")
    parser.add_argument(
        "--no-compile", action="store_true", help="without what torch.compile takes minutes for"
    )
    parser.add_argument("--rounds", type=int, help="turns of each contender (default: 30 to 150)")
    parser.add_argument("--peers", type=Path, nargs="*", default=[], help="a wheel of torchdeq 0.1.0")
    parser.add_argument("--out", type=Path, help="where to write (default: results/, or with --quick runs/)")
    args = parser.parse_args(argv)
    args.out = args.out or (Path("runs") if args.quick else Path(__file__).parent / "results")
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.redraw:
        torch.set_num_threads(1)
        old, missing = None, ["torchdeq 0.1.0: --quick"]
        if not args.quick:
            old, missing = found_old(args.peers)
        versions = {} if old is None else {"torchdeq (peer)": "0.1.0"}
        where = environment(Peers([], [], versions, missing))  # before the run, for the code that is loaded
        compiled = not (args.quick or args.no_compile)
        results = run(old, quick=args.quick, compiled=compiled, rounds=args.rounds)
        save(args.out / "overhead.json", {"circumstances": where, "cases": results})
    results = load(args.out / "overhead.json")
    print(write_report(args.out / "overhead.md", results))
    write_plot(args.out / "overhead.png", results)


def found_old(paths: Sequence[Path]) -> tuple[ModuleType | None, list[str]]:
    """torchdeq 0.1.0, or why there is none."""
    try:
        return old_torchdeq([path for path in paths if path.suffix == ".whl"]), []
    except UNREACHABLE as error:
        return None, [f"torchdeq 0.1.0: skipped, {error}"]


if __name__ == "__main__":
    main()
