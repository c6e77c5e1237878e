"""The Neumann series is its partial sums, with their residuals."""

from __future__ import annotations

import pytest
import torch

from tests.problems import F64, TanhMap, cotangent, error, exact_adjoint, random_matrix, solve_exactly
from torchdeq import IFT, AffineMap, ConvergenceWarning, Neumann, PhantomGrad, Status


def problem(n=16, batch=3, gain=0.8):
    a = random_matrix(n, gain)
    b = torch.randn(batch, n, dtype=F64, generator=torch.Generator().manual_seed(4))
    return a, b, AffineMap(lambda u: u @ a.T, b)


@pytest.mark.parametrize("k", [1, 2, 7])
def test_k_products_give_k_terms_and_one_more_measures_them(k):
    a, b, f = problem()
    solution = Neumann(tol=0, max_iter=k + 1).run(f)
    terms = [b @ torch.linalg.matrix_power(a, i).T for i in range(k + 1)]
    assert torch.allclose(solution.z, sum(terms[:k]), rtol=1e-12)
    assert torch.allclose(solution.residual, terms[k].norm(dim=1), rtol=1e-10)
    assert torch.allclose(solution.trace, torch.stack([t.norm(dim=1) for t in terms]), rtol=1e-12)
    assert solution.nfe == k + 1


def test_it_stops_at_the_first_sum_that_is_good_enough():
    a, b, f = problem()
    solution = Neumann(tol=1e-3).run(f)
    sizes = torch.stack([(b @ torch.linalg.matrix_power(a, i).T).norm(dim=1) for i in range(51)])
    assert torch.equal(solution.nstep, (sizes <= 1e-3).int().argmax(dim=0))
    assert solution.converged.all()


def test_a_start_continues_the_series():
    a, b, f = problem()
    start = Neumann(tol=0, max_iter=6).run(f)
    further = Neumann(tol=0, max_iter=5).run(f, start.z)  # one product for the residual, three, and the check
    assert torch.allclose(further.z, Neumann(tol=0, max_iter=9).run(f).z, rtol=1e-12)


def test_where_it_diverges_the_best_partial_sum_is_returned():
    """The first sample's terms shrink for a while; the second's grow from the beginning."""
    a = torch.diag(torch.tensor([0.1, 1.5], dtype=F64))
    b = torch.tensor([[1.0, 1e-3], [0.0, 1.0]], dtype=F64)
    solution = Neumann(tol=1e-9, max_iter=30).run(AffineMap(lambda u: u @ a, b))
    sums = torch.stack([sum(b[0] @ torch.linalg.matrix_power(a, i) for i in range(k)) for k in range(1, 30)])
    residuals = (b[0] + sums @ a - sums).norm(dim=1)
    assert torch.allclose(solution.z[0], sums[residuals.argmin()])
    assert torch.allclose(solution.residual[0], residuals.min())
    assert torch.equal(solution.z[1], torch.zeros(2, dtype=F64)), "no sum at all is better than any"
    assert solution.status.tolist() == [Status.MAX_ITER, Status.MAX_ITER]


def test_terms_may_grow_before_they_shrink():
    a = torch.diag(torch.full((4,), 0.3, dtype=F64)) + torch.triu(torch.full((4, 4), 2.0, dtype=F64), 1)
    b = torch.ones(1, 4, dtype=F64)
    solution = Neumann(tol=1e-8, max_iter=100).run(AffineMap(lambda u: u @ a.T, b))
    assert solution.trace.max() > 5 * b.norm()
    assert solution.converged.all()


def test_with_a_preconditioner_it_is_the_series_of_the_preconditioned_system():
    """ρ(L) = 1.6, but I − L is diagonally dominant: dividing by its diagonal (Jacobi) makes a contraction."""
    a = random_matrix(8, 0.2) - 1.4 * torch.eye(8, dtype=F64)
    b = torch.ones(2, 8, dtype=F64)
    diagonal = 1 - a.diagonal()
    assert not Neumann(tol=1e-10).run(AffineMap(lambda u: u @ a.T, b)).converged.any()
    solution = Neumann(tol=1e-10).run(AffineMap(lambda u: u @ a.T, b, lambda p: p / diagonal))
    assert solution.converged.all()
    assert torch.allclose(solution.z, torch.linalg.solve(torch.eye(8, dtype=F64) - a, b.T).T, atol=1e-9)


@pytest.mark.parametrize("k", [1, 5])
def test_as_adjoint_solver_it_is_the_phantom_gradient_at_the_fixed_point(k):
    """Bᵀ (I − (Jᵀ)^k) u in closed form, and unrolled by PhantomGrad."""
    f = TanhMap.make(n=12, batch=3, gain=0.5)  # a contraction at once: the best sum is the last
    z = solve_exactly(f, f.z0)
    g = cotangent(f.x)
    (out,) = IFT(solver=Neumann(tol=0, max_iter=k + 1)).attach(f, z)
    with pytest.warns(ConvergenceWarning):
        got = torch.autograd.grad(out, f.wanted, g)
    phantom = torch.autograd.grad(PhantomGrad(steps=k, tau=1.0).attach(f, z)[0], f.wanted, g)
    assert error(got, phantom) < 1e-12
    jacobian = torch.autograd.functional.jacobian(f, z).reshape(z.numel(), z.numel())
    u = exact_adjoint(f, z, g).reshape(-1)
    u = (u - torch.linalg.matrix_power(jacobian.T, k) @ u).reshape(z.shape)
    assert error(got, torch.autograd.grad(f(z), f.wanted, u)) < 1e-12
