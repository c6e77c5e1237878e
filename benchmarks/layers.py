"""The layers that the comparisons of speed solve: contractions in float32, seeded."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from problems import Gaussian


@dataclass(frozen=True, eq=False)
class Layer:
    """f(z) = tanh(A z + x + b), with A a matrix or a convolution; b may be missing."""

    name: str
    weight: Tensor  # (D, D), or (C, C, 3, 3)
    bias: Tensor | None
    x: Tensor  # (B, …), the shape of a state

    def __call__(self, z: Tensor) -> Tensor:
        az = F.conv2d(z, self.weight, padding=1) if self.weight.dim() == 4 else z @ self.weight.T
        az = az + self.x
        return torch.tanh(az if self.bias is None else az + self.bias)

    @property
    def parameters(self) -> Sequence[Tensor]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @functools.cached_property
    def solution(self) -> Tensor:
        """z = f(z), to the rounding of float32."""
        z = torch.zeros_like(self.x)
        with torch.no_grad():
            for _ in range(200):
                z = self(z)
        return z


def dense(batch: int, n: int, *, seed: int = 0) -> Layer:
    """A is 0.9 Q with Q orthogonal.

    So twenty iterations of any solver take two or three digits off the residual, and none comes near the rounding of
    float32, where there is nothing left to iterate.
    """
    normal = Gaussian(seed, torch.float32)
    w = 0.9 * torch.linalg.qr(normal(n, n)).Q
    return tracked(Layer(f"tanh {batch}×{n}", w, normal(n, scale=0.1), normal(batch, n, scale=0.5)))


def conv(batch: int, channels: int, size: int, *, seed: int = 0) -> Layer:
    """A 3×3 convolution, as hard."""
    normal = Gaussian(seed, torch.float32)
    w = normal(channels, channels, 3, 3, scale=0.9 * (9 * channels) ** -0.5)
    bias = normal(channels, 1, 1, scale=0.1)
    x = normal(batch, channels, size, size, scale=0.5)
    return tracked(Layer(f"conv {batch}×{channels}×{size}×{size}", w, bias, x))


def tracked(layer: Layer) -> Layer:
    """The layer, whose parameters want gradients."""
    for parameter in layer.parameters:
        parameter.requires_grad_()
    return layer


@dataclass(frozen=True, eq=False)
class Step:
    """A training step's data: z = tanh(W z + U x + b), L = mean z². float32.

    W = G + Gᵀ/2 for a Gaussian G, at spectral norm 0.9. With a Gaussian W of that norm, whose spectral radius is half
    of it, Picard iteration would be through in a dozen evaluations.
    """

    w: Tensor  # (D, D)
    u: Tensor  # (D, D)
    x: Tensor  # (B, D)
    b: Tensor  # (D,)

    @classmethod
    def make(cls, batch: int, n: int, *, seed: int = 0) -> Step:
        normal = Gaussian(seed, torch.float32)
        w = normal(n, n)
        w = w + w.T / 2
        w *= 0.9 / torch.linalg.matrix_norm(w, 2)
        made = cls(w, normal(n, n, scale=0.5 * n**-0.5), normal(batch, n), normal(n, scale=0.1))
        for parameter in made.parameters:
            parameter.requires_grad_()
        return made

    @property
    def parameters(self) -> Sequence[Tensor]:
        return self.w, self.u, self.b

    @property
    def injection(self) -> Tensor:
        """U x + b, once for a step."""
        return self.x @ self.u.T + self.b

    def f(self, c: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(z @ self.w.T + c)

    @property
    def layer(self) -> Layer:
        """f by itself, to be timed."""
        return Layer("", self.w, None, self.injection.detach())

    def residuals(self, z: Tensor, c_grad: Tensor, *, at_image: bool) -> tuple[float, float]:
        """What a library really has reached, measured in float64; each that of the worst sample.

        Arguments:
            z: the solution it returns, (B, D).
            c_grad: its gradient of the loss by the injection c = U x + b, which is (1 − y²) u at the point y at which
                f has been differentiated, with u the adjoint solution.
            at_image: y is z: the library returns what its tracked call of f gave. False: y is f(z).

        Returns:
            ‖f(z) − z‖ / ‖f(z)‖, and ‖g − (I − Jᵀ) u‖ / ‖g‖ for the gradient g of the loss by z.
        """
        with torch.no_grad():
            w, c, z, c_grad = (t.detach().double() for t in (self.w, self.injection, z, c_grad))
            fz = torch.tanh(z @ w.T + c)
            slope = 1 - (z if at_image else fz) ** 2
            g, u = 2 * z / z.numel(), c_grad / slope
            forward = (fz - z).norm(dim=1) / fz.norm(dim=1)
            adjoint = (g - u + (u * slope) @ w).norm(dim=1) / g.norm(dim=1)
            return float(forward.max()), float(adjoint.max())
