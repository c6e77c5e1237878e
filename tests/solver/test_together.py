"""Maps that couple the samples of a batch: seen, said, and solved as the one system they are."""

from __future__ import annotations

import warnings

import pytest
import torch

from tests.problems import (
    F64,
    CoupledMap,
    TanhMap,
    cotangent,
    error,
    exact_gradient,
    random_matrix,
    solve_exactly,
)
from torchdeq import (
    DEQ,
    GMRES,
    IFT,
    AffineMap,
    Anderson,
    Broyden,
    CouplingWarning,
    FixedPointIteration,
    Multisecant,
    NewtonKrylov,
)


def dense_coupling():
    """24 × 24 over a batch of 4 samples of 6, far enough from a contraction for coefficients per sample to fail."""
    f = CoupledMap.make(batch=4, n=6, gain=2.5, seed=3)
    f.x.data *= 1.5
    return f


@pytest.mark.parametrize("solver", [Anderson(m=10), Broyden(), Multisecant(), NewtonKrylov()], ids=repr)
def test_a_dense_coupling_is_solved_with_right_gradients(solver):
    f = dense_coupling()
    max_iter = 300 if isinstance(solver, NewtonKrylov) else 60
    deq = DEQ(solver.replace(tol=1e-11, max_iter=max_iter), IFT(solver=GMRES(tol=1e-11, max_iter=60)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        z, solution = deq(f, f.z0)
        g = cotangent(z)
        got = torch.autograd.grad(z, f.wanted, g)
    assert solution.converged.all()
    assert any(w.category is CouplingWarning for w in caught)
    exact = solve_exactly(f, z)
    assert (z - exact).norm() < 1e-9
    assert error(got, exact_gradient(f, z, g, f.wanted)) < 1e-8


def test_the_warning_says_what_to_do_and_names_the_users_line():
    f = dense_coupling()
    with pytest.warns(CouplingWarning, match="batch_dims=0") as caught:
        Broyden(tol=1e-11)(f, f.z0)
    assert caught[0].filename == __file__


def test_said_beforehand_it_costs_one_solve():
    f = dense_coupling()
    once = Broyden(tol=1e-11, max_iter=60)(f, f.z0, batch_dims=0)
    with pytest.warns(CouplingWarning):
        twice = Broyden(tol=1e-11, max_iter=60)(f, f.z0)
    assert once.converged.all()
    assert once.nfe < twice.nfe
    assert twice.coupled
    assert twice.residual.shape == (4,)


def test_a_map_that_couples_but_converges_is_left_alone():
    f = CoupledMap.make(gain=0.3)
    solution = Anderson(tol=1e-8)(f, f.z0)  # no warning
    assert solution.converged.all()


def test_a_solve_that_is_merely_unfinished_is_not_suspected():
    """Nor does it pay for the question: its residual fell by more than ten."""
    f = TanhMap.make(gain=0.8)
    solution = Anderson(tol=1e-12, max_iter=12)(f, f.z0)
    assert solution.nfe <= 13
    assert not solution.coupled


def test_a_hard_map_that_keeps_samples_apart_is_asked_once_and_not_solved_again():
    f = TanhMap.make(n=32, gain=4.0)
    calls = []
    solution = Anderson(tol=1e-12, max_iter=20)(lambda z: calls.append(1) or f(z), f.z0)
    assert not solution.converged.all()
    assert len(calls) == solution.nfe <= 20 + 1 + 3
    assert not solution.coupled


def test_picard_iteration_needs_no_second_solve():
    f = dense_coupling()
    solution = FixedPointIteration(max_iter=30, tol=1e-11)(f, f.z0)  # no warning
    assert solution.nfe <= 31


def test_krylov_spaces_of_samples_that_are_coupled():
    a = random_matrix(24, 0.9, 3)
    b = torch.randn(4, 6, dtype=F64, generator=torch.Generator().manual_seed(2))
    f = AffineMap(lambda u: (a @ u.reshape(-1)).reshape(4, 6), b)
    with pytest.warns(CouplingWarning):
        solution = GMRES(tol=1e-10)(f, torch.zeros_like(b))
    assert solution.converged.all()
    exact = torch.linalg.solve(torch.eye(24, dtype=F64) - a, b.reshape(-1))
    assert torch.allclose(solution.z.reshape(-1), exact, atol=1e-8)


def test_two_samples_that_start_with_residuals_one_and_zero():
    """0.1.0 mixed iterates of different evaluations here and returned a state with residual 4.7."""
    mix = torch.tensor([[0.5, 0.45], [0.45, 0.5]], dtype=F64)
    f = lambda z: mix @ z + torch.tensor([[1.0], [0.0]], dtype=F64)  # noqa: E731
    for solver in (FixedPointIteration(max_iter=400), Anderson(), Broyden(), Multisecant()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CouplingWarning)
            solution = solver.replace(tol=1e-8)(f, torch.zeros(2, 1, dtype=F64))
        assert solution.converged.all(), solver
        assert torch.allclose(solution.z, torch.tensor([[200 / 19], [180 / 19]], dtype=F64), atol=1e-5)


@pytest.mark.parametrize("solver", [Anderson(m=20), Broyden()], ids=repr)
def test_as_one_system_a_small_leaf_cannot_hide_either(solver):
    """The first leaf couples its samples; the second is a millionth of its size."""
    mix = torch.linalg.qr(torch.randn(6, 6, dtype=F64, generator=torch.Generator().manual_seed(0))).Q * 0.98

    def f(s):
        return {"a": mix @ s["a"] + 1e6, "b": 0.5 * torch.cos(s["b"])}

    z0 = {"a": torch.zeros(6, 2, dtype=F64), "b": torch.zeros(6, 3, dtype=F64)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CouplingWarning)
        solution = solver.replace(tol=1e-4, stop_mode="rel", norm="max")(f, z0)
    assert solution.coupled
    assert solution.converged.all()
    again = f(solution.z)
    for key in z0:
        assert (again[key] - solution.z[key]).norm() <= 1e-4 * again[key].norm() * (1 + 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_solve_that_comes_back_to_zero_is_looked_at_too(dtype):
    mix = torch.linalg.qr(torch.randn(24, 24, dtype=F64, generator=torch.Generator().manual_seed(0))).Q.to(
        dtype
    )
    f = lambda z: 2 * (mix @ z.reshape(-1)).reshape(z.shape) + 1  # noqa: E731
    with pytest.warns(CouplingWarning):
        solution = Broyden(tol=1e-3, max_iter=60)(f, torch.zeros(6, 4, dtype=dtype))
    assert solution.converged.all()
