"""The maps that the solver benchmarks run on: random, seeded, with known size and difficulty.

Forward maps f(z) treat samples apart. Linear maps are given as a matrix J and a cotangent g, for which the adjoint
system u = Jᵀu + g is solved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

Map = Callable[[Tensor], Tensor]

CAP, HARD_CAP, ADJOINT_CAP = 60, 250, 130  # evaluations


@dataclass(frozen=True, eq=False)
class Problem:
    """z = step(z, x) from z = 0, in the shape of x, whose first dimension counts samples.

    `hard` marks maps on which Picard iteration diverges or crawls; `cap` is how many evaluations a solver may make.
    """

    name: str
    step: Callable[[Tensor, Tensor], Tensor]
    x: Tensor
    hard: bool = False

    @property
    def z0(self) -> Tensor:
        return torch.zeros_like(self.x)

    @property
    def cap(self) -> int:
        return HARD_CAP if self.hard else CAP

    def f(self, z: Tensor) -> Tensor:
        return self.step(z, self.x)

    def samples(self) -> list[Problem]:
        """Each sample as a problem of its own, for solvers that know no batch."""
        return [replace(self, x=x) for x in self.x.split(1)]


@dataclass(frozen=True, eq=False)
class Adjoint:
    """u = Jᵀu + g for each row of g (B, n), all of norm 1. J is (n, n)."""

    name: str
    j: Tensor
    g: Tensor
    hard: bool = False
    cap: int = ADJOINT_CAP

    def vjp(self, u: Tensor) -> Tensor:
        """Jᵀu for each row of u."""
        return u @ self.j

    def residual(self, u: Tensor) -> Tensor:
        """‖g − (I − Jᵀ)u‖ / ‖g‖ of each row, (B,)."""
        return (self.g + self.vjp(u) - u).norm(dim=1)


class Gaussian:
    """Standard normal tensors, one after the other, from a seed."""

    def __init__(self, seed: int, dtype: torch.dtype):
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=self.generator, dtype=torch.float64)).to(self.dtype)


def tanh(gain: float, *, x_std: float = 1.0, n: int = 200, batch: int = 8, seed: int = 0) -> Problem:
    """f(z) = tanh(W z + x), W with spectral radius about `gain`. Above 1, a large x makes f less chaotic. float64."""
    normal = Gaussian(seed, torch.float64)
    w, x = normal(n, n, scale=gain / n**0.5), normal(batch, n, scale=x_std)
    name = (
        f"tanh gain {gain:g}" + (f", x std {x_std:g}" if x_std != 1 else "") + (f", n={n}" if n < 200 else "")
    )
    return Problem(name, lambda z, x: torch.tanh(z @ w.T + x), x, gain > 1.2)


def attention(scale: float, *, tokens: int = 16, width: int = 32, batch: int = 8, seed: int = 0) -> Problem:
    """A transformer block with input injection, float32.

    f(z) = x + s (h + MLP(h)), h = norm(z + Attention(norm z)). Attention is written out, because torch's fused one
    cannot be differentiated twice on a CPU, which NewtonKrylov asks for.
    """
    normal, d = Gaussian(seed, torch.float32), width
    q, k, v, o = (normal(d, d, scale=d**-0.5) for _ in range(4))
    up, down = normal(4 * d, d, scale=d**-0.5), normal(d, 4 * d, scale=(4 * d) ** -0.5)

    def step(z: Tensor, x: Tensor) -> Tensor:
        h = F.layer_norm(z, (d,))
        weights = torch.softmax((h @ q.T) @ (h @ k.T).mT / d**0.5, dim=-1)  # (B, tokens, tokens)
        h = F.layer_norm(z + weights @ (h @ v.T) @ o.T, (d,))
        return x + scale * (h + F.gelu(h @ up.T) @ down.T)

    return Problem(f"attention+MLP {scale:g}", step, normal(batch, tokens, d), scale >= 1)


def conv(scale: float, *, channels: int = 16, size: int = 8, batch: int = 8, seed: int = 0) -> Problem:
    """A residual convolutional block with group norm, float32.

    f(z) = norm(relu(s z + norm(x + conv(relu(norm(conv z)))))).
    """
    normal = Gaussian(seed, torch.float32)
    first, second = (normal(channels, channels, 3, 3, scale=(9 * channels) ** -0.5) for _ in range(2))

    def step(z: Tensor, x: Tensor) -> Tensor:
        h = torch.relu(F.group_norm(F.conv2d(z, first, padding=1), 4))
        h = F.group_norm(x + F.conv2d(h, second, padding=1), 4)
        return F.group_norm(torch.relu(scale * z + h), 4)

    return Problem(f"conv+GroupNorm {scale:g}", step, normal(batch, channels, size, size))


def forward_rows(seed: int, *, quick: bool = False) -> list[Problem]:
    """The rows of the forward table; `quick` makes them tiny."""
    common = {"batch": 2, "seed": seed} if quick else {"batch": 8, "seed": seed}
    net = {"n": 24 if quick else 200, **common}
    small = {"n": 12 if quick else 32, **common}
    block = {"tokens": 4, "width": 8, **common} if quick else common
    image = {"channels": 4, "size": 4, **common} if quick else common
    return [
        tanh(0.8, **net),
        tanh(1.1, **net),
        attention(0.3, **block),
        attention(0.7, **block),
        conv(0.5, **image),
        tanh(1.5, **net),
        tanh(2, x_std=3, **net),
        tanh(2.5, x_std=3, **net),
        tanh(2.5, **small),
        *(attention(scale, **block) for scale in (1, 1.5, 2, 3)),
    ]


def adjoint_rows(seed: int, *, quick: bool = False) -> list[Adjoint]:
    """The rows of the adjoint table; `quick` makes them tiny."""
    n, batch = (40, 2) if quick else (200, 8)
    normal = Gaussian(seed, torch.float64)
    disc = normal(n, n)
    symmetric = disc + disc.T
    slow = torch.linspace(0.8, 0.99, 5, dtype=torch.float64)
    basis = torch.linalg.qr(normal(n, n)).Q
    bulk = with_radius(normal(n, n), 0.1)
    bulk[:5], bulk[:, :5] = 0, 0
    upper = normal(n, n).triu(1)
    nonnormal = 5 * upper / torch.linalg.matrix_norm(upper, 2)
    nonnormal.diagonal().copy_(0.6 * (2 * torch.rand(n, generator=normal.generator, dtype=torch.float64) - 1))
    matrices = {
        "disc ρ=.5": with_radius(disc, 0.5),
        "disc ρ=.9": with_radius(disc, 0.9),
        "symmetric ρ=.95": with_radius(symmetric, 0.95),
        "5 slow modes ρ=.99": basis @ (bulk + torch.diag(F.pad(slow, (0, n - 5)))) @ basis.T,
        "nonnormal ‖J‖≈5": nonnormal,
    }
    g = F.normalize(normal(batch, n), dim=1)
    return [Adjoint(name, j, g) for name, j in matrices.items()]


def with_radius(j: Tensor, radius: float) -> Tensor:
    """A multiple of J (n, n) whose spectral radius is `radius`."""
    return j * (radius / torch.linalg.eigvals(j).abs().max())
