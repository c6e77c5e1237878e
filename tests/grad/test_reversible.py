"""Reversible iteration against back-propagation through the same steps, written out."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from tests.problems import F64, TanhMap, cotangent, error, exact_gradient, solve_exactly
from torchdeq import DEQ, Anderson, FixedPointIteration, Reversible, SimpleFixedPointIteration, Status, Unroll
from torchdeq.grad.reversible import Tape

pytestmark = pytest.mark.filterwarnings("ignore::torchdeq.ConvergenceWarning")  # budgets are fixed here


def program(f, z0, steps, beta=0.5):
    """f(z_N) of the coupled iteration, with its graph."""
    y = z = z0
    for _ in range(steps):
        y = (1 - beta) * y + beta * f(z)
        z = (1 - beta) * z + beta * f(y)
    return f(z)


def reversible(steps, **options):
    """As many steps, whatever the residual, of which nobody is to be warned."""
    n = 2 * steps + 1
    return DEQ(FixedPointIteration(max_iter=n, min_iter=n, tol=math.inf), Reversible(**options))


class Counted:
    """A map that counts its calls."""

    def __init__(self, f):
        self.f, self.calls = f, 0

    def __call__(self, z):
        self.calls += 1
        return self.f(z)


# The derivative -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.3, 0.5, 0.7])
def test_equals_autograd_through_the_steps_with_one_call_for_each_evaluation(beta):
    """The states are rebuilt to ε (1 − β)^{−16}: 5e-8 at β = 0.7, where f is a contraction that forgives much of it."""
    f = TanhMap.make()
    g, want = cotangent(f.x), program(f, f.z0, 8, beta)
    counted = Counted(f)
    z, solution = reversible(8, beta=beta)(counted, f.z0)
    assert counted.calls == solution.nfe == 17
    assert torch.allclose(z, want, rtol=0, atol=1e-15)  # the steps are rounded in another order
    got = torch.autograd.grad(z, f.wanted, g)
    assert counted.calls == 2 * 17
    assert error(got, torch.autograd.grad(want, f.wanted, g)) < (1e-12 if beta <= 0.5 else 1e-8)


def test_derivatives_of_higher_order_are_those_of_the_steps():
    f = TanhMap.make(n=4, batch=2)

    def solve(w, x):
        return reversible(3)(lambda z: torch.tanh(z @ w.T + x), torch.zeros_like(x.detach()))[0]

    assert torch.autograd.gradcheck(solve, f.wanted)
    assert torch.autograd.gradgradcheck(solve, f.wanted)


def test_an_affine_map_shows_how_far_the_steps_are_from_the_fixed_point():
    """At most γ q^N in relative norm, q = 1 − β (1 − γ), for dz/dx, here symmetric and so its own transpose."""
    a = torch.diag(torch.tensor([0.8, -0.8, 0.3], dtype=F64))
    x = torch.ones(1, 3, dtype=F64, requires_grad=True)
    g = cotangent(x)
    f = lambda z: z @ a + x  # noqa: E731
    (want,) = exact_gradient(f, torch.zeros_like(x), g, [x])
    errors = []
    for steps in (2, 8, 16):
        z, _ = reversible(steps)(f, torch.zeros(1, 3, dtype=F64))
        (got,) = torch.autograd.grad(z, x, g)
        errors.append(float((got - want).norm() / want.norm()))
        assert errors[-1] <= 0.8 * 0.9**steps
    assert errors[0] > errors[1] > errors[2] > 1e-3  # there is a bias


def test_reaches_inputs_that_are_not_leaves_and_parameters_with_hooks_as_any_module_does():
    torch.manual_seed(0)
    encoder, layer = nn.Linear(5, 8).double(), nn.Linear(8, 8).double()
    data = torch.randn(3, 5, dtype=F64)
    seen = []
    layer.weight.register_hook(lambda g: seen.append(g) or 2 * g)

    def loss(solve):
        x = encoder(data)
        return solve(lambda z: torch.tanh(0.5 * layer(z) + x), torch.zeros(3, 8, dtype=F64)).square().sum()

    parameters = [*encoder.parameters(), *layer.parameters()]
    want = torch.autograd.grad(loss(lambda f, z0: program(f, z0, 5)), parameters)
    del seen[:]
    got = torch.autograd.grad(loss(lambda f, z0: reversible(5)(f, z0)[0]), parameters)
    assert error(got, want) < 1e-12
    assert len(seen) == 1  # once, with the whole gradient
    loss(lambda f, z0: reversible(5)(f, z0)[0]).backward()
    assert error([p.grad for p in parameters], want) < 1e-12


def test_a_graph_that_is_kept_serves_again_and_two_graphs_do_not_meet():
    f = TanhMap.make()
    g = cotangent(f.x)
    deq = reversible(6)
    want = torch.autograd.grad(program(f, f.z0, 6), f.wanted, g)
    z, _ = deq(f, f.z0)
    first = torch.autograd.grad(z, f.wanted, g, retain_graph=True)
    second = torch.autograd.grad(z, f.wanted, g)
    assert error(first, want) < 1e-12
    assert error(second, want) < 1e-12
    one, other = deq(f, f.z0)[0], deq(f, f.z0)[0]
    both = torch.autograd.grad([one, other], f.wanted, [g, 2 * g])
    assert error(both, [3 * w for w in want]) < 1e-12


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_backward_pass_without_grad_mode(context):
    f = TanhMap.make()
    g = cotangent(f.x)
    want = torch.autograd.grad(program(f, f.z0, 5), f.wanted, g)
    z, _ = reversible(5)(f, f.z0)
    with context():
        z.backward(g)
    assert error([t.grad.clone() for t in f.wanted], want) < 1e-12


def test_the_start_may_come_from_inference_mode_and_be_written_to_afterwards():
    f = TanhMap.make()
    g = cotangent(f.x)
    want = torch.autograd.grad(program(f, f.z0, 5), f.wanted, g)
    with torch.inference_mode():
        start = f.z0.clone()
    z, _ = reversible(5)(f, start)
    with torch.inference_mode():
        start += 1
    assert error(torch.autograd.grad(z, f.wanted, g), want) < 1e-12


def test_evaluations_that_save_nothing_are_undone_when_others_ask_for_it():
    """f is linear from the third evaluation on, saves nothing there, and so is not called for its derivative."""
    x = torch.ones(1, 2, dtype=F64, requires_grad=True)
    turns = iter([*range(9), *range(9), *range(7, -1, -1)])  # written out; forwards; backwards

    def f(z):
        return torch.sin(z + x) if next(turns) < 2 else torch.add(x, z, alpha=0.5)

    want = torch.autograd.grad(program(f, torch.zeros(1, 2, dtype=F64), 4).sum(), x)
    z, _ = reversible(4)(f, torch.zeros(1, 2, dtype=F64))
    assert error(torch.autograd.grad(z.sum(), x), want) < 1e-12
    assert next(turns, None) is None


# Samples --------------------------------------------------------------------------------------------------


def test_samples_that_stop_early_have_the_gradient_that_they_have_alone():
    a = torch.tensor([[0.1], [0.5], [0.7]], dtype=F64)
    deq = DEQ(FixedPointIteration(max_iter=43, tol=1e-2), Reversible())

    def solve(rows):
        x = torch.ones(len(rows), 4, dtype=F64, requires_grad=True)
        z, solution = deq(lambda z: torch.sin(a[rows] * z) + x, torch.zeros(len(rows), 4, dtype=F64))
        (g,) = torch.autograd.grad(z.square().sum(), x)
        return g, solution

    g, solution = solve([0, 1, 2])
    assert bool(solution.converged.all())
    assert len(set(solution.nstep.tolist())) == 3
    for i in range(3):
        alone, single = solve([i])
        assert single.nstep[0] == solution.nstep[i]
        assert torch.allclose(g[i], alone[0], rtol=1e-12, atol=0)


def test_a_sample_that_overflows_goes_back_to_the_start_and_spoils_nothing():
    x = torch.zeros(2, 3, dtype=F64, requires_grad=True)
    rate = torch.tensor([[0.5], [400.0]], dtype=F64)
    w = torch.ones((), dtype=F64, requires_grad=True)

    def f(z, rows=slice(None)):
        return w * torch.exp(rate[rows] * (z - 2)) + 1 + x[rows]

    deq = DEQ(FixedPointIteration(max_iter=17, tol=1e-8), Reversible())
    start = torch.full((2, 3), 2.5, dtype=F64)
    z, solution = deq(f, start)
    assert solution.status.tolist() == [Status.MAX_ITER, Status.NON_FINITE]
    assert torch.equal(z[1], start[1])
    assert torch.equal(solution.z[1], start[1])
    got = torch.autograd.grad(z.sum(), (w, x))
    alone, _ = deq(lambda z: f(z, slice(0, 1)), start[:1])
    assert error(got, torch.autograd.grad(alone.sum(), (w, x))) < 1e-12


def test_a_sample_at_rest_that_its_neighbour_pushes_goes_on_and_is_rebuilt(monkeypatch):
    """Against the same loop with its graph kept. The first sample is at rest until the second has gone past 3."""
    x = torch.ones(2, 1, dtype=F64, requires_grad=True)

    def f(z):
        push = torch.relu(z[1:] - 3)
        return torch.cat([torch.sin(push * x[:1]) + 0.5 * z[:1] * x[:1], 0.8 * z[1:] * x[1:] + 1])

    deq = DEQ(FixedPointIteration(max_iter=37, tol=1e-2), Reversible())
    z, solution = deq(f, torch.zeros(2, 1, dtype=F64))
    assert solution.coupled
    assert solution.nstep[0] > 20
    got = torch.autograd.grad(z.sum(), x)
    monkeypatch.setattr(Tape, "evaluate", plain_evaluation)
    kept, same = deq(f, torch.zeros(2, 1, dtype=F64))
    assert torch.equal(solution.nstep, same.nstep)
    assert error(got, torch.autograd.grad(kept.sum(), x)) < 1e-6  # 36 evaluations undone: 2³⁶ ε is 2e-5


def plain_evaluation(tape, z):
    tape.tally.calls += 1
    return tape.f(z)


@pytest.mark.parametrize("options", [{}, {"stop_mode": "rel"}, {"min_iter": 20}, {"return_final": True}])
def test_the_account_is_honest_and_the_stopping_rules_hold(options):
    f = TanhMap.make(gain=0.5)
    solver = FixedPointIteration(max_iter=31, tol=5e-3, **options)
    z, solution = DEQ(solver, Reversible())(f, f.z0)
    with torch.no_grad():
        image = f(solution.z)
        residual = (image - solution.z).norm(dim=1)
    assert torch.equal(z, image)
    assert torch.allclose(solution.abs_residual, residual, rtol=1e-12, atol=0)
    assert torch.allclose(solution.rel_residual, residual / image.norm(dim=1), rtol=1e-12, atol=0)
    assert bool(solution.converged.all())
    assert len(solution.trace) == solution.nfe
    expected = {"min_iter": range(20, 31), "return_final": [31]}
    assert solution.nfe in expected.get(next(iter(options), ""), range(10, 31))


def test_evaluations_without_a_look_are_all_made():
    f = TanhMap.make()
    z, solution = DEQ(SimpleFixedPointIteration(max_iter=12, tol=10.0), Reversible())(f, f.z0)
    assert solution.nfe == 11  # two for each of five steps, and one that measures
    assert torch.allclose(z, program(f, f.z0, 5), rtol=0, atol=1e-15)


# What f may be --------------------------------------------------------------------------------------------


def test_random_numbers_are_drawn_again_and_the_generator_is_left_alone():
    f, drop = TanhMap.make(), nn.Dropout(0.4)
    noisy = lambda z: f(drop(z))  # noqa: E731
    g = cotangent(f.x)
    torch.manual_seed(3)
    want = torch.autograd.grad(program(noisy, f.z0, 5), f.wanted, g)
    torch.manual_seed(3)
    z, _ = reversible(5)(noisy, f.z0)
    state = torch.get_rng_state()
    assert error(torch.autograd.grad(z, f.wanted, g), want) < 1e-12
    assert torch.equal(torch.get_rng_state(), state)


def test_running_statistics_are_updated_once():
    torch.manual_seed(0)
    norm, x = nn.BatchNorm1d(6).double(), torch.randn(4, 6, dtype=F64, requires_grad=True)
    z, _ = reversible(3)(lambda z: torch.tanh(norm(z + x)) / 2, torch.zeros(4, 6, dtype=F64))
    before = norm.running_mean.clone()
    z.sum().backward()
    assert norm.num_batches_tracked == 1
    assert torch.equal(norm.running_mean, before)


def test_autocast_is_in_force_again():
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 16), torch.randn(4, 16)
    f = lambda z: torch.tanh(layer(z).float() / 2 + x)  # noqa: E731
    z0, parameters = torch.zeros(4, 16), list(layer.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, _ = reversible(5, dtype=F64)(f, z0)
        want = program(lambda z: f(z.float()).double(), z0.double(), 5)
    got = torch.autograd.grad(z.sum(), parameters)
    # Cotangents are rounded to bfloat16, by 2⁻⁸, within f, and added up in another order.
    assert error(got, torch.autograd.grad(want.sum(), parameters)) < 2**-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_float64_state_rebuilds_what_a_narrow_f_saw_to_the_last_bit(dtype):
    """At β = 1/2, because 24 bits and 12 halvings of y and of z fit into 53."""
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 16, dtype=dtype), torch.randn(2, 16, dtype=dtype)
    seen = []

    def f(z):
        assert z.dtype == dtype
        seen.append(z.detach().clone())
        return torch.tanh(layer(z) / 2 + x)

    z, _ = reversible(12, dtype=F64)(f, torch.zeros(2, 16, dtype=dtype))
    there = seen[:]
    del seen[:]
    z.sum().backward()
    assert len(seen) == len(there) == 25
    assert all(torch.equal(a, b) for a, b in zip(there, reversed(seen), strict=True))


def test_any_structure_of_the_state_goes():
    f = TanhMap.make(n=6)

    def pair(state):
        y = f(torch.cat([state["a"], state["b"].real, state["b"].imag], dim=1))
        return {"a": y[:, :2], "b": torch.complex(y[:, 2:4], y[:, 4:])}

    z0 = {"a": f.z0[:, :2], "b": torch.zeros(4, 2, dtype=torch.complex128)}
    z, _ = reversible(4)(pair, z0)
    want = program(f, f.z0, 4)
    got = torch.autograd.grad(z["a"].sum() + z["b"].real.sum(), f.wanted)
    assert error(got, torch.autograd.grad(want[:, :4].sum(), f.wanted)) < 1e-12


def test_a_map_that_differentiates_goes():
    """Its own derivative asks for what the checkpoint has dropped, before the forward pass is over."""
    f = TanhMap.make(n=8)

    def descent(z):
        with torch.enable_grad():
            z = z if z.requires_grad else z.detach().requires_grad_()
            energy = torch.log(torch.cosh(z @ f.w.T + f.x)).sum() + z.square().sum() / 2
            return z - 0.3 * torch.autograd.grad(energy, z, create_graph=True)[0]

    g = cotangent(f.x)
    z, _ = reversible(5)(descent, f.z0)
    want = torch.autograd.grad(program(descent, f.z0, 5), f.wanted, g)
    assert error(torch.autograd.grad(z, f.wanted, g), want) < 1e-12


def test_a_map_without_parameters_gives_a_state_without_a_graph():
    z, _ = reversible(3)(torch.cos, torch.zeros(2, 2))
    assert not z.requires_grad


# Memory ---------------------------------------------------------------------------------------------------


class Watched:
    """A map that remembers the memory of what it sees and makes, without keeping it alive."""

    def __init__(self, f):
        self.f, self.refs = f, []

    def __call__(self, z):
        a = z @ self.f.w.T + self.f.x
        out = torch.tanh(a)
        self.refs += [StorageWeakRef(t.untyped_storage()) for t in (z, a, out)]
        return out

    @property
    def alive(self):
        return len({ref.cdata for ref in self.refs if not ref.expired()})


def test_keeps_the_states_of_no_step_and_lets_go_of_all_after_the_backward_pass():
    f = TanhMap.make()
    alive = {}
    for name, steps, method in (("few", 5, Reversible), ("many", 100, Reversible), ("unrolled", 100, Unroll)):
        watched = Watched(f)
        options = {"beta": 0.05} if method is Reversible else {}
        deq = DEQ(FixedPointIteration(max_iter=2 * steps + 1, tol=0.0), method(**options))
        z = deq(watched, f.z0)[0]
        alive[name] = watched.alive
        z.sum().backward()
        assert watched.alive == 1  # z itself
    assert alive["few"] == alive["many"] == 4  # z; the start; y and z at the end
    assert alive["unrolled"] >= 200


# What cannot be done --------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.05, 0.5, 0.8, 1.3])
def test_growth_is_that_of_errors_undone_where_j_is_one(beta):
    """By power iteration on the errors (δy, δz) of the states of f(z) = z, as steps are undone."""
    dy, dz = 1.0, 0.3
    for _ in range(300):
        dz = (dz - beta * dy) / (1 - beta)
        dy = (dy - beta * dz) / (1 - beta)
        size = max(abs(dy), abs(dz))
        dy, dz = dy / size, dz / size
    method = Reversible(beta=beta)
    if beta < 1:
        assert method.growth(8) == pytest.approx((1 - beta) ** -8, rel=1e-12)
        assert size == pytest.approx(
            method.growth(2), rel=1e-9
        )  # the other eigenvalue is 1: 0.9^600 is left of it
    else:
        assert size <= method.growth(2)  # reached where J is a quarter turn


@pytest.mark.parametrize(("beta", "dtype", "allowed"), [(0.5, torch.float32, 13), (0.8, F64, 19)])
def test_raises_before_a_step_that_cannot_be_undone(beta, dtype, allowed):
    eps = torch.finfo(dtype).eps
    assert eps * (1 - beta) ** -(allowed - 1) <= 1e-3 < eps * (1 - beta) ** -(allowed + 1)
    f = Counted(torch.cos)
    z0 = torch.zeros(1, 1, dtype=dtype)
    deq = DEQ(FixedPointIteration(max_iter=50, tol=0.0), Reversible(beta=beta))
    with pytest.raises(ValueError, match=rf"max_iter={allowed}"):
        deq(f, z0)
    assert f.calls == allowed
    assert deq(torch.cos, z0, max_iter=allowed)[1].nfe == allowed
    if dtype == torch.float32:
        with pytest.raises(ValueError, match=r"dtype=torch\.float64"):
            deq(f, z0)
        assert reversible(20, dtype=F64)(torch.cos, z0)[1].nfe == 41


@pytest.mark.parametrize("steps", [0, 1, 6])
def test_raises_when_f_has_changed(steps):
    """Without a step there is nothing to rebuild; the one evaluation is compared with itself."""
    f = TanhMap.make()
    z0 = solve_exactly(f, f.z0)
    z, _ = reversible(steps)(f, z0)
    with torch.no_grad():
        f.w.mul_(1.01)
    with pytest.raises(RuntimeError, match="another value in the backward pass.*weights updated in place"):
        z.sum().backward()
    own = torch.Generator().manual_seed(0)  # not the generator whose state is known
    noisy = lambda z: f(z + 0.1 * torch.randn(z.shape, dtype=F64, generator=own))  # noqa: E731
    z, _ = reversible(steps)(noisy, z0)
    with pytest.raises(RuntimeError, match="another value in the backward pass.*random"):
        z.sum().backward()


def test_raises_when_the_start_is_not_rebuilt():
    f, calls = TanhMap.make(), itertools.count()

    def changed(z):
        """Another map from its second call in the backward pass on; the first has the value that it had."""
        return f(z) + (0.01 if next(calls) > 13 else 0)

    z, _ = reversible(6)(changed, f.z0)
    with pytest.raises(RuntimeError, match="rebuilt with a relative error.*weights updated in place"):
        z.sum().backward()


# Without grad mode ----------------------------------------------------------------------------------------


def test_without_grad_mode_the_steps_are_the_same():
    """Plain iteration would turn outwards by 1.1 a step; and 101 evaluations could not be undone."""
    turn = 1.1 * torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=F64)
    f = Counted(lambda z: z @ turn.T + 1)
    z0 = torch.zeros(1, 2, dtype=F64)
    deq = DEQ(FixedPointIteration(max_iter=43, tol=1e-6), Reversible())
    want, solution = deq(f, z0)
    for context in (torch.no_grad, torch.inference_mode):
        f.calls = 0
        with context():
            z, same = deq(f, z0)
        assert torch.equal(z, want)
        assert torch.equal(same.z, solution.z)
        assert f.calls == same.nfe == solution.nfe
    with torch.no_grad():
        z, _ = reversible(50)(f, z0)
        assert torch.allclose(z, program(f.f, z0, 50), rtol=1e-12)
        with pytest.raises(ValueError, match="tau=0.5.*beta"):
            DEQ(FixedPointIteration(tau=0.5), Reversible())(f, z0)
        other = Anderson(tol=1e-9)
        assert torch.equal(DEQ(other, Reversible())(f, z0)[0], other(f, z0).z)


def test_in_a_reentrant_checkpoint_the_gradient_is_that_of_the_steps():
    f = TanhMap.make()
    run = lambda x: reversible(4)(lambda z: torch.tanh(z @ f.w.T + x), f.z0)[0]  # noqa: E731
    z = checkpoint(run, f.x, use_reentrant=True)
    z.pow(3).sum().backward()
    want = torch.autograd.grad(program(f, f.z0, 4).pow(3).sum(), f.wanted)
    assert error([t.grad for t in f.wanted], want) < 1e-12


@pytest.mark.parametrize(
    ("solver", "options", "kind", "message"),
    [
        (Anderson(), {}, TypeError, "Anderson.*would be ignored"),
        (FixedPointIteration(tau=0.5), {}, ValueError, "tau=0.5.*beta"),
        (FixedPointIteration(compact=True), {}, ValueError, "compact=True"),
        (FixedPointIteration(check_every=2), {}, ValueError, "check_every=2"),
        (FixedPointIteration(), {"record": [3], "max_iter": 9}, ValueError, r"record=\[3\]"),
    ],
)
def test_what_would_be_ignored_is_refused(solver, options, kind, message):
    record = options.pop("record", [])
    with pytest.raises(kind, match=message):
        DEQ(solver, Reversible(), record=record)(torch.cos, torch.zeros(1, 1), **options)


def test_options_out_of_range_are_refused():
    for beta in (0.0, 1.0, 2.0, -0.5):
        with pytest.raises(ValueError, match="beta must lie in"):
            Reversible(beta=beta)
    with pytest.raises(ValueError, match="floating-point dtype"):
        Reversible(dtype=torch.int64)
    with pytest.raises(ValueError, match="must not be narrower"):
        reversible(2, dtype=torch.float32)(torch.cos, torch.zeros(1, 1, dtype=F64))
    with pytest.raises(TypeError, match="already solved"):
        Reversible().attach(torch.cos, torch.zeros(1, 1))


def test_modes_of_differentiation_that_it_has_not_raise():
    f = TanhMap.make(n=3)
    deq = reversible(2)
    solve = lambda x: deq(lambda z: torch.tanh(z + x) / 2, f.z0)[0].sum()  # noqa: E731
    with pytest.raises(RuntimeError, match="torch.func"):
        torch.func.grad(solve)(f.x.detach())
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        solve(forward_ad.make_dual(f.x.detach(), torch.ones_like(f.x)))


@pytest.mark.parametrize("beta", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_kink_of_f_at_the_start_is_on_the_side_on_which_it_was(beta, dtype):
    """relu(0 W + 0) at z = 0, which is rebuilt to rounding."""
    generator = torch.Generator().manual_seed(0)
    w = 0.5 * torch.randn(5, 5, dtype=dtype, generator=generator)
    x = torch.randn(1, 5, dtype=dtype, generator=generator)
    c = torch.zeros(5, dtype=dtype, requires_grad=True)
    f = lambda z: torch.relu(z @ w.T + c) * 0.5 + 0.3 * x  # noqa: E731
    y = z = torch.zeros(1, 5, dtype=dtype)
    for _ in range(2):
        y = y - beta * (y - f(z))
        z = z - beta * (z - f(y))
    (want,) = torch.autograd.grad(f(z).sum(), c)
    solver = SimpleFixedPointIteration(max_iter=5, tol=float("inf"))
    out, _ = DEQ(solver, Reversible(beta=beta))(f, torch.zeros(1, 5, dtype=dtype))
    (got,) = torch.autograd.grad(out.sum(), c)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
