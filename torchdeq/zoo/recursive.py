"""A small network that reasons by recursion on two states, an answer y and a latent z, about a puzzle x.

    a round f:   z ← net(x + y + z)   n times,   y ← net(y + z)   once;
    a segment:   T rounds, of which the last has a graph;   logits = E y + e,
    supervision: a loss after each segment, the next of which begins where the last one ended, without its graph.

The round is a map of (y, z) like that of any equilibrium, and a segment is a call of `DEQ` that makes T steps of it and
differentiates the last one: `DEQ(SimpleFixedPointIteration(max_iter=T, tol=inf), Unroll(last=1))`. Nothing says that it
has arrived anywhere, which tol=inf does not ask for. Other solvers and gradient methods take the same network for an
equilibrium.

Sources: Jolicoeur-Martineau (2025), Less is More: Recursive Reasoning with Tiny Networks (TRM), arXiv 2510.04871,
sections 4.1 to 4.5; Wang et al. (2025), Hierarchical Reasoning Model (HRM), arXiv 2506.21734, whose gradient is that of
the last update of each state (`tracked=1`). Departures: no learned halting, no moving average of the weights.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, rms_norm

from torchdeq import DEQ, JFB, PhantomGrad, SimpleFixedPointIteration, Solution, Unroll


class Thought(NamedTuple):
    """The states, (B, cells, width) each."""

    y: Tensor  # the answer
    z: Tensor  # the latent


class MixerLayer(nn.Module):
    """A network across the cells, for each channel, and one across the channels, for each cell.

    Arguments:
        cells: how many.
        width: channels.
        expand: the inner widths, by those.

    Example:
        >>> MixerLayer(16, 8)(torch.randn(2, 16, 8)).shape
        torch.Size([2, 16, 8])
    """

    def __init__(self, cells: int, width: int, *, expand: int = 2):
        super().__init__()
        self.cells_in, self.cells_out = nn.Linear(cells, expand * cells), nn.Linear(expand * cells, cells)
        self.width_in, self.width_out = nn.Linear(width, expand * width), nn.Linear(expand * width, width)

    def forward(self, h: Tensor) -> Tensor:
        """Of h (B, cells, width), the same shape."""
        across = self.cells_out(gelu(self.cells_in(h.mT))).mT
        h = rms_norm(h + across, h.shape[-1:])
        return rms_norm(h + self.width_out(gelu(self.width_in(h))), h.shape[-1:])


class RecursiveReasoner(nn.Module):
    """Fills puzzles (B, cells) of symbols, where 0 stands for an empty cell.

    Arguments:
        cells: how many a puzzle has.
        symbols: how many symbols there are, without the empty one.
        deq: what makes a segment of rounds and differentiates it. None: T = 3 rounds, the last one with a graph. With
            `record` the states after those rounds are answers too, each with its gradient.
        width: channels of the states.
        layers: of the network.
        inner: n, updates of z in a round.
        tracked: the last so many of them are differentiated, and the update of y. None: all. Fewer is for methods of
            one step, as the derivative of a round is then not whole.

    Raises:
        ValueError: a number is out of its range.
        TypeError: `tracked` is less than `inner` and the gradient method uses more than a step.

    Example:
        >>> model, puzzles = RecursiveReasoner(16, 4, width=8), torch.randint(5, (3, 16))
        >>> (logits,), carry, _ = model(puzzles)
        >>> (better,), carry, _ = model(puzzles, carry)  # goes on from there
        >>> logits.shape, carry.y.requires_grad
        (torch.Size([3, 16, 4]), False)
    """

    y0: Tensor  # (width,), where answers begin
    z0: Tensor  # (width,), where latents begin

    def __init__(
        self,
        cells: int,
        symbols: int,
        deq: DEQ | None = None,
        *,
        width: int = 48,
        layers: int = 2,
        inner: int = 3,
        tracked: int | None = None,
    ):
        super().__init__()
        for name, value in (("cells", cells), ("symbols", symbols), ("width", width), ("layers", layers)):
            if value < 1:
                raise ValueError(f"RecursiveReasoner({name}={value!r}): expected at least 1.")
        if inner < 1 or not 1 <= (inner if tracked is None else tracked) <= inner:
            raise ValueError(
                f"RecursiveReasoner(inner={inner!r}, tracked={tracked!r}): expected inner of at least 1, and tracked "
                f"from 1 to inner or None for all."
            )
        self.deq = deq or DEQ(SimpleFixedPointIteration(max_iter=3, tol=math.inf), Unroll(last=1))
        if tracked is not None and tracked < inner:
            _check_one_step(self.deq)
        self.inner, self.skipped = inner, inner - (inner if tracked is None else tracked)
        self.embed = nn.Embedding(symbols + 1, width)
        self.places = nn.Parameter(0.3 * torch.randn(cells, width))
        self.net = nn.Sequential(*(MixerLayer(cells, width) for _ in range(layers)))
        self.head = nn.Linear(width, symbols)
        self.register_buffer("y0", torch.randn(width))
        self.register_buffer("z0", torch.randn(width))

    def round(self, thought: Thought, x: Tensor) -> Thought:
        """f: a round on (y, z), with the embedded puzzles x (B, cells, width)."""
        y, z = thought
        for update in range(self.inner):
            with torch.set_grad_enabled(torch.is_grad_enabled() and update >= self.skipped):
                z = self.net(x + y + z)
        return Thought(self.net(y + z), z)

    def begin(self, puzzles: Tensor) -> Thought:
        """Where reasoning about puzzles (B, cells) begins."""
        shape = (*puzzles.shape, self.y0.numel())
        return Thought(self.y0.expand(shape).contiguous(), self.z0.expand(shape).contiguous())

    def forward(
        self, puzzles: Tensor, carry: Thought | None = None
    ) -> tuple[list[Tensor], Thought, Solution]:
        """Reason for a segment.

        Arguments:
            puzzles: (B, cells), integers from 0 to `symbols`.
            carry: where an earlier segment ended; None to begin.

        Returns:
            The logits (B, cells, symbols) at each recorded state and, last, at the end; where it ended, without a
            graph; and the `Solution`.
        """
        x = self.embed(puzzles) + self.places  # once, not in every round

        def f(thought: Thought) -> Thought:
            return self.round(thought, x)

        end, solution = self.deq(f, carry or self.begin(puzzles))
        thoughts: list[Thought] = [*solution.states, end]
        return [self.head(t.y) for t in thoughts], Thought(end.y.detach(), end.z.detach()), solution


def _check_one_step(deq: DEQ) -> None:
    for method in deq.grad if isinstance(deq.grad, list | tuple) else (deq.grad,):
        one = isinstance(method, JFB) or (isinstance(method, PhantomGrad) and method.steps == 1)
        if not one and not (isinstance(method, Unroll) and method.last == 1):
            raise TypeError(
                f"RecursiveReasoner(tracked=…) cuts the graph of a round, and {method!r} needs all of it. Use JFB() or "
                f"Unroll(last=1), or tracked=None."
            )
