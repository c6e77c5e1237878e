"""Unrolling against the loop it differentiates, written out."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.autograd import forward_ad

from tests.problems import F64, TanhMap, cotangent, error, exact_gradient, random_matrix, solve_exactly
from torchdeq import (
    DEQ,
    Anderson,
    ConvergenceWarning,
    FixedPointIteration,
    PhantomGrad,
    SimpleFixedPointIteration,
    Unroll,
    backward_factory,
)
from torchdeq.diagnostics.memory import SavedBytes
from torchdeq.grad.fingerprint import Fingerprint

KINDS = pytest.mark.parametrize("kind", [FixedPointIteration, SimpleFixedPointIteration])
FORMS = pytest.mark.parametrize("checkpoint", [False, True], ids=["graphs", "checkpoint"])


def written_out(f, z0, steps, tau, skip=0):
    """`steps` evaluations, all but the last damped, the first `skip` of them without a graph; and the last argument."""
    z = z0
    for j in range(steps):
        before = z
        fz = f(z)
        z = fz if j == steps - 1 else tau * fz + (1 - tau) * z
        if j < skip:
            z = z.detach()
    return z, before.detach()


@FORMS
@KINDS
@pytest.mark.parametrize("tau", [1.0, 0.6])
def test_equals_the_loop_written_out(kind, tau, checkpoint):
    f = TanhMap.make(n=8, batch=3)
    g = cotangent(f.x)
    solver = kind(max_iter=7, tol=1e-300, tau=tau)
    with pytest.warns(ConvergenceWarning):
        z, solution = DEQ(solver, Unroll(checkpoint=checkpoint))(f, f.z0)
    want, before = written_out(f, f.z0, 7, tau)
    assert error([z.detach(), solution.z], [want.detach(), before]) < 1e-14
    assert torch.allclose(solution.abs_residual, (f(before) - before).norm(dim=1), rtol=1e-13)
    got = torch.autograd.grad(z, f.wanted, g)
    assert error(got, torch.autograd.grad(want, f.wanted, g)) < 1e-13


@FORMS
def test_first_and_second_derivatives(checkpoint):
    f = TanhMap.make(n=3, batch=2, gain=0.4)
    deq = DEQ(FixedPointIteration(tol=1e-14, max_iter=100), Unroll(checkpoint=checkpoint))

    def solve(w, x):
        return deq(TanhMap(w, x), f.z0)[0]

    assert torch.autograd.gradcheck(solve, f.wanted)
    assert torch.autograd.gradgradcheck(solve, f.wanted, atol=1e-4)


@FORMS
def test_third_derivatives_in_closed_form(checkpoint):
    """z* = b / (1 − a), whose derivatives in a are b k! / (1 − a)^{k+1}."""
    a = torch.tensor(0.5, dtype=F64, requires_grad=True)
    deq = DEQ(FixedPointIteration(tol=0, max_iter=200), Unroll(checkpoint=checkpoint))
    z, solution = deq(lambda z: a * z + 1, torch.zeros(1, 1, dtype=F64))
    assert solution.abs_residual == 0
    y, got = z.sum(), []
    for _ in range(3):
        (y,) = torch.autograd.grad(y, a, create_graph=True)
        got.append(y.item())
    # By then the terms of the k-th derivative that are missing are of the order N^k 2^−N, N = 50.
    assert got == pytest.approx([4, 16, 96], rel=1e-9)


@FORMS
def test_forward_mode_gives_the_tangent_of_the_solution(checkpoint):
    f = TanhMap.make(n=6, batch=2, gain=0.6)
    dw, dx = random_matrix(6, 1.0, 3), cotangent(f.x, 4)
    z = solve_exactly(f, f.z0)
    jacobian = torch.autograd.functional.jacobian(f, z).reshape(12, 12)
    (_, t) = torch.autograd.functional.jvp(lambda w, x: TanhMap(w, x)(z), f.wanted, (dw, dx))
    want = torch.linalg.solve(torch.eye(12, dtype=F64) - jacobian, t.reshape(-1)).reshape(2, 6)
    deq = DEQ(FixedPointIteration(tol=1e-12, max_iter=300), Unroll(checkpoint=checkpoint))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(p.detach(), d) for p, d in zip(f.wanted, (dw, dx), strict=True)]
        out, solution = deq(TanhMap(*duals), f.z0)
        (got,) = [forward_ad.unpack_dual(out).tangent]
        assert forward_ad.unpack_dual(solution.z).tangent is None
    assert error([got], [want]) < 1e-9  # at a residual of 1e-12, after about 60 steps
    _, got = torch.func.jvp(
        lambda w, x: deq(TanhMap(w, x), f.z0)[0], tuple(p.detach() for p in f.wanted), (dw, dx)
    )
    assert error([got], [want]) < 1e-9


def test_forward_over_reverse_gives_hessian_vector_products():
    f = TanhMap.make(n=3, batch=2, gain=0.4)
    deq = DEQ(FixedPointIteration(tol=1e-13, max_iter=200), Unroll())
    loss = lambda x: deq(TanhMap(f.w.detach(), x), f.z0)[0].square().sum()  # noqa: E731
    x, v = f.x.detach(), cotangent(f.x)
    _, got = torch.func.jvp(torch.func.grad(loss), (x,), (v,))
    assert error([got], [torch.autograd.functional.hvp(loss, x, v)[1]]) < 1e-10


@FORMS
@pytest.mark.parametrize(("steps", "last", "tau"), [(7, 3, 1.0), (7, 1, 0.6), (7, 3, 0.6), (7, 7, 0.6)])
def test_the_last_evaluations_of_a_fixed_count(steps, last, tau, checkpoint):
    """The value is that of full unrolling, and no evaluation is made twice."""
    f, calls = TanhMap.make(n=8, batch=3), []

    def counted(z):
        calls.append(torch.is_grad_enabled())
        return f(z)

    g = cotangent(f.x)
    solver = SimpleFixedPointIteration(max_iter=steps, tau=tau, tol=1e3)
    z, solution = DEQ(solver, Unroll(last=last, checkpoint=checkpoint))(counted, f.z0)
    want, before = written_out(f, f.z0, steps, tau, skip=steps - last)
    assert calls == [False] * (steps - last) + [True] * last
    assert solution.nfe == steps
    assert error([z.detach(), solution.z], [want.detach(), before]) < 1e-14
    assert torch.allclose(solution.abs_residual, (f(before) - before).norm(dim=1), rtol=1e-13)
    got = torch.autograd.grad(z, f.wanted, g)
    assert error(got, torch.autograd.grad(want, f.wanted, g)) < 1e-13


@pytest.mark.parametrize("tau", [1.0, 0.6])
def test_with_a_stop_test_the_tracked_evaluations_go_on_from_where_the_solve_stopped(tau):
    f, calls = TanhMap.make(n=8, batch=3, gain=0.5), []

    def counted(z):
        calls.append(torch.is_grad_enabled())
        return f(z)

    g = cotangent(f.x)
    solver = FixedPointIteration(max_iter=60, tol=1e-4, tau=tau)
    start = solver.replace(max_iter=56)(f, f.z0)
    z, solution = DEQ(solver, Unroll(last=4))(counted, f.z0)
    want, before = written_out(f, start.z, 4, tau)
    assert start.nfe < 56
    assert sum(calls) == 4
    assert solution.nfe == len(calls) == start.nfe + 4
    assert solution.abs_trace.shape == (solution.nfe, 3)
    assert torch.equal(solution.nstep, start.nstep + 4)
    assert solution.converged.all()
    assert error([z.detach(), solution.z], [want.detach(), before]) < 1e-14
    assert torch.allclose(solution.abs_residual, (f(before) - before).norm(dim=1), rtol=1e-12)
    got = torch.autograd.grad(z, f.wanted, g)
    assert error(got, torch.autograd.grad(want, f.wanted, g)) < 1e-13


def test_the_budget_includes_the_tracked_evaluations_and_record_goes_on_through_them():
    f = TanhMap.make(n=6, batch=2)
    trail = list(itertools.accumulate(range(9), lambda z, _: f(z).detach(), initial=f.z0))
    deq = DEQ(FixedPointIteration(max_iter=8, tol=0, min_iter=8), Unroll(last=3), record=(2, 5, 7))
    with pytest.warns(ConvergenceWarning):
        z, solution = deq(f, f.z0)
    assert solution.nfe == 8  # 5 without a graph; the sixth is made again, with one
    assert error([z.detach()], [trail[7]]) < 1e-14
    # Recorded iterates, each with the three tracked steps of `attach`.
    want = [trail[1 + 3], trail[4 + 3], trail[5 + 3]]
    assert error([s.detach() for s in solution.states], want) < 1e-14


@KINDS
@pytest.mark.parametrize("last", [None, 1, 3, 20])
def test_without_grad_mode_the_value_is_the_same(kind, last):
    f = TanhMap.make(n=6, batch=3, gain=0.6)
    deq = DEQ(kind(max_iter=20, tol=1e-3, tau=0.9), Unroll(last=last), record=(4, 6))
    with_graph, there = deq(f, f.z0)
    with torch.no_grad():
        z, solution = deq(f, f.z0)
    assert not z.requires_grad
    assert torch.equal(z, with_graph)
    assert all(torch.equal(a, b) for a, b in zip(solution.states, there.states, strict=True))
    assert solution.nfe <= there.nfe
    assert torch.equal(solution.abs_residual, there.abs_residual)


def test_without_grad_mode_another_solver_runs_as_it_is():
    f = TanhMap.make(n=6, batch=3)
    deq = DEQ(FixedPointIteration(max_iter=8), Unroll(last=5), eval_solver=Anderson(tol=1e-9)).eval()
    with torch.no_grad():
        z, solution = deq(f, f.z0)
        assert torch.equal(z, solution.z)
        deq.eval_solver = SimpleFixedPointIteration(max_iter=3, tol=torch.inf)  # fewer than are tracked
        z, solution = deq(f, f.z0)
    assert torch.equal(z, f(f(f(f.z0))))
    assert solution.nfe == 3


def test_a_samples_gradient_does_not_depend_on_its_neighbours():
    f = TanhMap.make(n=6, batch=4, gain=0.6)
    f.x.data[1:] *= torch.tensor([[0.01], [1.0], [30.0]])
    g = cotangent(f.x)
    deq = DEQ(FixedPointIteration(max_iter=100, tol=1e-5), Unroll(last=3))
    z, solution = deq(f, f.z0)
    assert len(solution.nstep.unique()) > 1
    (together,) = torch.autograd.grad(z, f.x, g)
    for i in range(4):
        rows = slice(i, i + 1)
        z, _ = deq(TanhMap(f.w, f.x[rows]), f.z0[rows])
        (alone,) = torch.autograd.grad(z, f.x, g[rows])
        assert (alone[rows] - together[rows]).abs().max() < 1e-14


@KINDS
def test_a_checkpointed_solve_saves_one_state_per_evaluation_and_gives_the_same_gradient(kind):
    f = TanhMap.make()
    g, state = cotangent(f.x), f.x.nbytes
    result = {}
    for method in (Unroll(), Unroll(checkpoint=True), Unroll(last=5), Unroll(last=5, checkpoint=True)):
        with SavedBytes(ignore=[f.w, f.x]) as saved:
            z, _ = DEQ(kind(max_iter=20, tol=1e-1), method)(f, f.z0)
            held, peak = saved.now, saved.peak
            got = torch.autograd.grad(z, f.wanted, g)
            assert saved.now == 0
        result[method] = held, peak, got
    n = 20 if kind is SimpleFixedPointIteration else kind(max_iter=20, tol=1e-1)(f, f.z0).nfe
    for last, count in ((None, n), (5, 5)):
        (held, peak, got), (less, least, again) = (
            result[Unroll(last=last, checkpoint=c)] for c in (False, True)
        )
        masks = n * len(f.x) + f.x.nbytes  # which samples took part, and f of the last iterate of a solve
        # Per step two tensors of the size of the state, the argument of f and tanh; checkpointed only the argument.
        assert 2 * count * state <= held <= peak <= 2 * count * state + 2 * masks
        assert count * state <= less <= least <= count * state + 2 * masks
        assert error(again, got) < 1e-14


def test_a_checkpointed_f_gets_its_random_numbers_and_autocast_again():
    layer, x, seen = torch.nn.Linear(8, 8), torch.randn(4, 8), []

    def noisy(z):
        h = torch.nn.functional.dropout(layer(z), 0.5)
        seen.append((h.dtype, h.detach().clone()))
        return torch.tanh(0.3 * h + x)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        (z,) = Unroll(last=3, checkpoint=True).attach(noisy, torch.zeros(4, 8))
    z.sum().backward()
    assert len(seen) == 6
    assert all(dtype == torch.bfloat16 for dtype, _ in seen)
    # The backward pass goes through the steps in reverse.
    assert all(torch.equal(seen[j][1], seen[5 - j][1]) for j in range(3))


@FORMS
def test_leaving_out_finished_samples_changes_no_gradient(checkpoint):
    f = TanhMap.make(n=6, batch=6, gain=0.7)
    f.x.data[3:] *= 0.01
    g, sizes, gradients = cotangent(f.x), [], []

    def some(z, rows=None):
        sizes.append(len(z))
        return torch.tanh(z @ f.w.T + (f.x if rows is None else f.x[rows]))

    for compact in (False, True):
        sizes.clear()
        solver = FixedPointIteration(max_iter=300, tol=1e-9, compact=compact)
        z, _ = DEQ(solver, Unroll(checkpoint=checkpoint))(some, f.z0)
        forward = list(sizes)
        gradients.append(torch.autograd.grad(z, f.wanted, g))
    assert min(forward) < 6
    assert (
        min(sizes[len(forward) :], default=6) < 6
    ) == checkpoint  # the steps of the few are made again, too
    assert error(gradients[1], gradients[0]) < 1e-12


@pytest.mark.parametrize("method", [Unroll(), Unroll(last=40), Unroll(checkpoint=True)])
@pytest.mark.parametrize("batch_dims", [0, 1])
def test_nested_states_frozen_parameters_two_calls_and_two_backward_passes(batch_dims, method):
    f = TanhMap.make(n=6, batch=3, gain=0.5)
    f.w.requires_grad_(False)
    g = cotangent(f.x)
    deq = DEQ(FixedPointIteration(tol=1e-12, max_iter=200), method, batch_dims=batch_dims)

    def call():
        z, _ = deq(lambda s: tuple(f(torch.cat(s, 1)).split(3, 1)), tuple(f.z0.split(3, 1)))
        return (torch.cat(z, 1) * g).sum()

    loss = call() + call()
    want = exact_gradient(f, f.z0, 2 * g, [f.x])
    for keep in (True, False):
        assert error(torch.autograd.grad(loss, [f.x], retain_graph=keep), want) < 1e-8


def test_a_cut_graph_gives_no_tangents():
    f = TanhMap.make(n=4, batch=2)
    deq = DEQ(FixedPointIteration(tol=1e-6, max_iter=99), Unroll(last=2))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        deq(TanhMap(f.w, forward_ad.make_dual(f.x.detach(), torch.ones_like(f.x))), f.z0)


@FORMS
@KINDS
def test_a_cut_graph_ends_at_the_start(kind, checkpoint):
    """`last` = max_iter tracks all, and z0 still gets no gradient."""
    f = TanhMap.make(n=4, batch=2)
    z0 = f.z0.requires_grad_()
    z, solution = DEQ(kind(max_iter=3, tol=1e3), Unroll(last=3, checkpoint=checkpoint))(f, z0)
    assert torch.autograd.grad(z.sum(), z0, allow_unused=True) == (None,)
    assert solution.nfe == 3


def test_a_solve_that_is_not_finite_is_reported_and_keeps_a_graph():
    w = torch.ones(1, 1, dtype=F64, requires_grad=True)
    f = lambda z: torch.where(z < 2, z + w, torch.nan)  # noqa: E731
    with pytest.warns(ConvergenceWarning, match="non-finite"):
        z, solution = DEQ(FixedPointIteration(max_iter=9, tol=0.1), Unroll(last=2))(
            f, torch.zeros(1, 1, dtype=F64)
        )
    assert not solution.converged.any()
    assert z.requires_grad


def test_the_functor_takes_its_options_and_tracks_steps_from_the_solved_state():
    f = TanhMap.make(n=4, batch=2, gain=0.4)
    for options, steps in (({}, 50), ({"last": 3}, 3), ({"last": 3, "checkpoint": True}, 3)):
        functor = backward_factory("unroll", **options)
        assert functor.method == Unroll(**options)
        (z,) = functor(None, f, f.z0)
        (want,) = PhantomGrad(steps=steps).attach(f, f.z0)
        assert torch.equal(z, want)
        a, b = (torch.autograd.grad(t.sum(), f.wanted) for t in (z, want))
        assert error(a, b) < 1e-15


def test_returns_a_solution_without_a_graph():
    f = TanhMap.make(gain=0.5)
    for method in (Unroll(), Unroll(last=3), Unroll(checkpoint=True)):
        z, solution = DEQ(FixedPointIteration(tol=1e-8), method)(f, f.z0)
        assert z.requires_grad
        for tensor in (solution.z, solution.abs_residual, solution.abs_trace):
            assert not tensor.requires_grad


def test_wrong_calls_teach():
    f = TanhMap.make()
    with pytest.raises(TypeError, match=r"Unroll differentiates.*DEQ\(FixedPointIteration"):
        DEQ(Anderson(), Unroll())(f, f.z0)
    with pytest.raises(ValueError, match=r"last=9.*more than max_iter=5.*Raise max_iter"):
        DEQ(FixedPointIteration(max_iter=5), Unroll(last=9))(f, f.z0)
    for last in (0, 1.5, True):
        with pytest.raises(ValueError, match="last counts tracked evaluations"):
            Unroll(last=last)


@pytest.mark.parametrize("method", [Unroll(checkpoint=True), Unroll(last=2, checkpoint=True)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_weights_that_change_before_a_checkpointed_backward_pass_raise(method, dtype):
    """Without checkpoints autograd knows the versions of what it has saved. Unchanged, the same graph serves twice."""
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(6, 6, dtype=dtype), torch.randn(3, 6, dtype=dtype)
    deq = DEQ(FixedPointIteration(tol=1e-5, max_iter=100), method)
    z, _ = deq(lambda z: torch.tanh(0.5 * layer(z) + x), torch.zeros_like(x))
    z.sum().backward(retain_graph=True)
    with torch.no_grad():
        layer.weight.mul_(1.001)
    with pytest.raises(RuntimeError, match="another value in the backward pass.*call backward first"):
        z.sum().backward()


def test_a_fingerprint_of_many_numbers_in_half_precision_sees_a_change():
    fz = torch.randn(2, 40000, generator=torch.Generator().manual_seed(0)).half()
    kept = Fingerprint.of(fz, None)
    kept.check(fz, "f")
    with pytest.raises(RuntimeError, match="another value"):
        kept.check(2 * fz, "f")
