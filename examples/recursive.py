"""Recursive reasoning on Sudoku: a small network with two states, its gradients, more steps than it was trained for.

    a round f:  z ← net(x + y + z)  n times,  y ← net(y + z);   a segment: T rounds, the last of them with a graph.

Puzzles of 4×4 and 6×6 are generated: no given can be left out, and the solution is the only one. Those that are tested
on have solutions that no relabelling makes one of training, and each batch of training is relabelled anew. One network
of one size is trained in six ways:

- *whole round*: deep supervision. The loss of a segment and a step of the optimiser, four times, each from where the
  last one ended; the gradient is that of a whole round (TRM). `Unroll(last=1)`.
- *one step*: the same, with the gradient of the last update of each state only (HRM). `tracked=1`.
- *recorded*: the four losses in one solve, by `record`, and one step of the optimiser.
- *end only*: as many rounds, one loss at their end.
- *equilibrium*: as many rounds of Anderson's method at most, implicit differentiation, one loss.
- *no recursion*: one update of z and one of y, from the beginning. At test time it can be made to go on from there.

All are tried at the same learning rates and trained for the same seconds of the processor; *equilibrium*, the slowest,
also until it has seen as many batches as *whole round*. The 6×6 puzzles are for all ways but *recorded*, at the
learning rates of 4×4.

Sources: Jolicoeur-Martineau (2025), Less is More: Recursive Reasoning with Tiny Networks (TRM), arXiv 2510.04871; Wang
et al. (2025), Hierarchical Reasoning Model (HRM), arXiv 2506.21734.

    python examples/recursive.py [--seed N | --seeds N N N] [--quick] [--solver S] [--grad G] [--device D] [--out D]

`--solver` and `--grad` are in the place of those of *equilibrium*.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from study import Claim, Measured, Options, Progress, Results, Study, clock
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from torchdeq import (
    DEQ,
    GMRES,
    IFT,
    Anderson,
    ConvergenceWarning,
    SimpleFixedPointIteration,
    Unroll,
)
from torchdeq.zoo.recursive import RecursiveReasoner, Thought

ROUNDS, SEGMENTS, INNER, WIDTH, BATCH = 3, 4, 3, 32, 32
LONGEST = 16  # segments, at test time
RATES = (5e-3, 1e-2, 2e-2)
CLOSE = 0.02  # of the puzzles, that counts as equal


class Sizes(NamedTuple):
    """How much is done."""

    seconds: Sequence[float] = (12.0, 24.0)  # of the processor, for a training on each grid
    trial: float = 2.0  # for trying a rate
    rates: Sequence[float] = RATES
    train: Sequence[int] = (1000, 500)  # puzzles of each grid
    test: Sequence[int] = (300, 200)
    segments: int = LONGEST


QUICK = Sizes((0.05, 0.05), 0.0, RATES[:1], (64, 8), (16, 4), SEGMENTS + 1)


# Puzzles --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """Of height·width rows and columns, in boxes of height × width; cells are numbered row by row."""

    height: int
    width: int

    @property
    def side(self) -> int:
        return self.height * self.width

    @property
    def cells(self) -> int:
        return self.side**2

    @cached_property
    def peers(self) -> list[list[int]]:
        """For each cell, those that must differ from it."""

        def units(i: int) -> tuple[tuple[int, ...], ...]:
            row, column = divmod(i, self.side)
            return (0, row), (1, column), (2, row // self.height, column // self.width)

        return [
            [j for j in range(self.cells) if j != i and set(units(i)) & set(units(j))]
            for i in range(self.cells)
        ]

    def __str__(self) -> str:
        return f"{self.side}×{self.side}"


SMALL, LARGE = GRIDS = (Grid(2, 2), Grid(2, 3))


def solutions(
    grid: Grid, cells: Sequence[int], most: int, draw: random.Random | None = None
) -> list[tuple[int, ...]]:
    """At most so many ways to fill the empty cells, which hold 0; in an order that is drawn."""
    if 0 not in cells:
        return [tuple(cells)]
    free = {
        i: sorted(set(range(1, grid.side + 1)) - {cells[j] for j in grid.peers[i]})
        for i, value in enumerate(cells)
        if value == 0
    }
    cell = min(free, key=lambda i: len(free[i]))
    found: list[tuple[int, ...]] = []
    if draw is not None:
        draw.shuffle(free[cell])
    for value in free[cell]:
        filled = [*cells[:cell], value, *cells[cell + 1 :]]
        found += solutions(grid, filled, most - len(found), draw)
        if len(found) >= most:
            break
    return found


def dig(grid: Grid, solution: Sequence[int], draw: random.Random) -> tuple[int, ...]:
    """A puzzle of which no given can be left out, with this solution alone."""
    puzzle = list(solution)
    for cell in draw.sample(range(grid.cells), grid.cells):
        puzzle[cell] = 0
        if len(solutions(grid, puzzle, 2)) > 1:
            puzzle[cell] = solution[cell]
    return tuple(puzzle)


def class_of(solution: Sequence[int]) -> tuple[int, ...]:
    """The solution with its first row relabelled to 1, 2, …: the same for all relabellings."""
    side = math.isqrt(len(solution))
    label = {value: i + 1 for i, value in enumerate(solution[:side])}
    return tuple(label[value] for value in solution)


@dataclass(frozen=True)
class Puzzles:
    """Puzzles (N, cells), with 0 where they are empty, and their solutions."""

    puzzles: Tensor
    solutions: Tensor

    def to(self, device: torch.device) -> Puzzles:
        return Puzzles(self.puzzles.to(device), self.solutions.to(device))

    def draw(self, count: int, generator: torch.Generator) -> Puzzles:
        """Some of them, each with its symbols exchanged at random."""
        rows = torch.randint(len(self.puzzles), (count,), generator=generator)
        symbols = int(self.solutions.max())
        label = 1 + torch.rand(count, symbols, generator=generator).argsort(dim=1)
        label = nn.functional.pad(label, (1, 0))  # what is empty stays so
        return Puzzles(label.gather(1, self.puzzles[rows]), label.gather(1, self.solutions[rows]))


def data(grid: Grid, seed: int, train: int, test: int) -> tuple[Puzzles, Puzzles]:
    """What to train and what to test on: every third class of solutions, as they come up, is for testing."""
    draw = random.Random(seed)
    tested: dict[tuple[int, ...], bool] = {}
    parts: tuple[list[Any], list[Any]] = ([], [])
    while len(parts[0]) < train or len(parts[1]) < test:
        (solution,) = solutions(grid, [0] * grid.cells, 1, draw)
        part = tested.setdefault(class_of(solution), len(tested) % 3 == 2)
        if len(parts[part]) < (train, test)[part]:
            parts[part].append((dig(grid, solution, draw), solution))
    return tuple(  # type: ignore[return-value]
        Puzzles(*(torch.tensor(column) for column in zip(*part, strict=True))) for part in parts
    )


# Training -------------------------------------------------------------------------------------------------------


def segment(rounds: int, *, record: Sequence[int] = ()) -> DEQ:
    """So many rounds, the last one with a graph."""
    return DEQ(SimpleFixedPointIteration(max_iter=rounds, tol=math.inf), Unroll(last=1), record=record)


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to train.

    Arguments:
        deq: of a call of the network in training.
        calls: of the network for a batch, each of them with a step of the optimiser and from where the last one ended.
        inner, tracked: see `RecursiveReasoner`.
        rounds: of a segment at test time.
    """

    deq: Callable[[Options], DEQ]
    calls: int = 1
    inner: int = INNER
    tracked: int | None = None
    rounds: int = ROUNDS

    def model(self, options: Options, grid: Grid = SMALL) -> RecursiveReasoner:
        return RecursiveReasoner(
            grid.cells,
            grid.side,
            self.deq(options),
            width=WIDTH,
            layers=1,
            inner=self.inner,
            tracked=self.tracked,
        ).to(options.device)


def equilibrium(options: Options) -> DEQ:
    solver = Anderson(max_iter=ROUNDS * SEGMENTS, tol=1e-2, stop_mode="rel")
    return options.deq(solver, IFT(solver=GMRES(max_iter=10, tol=1e-2)))


WAYS = {
    "whole round": Way(deq=lambda _: segment(ROUNDS), calls=SEGMENTS),
    "one step": Way(deq=lambda _: segment(ROUNDS), calls=SEGMENTS, tracked=1),
    "recorded": Way(
        deq=lambda _: segment(ROUNDS * SEGMENTS, record=range(ROUNDS, ROUNDS * SEGMENTS, ROUNDS))
    ),
    "end only": Way(deq=lambda _: segment(ROUNDS * SEGMENTS)),
    "equilibrium": Way(deq=equilibrium),
    "no recursion": Way(deq=lambda _: segment(1), inner=1, rounds=1),
}
WAYS_LARGE = tuple(name for name in WAYS if name != "recorded")
LEVEL = ("equilibrium",)  # also trained for as many batches as a whole round has seen


def loss_of(logits: Sequence[Tensor], solved: Tensor) -> Tensor:
    """The mean over the answers, in nats for a cell."""
    each = [cross_entropy(answer.flatten(0, 1), solved.flatten() - 1) for answer in logits]
    return torch.stack(each).mean()


class Run:
    """The training of a network in a way: so far, so many seconds and batches, and the loss at each step."""

    def __init__(self, way: Way, grid: Grid, part: Puzzles, rate: float, options: Options):
        torch.manual_seed(options.seed)
        self.way, self.part, self.rate, self.device = way, part, rate, options.device
        self.model = way.model(options, grid)
        self.generator = torch.Generator().manual_seed(options.seed)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1
        )
        self.losses: list[float] = []
        self.seconds, self.batches = 0.0, 0

    def until(self, seconds: float = 0.0, batches: int = 2) -> Run:
        """Go on until there were as many of both."""
        while self.seconds < seconds or self.batches < batches:
            batch, carry = self.part.draw(BATCH, self.generator).to(self.device), None
            began = clock(self.device)
            for _ in range(self.way.calls):
                for group in self.optimizer.param_groups:
                    group["lr"] = self.rate * min(1.0, (len(self.losses) + 1) / 20)
                logits, carry, _ = self.model(batch.puzzles, carry)
                loss = loss_of(logits, batch.solutions)
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.losses.append(loss.item())
            self.seconds += clock(self.device) - began
            self.batches += 1
        return self

    def loss(self, share: int) -> float:
        """The mean over the last step of so many."""
        last = self.losses[-max(1, len(self.losses) // share) :]
        return sum(last) / len(last)


@torch.no_grad()
def test(model: RecursiveReasoner, way: Way, part: Puzzles, options: Options, segments: int) -> Measured:
    """After each segment: the share of puzzles and of empty cells that are right, and how far a round moves."""
    part, carry = part.to(options.device), None
    keep, model.deq = model.deq, segment(way.rounds)
    curve: dict[str, list[float]] = {"solved": [], "cells": [], "moves": []}
    for _ in range(segments):
        (logits,), carry, _ = model(part.puzzles, carry)
        right = logits.argmax(dim=-1) + 1 == part.solutions
        curve["solved"].append(right.all(dim=-1).float().mean().item())
        curve["cells"].append(right[part.puzzles == 0].float().mean().item())
        curve["moves"].append(moved(model, part.puzzles, carry))
    model.deq = keep
    return curve


def moved(model: RecursiveReasoner, puzzles: Tensor, thought: Thought) -> float:
    """‖f(t) − t‖ / ‖f(t)‖ at t = (y, z), the mean over puzzles."""
    after = model.round(thought, model.embed(puzzles) + model.places)
    a, b = (torch.cat(tuple(t), dim=-1).flatten(1) for t in (thought, after))
    return ((b - a).norm(dim=1) / b.norm(dim=1)).mean().item()


@torch.no_grad()
def at_rest(model: RecursiveReasoner, part: Puzzles, options: Options) -> tuple[float, float]:
    """The solved share at what the equilibrium's own solver finds, and the share of its solves that converged."""
    part = part.to(options.device)
    (logits,), _, solution = model(part.puzzles)
    right = logits.argmax(dim=-1) + 1 == part.solutions
    return right.all(dim=-1).float().mean().item(), solution.converged.float().mean().item()


def measure(options: Options, progress: Progress) -> Measured:
    """Every way on each grid, for one seed."""
    found: Measured = {}
    sizes = QUICK if options.quick else Sizes()
    progress.begin(len(WAYS) + len(WAYS_LARGE) + 2)
    rates: dict[str, float] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the share that converged is in the table
        for i, grid in enumerate(GRIDS):
            learn, held = data(grid, options.seed, sizes.train[i], sizes.test[i])
            progress.step(f"{grid}: puzzles")
            found[f"{grid} givens"] = (held.puzzles > 0).sum(dim=1).double().mean().item()
            seen = 0
            for name in WAYS if grid == SMALL else WAYS_LARGE:
                way = WAYS[name]
                if grid == SMALL:
                    tried = {
                        rate: Run(way, grid, learn, rate, options).until(sizes.trial).loss(4)
                        for rate in sizes.rates
                    }
                    rates[name] = min(tried, key=lambda r: (math.isnan(tried[r]), tried[r]))
                run = Run(way, grid, learn, rates[name], options).until(sizes.seconds[i])
                key = f"{grid} {name}"
                found |= look(key, run, held, options, sizes)
                seen = seen or run.batches  # that of the first, a whole round
                if name in LEVEL and grid == SMALL:
                    found |= look(f"{key}, level", run.until(batches=seen), held, options, sizes)
                progress.step(f"{key}: {found[f'{key}: solved, trained']:.2f}")
    return found


def look(key: str, run: Run, held: Puzzles, options: Options, sizes: Sizes) -> Measured:
    """What has become of a training."""
    found: Measured = {
        f"{key}: rate": run.rate,
        f"{key}: steps": len(run.losses),
        f"{key}: batches": run.batches,
        f"{key}: seconds": run.seconds,
        f"{key}: loss": run.loss(10),
    }
    for what, values in test(run.model, run.way, held, options, sizes.segments).items():
        found[f"{key}: {what}, curve"] = values
        for when, at in (("first", 0), ("trained", SEGMENTS - 1), ("longest", sizes.segments - 1)):
            found[f"{key}: {what}, {when}"] = values[at]
    if run.way is WAYS["equilibrium"]:
        found[f"{key}: solved at rest"], found[f"{key}: converged"] = at_rest(run.model, held, options)
    return found


# What is claimed ------------------------------------------------------------------------------------------------


def solved(results: Results, grid: Grid, name: str, when: str = "trained") -> float:
    return results[f"{grid} {name}: solved, {when}"].mean


def cell(results: Results, grid: Grid, name: str, when: str = "trained") -> str:
    """The share that is solved, in per cent."""
    return results[f"{grid} {name}: solved, {when}"].cell(1, 100)


def verdict(shows: Sequence[bool], grids: Sequence[Grid]) -> bool | str:
    """Whether a claim shows on all grids, on none, or on which."""
    if len(set(shows)) == 1:
        return shows[0]
    return "on " + ", ".join(str(grid) for grid, one in zip(grids, shows, strict=True) if one) + " alone"


def more(
    text: str,
    paper: str,
    one: str,
    other: str,
    *,
    when: str = "trained",
    then: str = "trained",
    grids: Sequence[Grid] = GRIDS,
) -> Claim:
    """The claim that `one` solves more than `other`, by what does not count as equal, after `when` and `then`."""
    return Claim(
        text=text,
        paper=paper,
        ours=lambda r: "; ".join(
            f"{g}: {cell(r, g, one, when)} against {cell(r, g, other, then)}" for g in grids
        ),
        shows=lambda r: verdict(
            [solved(r, g, one, when) > solved(r, g, other, then) + CLOSE for g in grids], grids
        ),
    )


def at_best(results: Results, grid: Grid, name: str) -> float:
    """The better of what the equilibrium's solver finds and what as many plain rounds give."""
    return max(solved(results, grid, name), results[f"{grid} {name}: solved at rest"].mean)


def no_equilibrium(text: str, paper: str, name: str, grids: Sequence[Grid]) -> Claim:
    """The claim that whole rounds solve at least as much as implicit differentiation does."""
    return Claim(
        text=text,
        paper=paper,
        ours=lambda r: "; ".join(
            f"{g}: {cell(r, g, 'whole round')} against {cell(r, g, name)}, at its solver's state "
            f"{r[f'{g} {name}: solved at rest'].cell(1, 100)}; {r[f'{g} {name}: converged'].cell(0, 100)} % of its "
            "solves converged"
            for g in grids
        ),
        shows=lambda r: verdict([solved(r, g, "whole round") >= at_best(r, g, name) for g in grids], grids),
    )


CLAIMS = (
    more(
        "The gradient of a whole round is better than that of the last updates, %",
        "TRM: 87.4 against 56.5 (Sudoku-Extreme)",
        "whole round",
        "one step",
    ),
    more(
        "Deep supervision with a carry is better than one loss at the end, in equal time, %",
        "39 against 19 (ARC-AGI, HRM)",
        "whole round",
        "end only",
    ),
    more(
        "Recursion is better than a network as large without, that is called once, %",
        "TRM: 87.4 against 0.0 of direct prediction with 27 million parameters",
        "whole round",
        "no recursion",
        then="first",
    ),
    more(
        f"And than that network called {SEGMENTS} times, which is recursion without inner rounds, %",
        "not compared",
        "whole round",
        "no recursion",
    ),
    more(
        f"More segments at test time than the first help: {SEGMENTS} against 1, %",
        "HRM: accuracy grows with the segments that are allowed",
        "whole round",
        "whole round",
        then="first",
    ),
    more(
        f"And more than in training: {LONGEST} against {SEGMENTS}, %",
        "HRM: Sudoku-Extreme goes on to grow beyond the segments of training",
        "whole round",
        "whole round",
        when="longest",
    ),
    no_equilibrium(
        "No equilibrium is needed: a whole round against implicit differentiation, in equal time, %",
        "TRM: 'no fixed-point theorem required'; not compared",
        "equilibrium",
        GRIDS,
    ),
    no_equilibrium("The same after as many batches, %", "not compared", "equilibrium, level", (SMALL,)),
    Claim(
        text="After the steps of training it is not at rest: how far a round moves, relative",
        paper="TRM: the residual of HRM is clearly above 0 after its steps",
        ours=lambda r: "; ".join(
            f"{g}: {r[f'{g} whole round: moves, trained'].cell(3)} after {SEGMENTS} segments, "
            f"{r[f'{g} whole round: moves, longest'].cell(3)} after {LONGEST}"
            for g in GRIDS
        ),
        shows=lambda r: verdict([r[f"{g} whole round: moves, trained"].mean > 1e-2 for g in GRIDS], GRIDS),
    ),
)


def tables(results: Results) -> Sequence[tuple[str, Sequence[Sequence[str]]]]:
    """All ways on each grid."""
    found = []
    for grid in GRIDS:
        head = ["way", "rate", "seconds", "batches", "steps", "training loss", "solved: 1", f"{SEGMENTS}"]
        rows = [[*head, f"{LONGEST}", "empty cells right", "moves"]]
        for name in [n for way in WAYS for n in (way, f"{way}, level") if f"{grid} {n}: rate" in results]:
            at = f"{grid} {name}"
            rows.append(
                [
                    name.replace("level", "as many batches"),
                    ", ".join(f"{rate:g}" for rate in sorted(set(results[f"{at}: rate"].values))),
                    *(f"{results[f'{at}: {what}'].mean:.0f}" for what in ("seconds", "batches", "steps")),
                    results[f"{at}: loss"].cell(),
                    *(cell(results, grid, name, when) for when in ("first", "trained", "longest")),
                    results[f"{at}: cells, trained"].cell(1, 100),
                    results[f"{at}: moves, trained"].cell(3),
                ]
            )
        converged = results[f"{grid} equilibrium: converged"].cell(0, 100)
        title = (
            f"{grid}, {results[f'{grid} givens'].mean:.1f} givens: puzzles solved after 1, {SEGMENTS} and {LONGEST} "
            f"segments, %; {converged} % of the equilibria converged"
        )
        found.append((title, rows))
    return found


def draw(figure: Any, found: Sequence[Measured]) -> None:
    """Puzzles solved on each grid, and how far a round moves, by segments: the mean over seeds, and each one."""
    axes = figure.subplots(1, 3)
    panels = (
        (SMALL, "solved", f"puzzles solved, {SMALL}"),
        (LARGE, "solved", f"puzzles solved, {LARGE}"),
        (LARGE, "moves", f"relative residual of a round, {LARGE}"),
    )
    for ax, (grid, what, title) in zip(axes, panels, strict=True):
        for i, name in enumerate(WAYS):
            curves = [one[key] for one in found if (key := f"{grid} {name}: {what}, curve") in one]
            if not curves:
                continue
            at = range(1, len(curves[0]) + 1)
            if len(curves) > 1:
                for curve in curves:
                    ax.plot(at, curve, color=f"C{i}", lw=0.5, alpha=0.5)
            mean = [sum(v) / len(v) for v in zip(*curves, strict=True)]
            ax.plot(at, mean, "o-", ms=3, color=f"C{i}", label=name)
        ax.axvline(SEGMENTS, color="grey", ls=":", lw=1)
        ax.set(xlabel="segments at test time (dotted: in training)")
        ax.set_title(title, fontsize=9)
        ax.set_ylim(-0.02, 1.02) if what == "solved" else ax.set_yscale("log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)


STUDY = Study(
    name="recursive",
    title="Recursive reasoning with a small network",
    source="Jolicoeur-Martineau, Less is More: Recursive Reasoning with Tiny Networks, 2025, arXiv 2510.04871; Wang et "
    "al., Hierarchical Reasoning Model, 2025, arXiv 2506.21734.",
    replaces="--solver and --grad are those of the equilibrium.",
    smaller=(
        "Sudoku of 4×4 and 6×6 in which no given can be left out, rather than Sudoku-Extreme of 9×9; tested on "
        f"solutions of other classes than those trained on; {Sizes().train[0]} and {Sizes().train[1]} puzzles to train "
        f"on, relabelled, and {Sizes().test[0]} and {Sizes().test[1]} to test.",
        f"One mixer layer of width {WIDTH}, n = {INNER} updates, T = {ROUNDS} rounds, {SEGMENTS} segments in training; "
        "TRM has two layers of width 512, n = 6, T = 3 and up to 16.",
        f"{Sizes().seconds[0]:g} and {Sizes().seconds[1]:g} seconds of the processor for each training, rather than "
        "days; no moving average of the weights, no learned halting.",
        "Equal seconds are neither equal steps of the optimiser nor equal batches: the tables say how many. The "
        f"learning rate is the best of {', '.join(f'{rate:g}' for rate in RATES)} after {Sizes().trial:g} seconds on "
        "4×4, for each way.",
        f"{100 * CLOSE:g} points count as equal: with {Sizes().test[0]} puzzles one is a third of a point, and the "
        "spread over seeds is larger.",
        "The paper's network without recursion is a transformer of 27 million parameters; here it is the same network.",
        "'One step' is TRM's network with HRM's gradient; HRM has two networks.",
    ),
    claims=CLAIMS,
    measure=measure,
    tables=tables,
    draw=draw,
)

main = STUDY.main

if __name__ == "__main__":
    raise SystemExit(main())
