"""Three small equilibrium models and what they are trained on: images, sequences, a graph.

Each model has its equilibrium layer as `deq`, and gives logits and the `Solution`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from torchdeq import DEQ, Anderson, Multisecant, Solution, Solver
from torchdeq.zoo.digits import DigitsDEQ

Batch = tuple[Tensor, Tensor]  # inputs, and classes; −100 where no class is asked for


class Language(nn.Module):
    """One causal transformer block with pre-normalisation, tied over infinite depth.

    f(z) = x + s · norm(h + MLP(norm h)),   h = z + Attention(norm z),   x the embedding of tokens and places.

    The last norm bounds f, so that a fixed point exists; s keeps f from moving far.
    """

    def __init__(self, deq: DEQ, *, vocabulary: int, length: int, width: int, heads: int = 4, s: float = 0.4):
        super().__init__()
        self.deq, self.heads, self.s = deq, heads, s
        self.token, self.place = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.before_attention, self.before_mlp, self.after, self.top = (nn.LayerNorm(width) for _ in range(4))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Solution]:
        """Logits of the next tokens (B, T, vocabulary), from tokens (B, T)."""
        x = self.token(tokens) + self.place.weight[: tokens.shape[1]]

        def f(z: Tensor) -> Tensor:
            h = z + self.attention(self.before_attention(z))
            return x + self.s * self.after(h + self.down(F.gelu(self.up(self.before_mlp(h)))))

        z, solution = self.deq(f, torch.zeros_like(x))
        return self.head(self.top(z)), solution

    def attention(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, T, ·)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Graph(nn.Module):
    """An implicit graph network, one system for the whole graph.

    f(Z) = relu(A Z Wᵀ + b(X)),   ‖A‖₂ = 1,   ‖W‖₂ ≤ κ by projection after each training step.

    After Gu et al. (2020), arXiv 2009.06211, who project ‖W‖∞.
    """

    a: Tensor  # (N, N)

    def __init__(self, deq: DEQ, a: Tensor, *, features: int, width: int, classes: int, kappa: float = 0.95):
        super().__init__()
        self.deq, self.kappa = deq, kappa
        self.register_buffer("a", a)
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(width, width), kappa))
        self.inject, self.head = nn.Linear(features, width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Solution]:
        """Logits of the nodes (N, classes), from their features (N, features)."""
        b = self.inject(x)
        z, solution = self.deq(lambda z: torch.relu(self.a @ z @ self.weight.T + b), torch.zeros_like(b))
        return self.head(z), solution

    @torch.no_grad()
    def project(self) -> None:
        """W back into the ball."""
        u, s, vh = torch.linalg.svd(self.weight)
        self.weight.copy_(u * s.clamp_max(self.kappa) @ vh)


@dataclass(frozen=True, eq=False, kw_only=True)
class Task:
    """A model, its data, and how it is trained.

    Arguments:
        name: a short one.
        about: what it is, in a sentence.
        solver: the forward solver with the model's own tolerance, relative.
        batch_dims: see `torchdeq.DEQ`.
        model: makes the model around an equilibrium layer.
        draw: makes a training batch.
        test: what is held out; for sequences and images a large batch.
        probe: how many samples of it the gradients are taken on; None for all.
        steps, lr: of training.
    """

    name: str
    about: str
    solver: Solver
    model: Callable[[DEQ], nn.Module]
    draw: Callable[[Generator], Batch]
    test: Batch
    probe: int | None = None
    steps: int
    lr: float
    batch_dims: int = 1


def digits(quick: bool) -> Task:
    """Handwritten digits and the convolutional model of the zoo."""
    data = load_digits()
    x, y = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)
    order = torch.randperm(len(y), generator=Generator().manual_seed(0))
    train, test = order[360:], order[:360]
    batch, channels = (8, 8) if quick else (64, 24)

    def draw(generator: Generator) -> Batch:
        index = train[torch.randint(len(train), (batch,), generator=generator)]
        return x[index], y[index]

    return Task(
        name="convolutional",
        about=f"`torchdeq.zoo.digits.DigitsDEQ` (z = relu(W z + b + x̂), ‖W‖₂ = 0.9, {channels} channels) on "
        f"scikit-learn's digits, {batch} images of 8×8",
        solver=Anderson(tol=1e-2, stop_mode="rel", max_iter=60),
        model=lambda deq: DigitsDEQ(deq, channels=channels),
        draw=draw,
        test=(x[test], y[test]),
        probe=batch,
        steps=3 if quick else 200,
        lr=5e-3,
    )


def language(quick: bool) -> Task:
    """A random sequence, and then the same again: the second half is to be predicted."""
    vocabulary, half, width, batch = (5, 3, 8, 2) if quick else (16, 12, 48, 16)

    def draw(generator: Generator, count: int = batch) -> Batch:
        once = torch.randint(vocabulary, (count, half), generator=generator)
        tokens = torch.cat([once, once], dim=1)
        y = tokens[:, 1:].clone()
        y[:, : half - 1] = -100
        return tokens[:, :-1], y

    return Task(
        name="transformer",
        about=f"a weight-tied causal transformer block with pre-norm (width {width}, four heads, a last norm scaled by "
        f"0.4) that copies {half} random tokens, {batch} sequences of {2 * half - 1}",
        solver=Multisecant(tol=1e-3, stop_mode="rel", max_iter=60),
        model=lambda deq: Language(deq, vocabulary=vocabulary, length=2 * half, width=width),
        draw=draw,
        test=draw(Generator().manual_seed(10**6), 200),
        probe=batch,
        steps=3 if quick else 200,
        lr=3e-3,
    )


def graph(quick: bool, seed: int = 0) -> Task:
    """A stochastic block model: four blocks of nodes, whose noisy label one node in five shows."""
    blocks, size, width = (4, 6, 8) if quick else (4, 100, 16)
    generator = Generator().manual_seed(seed)
    y = torch.arange(blocks).repeat_interleave(size)
    likely = torch.where(y[:, None] == y, 6 / size, 0.6 / size)
    a = torch.bernoulli(likely, generator=generator).triu(1)
    a = a + a.T
    degree = a.sum(dim=1).clamp_min(1)
    a = a / (degree[:, None] * degree).sqrt()
    x = F.one_hot(y, blocks) + 0.5 * torch.randn(len(y), blocks, generator=generator)
    x = x * (torch.rand(len(y), 1, generator=generator) < 0.2)
    train = torch.rand(len(y), generator=generator) < 0.25
    known, held_out = y.masked_fill(~train, -100), y.masked_fill(train, -100)
    return Task(
        name="graph",
        about=f"an implicit graph network (z = relu(A z Wᵀ + b), ‖W‖₂ ≤ 0.95, width {width}) on a stochastic block "
        f"model of {blocks} × {size} nodes, features on one node in five, labels on one in four; one system",
        solver=Multisecant(tol=1e-3, stop_mode="rel", max_iter=60),
        model=lambda deq: Graph(deq, a, features=blocks, width=width, classes=blocks),
        draw=lambda generator: (x, known),
        test=(x, held_out),
        steps=3 if quick else 200,
        lr=1e-2,
        batch_dims=0,
    )


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy."""
    return F.cross_entropy(model(x)[0].flatten(0, -2), y.flatten())


def train(task: Task, deq: DEQ, seed: int, tick: Callable[[], object], lr: float | None = None) -> nn.Module:
    """The task's model around `deq`, trained; `tick` is called after each step."""
    torch.manual_seed(seed)
    generator = Generator().manual_seed(seed)
    model = task.model(deq).train()
    lr = lr or task.lr
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=task.steps)
    for _ in range(task.steps):
        optimizer.zero_grad()
        loss_of(model, *task.draw(generator)).backward()
        optimizer.step()
        schedule.step()
        if isinstance(model, Graph):
            model.project()
        tick()
    return model


@torch.no_grad()
def score(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Loss and accuracy in eval mode, with the model's own layer."""
    model.eval()
    logits, asked = model(x)[0], y != -100
    model.train()
    found = logits[asked]
    return F.cross_entropy(found, y[asked]).item(), (found.argmax(-1) == y[asked]).double().mean().item()
