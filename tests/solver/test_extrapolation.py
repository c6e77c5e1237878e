"""SQUAREM and RRE: extrapolation with little memory."""

from __future__ import annotations

import pytest
import torch

from tests.problems import F64, TanhMap, random_matrix
from torchdeq import GMRES, RRE, SQUAREM, AffineMap, FixedPointIteration


@pytest.mark.parametrize("m", [1, 3, 6])
def test_rre_is_gmres_followed_by_one_application_of_the_map(m):
    n = 24
    a = random_matrix(n, 0.9)
    b = torch.randn(3, n, dtype=F64, generator=torch.Generator().manual_seed(1))
    f = AffineMap(lambda u: u @ a.T, b)
    krylov = GMRES(tol=0.0, max_iter=m + 1).run(f).z
    # m + 1 evaluations make the extrapolation, which is evaluated as the next.
    extrapolated = RRE(m=m, tol=0.0, max_iter=m + 2, return_final=True)(f, torch.zeros_like(b))
    assert (extrapolated.z - f(krylov)).norm() / b.norm() < 1e-6  # λ = 1e-8


def test_rre_on_a_map_whose_residuals_do_not_differ_makes_picard_steps():
    solution = RRE(m=2, tol=0.0, max_iter=7)(lambda z: torch.ones_like(z), torch.zeros(2, 3, dtype=F64))
    assert torch.equal(solution.z, torch.ones(2, 3, dtype=F64))


def test_rre_with_a_wrong_number_of_steps_teaches():
    with pytest.raises(ValueError, match="at least 1.*FixedPointIteration"):
        RRE(m=0)


def test_one_slow_mode_is_extrapolated_exactly():
    """On f(z) = ρ z + b in one unknown the squared step lands on the fixed point."""
    f = lambda z: 0.99 * z + 1  # noqa: E731
    for solver in (SQUAREM(tol=1e-8), RRE(m=1, tol=1e-8)):
        solution = solver(f, torch.zeros(2, 1, dtype=F64))
        assert solution.converged.all()
        assert solution.nfe <= 5
        assert torch.allclose(solution.z, torch.full((2, 1), 100.0, dtype=F64))


@pytest.mark.parametrize("solver", [SQUAREM(max_iter=3000), RRE(max_iter=3000), RRE(m=8, max_iter=3000)])
def test_fewer_evaluations_than_picard_on_a_slow_spectrum(solver):
    rates = torch.linspace(0, 0.99, 30, dtype=F64)
    f = lambda z: rates * z + 1  # noqa: E731
    z0 = torch.zeros(2, 30, dtype=F64)
    fast = solver.replace(tol=1e-6)(f, z0)
    slow = FixedPointIteration(tol=1e-6, max_iter=3000)(f, z0)
    assert fast.converged.all()
    assert slow.converged.all()
    assert 3 * fast.nfe < slow.nfe


def test_squarem_goes_back_to_the_picard_step_where_it_went_too_far():
    """f is a slow line below 5 and falls off steeply above it, where the extrapolation of the line leads."""
    f = lambda z: torch.where(z < 5, 0.9 * z + 0.4, 1e3 * (5 - z))  # noqa: E731
    solution = SQUAREM(tol=1e-6, max_iter=400)(f, torch.tensor([[0.0], [-60.0]], dtype=F64))
    assert solution.converged.all()
    assert torch.allclose(solution.z, torch.full((2, 1), 4.0, dtype=F64), atol=1e-4)


def test_squarem_comes_back_from_an_extrapolation_that_is_not_finite():
    """The slow mode asks for a step that throws the fast one out to where f is not a number."""
    rates = torch.tensor([0.99, 0.5], dtype=F64)
    f = lambda z: torch.where(z.abs()[:, 1:] > 20, torch.nan, rates * z)  # noqa: E731
    z0 = torch.tensor([[1000.0, 0.01]], dtype=F64)
    solution = SQUAREM(tol=1e-6, max_iter=400)(f, z0)
    assert solution.trace.isinf().any()
    assert solution.converged.all()


def test_memory_is_three_states():
    f = TanhMap.make(n=8, batch=2, gain=0.5)
    solver = SQUAREM()
    z, state = f.z0, solver.init(f.z0)
    for _ in range(7):
        z, state = solver.step(f, z, f(z).detach(), state)
        assert sum(t.numel() for t in state[:3]) == 3 * z.numel()
