"""How many evaluations do solvers need? Ours and other libraries' on the same maps, at equal measured residual.

    python benchmarks/solvers.py [--quick] [--seeds N] [--out benchmarks/results] [--peers PATH ...]

writes solvers.md and solvers.png. See README.md here for what is counted and how.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from peers import Method, Peers, find_peers
from problems import Adjoint, Problem, adjoint_rows, forward_rows
from record import Record, count, curves_of, worst
from report import Table, environment, write_plot, write_report
from torchdeq import (
    CGNR,
    GMRES,
    RRE,
    SQUAREM,
    AffineMap,
    Anderson,
    BiCGSTAB,
    Broyden,
    FixedPointIteration,
    Multisecant,
    Neumann,
    NewtonKrylov,
    Solver,
)

FORWARD_LEVELS = (1e-2, 1e-3, 1e-5)
ADJOINT_LEVELS = (1e-2, 1e-4, 1e-8)
HARD = 3  # times as many maps in hard rows, whose counts hang on rounding
FORWARD = (
    Multisecant(),
    FixedPointIteration(),
    Anderson(),
    Anderson(m=10),
    Anderson(type=1, m=10),
    Broyden(),
    Broyden(kind="bad"),
    Broyden(m=10),
    SQUAREM(),
    RRE(),
    NewtonKrylov(),
)
ADJOINT = (
    GMRES(),
    Multisecant(),
    Anderson(m=6),
    Broyden(kind="bad"),
    GMRES(m=10),
    BiCGSTAB(),
    CGNR(),
    Neumann(),
)


def solve_forward(solver: Solver, problem: Problem) -> Tensor:
    """Each sample's best residual after each evaluation, (N, B), as a `Record` saw it.

    NewtonKrylov's products with J are no calls of f. So its curve is its own trace, in which each product repeats the
    residual before it.
    """
    # The smallest level is what a user would ask for; a little less, so that rounding cannot come between.
    solver = solver.replace(tol=0.99 * FORWARD_LEVELS[-1], stop_mode="rel", max_iter=problem.cap)
    record = Record(problem.f, cap=problem.cap, goal=0.0)
    solution = solver(record, problem.z0)
    if isinstance(solver, NewtonKrylov):
        return curves_of([solution.rel_trace.cummin(dim=0).values])
    return curves_of([record.best])


def solve_adjoint(solver: Solver, problem: Adjoint, levels: Sequence[float]) -> list[float]:
    """Products that a solve to each tolerance makes, the last of which measures the residual of what is returned."""
    counts = []
    for level in levels:
        solution = solver.replace(tol=level, stop_mode="abs", max_iter=problem.cap).run(
            AffineMap(problem.vjp, problem.g)
        )
        arrived = bool((problem.residual(solution.z) <= level * (1 + 1e-6)).all())
        counts.append(solution.nfe if arrived else math.inf)
    return counts


def ours(solvers: Sequence[Solver], solve: Callable[..., Any]) -> list[Method]:
    return [
        Method(repr(s).removesuffix("()"), f"`{s!r}`", "ours", functools.partial(solve, s)) for s in solvers
    ]


def jobs(seeds: int, quick: bool) -> tuple[list[tuple[int, Problem]], list[Adjoint]]:
    """All maps of both tables, the forward ones with their seeds."""
    hard_seeds = seeds if quick else HARD * seeds
    forward = [(seed, p) for seed in range(hard_seeds) for p in forward_rows(seed, quick=quick)]
    forward = [(seed, p) for seed, p in forward if p.hard or seed < seeds]
    return forward, [p for seed in range(seeds) for p in adjoint_rows(seed, quick=quick)]


def run(
    *, quick: bool, seeds: int, peers: Peers
) -> tuple[Table, Table, Table, dict[tuple[str, Method], list[float]]]:
    """The tables (forward; its hard rows sample by sample; adjoint), and the forward curves of seed 0."""
    forward = Table("Forward", FORWARD_LEVELS, ours(FORWARD, solve_forward) + peers.forward)
    single = Table("Forward, sample by sample", FORWARD_LEVELS, forward.methods)
    adjoint = Table("Adjoint", ADJOINT_LEVELS, ours(ADJOINT, solve_adjoint) + peers.adjoint)
    maps, matrices = jobs(seeds, quick)
    curves = {}
    total = len(maps) * len(forward.methods) + len(matrices) * len(adjoint.methods)
    with tqdm(total=total, unit="solve", mininterval=1) as bar, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of solves that do not converge, which the tables show
        for (seed, problem), method in itertools.product(maps, forward.methods):
            bar.set_postfix_str(f"{problem.name}, {method.name}", refresh=False)
            samples = method.run(problem)
            curve = worst(samples)
            forward.add(problem, method, [count(curve, level) for level in FORWARD_LEVELS])
            if problem.hard:
                for sample in samples.T.tolist():
                    single.add(problem, method, [count(sample, level) for level in FORWARD_LEVELS])
            if seed == 0:
                curves[problem.name, method] = curve
            bar.update()
        for problem, method in itertools.product(matrices, adjoint.methods):
            bar.set_postfix_str(f"{problem.name}, {method.name}", refresh=False)
            adjoint.add(problem, method, method.run(problem, ADJOINT_LEVELS))
            bar.update()
    return forward, single, adjoint, curves


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="one seed, tiny maps, no peers: a test that it runs"
    )
    parser.add_argument("--seeds", type=int, default=5, help="how many random maps per row (default: 5)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="where to write")
    parser.add_argument(
        "--peers",
        type=Path,
        nargs="+",
        default=[],
        metavar="PATH",
        help="a wheel of torchdeq 0.1.0, or folders in which peers are installed; by default the wheel comes from "
        "the package index and the others from this environment",
    )
    args = parser.parse_args(argv)
    seeds = 1 if args.quick else args.seeds
    peers = Peers([], [], {}, ["all: --quick"]) if args.quick else find_peers(args.peers, FORWARD_LEVELS[-1])
    torch.set_num_threads(1)
    circumstances = environment(peers)
    forward, single, adjoint, curves = run(quick=args.quick, seeds=seeds, peers=peers)
    args.out.mkdir(parents=True, exist_ok=True)
    write_report(args.out / "solvers.md", forward, single, adjoint, circumstances)
    write_plot(args.out / "solvers.png", forward, curves)


if __name__ == "__main__":
    main()
