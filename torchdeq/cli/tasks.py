"""What `torchdeq train` can train. `TASKS` lists it; a task is its data, its augmentation and its model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import affine_grid, grid_sample

from torchdeq import DEQ
from torchdeq.cli.errors import need
from torchdeq.zoo.digits import DigitsDEQ


class Split(NamedTuple):
    """Images or other inputs x (N, …) and classes y (N,), for training and held out."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    def to(self, device: torch.device) -> Split:
        """The same data on a device."""
        return Split(*(t.to(device) for t in self))


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model and the data to train it on.

    Arguments:
        summary: one line for the help.
        load: makes the data, the same each time.
        augment: a changed copy of a training batch, drawn with the generator (on the CPU).
        model: makes the model from its number of channels and its equilibrium layer. The model has this layer as
            `deq` and returns logits and the `Solution`.
    """

    summary: str
    load: Callable[[], Split]
    augment: Callable[[Tensor, Generator], Tensor]
    model: Callable[[int, DEQ], nn.Module]


def load_digits() -> Split:
    """scikit-learn's 1797 handwritten digits, 8×8, values in [0, 1]; 360 of them held out, stratified.

    Example:
        >>> [tuple(t.shape) for t in load_digits()]
        [(1437, 1, 8, 8), (1437,), (360, 1, 8, 8), (360,)]
    """
    digits = need("sklearn.datasets").load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target, dtype=torch.int64)
    train, test = need("sklearn.model_selection").train_test_split(
        range(len(y)), test_size=360, stratify=digits.target, random_state=0
    )
    return Split(x[train], y[train], x[test], y[test])


def jitter(
    x: Tensor, generator: Generator, *, turn: float = 10.0, zoom: float = 0.1, shift: float = 0.5
) -> Tensor:
    """Each image turned, stretched in both directions and shifted at random.

    Arguments:
        x: images, (B, C, H, W).
        generator: on the CPU.
        turn: largest angle, degrees.
        zoom: largest relative stretch.
        shift: largest shift, pixels.

    Example:
        >>> jitter(torch.ones(2, 1, 8, 8), Generator().manual_seed(0)).shape
        torch.Size([2, 1, 8, 8])
    """
    draw = torch.rand(5, x.shape[0], generator=generator, dtype=x.dtype).to(x.device) * 2 - 1
    angle = draw[0] * math.radians(turn)
    wide, high = 1 + zoom * draw[1:3]
    right, down = shift * draw[3] * 2 / x.shape[3], shift * draw[4] * 2 / x.shape[2]  # the image is 2 wide
    cos, sin = angle.cos(), angle.sin()
    rows = [torch.stack([cos * wide, -sin * wide, right]), torch.stack([sin * high, cos * high, down])]
    theta = torch.stack(rows).permute(2, 0, 1)  # (B, 2, 3)
    grid = affine_grid(theta, list(x.shape), align_corners=False)
    return grid_sample(x, grid, align_corners=False)


TASKS = {
    "digits": Task(
        summary="a convolutional DEQ on scikit-learn's 1797 handwritten digits",
        load=load_digits,
        augment=jitter,
        model=lambda channels, deq: DigitsDEQ(deq, channels=channels),
    ),
}
