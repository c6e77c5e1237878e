"""GMRES: optimal, finite, honest."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse.linalg
import torch

from tests.problems import F64, random_matrix
from torchdeq import GMRES, AffineMap, Status
from torchdeq.solver.gmres import _least_squares


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
    assert solution.status.tolist() == [Status.STALLED]
    assert solution.z.isfinite().all()
    assert torch.allclose(solution.abs_residual, torch.ones(1, dtype=F64), atol=1e-9)
    assert solution.nfe <= 4
    # The estimates do not claim more than the residual shows.
    assert (solution.trace >= 1 - 1e-9).all()


def test_a_product_that_consists_of_rounding_ends_the_space():
    """I − L takes e₀ to e₁ and e₁ to 0, in coordinates where the image of e₁ is not quite zero."""
    q = torch.linalg.qr(random_matrix(40, 1.0)).Q
    operator = torch.eye(40, dtype=F64)
    operator[:2, :2] = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    a = torch.eye(40, dtype=F64) - q @ operator @ q.T
    solution = GMRES(tol=1e-10).run(AffineMap(lambda u: u @ a.T, q[None, :, 0]))
    assert solution.status.tolist() == [Status.STALLED]
    assert solution.nstep.tolist() == [2]
    assert torch.allclose(solution.residual, torch.ones(1, dtype=F64), atol=1e-9)
    assert solution.z.abs().max() < 1e-9


def test_the_basis_stays_orthogonal():
    """Where one pass of Gram–Schmidt loses it: float32, and a condition of 1e5."""
    a = torch.eye(60) - torch.diag(torch.logspace(-5, 0, 60))
    solver = GMRES()
    state = solver.first(torch.ones(1, 60) / 60**0.5)
    for _ in range(30):
        state, _ = solver.advance(state.probe - state.probe @ a, state)
    basis = state.basis[0, :30]
    assert (basis @ basis.T - torch.eye(30)).abs().max() < 1e-5


def test_the_residual_is_the_smallest_in_the_krylov_space():
    """Against a dense least-squares problem over K_k = span(b, A b, …)."""
    a, b, f = make(30, batch=2, gain=1.1)
    operator = torch.eye(30, dtype=F64) - a
    trace = GMRES(tol=1e-10, max_iter=40).run(f).trace
    for i in range(2):
        space = b[i][:, None]
        for k in range(1, 16):
            q = torch.linalg.qr(space).Q
            y = torch.linalg.lstsq(operator @ q, b[i][:, None]).solution
            assert torch.allclose(trace[k, i], (b[i][:, None] - operator @ q @ y).norm(), rtol=1e-6)
            space = torch.cat([space, operator @ q[:, -1:]], dim=1)


def test_least_squares_on_the_leading_unknowns():
    h = random_matrix(6, 1.0).triu(-1)[:, :5] + 2 * torch.eye(6, 5, dtype=F64)
    t = torch.ones(6, dtype=F64)
    for k in range(5):
        t[k + 1] = -(t[: k + 1] @ h[: k + 1, k]) / h[k + 1, k]
    y = _least_squares(h.mT.expand(3, 5, 6), t.expand(3, 6), torch.tensor([0, 3, 5]))
    e = torch.eye(6, dtype=F64)[0]
    assert torch.equal(y[0], torch.zeros(5, dtype=F64))
    assert torch.allclose(y[1, :3], torch.linalg.lstsq(h[:4, :3], e[:4, None]).solution[:, 0])
    assert torch.equal(y[1, 3:], torch.zeros(2, dtype=F64))
    assert torch.allclose(y[2], torch.linalg.lstsq(h, e[:, None]).solution[:, 0])


# Restarts ----------------------------------------------------------------------------------------------------


def test_restarts_are_those_of_scipy_and_cost_one_product_each():
    a, b, f = make(40, batch=1, gain=0.9)
    residuals = [float(b.norm())]
    scipy.sparse.linalg.gmres(
        np.eye(40) - a.numpy(), b[0].numpy(), rtol=1e-8, restart=5, maxiter=20,
        callback=lambda r: residuals.append(r * float(b.norm())), callback_type="pr_norm",
    )  # fmt: skip
    solution = GMRES(tol=1e-8, m=5, max_iter=100).run(f)
    assert solution.converged.all()
    assert len(residuals) > 20
    assert np.allclose(solution.trace[:20, 0].numpy(), residuals[:20], rtol=1e-6)
    restarts = (int(solution.nstep) - 1) // 5
    assert solution.nfe == solution.nstep + restarts + 1


def test_a_restart_that_never_comes_changes_nothing():
    _, _, f = make(24)
    never, late = GMRES(tol=1e-10).run(f), GMRES(tol=1e-10, m=30).run(f)
    assert torch.equal(never.z, late.z)
    assert never.nfe == late.nfe


def test_the_memory_of_restarts_is_that_of_m_vectors():
    _, _, f = make(60, gain=0.9)
    widths = []

    class Watched(GMRES):
        def advance(self, ap, state):
            state, estimate = super().advance(ap, state)
            widths.append(state.basis.shape[1])
            return state, estimate

    assert Watched(tol=1e-8, m=7, max_iter=200).run(f).converged.all()
    assert max(widths) == 8


def nonnormal(n=200):
    """‖J‖ = 5 far above the spectral radius of one half."""
    values = torch.rand(n, dtype=F64, generator=torch.Generator().manual_seed(3)) - 0.5
    above = random_matrix(n, 1.0, 4).triu(1)
    return torch.diag(values) + 5 * above / torch.linalg.matrix_norm(above, 2)


def test_on_a_nonnormal_map_restarts_at_ten_stall_and_say_so():
    a = nonnormal()
    f = AffineMap(
        lambda u: u @ a.T, torch.randn(2, 200, dtype=F64, generator=torch.Generator().manual_seed(5))
    )
    solver = GMRES(tol=1e-4, stop_mode="rel", max_iter=200)
    assert solver.run(f).converged.all()
    restarted = solver.replace(m=10).run(f)
    assert not restarted.converged.any()
    assert (restarted.trace[-1] > 0.1).all()


def test_a_cycle_that_gains_nothing_is_the_last():
    """GMRES(1) on a rotation by a right angle: the residual is orthogonal to its image."""
    turn = torch.tensor([[1.0, 1.0], [-1.0, 1.0]], dtype=F64)
    f = AffineMap(lambda u: u @ turn.T, torch.ones(1, 2, dtype=F64))
    solution = GMRES(m=1, tol=1e-8).run(f)
    assert solution.status.tolist() == [Status.STALLED]
    assert solution.nfe == 2
    assert GMRES(m=2, tol=1e-8).run(f).converged.all()


@pytest.mark.parametrize("m", [0, -1, 2.5])
def test_a_restart_after_no_step_is_refused(m):
    with pytest.raises(ValueError, match="steps before a restart, must be an integer of at least 1 or None"):
        GMRES(m=m)


# What each spectrum costs ------------------------------------------------------------------------------------


def spectra(n=200):
    disc = random_matrix(n, 1.0, 1)
    disc = disc / torch.linalg.eigvals(disc).abs().max()
    q = torch.linalg.qr(random_matrix(n, 1.0, 2)).Q
    v = q[:, :5]
    rest = torch.eye(n, dtype=F64) - v @ v.T
    slow = v * torch.tensor([0.99, 0.98, 0.96, -0.97, 0.95], dtype=F64) @ v.T + rest @ (0.2 * disc) @ rest
    even = random_matrix(n, 1.0, 3)
    even = even + even.T
    return {
        "disc .5": (0.5 * disc, (8, 14, 28)),
        "disc .9": (0.9 * disc, (30, 50, 80)),
        "symmetric": (0.95 * even / torch.linalg.matrix_norm(even, 2), (14, 27, 46)),
        "slow modes": (slow, (16, 20, 26)),
        "nonnormal": (nonnormal(n), (35, 42, 54)),
    }


@pytest.mark.parametrize("name", spectra())
def test_products_on_spectra_of_every_kind(name):
    """The bounds are some tenth above what other draws of such matrices took with other implementations."""
    a, bounds = spectra()[name]
    b = torch.randn(8, 200, dtype=F64, generator=torch.Generator().manual_seed(6))
    f = AffineMap(lambda u: u @ a.T, b)
    for tol, bound in zip((1e-2, 1e-4, 1e-8), bounds, strict=True):
        solution = GMRES(tol=tol, stop_mode="rel", max_iter=200).run(f)
        assert solution.converged.all()
        assert solution.nstep.max() <= bound


def test_the_true_residual_is_reported_where_the_map_couples_samples():
    """The recurrence of a per-sample Krylov space says 'converged'; the residual says not."""
    coupling = random_matrix(6, 0.9, 3)
    b = torch.randn(2, 3, dtype=F64, generator=torch.Generator().manual_seed(2))
    f = AffineMap(lambda u: (coupling @ u.reshape(-1)).reshape(2, 3), b)
    solution = GMRES(tol=1e-9).run(f, together=False)
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
