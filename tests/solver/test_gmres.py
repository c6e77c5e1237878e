"""GMRES: optimal, finite, honest."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse.linalg
import torch

from tests.problems import F64, random_matrix
from torchdeq import GMRES, AffineMap, Status


def make(n, batch=3, gain=0.9, seed=0):
    a = random_matrix(n, gain, seed)
    b = torch.randn(batch, n, dtype=F64, generator=torch.Generator().manual_seed(seed + 9))
    return a, b, AffineMap(lambda u: u @ a.T, b)


def test_n_unknowns_in_at_most_n_products_and_the_check():
    _, _, f = make(24)
    solution = GMRES(tol=1e-12, max_iter=100).run(f)
    assert solution.converged.all()
    assert solution.nstep.max() <= 24
    assert solution.nfe <= 25


def test_the_residual_never_grows():
    _, _, f = make(40, gain=1.5)
    trace = GMRES(tol=1e-12, max_iter=60).run(f).trace
    assert (trace[1:] <= trace[:-1] * (1 + 1e-12)).all()


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_jacobian_of_rank_r_ends_in_r_plus_one_products(rank):
    n = 20
    left, right = random_matrix(n, 1.0, 1)[:, :rank], random_matrix(n, 1.0, 2)[:rank]
    b = torch.randn(2, n, dtype=F64, generator=torch.Generator().manual_seed(4))
    solution = GMRES(tol=1e-11).run(AffineMap(lambda u: u @ (left @ right).T, b))
    assert solution.converged.all()
    assert solution.nstep.max() <= rank + 1


def test_a_zero_right_hand_side_gives_zero_without_a_product():
    calls = []
    f = AffineMap(lambda u: calls.append(1) or 0.5 * u, torch.zeros(2, 5, dtype=F64))
    solution = GMRES().run(f)
    assert torch.equal(solution.z, torch.zeros(2, 5, dtype=F64))
    assert not calls
    assert solution.converged.all()


def test_the_same_residuals_as_scipy():
    a, b, f = make(30, batch=1, gain=1.2)
    trace = GMRES(tol=1e-10, max_iter=40).run(f).trace[:, 0]
    residuals = [float(b.norm())]
    operator = np.eye(30) - a.numpy()
    scipy.sparse.linalg.gmres(
        operator, b[0].numpy(), rtol=1e-11, restart=30, maxiter=1,
        callback=lambda r: residuals.append(r * float(b.norm())), callback_type="pr_norm",
    )  # fmt: skip
    count = min(len(residuals), len(trace), 25)
    assert count >= 20
    # scipy reduces by the same rotations in another order; 1e-6 of each residual is rounding.
    assert np.allclose(trace[:count].numpy(), residuals[:count], rtol=1e-6)


def test_a_singular_system_gives_a_least_squares_answer_and_says_so():
    projector = torch.diag(torch.tensor([1.0, 0.5, 0.5], dtype=F64))  # I − L has a zero eigenvalue
    f = AffineMap(lambda u: u @ projector, torch.tensor([[1.0, 1.0, 0.0]], dtype=F64))
    solution = GMRES(tol=1e-10).run(f)
    assert solution.z.isfinite().all()
    assert not solution.converged.any()
    assert torch.allclose(solution.abs_residual, torch.ones(1, dtype=F64), atol=1e-9)


def test_the_true_residual_is_reported_where_the_map_couples_samples():
    """The recurrence of a per-sample Krylov space says 'converged'; the residual says not."""
    coupling = random_matrix(6, 0.9, 3)
    b = torch.randn(2, 3, dtype=F64, generator=torch.Generator().manual_seed(2))
    f = AffineMap(lambda u: (coupling @ u.reshape(-1)).reshape(2, 3), b)
    solution = GMRES(tol=1e-9).run(f)
    r = (f(solution.z) - solution.z).norm(dim=1)
    assert torch.allclose(r, solution.abs_residual, rtol=1e-10)
    assert torch.equal(solution.converged, r <= 1e-9)
    assert not solution.converged.all()
    assert GMRES(tol=1e-9)(f, torch.zeros_like(b), batch_dims=0).converged.all()


def test_refuses_a_map_that_is_not_known_to_be_affine():
    with pytest.raises(TypeError, match="affine maps"):
        GMRES()(torch.cos, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="no trajectory"):
        GMRES()(AffineMap(lambda u: u / 2, torch.ones(1, 2)), torch.zeros(1, 2), record=[1])


def test_samples_of_very_different_scale_reach_their_own_relative_tolerance():
    a, b, _ = make(16, batch=4)
    b = b * torch.tensor([[1e-9], [1.0], [1e6], [1e-3]], dtype=F64)
    solution = GMRES(tol=1e-8, stop_mode="rel").run(AffineMap(lambda u: u @ a.T, b))
    assert solution.converged.all()
    exact = torch.linalg.solve(torch.eye(16, dtype=F64) - a, b.T).T
    assert ((solution.z - exact).norm(dim=1) / exact.norm(dim=1)).max() < 1e-6


def test_a_map_that_turns_non_finite_keeps_the_steps_before():
    a, b, _ = make(16, batch=2)
    calls = []

    def linear(u):
        calls.append(1)
        out = u @ a.T
        if len(calls) == 4:
            out[1] = torch.nan
        return out

    solution = GMRES(tol=1e-10).run(AffineMap(linear, b))
    assert solution.converged.tolist() == [True, False]
    assert solution.nstep[1] == 3
    assert solution.z.isfinite().all()
    assert solution.abs_residual[1] < b[1].norm()


@pytest.mark.parametrize(("tol", "gain"), [(1e-5, 0.9), (1e-5, 0.99), (2e-6, 0.9)])
def test_in_float32_the_rounding_of_the_recurrence_is_mended(tol, gain):
    a = random_matrix(64, gain).float()
    b = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    solution = GMRES(tol=tol, stop_mode="rel", max_iter=200).run(AffineMap(lambda u: u @ a.T, b))
    assert solution.converged.all()


def test_a_solve_that_ends_early_says_why():
    f = AffineMap(lambda u: u * torch.tensor([1.0, 0.5]), torch.ones(1, 2))
    solution = GMRES(tol=1e-6).run(f)
    assert solution.status.tolist() == [Status.STALLED]
    assert solution.nfe < 10
