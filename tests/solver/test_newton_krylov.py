"""Newton–Krylov."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch

from benchmarks.problems import attention
from tests.problems import F64, TanhMap, random_matrix, solve_exactly
from torchdeq import GMRES, Anderson, BiCGSTAB, Multisecant, NewtonKrylov, Status


def test_converges_superlinearly():
    """Near the solution the forcing terms of Eisenstat and Walker make each residual small against the one before."""
    f = TanhMap.make(n=8, batch=1, gain=1.5)
    solution = NewtonKrylov(tol=1e-14, max_iter=200)(f, solve_exactly(f, f.z0) + 0.05)
    assert solution.converged.all()
    residuals = torch.unique_consecutive(solution.trace[:, 0])  # one for each iterate
    rates = residuals[1:] / residuals[:-1]
    assert rates[-1] < 1e-3
    assert rates[-1] < 0.1 * rates[0]


@pytest.mark.parametrize("linear", [GMRES(), BiCGSTAB()])
def test_reaches_1e_8_where_picard_diverges(linear):
    slopes = torch.linspace(-3, 0.9, 12, dtype=F64)
    f = lambda z: slopes * torch.sin(z) + 1  # noqa: E731
    solution = NewtonKrylov(tol=1e-8, max_iter=200, linear=linear)(f, torch.zeros(3, 12, dtype=F64))
    assert solution.converged.all()
    assert (f(solution.z) - solution.z).norm() < 1e-8 * 3


def test_counts_products_as_evaluations():
    calls = []

    def f(z):
        calls.append(1)
        return torch.tanh(z @ w.T + 1)

    w = random_matrix(16, 1.2)
    solution = NewtonKrylov(tol=1e-10, max_iter=100)(f, torch.zeros(2, 16, dtype=F64))
    assert solution.converged.all()
    assert len(calls) < solution.nfe == len(solution.trace)
    # At each iterate but the last: one evaluation, one product with Jᵀ and at least one with J.
    assert solution.nfe >= len(calls) + 2 * (len(calls) - 1)


def test_needs_no_more_newton_steps_than_scipy():
    f = TanhMap.make(n=24, batch=1, gain=1.5)
    w, x = f.w.detach().numpy(), f.x.detach().numpy()
    calls = []

    def residual(z):
        calls.append(1)
        return np.tanh(w @ z + x[0]) - z

    scipy.optimize.newton_krylov(residual, np.zeros(24), f_tol=1e-9, method="gmres")
    ours = NewtonKrylov(tol=1e-9, max_iter=300)(f, f.z0)
    assert ours.converged.all()
    assert ours.nfe <= len(calls)


def test_the_line_search_saves_newton_from_overshooting():
    """Newton's method on atan(4 (z − 1)) = 0 diverges from far away."""
    f = lambda z: z - torch.atan(4 * (z - 1))  # noqa: E731
    z0 = torch.tensor([[4.0], [-3.0], [1.2]], dtype=F64)
    solution = NewtonKrylov(tol=1e-10, max_iter=200)(f, z0)
    assert solution.converged.all()
    assert torch.allclose(solution.z, torch.ones_like(z0), atol=1e-9)


def test_a_trial_that_is_not_finite_is_shortened():
    f = lambda z: torch.where(z < 0, torch.nan, z - torch.sqrt(z.clamp_min(0)) + 0.1)  # noqa: E731
    solution = NewtonKrylov(tol=1e-10, max_iter=60)(f, torch.full((1, 1), 4.0, dtype=F64))
    assert solution.converged.all()
    assert torch.allclose(solution.z, torch.full((1, 1), 0.01, dtype=F64), atol=1e-9)


def test_an_f_that_autograd_cannot_follow_gets_an_error_that_names_a_solver_for_it():
    with pytest.raises(RuntimeError, match=r"requires grad[\s\S]*Multisecant"):
        NewtonKrylov()(lambda z: torch.from_numpy(np.cos(z.numpy())), torch.zeros(1, 1))


def test_differences_do_where_derivatives_are_not_to_be_had():
    solver = NewtonKrylov(derivative="difference", tol=1e-9, max_iter=100)
    solution = solver(lambda z: torch.from_numpy(3 * np.cos(z.numpy())), torch.ones(2, 3, dtype=F64))
    assert solution.converged.all()

    def attends(z):  # fused attention has no second derivative on a CPU
        return 0.5 * torch.nn.functional.scaled_dot_product_attention(z, z, z) + 1

    z0 = torch.randn(2, 1, 4, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(RuntimeError, match=r"derivative='difference'"):
        NewtonKrylov(tol=1e-4)(attends, z0)
    assert solver.replace(tol=1e-4)(attends, z0).converged.all()


@pytest.mark.parametrize("gain", [0.6, 0.9])
def test_differences_cost_what_derivatives_cost(gain):
    f = TanhMap.make(n=24, gain=gain)
    exact = NewtonKrylov(tol=1e-9, max_iter=300)(f, f.z0)
    difference = NewtonKrylov(tol=1e-9, max_iter=300, derivative="difference")(f, f.z0)
    assert exact.converged.all()
    assert difference.converged.all()
    assert torch.allclose(exact.z, difference.z, atol=1e-7)
    assert difference.nfe <= exact.nfe + 5


def test_a_constant_f_is_solved_without_a_derivative():
    solution = NewtonKrylov()(lambda z: torch.ones(2, 3), torch.zeros(2, 3))
    assert solution.converged.all()
    assert solution.nfe == 2


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_differentiates_whatever_the_callers_grad_mode_is(context):
    w = random_matrix(6, 0.9)
    with context():
        solution = NewtonKrylov(tol=1e-9)(lambda z: torch.tanh(z @ w.T + 1), torch.zeros(2, 6, dtype=F64))
    assert solution.converged.all()
    assert not solution.z.requires_grad


def test_a_wrong_linear_solver_teaches():
    with pytest.raises(ValueError, match="linear must be a solver of affine maps"):
        NewtonKrylov(linear=Anderson())


def test_fewer_evaluations_than_the_default_solver_for_a_stiff_map():
    """A hundred slow modes of all rates: quasi-Newton methods learn them one by one, and so does Krylov, but without
    waiting for the nonlinear iterates."""
    rates = torch.linspace(-30, 0.99, 40, dtype=F64)
    f = lambda z: rates * torch.tanh(z) + 1  # noqa: E731
    z0 = torch.zeros(1, 40, dtype=F64)
    newton = NewtonKrylov(tol=1e-8, max_iter=600)(f, z0)
    assert newton.converged.all()
    other = Multisecant(tol=1e-8, max_iter=600)(f, z0)
    assert newton.nfe < other.nfe or not other.converged.all()
    assert other.status.tolist() in ([Status.CONVERGED], [Status.MAX_ITER])


def test_begins_with_a_picard_step_as_a_norm_layer_has_no_useful_derivative_at_zero():
    p = attention(0.3)
    solution = NewtonKrylov(tol=1e-5, stop_mode="rel", max_iter=60)(p.f, p.z0)
    assert solution.converged.all()


def test_a_small_leaf_gets_a_direction_of_its_own():
    f = lambda s: {"big": 0.5 * s["big"] + 1e6, "small": -3 * torch.tanh(s["small"]) + 1}  # noqa: E731
    z0 = {"big": torch.full((2, 3), 2e6, dtype=F64), "small": torch.zeros(2, 2, dtype=F64)}
    solution = NewtonKrylov(tol=1e-6, stop_mode="rel", norm="max")(f, z0)
    assert solution.converged.all()
    assert solution.nfe < 40


def test_differences_are_as_wide_as_the_dtype_of_f_asks():
    gen = torch.Generator().manual_seed(0)
    w, x = (torch.randn(32, 32, generator=gen) * 0.1).bfloat16(), torch.randn(4, 32, generator=gen).bfloat16()
    solver = NewtonKrylov(tol=2e-2, stop_mode="rel", derivative="difference", max_iter=100)
    assert solver(lambda z: torch.tanh(z @ w.T + x), torch.zeros_like(x)).converged.all()
