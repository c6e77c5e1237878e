"""The bounds that the docstrings of biased methods state, in a hundred random cases.

f(z) = tanh(z) Wᵀ + x, whose gradient in x is û itself (B = I). ‖J‖ ≤ ‖W‖ = γ < 1 everywhere, and a Lipschitz constant
of J is γ times that of the derivative of tanh, whose own derivative is 4 / (3 √3) at most.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.problems import F64, cotangent, exact_adjoint, solve_exactly
from torchdeq import (
    DEQ,
    JFB,
    FixedPointIteration,
    NeumannPhantom,
    PhantomGrad,
    SimpleFixedPointIteration,
    TruncatedCycle,
    Unroll,
)

N = 6
ROUNDING = 1e-12  # of products of k matrices with norms near 1


def symmetric(a: Tensor) -> Tensor:
    return a + a.T


def nonnormal(a: Tensor) -> Tensor:
    return 0.1 * a + 3 * a.triu(1)


def near_rotation(a: Tensor) -> Tensor:
    return torch.linalg.qr(a).Q + 0.01 * a


def reflection(a: Tensor) -> Tensor:
    """Spectrum near −γ, which damping is for."""
    return -(torch.eye(N, dtype=F64) + 0.1 * a)


KINDS = [lambda a: a, symmetric, nonnormal, near_rotation, reflection]


@dataclass
class Case:
    """One f, its fixed point, and the exact adjoint there."""

    w: Tensor
    x: Tensor
    gamma: float
    k: int
    tau: float

    def __call__(self, z: Tensor) -> Tensor:
        return torch.tanh(z) @ self.w.T + self.x

    def __post_init__(self) -> None:
        self.z = solve_exactly(self, torch.zeros_like(self.x))
        self.g = cotangent(self.x, self.k)
        self.u = exact_adjoint(self, self.z, self.g)
        jacobian = torch.autograd.functional.jacobian(self, self.z).reshape(N, N)
        m = (1 - self.tau) * torch.eye(N, dtype=F64) + self.tau * jacobian.T
        self.norm_j, self.norm_m = (float(torch.linalg.matrix_norm(a, 2)) for a in (jacobian, m))

    def estimate(self, state: Tensor) -> Tensor:
        """û, from a state with a graph."""
        return torch.autograd.grad(state, self.x, self.g)[0]


@functools.cache
def case(seed: int) -> Case:
    generator = torch.Generator().manual_seed(seed)
    a = KINDS[seed % len(KINDS)](torch.randn(N, N, dtype=F64, generator=generator))
    u = torch.rand(4, dtype=F64, generator=generator)
    gamma = float(0.2 + 0.79 * u[0])
    x = torch.randn(1, N, dtype=F64, generator=generator) * 2 * u[1]
    return Case(
        a * gamma / torch.linalg.matrix_norm(a, 2),
        x.requires_grad_(),
        gamma,
        k=1 + int(8 * u[2]),
        tau=float(0.3 + 0.9 * u[3]),
    )


SEEDS = range(100)


def check(bounds: list[tuple[Tensor, float]]) -> None:
    """Each error is within its bound; and the bounds bite: some are less than 2 times too large."""
    ratios = []
    for miss, bound in bounds:
        assert miss <= bound + ROUNDING
        ratios.append(float(miss) / bound)
    assert len(ratios) == len(SEEDS)
    assert max(ratios) > 0.5


@pytest.mark.parametrize("method", [PhantomGrad, NeumannPhantom])
def test_phantom_gradients(method):
    """‖û − u‖ ≤ ‖M‖^k ‖u‖ at z*."""
    bounds = []
    for seed in SEEDS:
        c = case(seed)
        count = {"steps" if method is PhantomGrad else "terms": c.k}
        u = c.estimate(method(**count, tau=c.tau).attach(c, c.z)[0])
        bounds.append(((u - c.u).norm(), c.norm_m**c.k * float(c.u.norm())))
    check(bounds)


def test_jfb():
    """‖û − u‖ ≤ γ ‖u‖ and cos(û, u) ≥ √(1 − γ²) with γ = ‖J‖ at z*."""
    bounds = []
    for seed in SEEDS:
        c = case(seed)
        u = c.estimate(JFB().attach(c, c.z)[0])
        cosine = (u * c.u).sum() / (u.norm() * c.u.norm())
        assert cosine >= (1 - c.norm_j**2) ** 0.5 - ROUNDING
        bounds.append(((u - c.u).norm(), c.norm_j * float(c.u.norm())))
    check(bounds)


def bound_off_the_fixed_point(c: Case, start: Tensor, steps: int) -> float:
    """γ^k ‖u‖ + L ‖start − z*‖ ‖g‖ / (1 − γ)²."""
    lipschitz = c.gamma * 4 / (3 * math.sqrt(3))
    distance = float((start - c.z).norm())
    return c.gamma**steps * float(c.u.norm()) + lipschitz * distance * float(c.g.norm()) / (1 - c.gamma) ** 2


def iterate(c: Case, z: Tensor, count: int) -> Tensor:
    with torch.no_grad():
        for _ in range(count):
            z = c(z)
    return z


@pytest.mark.parametrize("stop", [False, True])
def test_unrolling_the_last_evaluations(stop):
    bounds = []
    for seed in SEEDS:
        c = case(seed)
        z0 = torch.zeros_like(c.x.detach())
        if stop:
            solver = FixedPointIteration(max_iter=2000, tol=10.0 ** -(seed % 7))
            start = solver.replace(max_iter=2000 - c.k)(c, z0).z
        else:
            solver = SimpleFixedPointIteration(max_iter=c.k + seed % 30, tol=math.inf)
            start = iterate(c, z0, seed % 30)
        u = c.estimate(DEQ(solver, Unroll(last=c.k))(c, z0)[0])
        bounds.append(((u - c.u).norm(), bound_off_the_fixed_point(c, start, c.k)))
    check(bounds)


def test_truncated_cycles():
    bounds = []
    for seed in SEEDS:
        c = case(seed)
        z0 = cotangent(c.x, 2)
        solver = SimpleFixedPointIteration(max_iter=seed % 30 + c.k, tol=math.inf)
        u = c.estimate(DEQ(solver, TruncatedCycle(grad_steps=c.k))(c, z0)[0])
        bounds.append(((u - c.u).norm(), bound_off_the_fixed_point(c, iterate(c, z0, seed % 30), c.k)))
    check(bounds)


def test_an_error_within_a_part_of_the_adjoint_bounds_the_angle():
    """‖û − u‖ ≤ ε ‖u‖ with ε < 1 gives cos(û, u) ≥ √(1 − ε²), for every method."""
    cases = [c for c in map(case, SEEDS) if c.norm_m < 1]
    assert len(cases) > 80
    for c in cases:
        u = c.estimate(NeumannPhantom(terms=c.k, tau=c.tau).attach(c, c.z)[0])
        epsilon = c.norm_m**c.k
        assert (u * c.u).sum() >= (1 - epsilon**2) ** 0.5 * u.norm() * c.u.norm() - ROUNDING
