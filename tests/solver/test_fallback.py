"""Chains of solvers."""

from __future__ import annotations

import pickle

import pytest
import torch

import torchdeq
from tests.problems import F64, random_matrix
from torchdeq import (
    DEQ,
    GMRES,
    AffineMap,
    Anderson,
    Broyden,
    Fallback,
    FixedPointIteration,
    NewtonKrylov,
    Status,
)

SLOPES = torch.tensor([[0.5, 0.3], [-2.0, 0.4], [0.9, -0.9]], dtype=F64)


def f(z):
    """Three samples: easy, divergent for Picard, slow."""
    return SLOPES * z + 1


Z0 = torch.zeros(3, 2, dtype=F64)
CHAIN = Fallback(FixedPointIteration(max_iter=40, tol=1e-9), NewtonKrylov())


def test_who_is_left_goes_on_in_the_next_from_the_best_iterate():
    solution = CHAIN(f, Z0)
    assert solution.converged.all()
    assert torch.allclose(solution.z, 1 / (1 - SLOPES), atol=1e-8)
    first = CHAIN.solvers[0](f, Z0)
    assert first.converged.tolist() == [True, False, False]
    assert torch.equal(solution.z[0], first.z[0])
    assert solution.nstep[0] == first.nstep[0]
    assert (solution.nstep[1:] > 40).all()
    assert (
        len(solution.trace) == solution.nfe - 1
    )  # the first measured its mixture of best states with one more
    # the second solver begins where the first was best
    assert torch.allclose(solution.trace[40], first.residual, rtol=1e-9)


def test_the_second_is_not_asked_when_the_first_is_enough():
    chain = Fallback(FixedPointIteration(), NewtonKrylov())
    g = lambda z: 0.1 * z + 1  # noqa: E731
    assert chain(g, Z0).nfe == FixedPointIteration()(g, Z0).nfe


def test_max_iter_limits_all_of_them_together():
    assert CHAIN.max_iter == 90
    calls = []
    solution = CHAIN.replace(max_iter=45, tol=0.0)(lambda z: calls.append(1) or f(z), Z0, record=[10, 42])
    assert len(solution.trace) in (
        44,
        45,
    )  # one of them may have measured the first solver's mixture of states
    assert len(calls) <= solution.nfe <= 49  # with what an unconverged solve may add
    assert len(solution.states) == 2


def test_prints_compares_pickles_and_varies():
    assert repr(CHAIN) == "Fallback(FixedPointIteration(max_iter=40, tol=1e-09), NewtonKrylov())"
    tight = CHAIN.replace(tol=1e-11, max_iter=300)
    assert repr(tight) == (
        "Fallback(FixedPointIteration(max_iter=40, tol=1e-09), NewtonKrylov(), max_iter=300, tol=1e-11)"
    )
    for chain in (CHAIN, tight):
        assert eval(repr(chain), vars(torchdeq)) == chain
        assert pickle.loads(pickle.dumps(chain)) == chain
    assert tight(f, Z0).residual.max() <= 1e-11


def test_in_deq_under_a_name_and_backwards():
    w = random_matrix(8, 0.9).requires_grad_()
    deq = DEQ(Fallback(Anderson(max_iter=5, tol=1e-9), Broyden(max_iter=60)))
    z, solution = deq(lambda z: torch.tanh(z @ w.T + 1), torch.zeros(2, 8, dtype=F64), tol=1e-10)
    assert solution.converged.all()
    z.sum().backward()
    assert w.grad.isfinite().all()


def test_krylov_solvers_take_part_where_f_is_affine_only():
    chain = Fallback(FixedPointIteration(max_iter=3, tol=1e-9), GMRES())
    b = torch.ones(3, 2, dtype=F64)
    solution = chain(AffineMap(lambda u: SLOPES * u, b), Z0)
    assert solution.converged.all()
    assert torch.allclose(solution.z, 1 / (1 - SLOPES), atol=1e-7)
    with pytest.raises(TypeError, match="affine maps only"):
        chain(f, Z0)


def test_wrong_calls_teach():
    with pytest.raises(ValueError, match="two or more solvers"):
        Fallback(Anderson())
    with pytest.raises(TypeError, match="no option 'max_itr'"):
        Fallback(Anderson(), Broyden(), max_itr=3)


def test_a_sample_that_no_solver_can_help_says_so():
    chain = Fallback(FixedPointIteration(max_iter=5), Anderson(max_iter=5))
    solution = chain(lambda z: z + 1, torch.zeros(2, 3, dtype=F64))
    assert solution.status.tolist() == [Status.MAX_ITER] * 2


def test_options_that_a_krylov_solver_does_not_have_stay_with_the_others():
    chain = Fallback(Anderson(min_iter=2, max_iter=2, patience=5), GMRES(), tol=1e-9)
    solution = chain(AffineMap(lambda u: SLOPES * u, torch.ones(3, 2, dtype=F64)), Z0)
    assert solution.converged.all()


def test_what_follows_from_the_solvers_follows_from_new_ones():
    chain = Fallback(Anderson(max_iter=3), Broyden(max_iter=3), tol=1e-7)
    other = chain.replace(solvers=(Anderson(max_iter=100), Broyden(max_iter=500)))
    assert (other.max_iter, other.tol) == (600, 1e-7)


def test_return_final_goes_through_the_whole_chain():
    calls = []
    chain = Fallback(Anderson(max_iter=3), Broyden(max_iter=4), return_final=True)
    chain(lambda z: calls.append(1) or 0.1 * z, Z0)
    assert len(calls) == 7
