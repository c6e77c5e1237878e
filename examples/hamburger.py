"""Hamburger: a matrix decomposition as global context, with a one-step gradient, against self-attention and nothing.

    Y = Z + norm(W_u M(W_l Z)),        M(X) = D C ≈ X of low rank, by K steps of NMF or VQ,

of which only the last is differentiated (one-step) or all of them (unrolled). The model is `torchdeq.zoo.hamburger`.
Two tasks of segmentation, in which a pixel and what is near it do not say enough. Patterns: each pixel of an image
shows one of 12 patterns, with noise, and which one is its class; an image has only 3 of them, at random places, so that
it helps to know which. Digits: scikit-learn's digits at twice their size; a pixel with ink has the digit as its class,
and the convolutions see 5×5 pixels of 16×16.

Source: Geng, Guo, Chen, Li, Wei and Lin (2021), arXiv 2109.04553.

    python examples/hamburger.py --seed 0   # three to six minutes on one core
    python examples/hamburger.py --quick    # seconds: does it run?
    python examples/hamburger.py --grad ift # another gradient method in the place of one step, to six evaluations
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.datasets import load_digits
from study import Claim, Measured, Options, Progress, Results, Study, clock
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from torchdeq import JFB, ConvergenceWarning, SimpleFixedPointIteration
from torchdeq.diagnostics import SavedBytes
from torchdeq.zoo.hamburger import NMF, VQ, Hamburger

ARMS = {
    "none": "no context",
    "attention": "self-attention",
    "nmf": "NMF, one step",
    "nmf unrolled": "NMF, unrolled",
    "vq": "VQ, one step",
    "vq unrolled": "VQ, unrolled",
    "nmf K=3": "NMF, one step, K = 3",
}
LEVEL = ("none", "nmf", "nmf unrolled", "vq", "vq unrolled")  # also trained for the seconds of self-attention
CHANNELS, BATCH = 32, 16
RATES = (1e-3, 3e-3, 1e-2)


# Tasks ----------------------------------------------------------------------------------------------------


class Patterns:
    """Images (B, 8, 16, 16): of 12 patterns in R⁸ each image has 3; each pixel shows one of them, and noise.

    The patterns are drawn once per seed. Two bounds are known: the best that a pixel can say by itself, and the best if
    the three patterns of the image are told.
    """

    name, classes, planes, patch = "patterns", 12, 8, 1

    def __init__(self, seed: int, size: int = 16, noise: float = 0.45):
        self.size, self.noise = size, noise
        self.patterns = nn.functional.normalize(
            torch.randn(self.classes, self.planes, generator=seeded(seed)), dim=1
        )

    def draw(self, generator: torch.Generator, count: int, split: str) -> tuple[Tensor, Tensor]:
        x, y, _ = self.told(generator, count)
        return x, y

    def told(self, generator: torch.Generator, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Images, classes (B, 16, 16), and the three patterns of each image (B, 3)."""
        n = self.size
        has = torch.rand(count, self.classes, generator=generator).argsort(dim=1)[:, :3]
        which = torch.randint(3, (count, n, n), generator=generator)
        y = has.gather(1, which.flatten(1)).unflatten(1, (n, n))
        x = self.patterns[y].movedim(-1, 1)
        return x + self.noise * torch.randn(x.shape, generator=generator), y, has

    def bounds(self, seed: int, count: int) -> tuple[float, float]:
        """Mean IoU of the best guess from a pixel alone, and from a pixel and the three patterns of its image."""
        x, y, has = self.told(seeded(seed), count)
        far = (x.movedim(1, -1)[..., None, :] - self.patterns).square().sum(-1)  # (B, n, n, 12)
        absent = torch.ones(count, self.classes, dtype=torch.bool).scatter(1, has, False)
        known = far.masked_fill(absent[:, None, None], torch.inf)
        return mean_iou(far.argmin(-1), y, self.classes), mean_iou(known.argmin(-1), y, self.classes)


class Digits:
    """Images (B, 1, 16, 16) of digits. A pixel with ink has its digit as class, the others have 10."""

    name, classes, planes, patch = "digits", 11, 1, 3

    def __init__(self, seed: int, size: int = 16):
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
        order = torch.randperm(len(images), generator=seeded(seed))
        x = interpolate(images[order], size=(size, size), mode="bilinear", align_corners=False)
        y = torch.tensor(digits.target)[order, None, None].expand(-1, size, size)
        y = torch.where(x[:, 0] > 0.4, y, 10)
        parts = zip(
            ("train", "valid", "test"), x.split([1097, 300, 400]), y.split([1097, 300, 400]), strict=True
        )
        self.parts = {split: (x, y) for split, x, y in parts}

    def draw(self, generator: torch.Generator, count: int, split: str) -> tuple[Tensor, Tensor]:
        x, y = self.parts[split]
        some = torch.randperm(len(x), generator=generator)[:count]
        return x[some], y[some]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mean_iou(found: Tensor, y: Tensor, classes: int) -> float:
    """The intersection over the union of each class, over all pixels, and their mean over the classes that occur."""
    table = torch.bincount((classes * y + found).flatten(), minlength=classes**2).reshape(classes, classes)
    table = table.double()
    union = table.sum(0) + table.sum(1) - table.diagonal()
    return float((table.diagonal() / union)[union > 0].mean())


# Models ---------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Z + norm(W_u A V) with A = softmax(QᵀK / √d) over all pixels: a non-local block of one head."""

    def __init__(self, channels: int):
        super().__init__()
        self.lower = nn.Conv2d(channels, 3 * channels, 1)
        self.upper = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, z: Tensor) -> Tensor:
        q, k, v = self.lower(z).flatten(2).chunk(3, dim=1)  # (B, d, n)
        a = (q.mT @ k / q.shape[1] ** 0.5).softmax(dim=2)  # (B, n, n)
        return z + self.norm(self.upper((v @ a.mT).unflatten(2, z.shape[2:])))


class Bread(nn.Module):
    """Z + norm(W_u relu(W_l Z)): a hamburger without ham, so without context."""

    def __init__(self, channels: int):
        super().__init__()
        self.lower = nn.Conv2d(channels, channels, 1)
        self.upper = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, z: Tensor) -> Tensor:
        return z + self.norm(self.upper(self.lower(z).relu()))


def block(options: Options, arm: str, steps: int = 6) -> nn.Module:
    """The block in the middle."""
    if arm in ("none", "attention"):
        return Bread(CHANNELS) if arm == "none" else Attention(CHANNELS)
    ham = VQ() if arm.startswith("vq") else NMF()
    if arm.endswith("unrolled"):
        return Hamburger(CHANNELS, ham=ham, steps=steps, tracked=steps)
    if options.solver is not None or options.grad is not None:
        own = SimpleFixedPointIteration(
            max_iter=3 if arm.endswith("K=3") else steps, tol=1e-2, stop_mode="rel"
        )
        return Hamburger(CHANNELS, ham=ham, deq=options.deq(own, JFB()))
    if arm.endswith("K=3"):
        return Hamburger(CHANNELS, ham=ham, steps=3, eval_steps=4)
    return Hamburger(CHANNELS, ham=ham, steps=steps)


def network(options: Options, task: Any, arm: str) -> nn.Module:
    """Two convolutions, the block, and a classifier of pixels."""
    torch.manual_seed(options.seed)
    p = task.patch
    net = nn.Sequential(
        nn.Conv2d(task.planes, CHANNELS, p, padding=p // 2),
        nn.ReLU(),
        nn.Conv2d(CHANNELS, CHANNELS, p, padding=p // 2),
        nn.BatchNorm2d(CHANNELS),
        nn.ReLU(),
        block(options, arm),
        nn.Conv2d(CHANNELS, task.classes, 1),
    )
    return net.to(options.device)


# Training -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is done."""

    steps: int = 200
    rates: Sequence[float] = RATES
    test: int = 300
    looks: int = 5
    depths: Sequence[int] = (2, 3, 6, 12, 24)


QUICK = Sizes(steps=3, rates=RATES[1:2], test=8, looks=1, depths=(2, 6))


class Run:
    """The training of an arm on a task."""

    def __init__(self, options: Options, task: Any, arm: str, sizes: Sizes, rate: float):
        self.options, self.task, self.sizes = options, task, sizes
        self.net = network(options, task, arm)
        self.adam = torch.optim.Adam(self.net.parameters(), lr=rate)
        self.batches = seeded(options.seed + 100)
        self.steps, self.seconds = 0, 0.0
        self.curve: list[tuple[int, float, float]] = []

    def draw(self, generator: torch.Generator, count: int, split: str) -> tuple[Tensor, Tensor]:
        x, y = self.task.draw(generator, count, split)
        return x.to(self.options.device), y.to(self.options.device)

    @torch.no_grad()
    def score(self, split: str) -> float:
        """Mean IoU on new images."""
        self.net.eval()
        x, y = self.draw(
            seeded(self.options.seed + (200 if split == "valid" else 300)), self.sizes.test, split
        )
        found = torch.cat([self.net(part).argmax(1) for part in x.split(50)])
        self.net.train()
        return mean_iou(found, y, self.task.classes)

    def step(self) -> None:
        x, y = self.draw(self.batches, BATCH, "train")
        began = clock(self.options.device)
        loss = cross_entropy(self.net(x), y)
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        self.seconds += clock(self.options.device) - began
        self.steps += 1

    def train(self, steps: int) -> Run:
        """So many steps, with a learning rate that falls to zero in a straight line."""
        every = max(1, steps // self.sizes.looks)
        rate = self.adam.param_groups[0]["lr"]
        for i in range(1, steps + 1):
            self.adam.param_groups[0]["lr"] = rate * (1 - (i - 1) / steps)
            self.step()
            if i % every == 0 or i == steps:
                self.curve.append((self.steps, self.seconds, self.score("test")))
        return self


def compare(task: Any, options: Options, sizes: Sizes, progress: Progress) -> Measured:
    """Every arm on a task: at equal steps, and at the seconds that self-attention takes."""
    found: Measured = {}
    for arm in ARMS:
        runs = {rate: Run(options, task, arm, sizes, rate).train(sizes.steps) for rate in sizes.rates}
        rate = max(runs, key=lambda rate: runs[rate].score("valid"))
        end = runs[rate].curve[-1]
        found |= {
            f"{task.name} {arm}": end[2],
            f"{task.name} {arm} ms": 1e3 * end[1] / end[0],
            f"{task.name} {arm} rate": rate,
            f"{task.name} {arm} curve": [list(column) for column in zip(*runs[rate].curve, strict=True)][1:],
        }
        progress.step(f"{task.name}: {arm} {end[2]:.3f}")
    for arm in LEVEL:
        ms = (found[f"{task.name} attention ms"], found[f"{task.name} {arm} ms"])
        steps = round(sizes.steps * ms[0] / ms[1])
        run = Run(options, task, arm, sizes, found[f"{task.name} {arm} rate"]).train(steps)
        found[f"{task.name} {arm} same seconds"] = run.curve[-1][2]
        found[f"{task.name} {arm} steps then"] = steps
    progress.step(f"{task.name}: equal seconds")
    return found


# Gradients and memory -------------------------------------------------------------------------------------


def gradients(options: Options, sizes: Sizes, progress: Progress) -> Measured:
    """The one-step gradient beside the unrolled one, and the bytes that autograd saves, against K; of new networks."""
    task = Digits(options.seed)
    x, y = (t.to(options.device) for t in task.draw(seeded(options.seed + 400), BATCH, "train"))
    found: Measured = {"depths": list(sizes.depths)}
    own = Options(seed=options.seed, device=options.device)

    def saved(net: nn.Module) -> tuple[float, Tensor]:
        with SavedBytes([*net.parameters(), x, y]) as held:
            loss = cross_entropy(net(x), y)
            loss.backward()
        low = net[5].lower.weight.grad  # what goes through the decomposition
        return held.peak / 2**20, low.flatten().double()

    for ham in ("nmf", "vq"):
        cosines, sizes_of, one_step, unrolled = [], [], [], []
        for steps in sizes.depths:
            pair = []
            for arm in (ham, f"{ham} unrolled"):
                net = network(own, task, ham)
                torch.manual_seed(options.seed)
                bases = net[5].bases
                net[5] = block(own, arm, steps).to(options.device)
                net[5].bases.copy_(bases)
                pair.append(saved(net))
            (less, a), (more, b) = pair
            one_step.append(less)
            unrolled.append(more)
            cosines.append(float(a @ b / (a.norm() * b.norm())))
            sizes_of.append(float(a.norm() / b.norm()))
        at = sizes.depths.index(6)
        found |= {
            f"{ham} cosines": cosines,
            f"{ham} cosine": cosines[at],
            f"{ham} size": sizes_of[at],
            f"{ham} bytes": one_step,
            f"{ham} unrolled bytes": unrolled,
            f"{ham} MiB": one_step[at],
            f"{ham} unrolled MiB": unrolled[at],
            f"{ham} growth": one_step[-1] / one_step[0],
            f"{ham} unrolled growth": unrolled[-1] / unrolled[0],
        }
        progress.step(f"gradients: {ham}")
    for arm in ("none", "attention"):
        found[f"{arm} MiB"], _ = saved(network(own, task, arm))
    return found


def measure(options: Options, progress: Progress) -> Measured:
    """All of it, for one seed."""
    sizes = QUICK if options.quick else Sizes()
    progress.begin(2 * len(ARMS) + 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # six steps are meant
        found = gradients(options, sizes, progress)
        patterns = Patterns(options.seed)
        found["patterns alone"], found["patterns told"] = patterns.bounds(options.seed + 300, sizes.test)
        for task in (patterns, Digits(options.seed)):
            found |= compare(task, options, sizes, progress)
    return found


# What is said of it ---------------------------------------------------------------------------------------


def both(template: str) -> Callable[[Results], str]:
    """A sentence for each task, with the arms that it names in braces, in percent."""

    def filled(results: Results) -> str:
        out = []
        for task in ("patterns", "digits"):
            parts = template.split("{")
            text = parts[0]
            for part in parts[1:]:
                arm, rest = part.split("}", 1)
                text += results[f"{task} {arm}"].cell(1, 100) + rest
            out.append(f"{task}: {text}")
        return "; ".join(out)

    return filled


CLOSE = 0.01  # of a mean IoU, that counts as equal


def ham(results: Results, task: str, ending: str = "") -> float:
    """The mean IoU of the better of both decompositions."""
    return max(results[f"{task} {name}{ending}"].mean for name in ("nmf", "vq"))


def where(shows: Callable[[str], bool]) -> bool | str:
    """A claim on both tasks, on none, or on which."""
    tasks = [task for task in ("patterns", "digits") if shows(task)]
    return f"on {tasks[0]} alone" if len(tasks) == 1 else bool(tasks)


def one_step(results: Results, ending: str = "") -> bool | str:
    """Whether it trains better than the unrolled gradient, with both decompositions."""

    def better(task: str) -> bool:
        return all(
            results[f"{task} {name}{ending}"].mean > results[f"{task} {name} unrolled{ending}"].mean + CLOSE
            for name in ("nmf", "vq")
        )

    return where(better)


CLAIMS = (
    Claim(
        text="A matrix decomposition, the better of both, is as good as self-attention",
        paper="better: 44.9 % on ADE20K with NMF and ResNet-101",
        ours=both("NMF {nmf}, VQ {vq}, attention {attention}"),
        shows=lambda r: where(lambda task: ham(r, task) >= r[f"{task} attention"].mean - CLOSE),
    ),
    Claim(
        text="It gives a pixel what the convolutions do not see",
        paper="better than the same network without",
        ours=both("NMF {nmf}, VQ {vq}, without {none}"),
        shows=lambda r: where(lambda task: ham(r, task) > r[f"{task} none"].mean + CLOSE),
    ),
    Claim(
        text="The same at the seconds that self-attention takes",
        paper="not compared",
        ours=both(
            "NMF {nmf same seconds}, VQ {vq same seconds}, attention {attention}, without {none same seconds}"
        ),
        shows=lambda r: where(
            lambda task: ham(r, task, " same seconds") >= r[f"{task} attention"].mean - CLOSE
        ),
    ),
    Claim(
        text="The one-step gradient trains better than back-propagation through all steps",
        paper="for NMF and for VQ",
        ours=both("NMF {nmf}, unrolled {nmf unrolled}; VQ {vq}, unrolled {vq unrolled}"),
        shows=lambda r: one_step(r),
    ),
    Claim(
        text="And in equal time",
        paper="not compared",
        ours=both(
            "NMF {nmf same seconds}, unrolled {nmf unrolled same seconds}; VQ {vq same seconds}, unrolled "
            "{vq unrolled same seconds}"
        ),
        shows=lambda r: one_step(r, " same seconds"),
    ),
    Claim(
        text="Its memory does not depend on K",
        paper="O(1)",
        ours=lambda r: (
            f"saved bytes from the smallest to the largest K: NMF ×{r['nmf growth'].cell(2)}, unrolled "
            f"×{r['nmf unrolled growth'].cell(2)}"
        ),
        shows=lambda r: r["nmf growth"].mean < 1.05 < r["nmf unrolled growth"].mean,
    ),
    Claim(
        text="Less memory and time than self-attention",
        paper="O(n) in the pixels against O(n²)",
        ours=lambda r: (
            f"saved MiB: NMF {r['nmf MiB'].cell(1)}, attention {r['attention MiB'].cell(1)}, without "
            f"{r['none MiB'].cell(1)}; ms per step: {r['patterns nmf ms'].cell(0)}, "
            f"{r['patterns attention ms'].cell(0)}, {r['patterns none ms'].cell(0)}"
        ),
        shows=lambda r: (
            r["nmf MiB"].mean < r["attention MiB"].mean
            and r["patterns nmf ms"].mean < r["patterns attention ms"].mean
        ),
    ),
    Claim(
        text="Three steps in the place of six are worse",
        paper="48.8 % against 49.6 % on ADE20K (Light-Ham, VAN-Base)",
        ours=both("K = 3 {nmf K=3}, K = 6 {nmf}"),
        shows=lambda r: where(lambda task: r[f"{task} nmf"].mean > r[f"{task} nmf K=3"].mean + CLOSE),
    ),
)


def tables(results: Results) -> Sequence[tuple[str, Sequence[Sequence[str]]]]:
    """Scores and costs of all arms; gradients."""
    rows = [["", "patterns", "digits", "ms per step, patterns", "digits"]]
    for arm, title in ARMS.items():
        scores = [results[f"{task} {arm}"].cell(1, 100) for task in ("patterns", "digits")]
        rows.append(
            [title, *scores, *(results[f"{task} {arm} ms"].cell(0) for task in ("patterns", "digits"))]
        )
    rows.append(["the best from a pixel alone", results["patterns alone"].cell(1, 100), "", "", ""])
    rows.append(
        ["the best if the three patterns are told", results["patterns told"].cell(1, 100), "", "", ""]
    )
    more = [["", "cosine with the unrolled gradient", "its size, of the unrolled", "saved MiB", "unrolled"]]
    for ham, title in (("nmf", "NMF"), ("vq", "VQ")):
        cells = [results[f"{ham} {key}"].cell(2) for key in ("cosine", "size", "MiB", "unrolled MiB")]
        more.append([title, *cells])
    return (
        ("Mean intersection over union, in percent, after the same number of steps", rows),
        ("The one-step gradient of W_l at K = 6, of new networks on digits", more),
    )


def draw(figure: Any, found: Sequence[Measured]) -> None:
    """Scores against seconds, and saved bytes against K: the mean over seeds, and each seed as a thin line."""
    axes = figure.subplots(1, 3)
    for axis, task in zip(axes, ("patterns", "digits"), strict=False):
        for i, (arm, label) in enumerate(ARMS.items()):
            curves = [one[f"{task} {arm} curve"] for one in found]
            for seconds, scores in curves:
                axis.plot(seconds, scores, f"C{i}-", lw=0.5, alpha=0.4)
            means = [
                [sum(at) / len(at) for at in zip(*column, strict=True)]
                for column in zip(*curves, strict=True)
            ]
            axis.plot(*means, f"C{i}.-", lw=1.5, label=label)
        axis.set(xlabel="seconds of training")
        axis.set_title(f"mean IoU, {task}", fontsize=9)
    for bound in ("alone", "told"):
        mean = sum(one[f"patterns {bound}"] for one in found) / len(found)
        axes[0].axhline(mean, color="grey", ls=":", lw=1)
        axes[0].annotate(
            f"the best, {bound}",
            (1, mean),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="top",
            fontsize=7,
        )
    for arm in ("nmf", "nmf unrolled", "vq", "vq unrolled"):
        i = list(ARMS).index(arm)
        for one in found:
            axes[2].loglog(one["depths"], one[f"{arm} bytes"], f"C{i}.-", lw=1, alpha=0.7)
    axes[2].axhline(found[0]["attention MiB"], color="C1", lw=1)
    axes[2].set_xticks(found[0]["depths"], found[0]["depths"])
    axes[2].set_xticks([], minor=True)
    axes[2].set(xlabel="K")
    axes[2].set_title("MiB that autograd saves", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=4, fontsize=8)


STUDY = Study(
    name="hamburger",
    title="Is attention better than matrix decomposition?",
    source="Geng, Guo, Chen, Li, Wei and Lin, ICLR 2021, arXiv 2109.04553.",
    replaces="--solver and --grad are in the place of six steps and their one-step gradient.",
    smaller=(
        "Images of 16×16 pixels, generated or of digits, in the place of ADE20K and PASCAL VOC; 32 channels, rank 8.",
        f"{Sizes().steps} steps of {BATCH} images by Adam. Every arm has its own learning rate, of "
        f"{', '.join(map(str, RATES))}, chosen by validation after whole trainings.",
        "D starts from random numbers that are drawn once; the paper draws them at each call.",
        "The block of self-attention has 4256 parameters, the others 2144.",
        "Seconds are CPU seconds of the process, without the evaluations. One point counts as equal.",
    ),
    claims=CLAIMS,
    measure=measure,
    tables=tables,
    draw=draw,
)

main = STUDY.main

if __name__ == "__main__":
    raise SystemExit(main())
