"""Newton–CG on functions whose minima are known, in float64."""

from __future__ import annotations

import torch
from torch.func import grad

from tests.problems import F64, random_matrix
from torchdeq import NewtonCG


def downhill(phi):
    """f(y) = y − ∇φ(y), for a φ that gives one value per sample."""
    return lambda y: y - grad(lambda y: phi(y).sum())(y)


def rosenbrock(y):
    return 100 * (y[:, 1] - y[:, 0] ** 2) ** 2 + (1 - y[:, 0]) ** 2


STARTS = torch.tensor([[-1.2, 1.0], [0.0, 0.0], [3.0, -3.0], [1.0, 1.0]], dtype=F64)


def test_rosenbrocks_valley_is_followed_to_its_end():
    solution = NewtonCG(tol=1e-10, max_iter=1000)(downhill(rosenbrock), STARTS)
    assert bool(solution.converged.all())
    assert torch.allclose(solution.z, torch.ones(4, 2, dtype=F64), atol=1e-10)
    assert int(solution.nstep[3]) == 1


def test_a_sample_does_not_depend_on_its_neighbours():
    solver = NewtonCG(tol=1e-10, max_iter=1000)
    for i, z in enumerate(solver(downhill(rosenbrock), STARTS).z):
        assert torch.equal(solver(downhill(rosenbrock), STARTS[i : i + 1]).z[0], z)


def test_a_quadratic_needs_a_few_rounds_of_cg():
    a = random_matrix(12, 1.0)
    h = a @ a.mT + torch.eye(12, dtype=F64)
    b = random_matrix(12, 1.0, seed=1)[:1]
    solution = NewtonCG(tol=1e-10, max_iter=200)(lambda y: y - (y @ h - b), torch.zeros(1, 12, dtype=F64))
    assert torch.allclose(solution.z, torch.linalg.solve(h, b.mT).mT, atol=1e-10)
    # Two forcing terms a round: each of at most four rounds takes at most the twelve products that are exact.
    assert solution.nfe <= 4 * 13


def test_it_leaves_a_maximum_and_is_not_drawn_to_a_saddle():
    """y⁴/4 − y²/2 in each unknown: 0 is a maximum, ±1 are minima; Newton's own step from 0.1 leads to 0."""
    start = torch.tensor([[0.1, -1e-8], [0.5, 1e-3]], dtype=F64)
    solution = NewtonCG(tol=1e-10, max_iter=500)(lambda y: y - (y**3 - y), start)
    assert torch.allclose(solution.z, start.sign(), atol=1e-10)


def test_a_steep_wall_shortens_the_step():
    """cosh overflows where the first step from a flat start leads; a root ends at 0."""
    start = torch.tensor([[-30.0]], dtype=F64)
    solution = NewtonCG(tol=1e-8, max_iter=200)(
        downhill(lambda y: torch.log(1 + torch.cosh(y - 1)).sum(1)), start
    )
    assert torch.allclose(solution.z, torch.ones(1, 1, dtype=F64), atol=1e-8)
    wall = NewtonCG(tol=1e-8, max_iter=200)(downhill(lambda y: (y - 2 * y.sqrt()).sum(1)), start.neg())
    assert torch.allclose(wall.z, torch.ones(1, 1, dtype=F64), atol=1e-8)


def test_what_has_no_minimum_does_not_converge():
    solution = NewtonCG(max_iter=100)(downhill(lambda y: y.sum(1)), torch.zeros(2, 3, dtype=F64))
    assert not bool(solution.converged.any())


def test_the_slope_alone_decides_so_that_phi_may_rise():
    """−y + y²/4 + 5σ(20(y − 1)) has a minimum near 0.75, before its rise; the first step leads behind it."""
    phi = lambda y: (-y + y**2 / 4 + 5 * torch.sigmoid(20 * (y - 1))).sum(1)  # noqa: E731
    start = torch.zeros(1, 1, dtype=F64)
    solution = NewtonCG(tol=1e-8, max_iter=200)(downhill(phi), start)
    assert bool(solution.converged)
    assert grad(lambda y: phi(y).sum())(solution.z).abs().max() <= 1e-8
    assert phi(solution.z) > phi(start)
