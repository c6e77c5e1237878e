"""Truncated cycles against the loop, written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import forward_ad

from tests.problems import F64, TanhMap, cotangent, error, exact_adjoint, solve_exactly
from torchdeq import (
    DEQ,
    Anderson,
    ConvergenceWarning,
    FixedPointIteration,
    SimpleFixedPointIteration,
    TruncatedCycle,
    as_grad,
    backward_factory,
)
from torchdeq.diagnostics.memory import SavedBytes

KINDS = pytest.mark.parametrize("kind", [FixedPointIteration, SimpleFixedPointIteration])


def fixed(count):
    """So many evaluations, of which no residual is too large."""
    return SimpleFixedPointIteration(max_iter=count, tol=math.inf)


def written_out(f, z0, cycles, grad_steps):
    with torch.no_grad():
        z = z0
        for _ in range(cycles):
            z = f(z)
    for _ in range(grad_steps):
        before, z = z.detach(), f(z)
    return z, before


@KINDS
@pytest.mark.parametrize(("cycles", "grad_steps"), [(5, 1), (4, 3), (0, 2)])
def test_equals_the_loop_written_out_and_makes_each_evaluation_once(kind, cycles, grad_steps):
    f, calls = TanhMap.make(n=8, batch=3), []

    def counted(z):
        calls.append(torch.is_grad_enabled())
        return f(z)

    g, z0 = cotangent(f.x), cotangent(f.x, 3).requires_grad_()
    total = cycles + grad_steps
    for solver, method in (
        (kind(max_iter=total, tol=1e3), TruncatedCycle(grad_steps=grad_steps)),
        (kind(tol=1e3), TruncatedCycle(cycles=cycles, grad_steps=grad_steps)),
    ):
        calls.clear()
        z, solution = DEQ(solver, method)(counted, z0)
        want, before = written_out(f, z0.detach(), cycles, grad_steps)
        assert calls == [False] * cycles + [True] * grad_steps
        assert solution.nfe == total  # no stop test, though all residuals are below tol
        assert torch.equal(solution.z, before)
        assert torch.equal(z, want)
        assert torch.allclose(solution.abs_residual, (f(before) - before).norm(dim=1), rtol=1e-13)
        got = torch.autograd.grad(z, (*f.wanted, z0), g, allow_unused=True)
        assert got[2] is None
        assert error(got[:2], torch.autograd.grad(want, f.wanted, g)) < 1e-14


@pytest.mark.parametrize("grad_steps", [1, 4])
def test_at_the_fixed_point_it_is_the_phantom_gradient_in_closed_form(grad_steps):
    """Bᵀ (I − (Jᵀ)^k) u."""
    f = TanhMap.make(n=6, batch=2)
    g, z = cotangent(f.x), solve_exactly(f, f.z0)
    u = exact_adjoint(f, z, g)
    j = torch.autograd.functional.jacobian(f, z).reshape(12, 12)
    v = u - (torch.linalg.matrix_power(j.T, grad_steps) @ u.reshape(-1)).reshape(u.shape)
    want = torch.autograd.grad(f(z), f.wanted, v)
    out, _ = DEQ(fixed(grad_steps + 3), TruncatedCycle(grad_steps=grad_steps))(f, z)
    assert error(torch.autograd.grad(out, f.wanted, g), want) < 1e-12


def test_the_solvers_tolerance_judges_and_stops_nothing():
    f = TanhMap.make(n=6, batch=2)
    with pytest.warns(ConvergenceWarning):
        _, solution = DEQ(SimpleFixedPointIteration(max_iter=3, tol=1e-6), TruncatedCycle())(f, f.z0)
    assert solution.nfe == 3
    assert not solution.converged.any()
    _, solution = DEQ(FixedPointIteration(max_iter=200, tol=1e-6), TruncatedCycle())(f, f.z0)
    assert solution.nfe == 200
    assert solution.converged.all()
    _, solution = DEQ(fixed(3), TruncatedCycle())(f, f.z0)  # a warning would be an error
    assert solution.converged.all()


def test_without_grad_mode_it_gives_the_same_by_as_many_evaluations():
    f, calls = TanhMap.make(n=6, batch=2), []
    deq = DEQ(fixed(5), TruncatedCycle(grad_steps=2))
    counted = lambda z: calls.append(1) or f(z)  # noqa: E731
    with_graph, _ = deq(counted, f.z0)
    with torch.no_grad():
        without, solution = deq(counted, f.z0)
    assert len(calls) == 10
    assert torch.equal(without, with_graph)
    assert solution.nfe == 5


def test_without_grad_mode_max_iter_counts_and_there_is_no_noise():
    f = TanhMap.make(n=6, batch=2)
    with torch.no_grad():
        z, solution = DEQ(fixed(4), TruncatedCycle(cycles=9, noise=0.3))(f, f.z0)
        assert torch.equal(z, f(f(f(f(f.z0)))))
        assert solution.nfe == 4
        _, solution = DEQ(fixed(4), TruncatedCycle(noise=0.3), record=(2,))(f, f.z0)
        assert torch.equal(solution.states[0], f(f(f.z0)))
        z, solution = DEQ(Anderson(tol=1e-9), TruncatedCycle())(f, f.z0)
    assert solution.converged.all()
    assert torch.equal(z, solution.z)


def test_noise_moves_a_copy_of_the_start_by_as_much_as_was_said():
    z0 = torch.ones(2000, 5, dtype=F64)
    x = torch.zeros(2000, 5, dtype=F64, requires_grad=True)
    deq = DEQ(fixed(1), TruncatedCycle(noise=0.3))
    torch.manual_seed(0)
    z, solution = deq(lambda z: z + x, z0)
    torch.manual_seed(0)
    again, _ = deq(lambda z: z + x, z0)
    other, _ = deq(lambda z: z + x, z0)
    assert torch.equal(z, again)
    assert not torch.equal(z, other)
    assert torch.equal(z0, torch.ones_like(z0))
    shift = solution.z - 1
    # 10 000 samples: mean and deviation are within five of their own deviations.
    assert abs(shift.mean()) < 5 * 0.3 / 100
    assert abs(shift.std() - 0.3) < 5 * 0.3 / 100 / 2**0.5
    with torch.no_grad():
        bare, _ = deq(lambda z: z + x, z0)
    assert torch.equal(bare, z0)


def test_noise_reaches_every_leaf_in_its_dtype():
    z0 = {"a": torch.zeros(4, 3, dtype=torch.bfloat16), "b": torch.zeros(4, 2, dtype=torch.complex64)}
    p = torch.ones((), requires_grad=True)
    z, _ = DEQ(fixed(1), TruncatedCycle(noise=1.0))(
        lambda z: {"a": z["a"] * p.bfloat16(), "b": z["b"] * p}, z0
    )
    assert z["a"].dtype == torch.bfloat16
    assert (z["a"] != 0).all()
    assert (z["b"].real != 0).all()
    assert (z["b"].imag != 0).all()


def test_the_carry_between_segments_has_no_graph():
    """Each segment's gradient is that of its own last steps."""
    f = TanhMap.make(n=6, batch=2)
    g, deq = cotangent(f.x), DEQ(fixed(3), TruncatedCycle(grad_steps=2))
    z, plain = f.z0, f.z0
    for _ in range(3):
        z, _ = deq(f, z)
        plain, _ = written_out(f, plain.detach(), 1, 2)
        assert torch.equal(z, plain)
        got = torch.autograd.grad(z, f.wanted, g, retain_graph=True)
        assert error(got, torch.autograd.grad(plain, f.wanted, g)) < 1e-14


def test_saved_bytes_are_those_of_the_tracked_evaluations():
    held = {}
    for total in (10, 200):
        f = TanhMap.make()
        with SavedBytes(ignore=[f.w, f.x]) as saved:
            z, _ = DEQ(fixed(total), TruncatedCycle(grad_steps=2))(f, f.z0)
            held[total] = saved.now
            torch.autograd.grad(z.sum(), f.wanted)
            assert saved.now == 0
    assert held[10] == held[200] == 4 * f.x.nbytes  # per step the argument of f, and tanh


def test_records_iterates_of_the_whole_cycle():
    f = TanhMap.make(n=6, batch=2)
    deq = DEQ(fixed(6), [as_grad("jfb"), as_grad("jfb"), TruncatedCycle(grad_steps=3)], record=(2, 5))
    z, solution = deq(f, f.z0)
    for state, count in zip((*solution.states, z), (2, 5, 6), strict=True):
        assert torch.equal(state, written_out(f, f.z0, 0, count)[0])


@pytest.mark.parametrize("batch_dims", [0, 1])
def test_nested_states_frozen_parameters_two_calls_and_two_backward_passes(batch_dims):
    f = TanhMap.make(n=6, batch=3)
    f.w.requires_grad_(False)
    g = cotangent(f.x)
    deq = DEQ(fixed(5), TruncatedCycle(grad_steps=2), batch_dims=batch_dims)

    def call():
        z, _ = deq(lambda s: tuple(f(torch.cat(s, 1)).split(3, 1)), tuple(f.z0.split(3, 1)))
        return (torch.cat(z, 1) * g).sum()

    loss = call() + call()
    want = torch.autograd.grad(written_out(f, f.z0, 3, 2)[0], f.x, 2 * g)
    for keep in (True, False):
        assert error(torch.autograd.grad(loss, [f.x], retain_graph=keep), want) < 1e-14


@KINDS
def test_a_cycle_that_is_not_finite_is_reported_and_keeps_a_graph(kind):
    w = torch.ones(1, 1, dtype=F64, requires_grad=True)
    f = lambda z: torch.where(z < 2, z + w, torch.nan)  # noqa: E731
    with pytest.warns(ConvergenceWarning, match="non-finite"):
        z, solution = DEQ(kind(max_iter=9, tol=1e3), TruncatedCycle())(f, torch.zeros(1, 1, dtype=F64))
    assert not solution.converged.any()
    assert z.requires_grad


def test_forward_mode_raises():
    f = TanhMap.make(n=4, batch=2)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        DEQ(fixed(3), TruncatedCycle())(TanhMap(f.w, forward_ad.make_dual(f.x.detach(), f.z0 + 1)), f.z0)


def test_the_functor_makes_the_whole_cycle_from_the_state_it_is_given():
    f = TanhMap.make(n=4, batch=2)
    for options, (cycles, grad_steps) in (
        ({}, (0, 1)),
        ({"cycles": 3, "grad_steps": 2}, (3, 2)),
    ):
        functor = backward_factory("truncated_cycle", **options)
        assert functor.method == TruncatedCycle(**options)
        (z,) = functor(None, f, f.z0)
        want, _ = written_out(f, f.z0, cycles, grad_steps)
        assert torch.equal(z, want)
        assert error(*(torch.autograd.grad(t.sum(), f.wanted) for t in (z, want))) < 1e-15


def test_wrong_calls_teach():
    f = TanhMap.make()
    with pytest.raises(
        TypeError, match=r"TruncatedCycle differentiates.*SimpleFixedPointIteration for a fixed count"
    ):
        DEQ(Anderson(), TruncatedCycle())(f, f.z0)
    with pytest.raises(ValueError, match=r"grad_steps=9.*more evaluations than max_iter=5"):
        DEQ(FixedPointIteration(max_iter=5), TruncatedCycle(grad_steps=9))(f, f.z0)
    for options, message in (
        ({"cycles": -1}, "cycles counts"),
        ({"cycles": 1.5}, "cycles counts"),
        ({"grad_steps": 0}, "grad_steps counts"),
        ({"grad_steps": True}, "grad_steps counts"),
        ({"noise": -0.1}, "noise is a standard deviation"),
        ({"noise": math.inf}, "noise is a standard deviation"),
        ({"noise": math.nan}, "noise is a standard deviation"),
    ):
        with pytest.raises(ValueError, match=message):
            TruncatedCycle(**options)
