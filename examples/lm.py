"""Sequence models as equilibria: one causal transformer block, solved, against stacks of it.

    z = f(z, x) by Broyden's method,   dL/dθ by implicit differentiation,   against   z_{l+1} = f_l(z_l, x), l < L.

Two tasks, whose data are generated: *copy memory*, to repeat a few letters after a gap, and *characters* of sentences
from a probabilistic grammar with agreement of number across relative clauses, whose entropy is known. The same block is
solved for its equilibrium, stacked with tied weights, which are then as many, and stacked with weights of its own in
each layer, narrower so that they are as many. All models get the same grid of learning rates, tried for the same
seconds of the processor. The equilibrium makes a fixed number of training steps; a stack is read after as many, and
after as many seconds. A seed takes about four minutes on one core.

Source: Bai, Kolter and Koltun (2019), Deep Equilibrium Models, arXiv 1909.01377.

    python examples/lm.py [--seed N | --seeds N N N] [--quick] [--solver S] [--grad G] [--device D] [--out FOLDER]
"""

from __future__ import annotations

import functools
import math
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from study import Claim, Measured, Options, Progress, Results, Study, clock, peaks
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from torchdeq import DEQ, GMRES, IFT, Broyden, ConvergenceWarning
from torchdeq.diagnostics import SavedBytes
from torchdeq.zoo.lm import CausalBlock, EquilibriumLM

WIDTH, HEADS = 32, 2
SOLVER = Broyden(tol=1e-2, stop_mode="rel", max_iter=20)
ADJOINT = GMRES(tol=1e-2, max_iter=20)
RATES = (4e-3, 1e-2)
TRIAL = 1.8  # seconds of the processor for trying a rate
DEPTHS = (2, 4, 8)
STACKS = [f"{kind} {depth}" for kind in ("tied", "untied") for depth in DEPTHS]
LAYERS, EVALUATIONS = (2, 4, 8, 16, 32), (4, 8, 16, 32)  # of stacks and solves whose memory is looked at
CLOSE = 0.01  # nats or bits that count as equal


# The data -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Tokens (B, T), what comes next (B, T), and the places that count."""

    tokens: Tensor
    targets: Tensor
    places: slice


@dataclass(frozen=True)
class Copy:
    """`symbols` letters of eight, `gap` blanks, and as many marks, at which the letters are to be repeated.

    The loss is that of the repeated letters, in nats for each.
    """

    symbols: int = 8
    gap: int = 16
    vocab: int = 10
    floor: float = 0.0
    unit: str = "nats per letter"

    @property
    def length(self) -> int:
        return 2 * self.symbols + self.gap

    def batch(self, count: int, generator: torch.Generator) -> Batch:
        letters = torch.randint(2, self.vocab, (count, self.symbols), generator=generator)
        blanks = torch.zeros(count, self.gap, dtype=torch.long)
        tokens = torch.cat([letters, blanks, torch.ones_like(letters)], dim=1)
        targets = torch.zeros_like(tokens)
        targets[:, -self.symbols :] = letters
        return Batch(tokens, targets, slice(-self.symbols, None))

    def test(self, count: int) -> Batch:
        return self.batch(count, torch.Generator().manual_seed(12345))


NOUNS = ("cat", "dog", "rat", "bird", "fox", "cow")
ALONE, ACTING = ("run", "sleep", "sing"), ("see", "chase", "like")
RELATIVE, OBJECT = 0.3, 0.5  # the probability of a relative clause, and of an object


def noun_phrase(draw: random.Random, plural: bool) -> tuple[str, float]:
    """ "the cats that the dog sees", and the bits of what was chosen in it, but for its number."""
    words, bits = f"the {draw.choice(NOUNS)}{'s' if plural else ''}", math.log2(len(NOUNS))
    relative = draw.random() < RELATIVE
    bits -= math.log2(RELATIVE if relative else 1 - RELATIVE)
    if relative:
        other = draw.random() < 0.5
        inner, more = noun_phrase(draw, other)
        words += f" that {inner} {draw.choice(ACTING)}{'' if other else 's'}"
        bits += 1 + more + math.log2(len(ACTING))
    return words, bits


def sentence(draw: random.Random) -> tuple[str, float]:
    """A sentence, and its bits. No sentence can be read in two ways, so that they are −log₂ of its probability."""
    plural, acting = draw.random() < 0.5, draw.random() < OBJECT
    words, bits = noun_phrase(draw, plural)
    verbs = ACTING if acting else ALONE
    words += f" {draw.choice(verbs)}{'' if plural else 's'}"
    bits += 1 + math.log2(len(verbs)) - math.log2(OBJECT if acting else 1 - OBJECT)
    if acting:
        other = draw.random() < 0.5
        inner, more = noun_phrase(draw, other)
        words, bits = f"{words} {inner}", bits + 1 + more
    return words + ". ", bits


class Characters:
    """Windows of generated text. The loss is that of every next character, in bits.

    Arguments:
        seed: of the text to learn from.
        sentences: of it.
    """

    length: int = 48
    unit: str = "bits per character"

    def __init__(self, seed: int, sentences: int):
        train, test = (
            [sentence(random.Random(s * 10**6 + i)) for i in range(n)]
            for s, n in ((seed + 1, sentences), (0, 1000))
        )
        self.alphabet = sorted(set("".join(words for words, _ in test)))
        self.vocab = len(self.alphabet)
        self.train, self.held = (self.encode("".join(w for w, _ in text)) for text in (train, test))
        #: The entropy of the text that is held out, in bits per character, if it is read from its beginning.
        self.floor = sum(bits for _, bits in test) / len(self.held)

    def encode(self, text: str) -> Tensor:
        return torch.tensor([self.alphabet.index(c) for c in text])

    def windows(self, text: Tensor, starts: Tensor) -> Batch:
        rows = text[starts[:, None] + torch.arange(self.length + 1)]
        return Batch(rows[:, :-1], rows[:, 1:], slice(None))

    def batch(self, count: int, generator: torch.Generator) -> Batch:
        most = len(self.train) - self.length - 1
        return self.windows(self.train, torch.randint(most, (count,), generator=generator))

    def test(self, count: int) -> Batch:
        count = min(count, (len(self.held) - 1) // self.length)
        return self.windows(self.held, self.length * torch.arange(count))


Task = Copy | Characters


# The stacks -----------------------------------------------------------------------------------------------------


class Stack(EquilibriumLM):
    """The block, L times one after the other, in the place of its equilibrium.

    Arguments:
        vocab, length, width, heads: see `EquilibriumLM`.
        depth: L.
        tied: whether one block is used L times, from zero, with the input injected each time. Otherwise there are L
            blocks, and the input is where the first begins, as is usual.
    """

    def __init__(self, vocab: int, length: int, *, width: int, heads: int, depth: int, tied: bool):
        super().__init__(vocab, length, DEQ(SOLVER), width=width, heads=heads)
        self.depth, self.tied = depth, tied
        if not tied:
            self.blocks = nn.ModuleList(CausalBlock(width, heads=heads) for _ in range(depth))
            for block in self.blocks:
                block.inject = nn.Identity()  # no weights for what is not used
            self.block = nn.Identity()

    def forward(self, tokens: Tensor) -> tuple[Tensor, None]:
        """The logits (B, T, vocab), and nothing."""
        if self.tied:
            injected = self.inject(tokens)
            z = injected.new_zeros(*tokens.shape, self.embed.embedding_dim)
            for _ in range(self.depth):
                z = self.block(z, injected)
            return self.head(z), None
        z = self.embed(tokens) + self.places[: tokens.shape[1]]
        nothing = z.new_zeros(*tokens.shape, 4 * z.shape[-1])
        for block in self.blocks:
            z = block(z, nothing)
        return self.head(z), None


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def stack(name: str, task: Task, most: int) -> Stack:
    """The stack of that name: the widest of at most so many parameters, and no wider than the equilibrium."""
    kind, depth = name.split()
    for width in range(WIDTH, 0, -HEADS):
        model = Stack(
            task.vocab, task.length, width=width, heads=HEADS, depth=int(depth), tied=kind == "tied"
        )
        if size(model) <= most:
            return model
    raise ValueError(f"{name} layers do not fit into {most} parameters, however narrow.")


# Training -----------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """How a training went."""

    losses: list[float] = field(default_factory=list)  # of the batches
    seconds: list[float] = field(default_factory=list)  # of the processor, after each step
    forward: list[int] = field(default_factory=list)  # evaluations of each solve
    converged: list[float] = field(default_factory=list)  # the share of the samples
    early: float = math.nan  # the test loss after as many steps as the equilibrium made
    accuracy: float = math.nan  # at the end


def loss_of(logits: Tensor, batch: Batch, task: Task) -> Tensor:
    """In the task's unit."""
    nats = cross_entropy(
        logits[:, batch.places].flatten(0, 1), batch.targets[:, batch.places].flatten().to(logits.device)
    )
    return nats / math.log(2) if isinstance(task, Characters) else nats


@torch.no_grad()
def tested(model: nn.Module, batch: Batch, task: Task, device: torch.device) -> tuple[float, float]:
    """Loss and accuracy on what was not trained on."""
    logits, _ = model(batch.tokens.to(device))
    right = logits.argmax(dim=-1).cpu() == batch.targets
    return loss_of(logits, batch, task).item(), right[:, batch.places].float().mean().item()


def train(
    model: nn.Module, task: Task, rate: float, steps: int, seconds: float, options: Options, size: int
) -> Run:
    """Train for so many steps and so many seconds, whichever is longer; test after the steps if there is more."""
    run, generator = Run(), torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, betas=(0.9, 0.98))
    spent, test = 0.0, task.test(8 if options.quick else 256)
    while len(run.losses) < steps or spent < seconds:
        began = clock(options.device)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (len(run.losses) + 1) / 20)
        batch = task.batch(size, generator)
        logits, solution = model(batch.tokens.to(options.device))
        loss = loss_of(logits, batch, task)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        spent += clock(options.device) - began
        run.losses.append(loss.item())
        run.seconds.append(spent)
        if solution is not None:
            run.forward.append(solution.nfe)
            run.converged.append(solution.converged.float().mean().item())
        if len(run.losses) == steps:
            run.early = tested(model, test, task, options.device)[0]
    return run


def tuned(make: Callable[[], nn.Module], task: Task, seconds: float, options: Options, size: int) -> float:
    """The rate of the grid with the lowest loss at the end of a trial of so many seconds."""
    found = {}
    for rate in RATES[:1] if options.quick else RATES:
        torch.manual_seed(options.seed)
        losses = train(make(), task, rate, 2, seconds, options, size).losses
        found[rate] = sum(losses[-len(losses) // 4 :]) / len(losses[-len(losses) // 4 :])
    return min(found, key=lambda rate: (math.isnan(found[rate]), found[rate]))


def saved(model: nn.Module, tokens: Tensor) -> int:
    """Bytes that autograd saves for a training step, without those of the parameters."""
    with SavedBytes(ignore=model.parameters()) as count:
        model(tokens)[0].square().mean().backward()
    return count.peak


def memory(task: Task, options: Options, found: Measured) -> None:
    """Of stacks of more and more layers, and of solves of more and more evaluations; MiB that are allocated at the peak
    have the solvers' histories in them."""
    tokens = task.test(16).tokens.to(options.device)
    models: dict[str, nn.Module] = {}
    for depth in LAYERS:
        layers = Stack(task.vocab, task.length, width=WIDTH, heads=HEADS, depth=depth, tied=True)
        models[f"tied {depth}"] = layers.to(options.device)
    for evaluations in EVALUATIONS:
        solver = SOLVER.replace(tol=0.0, max_iter=evaluations)
        deq = options.deq(solver, IFT(solver=GMRES(tol=0.0, max_iter=evaluations)))
        model = EquilibriumLM(task.vocab, task.length, deq, width=WIDTH, heads=HEADS)
        models[f"equilibrium {evaluations}"] = model.to(options.device)

    def step(model: nn.Module) -> None:
        torch.autograd.grad(model(tokens)[0].square().mean(), list(model.parameters()))

    held = peaks([functools.partial(step, model) for model in models.values()], options.device)
    for (name, model), peak in zip(models.items(), held, strict=True):
        found |= {f"bytes of {name}": saved(model, tokens), f"peak of {name}": peak}


def measure(options: Options, progress: Progress) -> Measured:
    """Both tasks, every model, for one seed."""
    found: Measured = {}
    quick = options.quick
    tasks: dict[str, tuple[Task, int, int]] = {
        "copy": (Copy(2, 2) if quick else Copy(), 16, 3 if quick else 220),
        "characters": (Characters(options.seed, 100 if quick else 3000), 12, 3 if quick else 160),
    }
    progress.begin(len(tasks) * (1 + len(STACKS)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the share that converged is in the table
        memory(tasks["copy"][0], options, found)
        for name, (task, batch, steps) in tasks.items():
            study_task(name, task, batch, steps, options, progress, found)
    return found


def study_task(
    name: str, task: Task, batch: int, steps: int, options: Options, progress: Progress, found: Measured
) -> None:
    """The equilibrium first, whose steps and seconds are the stacks' measure."""
    backward: list[int] = []

    def equilibrium() -> EquilibriumLM:
        deq = options.deq(SOLVER, IFT(solver=ADJOINT), on_backward=lambda s: backward.append(s.nfe))
        model = EquilibriumLM(task.vocab, task.length, deq, width=WIDTH, heads=HEADS)
        return model.to(options.device)

    seconds, most = 0.0, size(equilibrium())
    found[f"{name}: floor"] = task.floor
    for kind in ("equilibrium", *STACKS):
        make: Callable[[], Any] = (
            equilibrium
            if kind == "equilibrium"
            else lambda kind=kind: stack(kind, task, most).to(options.device)
        )
        rate = tuned(make, task, 0.0 if options.quick else TRIAL, options, batch)
        torch.manual_seed(options.seed)
        backward.clear()
        model = make()
        run = train(model, task, rate, steps, seconds, options, batch)
        late, accuracy = tested(model, task.test(8 if options.quick else 256), task, options.device)
        if kind == "equilibrium":
            seconds, tenth = run.seconds[-1], -(-len(run.losses) // 10)
            for when, part in (("first", slice(tenth)), ("last", slice(-tenth, None))):
                counts = run.forward[part]
                found[f"{name}: evaluations at {when}"] = sum(counts) / len(counts)
                if backward:
                    found[f"{name}: products at {when}"] = sum(backward[part]) / len(backward[part])
            found[f"{name}: converged"] = sum(run.converged) / len(run.converged)
        found[f"{name}: {kind}, parameters"] = size(model)
        found[f"{name}: {kind}, rate"] = rate
        found[f"{name}: {kind}, steps"] = len(run.losses)
        found[f"{name}: {kind}, ms"] = 1e3 * run.seconds[-1] / len(run.losses)
        found[f"{name}: {kind}, loss at equal steps"] = run.early
        found[f"{name}: {kind}, loss at equal seconds"] = late
        found[f"{name}: {kind}, accuracy"] = accuracy
        found[f"{name}: {kind}, curve"] = [run.seconds, run.losses]
        progress.step(f"{name}, {kind}: {late:.3f}")


# What is claimed ------------------------------------------------------------------------------------------------


def loss(results: Results, name: str, kind: str, equal: str) -> float:
    return results[f"{name}: {kind}, loss at equal {equal}"].mean


def best(results: Results, name: str, equal: str) -> str:
    """The stack with the lowest mean loss."""
    return min(STACKS, key=lambda kind: loss(results, name, kind, equal))


def beside(name: str, equal: str) -> Callable[[Results], str]:
    """The losses of the equilibrium and of the best stack."""

    def cell(results: Results) -> str:
        kind = best(results, name, equal)
        ours, other = (results[f"{name}: {k}, loss at equal {equal}"] for k in ("equilibrium", kind))
        return f"{ours.cell(4)}; {kind}: {other.cell(4)}"

    return cell


def no_worse(name: str, equal: str) -> Callable[[Results], bool]:
    """Whether the equilibrium's mean loss is at most that of the best stack, up to what counts as equal."""
    return lambda results: (
        loss(results, name, "equilibrium", equal)
        <= loss(results, name, best(results, name, equal), equal) + CLOSE
    )


def constant(results: Results, what: str) -> bool:
    few, many = (results[f"{what} of equilibrium {n}"].mean for n in (EVALUATIONS[0], EVALUATIONS[-1]))
    return many <= 1.01 * few


def reduction(results: Results, depth: int) -> float:
    """By how much less is allocated with the most evaluations than by a stack, as a share."""
    return 1 - results[f"peak of equilibrium {EVALUATIONS[-1]}"].mean / results[f"peak of tied {depth}"].mean


def growth(results: Results) -> tuple[float, float]:
    first, last = (results[f"characters: evaluations at {when}"].mean for when in ("first", "last"))
    return first, last


CLAIMS = (
    Claim(
        text="Solves copy memory",
        paper="loss 3.5e-6 at T = 400 with 14 thousand parameters; TCN 2.7e-5, LSTM .050, GRU .049",
        ours=lambda r: (
            f"loss {r['copy: equilibrium, loss at equal steps'].cell(4)}, right "
            f"{r['copy: equilibrium, accuracy'].cell(4)}"
        ),
        shows=lambda r: r["copy: equilibrium, accuracy"].mean > 0.99,
    ),
    Claim(
        text="As good as stacks of as many parameters, after as many steps: characters, bits",
        paper="WikiText-103, 4.5 million: 32.4 against 34.9 of 16 tied layers and 35.8 of 4; 70 million: 23.2 "
        "against 23.6 of 18 layers",
        ours=beside("characters", "steps"),
        shows=no_worse("characters", "steps"),
    ),
    Claim(
        text="The same: copy memory, nats",
        paper="no stack of transformers is given",
        ours=beside("copy", "steps"),
        shows=no_worse("copy", "steps"),
    ),
    Claim(
        text="As good after as much compute: characters, bits",
        paper="'similar computational requirements'; a training step takes 2.8 times that of 18 layers",
        ours=beside("characters", "seconds"),
        shows=no_worse("characters", "seconds"),
    ),
    Claim(
        text="What autograd saves does not grow with the evaluations",
        paper="O(1)",
        ours=lambda r: ", ".join(
            f"{n}: {r[f'bytes of equilibrium {n}'].mean / 2**20:.2f} MiB" for n in EVALUATIONS
        ),
        shows=lambda r: constant(r, "bytes"),
    ),
    Claim(
        text="Nor does what is allocated at the peak of a gradient, with the solvers' histories",
        paper="not counted",
        ours=lambda r: ", ".join(f"{n}: {r[f'peak of equilibrium {n}'].mean:.2f} MiB" for n in EVALUATIONS),
        shows=lambda r: constant(r, "peak"),
    ),
    Claim(
        text=f"Less memory than a stack, allocated at the peak, with {EVALUATIONS[-1]} evaluations",
        paper="up to 88 %, against 70 layers; 59 % against 18",
        ours=lambda r: ", ".join(f"{100 * reduction(r, d):.0f} % against {d}" for d in LAYERS),
        shows=lambda r: reduction(r, 16) > 0.5 and reduction(r, 32) > reduction(r, 16),
    ),
    Claim(
        text="A solve takes more evaluations as training goes on: characters",
        paper="from some 10 to 30 and more (figure 2)",
        ours=lambda r: "{:.1f} in the first tenth, {:.1f} in the last".format(*growth(r)),
        shows=lambda r: growth(r)[1] > growth(r)[0],
    ),
    Claim(
        text="Backward takes fewer than forward: characters, last tenth",
        paper="'much fewer'",
        ours=lambda r: (
            f"{r['characters: products at last'].mean:.1f} products, {growth(r)[1]:.1f} evaluations"
            if "characters: products at last" in r
            else "no adjoint solve"
        ),
        shows=lambda r: (
            r["characters: products at last"].mean < 0.8 * growth(r)[1]
            if "characters: products at last" in r
            else None
        ),
    ),
)


def tables(results: Results) -> Sequence[tuple[str, Sequence[Sequence[str]]]]:
    """One of each task."""
    out = []
    for name, unit in (("copy", Copy.unit), ("characters", Characters.unit)):
        head = [
            "model",
            "parameters",
            "rate",
            "ms a step",
            "loss, equal steps",
            "loss, equal seconds",
            "steps",
            "right",
        ]
        rows = [head]
        for kind in ("equilibrium", *STACKS):
            of = {
                key: results[f"{name}: {kind}, {key}"]
                for key in ("parameters", "rate", "ms", "steps", "accuracy")
            }
            rows.append(
                [
                    kind,
                    f"{of['parameters'].mean:.0f}",
                    ", ".join(f"{rate:g}" for rate in sorted(set(of["rate"].values))),
                    of["ms"].cell(1),
                    *(
                        results[f"{name}: {kind}, loss at equal {equal}"].cell(4)
                        for equal in ("steps", "seconds")
                    ),
                    f"{of['steps'].mean:.0f}",
                    of["accuracy"].cell(4),
                ]
            )
        floor, share = results[f"{name}: floor"].mean, results[f"{name}: converged"].mean
        out.append((f"{name}, {unit}; floor {floor:.3f}; {100 * share:.0f} % of the solves converged", rows))
    return out


def draw(figure: Any, found: Sequence[Measured]) -> None:
    """Losses over seconds, smoothed, for the first seed; and memory."""
    axes = figure.subplots(1, 3)
    shades = {"equilibrium": "black"}
    for kind in STACKS:
        family = (0.15, 0.45, 0.75) if kind.startswith("tied") else (0.95, 0.75, 0.6)
        shade = family[DEPTHS.index(int(kind.split()[1]))]
        shades[kind] = (
            (0.1, shade * 0.8, 0.9 - 0.5 * shade)
            if kind.startswith("tied")
            else (shade, 0.55 * (1 - shade) + 0.2, 0.1)
        )
    one = found[0]
    for ax, (name, unit) in zip(axes, (("copy", Copy.unit), ("characters", Characters.unit)), strict=False):
        for kind, shade in shades.items():
            seconds, losses = one[f"{name}: {kind}, curve"]
            smooth, window = [], max(1, len(losses) // 25)
            for end in range(window, len(losses) + 1, max(1, window // 2)):
                smooth.append((seconds[end - 1], sum(losses[end - window : end]) / window))
            style = "--" if kind.startswith("untied") else "-"
            ax.plot(
                *zip(*smooth, strict=True),
                style,
                color=shade,
                label=kind,
                lw=2 if kind == "equilibrium" else 1,
            )
        if one[f"{name}: floor"] > 0:
            ax.axhline(one[f"{name}: floor"], color="grey", ls=":", lw=1, label="entropy")
        ax.set(title=name, xlabel="seconds of the processor", ylabel=f"training loss, {unit}", yscale="log")
    axes[1].legend(fontsize=7)
    for what, style, unit, label in (
        ("bytes", "-", 2**20, "saved by autograd"),
        ("peak", ":", 1, "allocated"),
    ):
        tied = [one[f"{what} of tied {d}"] / unit for d in LAYERS]
        solved = [one[f"{what} of equilibrium {n}"] / unit for n in EVALUATIONS]
        axes[2].plot(LAYERS, tied, f"o{style}", color=shades["tied 4"], label=f"stack, {label}")
        axes[2].plot(EVALUATIONS, solved, f"s{style}", color="black", label=f"equilibrium, {label}")
    axes[2].set(
        title="memory of a gradient",
        xlabel="layers, or evaluations",
        ylabel="MiB",
        xscale="log",
        yscale="log",
    )
    ticks = sorted({*LAYERS, *EVALUATIONS})
    axes[2].set_xticks(ticks, [str(n) for n in ticks])
    axes[2].set_yticks([2, 4, 8, 16, 32], ["2", "4", "8", "16", "32"])
    axes[2].minorticks_off()
    axes[2].legend(fontsize=7)


STUDY = Study(
    name="lm",
    title="Deep equilibrium sequence models",
    source="Bai, Kolter and Koltun, Deep Equilibrium Models, NeurIPS 2019, arXiv 1909.01377.",
    replaces="--solver and --grad are those of the equilibrium.",
    smaller=(
        f"Models of 15 to 20 thousand parameters, width {WIDTH}, trained for some ten seconds; the paper's have up to "
        "180 million.",
        "Copy memory: 8 letters over a gap of 16, T = 32 rather than 400.",
        "Characters: six nouns and six verbs in generated sentences, in windows of 48, rather than WikiText-103. The "
        "floor is the entropy of the text; windows that begin within a sentence cannot reach it.",
        "The input is added to what goes around attention too, learned places, no weight normalisation, no dropout.",
        "Memory is that of a gradient of 16 sequences of copy memory. What autograd saves is not all: Broyden's method "
        "keeps two states for each evaluation, and GMRES one for each product, while they run.",
        f"{CLOSE:g} nats or bits count as equal; the best stack is the best on the test data. Less memory is less than "
        "half of that of 16 layers, fewer products are fewer by a fifth.",
        f"Solves to relative {SOLVER.tol:g}, where the paper has about 1e-5 and looser ones at inference.",
        "Equal seconds are of the processor, for training alone. Two learning rates were tried for each model, for as "
        "many seconds each.",
    ),
    claims=CLAIMS,
    measure=measure,
    tables=tables,
    draw=draw,
)

main = STUDY.main

if __name__ == "__main__":
    raise SystemExit(main())
