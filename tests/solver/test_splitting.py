"""Operator splitting on monotone maps, in float64, against solves by Newton's method and against enumeration."""

from __future__ import annotations

import itertools
import pickle
import warnings

import pytest
import torch

from tests.problems import F64, cotangent, error, exact_adjoint, random_matrix
from torchdeq import (
    DEQ,
    GMRES,
    IFT,
    AffineMap,
    ConvergenceWarning,
    Fallback,
    FixedPointIteration,
    ForwardBackward,
    MonotoneLinear,
    MonotoneMap,
    Multisecant,
    PeacemanRachford,
    Status,
    fixed_point,
    implicit_root,
)
from torchdeq.solver.prox import PROXIMAL, as_prox

BOTH = pytest.mark.parametrize("solver", [ForwardBackward(), PeacemanRachford()], ids=["FB", "PR"])
ACTIVATIONS = pytest.mark.parametrize("activation", PROXIMAL)
MODULI = pytest.mark.parametrize("m", [0.05, 0.1, 1.0])


def layer_of(n=40, m=0.1, activation="relu", gain=2.0, seed=0):
    """‖W‖ is about 4.5 at a gain of 2, and plain iteration diverges."""
    layer = MonotoneLinear(n, m=m, activation=activation, dtype=F64)
    with torch.no_grad():
        layer.A.copy_(random_matrix(n, gain / 3**0.5, seed))
        layer.B.copy_(random_matrix(n, gain / 3**0.5, seed + 1))
    return layer


def injection(n=40, batch=8, seed=5):
    return cotangent(torch.zeros(batch, n, dtype=F64), seed)


def solved_by_sides(f):
    """The fixed point of a ReLU map by trying which units are on: the one that is consistent."""
    found = []
    n = len(f.weight)
    for sides in itertools.product([0.0, 1.0], repeat=n):
        d = torch.tensor(sides, dtype=F64)
        z = torch.linalg.solve(torch.eye(n, dtype=F64) - d[:, None] * f.weight, d * f.bias[0])
        if torch.allclose(f(z[None])[0], z, atol=1e-10):
            found.append(z)
    return found


# What they find ---------------------------------------------------------------------------------------


@MODULI
@ACTIVATIONS
def test_peaceman_rachford_solves_what_plain_iteration_cannot(m, activation):
    layer, x = layer_of(m=m, activation=activation), injection()
    f = layer.map(x)
    assert torch.linalg.matrix_norm(f.weight.detach(), 2) > 3
    assert not bool(FixedPointIteration(max_iter=500)(f, torch.zeros_like(x)).converged.any())
    solution = PeacemanRachford(tol=1e-10, max_iter=2000)(f, torch.zeros_like(x))
    assert bool(solution.converged.all())
    with torch.no_grad():
        assert torch.allclose((f(solution.z) - solution.z).norm(dim=1), solution.residual, atol=1e-13)
    # Strong monotony: ‖z − z*‖ ≤ ‖r‖ (1 + L) / m for z = f(z) up to r.
    far = 10 * injection(seed=9)
    again = PeacemanRachford(tol=1e-10, max_iter=2000)(f, far)
    assert torch.allclose(again.z, solution.z, atol=1e-10 * 2 * 8 / m, rtol=0)


@pytest.mark.parametrize("m", [0.5, 1.0])
@ACTIVATIONS
def test_forward_backward_finds_the_same(m, activation):
    layer, x = layer_of(m=m, activation=activation), injection()
    f = layer.map(x)
    one = ForwardBackward(tol=1e-9, max_iter=5000)(f, torch.zeros_like(x))
    two = PeacemanRachford(tol=1e-9, max_iter=2000)(f, torch.ones_like(x))
    assert bool((one.converged & two.converged).all())
    assert torch.allclose(one.z, two.z, atol=1e-9 * 2 * 8 / m, rtol=0)


@BOTH
def test_the_solution_is_the_only_one(solver):
    f = layer_of(n=6, m=0.3).map(injection(6, 1))
    (only,) = solved_by_sides(f)
    solution = solver.replace(tol=1e-11, max_iter=20000)(f, torch.zeros(1, 6, dtype=F64))
    assert torch.allclose(solution.z[0], only, atol=1e-8)


@pytest.mark.parametrize("alpha", [0.05, 0.3, 3.0])
def test_any_step_length_will_do_for_peaceman_rachford(alpha):
    f = layer_of(m=1.0).map(injection())
    start = torch.zeros(8, 40, dtype=F64)
    solution = PeacemanRachford(alpha=alpha, tol=1e-9, max_iter=5000)(f, start)
    assert bool(solution.converged.all())


def test_the_iterates_are_those_of_the_paper():
    """Algorithm 2 with its two variables, whose z^{k+1/2} are our iterates."""
    f, alpha = layer_of(n=12).map(injection(12, 3)), 0.7
    eye = torch.eye(12, dtype=F64)
    with torch.no_grad():
        inverse = torch.linalg.inv(eye + alpha * (eye - f.weight))
        s = cotangent(f.bias, 3)
        first = (s + alpha * f.bias) @ inverse.mT
        z, iterates = first, []
        for _ in range(5):
            u = 2 * z - s
            s = 2 * f.prox(u, alpha) - u
            z = (s + alpha * f.bias) @ inverse.mT
            iterates.append(z)
        final = PeacemanRachford(alpha=alpha, max_iter=11, tol=0, return_final=True)(f, first)
    assert torch.allclose(final.z, iterates[4], atol=1e-12)
    assert final.nfe == 11


def test_forward_backward_at_step_one_is_plain_iteration():
    f = layer_of(gain=0.5, m=1.0).map(injection())
    start = torch.zeros(8, 40, dtype=F64)
    ours = ForwardBackward(alpha=1, tol=1e-10, max_iter=200)(f, start)
    plain = FixedPointIteration(tol=1e-10, max_iter=200)(f, start)
    assert ours.nfe == plain.nfe
    assert torch.allclose(ours.z, plain.z, atol=1e-14)


@MODULI
def test_the_rate_is_the_one_that_is_promised(m):
    """For σ = identity both are linear iterations whose contraction factor is at most the bound."""
    f = MonotoneMap(layer_of(m=m).weight.detach(), injection(batch=1), m, lambda y, alpha: y)
    large = torch.linalg.matrix_norm(torch.eye(40, dtype=F64) - f.weight, 2)
    exact = torch.linalg.solve(torch.eye(40, dtype=F64) - f.weight, f.bias.mT).mT
    for solver, bound in (
        (ForwardBackward(alpha=float(m / large**2)), (1 - m**2 / large**2).sqrt()),
        (PeacemanRachford(alpha=float(1 / large)), ((large - m) / (large + m)).sqrt()),
    ):
        ends = [
            solver.replace(max_iter=k, tol=0, return_final=True)(f, torch.zeros(1, 40, dtype=F64)).z
            for k in (81, 161)
        ]
        # The error in the norm of I + αF falls by the bound at each step; so over many steps the two norms matter not.
        steps = 80 if isinstance(solver, ForwardBackward) else 40
        before, after = ((z - exact).norm() for z in ends)
        assert after <= 4 * bound**steps * before


# The loop ---------------------------------------------------------------------------------------------


@BOTH
def test_a_sample_does_not_depend_on_its_neighbours_and_rests_when_it_is_done(solver):
    layer, x = layer_of(m=1.0), injection() * torch.tensor([1e-3, 1, 1, 1, 1, 1, 1, 1e3], dtype=F64)[:, None]
    solver = solver.replace(tol=1e-9, max_iter=5000)
    whole = solver(layer.map(x), torch.zeros_like(x))
    assert bool(whole.converged.all())
    assert int(whole.nstep.min()) < int(whole.nstep.max())
    for i in range(8):
        alone = solver(layer.map(x[i : i + 1]), torch.zeros(1, 40, dtype=F64))
        assert torch.allclose(alone.z[0], whole.z[i], atol=1e-12 * float(1 + alone.z.norm()))
        assert abs(int(alone.nstep[0]) - int(whole.nstep[i])) <= 2


@BOTH
def test_samples_that_are_done_can_be_left_out(solver):
    layer, x = layer_of(m=1.0), injection() * torch.tensor([1e-3] * 6 + [1, 1e3], dtype=F64)[:, None]
    solver = solver.replace(tol=1e-9, max_iter=5000)
    whole = solver(layer.map(x), torch.zeros_like(x))
    few = solver.replace(compact=True)(layer.map(x), torch.zeros_like(x))
    assert bool(few.converged.all())
    assert torch.allclose(few.z, whole.z, atol=1e-9)
    shared = MonotoneMap(layer.weight, injection(batch=1)[0], 1.0)
    start = x.clone()
    assert bool(solver.replace(compact=True)(shared, start).converged.all())


def test_evaluations_are_counted():
    """Products with W and with V, each as one."""
    products = []

    class Counting(MonotoneMap):
        def before(self, z, rows=None):
            products.append(len(z))
            return super().before(z, rows)

    f = layer_of(m=1.0).map(injection(batch=1))
    f = Counting(f.weight, f.bias, f.m)
    start = torch.zeros(1, 40, dtype=F64)
    for limit in (1, 2, 3, 8, 200):
        products.clear()
        solution = PeacemanRachford(tol=1e-6, max_iter=limit)(f, start)
        # Between two evaluations of f there is one product with V; after the last none. An even limit leaves one more.
        even = limit % 2 == 0 and solution.nfe == limit
        assert solution.nfe == min(2 * len(products) - 1 - even, limit)
        products.clear()
        solution = ForwardBackward(tol=1e-6, max_iter=limit)(f, start)
        assert solution.nfe == len(products)


@BOTH
def test_a_state_of_tokens_and_one_that_is_one_system(solver):
    layer = layer_of(n=10, m=1.0)
    x = injection(10, 6).reshape(2, 3, 10)
    solver = solver.replace(tol=1e-10, max_iter=5000)
    flat = solver(layer.map(x.reshape(6, 10)), torch.zeros(6, 10, dtype=F64)).z.reshape(2, 3, 10)
    for depth in (0, 1, 2):
        solution = solver(layer.map(x), torch.zeros_like(x), batch_dims=depth)
        assert bool(solution.converged.all())
        assert torch.allclose(solution.z, flat, atol=1e-8)


@BOTH
def test_a_sample_that_is_not_finite_ends_alone(solver):
    x = injection()
    x[3, 2] = torch.nan
    solution = solver.replace(tol=1e-8, max_iter=5000)(layer_of(m=1.0).map(x), torch.zeros_like(x))
    assert int(solution.status[3]) == Status.NON_FINITE
    assert int(solution.converged.sum()) == 7


@BOTH
def test_float32_and_half_precision_reach_what_their_rounding_allows(solver):
    layer, x = layer_of(m=1.0), injection()
    exact = PeacemanRachford(tol=1e-11, max_iter=2000)(layer.map(x), torch.zeros_like(x)).z
    for dtype, tol in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        f = layer.to(dtype).map(x.to(dtype))
        solution = solver.replace(tol=tol, stop_mode="rel", max_iter=2000)(
            f, torch.zeros_like(x, dtype=dtype)
        )
        assert bool(solution.converged.all())
        assert solution.z.dtype == dtype
        # The condition is (1 + L) / m = 8.
        assert error([solution.z.double()], [exact]) < 20 * tol
        layer = layer_of(m=1.0)


def test_autocast_does_not_reach_w_or_the_steps():
    layer, x = layer_of(m=1.0).float(), injection().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        f = layer.map(x)
        assert f.weight.dtype == torch.float32
        solution = PeacemanRachford(tol=2e-2, stop_mode="rel", max_iter=200)(f, torch.zeros_like(x))
    assert bool(solution.converged.all())
    assert f.modulus() > 0.999


def test_they_work_in_a_chain_and_pickle_and_print():
    f = layer_of().map(injection())
    chain = Fallback(FixedPointIteration(max_iter=5, tol=1e-8), PeacemanRachford(max_iter=2000))
    assert bool(chain(f, torch.zeros(8, 40, dtype=F64)).converged.all())
    solver = PeacemanRachford(alpha=0.5, tol=1e-5)
    assert pickle.loads(pickle.dumps(solver)) == solver
    assert repr(solver) == "PeacemanRachford(tol=1e-05, alpha=0.5)"
    assert repr(f) == "MonotoneMap(n=40, m=0.1, activation='relu')"
    again = pickle.loads(pickle.dumps(MonotoneMap(f.weight.detach(), f.bias, f.m)))
    assert torch.equal(again(f.bias), f(f.bias))


# Derivatives ------------------------------------------------------------------------------------------


@MODULI
@pytest.mark.parametrize("hook", [False, True], ids=["function", "hook"])
def test_the_gradient_is_the_dense_one(m, hook):
    layer, x = layer_of(n=20, m=m), injection(20, 4).requires_grad_()
    wanted = (layer.A, layer.B, x)
    g = cotangent(x.detach())
    deq = DEQ(
        PeacemanRachford(tol=1e-12, max_iter=3000), IFT(solver=GMRES(tol=1e-12, max_iter=100), hook=hook)
    )
    z, solution = deq(layer.map(x), torch.zeros_like(x))
    got = torch.autograd.grad(z, wanted, g)
    f = layer.map(x)
    want = torch.autograd.grad(f(solution.z), wanted, exact_adjoint(f, solution.z, g))
    # The residual of the adjoint is 1e-12, and the condition (1 + L) / m.
    assert error(got, want) < 1e-9


@BOTH
@ACTIVATIONS
@pytest.mark.parametrize("hook", [False, True], ids=["function", "hook"])
def test_the_adjoint_by_splitting_is_the_dense_one(solver, activation, hook):
    layer, x = layer_of(n=20, m=1.0, activation=activation), injection(20, 4).requires_grad_()
    wanted = (layer.A, layer.B, x)
    g = cotangent(x.detach()) * torch.tensor([1e-6, 0, 1, 1e6], dtype=F64)[:, None]
    seen = []
    deq = DEQ(
        PeacemanRachford(tol=1e-12, max_iter=3000),
        IFT(solver=solver.replace(tol=1e-11, max_iter=5000), hook=hook),
        on_backward=seen.append,
    )
    z, solution = deq(layer.map(x), torch.zeros_like(x))
    got = torch.autograd.grad(z, wanted, g)
    f = layer.map(x)
    want = torch.autograd.grad(f(solution.z), wanted, exact_adjoint(f, solution.z, g))
    assert error(got, want) < 1e-9
    assert bool(seen[0].converged.all())
    assert bool((seen[0].abs_residual <= 1e-11).all())
    assert seen[0].nfe > 10


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_the_adjoint_by_splitting_of_tokens_and_of_half_precision(depth):
    layer, x = layer_of(n=10, m=1.0), injection(10, 6).reshape(2, 3, 10)
    solver, adjoint = PeacemanRachford(tol=1e-12, max_iter=3000), PeacemanRachford(tol=1e-10, max_iter=3000)

    def gradient(dtype, solver, adjoint):
        at = x.to(dtype).requires_grad_()
        z, _ = DEQ(solver, IFT(solver=adjoint), batch_dims=depth)(
            layer.to(dtype).map(at), torch.zeros_like(x, dtype=dtype)
        )
        return torch.autograd.grad(z, at, cotangent(x).to(dtype))[0].double()

    exact = gradient(F64, solver, GMRES(tol=1e-12, max_iter=200))
    assert error([gradient(F64, solver, adjoint)], [exact]) < 1e-8
    rough = [s.replace(tol=2e-2, stop_mode="rel") for s in (solver, adjoint)]
    # The condition is (1 + L) / m = 8.
    assert error([gradient(torch.bfloat16, *rough)], [exact]) < 20 * 2e-2


@pytest.mark.parametrize("hook", [False, True], ids=["function", "hook"])
def test_under_autocast_the_slopes_are_those_of_the_f_that_is_differentiated(hook):
    """Rounding to bfloat16 puts units on the other side of a kink than float32 does: σ′ must not be taken from that."""
    seen = []
    adjoint = PeacemanRachford(tol=2e-2, max_iter=300)
    deq = DEQ(adjoint.replace(stop_mode="rel"), IFT(solver=adjoint, hook=hook), on_backward=seen.append)
    for seed in range(4):
        layer = layer_of(n=64, m=0.5, gain=1.0, seed=seed).float()
        x = injection(64, 64, seed + 7).float().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z, _ = deq(layer.map(x), torch.zeros_like(x))
        (z * cotangent(z.detach(), seed + 9)).sum().backward()
    assert all(bool(solution.converged.all()) for solution in seen)


def test_a_tolerance_below_rounding_ends_the_solve_of_an_adjoint_and_of_a_state():
    """W z is rounded to ε L beside z. Stopped for that, a solve is as good as one that goes on."""
    layer, x = layer_of(n=40, m=0.1, gain=1.0).float(), injection(40, 16).float().requires_grad_()
    with torch.no_grad():
        layer.A.mul_(40)
        layer.B.mul_(40)
    ends = {}
    for patience in (10, 0):
        solver = PeacemanRachford(tol=1e-6, max_iter=3000, patience=patience)
        seen = []
        deq = DEQ(solver.replace(stop_mode="rel"), IFT(solver=solver), on_backward=seen.append)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            z, forward = deq(layer.map(x), torch.zeros_like(x))
            z.square().sum().backward()
        ends[patience] = forward, seen[0]
    for stopped, other in zip(ends[10], ends[0], strict=True):
        assert not bool(stopped.converged.any())
        assert bool((stopped.status == Status.STALLED).all())
        assert stopped.nfe < 1500 < 3000 <= other.nfe
        # Both are at the level of rounding, some 0.2 ε L relative to the state; the longer one has had more chances.
        assert bool((stopped.residual < 6 * other.residual).all())


def test_the_traces_of_an_adjoint_are_bounds_of_its_residual():
    layer, x = layer_of(n=20, m=1.0), injection(20, 4).requires_grad_()
    found = []
    for limit in (11, 21, 41, 3000):
        seen = []
        solver = PeacemanRachford(tol=1e-9, max_iter=limit)
        deq = DEQ(PeacemanRachford(tol=1e-12, max_iter=3000), IFT(solver=solver), on_backward=seen.append)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            deq(layer.map(x), torch.zeros_like(x))[0].sum().backward()
        found.append(seen[0])
        assert bool((seen[0].abs_residual <= seen[0].abs_trace.amin(dim=0)).all())
    assert bool((found[0].abs_residual > found[-1].abs_residual).all())


def test_tangents_and_orders_by_splitting():
    """The tangent's system has J and not its transpose; second derivatives need both."""
    layer, x = layer_of(n=6, m=1.0), injection(6, 3)
    adjoint = PeacemanRachford(tol=1e-12, max_iter=3000)
    deq = DEQ(PeacemanRachford(tol=1e-12, max_iter=3000), IFT(solver=adjoint, order=2))
    direction = cotangent(x, 2)
    with torch.autograd.forward_ad.dual_level():
        moved = torch.autograd.forward_ad.make_dual(x, direction)
        z, solution = deq(layer.map(moved), torch.zeros_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(z).tangent
    jacobian = (layer.map(x).before(solution.z) > 0)[:, :, None] * layer.weight
    right = ((layer.map(x).before(solution.z) > 0) * direction)[:, :, None]
    exact = torch.linalg.solve(torch.eye(6, dtype=F64) - jacobian, right)[:, :, 0]
    assert torch.allclose(tangent, exact, atol=1e-9)

    x.requires_grad_()
    solve = lambda x: deq(layer.map(x), torch.zeros_like(x))[0].square()  # noqa: E731
    assert torch.autograd.gradgradcheck(solve, x, atol=1e-5)


def test_what_is_inverted_in_the_forward_solve_serves_the_backward_one(monkeypatch):
    calls = []
    inverse = torch.linalg.inv
    monkeypatch.setattr(torch.linalg, "inv", lambda a: calls.append(a) or inverse(a))
    layer, x = layer_of(m=1.0), injection().requires_grad_()
    f = layer.map(x)
    deq = DEQ(PeacemanRachford(tol=1e-8, max_iter=500), IFT(solver=PeacemanRachford(max_iter=500)))
    deq(f, torch.zeros_like(x))[0].sum().backward()
    assert len(calls) == 1
    # A map of weights that were changed in place is another.
    f = MonotoneMap(f.weight.detach().clone(), f.bias, 1.0)
    deq(f, torch.zeros_like(x))
    f.weight.mul_(0.5)
    again = deq(f, torch.zeros_like(x))[1]
    assert len(calls) == 3
    assert bool(again.converged.all())


def writes():
    """Ways in which weights change without a version that counts it, and one that does."""
    return {
        "in place": lambda w: w.mul_(20),
        "data": lambda w: w.data.mul_(20),
        "set": lambda w: setattr(w, "data", 20 * w),
    }


@BOTH
@pytest.mark.parametrize("write", list(writes()))
@pytest.mark.parametrize("inference", [False, True], ids=["grad", "inference"])
def test_what_is_kept_of_w_is_not_used_after_w_has_changed(solver, write, inference):
    with torch.inference_mode(inference):
        f = MonotoneMap(0.02 * layer_of(m=1.0).weight.detach(), injection(), 0.9)
        solver = solver.replace(tol=1e-9, max_iter=20000)
        solver(f, torch.zeros_like(f.bias))
        before = f.lipschitz().clone()
        writes()[write](f.weight)
        fresh = MonotoneMap(f.weight.clone(), f.bias, 0.9)
        now, want = (solver(g, torch.zeros_like(f.bias)) for g in (f, fresh))
        assert float(fresh.lipschitz()) > 1.1 * float(before)
        assert torch.equal(f.lipschitz(), fresh.lipschitz())
        assert now.nfe == want.nfe
        assert torch.equal(now.z, want.z)


def test_what_a_fused_optimiser_writes_is_seen():
    weight = torch.nn.Parameter(-torch.eye(40))
    f = MonotoneMap(weight, injection().float(), 0.5)
    optimiser = torch.optim.Adam([weight], lr=0.1, fused=True)
    deq = DEQ(PeacemanRachford(tol=1e-4, max_iter=400), IFT(solver=PeacemanRachford(max_iter=400)))
    for _ in range(2):
        z, solution = deq(f, torch.zeros_like(f.bias))
        want = PeacemanRachford(tol=1e-4, max_iter=400)(
            MonotoneMap(weight.detach().clone(), f.bias, 0.5), torch.zeros_like(f.bias)
        )
        assert solution.nfe == want.nfe
        assert torch.equal(solution.z, want.z)
        z.square().sum().backward()
        optimiser.step()


def test_an_adjoint_sees_new_weights_though_no_splitting_solved_the_map(monkeypatch):
    weight = layer_of(m=1.0).weight.detach()
    f = MonotoneMap(weight, injection().requires_grad_(), 1.0)
    seen, inverted = [], []
    inverse = torch.linalg.inv
    monkeypatch.setattr(torch.linalg, "inv", lambda a: inverted.append(a) or inverse(a))
    adjoint = IFT(solver=PeacemanRachford(tol=1e-9, max_iter=2000))
    deq = DEQ(PeacemanRachford(tol=1e-9, max_iter=2000), adjoint, on_backward=seen.append)
    first, second = (deq(f, start)[0] for start in (torch.zeros_like(f.bias), torch.ones_like(f.bias)))
    (first.square().sum() + second.square().sum()).backward()
    assert len(inverted) == 1  # two solves of one map and their two backward passes
    weight.data.copy_(weight.mT.clone())  # as monotone as before, and of the same norm
    deq.solver, _ = Multisecant(tol=1e-9, max_iter=1000), inverted.clear()
    deq(f, torch.zeros_like(f.bias))[0].square().sum().backward()
    step = 2 / f.lipschitz()
    eye = torch.eye(40, dtype=F64)
    assert torch.allclose(inverted[-1], eye + step * (eye - weight.mT), atol=1e-12)
    assert all(bool(solution.converged.all()) for solution in seen)


def test_second_derivatives():
    layer, x = layer_of(n=3, m=1.0, activation="leaky_relu"), injection(3, 1).requires_grad_()
    deq = DEQ(PeacemanRachford(tol=1e-13, max_iter=500), IFT(solver=GMRES(tol=1e-13), order=2))

    def solve(a, b, x):
        weight = torch.func.functional_call(layer, {"A": a, "B": b}, torch.eye(3, dtype=F64)).mT
        return deq(MonotoneMap(weight, x, 1.0, "leaky_relu"), torch.zeros_like(x))[0].square()

    inputs = tuple(t.detach().requires_grad_() for t in (layer.A, layer.B, x))
    assert torch.autograd.gradcheck(solve, inputs, atol=1e-6)
    assert torch.autograd.gradgradcheck(solve, inputs, atol=1e-5)


def test_held_noise_and_shared_weights_do_not_hide_the_map():
    f = layer_of(m=1.0).map(injection())
    z, solution = DEQ(PeacemanRachford(tol=1e-8, max_iter=500), hold_noise=True)(
        f, torch.zeros(8, 40, dtype=F64)
    )
    assert bool(solution.converged.all())
    with torch.nn.utils.parametrize.cached():
        z, solution = DEQ(PeacemanRachford(tol=1e-8, max_iter=500))(f, torch.zeros(8, 40, dtype=F64))
    assert bool(solution.converged.all())


# The map and the layer --------------------------------------------------------------------------------


@ACTIVATIONS
@pytest.mark.parametrize("alpha", [0.1, 1.0, 7.0])
def test_an_activation_is_the_proximal_operator_of_a_multiple(activation, alpha):
    """prox_αφ from σ = prox_φ alone: y − z ∈ α ∂φ(z) and ∂φ = σ⁻¹ − 1 give σ(z + (y − z)/α) = z."""
    prox = as_prox(activation)
    y = torch.linspace(-4, 4, 81, dtype=F64)
    z = prox(y, alpha)
    assert torch.allclose(prox(z + (y - z) / alpha, 1.0), z, atol=1e-12)


def test_at_one_they_are_the_activations_of_torch():
    y = torch.linspace(-3, 3, 41, dtype=F64)
    for name, module in (
        ("relu", torch.nn.ReLU()),
        ("leaky_relu", torch.nn.LeakyReLU()),
        ("hardtanh", torch.nn.Hardtanh()),
    ):
        assert torch.allclose(as_prox(name)(y, 1.0), module(y), atol=1e-15)


def test_an_activation_of_your_own():
    """The soft threshold, σ = prox of |z|/2."""
    shrink = lambda y, alpha: y.sign() * (y.abs() - alpha / 2).clamp_min(0)  # noqa: E731
    f = layer_of(m=1.0, activation=shrink).map(injection())
    solution = PeacemanRachford(tol=1e-10, max_iter=2000)(f, torch.zeros(8, 40, dtype=F64))
    assert bool(solution.converged.all())
    with torch.no_grad():
        y = solution.z @ f.weight.mT + f.bias
        assert torch.allclose(torch.nn.functional.softshrink(y), solution.z, atol=1e-9)


@MODULI
def test_w_is_monotone_by_construction_and_stays_so_in_training(m):
    torch.manual_seed(0)
    layer = MonotoneLinear(16, m=m, dtype=F64)
    deq = DEQ(PeacemanRachford(tol=1e-6, max_iter=2000), IFT())
    x, target = injection(16, 8), cotangent(torch.zeros(8, 16, dtype=F64), 3)
    losses = []
    for _ in range(10):
        w = layer.weight.detach()
        smallest = torch.linalg.eigvalsh(torch.eye(16, dtype=F64) - (w + w.mT) / 2)[0]
        assert smallest >= m - 1e-12
        assert layer.map(x).modulus() == pytest.approx(float(smallest))
        z, solution = deq(layer.map(x), torch.zeros_like(x))
        assert bool(solution.converged.all())
        loss = (z - target).square().mean()
        gradient = torch.autograd.grad(loss, (layer.A, layer.B))
        with torch.no_grad():
            for parameter, slope in zip((layer.A, layer.B), gradient, strict=True):
                parameter -= 0.05 * slope
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_any_monotone_w_has_this_form():
    """The other direction of proposition 1: A a root of the symmetric part, B half of the skew one."""
    s = random_matrix(6, 1.0, 4)
    w = random_matrix(6, 2.0, 3)
    w = w - (torch.linalg.eigvalsh((w + w.mT) / 2)[-1] - 0.8) * torch.eye(6, dtype=F64)
    layer = MonotoneLinear(6, m=0.2, dtype=F64)
    symmetric = torch.eye(6, dtype=F64) * 0.8 - (w + w.mT) / 2
    values, vectors = torch.linalg.eigh(symmetric)
    with torch.no_grad():
        layer.A.copy_(values.clamp_min(0).sqrt()[:, None] * vectors.mT)
        layer.B.copy_((w - w.mT) / 4)
    assert torch.allclose(layer.weight, w, atol=1e-12)
    assert torch.allclose(layer(s), s @ w.mT, atol=1e-11)


@pytest.mark.parametrize("n", [1, 2, 40, 200])
def test_the_norm_is_found_from_below_within_a_tenth(n):
    for seed in range(3):
        f = layer_of(n=n, seed=seed).map(injection(n, 1))
        exact = torch.linalg.matrix_norm(torch.eye(n, dtype=F64) - f.weight.detach(), 2)
        assert 0.9 * exact <= f.lipschitz() <= exact * (1 + 1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_the_norm_is_found_where_its_square_is_no_number_of_float32(scale):
    a = random_matrix(20, 1.0, 3)
    f = MonotoneMap((torch.eye(20) - scale * a.float()), torch.zeros(1, 20), 1.0)
    i_w = torch.eye(20, dtype=F64) - f.weight.double()
    exact = float(torch.linalg.matrix_norm(i_w, 2))
    assert float(f.lipschitz()) == pytest.approx(exact, rel=0.1, abs=0)


# Errors -----------------------------------------------------------------------------------------------


@BOTH
def test_another_f_is_refused(solver):
    z0 = torch.zeros(2, 3, dtype=F64)
    for call in (
        lambda: solver(torch.tanh, z0),
        lambda: DEQ(solver)(torch.tanh, z0),
        lambda: solver(AffineMap(lambda u: 0.5 * u, torch.ones_like(z0)), z0),
        lambda: Fallback(FixedPointIteration(tol=1e-9, max_iter=2), solver)(torch.cos, z0),
    ):
        with pytest.raises(TypeError, match=r"no MonotoneMap.*MonotoneLinear"):
            call()


@BOTH
def test_as_an_adjoint_solver_they_need_a_monotone_map_too(solver):
    x = injection()
    with pytest.raises(TypeError, match=r"no MonotoneMap.*GMRES\(\)"):
        DEQ(FixedPointIteration(), IFT(solver=solver))(
            lambda z: 0.1 * torch.tanh(z) + x, torch.zeros_like(x).requires_grad_()
        )


@BOTH
def test_a_splitting_in_a_chain_is_refused_as_an_adjoint_where_it_is_given(solver):
    for chain in (Fallback(GMRES(), solver), Fallback(FixedPointIteration(), Fallback(GMRES(), solver))):
        with pytest.raises(ValueError, match=r"has a splitting in a chain.*given by itself"):
            IFT(solver=chain)
    assert IFT(solver=Fallback(GMRES(), FixedPointIteration())).solver.solvers[0] == GMRES()


@BOTH
def test_a_splitting_is_refused_as_the_adjoint_solver_of_a_pure_function(solver):
    for adjoint in (solver, Fallback(GMRES(), solver)):
        with pytest.raises(TypeError, match=r"adjoint=.*does not find in a pure function's"):
            fixed_point(lambda z: 0.5 * z, torch.ones(2, dtype=F64), adjoint=adjoint)
        with pytest.raises(TypeError, match=r"adjoint=.*does not find in a pure function's"):
            implicit_root(lambda z: 0.5 * z, torch.ones(2, dtype=F64), adjoint=adjoint)


@BOTH
@pytest.mark.parametrize("alpha", [None, 0.5])
def test_w_of_one_is_said_to_be_no_monotone_map(solver, alpha):
    f = MonotoneMap(torch.eye(3, dtype=F64), torch.ones(2, 3, dtype=F64), 0.5)
    assert float(f.lipschitz()) == 0
    with pytest.raises(ValueError, match=r"W = I in torch.float64, so no m above 0 is right"):
        solver.replace(alpha=alpha)(f, torch.zeros(2, 3, dtype=F64))


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="tanh is the proximal operator of a φ"):
        MonotoneLinear(4, activation="tanh")
    with pytest.raises(ValueError, match="Did you mean 'relu'"):
        MonotoneLinear(4, activation="rellu")
    with pytest.raises(TypeError, match="function of y and"):
        MonotoneLinear(4, activation=torch.nn.ReLU())
    for m in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="m must be above 0"):
            MonotoneLinear(4, m=m)
    with pytest.raises(ValueError, match=r"W must be \(n, n\)"):
        MonotoneMap(torch.zeros(2, 3), torch.zeros(1, 2), 1.0)
    with pytest.raises(ValueError, match="with n=2"):
        MonotoneMap(torch.zeros(2, 2), torch.zeros(1, 3), 1.0)
    for m in (0.0, float("inf")):
        with pytest.raises(ValueError, match="above 0, and finite"):
            MonotoneMap(torch.zeros(2, 2), torch.zeros(1, 2), m)
    with pytest.raises(ValueError, match="n of at least 1"):
        MonotoneMap(torch.zeros(0, 0), torch.zeros(1, 0), 1.0)
    with pytest.raises(ValueError, match="n of at least 1"):
        MonotoneLinear(0)
    for w, c in (
        (torch.complex64, torch.float32),
        (torch.float32, torch.complex64),
        (torch.int64, torch.float32),
    ):
        with pytest.raises(TypeError, match="real floating-point numbers"):
            MonotoneMap(torch.zeros(2, 2, dtype=w), torch.zeros(1, 2, dtype=c), 1.0)
    for alpha in (0, -1.0, "1", True, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="step length"):
            PeacemanRachford(alpha=alpha)


@pytest.mark.parametrize(
    ("activation", "kind", "text"),
    [
        (torch.nn.functional.softplus, ValueError, "to the same p"),  # whose second argument is another
        (
            lambda y, alpha: torch.tanh(y),
            ValueError,
            "a function of y alone will do only if it is a projection",
        ),
        (lambda y, alpha: torch.nn.functional.leaky_relu(y), ValueError, "to the same p"),
        (lambda y, alpha: y - y.clamp(-0.1, 0.1), ValueError, "to the same p"),
        (lambda y, alpha: 1.5 * y, ValueError, "not nondecreasing and nonexpansive"),
        (lambda y, alpha: -y, ValueError, "not nondecreasing and nonexpansive"),
        (lambda y, alpha: torch.softmax(y, -1), ValueError, "not elementwise"),
        (lambda y, alpha: y - y.mean(0), ValueError, "not elementwise"),
        (lambda y, alpha: y[..., :1], ValueError, r"makes \(13, 1\); expected the same shape"),
        (lambda y, alpha: None, ValueError, "makes NoneType"),
        (lambda y, alpha: y.relu_(), ValueError, "in place"),
        (lambda y, alpha: y * float("nan"), ValueError, "not elementwise"),
        (torch.nn.functional.gelu, TypeError, "it raises TypeError"),
        (torch.tanh, TypeError, "it raises TypeError"),
        (lambda y: y, TypeError, "it raises TypeError"),
    ],
    ids=[
        "softplus",
        "tanh",
        "leaky",
        "soft",
        "steep",
        "minus",
        "softmax",
        "mean",
        "shape",
        "none",
        "inplace",
        "nan",
        "gelu",
        "torch.tanh",
        "one",
    ],
)
def test_an_activation_that_is_no_proximal_operator_is_refused_where_it_is_given(activation, kind, text):
    for make in (
        lambda: MonotoneLinear(4, activation=activation),
        lambda: MonotoneMap(torch.zeros(4, 4), torch.zeros(1, 4), 1.0, activation),
    ):
        with pytest.raises(kind, match=text) as caught:
            make()
        assert "lambda y, alpha: y - y.clamp" in str(caught.value)


def shrink(y, alpha):
    """φ(z) = 0.1 |z|."""
    return y - y.clamp(-0.1 * alpha, 0.1 * alpha)


class Slopes(torch.nn.Module):
    """As `shrink`, by a weight for each unit."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(0.1, 0.4, 40, dtype=F64))

    def prox(self, y, alpha):
        return y - y.clamp(-self.weight * alpha, self.weight * alpha)


def by_token_and_unit(y, alpha):
    """A threshold for each token and unit of a state (B, 3, n)."""
    size = torch.linspace(0.0, 0.5, 3 * y.shape[-1], dtype=y.dtype).reshape(3, -1)
    size = size[0] if y.dim() == 2 else size
    return y - y.clamp(-size * alpha, size * alpha)


@BOTH
@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("which", ["unit", "token"])
def test_an_activation_of_your_own_sees_the_shape_of_the_state(solver, depth, which):
    activation = Slopes().prox if which == "unit" else by_token_and_unit
    layer, x = layer_of(m=1.0, activation=activation), injection(40, 6).reshape(2, 3, 40).requires_grad_()
    solver = solver.replace(tol=1e-11, max_iter=5000)
    z, solution = DEQ(solver, IFT(solver=solver), batch_dims=depth)(layer.map(x), torch.zeros_like(x))
    assert bool(solution.converged.all())
    with torch.no_grad():
        assert torch.allclose(layer.map(x)(z), z, atol=1e-9)
    g = cotangent(z.detach())
    got = torch.autograd.grad(z, x, g)
    exact, _ = DEQ(solver, IFT(solver=GMRES(tol=1e-12, max_iter=500)), batch_dims=depth)(
        layer.map(x), torch.zeros_like(x)
    )
    assert error(got, torch.autograd.grad(exact, x, g)) < 1e-8


class Unhashable:
    __hash__ = None

    def __call__(self, y, alpha):
        return shrink(y, alpha)


def logarithmic(y, alpha):
    """φ(z) = −log z, whose p is the root of p − y = α / p."""
    return (y + (y * y + 4 * alpha).sqrt()) / 2


@pytest.mark.parametrize(
    "activation",
    [shrink, Slopes().prox, Unhashable(), logarithmic, lambda y, alpha: y, lambda y, alpha: y / (1 + alpha)],
    ids=["soft", "parameters", "unhashable", "log", "identity", "ridge"],
)
def test_an_activation_that_is_one_is_taken_and_both_splittings_agree_on_it(activation):
    layer, x = layer_of(m=1.0, activation=activation), injection()
    f = layer.map(x)
    one = ForwardBackward(tol=1e-9, max_iter=5000)(f, torch.zeros_like(x))
    two = PeacemanRachford(tol=1e-9, max_iter=2000)(f, torch.ones_like(x))
    assert bool((one.converged & two.converged).all())
    assert torch.allclose(one.z, two.z, atol=1e-7)


def test_a_function_is_checked_once():
    calls = []

    def counted(y, alpha):
        calls.append(1)
        return shrink(y, alpha)

    layer = MonotoneLinear(4, activation=counted)
    tried = len(calls)
    assert tried > 0
    layer.map(torch.zeros(2, 4))
    assert len(calls) == tried


@pytest.mark.parametrize("solver", [ForwardBackward(), PeacemanRachford(), FixedPointIteration()])
def test_a_state_that_does_not_fit_the_map_is_refused_at_the_door(solver):
    f = layer_of(n=4).map(injection(4, 3))
    for shape in ((3, 5), (2, 5), (5,), (2, 4), (1, 4), (4,)):
        with pytest.raises(ValueError, match=r"the map takes \(B, …, 4\) and adds c of the shape \(3, 4\)"):
            DEQ(solver)(f, torch.zeros(*shape, dtype=F64))
    one = layer_of(n=4).map(injection(4, 1))  # a c for all samples
    assert solver(one, torch.zeros(2, 3, 4, dtype=F64)).z.shape == (2, 3, 4)


@BOTH
def test_a_state_of_several_tensors_is_refused_at_the_door(solver):
    f = layer_of(n=4).map(injection(4, 3))
    with pytest.raises(ValueError, match="the state has 2 tensors, and the map takes one"):
        DEQ(solver)(f, (torch.zeros(3, 4, dtype=F64), torch.zeros(3, 4, dtype=F64)))


def test_what_follows_the_size_of_a_monotone_layer_is_given_by_name():
    with pytest.raises(TypeError, match="positional"):
        MonotoneLinear(4, 4)
