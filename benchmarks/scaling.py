"""What does a solver add to an evaluation of f, by batch, size, iterations and history; and where does it not matter?

    python benchmarks/scaling.py [--quick] [--minutes M] [--out benchmarks/results]
    python benchmarks/scaling.py --redraw        # fit, report and plot again, from the numbers of the last run

writes scaling.json, the raw numbers, and from it scaling.md and scaling.png. See README.md here for what is measured.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from peers import Peers
from report import environment
from scaling_report import write_plot, write_report
from timing import load, save
from torchdeq import GMRES, AffineMap, Anderson, Broyden, FixedPointIteration, Multisecant, Solver

BATCHES = (1, 8, 32, 128, 512)
SIZES = (64, 256, 1024, 4096, 16384, 65536)
ITERATIONS = (5, 20, 50, 200)
HISTORIES = (2, 5, 10, 20)
#: Numbers that a history may have: what is larger does not fit into the memory of a laptop twice.
LARGEST = 2**26
#: B·D·K·(1 + h), which the time of a solve goes with, and B·K·h³, where small systems are solved: some seconds each.
LONGEST, LONGEST_SMALL = 2e8, 2e10
#: The largest W of the layer that overheads are compared with; beyond it the layer's time is extrapolated.
LARGEST_LAYER = 4096


class Cell(NamedTuple):
    """One point of the study. `m` is None for a method without a history, or with one that grows."""

    solver: str
    m: int | None
    batch: int
    size: int
    iterations: int

    @property
    def history(self) -> float:
        """Differences or basis vectors that an iteration works with, in the mean over the solve."""
        k = self.iterations
        if self.solver == "Picard":
            return 0.0
        return sum(min(i, self.m or k) for i in range(k)) / k

    @property
    def small(self) -> float:
        """The mean of the third powers, as a solve with a matrix of that order takes."""
        k = self.iterations
        return (
            0.0 if self.solver in ("Picard", "GMRES") else sum(min(i, self.m or k) ** 3 for i in range(k)) / k
        )

    def solve(self) -> Callable[[], int]:
        """A solve of exactly so many evaluations, of a map whose own time is small."""
        map_, z0 = shifted(self.batch, self.size)
        options: dict[str, Any] = {"max_iter": self.iterations, "tol": 0.0, "patience": 0}
        if self.solver == "GMRES":
            system, gmres = AffineMap(map_.linear, map_.x), GMRES(max_iter=self.iterations, tol=0.0)
            return lambda: gmres.run(system, together=False).nfe
        solver = KINDS[self.solver](**options, **({} if self.m is None else {"m": self.m}))
        return lambda: solver.run(map_, z0, together=False).nfe


KINDS: dict[str, type[Solver]] = {
    "Picard": FixedPointIteration,
    "Anderson": Anderson,
    "Broyden": Broyden,
    "Multisecant": Multisecant,
    "GMRES": GMRES,
}


class Shift(NamedTuple):
    """f(z) = 0.99 · (z, each sample turned by one place) + x.

    Its eigenvalues are spread over a circle of radius 0.99, so that no method arrives in few iterations, or learns
    that it has nothing to do.
    """

    x: Tensor

    def linear(self, z: Tensor) -> Tensor:
        return torch.roll(z, 1, dims=1).mul_(0.99)

    def __call__(self, z: Tensor) -> Tensor:
        return self.linear(z).add_(self.x)


def shifted(batch: int, size: int) -> tuple[Shift, Tensor]:
    """The map and a start."""
    generator = torch.Generator().manual_seed(0)
    return Shift(torch.randn(batch, size, generator=generator)), torch.zeros(batch, size)


def cells(quick: bool) -> Iterator[Cell]:
    """The study: all batches and sizes at 20 iterations and m = 5, and from there along the other two axes."""
    batches, sizes = ((1, 3), (8, 16)) if quick else (BATCHES, SIZES)
    iterations, histories = ((4, 6), (2, 3)) if quick else (ITERATIONS, HISTORIES)
    usual, m = (6, 3) if quick else (20, 5)
    for solver in KINDS:
        default = m if solver == "Anderson" else None
        for batch in batches:
            for size in sizes:
                few = batch in batches[::2] and size in sizes[::2]
                yield Cell(solver, default, batch, size, usual)
                if few:
                    yield from (Cell(solver, default, batch, size, k) for k in iterations if k != usual)
                if few and solver == "Anderson":
                    # More iterations, so that a long history is full for most of them.
                    yield from (Cell(solver, h, batch, size, 3 * usual) for h in histories)


def fits(cell: Cell) -> bool:
    """Whether its memory and its time can be afforded."""
    most = 1 if cell.solver == "Picard" else min(cell.m or cell.iterations, cell.iterations)
    numbers = cell.batch * cell.size
    small = cell.batch * cell.iterations * cell.small <= LONGEST_SMALL
    return (
        small and 2 * most * numbers <= LARGEST and numbers * cell.iterations * (1 + cell.history) <= LONGEST
    )


def measure(cell: Cell, seconds: float) -> dict[str, Any]:
    """The cell with what an evaluation takes in a solve, and alone; medians of repeats within these seconds."""
    map_, z = shifted(cell.batch, cell.size)
    f = map_.linear if cell.solver == "GMRES" else map_
    solve = cell.solve()
    calls = solve()

    def alone() -> None:
        state = z
        for _ in range(calls):
            state = f(state)

    alone()
    solves, evaluations = [], []
    end = time.perf_counter() + seconds
    while len(solves) < 3 or (time.perf_counter() < end and len(solves) < 200):
        for action, into in ((solve, solves), (alone, evaluations)):
            began = time.perf_counter()
            action()
            into.append((time.perf_counter() - began) / calls)
    beyond = statistics.median(a - b for a, b in zip(solves, evaluations, strict=True))
    row = cell._asdict() | {
        "history": cell.history,
        "small": cell.small,
        "calls": calls,
        "repeats": len(solves),
    }
    return row | {"solve": statistics.median(solves), "f": statistics.median(evaluations), "beyond": beyond}


def layer_times(quick: bool, seconds: float) -> list[dict[str, Any]]:
    """What an evaluation of tanh(W z + x) takes, by batch and size; `solve` and `beyond` are not in these rows."""
    rows = []
    batches, sizes = ((1, 3), (8, 16)) if quick else (BATCHES, SIZES)
    for size in (size for size in sizes if size <= LARGEST_LAYER):
        w = torch.randn(size, size) * (0.5 * size**-0.5)
        for batch in batches:
            z = x = torch.randn(batch, size)
            times: list[float] = []
            end = time.perf_counter() + seconds
            while len(times) < 5 or (time.perf_counter() < end and len(times) < 400):
                began = time.perf_counter()
                z = torch.tanh(z @ w.T + x)
                times.append(time.perf_counter() - began)
            rows.append({"batch": batch, "size": size, "f": statistics.median(times[1:])})
    return rows


@torch.no_grad()
def run(*, quick: bool, minutes: float) -> dict[str, Any]:
    """The study, in an order drawn at random, so that a machine that warms up tilts no axis."""
    chosen = [cell for cell in cells(quick) if fits(cell)]
    random.Random(0).shuffle(chosen)
    each = 60 * minutes / (len(chosen) + 60)
    rows = [measure(cell, each) for cell in tqdm(chosen, desc="scaling", leave=False, disable=None)]
    return {
        "layer": layer_times(quick, each),
        "rows": sorted(rows, key=lambda row: list(map(str, row.values()))),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny states: a test that it runs")
    parser.add_argument("--redraw", action="store_true", help="only the fit, the report and the plot")
    parser.add_argument("--minutes", type=float, default=8.0, help="how long to measure, about (default: 8)")
    parser.add_argument("--out", type=Path, help="where to write (default: results/, or with --quick runs/)")
    args = parser.parse_args(argv)
    args.out = args.out or (Path("runs") if args.quick else Path(__file__).parent / "results")
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.redraw:
        torch.set_num_threads(1)
        where = environment(Peers([], [], {}, []))
        found = run(quick=args.quick, minutes=0.02 if args.quick else args.minutes)
        save(args.out / "scaling.json", {"circumstances": where, **found})
    results = load(args.out / "scaling.json")
    print(write_report(args.out / "scaling.md", results))
    write_plot(args.out / "scaling.png", results)


if __name__ == "__main__":
    main()
