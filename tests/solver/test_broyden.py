"""Broyden's method."""

from __future__ import annotations

import pytest
import torch

from benchmarks.problems import attention, tanh
from tests.problems import F64, TanhMap, random_matrix, solve_exactly
from torchdeq import Broyden


@pytest.mark.parametrize("n", [4, 12, 24])
def test_a_linear_problem_ends_within_2n_steps(n):
    """Gay (1979): Broyden's method on n linear equations ends in at most 2n steps."""
    a = random_matrix(n, 0.9)
    f = lambda z: z @ a.T + 1  # noqa: E731
    solution = Broyden(tol=1e-9, max_iter=4 * n)(f, torch.zeros(1, n, dtype=F64))
    assert solution.converged.all()
    assert solution.nfe <= 2 * n + 1


@pytest.mark.parametrize("m", [1, 3, 10])
def test_limited_memory_still_converges(m):
    """0.1.0 overwrites one term of a product when the buffer wraps, and diverges (residual 3e53)."""
    f = TanhMap.make(gain=1.1)
    solution = Broyden(m=m, tol=1e-10, max_iter=200)(f, f.z0)
    assert solution.converged.all()
    assert (solution.z - solve_exactly(f, f.z0)).norm() < 1e-7


def test_no_divergence_once_converged_under_a_small_memory():
    f = TanhMap.make(gain=0.9)
    solution = Broyden(m=10, tol=0.0, max_iter=200)(f, f.z0)
    assert solution.trace[60:].max() < 1e-10
    assert solution.residual.max() < 1e-13


def test_the_line_search_helps_where_full_steps_overshoot():
    """A steep arctangent, scaled: the secant steps jump across the root; with backtracking the residual falls."""
    f = lambda z: z - 2 * torch.atan(4 * (z - 1))  # noqa: E731
    z0 = torch.tensor([[4.0], [-3.0], [1.5]], dtype=F64)
    searched = Broyden(ls=True, tol=1e-10, max_iter=100)(f, z0)
    assert searched.converged.all()
    assert torch.allclose(searched.z, torch.ones_like(z0), atol=1e-9)


def test_trials_of_the_line_search_are_counted_evaluations():
    calls = []
    f = lambda z: calls.append(1) or z - 2 * torch.atan(4 * (z - 1))  # noqa: E731
    solution = Broyden(ls=True, tol=0.0, max_iter=9)(f, torch.tensor([[4.0]], dtype=F64))
    assert len(calls) == solution.nfe == 9


def test_a_single_sample_stops_at_the_tolerance_asked_for():
    """0.1.0's stagnation test reduces over the batch, so that B = 1 stops at 1.3 to 3 × tol."""
    f = TanhMap.make(batch=1, gain=1.2)
    solution = Broyden(tol=1e-9, max_iter=200)(f, f.z0)
    assert solution.converged.all()
    assert solution.residual.max() <= 1e-9


def test_a_vanishing_residual_does_not_turn_non_finite():
    for dtype in (torch.float32, torch.float64):
        solution = Broyden(tol=0.0, max_iter=80)(lambda z: torch.tanh(0.5 * z), torch.ones(2, 3, dtype=dtype))
        assert solution.z.isfinite().all()
        assert not (solution.status == 2).any()


def test_ten_updates_reach_1e_5_on_an_attention_block_in_float32():
    """With all of them it takes some 23."""
    p = attention(0.7)
    solution = Broyden(m=10, tol=1e-5, stop_mode="rel")(p.f, p.z0)
    assert solution.converged.all()
    assert solution.nfe <= 26


def test_forgetting_the_oldest_beats_beginning_afresh():
    """A product of updates can only be emptied at its limit. Emptied every tenth step it needs more evaluations."""
    p = tanh(1.5, batch=4)
    window = Broyden(m=10, tol=1e-8, stop_mode="rel", max_iter=300)(p.f, p.z0)
    z, calls, best = p.z0, 0, torch.inf
    while (
        best > 1e-8 and calls < 300
    ):  # emptied: a new solve of eleven evaluations from where the last one ended
        part = Broyden(tol=1e-8, stop_mode="rel", max_iter=11, return_final=True)(p.f, z)
        z, calls, best = part.z, calls + part.nfe, part.residual.max()
    assert window.converged.all()
    assert window.nfe < 0.8 * calls


def test_a_rejected_trial_teaches_too():
    """The difference to a trial that was not accepted is as true as any other."""
    f = lambda z: z - 2 * torch.atan(4 * (z - 1))  # noqa: E731
    z0 = torch.tensor([[4.0]], dtype=F64)
    solver = Broyden(ls=True)
    state, z = solver.init(z0), z0
    for _ in range(4):
        z, state = solver.step(f, z, f(z), state)
    assert state.pairs == 3
    assert ((state.u - state.v)[0, :3].norm(dim=1) > 0.99).all()  # y, of unit length
