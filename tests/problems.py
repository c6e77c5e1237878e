"""Maps with known answers, in float64, for the tests of every solver and gradient method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

F64 = torch.float64


def random_matrix(n: int, gain: float, seed: int = 0) -> Tensor:
    """Entries N(0, gain²/n): spectral radius about `gain`, (n, n)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, n, dtype=F64, generator=generator) * gain / n**0.5


@dataclass
class TanhMap:
    """f(z) = tanh(z Wᵀ + x), samples apart; W (n, n) and x (B, n) want gradients."""

    w: Tensor
    x: Tensor

    @classmethod
    def make(cls, n: int = 32, batch: int = 4, gain: float = 0.8, seed: int = 0) -> TanhMap:
        generator = torch.Generator().manual_seed(seed + 1)
        x = torch.randn(batch, n, dtype=F64, generator=generator)
        return cls(random_matrix(n, gain, seed).requires_grad_(), x.requires_grad_())

    def __call__(self, z: Tensor) -> Tensor:
        return torch.tanh(z @ self.w.T + self.x)

    @property
    def z0(self) -> Tensor:
        return torch.zeros_like(self.x, requires_grad=False)

    @property
    def wanted(self) -> tuple[Tensor, Tensor]:
        return self.w, self.x


class SymmetricMap(TanhMap):
    """f(z) = z − ¼ (z + tanh(z Wᵀ) W − x), a step of gradient descent: I − J is symmetric positive definite."""

    def __call__(self, z: Tensor) -> Tensor:
        return z - (z + torch.tanh(z @ self.w.T) @ self.w - self.x) / 4


@dataclass
class CoupledMap:
    """f(z) = tanh(A vec(z) + x) with a dense A over the whole batch: every sample sees every other."""

    a: Tensor
    x: Tensor

    @classmethod
    def make(cls, batch: int = 4, n: int = 6, gain: float = 0.8, seed: int = 0) -> CoupledMap:
        generator = torch.Generator().manual_seed(seed + 1)
        x = torch.randn(batch, n, dtype=F64, generator=generator)
        return cls(random_matrix(batch * n, gain, seed).requires_grad_(), x.requires_grad_())

    def __call__(self, z: Tensor) -> Tensor:
        return torch.tanh((self.a @ z.reshape(-1)).reshape(self.x.shape) + self.x)

    @property
    def z0(self) -> Tensor:
        return torch.zeros_like(self.x, requires_grad=False)

    @property
    def wanted(self) -> tuple[Tensor, Tensor]:
        return self.a, self.x


def solve_exactly(f: Callable[[Tensor], Tensor], z0: Tensor) -> Tensor:
    """The fixed point to rounding, by Newton's method with a dense Jacobian."""
    z = z0.detach()
    for _ in range(50):
        with torch.enable_grad():
            jacobian = torch.autograd.functional.jacobian(f, z).reshape(z.numel(), z.numel())
        r = (f(z) - z).detach().reshape(-1)
        if r.norm() < 1e-15 * (1 + z.norm()):
            break
        eye = torch.eye(z.numel(), dtype=z.dtype)
        z = z + torch.linalg.solve(eye - jacobian, r).reshape(z.shape)
    return z


def exact_adjoint(f: Callable[[Tensor], Tensor], z: Tensor, g: Tensor) -> Tensor:
    """u with (I − Jᵀ) u = g, from a dense Jacobian at z."""
    jacobian = torch.autograd.functional.jacobian(f, z.detach()).reshape(z.numel(), z.numel())
    eye = torch.eye(z.numel(), dtype=z.dtype)
    return torch.linalg.solve(eye - jacobian.T, g.reshape(-1)).reshape(z.shape)


def exact_gradient(
    f: Callable[[Tensor], Tensor], z0: Tensor, g: Tensor, wanted: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """dL/dθ for a loss with cotangent g at the fixed point, from dense solves."""
    z = solve_exactly(f, z0)
    u = exact_adjoint(f, z, g)
    return torch.autograd.grad(f(z), wanted, u)


def error(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The largest relative error, in the Euclidean norm, over the tensors."""
    return max(
        float(((a - b).norm() / b.norm().clamp_min(1e-300)).detach()) for a, b in zip(got, want, strict=True)
    )


def cotangent(z: Tensor, seed: int = 7) -> Tensor:
    """A fixed random cotangent of the shape of z."""
    return torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(seed))
