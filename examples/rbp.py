"""Recurrent back-propagation and its variants: a Hopfield memory of ten digits, trained by each of them.

    python examples/rbp.py [--seed N | --seeds N N N] [--quick] [--solver S] [--grad G] [--device D] [--out FOLDER]

The free units of a memory settle at z* = f(z*), and u = Jᵀu + g gives its gradient; see `torchdeq.zoo.rbp` for the
methods BPTT, TBPTT, RBP, CG-RBP and Neumann-RBP. It learns to show the images that it is given. Then half of the black
pixels of an image are taken away, and those of what it shows that are wrong are counted.

Each method takes the better of the same two learning rates, by the error on other damaged images. `--solver` is the
forward solver, but for BPTT and TBPTT, which are of plain iteration. `--grad` is in the place of implicit
differentiation with GMRES, which is not of the paper but what this library does if nothing is said.

Source: Liao, Xiong, Fetaya, Zhang, Yoon, Pitkow, Urtasun and Zemel (2018), arXiv 1803.06396.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_digits
from study import Claim, Measured, Options, Progress, Results, Study, clock, peaks
from torch import Tensor

from torchdeq import DEQ, GMRES, IFT, ConvergenceWarning, GradMethod, SimpleFixedPointIteration, Unroll
from torchdeq.diagnostics import SavedBytes
from torchdeq.zoo.rbp import HopfieldMemory, methods

STEPS = 50  # of the memory, as in the paper's code
TERMS = 20  # K, likewise
FEW = (5, 10)  # other K to train with
ORDERS = (5, 10, 20, 40)  # K to look at gradients and memory with
OURS = "IFT"
DEFAULT = IFT(solver=GMRES(tol=1e-4))
NAMES = [*methods(), OURS]
TRUNCATED = ("TBPTT", "RBP", "CG-RBP", "Neumann-RBP")
RADII = ("trained", "random")
WANTED = 0.9  # spectral radius of J of the random memory
ROUGH = 0.02  # a share of wrong pixels that counts as equal: one of 64


class Sizes(NamedTuple):
    """How much is done."""

    steps: int
    rates: tuple[float, ...]
    damaged: int  # of each image, to choose by and to report
    hidden: int

    @classmethod
    def of(cls, options: Options) -> Sizes:
        return cls(3, (1e-2,), 2, 16) if options.quick else cls(600, (5e-3, 1e-2), 20, 128)


class Images(NamedTuple):
    """Ten images (10, 64) in black and white, and damaged ones (10 n, 64), to choose by and to report."""

    whole: Tensor
    choose: Tensor
    test: Tensor

    @classmethod
    def draw(cls, seed: int, damaged: int, device: torch.device) -> Images:
        """One digit of each class; of each `damaged` copies in each set."""
        draw = torch.Generator().manual_seed(seed)
        bunch = load_digits()
        of_class = [torch.tensor((bunch.target == c).nonzero()[0]) for c in range(10)]
        one = torch.stack([i[torch.randint(len(i), (), generator=draw)] for i in of_class])
        whole = (torch.tensor(bunch.data, dtype=torch.float32)[one] >= 8).float()
        sets = [whole, *(halved(whole.repeat(damaged, 1), draw) for _ in range(2))]
        return cls(*(x.to(device) for x in sets))


def halved(x: Tensor, draw: torch.Generator) -> Tensor:
    """x (N, pixels) with half of the black pixels of each at 0."""
    order = torch.rand(x.shape, generator=draw) + 2 * (1 - x)  # the black ones first
    rank = order.argsort(dim=1).argsort(dim=1)  # (N, pixels)
    return x * (rank >= (x.sum(dim=1, keepdim=True) / 2).floor())


def wrong(memory: HopfieldMemory, damaged: Tensor, whole: Tensor) -> float:
    """The share of pixels that are wrong in what is recalled; one that is not finite is."""
    target = whole.repeat(len(damaged) // len(whole), 1)
    return (memory.recall(damaged) != target).double().mean().item()


def memory_of(options: Options, hidden: int, method: GradMethod) -> HopfieldMemory:
    """A new one, the same for each method."""
    torch.manual_seed(options.seed)
    plain = SimpleFixedPointIteration(max_iter=STEPS)
    deq = DEQ(plain if isinstance(method, Unroll) else options.forward(plain), method)
    return HopfieldMemory(deq, hidden=hidden).to(options.device)


def loss_of(memory: HopfieldMemory, x: Tensor) -> Tensor:
    """Mean absolute error over pixels, summed over images."""
    return (memory(x)[0] - x).abs().mean(dim=1).sum()


class Trained(NamedTuple):
    """A memory, its loss on the way, the seconds it took, the rate, and how well it recalls images to choose by."""

    memory: HopfieldMemory
    losses: list[float]
    seconds: float
    rate: float
    chosen_by: float


def train(options: Options, images: Images, sizes: Sizes, method: GradMethod, rate: float) -> Trained:
    """A memory by one gradient method, with a learning rate that falls to zero as a cosine."""
    memory, x = memory_of(options, sizes.hidden, method), images.whole
    optimizer = torch.optim.Adam(memory.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, sizes.steps)
    began, losses = clock(x.device), []
    for _ in range(sizes.steps):
        optimizer.zero_grad()
        loss = loss_of(memory, x)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach() / len(x))
    spent = clock(x.device) - began
    return Trained(
        memory, torch.stack(losses).tolist(), spent, rate, wrong(memory, images.choose, images.whole)
    )


# Gradients ------------------------------------------------------------------------------------------------


def jacobian(memory: HopfieldMemory, x: Tensor) -> Tensor:
    """J at the fixed point of each image, (B, D, D), dense."""
    f, z = memory.dynamics(x)
    with torch.no_grad():
        for _ in range(500):
            z = f(z)
        _, product = torch.func.vjp(f, z)
        rows = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)[:, None].expand(-1, *z.shape)
        return torch.vmap(product)(rows)[0].transpose(0, 1)


def radius(memory: HopfieldMemory, x: Tensor) -> float:
    """The largest spectral radius over the images, infinite where plain iteration does not converge."""
    eigenvalues = torch.linalg.eigvals(jacobian(memory, x).nan_to_num(1e6, 1e6, 1e6))
    return eigenvalues.abs().max().item()


def at_radius(x: Tensor, hidden: int, wanted: float) -> HopfieldMemory:
    """An untrained memory whose weights are as large as the spectral radius wants. Trained ones saturate before."""
    unit = HopfieldMemory(hidden=hidden, scale=1.0).to(x)

    def scaled(factor: float) -> HopfieldMemory:
        other = copy.deepcopy(unit)
        with torch.no_grad():
            other.v.mul_(factor)
        return other

    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if radius(scaled(middle), x) < wanted else (low, middle)
    return scaled(low)


def gradient(memory: HopfieldMemory, x: Tensor, method: GradMethod) -> Tensor:
    """By all weights, flat, from a state after 500 steps, which is z* to rounding."""
    memory = copy.deepcopy(memory)
    memory.deq = DEQ(SimpleFixedPointIteration(max_iter=500), method)
    (g,) = torch.autograd.grad(loss_of(memory, x), [memory.v])
    return g.flatten()


def dense_gradient(memory: HopfieldMemory, x: Tensor) -> Tensor:
    """The exact one, with (I − Jᵀ) u = g solved by a factorisation."""
    f, z = memory.dynamics(x)
    with torch.no_grad():
        for _ in range(500):
            z = f(z)
    shown = z[:, -memory.pixels :]
    g = torch.zeros_like(z)
    g[:, -memory.pixels :] = (shown - x).sign() / memory.pixels
    eye = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    u = torch.linalg.solve(eye - jacobian(memory, x).mT, g)
    (out,) = torch.autograd.grad(f(z), [memory.v], u)
    return out.flatten()


def gradients(memory: HopfieldMemory, x: Tensor, orders: Sequence[int]) -> Measured:
    """Errors of all methods and orders, relative to the exact gradient, in float64."""
    memory, x = copy.deepcopy(memory).double(), x.double()
    found: Measured = {}
    subjects = {"trained": memory, "random": at_radius(x, memory.hidden, WANTED)}
    for name, subject in subjects.items():
        found[f"radius {name}"] = radius(subject, x)
        exact = dense_gradient(subject, x)
        got: dict[tuple[str, int], Tensor] = {}
        for order, method in itertools.product(orders, TRUNCATED):
            got[method, order] = gradient(subject, x, methods(order)[method])
        for method in TRUNCATED:
            errors = [((got[method, k] - exact).norm() / exact.norm()).item() for k in orders]
            found[f"{method} error {name} curve"] = errors
            found |= {f"{method} error {name} {k}": e for k, e in zip(orders, errors, strict=True)}
        bptt = gradient(subject, x, Unroll())
        found[f"BPTT error {name}"] = ((bptt - exact).norm() / exact.norm()).item()
        apart = [(got["Neumann-RBP", k] - got["TBPTT", k]).norm() / got["TBPTT", k].norm() for k in orders]
        found[f"Neumann-RBP from TBPTT {name}"] = max(a.item() for a in apart)
    return found


def saved_bytes(options: Options, x: Tensor, sizes: Sizes, orders: Sequence[int]) -> Measured:
    """The most that autograd holds at a time in a training step, beyond the weights, in KiB, by K; BPTT's by steps."""

    def made(method: GradMethod, steps: int) -> HopfieldMemory:
        memory = memory_of(options, sizes.hidden, method)
        memory.deq = DEQ(SimpleFixedPointIteration(max_iter=steps), method)
        return memory

    def of(method: GradMethod, steps: int) -> float:
        memory = made(method, steps)
        with SavedBytes(ignore=memory.parameters()) as saved:
            loss_of(memory, x).backward()
        return saved.peak / 1024

    def step(memory: HopfieldMemory) -> None:
        torch.autograd.grad(loss_of(memory, x), list(memory.parameters()))

    found: Measured = {}
    for name in TRUNCATED:
        curve = [of(methods(k)[name], STEPS) for k in orders]
        found[f"{name} KiB curve"] = curve
        found |= {f"{name} KiB {k}": size for k, size in zip(orders, curve, strict=True)}
    found["BPTT KiB curve"] = [of(Unroll(), k) for k in orders]
    found["BPTT KiB"] = of(Unroll(), STEPS)
    found[f"{OURS} KiB"] = of(options.gradient(DEFAULT), STEPS)
    each = {"BPTT": Unroll(), **{n: methods(TERMS)[n] for n in TRUNCATED}, OURS: options.gradient(DEFAULT)}
    runs = [functools.partial(step, made(method, STEPS)) for method in each.values()]
    for name, peak in zip(each, peaks(runs, options.device), strict=True):
        found[f"{name} peak"] = 1024 * peak
    return found


# The study ------------------------------------------------------------------------------------------------


def measure(options: Options, progress: Progress) -> Measured:
    """For a seed: each method at its better rate, other K at that rate, gradients and memory."""
    sizes = Sizes.of(options)
    images = Images.draw(options.seed, sizes.damaged, options.device)
    progress.begin(len(NAMES) * len(sizes.rates) + len(TRUNCATED) * len(FEW) + 2)
    untouched = (images.test != images.whole.repeat(sizes.damaged, 1)).double().mean().item()
    found: Measured = {"steps": sizes.steps, "damage": untouched, "orders": list(ORDERS)}
    arms: dict[str, GradMethod] = methods(TERMS) | {OURS: options.gradient(DEFAULT)}

    with warnings.catch_warnings():
        # Solves of a fixed number of steps say nothing of how near they came, and that is measured here.
        warnings.simplefilter("ignore", ConvergenceWarning)
        best: dict[str, Trained] = {}
        for name, method in arms.items():
            trials = []
            for rate in sizes.rates:
                trials.append(train(options, images, sizes, method, rate))
                progress.step(f"{name}, rate {rate:g}: loss {trials[-1].losses[-1]:.3f}")
            best[name] = chosen = min(trials, key=lambda t: (t.chosen_by, t.losses[-1]))
            found |= {
                f"{name} wrong": wrong(chosen.memory, images.test, images.whole),
                f"{name} loss": chosen.losses[-1],
                f"{name} rate": chosen.rate,
                f"{name} ms": 1e3 * chosen.seconds / sizes.steps,
                f"{name} curve": chosen.losses,
            }
        for name in TRUNCATED:
            found[f"{name} wrong {TERMS}"] = found[f"{name} wrong"]
            for order in FEW:
                short = train(options, images, sizes, methods(order)[name], best[name].rate)
                found[f"{name} wrong {order}"] = wrong(short.memory, images.test, images.whole)
                progress.step(f"{name}, K = {order}: {found[f'{name} wrong {order}']:.3f} wrong")
        torch.manual_seed(options.seed)
        found |= gradients(best["BPTT"].memory, images.whole, ORDERS)
        progress.step("gradients")
        found |= saved_bytes(options, images.whole, sizes, ORDERS)
        progress.step("memory")
    for name in ("CG-RBP", "Neumann-RBP"):
        found[f"{name} worse than BPTT"] = found[f"{name} wrong"] - found["BPTT wrong"]
    found["RBP worse"] = found[f"RBP wrong {FEW[0]}"] - found[f"Neumann-RBP wrong {FEW[0]}"]
    found["time"] = found["Neumann-RBP ms"] / found["TBPTT ms"]
    for name in ("TBPTT", "Neumann-RBP"):  # KiB for each step more, over the first half of K and the second
        for half, (k, m) in {"early": (ORDERS[0], ORDERS[-2]), "late": ORDERS[-2:]}.items():
            found[f"{name} {half} growth"] = (found[f"{name} KiB {m}"] - found[f"{name} KiB {k}"]) / (m - k)
    return found


def percent(*names: str) -> Callable[[Results], str]:
    """Of wrong pixels, as "8.1 (7.9–8.3) against …"."""
    return lambda r: " against ".join(r[name].cell(1, 100) for name in names)


def failures(r: Results) -> int:
    """For how many seeds RBP is worse than Neumann-RBP with the fewest steps."""
    return sum(worse > ROUGH for worse in r["RBP worse"].values)


CLAIMS = [
    Claim(
        text=f"RBP can be unstable: trained with K = {FEW[0]} it recalls worse than Neumann-RBP (wrong pixels, %)",
        paper="stated",
        ours=lambda r: (
            f"{percent(f'RBP wrong {FEW[0]}', f'Neumann-RBP wrong {FEW[0]}')(r)}; by more than {ROUGH:.0%} in "
            f"{failures(r)} of {len(r['RBP worse'].values)}"
        ),
        shows=lambda r: failures(r) > 0,  # that it can be, not that it always is
    ),
    Claim(
        text=f"Neumann-RBP with K = {TERMS} trains as well as BPTT (wrong pixels, %)",
        paper="stated",
        ours=percent("Neumann-RBP wrong", "BPTT wrong"),
        shows=lambda r: r["Neumann-RBP worse than BPTT"].mean < ROUGH,
    ),
    Claim(
        text=f"so does CG-RBP with K = {TERMS} (wrong pixels, %)",
        paper="stated",
        ours=percent("CG-RBP wrong", "BPTT wrong"),
        shows=lambda r: r["CG-RBP worse than BPTT"].mean < ROUGH,
    ),
    Claim(
        text="at a fixed point Neumann-RBP is TBPTT of as many steps (largest relative difference of gradients)",
        paper="proven",
        ours=lambda r: ", ".join(
            f"{r[f'Neumann-RBP from TBPTT {name}'].cell(0, scientific=True)} ({words})"
            for name, words in (("trained", "trained"), ("random", "random weights"))
        ),
        shows=lambda r: all(max(r[f"Neumann-RBP from TBPTT {name}"].values) < 1e-9 for name in RADII),
    ),
    Claim(
        text=f"its memory does not grow with K, that of TBPTT does, linearly (KiB a step, to K = {ORDERS[-1]})",
        paper="constant, linear",
        ours=lambda r: " against ".join(
            r[f"{name} late growth"].cell(1) for name in ("Neumann-RBP", "TBPTT")
        ),
        shows=lambda r: (
            all(max(r[f"Neumann-RBP {half} growth"].values) == 0 for half in ("early", "late"))
            and min(r["TBPTT late growth"].values) > 0
            and math.isclose(r["TBPTT early growth"].mean, r["TBPTT late growth"].mean, rel_tol=0.1)
        ),
    ),
    Claim(
        text=f"its time is that of TBPTT (ratio of a training step's, K = {TERMS})",
        paper="the same complexity",
        ours=lambda r: r["time"].cell(2),
        shows=lambda r: 2 / 3 < r["time"].mean < 3 / 2,
    ),
]


def tables(r: Results) -> Sequence[tuple[str, Sequence[Sequence[str]]]]:
    """All methods, other K, and what their gradients are off by."""
    head = [
        "method",
        "learning rate",
        "training loss",
        "wrong pixels, %",
        "ms per step",
        "saved, KiB",
        "peak, KiB",
    ]
    rows = []
    for name in NAMES:
        rates = " ".join(f"{rate:g}" for rate in dict.fromkeys(r[f"{name} rate"].values))
        size = f"{name} KiB {TERMS}" if name in TRUNCATED else f"{name} KiB"
        held = r[size].cell(0)
        cells = [r[f"{name} loss"].cell(3), r[f"{name} wrong"].cell(1, 100), r[f"{name} ms"].cell(1), held]
        cells.append(r[f"{name} peak"].cell(0))
        rows.append([f"{name}, GMRES" if name == OURS else name, rates, *cells])
    title = (
        f"{r['steps'].cell(0)} training steps, K = {TERMS}; {r['damage'].cell(1, 100)} % of the pixels of a damaged "
        f"image are wrong. Saved: what autograd keeps; peak: what is allocated for a gradient, with its solver's states"
    )
    found = [(title, [head, *rows])]
    orders = (*FEW, TERMS)
    short = [[name, *(r[f"{name} wrong {k}"].cell(1, 100) for k in orders)] for name in TRUNCATED]
    found.append(
        (
            "Wrong pixels, %, of memories trained with other K",
            [["method", *(f"K = {k}" for k in orders)], *short],
        )
    )
    for name in RADII:
        off = [
            [method, *(r[f"{method} error {name} {k}"].cell(1, scientific=True) for k in ORDERS)]
            for method in TRUNCATED
        ]
        which = (
            "the memory trained by BPTT"
            if name == "trained"
            else "an untrained memory of large random weights"
        )
        title = (
            f"Relative error of the gradient in float64: {which}, J of radius {r[f'radius {name}'].cell(2)}"
        )
        found.append((title, [["method", *(f"K = {k}" for k in ORDERS)], *off]))
    return found


def draw(figure: Any, found: Sequence[Measured]) -> None:
    """What is recalled, errors of gradients, and memory."""
    recalled, error, held = figure.subplots(1, 3)
    colors = {name: f"C{n}" for n, name in enumerate(NAMES)}
    # Where two say the same, the second is dashed, so that both can be seen.
    styles = dict.fromkeys(NAMES, "-") | {"Neumann-RBP": "--"}
    orders = [*FEW, TERMS]
    for one in found:
        for name in TRUNCATED:
            style = {"color": colors[name], "linestyle": styles[name], "marker": ".", "alpha": 0.7}
            recalled.plot(orders, [100 * one[f"{name} wrong {k}"] for k in orders], **style)
            error.plot(one["orders"], one[f"{name} error random curve"], **style)
        recalled.axhline(100 * one["BPTT wrong"], color=colors["BPTT"], alpha=0.3, linewidth=4)
    one = found[0]
    held.plot(
        one["orders"], one["BPTT KiB curve"], color=colors["BPTT"], alpha=0.3, linewidth=6, label="BPTT"
    )
    for name in TRUNCATED:
        curve = one[f"{name} KiB curve"]
        held.plot(one["orders"], curve, color=colors[name], linestyle=styles[name], marker=".", label=name)
    recalled.set(title="recalled by trained memories", xlabel="K", ylabel="wrong pixels, %", ylim=(0, None))
    error.set(title=f"gradient, radius {WANTED}", xlabel="K", ylabel="relative error", yscale="log")
    held.set(title="held by autograd", xlabel="K (BPTT: all steps)", ylabel="KiB", ylim=(0, None))
    held.legend(fontsize="small")


STUDY = Study(
    name="rbp",
    title="Recurrent back-propagation, and its variants",
    source="Liao, Xiong, Fetaya, Zhang, Yoon, Pitkow, Urtasun and Zemel (ICML 2018), arXiv 1803.06396",
    replaces="--solver is the forward solver of all but BPTT and TBPTT; --grad is in the place of IFT with GMRES.",
    smaller=[
        "digits of 8×8 pixels in black and white, one of each class, in place of MNIST; 128 hidden units, 1024 there",
        "600 training steps of all ten images with a learning rate that falls, for 10,000 of one image each",
        "K terms in Neumann-RBP and in TBPTT alike; CG-RBP ends early at a relative residual of 1e-4",
        "RBP starts at random numbers in (0, 1), as in the paper's code. Begun at g it would be Neumann-RBP",
        f"{ROUGH:.0%} of the pixels, one of 64, count as equal, and times in a ratio of 2/3 to 3/2 too. With one CPU "
        "thread, times are the process's",
        "trained for equal steps; there is no reading at equal time, as all end at the same error",
        "the abstract's claims are taken, which have no numbers; IFT with GMRES is not of the paper",
    ],
    claims=CLAIMS,
    measure=measure,
    tables=tables,
    draw=draw,
)

main = STUDY.main

if __name__ == "__main__":
    raise SystemExit(main())
