"""What studies of classifiers share: scikit-learn's digits in three parts, and a training run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from study import Spread, clock
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

CLOSE = 0.5  # points of accuracy that count as equal: three of 597 images


def as_good(gains: Spread) -> bool:
    """Whether accuracies count as at least equal: in the mean, up to `CLOSE`, and not worse for every seed."""
    return gains.mean > -CLOSE and (len(gains.values) == 1 or max(gains.values) >= 0)


class Digits(NamedTuple):
    """Images (N, 1, 8, 8) with values in [0, 1] and classes (N,): to train on, to choose by, and to report."""

    train: tuple[Tensor, Tensor]
    choose: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @classmethod
    def load(cls, seed: int, device: torch.device, *, few: bool = False) -> Digits:
        """1000, 200 and 597 of the 1797 digits, drawn anew for each seed; few: 128, 64 and 64."""
        bunch = load_digits()
        order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(seed))
        x = torch.tensor(bunch.images, dtype=torch.float32)[order, None] / 16
        y = torch.tensor(bunch.target, dtype=torch.int64)[order]
        sizes = [128, 64, 64] if few else [1000, 200, 597]
        parts = zip(x[: sum(sizes)].split(sizes), y[: sum(sizes)].split(sizes), strict=True)
        return cls(*((a.to(device), b.to(device)) for a, b in parts))


@dataclass
class Run:
    """A training run as it went, by epochs. `accuracy` is that on the set asked for."""

    accuracy: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # since it began, training alone
    backward: float = 0.0  # of these, in backward passes


def accuracy(logits: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> float:
    """The share of images that get their class, in batches as large as the set."""
    with torch.no_grad():
        return (logits(x).argmax(dim=1) == y).double().mean().item()


@torch.no_grad()
def loss(logits: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> float:
    """The mean cross entropy, in a batch as large as the set. It is finer than the accuracy to choose by."""
    return cross_entropy(logits(x), y).item()


def fit(
    model: nn.Module,
    logits: Callable[[Tensor], Tensor],
    train: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    *,
    epochs: int,
    lr: float,
    seed: int,
    batch: int = 50,
    after_step: Callable[[], None] = lambda: None,
    watch: Callable[[int, Tensor, Tensor], None] | None = None,
    told: Callable[[float], None] = lambda accuracy: None,
) -> Run:
    """Train by Adam with a learning rate that falls to zero as a cosine.

    Arguments:
        model: whose parameters learn.
        logits: of a batch of images.
        train, held_out: images and classes.
        epochs, lr, batch: of how many, from where, how large.
        seed: of the order of batches.
        after_step: called after each step of the optimiser, and counted as a part of it.
        watch: called before each step with its number and its batch, not counted.
        told: called with the accuracy after each epoch.
    """
    x, y = train
    order = torch.Generator().manual_seed(seed)
    steps = len(x) // batch
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    run, spent = Run(), 0.0
    for epoch in range(epochs):
        model.train()
        losses = []
        for step, part in enumerate(torch.randperm(len(x), generator=order)[: steps * batch].split(batch)):
            xs, ys = x[part], y[part]
            if watch is not None:
                watch(epoch * steps + step, xs, ys)
            began = clock(x.device)
            found = cross_entropy(logits(xs), ys)
            optimizer.zero_grad()
            forward = clock(x.device)
            found.backward()
            run.backward += clock(x.device) - forward
            optimizer.step()
            schedule.step()
            after_step()
            spent += clock(x.device) - began
            losses.append(found.detach())
        model.eval()
        run.accuracy.append(accuracy(logits, *held_out))
        run.loss.append(torch.stack(losses).mean().item())
        run.seconds.append(spent)
        told(run.accuracy[-1])
    return run
