"""Implicit differentiation against dense solves, in float64."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch

from tests.problems import (
    F64,
    CoupledMap,
    SymmetricMap,
    TanhMap,
    cotangent,
    error,
    exact_gradient,
    random_matrix,
)
from torchdeq import (
    DEQ,
    GMRES,
    IFT,
    SOLVERS,
    AffineMap,
    Anderson,
    ConvergenceWarning,
    CouplingWarning,
    FixedPointIteration,
    as_solver,
)

TIGHT = Anderson(tol=1e-13, max_iter=200)
FORMS = pytest.mark.parametrize("hook", [False, True], ids=["function", "hook"])


def solve(f, hook=False, adjoint=None, **options):
    deq = DEQ(TIGHT, IFT(solver=adjoint or GMRES(tol=1e-12, max_iter=100), hook=hook), **options)
    return deq(f, f.z0)[0]


@FORMS
@pytest.mark.parametrize("name", SOLVERS)
def test_every_adjoint_solver_gives_the_dense_gradient(name, hook):
    f = TanhMap.make(n=32, batch=4, gain=0.7)
    adjoint = as_solver(name, tol=1e-12, max_iter=200)
    if getattr(adjoint, "symmetric_only", False):
        f = SymmetricMap.make(n=32, batch=4)
    g = cotangent(f.x)
    z = solve(f, hook, adjoint)
    got = torch.autograd.grad(z, f.wanted, g)
    # Both solves stop at 1e-12; the condition of I − J is below 100 here.
    assert error(got, exact_gradient(f, f.z0, g, f.wanted)) < 1e-9


@FORMS
@pytest.mark.parametrize("structure", ["tuple", "list", "dict", "nested"])
def test_nested_states_get_the_same_gradient_as_the_flat_one(structure, hook):
    f = TanhMap.make(n=10, batch=3)
    a, b = slice(0, 4), slice(4, 10)
    split = {
        "tuple": lambda z: (z[:, a].reshape(3, 2, 2), z[:, b]),
        "list": lambda z: [z[:, a].reshape(3, 2, 2), z[:, b]],
        "dict": lambda z: {"p": z[:, a].reshape(3, 2, 2), "q": z[:, b]},
        "nested": lambda z: {"q": [z[:, a].reshape(3, 2, 2), (z[:, b],)]},
    }[structure]
    join = {
        "tuple": lambda s: torch.cat([s[0].reshape(3, 4), s[1]], 1),
        "list": lambda s: torch.cat([s[0].reshape(3, 4), s[1]], 1),
        "dict": lambda s: torch.cat([s["p"].reshape(3, 4), s["q"]], 1),
        "nested": lambda s: torch.cat([s["q"][0].reshape(3, 4), s["q"][1][0]], 1),
    }[structure]
    deq = DEQ(TIGHT, IFT(solver=GMRES(tol=1e-12), hook=hook))
    z, _ = deq(lambda s: split(f(join(s))), split(f.z0))
    g = cotangent(f.x)
    got = torch.autograd.grad(join(z), f.wanted, g)
    assert error(got, exact_gradient(f, f.z0, g, f.wanted)) < 1e-9


@FORMS
def test_gradcheck(hook):
    f = TanhMap.make(n=4, batch=2)
    assert torch.autograd.gradcheck(lambda w, x: solve(TanhMap(w, x), hook), f.wanted, atol=1e-6)


@FORMS
def test_two_calls_through_one_module_then_one_backward(hook):
    """0.1.0's hook form never returns here."""
    f, h = TanhMap.make(seed=0), TanhMap.make(seed=5)
    h.w = f.w
    deq = DEQ(TIGHT, IFT(solver=GMRES(tol=1e-12), hook=hook))
    g = cotangent(f.x)
    loss = (deq(f, f.z0)[0] * g).sum() + (deq(h, h.z0)[0] * g).sum()
    got = torch.autograd.grad(loss, [f.w, f.x, h.x])
    one, two = (exact_gradient(m, m.z0, g, m.wanted) for m in (f, h))
    assert error(got, [one[0] + two[0], one[1], two[1]]) < 1e-9


@FORMS
def test_backward_twice_with_retain_graph(hook):
    """0.1.0's hook form silently gives the one-step gradient the second time."""
    f = TanhMap.make()
    z, g = solve(f, hook), cotangent(f.x)
    exact = exact_gradient(f, f.z0, g, f.wanted)
    for _ in range(3):
        assert error(torch.autograd.grad(z, f.wanted, g, retain_graph=True), exact) < 1e-9


@FORMS
def test_chained_equilibria(hook):
    """The second equilibrium's input is the first's output."""
    f = TanhMap.make(n=6, batch=2)
    w2 = random_matrix(6, 0.6, 11).requires_grad_()
    deq = DEQ(TIGHT, IFT(solver=GMRES(tol=1e-12), hook=hook))

    def chain(w, x):
        z1, _ = deq(TanhMap(w, x), f.z0)
        return deq(TanhMap(w2, z1), f.z0)[0]

    assert torch.autograd.gradcheck(chain, f.wanted, atol=1e-6)


@FORMS
@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1.0, 1e4])
def test_the_gradient_does_not_depend_on_the_scale_of_the_loss(scale, hook):
    """With the defaults. 0.1.0: relative errors of 1e-2 to .79 for scales of 1 to 1e-8."""
    f = TanhMap.make()
    counts = []

    def gradient(s):
        deq = DEQ(Anderson(), IFT(hook=hook), on_backward=lambda sol: counts.append(sol.nfe))
        z, _ = deq(f, f.z0)
        return [g / s for g in torch.autograd.grad((z * cotangent(z)).mean() * s, f.wanted)]

    assert error(gradient(scale), gradient(1.0)) < 1e-10
    assert counts[0] == counts[1]


def test_a_cotangent_near_the_smallest_numbers_is_not_lost():
    f = TanhMap.make()
    g = cotangent(f.x)
    got = torch.autograd.grad(solve(f), f.wanted, g * 1e-250)
    assert error([x * 1e250 for x in got], exact_gradient(f, f.z0, g, f.wanted)) < 1e-9


def test_a_sample_without_a_loss_gets_no_gradient():
    f = TanhMap.make()
    g = cotangent(f.x)
    g[1] = 0
    got = torch.autograd.grad(solve(f), f.wanted, g)
    assert error(got, exact_gradient(f, f.z0, g, f.wanted)) < 1e-9
    assert torch.equal(got[1][1], torch.zeros_like(got[1][1]))


@FORMS
@pytest.mark.parametrize("zeros", [False, True], ids=["dense", "one sample without a loss"])
@pytest.mark.parametrize("name", ["gmres", "anderson", "fixed_point_iter"])
def test_an_f_that_couples_samples_gets_a_right_gradient(name, zeros, hook):
    f = CoupledMap.make(batch=4, n=6)
    g = cotangent(f.x) * torch.tensor([[1.0], [1e-6], [1e3], [1.0]], dtype=F64)
    if zeros:
        g[0] = 0
    reports = []
    solver = as_solver(name, tol=1e-11, max_iter=300)
    deq = DEQ(
        FixedPointIteration(tol=1e-13, max_iter=500),
        IFT(solver=solver, hook=hook),
        on_backward=reports.append,
    )
    z, _ = deq(f, f.z0)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", CouplingWarning
        )  # where coefficients per sample do not do, it says so
        got = torch.autograd.grad(z, f.wanted, g)
    assert error(got, exact_gradient(f, f.z0, g, f.wanted)) < 1e-9
    assert reports[0].residual.shape == (4,)
    assert reports[0].converged.all()


def test_the_reported_adjoint_residual_is_the_true_one():
    f = TanhMap.make()
    g = cotangent(f.x)
    reports = []
    deq = DEQ(TIGHT, IFT(solver=GMRES(tol=1e-4)), on_backward=reports.append)
    z, sol = deq(f, f.z0)
    torch.autograd.grad(z, f.wanted, g)
    jacobian = torch.autograd.functional.jacobian(f, sol.z).reshape(f.x.numel(), -1)
    assert len(reports) == 1
    assert (reports[0].residual <= 1e-4).all()
    u = reports[0].z  # unit cotangents: (I − Jᵀ) u = g / ‖g‖ per sample
    unit = g / g.norm(dim=1, keepdim=True)
    r = (unit.reshape(-1) - (u.reshape(-1) - jacobian.T @ u.reshape(-1))).reshape(u.shape).norm(dim=1)
    assert torch.allclose(r, reports[0].residual, atol=1e-10)


@FORMS
def test_an_unconverged_adjoint_warns_once_and_is_reported_each_time(hook):
    f = TanhMap.make(gain=0.95)
    reports = []
    deq = DEQ(TIGHT, IFT(solver=GMRES(tol=1e-10, max_iter=4), hook=hook), on_backward=reports.append)
    with pytest.warns(ConvergenceWarning, match="adjoint solve.*gradient"):
        deq(f, f.z0)[0].sum().backward()
    deq(f, f.z0)[0].sum().backward()  # a second warning would be an error here
    assert len(reports) == 2
    assert not reports[1].converged.any()


@FORMS
def test_second_derivatives_raise_rather_than_be_wrong(hook):
    """0.1.0 gives numbers with an error of 1."""
    f = TanhMap.make(n=4, batch=2)
    z = solve(f, hook)
    (g,) = torch.autograd.grad(z.square().sum(), f.x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"first derivatives only.*IFT\(order=2\)"):
        torch.autograd.grad(g.sum(), f.w)
    # Also with a linear loss, whose cotangent depends on nothing.
    (g,) = torch.autograd.grad(solve(f, hook).sum(), f.x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(g.sum(), f.w)


@FORMS
def test_create_graph_is_fine_where_only_other_parts_are_differentiated_twice(hook):
    f = TanhMap.make(n=4, batch=2)
    a = torch.ones((), dtype=F64, requires_grad=True)
    loss = solve(f, hook).sum() + a**3
    (g,) = torch.autograd.grad(loss, a, create_graph=True)
    assert torch.autograd.grad(g, a)[0] == 6.0


@FORMS
def test_an_f_that_ignores_z_or_parameters(hook):
    x = torch.tensor([[0.3, -0.2]], dtype=F64, requires_grad=True)
    z, sol = DEQ(TIGHT, IFT(hook=hook))(lambda z: torch.tanh(x), torch.zeros(1, 2, dtype=F64))
    assert torch.autograd.grad(z.sum(), x)[0].allclose(1 - torch.tanh(x) ** 2)
    assert sol.nfe == 2
    z, _ = DEQ(TIGHT, IFT(hook=hook))(lambda z: 0.5 * z + 1, torch.zeros(1, 2, dtype=F64))
    if z.requires_grad:  # the hook form tracks its private z; nothing of the user's is reached
        z.sum().backward()
    assert torch.allclose(z.detach(), torch.full((1, 2), 2.0, dtype=F64))


@FORMS
def test_complex_states_including_maps_that_are_not_holomorphic(hook):
    x = torch.randn(2, 3, dtype=torch.complex128, generator=torch.Generator().manual_seed(0)).requires_grad_()
    a = torch.tensor(0.3 + 0.2j, dtype=torch.complex128, requires_grad=True)
    deq = DEQ(TIGHT, IFT(solver=GMRES(tol=1e-12), hook=hook))

    def equilibrium(a, x):
        z, _ = deq(lambda z: a * z.conj() + 0.2 * torch.sin(z) + x, torch.zeros_like(x))
        return z

    assert torch.autograd.gradcheck(equilibrium, (a, x), atol=1e-6)


@FORMS
def test_only_what_wants_a_gradient_gets_one(hook):
    f = TanhMap.make()
    f.w.requires_grad_(False)
    z = solve(f, hook)
    g = cotangent(f.x)
    f.w.requires_grad_(True)
    exact = exact_gradient(f, f.z0, g, [f.x])
    assert error(torch.autograd.grad(z, [f.x], g), exact) < 1e-9


@FORMS
def test_nothing_is_built_without_grad_mode(hook):
    f = TanhMap.make()
    deq = DEQ(TIGHT, IFT(hook=hook))
    with torch.no_grad():
        z, sol = deq(f, f.z0)
    assert not z.requires_grad
    assert torch.equal(z, sol.z)
    with torch.inference_mode():
        z, _ = deq(f, torch.zeros_like(f.x))
    assert z.is_inference()


@FORMS
def test_nothing_of_the_users_is_changed(hook):
    f = TanhMap.make()
    z0 = f.z0
    z, _ = DEQ(TIGHT, IFT(hook=hook))(f, z0)
    z.sum().backward()
    assert torch.equal(z0, torch.zeros_like(z0))
    assert not z0.requires_grad
    assert z0.grad is None


@FORMS
def test_memory_is_freed_without_the_garbage_collector(hook):
    f = TanhMap.make()
    gc.disable()
    try:
        z = solve(f, hook)
        alive = weakref.ref(z)
        z.sum().backward()
        del z
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("hook", [False, True])
def test_saved_bytes_do_not_depend_on_max_iter(hook):
    def saved(max_iter):
        total = []
        f = TanhMap.make(gain=1.2)
        watch = torch.autograd.graph.saved_tensors_hooks(lambda t: total.append(t.nbytes) or t, lambda t: t)
        with watch, pytest.warns(ConvergenceWarning):
            DEQ(FixedPointIteration(tol=0.0, max_iter=max_iter), IFT(hook=hook))(f, f.z0)
        return sum(total)

    assert saved(10) == saved(200) > 0


@FORMS
def test_the_gradient_error_is_of_first_order_in_the_forward_residual(hook):
    f = TanhMap.make(gain=0.8)
    g = cotangent(f.x)
    exact = exact_gradient(f, f.z0, g, f.wanted)
    points = []
    for tol in (1e-2, 1e-4, 1e-6, 1e-8):
        deq = DEQ(FixedPointIteration(tol=tol, max_iter=500), IFT(solver=GMRES(tol=1e-13), hook=hook))
        z, sol = deq(f, f.z0)
        got = torch.autograd.grad(z, f.wanted, g)
        points.append((float(sol.residual.max()), error(got, exact)))
    logs = torch.tensor(points).log()
    slope = (logs[-1, 1] - logs[0, 1]) / (logs[-1, 0] - logs[0, 0])
    assert abs(slope - 1) < 0.1


def test_under_autocast_the_backward_evaluates_f_as_the_forward_did():
    layer = torch.nn.Linear(8, 8)
    x = torch.randn(4, 8)
    seen = []

    def f(z):
        h = layer(z)
        seen.append((h.dtype, torch.is_grad_enabled()))
        return torch.tanh(0.3 * h + x)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, _ = DEQ(Anderson(tol=5e-2), IFT(solver=GMRES(tol=5e-2)))(f, torch.zeros(4, 8))
    z.sum().backward()
    assert {dtype for dtype, _ in seen} == {torch.bfloat16}
    assert sum(grad for _, grad in seen) == 2  # the tracked call and the one rebuilt in the backward
    assert layer.weight.grad.abs().sum() > 0
    assert z.dtype == torch.float32


@FORMS
def test_an_in_place_operation_on_the_output_does_not_go_past_the_adjoint(hook):
    f = TanhMap.make()
    g = cotangent(f.x)
    z = solve(f, hook)
    z.mul_(2.0)
    got = torch.autograd.grad(z, f.wanted, g)
    assert error(got, [2 * t for t in exact_gradient(f, f.z0, g, f.wanted)]) < 1e-9


def test_an_f_that_changed_before_the_backward_is_an_error_and_the_hook_form_does_not_mind():
    f = TanhMap.make()

    def losses(hook):
        deq = DEQ(TIGHT, IFT(hook=hook))
        for s in (0.2, 0.6, 0.9):
            yield deq(lambda z: torch.tanh(s * z @ f.w.T + f.x), f.z0)[0].sum()  # noqa: B023 - the point

    with pytest.raises(RuntimeError, match="another value in the backward pass.*loop variable"):
        sum(losses(hook=False)).backward()
    got = torch.autograd.grad(sum(losses(hook=True)), f.wanted)
    exact = [
        exact_gradient(lambda z, s=s: torch.tanh(s * z @ f.w.T + f.x), f.z0, torch.ones_like(f.x), f.wanted)
        for s in (0.2, 0.6, 0.9)
    ]
    assert (
        error(got, [sum(parts) for parts in zip(*exact, strict=True)]) < 1e-4
    )  # the default adjoint tolerance
    z = solve(f)
    with torch.no_grad():
        f.w.mul_(1.5)  # an optimiser's step before the backward
    with pytest.raises(RuntimeError, match=r"another value in the backward pass|modified by an inplace"):
        z.sum().backward()


def test_writing_into_the_returned_solution_before_the_backward_is_an_error():
    f = TanhMap.make()
    z, solution = DEQ(TIGHT, IFT())(f, f.z0)
    solution.z[1] = 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_dropout_inside_f_has_the_same_mask_where_f_is_rebuilt():
    torch.manual_seed(0)
    f = TanhMap.make(n=8, batch=2, gain=0.3)
    masks = []

    def noisy(z):
        masks.append((torch.rand(8, dtype=F64) < 0.5).to(F64))
        return f(z) * masks[-1]

    (z,) = IFT(solver=GMRES(tol=1e-12)).attach(noisy, f.z0)
    after = torch.get_rng_state()
    z.sum().backward()
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(torch.get_rng_state(), after), "the backward leaves the generator as it found it"


@pytest.mark.parametrize("name", ["gmres", "anderson", "fixed_point_iter"])
def test_a_nan_in_the_loss_stays_visible(name):
    f = TanhMap.make()
    deq = DEQ(TIGHT, IFT(solver=as_solver(name)))
    with pytest.warns(ConvergenceWarning):
        got = torch.autograd.grad(deq(f, f.z0)[0].sum() * float("nan"), f.wanted)
    assert not any(t.isfinite().any() for t in got[:1])


@pytest.mark.parametrize("batch", [24, 26, 52])
def test_coupling_at_any_distance_is_seen(batch):
    w = random_matrix(4, 0.4)
    x = torch.randn(batch, 4, dtype=F64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    f = lambda z: torch.tanh(z @ w.T + 0.5 * z.roll(batch // 2, 0) @ w.T + x)  # noqa: E731
    g = cotangent(x)
    deq = DEQ(FixedPointIteration(tol=1e-12, max_iter=300), IFT(solver=GMRES(tol=1e-9, max_iter=60)))
    z, _ = deq(f, torch.zeros_like(x.detach()))
    with pytest.warns(CouplingWarning, match="adjoint"):
        got = torch.autograd.grad(z, [x], g)
    assert error(got, exact_gradient(f, torch.zeros_like(x), g, [x])) < 1e-7


def test_small_cotangents_do_not_vanish_in_a_half_precision_f():
    layer = torch.nn.Linear(8, 8).half()
    with torch.no_grad():
        layer.weight.copy_(random_matrix(8, 0.5))
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).half()
    f = lambda z: torch.tanh(layer(z.half()) + x).float()  # noqa: E731
    deq = DEQ(Anderson(tol=5e-3), IFT(solver=GMRES(tol=1e-3)))
    counts = []
    deq.on_backward = lambda solution: counts.append(solution.nfe)
    z, _ = deq(f, torch.zeros(4, 8))
    for scale in (1.0, 1e-4):
        z.backward(scale * torch.ones_like(z), retain_graph=True)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("tiny", [1e-30, 1e-38, 1e-40, 1e-42, 0.0])
def test_a_cotangent_next_to_nothing_is_not_taken_for_a_coupling(tiny):
    w = (random_matrix(16, 0.8) * 0.9).float().requires_grad_()
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    f = lambda z: torch.tanh(z @ w.T + x)  # noqa: E731
    z, _ = DEQ(Anderson(tol=1e-6, max_iter=100))(f, torch.zeros_like(x))
    g = torch.ones_like(z)
    g[1] *= tiny
    (got,) = torch.autograd.grad(z, w, g)  # a warning is an error here
    assert got.isfinite().all()


def test_cgnr_differentiates_under_inference_mode_too():
    with torch.inference_mode():
        a = torch.eye(3) * 0.5
        solution = as_solver("cgnr", tol=1e-5)(
            AffineMap(lambda u: 0.5 * u, torch.ones(1, 3)), torch.zeros(1, 3)
        )
    assert a.is_inference()
    assert solution.converged.all()


@FORMS
@pytest.mark.parametrize("name", ["gmres", "bicgstab", "neumann", "cgnr", "anderson", "broyden"])
def test_a_loss_on_one_of_many_coupled_samples_gets_a_right_gradient(name, hook):
    """The others have no cotangent, but an adjoint all the same: they reach the loss through the one."""
    ring = torch.roll(torch.eye(6, dtype=F64), 1, 0)
    x = torch.randn(6, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    a = torch.tensor(0.5, dtype=F64, requires_grad=True)
    f = lambda z: torch.tanh(a * (ring @ z) + x)  # noqa: E731
    deq = DEQ(FixedPointIteration(tol=1e-13, max_iter=300), IFT(solver=as_solver(name, tol=1e-11), hook=hook))
    z, _ = deq(f, torch.zeros_like(x))
    g = torch.zeros_like(x)
    g[0] = 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CouplingWarning)
        got = torch.autograd.grad(z, [a], g)
    assert error(got, exact_gradient(f, torch.zeros_like(x), g, [a])) < 1e-8


@FORMS
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_cotangent_that_is_not_finite_spoils_its_own_sample_only(hook, bad):
    f = TanhMap.make()
    z = DEQ(TIGHT, IFT(solver=GMRES(tol=1e-12), hook=hook))(f, f.z0)[0]
    g = cotangent(z)
    (want,) = torch.autograd.grad(z, f.x, g, retain_graph=True)
    g[1, 3] = bad
    with pytest.warns(ConvergenceWarning, match="1 of 4.*non-finite"):
        (got,) = torch.autograd.grad(z, f.x, g)
    others = [0, 2, 3]
    assert torch.equal(got[others], want[others])
    assert not got[1].isfinite().any()  # what a gradient scaler looks for
