"""Hamburger: global context as a matrix decomposition, differentiated through its last step.

    Y = Z + norm(W_u M(W_l Z)),        M(X) = D C,    X ≈ D C,    X (d, n), D (d, r), C (r, n), r ≪ n pixels

The decomposition is K steps of an optimisation, a ham between two linear maps. NMF by multiplicative updates of
‖X − D C‖² over D, C ≥ 0, of X = relu(W_l Z),

    C ← C ∘ (Dᵀ X) / (Dᵀ D C),        D ← D ∘ (X Cᵀ) / (D C Cᵀ),

or vector quantisation, soft, by the angle between a pixel and a code,

    C ← softmax_r(cos(D, X) / T),     D ← X Cᵀ diag(C 1)⁻¹.

All steps but the last run without a graph, and the gradient is that of the last one. To back-propagate through all of
them is `tracked=steps`. Neither has an adjoint system to solve: D → D a, C → C / a changes no product of NMF.

Source: Geng, Guo, Chen, Li, Wei and Lin (2021), arXiv 2109.04553. Departures: D starts from random numbers that are
drawn once, rather than at each call; the step that is differentiated is the last of the K and updates both D and C.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, relu

from torchdeq import DEQ
from torchdeq.grad import backward_factory

Factors = tuple[Tensor, Tensor]  # D (B, d, r) and C (B, r, n)


@dataclass(frozen=True, kw_only=True)
class NMF:
    """Non-negative matrix factorisation, by the multiplicative updates of Lee and Seung (2001).

    Arguments:
        temperature: T of the first C, softmax_r(cos(D, X) / T).

    Example:
        >>> x, ham = torch.rand(2, 6, 20), NMF()
        >>> d, c = ham.step(x, ham.start(x, torch.rand(6, 3)))
        >>> d.shape, c.shape, bool((d >= 0).all())
        (torch.Size([2, 6, 3]), torch.Size([2, 3, 20]), True)
    """

    temperature: float = 0.1

    def enter(self, x: Tensor) -> Tensor:
        """What is decomposed."""
        return relu(x)

    def start(self, x: Tensor, bases: Tensor) -> Factors:
        """The first factors of x (B, d, n), from bases (d, r)."""
        return bases.expand(len(x), *bases.shape), codes(x, bases, self.temperature)

    def step(self, x: Tensor, factors: Factors) -> Factors:
        """Better ones. ‖X − D C‖ does not grow."""
        d, c = factors
        tiny = 1e-6 if x.dtype == torch.float32 else 1e-12  # columns of zeros stay zero
        c = c * (d.mT @ x) / (d.mT @ d @ c + tiny)
        d = d * (x @ c.mT) / (d @ (c @ c.mT) + tiny)
        return d, c


@dataclass(frozen=True, kw_only=True)
class VQ:
    """Vector quantisation with soft assignments, K-means by angles.

    Arguments:
        temperature: T > 0; towards 0 each pixel has one code.

    Example:
        >>> x, ham = torch.randn(2, 6, 20), VQ()
        >>> d, c = ham.step(x, ham.start(x, torch.rand(6, 3)))
        >>> bool((c.sum(dim=1) - 1).abs().max() < 1e-5)
        True
    """

    temperature: float = 0.1

    def enter(self, x: Tensor) -> Tensor:
        """What is decomposed."""
        return x

    def start(self, x: Tensor, bases: Tensor) -> Factors:
        """The first factors of x (B, d, n), from bases (d, r)."""
        return bases.expand(len(x), *bases.shape), codes(x, bases, self.temperature)

    def step(self, x: Tensor, factors: Factors) -> Factors:
        """Codes by the bases, and bases as the means of their pixels."""
        c = codes(x, factors[0], self.temperature)
        return x @ c.mT / (c.sum(dim=2)[:, None] + torch.finfo(x.dtype).tiny), c


def codes(x: Tensor, bases: Tensor, temperature: float) -> Tensor:
    """softmax_r(cos(D, X) / T), (B, r, n), of x (B, d, n) and bases (d, r) or (B, d, r)."""
    return ((normalize(bases, dim=-2).mT @ normalize(x, dim=-2)) / temperature).softmax(dim=-2)


class Hamburger(nn.Module):
    """A residual block that gives each pixel the context of the whole image, at a cost linear in the pixels.

    Arguments:
        channels: of Z.
        ham: `NMF()` or `VQ()`.
        rank: r ≥ 1, how many patterns an image has; below d, or nothing is compressed.
        inner: d, channels of X. None: as many as Z has.
        steps: K ≥ 1 in training. The paper has 6; fewer find less of the pattern.
        eval_steps: in evaluation; the paper has 7.
        tracked: how many of the last steps are differentiated, 1 … `steps`. 1 is the paper's one-step gradient.
        deq: solves and differentiates (D, C) = step(D, C), in the place of the steps.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> block = Hamburger(16, rank=4)
        >>> block(torch.randn(2, 16, 8, 8)).shape
        torch.Size([2, 16, 8, 8])
    """

    bases: Tensor  # (d, r), where D starts

    def __init__(
        self,
        channels: int,
        *,
        ham: NMF | VQ | None = None,
        rank: int = 8,
        inner: int | None = None,
        steps: int = 6,
        eval_steps: int = 7,
        tracked: int = 1,
        deq: DEQ | None = None,
    ):
        super().__init__()
        inner = channels if inner is None else inner
        for name, value in (
            ("channels", channels),
            ("rank", rank),
            ("inner", inner),
            ("eval_steps", eval_steps),
        ):
            if value < 1:
                raise ValueError(f"Hamburger({name}={value!r}): expected an integer of at least 1.")
        if not 1 <= tracked <= steps:
            raise ValueError(
                f"Hamburger(steps={steps!r}, tracked={tracked!r}): expected 1 ≤ tracked ≤ steps. tracked=1 is the "
                f"one-step gradient, tracked=steps back-propagation through all of them."
            )
        self.ham: NMF | VQ = NMF() if ham is None else ham
        self.steps, self.eval_steps, self.tracked, self.deq = steps, eval_steps, tracked, deq
        self.lower = nn.Conv2d(channels, inner, 1)
        self.upper = nn.Conv2d(inner, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.register_buffer("bases", torch.rand(inner, rank))

    def forward(self, z: Tensor) -> Tensor:
        """Y (B, channels, height, width) of z, which has the same shape."""
        x = self.ham.enter(self.lower(z).flatten(2))  # (B, d, n)
        d, c = self.factors(x)
        return z + self.norm(self.upper((d @ c).unflatten(2, z.shape[2:])))

    def factors(self, x: Tensor) -> Factors:
        """D (B, d, r) and C (B, r, n) of x (B, d, n)."""

        def step(factors: Factors) -> Factors:
            return self.ham.step(x, factors)

        if self.deq is not None:
            factors: Factors = self.deq(step, self.ham.start(x, self.bases))[0]
            return factors
        steps = self.steps if self.training else self.eval_steps
        tracked = steps if self.tracked == self.steps else min(self.tracked, steps)
        with torch.set_grad_enabled(torch.is_grad_enabled() and tracked == steps):
            factors = self.ham.start(x, self.bases)
            for _ in range(steps - tracked):
                factors = step(factors)
        gradient: Any = backward_factory(tracked)
        return tuple(gradient(None, step, factors)[-1])
