"""Implicit MAML on sinusoids and on digits: the meta-gradient, its memory, and what is learned with it.

    φ*(θ) = argmin_φ  L(φ; support) + λ/2 ‖φ − θ‖²,      dL(φ*; query)/dθ = (I + ∇²L(φ*) / λ)⁻¹ ∇L(φ*; query)

with k steps of conjugate gradients for the inverse, against back-propagation through the inner steps (MAML), and
against ∇L(φ; query) by itself (first-order MAML). The model is `torchdeq.zoo.imaml`. Two families of tasks: regression
of a sin(x − p) from 10 points, and telling three classes of digits apart from one image of each, for classes that were
not there in training.

Source: Rajeswaran, Finn, Kakade and Levine (2019), arXiv 1909.04630; MAML is Finn et al. (2017), arXiv 1703.03400.

    python examples/imaml.py --seed 0            # three to six minutes on one core
    python examples/imaml.py --quick             # seconds: does it run?
    python examples/imaml.py --solver anderson  # another inner solver
    python examples/imaml.py --grad jfb          # another gradient method in the place of CG
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.datasets import load_digits
from study import Claim, Measured, Options, Progress, Results, Study, clock, peaks
from torch import Tensor, nn
from torch.func import vmap

from torchdeq import CG, IFT, ConvergenceWarning, SimpleFixedPointIteration, Status
from torchdeq.zoo.imaml import IMAML

Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # support x and y, query x and y, each (T, K or Q, ...)
Learner = Callable[[Tensor, Tensor, Tensor], Tensor]  # support x and y, query x -> predictions (T, Q, ...)

ARMS = {
    "imaml5": "iMAML, 5 CG steps",
    "imaml20": "iMAML, 20 CG steps",
    "unrolled": "MAML, unrolled",
    "first": "MAML, first-order",
}
TASKS, INNER, RATE = 8, 10, 3e-3  # tasks in a meta-batch, inner steps of iMAML, learning rate of Adam for θ
PLAIN = 5  # inner steps of MAML, as in its paper


# Families of tasks ----------------------------------------------------------------------------------------


class Sinusoids:
    """a sin(x − p) with a in [.1, 5], p in [0, π], x in [−5, 5], as in MAML's paper; 10 points, 10 of query."""

    name, loss, smaller_is_better = "sinusoid", staticmethod(nn.functional.mse_loss), True
    plain = ({"rate": 0.01}, {"rate": 0.03}, {"rate": 0.06})
    implicit = (
        {"penalty": 0.02, "rate": 0.03},
        {"penalty": 0.1, "rate": 0.03},
        {"penalty": 0.5, "rate": 0.03},
    )

    def __init__(self, seed: int):
        pass

    def network(self) -> nn.Module:
        return nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))

    def draw(self, generator: torch.Generator, tasks: int, split: str) -> Batch:
        a, p, x = (torch.rand(tasks, n, 1, generator=generator) for n in (1, 1, 20))
        x = 10 * x - 5
        y = (0.1 + 4.9 * a) * torch.sin(x - torch.pi * p)
        return x[:, :10], y[:, :10], x[:, 10:], y[:, 10:]

    def score(self, predictions: Tensor, y: Tensor) -> float:
        return float((predictions - y).square().mean())


class Digits:
    """Three classes, in any order, one image of each as support and five as query. Seven are for training.

    Splits: train and valid, of these seven, with half of the images each; test, of the other three, which the seed
    draws.
    """

    name, loss, smaller_is_better = "digits", staticmethod(nn.functional.cross_entropy), False
    plain = ({"rate": 0.1}, {"rate": 0.3}, {"rate": 1.0})
    implicit = ({"penalty": 0.5, "rate": 0.3}, {"penalty": 1.0, "rate": 0.3}, {"penalty": 2.0, "rate": 0.3})

    def __init__(self, seed: int):
        digits = load_digits()
        images = torch.tensor(digits.data, dtype=torch.float32) / 16
        target = torch.tensor(digits.target)
        by_class = [images[target == c] for c in torch.randperm(10, generator=seeded(seed)).tolist()]
        self.pools = {
            "train": [pool[::2] for pool in by_class[:7]],
            "valid": [pool[1::2] for pool in by_class[:7]],
            "test": by_class[7:],
        }

    def network(self) -> nn.Module:
        return nn.Sequential(nn.Linear(64, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 3))

    def draw(self, generator: torch.Generator, tasks: int, split: str) -> Batch:
        pools, support, query = self.pools[split], [], []
        for _ in range(tasks):
            chosen = [pools[i] for i in torch.randperm(len(pools), generator=generator)[:3]]
            images = [pool[torch.randperm(len(pool), generator=generator)[:6]] for pool in chosen]
            support.append(torch.cat([image[:1] for image in images]))
            query.append(torch.cat([image[1:] for image in images]))
        y = torch.arange(3)
        return (
            torch.stack(support),
            y.expand(tasks, 3),
            torch.stack(query),
            y.repeat_interleave(5).expand(tasks, 15),
        )

    def score(self, predictions: Tensor, y: Tensor) -> float:
        return float((predictions.argmax(-1) == y).float().mean())


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Learners -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Unrolled:
    """MAML: `steps` of gradient descent on L + λ/2 ‖φ − θ‖², which are differentiated; or not, if `first_order`."""

    model: IMAML
    steps: int
    rate: float
    first_order: bool = False
    penalty: float = 0.0

    def __call__(self, x: Tensor, y: Tensor, query: Tensor) -> Tensor:
        theta = {name: p.expand(len(x), *p.shape) for name, p in self.model.network.named_parameters()}

        def objective(phi: dict[str, Tensor]) -> Tensor:
            fit = vmap(self.model.loss)(self.model.predictions(phi, x), y).sum()
            return fit + self.penalty / 2 * sum((phi[n] - theta[n]).square().sum() for n in phi)

        phi = theta
        for _ in range(self.steps):
            slopes = torch.autograd.grad(
                objective(phi), list(phi.values()), create_graph=not self.first_order
            )
            if self.first_order:  # φ − θ is a constant
                phi = {n: p - self.rate * s.detach() for (n, p), s in zip(phi.items(), slopes, strict=True)}
            else:
                phi = {n: p - self.rate * s for (n, p), s in zip(phi.items(), slopes, strict=True)}
        return self.model.predictions(phi, query)


def implicit(
    options: Options, network: nn.Module, loss: Any, products: int, *, steps: int = INNER, **setting: Any
) -> IMAML:
    """iMAML, with the solver and the gradient method of the options."""
    own = SimpleFixedPointIteration(max_iter=steps + 1, tol=1e-3)
    # So many, whatever the residual; one evaluation more measures it.
    adjoint = CG(max_iter=products + 1, min_iter=products + 1, tol=math.inf)
    if options.grad is not None:
        setting["deq"] = options.deq(own, IFT(solver=adjoint))
    elif options.solver is not None:
        setting["solver"] = options.forward(own)
    return IMAML(network, loss, steps=steps, adjoint=adjoint, **setting).to(options.device)


def learner(options: Options, arm: str, family: Any, network: nn.Module, setting: dict[str, Any]) -> Learner:
    """What an arm does with a batch."""
    if arm.startswith("imaml"):
        return implicit(options, network, family.loss, int(arm[5:]), **setting)
    model = IMAML(network, family.loss).to(options.device)
    return Unrolled(model=model, steps=PLAIN, first_order=arm == "first", **setting)


# Training -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is done."""

    steps: int = 120
    settings: int = 3  # of the inner problem that are tried
    tasks: int = 200
    looks: int = 6
    inner: Sequence[int] = (1, 2, 5, 10, 20, 40, 80)
    exact: int = 300  # inner steps before the Hessian is solved with
    repeats: int = 7  # of a timing


QUICK = Sizes(steps=2, settings=1, tasks=4, looks=1, inner=(1, 8), exact=80, repeats=1)


@dataclass
class Run:
    """The training of an arm: scores on both splits after some steps and seconds of training."""

    arm: str
    family: Any
    options: Options
    setting: dict[str, Any]
    sizes: Sizes

    def __post_init__(self) -> None:
        torch.manual_seed(self.options.seed)  # the same θ for all arms
        self.network = self.family.network().to(self.options.device)
        self.learner = learner(self.options, self.arm, self.family, self.network, self.setting)
        self.adam = torch.optim.Adam(self.network.parameters(), lr=RATE)
        self.batches = seeded(self.options.seed + 100)
        self.steps, self.seconds, self.stalled = 0, 0.0, 0
        self.curve = [self.look()]

    def draw(self, generator: torch.Generator, tasks: int, split: str) -> Batch:
        return tuple(t.to(self.options.device) for t in self.family.draw(generator, tasks, split))  # type: ignore[return-value]

    def look(self) -> tuple[int, float, float, float]:
        """Steps, seconds, and the scores on new tasks of validation and test."""
        scores = []
        for split, draw in (("valid", 200), ("test", 400)):
            x, y, query, target = self.draw(seeded(self.options.seed + draw), self.sizes.tasks, split)
            scores.append(self.family.score(self.learner(x, y, query).detach(), target))
        return self.steps, self.seconds, scores[0], scores[1]

    def step(self) -> None:
        x, y, query, target = self.draw(self.batches, TASKS, "train")
        began = clock(self.options.device)
        loss = self.family.loss(self.learner(x, y, query).flatten(0, 1), target.flatten(0, 1))
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        self.seconds += clock(self.options.device) - began
        self.steps += 1
        linear = getattr(self.learner, "linear", None)
        self.stalled += 0 if linear is None else int((linear.status == Status.STALLED).sum())

    def train(self, steps: int, looks: int) -> Run:
        """So many steps, looked at so often."""
        for i in range(1, steps + 1):
            self.step()
            if i * looks // steps > (i - 1) * looks // steps:
                self.curve.append(self.look())
        return self

    def until(self, seconds: float, looks: int) -> tuple[int, float, float, float]:
        """More steps, until so many seconds are spent; the look at that time, if it is over already the one then."""
        begun = self.seconds
        while self.seconds < seconds:
            self.step()
            if self.seconds >= min(seconds, self.curve[-1][1] + (seconds - begun) / looks):
                self.curve.append(self.look())
        return next(look for look in self.curve if look[1] >= seconds)


def tuned(arm: str, family: Any, options: Options, sizes: Sizes) -> Run:
    """Of the whole trainings with the settings of an arm's grid, that with the best validation score at the end."""
    grid = family.implicit if arm.startswith("imaml") else family.plain
    runs = [
        Run(arm, family, options, setting, sizes).train(sizes.steps, sizes.looks)
        for setting in grid[: sizes.settings]
    ]
    scores = [run.curve[-1][2] if family.smaller_is_better else -run.curve[-1][2] for run in runs]
    return runs[min(range(len(runs)), key=lambda i: (math.isnan(scores[i]), scores[i]))]


def compare(family: Any, options: Options, sizes: Sizes, progress: Progress) -> Measured:
    """Every arm on a family: at equal steps, and at equal seconds."""
    found: Measured = {}
    name = family.name
    runs: dict[str, Run] = {}
    for arm in ARMS:
        if arm == "imaml20":  # at the setting of that with 5: they differ in the gradient alone
            runs[arm] = Run(arm, family, options, runs["imaml5"].setting, sizes).train(
                sizes.steps, sizes.looks
            )
        else:
            runs[arm] = tuned(arm, family, options, sizes)
        progress.step(f"{name}: {arm} {runs[arm].curve[-1][3]:.3f}")
    budget = runs["imaml5"].seconds
    for arm, run in runs.items():
        end = run.curve[-1]
        at = run.until(budget, sizes.looks)
        found |= {
            f"{name} {arm} before": run.curve[0][3],
            f"{name} {arm}": end[3],
            f"{name} {arm} valid": end[2],
            f"{name} {arm} same seconds": at[3],
            f"{name} {arm} steps then": at[0],
            f"{name} {arm} ms": 1e3 * run.seconds / run.steps,
            f"{name} {arm} stalled": run.stalled / (run.steps * TASKS),
            f"{name} {arm} curve": [[look[1] for look in run.curve], [look[3] for look in run.curve]],
            f"{name} {arm} setting": [f"{k} {v:g}" for k, v in run.setting.items()],
        }
    return found


# The meta-gradient ----------------------------------------------------------------------------------------


def gradients(options: Options, sizes: Sizes, progress: Progress) -> Measured:
    """Errors of the meta-gradients of one batch of digits, and what they cost, against the number of inner steps."""
    family = Digits(options.seed)
    torch.manual_seed(options.seed)
    network = family.network().double().to(options.device)
    x, y, query, target = (t.to(options.device) for t in family.draw(seeded(options.seed + 300), 4, "train"))
    x, query = x.double(), query.double()
    setting = {"penalty": 1.0, "rate": 0.3}

    def gradient(learner: Learner) -> Tensor:
        loss = family.loss(learner(x, y, query).flatten(0, 1), target.flatten(0, 1))
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])

    exact = gradient(
        IMAML(network, family.loss, steps=sizes.exact, adjoint=CG(max_iter=500, tol=1e-10), **setting)
    )

    def arm(name: str, steps: int) -> Learner:
        if name.startswith("imaml"):
            return implicit(options, network, family.loss, int(name[5:]), steps=steps, **setting)
        model = IMAML(network, family.loss)
        return Unrolled(model=model, steps=steps, first_order=name == "first", **setting)

    arms = {name: [arm(name, steps) for steps in sizes.inner] for name in ARMS}
    runs = [lambda one=one: gradient(one) for ones in arms.values() for one in ones]
    memory = iter(peaks(runs, options.device))
    found: Measured = {"inner": list(sizes.inner)}
    for name, ones in arms.items():
        errors, used = [], [next(memory) for _ in ones]
        for one in ones:
            estimate = gradient(one)
            errors.append(float((estimate - exact).norm() / exact.norm()))
        found |= {
            f"gradient {name} errors": errors,
            f"gradient {name} peaks": used,
            f"gradient {name} error": errors[-1],
            f"gradient {name} first error": errors[0],
            f"gradient {name} peak": used[-1],
            f"gradient {name} growth": used[-1] / used[0],
        }
        progress.step(f"meta-gradient: {name}")
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(sizes.repeats):  # in turn; all have run before
        for name, ones in arms.items():
            began = clock(options.device)
            gradient(ones[-1])
            seconds[name].append(clock(options.device) - began)
    return found | {f"gradient {name} ms": 1e3 * statistics.median(times) for name, times in seconds.items()}


def measure(options: Options, progress: Progress) -> Measured:
    """All of it, for one seed."""
    sizes = QUICK if options.quick else Sizes()
    progress.begin(3 * len(ARMS))
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", ConvergenceWarning
        )  # the table counts the tasks for which CG breaks down
        found = gradients(options, sizes, progress)
        for kind in (Sinusoids, Digits):
            found |= compare(kind(options.seed), options, sizes, progress)
    return found


# What is said of it ---------------------------------------------------------------------------------------


def numbers(template: str, digits: int = 3, *, scientific: bool = False) -> Callable[[Results], str]:
    """A sentence with the results that it names in braces."""

    def filled(results: Results) -> str:
        parts = template.split("{")
        out = parts[0]
        for part in parts[1:]:
            name, rest = part.split("}", 1)
            out += results[name].cell(digits, scientific=scientific) + rest
        return out

    return filled


CLOSE, CLOSER = 0.1, 0.025  # a share of a loss, and an accuracy, that count as equal


def compared(results: Results, this: str, that: str, *, better: bool = False, when: str = "") -> bool | str:
    """Whether an arm is as good as another, or better, by more than counts as equal: on both families, or on which."""
    sign = -1 if better else 1
    loss = results[f"sinusoid {this}{when}"].mean / results[f"sinusoid {that}{when}"].mean
    gain = results[f"digits {this}{when}"].mean - results[f"digits {that}{when}"].mean
    shows = {"sinusoids": loss <= 1 + sign * CLOSE, "digits": gain >= -sign * CLOSER}
    if len(set(shows.values())) == 1:
        return shows["digits"]
    return f"on {next(name for name, one in shows.items() if one)} alone"


CLAIMS = (
    Claim(
        text="The implicit meta-gradient tends to the exact one with the number of inner and of CG steps",
        paper="theorem 1, figure 2",
        ours=numbers(
            "relative error after the most inner steps: {gradient imaml5 error} with 5 CG steps, "
            "{gradient imaml20 error} with 20; first-order {gradient first error}",
            1,
            scientific=True,
        ),
        shows=lambda r: (
            r["gradient imaml20 error"].mean
            < r["gradient imaml5 error"].mean
            < r["gradient first error"].mean
            and r["gradient imaml20 error"].mean < 0.1 * r["gradient imaml20 first error"].mean
        ),
    ),
    Claim(
        text="Memory does not grow with the number of inner steps",
        paper="constant; MAML's grows linearly",
        ours=numbers(
            "from the fewest to the most steps ×{gradient imaml5 growth}; unrolled ×{gradient unrolled growth}",
            2,
        ),
        shows=lambda r: r["gradient imaml5 growth"].mean < 1.2 < r["gradient unrolled growth"].mean,
    ),
    Claim(
        text="No more computation than back-propagation through the inner steps",
        paper="none, of the same solve",
        ours=numbers(
            "milliseconds with the most inner steps: {gradient imaml5 ms}; unrolled {gradient unrolled ms}", 0
        ),
        shows=lambda r: r["gradient imaml5 ms"].mean <= r["gradient unrolled ms"].mean,
    ),
    Claim(
        text="Better than first-order MAML",
        paper="20-way 1-shot Omniglot: 94.46 %, first-order 89.4 %",
        ours=numbers(
            "sinusoids, loss {sinusoid imaml5}, first-order {sinusoid first}; digits, accuracy {digits imaml5}, "
            "first-order {digits first}"
        ),
        shows=lambda r: compared(r, "imaml5", "first", better=True),
    ),
    Claim(
        text="As good as unrolled MAML",
        paper="5-way 99.16 % (Hessian-free 99.50 %), MAML 98.7 %; 20-way 94.46 % (96.18 %), MAML 95.8 %",
        ours=numbers(
            "sinusoids, loss {sinusoid imaml5}, unrolled {sinusoid unrolled}; digits, accuracy {digits imaml5}, "
            "unrolled {digits unrolled}"
        ),
        shows=lambda r: compared(r, "imaml5", "unrolled"),
    ),
    Claim(
        text="Better than first-order MAML at equal computing time",
        paper="not compared",
        ours=numbers(
            "sinusoids, loss {sinusoid imaml5}, first-order {sinusoid first same seconds}; digits, accuracy "
            "{digits imaml5}, first-order {digits first same seconds}"
        ),
        shows=lambda r: compared(r, "imaml5", "first", better=True, when=" same seconds"),
    ),
    Claim(
        text="As good as unrolled MAML at equal computing time",
        paper="not compared",
        ours=numbers(
            "sinusoids, loss {sinusoid imaml5}, unrolled {sinusoid unrolled same seconds}; digits, accuracy "
            "{digits imaml5}, unrolled {digits unrolled same seconds}"
        ),
        shows=lambda r: compared(r, "imaml5", "unrolled", when=" same seconds"),
    ),
    Claim(
        text="What is learned helps with classes that are new",
        paper="that is what the paper measures",
        ours=numbers(
            "accuracy on new digits, before and after: iMAML {digits imaml5 before}, {digits imaml5}; MAML "
            "{digits unrolled before}, {digits unrolled}. On classes of training iMAML ends at {digits imaml5 valid}"
        ),
        shows=lambda r: r["digits imaml5"].mean > r["digits imaml5 before"].mean,
    ),
    Claim(
        text="5 CG steps are enough",
        paper="what it uses throughout",
        ours=numbers(
            "sinusoids, loss {sinusoid imaml5}, 20 steps {sinusoid imaml20}; digits, accuracy {digits imaml5}, "
            "20 steps {digits imaml20}"
        ),
        shows=lambda r: compared(r, "imaml5", "imaml20"),
    ),
)


def tables(results: Results) -> Sequence[tuple[str, Sequence[Sequence[str]]]]:
    """Each family, and the meta-gradient."""
    out = []
    for name, what in (("sinusoid", "loss of new sinusoids"), ("digits", "accuracy on new classes")):
        head = [
            "",
            f"{what}, before",
            "after",
            "at equal seconds",
            "steps then",
            "ms per step",
            "CG cut by curvature",
        ]
        if name == "digits":
            head.insert(3, "on classes of training")
        rows = [head]
        for arm, title in ARMS.items():
            row = [title]
            keys = ("before", "", *(["valid"] if name == "digits" else []), "same seconds")
            row += [results[f"{name} {arm} {key}".strip()].cell(3) for key in keys]
            row += [results[f"{name} {arm} {key}"].cell(0) for key in ("steps then", "ms")]
            stalled = results[f"{name} {arm} stalled"]
            row.append(stalled.cell(0, 100) + " %" if arm.startswith("imaml") else "")
            rows.append(row)
        out.append((f"{name}: {what}", rows))
    rows = [["", "relative error", "peak MiB", "ms"]]
    for arm, title in ARMS.items():
        at = f"gradient {arm}"
        rows.append(
            [
                title,
                results[f"{at} error"].cell(1, scientific=True),
                results[f"{at} peak"].cell(2),
                results[f"{at} ms"].cell(0),
            ]
        )
    out.append(("The meta-gradient of four tasks of digits, with the most inner steps, in float64", rows))
    return out


def draw(figure: Any, found: Sequence[Measured]) -> None:
    """Errors and memory against inner steps; scores against seconds. A line per seed."""
    axes = figure.subplots(1, 4)
    panels = (
        ("errors", "relative error of the meta-gradient"),
        ("peaks", "peak memory of a meta-gradient, MiB"),
    )
    for axis, (key, title) in zip(axes, panels, strict=False):
        for i, (arm, label) in enumerate(ARMS.items()):
            for one in found:
                axis.loglog(
                    one["inner"], one[f"gradient {arm} {key}"], f"C{i}.-", label=label, lw=1, alpha=0.7
                )
        axis.set(xlabel="inner steps")
        axis.set_title(title, fontsize=8)
        axis.set_xticks(found[0]["inner"], found[0]["inner"], fontsize=8)
        axis.set_xticks([], minor=True)
    for axis, name, title in zip(
        axes[2:],
        ("sinusoid", "digits"),
        ("loss, new sinusoids", "accuracy, new classes of digits"),
        strict=True,
    ):
        for i, arm in enumerate(ARMS):
            for one in found:
                axis.plot(*one[f"{name} {arm} curve"], f"C{i}.-", lw=1, alpha=0.7)
        axis.set(xlabel="seconds of training")
        axis.set_title(title, fontsize=8)
    axes[2].set_yscale("log")
    handles, labels = axes[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=4, fontsize=8)


STUDY = Study(
    name="imaml",
    title="Meta-learning with implicit gradients",
    source="Rajeswaran, Finn, Kakade and Levine, NeurIPS 2019, arXiv 1909.04630.",
    replaces="--solver is the inner solver of iMAML; --grad is in the place of CG.",
    smaller=(
        "Sinusoids and 8×8 digits in the place of Omniglot and Mini-ImageNet; 10 classes in the place of 1623.",
        "A perceptron 40-40 with tanh, so that second derivatives exist; the paper has convolutions and relu.",
        f"{Sizes().steps} meta-steps of {TASKS} tasks, by Adam; the papers make some ten thousand.",
        f"{INNER} inner steps for iMAML and {PLAIN} for MAML. Each has three settings of the inner problem, chosen by "
        "validation after whole trainings; iMAML with 20 CG steps has the setting of that with 5.",
        f"{CLOSE:.0%} of a loss and {100 * CLOSER:g} points of accuracy count as equal, in the mean of the seeds.",
        "Equal seconds are those that iMAML with 5 CG steps took: CPU seconds of the process, without the evaluations.",
        "The meta-gradient's errors are those of one batch of digits in float64, with λ = 1 and α = 0.3, at the "
        "initial θ; unrolled and first-order descend on the same regularised loss there.",
    ),
    claims=CLAIMS,
    measure=measure,
    tables=tables,
    draw=draw,
)

main = STUDY.main

if __name__ == "__main__":
    raise SystemExit(main())
