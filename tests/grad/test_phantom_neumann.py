"""The Neumann form of the phantom gradient against its series, written out with a dense Jacobian."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from torch.autograd import forward_ad

from tests.problems import (
    F64,
    CoupledMap,
    TanhMap,
    cotangent,
    error,
    exact_adjoint,
    random_matrix,
    solve_exactly,
)
from torchdeq import (
    DEQ,
    Anderson,
    ConvergenceWarning,
    FixedPointIteration,
    NeumannPhantom,
    PhantomGrad,
    Status,
    as_grad,
    backward_factory,
)
from torchdeq.diagnostics.memory import SavedBytes

TIGHT = Anderson(tol=1e-13, max_iter=200)
SERIES = pytest.mark.parametrize(("terms", "tau"), [(1, 1.0), (1, 0.7), (5, 0.5), (10, 0.7), (3, 1.4)])


def dense(f, z):
    return torch.autograd.functional.jacobian(f, z.detach()).reshape(z.numel(), z.numel())


def damped(f, z, tau):
    """M = (1 − τ) I + τ Jᵀ."""
    j = dense(f, z)
    return (1 - tau) * torch.eye(len(j), dtype=j.dtype) + tau * j.T


def series(f, z, g, terms, tau):
    """τ Σ_{i<k} Mⁱ g."""
    m, term = damped(f, z, tau), tau * g.reshape(-1)
    total = torch.zeros_like(term)
    for _ in range(terms):
        total, term = total + term, m @ term
    return total.reshape(z.shape)


@SERIES
def test_equals_the_series_written_out_at_any_state(terms, tau):
    f = TanhMap.make(n=12, batch=3)
    z, g = cotangent(f.x, 3), cotangent(f.x)
    want = torch.autograd.grad(f(z), f.wanted, series(f, z, g, terms, tau))
    (out,) = NeumannPhantom(terms=terms, tau=tau).attach(f, z)
    assert torch.equal(out, f(z))
    assert error(torch.autograd.grad(out, f.wanted, g), want) < 1e-13


@SERIES
def test_at_the_fixed_point_it_is_the_exact_gradient_less_a_known_bias_and_the_unrolled_form(terms, tau):
    """Bᵀ (I − M^k) u."""
    f = TanhMap.make(n=12, batch=2)
    g, z = cotangent(f.x), solve_exactly(f, f.z0)
    u = exact_adjoint(f, z, g)
    v = u - (torch.linalg.matrix_power(damped(f, z, tau), terms) @ u.reshape(-1)).reshape(z.shape)
    want = torch.autograd.grad(f(z), f.wanted, v)
    got = torch.autograd.grad(NeumannPhantom(terms=terms, tau=tau).attach(f, z)[0], f.wanted, g)
    unrolled = torch.autograd.grad(PhantomGrad(steps=terms, tau=tau).attach(f, z)[0], f.wanted, g)
    assert error(got, want) < 1e-12
    assert error(got, unrolled) < 1e-12


@SERIES
@pytest.mark.parametrize("make", [TanhMap.make, CoupledMap.make])
def test_reports_its_products_and_the_true_residual_and_does_not_warn(make, terms, tau):
    f = make(n=6, batch=4)
    g, reports = cotangent(f.x), []
    plain = FixedPointIteration(tol=1e-13, max_iter=500)  # which needs no warning where f couples the samples
    z, sol = DEQ(plain, NeumannPhantom(terms=terms, tau=tau), on_backward=reports.append)(f, f.z0)
    torch.autograd.grad(z, f.wanted, g)  # a warning is an error here
    (report,) = reports
    u = series(f, sol.z, g, terms, tau)
    r = g - u + (dense(f, sol.z).T @ u.reshape(-1)).reshape(g.shape)
    assert torch.allclose(report.residual, r.norm(dim=1) / g.norm(dim=1), rtol=1e-9)
    assert torch.allclose(report.z, u / g.norm(dim=1, keepdim=True), rtol=1e-9)
    assert report.nfe == terms
    assert report.tol == math.inf
    assert report.converged.all()


def test_counts_one_tracked_call_of_f_and_terms_products():
    f = TanhMap.make(n=6, batch=2)
    calls, products = [], []

    def counted(z):
        calls.append(torch.is_grad_enabled())
        seen = z.clone()
        if seen.requires_grad:
            seen.register_hook(lambda g: products.append(1))
        return f(seen)

    (out,) = NeumannPhantom(terms=4).attach(counted, f.z0)
    torch.autograd.grad(out, f.wanted, cotangent(f.x))
    assert calls == [True]
    assert len(products) == 4  # the pass to the parameters does not reach z


def test_a_cotangent_that_is_not_finite_stays_visible_and_warns():
    f = TanhMap.make(n=6, batch=2)
    reports = []
    z, _ = DEQ(TIGHT, NeumannPhantom(terms=3), on_backward=reports.append)(f, f.z0)
    with pytest.warns(ConvergenceWarning, match="adjoint"):
        got = torch.autograd.grad(z.sum() * math.nan, f.wanted)
    assert got[0].isnan().all()
    assert reports[0].status.tolist() == [Status.NON_FINITE, Status.NON_FINITE]


@pytest.mark.parametrize("batch_dims", [0, 1])
def test_a_nested_state_gets_the_gradient_of_the_flat_one(batch_dims):
    f = TanhMap.make(n=10, batch=3)
    a, b = slice(0, 4), slice(4, 10)
    join = lambda s: torch.cat([s["p"].reshape(3, 4), s["q"][0]], 1)  # noqa: E731
    split = lambda z: {"p": z[:, a].reshape(3, 2, 2), "q": [z[:, b]]}  # noqa: E731
    g = cotangent(f.x)
    solver = FixedPointIteration(tol=1e-13, max_iter=300)
    deq = DEQ(solver, NeumannPhantom(terms=4, tau=0.8), batch_dims=batch_dims)
    z, solution = deq(lambda s: split(f(join(s))), split(f.z0))
    want = torch.autograd.grad(f(join(solution.z)), f.wanted, series(f, join(solution.z), g, 4, 0.8))
    assert error(torch.autograd.grad(join(z), f.wanted, g), want) < 1e-12


def test_a_complex_state():
    x = torch.randn(2, 3, dtype=torch.complex128, generator=torch.Generator().manual_seed(0)).requires_grad_()
    f = lambda z: 0.3j * z.conj() + 0.2 * torch.sin(z) + x  # noqa: E731
    gradients = [
        torch.autograd.grad(DEQ(TIGHT, method)(f, torch.zeros_like(x.detach()))[0].abs().sum(), x)
        for method in (NeumannPhantom(terms=4, tau=0.8), PhantomGrad(steps=4, tau=0.8))
    ]
    assert (gradients[0][0] - gradients[1][0]).abs().max() < 1e-11


def test_only_what_wants_a_gradient_gets_one_and_the_users_tensors_are_left_alone():
    f = TanhMap.make(n=6, batch=2)
    f.w.requires_grad_(False)
    z0 = f.z0
    z, _ = DEQ(TIGHT, NeumannPhantom(terms=3))(f, z0)
    z.sum().backward()
    assert f.w.grad is None
    assert f.x.grad.abs().sum() > 0
    assert z0.grad is None
    assert torch.equal(z0, torch.zeros_like(z0))


def test_an_f_that_ignores_z():
    x = torch.tensor([[0.3, -0.2]], dtype=F64, requires_grad=True)
    z, _ = DEQ(TIGHT, NeumannPhantom(terms=3))(lambda z: torch.tanh(x), torch.zeros(1, 2, dtype=F64))
    assert torch.autograd.grad(z.sum(), x)[0].allclose(1 - torch.tanh(x) ** 2, rtol=1e-15)


def test_two_calls_then_one_backward_and_backward_twice():
    f, h = TanhMap.make(n=6, batch=2, seed=0), TanhMap.make(n=6, batch=2, seed=5)
    h.w = f.w
    deq, g = DEQ(TIGHT, NeumannPhantom(terms=4)), cotangent(f.x)

    def alone(m):
        z = solve_exactly(m, m.z0)
        return torch.autograd.grad(m(z), m.wanted, series(m, z, g, 4, 1.0))

    loss = (deq(f, f.z0)[0] * g).sum() + (deq(h, h.z0)[0] * g).sum()
    one, two = alone(f), alone(h)
    want = [one[0] + two[0], one[1], two[1]]
    for keep in (True, True, False):
        assert error(torch.autograd.grad(loss, [f.w, f.x, h.x], retain_graph=keep), want) < 1e-11


def test_an_in_place_operation_on_the_output_does_not_go_past_the_series():
    f, g = TanhMap.make(n=6, batch=2), cotangent(TanhMap.make(n=6, batch=2).x)
    z, sol = DEQ(TIGHT, NeumannPhantom(terms=3))(f, f.z0)
    want = torch.autograd.grad(f(sol.z), f.wanted, series(f, sol.z, 2 * g, 3, 1.0))
    z.mul_(2.0)
    assert error(torch.autograd.grad(z, f.wanted, g), want) < 1e-13


def test_differentiating_twice_raises():
    f = TanhMap.make(n=4, batch=2)
    for loss in (torch.sum, lambda z: z.square().sum()):  # a linear loss has a cotangent without a graph
        z, _ = DEQ(TIGHT, NeumannPhantom(terms=3))(f, f.z0)
        (g,) = torch.autograd.grad(loss(z), f.x, create_graph=True)
        with pytest.raises(
            RuntimeError, match=r"NeumannPhantom\(terms=3\), which gives first.*PhantomGrad\(steps=3"
        ):
            torch.autograd.grad(g.sum(), f.w)


def test_forward_mode_and_function_transforms_raise():
    f = TanhMap.make(n=4, batch=2)
    deq = DEQ(TIGHT, NeumannPhantom(terms=3))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        deq(TanhMap(f.w, forward_ad.make_dual(f.x.detach(), torch.ones_like(f.x))), f.z0)
    with (
        forward_ad.dual_level(),
        pytest.raises(RuntimeError, match="forward mode AD"),
    ):  # an f that nobody checks
        NeumannPhantom().attach(TanhMap(f.w, forward_ad.make_dual(f.x.detach(), torch.ones_like(f.x))), f.z0)
    with pytest.raises(RuntimeError, match="NeumannPhantom.*torch.func"):
        torch.func.grad(lambda x: deq(TanhMap(f.w, x), f.z0)[0].sum())(f.x.detach())


def test_a_tangent_of_the_cotangent_goes_through_the_series_which_is_linear():
    f = TanhMap.make(n=4, batch=2)
    g, t = cotangent(f.x), cotangent(f.x, 8)
    reports = []
    z, sol = DEQ(TIGHT, NeumannPhantom(terms=3, tau=0.6), on_backward=reports.append)(f, f.z0)
    want = torch.autograd.grad(f(sol.z), f.wanted, series(f, sol.z, t, 3, 0.6))
    with forward_ad.dual_level():
        duals = torch.autograd.grad((z * forward_ad.make_dual(g, t)).sum(), f.wanted)
        got = [forward_ad.unpack_dual(d).tangent for d in duals]
    assert error(got, want) < 1e-13
    assert len(reports) == 1


def test_saved_bytes_do_not_depend_on_max_iter_and_are_freed_after_the_backward():
    held = {}
    for max_iter in (10, 200):
        f = TanhMap.make(gain=1.2)
        with SavedBytes(ignore=[f.w, f.x]) as saved:
            with pytest.warns(ConvergenceWarning):
                z, _ = DEQ(FixedPointIteration(tol=0.0, max_iter=max_iter), NeumannPhantom())(f, f.z0)
            held[max_iter] = saved.now
            torch.autograd.grad(z.sum(), f.wanted)
            assert saved.now == 0
    assert held[10] == held[200] == 2 * f.x.nbytes  # z, and tanh of what it has become


def test_memory_is_freed_without_the_garbage_collector():
    f = TanhMap.make()
    gc.disable()
    try:
        z, _ = DEQ(TIGHT, NeumannPhantom(terms=3))(f, f.z0)
        alive = weakref.ref(z)
        z.sum().backward()
        del z
        assert alive() is None
    finally:
        gc.enable()


def test_small_cotangents_do_not_vanish_in_a_half_precision_f():
    layer = torch.nn.Linear(8, 8).half()
    with torch.no_grad():
        layer.weight.copy_(random_matrix(8, 0.5))
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).half()
    reports = []
    deq = DEQ(Anderson(tol=5e-3), NeumannPhantom(terms=4), on_backward=reports.append)
    z, _ = deq(lambda z: torch.tanh(layer(z.half()) + x).float(), torch.zeros(4, 8))
    for scale in (1.0, 2.0**-23):  # a power of two, which rounds nothing by itself
        torch.autograd.grad(z, layer.bias, scale * torch.ones_like(z), retain_graph=True)
    assert torch.equal(reports[0].residual, reports[1].residual)


def test_without_grad_mode_nothing_is_built():
    f = TanhMap.make()
    with torch.no_grad():
        (z,) = NeumannPhantom().attach(f, f.z0)
    assert torch.equal(z, f(f.z0))
    assert not z.requires_grad


@pytest.mark.parametrize("terms", [0, 1.5, True])
def test_wrong_options_teach(terms):
    with pytest.raises(ValueError, match="terms counts"):
        NeumannPhantom(terms=terms)
    with pytest.raises(ValueError, match="tau must lie"):
        NeumannPhantom(tau=2.0)


def test_goes_by_its_name_with_its_options_and_the_writer_gets_the_certificate():
    assert as_grad("phantom_neumann", terms=3, tau=0.5) == NeumannPhantom(terms=3, tau=0.5)
    f, stats = TanhMap.make(n=6, batch=2), []
    functor = backward_factory("phantom_neumann", terms=3, tau=0.5)
    assert functor.method == NeumannPhantom(terms=3, tau=0.5)
    (out,) = functor(None, f, f.z0, writer=stats.append)
    g = cotangent(f.x)
    want = torch.autograd.grad(f(f.z0), f.wanted, series(f, f.z0, g, 3, 0.5))
    assert error(torch.autograd.grad(out, f.wanted, g), want) < 1e-13
    assert len(stats) == 1
    assert stats[0]["abs_lowest"].shape == (2,)
    with pytest.raises(TypeError, match="has no solver of an adjoint system, got b_solver='gmres'"):
        backward_factory("phantom_neumann", b_solver="gmres")
    with pytest.raises(TypeError, match="JFB has no option 'tau'"):
        backward_factory("jfb", tau=0.5)
    with pytest.warns(UserWarning, match="ignores the keyword 'term'. Did you mean 'terms'"):
        backward_factory("phantom_neumann", term=3)
