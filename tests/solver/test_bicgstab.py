"""BiCGSTAB: the method of the book, and what happens where it breaks down."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse.linalg
import torch

from tests.problems import F64, random_matrix
from torchdeq import GMRES, AffineMap, BiCGSTAB, Status


def make(n, batch=3, gain=0.9, seed=0):
    a = random_matrix(n, gain, seed)
    b = torch.randn(batch, n, dtype=F64, generator=torch.Generator().manual_seed(seed + 9))
    return a, b, AffineMap(lambda u: u @ a.T, b)


def exact(a, b):
    return torch.linalg.solve(torch.eye(len(a), dtype=F64) - a, b.T).T


@pytest.mark.parametrize("gain", [0.5, 0.9, 1.5])
def test_it_solves_nonsymmetric_systems(gain):
    a, b, f = make(40, gain=gain)
    solution = BiCGSTAB(tol=1e-10, stop_mode="rel", max_iter=300).run(f)
    assert solution.converged.all()
    condition = float(torch.linalg.cond(torch.eye(40, dtype=F64) - a))
    assert (solution.z - exact(a, b)).norm() <= 1e-10 * condition * exact(a, b).norm()


def test_the_same_iterates_as_scipy():
    a, b, f = make(30, batch=1)
    iterates = []
    operator = np.eye(30) - a.numpy()
    scipy.sparse.linalg.bicgstab(
        operator, b[0].numpy(), rtol=1e-9, callback=lambda x: iterates.append(x.copy())
    )
    assert len(iterates) >= 10
    trace = BiCGSTAB(tol=1e-12, max_iter=60).run(f).trace[:, 0]
    for i, x in enumerate(iterates[:10], start=1):  # two products each; later, rounding has its own way
        assert np.isclose(float(trace[2 * i]), np.linalg.norm(b[0].numpy() - operator @ x), rtol=1e-5)


def test_the_residual_goes_up_and_down_and_the_best_iterate_is_returned():
    a = (
        torch.diag(torch.linspace(-0.5, 0.5, 60, dtype=F64))
        + 0.35 * torch.triu(torch.ones(60, 60, dtype=F64), 1).sin()
    )
    b = torch.ones(1, 60, dtype=F64)
    f = AffineMap(lambda u: u @ a.T, b)
    rises = 0
    for max_iter in range(3, 30):
        solution = BiCGSTAB(tol=0, max_iter=max_iter).run(f)
        rises += bool(solution.trace[-1] > solution.trace.min())
        assert torch.allclose(solution.residual, solution.trace.min(dim=0).values, rtol=1e-6)
    assert rises > 3


def test_it_can_stop_after_half_an_iteration():
    a = torch.diag(torch.tensor([0.5, 0.2], dtype=F64))
    # One distinct eigenvalue in the first sample, two in the second.
    b = torch.tensor([[0.0, 1.0], [1.0, 1.0]], dtype=F64)
    solution = BiCGSTAB(tol=1e-12).run(AffineMap(lambda u: u @ a, b))
    assert solution.nstep.tolist() == [1, 3]
    assert solution.converged.all()


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_jacobian_of_rank_r_ends_in_at_most_2r_plus_two_products(rank):
    n = 20
    left, right = random_matrix(n, 1.0, 1)[:, :rank], random_matrix(n, 1.0, 2)[:rank]
    b = torch.randn(2, n, dtype=F64, generator=torch.Generator().manual_seed(4))
    solution = BiCGSTAB(tol=1e-10).run(AffineMap(lambda u: u @ (left @ right).T, b))
    assert solution.converged.all()
    assert solution.nstep.max() <= 2 * rank + 2


def test_where_the_shadow_residual_is_lost_the_sample_begins_again_and_its_neighbour_does_not_notice():
    """b is a left eigenvector of I − L, so that ⟨r̂, r⟩ = 0 after one iteration, where scipy gives up."""
    n = 12
    a = random_matrix(n, 0.8, 5)
    b = torch.zeros(2, n, dtype=F64)
    b[:, 0] = 1
    a[0] = 0.3 * b[0]  # row 0: e₀ᵀ L = 0.3 e₀ᵀ
    b[1] = torch.randn(n, dtype=F64, generator=torch.Generator().manual_seed(1))
    _, info = scipy.sparse.linalg.bicgstab(np.eye(n) - a.numpy(), b[0].numpy(), rtol=1e-10)
    assert info < 0
    f = AffineMap(lambda u: (u[:, None] * a).sum(2), b)
    solution = BiCGSTAB(tol=1e-10, max_iter=80).run(f)
    assert solution.converged.all()
    assert torch.allclose(solution.z, exact(a, b), atol=1e-8)
    alone = BiCGSTAB(tol=1e-10, max_iter=80).run(AffineMap(f.linear, b[1:]))
    assert torch.equal(alone.z[0], solution.z[1])


def test_a_step_without_alpha_is_one_of_smallest_residual():
    """⟨r̂, A p⟩ = 0 at the start, where the textbook divides by zero; ω saves the sample only if ⟨A r, r⟩ ≠ 0.
    Here both vanish, the method has no step at all, and says so."""
    turn = torch.tensor([[1.0, 1.0], [-1.0, 1.0]], dtype=F64)  # I − L turns by a right angle
    b = torch.tensor([[1.0, 2.0], [0.0, 0.0]], dtype=F64)
    f = AffineMap(lambda u: u @ turn.T, b)
    solution = BiCGSTAB(tol=1e-10).run(f)
    assert solution.status.tolist() == [Status.STALLED, Status.CONVERGED]
    assert torch.equal(solution.z, torch.zeros_like(b))
    assert solution.nstep.tolist() == [2, 0]
    assert GMRES(tol=1e-10).run(f).converged.all()


def test_a_singular_system_is_not_called_solved():
    projector = torch.diag(torch.tensor([1.0, 0.5, 0.3], dtype=F64))
    f = AffineMap(lambda u: u @ projector, torch.tensor([[1.0, 1.0, 1.0]], dtype=F64))
    solution = BiCGSTAB(tol=1e-10, max_iter=40).run(f)
    assert solution.z.isfinite().all()
    assert not solution.converged.any()
    r = (f(solution.z) - solution.z).norm(dim=1)
    assert torch.allclose(r, solution.residual, rtol=1e-10)
    assert r < f.shift.norm()


def test_a_preconditioner_reduces_the_products():
    """The inverse of another system nearby, as a forward solve leaves one behind."""
    a, b, f = make(60, gain=0.95)
    plain = BiCGSTAB(tol=1e-8, max_iter=200).run(f)
    near = torch.linalg.inv(torch.eye(60, dtype=F64) - a - random_matrix(60, 0.01, 3))
    helped = BiCGSTAB(tol=1e-8, max_iter=200).run(AffineMap(f.linear, b, lambda p: p @ near.T))
    assert helped.converged.all()
    assert helped.nfe <= plain.nfe / 2
    assert torch.allclose(helped.z, exact(a, b), atol=1e-6)
