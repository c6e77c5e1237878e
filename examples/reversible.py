"""Reversible equilibrium models: the gradient of a few steps, exact, at a memory that does not grow with them.

    python examples/reversible.py [--seed N | --seeds N N N] [--quick] [--solver S] [--grad G] [--device D]
                                  [--out FOLDER]

    y ← (1 − β) y + β f(z),   z ← (1 − β) z + β f(y),   and back:   z = (z − β f(y)) / (1 − β),   …

One network, `torchdeq.zoo.reversible`, on scikit-learn's digits, trained in three ways: by reversible steps; as a DEQ,
solved by Anderson's method and differentiated implicitly, both with so many evaluations at most; and by unrolled
plain iteration with the same damping. Then, on trained networks: how far is each gradient from what it stands for, the
derivative of the reversible steps, by back-propagation through all of them, and that of a DEQ's fixed point, by a
solve to 1e-9; what does autograd hold; and how well are states rebuilt in float32 and in float64?

Each takes the better of the same two learning rates, by the loss on 200 images that are kept for that, and is reported
on 597 others. `--solver` and `--grad` are those of the DEQ.

Source: McCallum, Arora and Foster (2025), arXiv 2509.12917.
"""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from classifier import CLOSE, Digits, Run, as_good, fit, loss
from study import Claim, Measured, Options, Progress, Results, Study, peaks
from torch import Tensor
from torch.nn.functional import cross_entropy

from torchdeq import (
    DEQ,
    GMRES,
    IFT,
    Anderson,
    ConvergenceWarning,
    GradMethod,
    Reversible,
    SimpleFixedPointIteration,
    Solver,
    Unroll,
)
from torchdeq.zoo.reversible import ReversibleDEQ

BETA = 0.5
FEW, SOME, MANY = 5, 9, 25  # evaluations
COUNTS = (5, 9, 17, 25, 41)  # of evaluations to look at
BETAS = (0.5, 0.8)
F32, F64 = torch.float32, torch.float64
#: Of f and of the states.
WIDTHS = {"float32": (F32, F32), "float32 in float64": (F32, F64), "float64": (F64, F64)}
EXACT = {"float32": 1e-3, "float32 in float64": 1e-4, "float64": 1e-6}  # relative, that counts as exact
EXACTLY = ("float32 in float64", "float64")  # of which it is asked
ARMS = {
    "rev few": f"reversible, {FEW}",
    "rev": f"reversible, {SOME}",
    "deq": f"DEQ, at most {SOME}",
    "deq many": f"DEQ, at most {MANY}",
    "unrolled": f"unrolled, {SOME}",
}


class Sizes(NamedTuple):
    """How much is done."""

    channels: int
    epochs: int
    rates: tuple[float, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, options: Options) -> Sizes:
        return cls(4, 1, (1e-2,), (5, 9, 13)) if options.quick else cls(16, 8, (3e-3, 1e-2), COUNTS)


def counted(count: int, tau: float = 1.0) -> Solver:
    """So many evaluations, without a tolerance that they could miss."""
    return SimpleFixedPointIteration(max_iter=count, tau=tau, tol=math.inf)


def reversible(count: int) -> DEQ:
    """Of f in float32 with states in float64."""
    return DEQ(counted(count), Reversible(beta=BETA, dtype=F64))


def unrolled(count: int) -> DEQ:
    """Plain iteration with the damping of the reversible steps, in the graph."""
    return DEQ(counted(count, BETA), Unroll())


def implicit(options: Options, count: int) -> DEQ:
    """A DEQ, with at most so many evaluations forward and as many products backward."""
    own: tuple[Solver, GradMethod] = (
        Anderson(max_iter=count, tol=1e-3, stop_mode="rel"),
        IFT(solver=GMRES(max_iter=count, tol=1e-3)),
    )
    return options.deq(*own)


def layer(options: Options, arm: str) -> DEQ:
    """Of each arm."""
    if arm.startswith("deq"):
        return implicit(options, MANY if arm == "deq many" else SOME)
    return unrolled(SOME) if arm == "unrolled" else reversible(FEW if arm == "rev few" else SOME)


class Trained(NamedTuple):
    """A network, how its training went, at which learning rate, and its loss on the images to choose by."""

    model: ReversibleDEQ
    run: Run
    rate: float
    chosen_by: float


def train(
    options: Options,
    data: Digits,
    sizes: Sizes,
    arm: str,
    *,
    rate: float,
    epochs: int,
    told: Callable[[float], None] = lambda accuracy: None,
) -> Trained:
    """The network, the same for each arm, by one of them."""
    torch.manual_seed(options.seed)
    model = ReversibleDEQ(layer(options, arm), channels=sizes.channels).to(options.device)

    def logits(x: Tensor) -> Tensor:
        return model(x)[0]

    run = fit(
        model, logits, data.train, data.test, epochs=epochs, lr=rate, seed=options.seed, batch=50, told=told
    )
    return Trained(model, run, rate, loss(logits, *data.choose))


# What a gradient is off by ---------------------------------------------------------------------------------


def steps(model: ReversibleDEQ, x: Tensor, count: int, beta: float, wide: torch.dtype) -> tuple[Tensor, ...]:
    """The reversible iteration written out: y and z after the steps of so many evaluations, and f(z)."""
    x = model.inject(x)

    def f(z: Tensor) -> Tensor:
        return model.block(z.to(x.dtype), x)

    y = z = torch.zeros_like(x, dtype=wide)
    for _ in range(count // 2):
        y = torch.sub(y, y - f(z).to(wide), alpha=beta)
        z = torch.sub(z, z - f(y).to(wide), alpha=beta)
    return y, z, f(z)


@torch.no_grad()
def rebuilt(model: ReversibleDEQ, x: Tensor, count: int, beta: float, wide: torch.dtype) -> float:
    """How far the start, which is 0, is missed when the steps are undone, in units of the end: the worst image."""
    y, z, _ = steps(model, x, count, beta, wide)
    size = z.flatten(1).norm(dim=1)
    x = model.inject(x)

    def f(z: Tensor) -> Tensor:
        return model.block(z.to(x.dtype), x).to(wide)

    for _ in range(count // 2):
        z = (z - beta * f(y)) / (1 - beta)
        y = (y - beta * f(z)) / (1 - beta)
    missed = torch.maximum(y.flatten(1).norm(dim=1), z.flatten(1).norm(dim=1)) / size
    return min(missed.max().item(), 1e30) if missed.isfinite().all() else 1e30


def gradient(model: ReversibleDEQ, logits: Callable[[], Tensor], y: Tensor) -> Tensor:
    """Of the loss, by all parameters, flat."""
    found = torch.autograd.grad(cross_entropy(logits(), y), list(model.parameters()))
    return torch.cat([g.flatten() for g in found])


def distance(ours: Tensor, exact: Tensor) -> float:
    """Relative."""
    return ((ours - exact).norm() / exact.norm()).item()


def exactness(model: ReversibleDEQ, x: Tensor, y: Tensor, counts: Sequence[int]) -> Measured:
    """Of reversible gradients and rebuilt starts, by β, precision, and number of evaluations. None: refused."""
    found: Measured = {}
    for beta, (name, (narrow, wide)) in itertools.product(BETAS, WIDTHS.items()):
        subject, images = copy.deepcopy(model).to(narrow), x.to(narrow)
        method = Reversible(beta=beta, dtype=wide)
        errors: list[float | None] = []
        for count in counts:
            key = f"{name}, β = {beta}, {count}"
            found[f"missed {key}"] = rebuilt(subject, images, count, beta, wide)
            found[f"bound {key}"] = torch.finfo(wide).eps * method.growth(count)
            subject.deq = DEQ(counted(count), method)
            try:
                ours = gradient(subject, lambda s=subject, i=images: s(i)[0], y)
            except (
                ValueError,
                RuntimeError,
            ):  # more steps than can be undone; or than were, as the start shows
                errors.append(None)
                continue
            exact = gradient(
                subject,
                lambda s=subject, i=images, c=count, b=beta, w=wide: s.head(steps(s, i, c, b, w)[2]),
                y,
            )
            errors.append(distance(ours, exact))
        found[f"error {name}, β = {beta} curve"] = errors
        known = {c: e for c, e in zip(counts, errors, strict=True) if e is not None}
        found[f"error {name}, β = {beta}"] = max(known.values(), default=0.0)
        found[f"allowed {name}, β = {beta}"] = max(known, default=0)
        for what in ("missed", "bound"):
            found[f"{what} {name}, β = {beta} curve"] = [
                found[f"{what} {name}, β = {beta}, {c}"] for c in counts
            ]
    return found


def approximation(
    options: Options, model: ReversibleDEQ, x: Tensor, y: Tensor, counts: Sequence[int]
) -> Measured:
    """How far a DEQ's gradient with so many evaluations and products is from that of its fixed point. In float64."""
    model, x = copy.deepcopy(model).double(), x.double()
    model.deq = DEQ(
        Anderson(max_iter=500, tol=1e-9, stop_mode="rel"), IFT(solver=GMRES(max_iter=300, tol=1e-9))
    )
    exact = gradient(model, lambda: model(x)[0], y)
    found: Measured = {"solved": model(x)[1].converged.double().mean().item()}
    for count in counts:
        model.deq = implicit(options, count)
        found[f"implicit {count}"] = distance(gradient(model, lambda: model(x)[0], y), exact)
    return found


def held(options: Options, model: ReversibleDEQ, x: Tensor, y: Tensor, counts: Sequence[int]) -> Measured:
    """MiB allocated at the peak of a gradient, histories of solvers included, by number of evaluations."""
    model, found = copy.deepcopy(model), Measured()
    made: dict[str, Callable[[int], DEQ]] = {
        "rev": reversible,
        "deq": lambda count: implicit(options, count),
        "unrolled": unrolled,
    }
    for arm, deq in made.items():

        def step(count: int, deq: Callable[[int], DEQ] = deq) -> None:
            model.deq = deq(count)
            torch.autograd.grad(cross_entropy(model(x)[0], y), list(model.parameters()))

        curve = peaks([lambda c=count, step=step: step(c) for count in counts], x.device)
        found[f"{arm} MiB curve"] = curve
        found |= {f"{arm} MiB first": curve[0], f"{arm} MiB last": curve[-1]}
        # From the second on: with five evaluations not all that a step needs is there at a time.
        found[f"{arm} MiB growth"] = (curve[-1] - curve[1]) / (counts[-1] - counts[1])
    return found


# The study ------------------------------------------------------------------------------------------------


def measure(options: Options, progress: Progress) -> Measured:
    """For a seed: each arm at its better rate, the reversible one also for as long as the longest; then gradients."""
    sizes, data = Sizes.of(options), Digits.load(options.seed, options.device, few=options.quick)
    progress.begin(len(ARMS) * len(sizes.rates) + 4)
    found: Measured = {"epochs": sizes.epochs, "counts": list(sizes.counts), "last": sizes.counts[-1]}
    best: dict[str, Trained] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # how near a solve comes is what is studied
        for arm in ARMS:
            trials = []
            for rate in sizes.rates:
                trials.append(train(options, data, sizes, arm, rate=rate, epochs=sizes.epochs))
                progress.step(f"{ARMS[arm]}, rate {rate:g}: {trials[-1].run.accuracy[-1]:.3f}")
            best[arm] = chosen = min(trials, key=lambda t: t.chosen_by)
            x, y = data.test[0][:50], data.test[1][:50]
            found |= {
                arm: 100 * chosen.run.accuracy[-1],
                f"{arm} loss": chosen.run.loss[-1],
                f"{arm} rate": chosen.rate,
                f"{arm} epoch": chosen.run.seconds[-1] / sizes.epochs,
                f"{arm} residual": chosen.model(x)[1].rel_trace[-1].median().item(),
                f"{arm} curve": [100 * a for a in chosen.run.accuracy],
                f"{arm} seconds": chosen.run.seconds,
            }
        budget = best["deq many"].run.seconds[-1]
        epochs = max(1, round(budget / found["rev epoch"]))
        long = train(options, data, sizes, "rev", rate=best["rev"].rate, epochs=epochs).run
        progress.step("reversible, equal time")
        found |= {
            "budget": budget,
            "rev long": 100 * long.accuracy[-1],
            "rev long epochs": epochs,
            "rev long curve": [100 * a for a in long.accuracy],
            "rev long seconds": long.seconds,
        }
        found |= exactness(best["rev"].model, x, y, sizes.counts)
        for name in EXACTLY:  # as in training; refused is not exact
            error = found[f"error {name}, β = {BETA} curve"][sizes.counts.index(SOME)]
            found[f"error {name} in training"] = math.inf if error is None else error
        progress.step("reversible gradients")
        found |= approximation(options, best["deq many"].model, x, y, (SOME, MANY))
        progress.step("implicit gradients")
        found |= held(options, best["rev"].model, x, y, sizes.counts)
        progress.step("memory")
    for other in ("deq", "deq many"):
        found[f"gain over {other}"] = found["rev"] - found[other]
    found["long gain"] = found["rev long"] - found["deq many"]
    found["time"] = found["rev epoch"] / found["unrolled epoch"]
    found["linear"] = (found["rev epoch"] / SOME) / (found["rev few epoch"] / FEW)
    return found


def small(r: Results, name: str) -> str:
    """An error, as "1e-07"."""
    return r[name].cell(0, scientific=True)


def points(*names: str) -> Callable[[Results], str]:
    """Accuracies, as "98.1 (97.9–98.3) against …"."""
    return lambda r: " against ".join(r[name].cell(2) for name in names)


CLAIMS = [
    Claim(
        text=f"gradients are exactly those of the steps, {SOME} as in training (relative error, {', '.join(EXACTLY)})",
        paper="exact",
        ours=lambda r: ", ".join(small(r, f"error {name} in training") for name in EXACTLY),
        shows=lambda r: all(max(r[f"error {name} in training"].values) < EXACT[name] for name in EXACTLY),
    ),
    Claim(
        text="and of as many steps as are not refused, where rounding has grown (the largest)",
        paper="exact",
        ours=lambda r: "; ".join(
            f"{small(r, f'error {name}, β = {BETA}')} of up to {r[f'allowed {name}, β = {BETA}'].cell(0)}"
            for name in EXACTLY
        ),
        shows=lambda r: all(max(r[f"error {name}, β = {BETA}"].values) < EXACT[name] for name in EXACTLY),
    ),
    Claim(
        text=f"those of a DEQ are not (relative distance to that of its fixed point, at most {SOME} and {MANY})",
        paper="approximate",
        ours=lambda r: ", ".join(small(r, f"implicit {count}") for count in (SOME, MANY)),
        shows=lambda r: min(r[f"implicit {SOME}"].values) > 1e-2 if min(r["solved"].values) == 1 else None,
    ),
    Claim(
        text="memory does not grow with the evaluations, that of unrolling does (KiB for each, allocated)",
        paper="constant",
        ours=lambda r: " against ".join(r[f"{arm} MiB growth"].cell(1, 1024) for arm in ("rev", "unrolled")),
        shows=lambda r: (
            max(r["rev MiB growth"].values) < 0.01 * min(r["unrolled MiB growth"].values)
            and min(r["unrolled MiB growth"].values) > 0
        ),
    ),
    Claim(
        text=f"far fewer evaluations are enough: {SOME} against at most {MANY} of a DEQ lose no accuracy (%)",
        paper="12 on WikiText-103",
        ours=points("rev", "deq many"),
        shows=lambda r: as_good(r["gain over deq many"]),
    ),
    Claim(
        text=f"with {SOME} it is better than a DEQ with at most {SOME} (%)",
        paper="better",
        ours=points("rev", "deq"),
        shows=lambda r: r["gain over deq"].mean > CLOSE and min(r["gain over deq"].values) > 0,
    ),
    Claim(
        text=f"in equal time it is at least as good as a DEQ with at most {MANY} (%)",
        paper="not compared",
        ours=points("rev long", "deq many"),
        shows=lambda r: as_good(r["long gain"]),
    ),
    Claim(
        text=f"time is linear: an evaluation takes as long with {SOME} as with {FEW} (ratio)",
        paper="linear",
        ours=lambda r: r["linear"].cell(2),
        shows=lambda r: r["linear"].mean < 1.25,
    ),
    Claim(
        text="at most twice that of unrolling (ratio of an epoch's)",
        paper="one evaluation more for each, forward and backward",
        ours=lambda r: r["time"].cell(2),
        shows=lambda r: r["time"].mean < 2,
    ),
]


def tables(r: Results) -> Sequence[tuple[str, Sequence[Sequence[str]]]]:
    """The arms; memory; and what a reversible gradient is off by."""
    head = [
        "evaluations",
        "learning rate",
        "training loss",
        "test accuracy, %",
        "s per epoch",
        "relative residual",
    ]
    rows = []
    for arm, name in ARMS.items():
        rates = " ".join(f"{rate:g}" for rate in dict.fromkeys(r[f"{arm} rate"].values))
        cells = [
            r[f"{arm} loss"].cell(3),
            r[arm].cell(2),
            r[f"{arm} epoch"].cell(2),
            small(r, f"{arm} residual"),
        ]
        rows.append([name, rates, *cells])
    long = f"reversible, {SOME}, for {r['rev long epochs'].cell(0)} epochs"
    rows.append([long, "as above", "", r["rev long"].cell(2), "", ""])
    found = [
        (f"{r['epochs'].cell(0)} epochs; {r['budget'].cell(1)} s are the time of the longest", [head, *rows])
    ]
    last = r["last"].cell(0)
    grid = [["", f"{FEW} evaluations", f"{last} evaluations"]]
    for arm, name in (("rev", "reversible"), ("deq", "DEQ"), ("unrolled", "unrolled")):
        grid.append([name, r[f"{arm} MiB first"].cell(2), r[f"{arm} MiB last"].cell(2)])
    found.append(
        ("Allocated at the peak of a gradient of 50 images, MiB, the histories of the solvers included", grid)
    )
    last_start = f"start missed after {last}"
    head = ["f and states", "β", "evaluations", "gradient error, at most", last_start, "rounding"]
    rows = []
    for beta, name in itertools.product(BETAS, WIDTHS):
        key = f"{name}, β = {beta}"
        off = small(r, f"error {key}") if min(r[f"allowed {key}"].values) else "refused"
        cells = [r[f"allowed {key}"].cell(0), off]
        rows.append(
            [name, str(beta), *cells, small(r, f"missed {key}, {last}"), small(r, f"bound {key}, {last}")]
        )
    title = (
        f"Rebuilding states: the most of up to {last} evaluations that are not refused, the start after {last}, and "
        f"what `Reversible.growth` expects of the rounding of states where J does not expand"
    )
    found.append((title, [head, *rows]))
    return found


def draw(figure: Any, found: Sequence[Measured]) -> None:
    """Accuracy by time, memory by evaluations, and what is missed of the start."""
    clock, memory, missed = figure.subplots(1, 3)
    for n, one in enumerate(found):
        for color, (arm, name) in enumerate(ARMS.items()):
            style = {"color": f"C{color}", "alpha": 0.7, "label": None if n else name}
            clock.plot(one[f"{arm} seconds"], one[f"{arm} curve"], **style)
    floor = min(95.0, *(max(one[f"{arm} curve"]) - 3 for one in found for arm in ARMS))
    clock.set(title="training", xlabel="seconds", ylabel="test accuracy, %", ylim=(floor, 100))
    clock.legend(fontsize="small", loc="lower right")
    one = found[0]
    for color, arm in (("C1", "rev"), ("C2", "deq"), ("C4", "unrolled")):
        memory.plot(
            one["counts"], one[f"{arm} MiB curve"], color=color, marker=".", label=ARMS[arm].split(",")[0]
        )
    memory.set(title="allocated at the peak", xlabel="evaluations", ylabel="MiB", ylim=(0, None))
    memory.legend(fontsize="small")
    for beta, style in zip(BETAS, ("-", "--"), strict=True):
        for color, name in enumerate(WIDTHS):
            key = f"{name}, β = {beta}"
            for n, one in enumerate(found):
                curve = [max(e, 1e-17) for e in one[f"missed {key} curve"]]
                label = None if n else key
                missed.plot(one["counts"], curve, color=f"C{color}", linestyle=style, alpha=0.7, label=label)
    missed.axhline(1e-3, color="grey", linestyle=":")
    missed.annotate(
        "1e-3, beyond which it is refused", (25, 1e-3), fontsize="x-small", va="bottom", color="grey"
    )
    missed.set(
        title="the start, rebuilt (0 is drawn at 1e-17)",
        xlabel="evaluations",
        ylabel="relative error",
        yscale="log",
    )
    missed.set_ylim(1e-18, 1e16)
    missed.legend(fontsize="x-small", loc="upper left")


STUDY = Study(
    name="reversible",
    title="Reversible deep equilibrium models",
    source="McCallum, Arora and Foster (2025), arXiv 2509.12917",
    replaces="--solver and --grad are those of the DEQ.",
    smaller=[
        "digits of 8×8 pixels, 1000 to train on, and one block of 16 channels, in place of CIFAR-10 (94.4 %) and "
        "WikiText-103 (perplexity 23.2 at 12 evaluations)",
        f"β = {BETA} in training, where the paper's code has 0.8; an evaluation more, for f(z) is what is returned",
        "the DEQ is the same network without a regularisation, solved by Anderson's method and GMRES to 1e-3",
        f"the distance of a DEQ's gradient is that of the network trained with at most {MANY}, on 50 test images",
        f"equal time is that of a DEQ with at most {MANY}, and for the reversible steps alone",
        f"accuracies on 597 images: one of them is 0.17 points, and {CLOSE} points count as equal, "
        "unless it is the same side that is worse for each seed",
        f"a gradient is exact up to a relative error of {', '.join(f'{EXACT[n]:.0e} ({n})' for n in EXACTLY)}",
        "a quarter more counts as the same time. With one thread on a CPU, seconds are those of the process",
    ],
    claims=CLAIMS,
    measure=measure,
    tables=tables,
    draw=draw,
)

main = STUDY.main

if __name__ == "__main__":
    raise SystemExit(main())
