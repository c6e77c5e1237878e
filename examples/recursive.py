"""Recursive reasoning on Sudoku: a small network with two states, its gradients, more steps than it was trained for.

    a round f:  z ← net(x + y + z)  n times,  y ← net(y + z);   a segment: T rounds, the last of them with a graph.

Puzzles of 4×4 are generated: no given can be left out, and the solution is the only one. Those that are tested on have
solutions that no relabelling makes one of training. One network of one size is trained in six ways:

- *whole round*: deep supervision. The loss of a segment and a step of the optimiser, four times, each from where the
  last one ended; the gradient is that of a whole round (TRM). `Unroll(last=1)`.
- *one step*: the same, with the gradient of the last update of each state only (HRM). `tracked=1`.
- *recorded*: the four losses in one solve, by `record`, and one step of the optimiser.
- *end only*: as many rounds, one loss at their end.
- *equilibrium*: as many rounds of Anderson's method at most, implicit differentiation, one loss.
- *no recursion*: one update of z and one of y, from the beginning. At test time it can be made to go on from there.

All are tried at the same learning rates and trained for the same seconds of the processor.

Sources: Jolicoeur-Martineau (2025), Less is More: Recursive Reasoning with Tiny Networks (TRM), arXiv 2510.04871; Wang
et al. (2025), Hierarchical Reasoning Model (HRM), arXiv 2506.21734.

    python examples/recursive.py [--seed N | --seeds N N N] [--quick] [--solver S] [--grad G] [--device D] [--out D]

`--solver` and `--grad` are in the place of those of *equilibrium*.
"""

from __future__ import annotations

import math
import random
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from study import Claim, Measured, Options, Progress, Results, Study
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

SIDE, BOX = 4, 2
ROUNDS, SEGMENTS, INNER, WIDTH, BATCH = 3, 4, 3, 32, 32
LONGEST = 16  # segments, at test time
RATES = (5e-3, 1e-2, 2e-2)
SECONDS, TRIAL = 6.0, 1.0  # of the processor, for a training and for trying a rate


# Puzzles --------------------------------------------------------------------------------------------------------

PEERS = [
    [
        j
        for j in range(SIDE**2)
        if j != i
        and (
            i // SIDE == j // SIDE
            or i % SIDE == j % SIDE
            or (i // SIDE // BOX == j // SIDE // BOX and i % SIDE // BOX == j % SIDE // BOX)
        )
    ]
    for i in range(SIDE**2)
]


def solutions(cells: Sequence[int], most: int, draw: random.Random | None = None) -> list[tuple[int, ...]]:
    """At most so many ways to fill the empty cells, which hold 0; in an order that is drawn."""
    if 0 not in cells:
        return [tuple(cells)]
    free = {
        i: sorted(set(range(1, SIDE + 1)) - {cells[j] for j in PEERS[i]})
        for i, value in enumerate(cells)
        if value == 0
    }
    cell = min(free, key=lambda i: len(free[i]))
    found: list[tuple[int, ...]] = []
    if draw is not None:
        draw.shuffle(free[cell])
    for value in free[cell]:
        filled = [*cells[:cell], value, *cells[cell + 1 :]]
        found += solutions(filled, most - len(found), draw)
        if len(found) >= most:
            break
    return found


def make_puzzle(draw: random.Random) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A puzzle of which no given can be left out, and its only solution."""
    (solution,) = solutions([0] * SIDE**2, 1, draw)
    puzzle = list(solution)
    for cell in draw.sample(range(SIDE**2), SIDE**2):
        puzzle[cell] = 0
        if len(solutions(puzzle, 2)) > 1:
            puzzle[cell] = solution[cell]
    return tuple(puzzle), solution


def class_of(solution: Sequence[int]) -> tuple[int, ...]:
    """The solution with its first row relabelled to 1, 2, …: the same for all relabellings, of which there are 12."""
    label = {value: i + 1 for i, value in enumerate(solution[:SIDE])}
    return tuple(label[value] for value in solution)


@dataclass(frozen=True)
class Puzzles:
    """Puzzles (N, cells), with 0 where they are empty, and their solutions."""

    puzzles: Tensor
    solutions: Tensor

    def to(self, device: torch.device) -> Puzzles:
        return Puzzles(self.puzzles.to(device), self.solutions.to(device))

    def some(self, rows: Tensor) -> Puzzles:
        return Puzzles(self.puzzles[rows], self.solutions[rows])


def data(seed: int, train: int, test: int) -> tuple[Puzzles, Puzzles]:
    """What to train and what to test on: 8 and 4 of the 12 classes of solutions, drawn."""
    draw = random.Random(seed)
    classes = sorted({class_of(s) for s in solutions([0] * SIDE**2, 10**6)})
    held = set(draw.sample(classes, len(classes) // 3))
    parts: tuple[list[Any], list[Any]] = ([], [])
    while len(parts[0]) < train or len(parts[1]) < test:
        puzzle = make_puzzle(draw)
        parts[class_of(puzzle[1]) in held].append(puzzle)
    made = []
    for part, count in zip(parts, (train, test), strict=True):
        puzzles, solved = zip(*part[:count], strict=True)
        made.append(Puzzles(torch.tensor(puzzles), torch.tensor(solved)))
    return made[0], made[1]


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

    def model(self, options: Options) -> RecursiveReasoner:
        return RecursiveReasoner(
            SIDE**2, SIDE, self.deq(options), width=WIDTH, layers=1, inner=self.inner, tracked=self.tracked
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


def clock(device: torch.device) -> float:
    """Seconds: of the processor, which other programs do not lengthen; of the wall with an accelerator."""
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


def loss_of(logits: Sequence[Tensor], solved: Tensor) -> Tensor:
    """The mean over the answers, in nats for a cell."""
    each = [cross_entropy(answer.flatten(0, 1), solved.flatten() - 1) for answer in logits]
    return torch.stack(each).mean()


def train(
    way: Way, part: Puzzles, rate: float, seconds: float, options: Options
) -> tuple[RecursiveReasoner, list[float]]:
    """The network after so many seconds, and its loss at each step of the optimiser."""
    torch.manual_seed(options.seed)
    model, generator = way.model(options), torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    losses: list[float] = []
    spent = 0.0
    while spent < seconds or len(losses) < 2 * way.calls:
        rows = torch.randint(len(part.puzzles), (BATCH,), generator=generator)
        batch, carry = part.some(rows).to(options.device), None
        began = clock(options.device)
        for _ in range(way.calls):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (len(losses) + 1) / 20)
            logits, carry, _ = model(batch.puzzles, carry)
            loss = loss_of(logits, batch.solutions)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        spent += clock(options.device) - began
    return model, losses


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
    """Every way, for one seed."""
    found: Measured = {}
    quick = options.quick
    seconds, trial, rates = (0.05, 0.0, RATES[:1]) if quick else (SECONDS, TRIAL, RATES)
    learn, held = data(options.seed, 64 if quick else 1000, 16 if quick else 300)
    segments = SEGMENTS + 1 if quick else LONGEST
    progress.begin(len(WAYS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the share that converged is in the table
        for name, way in WAYS.items():
            tried = {}
            for rate in rates:
                losses = train(way, learn, rate, trial, options)[1]
                tried[rate] = sum(losses[-len(losses) // 4 :]) / len(losses[-len(losses) // 4 :])
            rate = min(tried, key=lambda r: (math.isnan(tried[r]), tried[r]))
            model, losses = train(way, learn, rate, seconds, options)
            curve = test(model, way, held, options, segments)
            found[f"{name}: rate"] = rate
            found[f"{name}: steps"] = len(losses)
            found[f"{name}: loss"] = sum(losses[-len(losses) // 10 :]) / len(losses[-len(losses) // 10 :])
            for what, values in curve.items():
                found[f"{name}: {what}, curve"] = values
                for when, at in (("first", 0), ("trained", SEGMENTS - 1), ("longest", segments - 1)):
                    found[f"{name}: {what}, {when}"] = values[at]
            if name == "equilibrium":
                found["equilibrium: solved at rest"], found["equilibrium: converged"] = at_rest(
                    model, held, options
                )
            progress.step(f"{name}: {found[f'{name}: solved, trained']:.2f}")
    return found


# What is claimed ------------------------------------------------------------------------------------------------


def solved(results: Results, name: str, when: str = "trained") -> float:
    return results[f"{name}: solved, {when}"].mean


def two(one: str, other: str, when: str = "trained") -> Callable[[Results], str]:
    """Both shares, in per cent; that of the other one after the segments that `when` says."""

    def cell(results: Results) -> str:
        return " against ".join(
            results[f"{name}: solved, {at}"].cell(1, 100) for name, at in ((one, "trained"), (other, when))
        )

    return cell


def share_at_rest(results: Results) -> float:
    """The better of what the equilibrium's solver finds and what as many plain rounds give."""
    return max(solved(results, "equilibrium"), results["equilibrium: solved at rest"].mean)


CLAIMS = (
    Claim(
        text="The gradient of a whole round is better than that of the last updates, %",
        paper="TRM: 87.4 against 56.5 (Sudoku-Extreme)",
        ours=two("whole round", "one step"),
        shows=lambda r: solved(r, "whole round") > solved(r, "one step"),
    ),
    Claim(
        text="Deep supervision with a carry is better than one loss at the end, %",
        paper="39 against 19 (ARC-AGI, HRM)",
        ours=two("whole round", "end only"),
        shows=lambda r: solved(r, "whole round") > solved(r, "end only"),
    ),
    Claim(
        text="Recursion is better than a network as large without, that is called once, %",
        paper="TRM: 87.4 against 0.0 of direct prediction with 27 million parameters",
        ours=two("whole round", "no recursion", "first"),
        shows=lambda r: solved(r, "whole round") > solved(r, "no recursion", "first"),
    ),
    Claim(
        text=f"And than that network called {SEGMENTS} times, which is recursion without inner rounds, %",
        paper="not compared",
        ours=two("whole round", "no recursion"),
        shows=lambda r: solved(r, "whole round") > solved(r, "no recursion"),
    ),
    Claim(
        text="More segments at test time than the first help, %",
        paper="HRM: accuracy grows with the segments that are allowed",
        ours=lambda r: ", ".join(
            f"{n}: {r[f'whole round: solved, {when}'].cell(1, 100)}"
            for n, when in ((1, "first"), (SEGMENTS, "trained"), ("most", "longest"))
        ),
        shows=lambda r: solved(r, "whole round") > solved(r, "whole round", "first"),
    ),
    Claim(
        text=f"And more than in training: {LONGEST} rather than {SEGMENTS}, %",
        paper="HRM: Sudoku-Extreme goes on to grow beyond the segments of training",
        ours=lambda r: (
            f"{r['whole round: solved, longest'].cell(1, 100)} against "
            f"{r['whole round: solved, trained'].cell(1, 100)}"
        ),
        shows=lambda r: solved(r, "whole round", "longest") > solved(r, "whole round"),
    ),
    Claim(
        text="No equilibrium is needed: a whole round against implicit differentiation, %",
        paper="TRM: 'no fixed-point theorem required'; not compared",
        ours=lambda r: (
            f"{r['whole round: solved, trained'].cell(1, 100)} against "
            f"{r['equilibrium: solved, trained'].cell(1, 100)}, at its solver's state "
            f"{r['equilibrium: solved at rest'].cell(1, 100)}"
        ),
        shows=lambda r: solved(r, "whole round") >= share_at_rest(r),
    ),
    Claim(
        text="After the steps of training it is not at rest: how far a round moves, relative",
        paper="TRM: the residual of HRM is clearly above 0 after its steps",
        ours=lambda r: (
            f"{r['whole round: moves, trained'].cell(3)} after {SEGMENTS} segments, "
            f"{r['whole round: moves, longest'].cell(3)} after the most"
        ),
        shows=lambda r: r["whole round: moves, trained"].mean > 1e-2,
    ),
)


def tables(results: Results) -> Sequence[tuple[str, Sequence[Sequence[str]]]]:
    """All ways."""
    rows = [
        ["way", "rate", "steps", "training loss", "solved: 1", f"{SEGMENTS}", "most", "cells right", "moves"]
    ]
    for name in WAYS:
        shares = (results[f"{name}: solved, {when}"].cell(1, 100) for when in ("first", "trained", "longest"))
        rows.append(
            [
                name,
                ", ".join(f"{rate:g}" for rate in sorted(set(results[f"{name}: rate"].values))),
                f"{results[f'{name}: steps'].mean:.0f}",
                results[f"{name}: loss"].cell(),
                *shares,
                results[f"{name}: cells, trained"].cell(1, 100),
                results[f"{name}: moves, trained"].cell(3),
            ]
        )
    converged = results["equilibrium: converged"].cell(0, 100)
    title = f"Puzzles solved after 1, {SEGMENTS} and the most segments, %; {converged} % of the equilibria converged"
    return [(title, rows)]


def draw(figure: Any, found: Sequence[Measured]) -> None:
    """Puzzles solved, and how far a round moves, by segments at test time: the mean over seeds, and each seed."""
    axes = figure.subplots(1, 2)
    for ax, what, label in (
        (axes[0], "solved", "puzzles solved"),
        (axes[1], "moves", "relative residual of a round"),
    ):
        for i, name in enumerate(WAYS):
            curves = [one[f"{name}: {what}, curve"] for one in found]
            at = range(1, len(curves[0]) + 1)
            if len(curves) > 1:
                for curve in curves:
                    ax.plot(at, curve, color=f"C{i}", lw=0.5, alpha=0.5)
            ax.plot(
                at,
                [sum(v) / len(v) for v in zip(*curves, strict=True)],
                "o-",
                ms=3,
                color=f"C{i}",
                label=name,
            )
        ax.axvline(SEGMENTS, color="grey", ls=":", lw=1)
        ax.set(xlabel="segments at test time (dotted: in training)", ylabel=label)
    axes[0].set(ylim=(-0.02, 1.1))
    axes[1].set(yscale="log")
    axes[0].legend(fontsize=8, ncols=2, loc="upper right")


STUDY = Study(
    name="recursive",
    title="Recursive reasoning with a small network",
    source="Jolicoeur-Martineau, Less is More: Recursive Reasoning with Tiny Networks, 2025, arXiv 2510.04871; Wang et "
    "al., Hierarchical Reasoning Model, 2025, arXiv 2506.21734.",
    smaller=(
        "Sudoku of 4×4, with 4 to 6 givens, rather than Sudoku-Extreme of 9×9; tested on solutions of other classes "
        "than those trained on, 1000 puzzles to train on and 300 to test.",
        f"One mixer layer of width {WIDTH}, n = {INNER} updates, T = {ROUNDS} rounds, {SEGMENTS} segments in training; "
        "TRM has two layers of width 512, n = 6, T = 3 and up to 16.",
        f"{SECONDS:g} seconds of the processor for each training, rather than days; no moving average of the weights, "
        "no learned halting.",
        "Equal seconds are not equal steps of the optimiser: the table says how many each way made.",
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
