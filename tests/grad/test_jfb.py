"""Jacobian-free backpropagation against Bᵀ g, and its bound."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from tests.problems import F64, TanhMap, cotangent, error, exact_adjoint, solve_exactly
from torchdeq import DEQ, JFB, Anderson, ConvergenceWarning, FixedPointIteration, PhantomGrad
from torchdeq.diagnostics.memory import SavedBytes

TIGHT = Anderson(tol=1e-13, max_iter=200)


def test_the_cotangent_takes_the_place_of_the_adjoint():
    """Bᵀ g in closed form: for tanh(z Wᵀ + x), v = g ⊙ (1 − tanh²) is the gradient of x, and vᵀ z that of W."""
    f = TanhMap.make(n=8, batch=3)
    g, z = cotangent(f.x), solve_exactly(f, f.z0)
    v = (g * (1 - f(z) ** 2)).detach()
    (out,) = JFB().attach(f, z)
    assert error(torch.autograd.grad(out, f.wanted, g), [v.T @ z, v]) < 1e-14
    (phantom,) = PhantomGrad(steps=1).attach(f, z)
    (out,) = JFB().attach(f, z)
    for a, b in zip(*(torch.autograd.grad(o, f.wanted, g) for o in (out, phantom)), strict=True):
        assert torch.equal(a, b)


def test_the_bound_of_the_angle_is_sharp():
    """For J = γ times a rotation by φ with cos φ = γ, the residual is at a right angle to the cotangent."""
    gamma = 0.8
    c, s = gamma, (1 - gamma**2) ** 0.5
    j = gamma * torch.tensor([[c, -s], [s, c]], dtype=F64)
    x = torch.zeros(1, 2, dtype=F64, requires_grad=True)
    f = lambda z: z @ j.T + x  # noqa: E731
    g = torch.tensor([[1.0, 0.0]], dtype=F64)
    z, solution = DEQ(TIGHT, JFB())(f, torch.zeros(1, 2, dtype=F64))
    (got,) = torch.autograd.grad(z, x, g)  # B = I: this is û
    u = exact_adjoint(f, solution.z, g)
    cosine = (got * u).sum() / (got.norm() * u.norm())
    assert abs(cosine - (1 - gamma**2) ** 0.5) < 1e-14


def test_saved_bytes_do_not_depend_on_max_iter_and_are_freed_after_the_backward():
    held = {}
    for max_iter in (10, 200):
        f = TanhMap.make(gain=1.2)
        with SavedBytes(ignore=[f.w, f.x]) as saved:
            with pytest.warns(ConvergenceWarning):
                z, _ = DEQ(FixedPointIteration(tol=0.0, max_iter=max_iter), JFB())(f, f.z0)
            held[max_iter] = saved.now
            torch.autograd.grad(z.sum(), f.wanted)
            assert saved.now == 0
    assert held[10] == held[200] == 2 * f.x.nbytes


def test_calls_f_once_after_the_solve_and_reports_no_adjoint_solve():
    f, calls, reports = TanhMap.make(n=6, batch=2), [], []

    def counted(z):
        calls.append(torch.is_grad_enabled())
        return f(z)

    z, solution = DEQ(TIGHT, JFB(), on_backward=reports.append)(counted, f.z0)
    z.sum().backward()
    assert len(calls) == solution.nfe + 1
    assert sum(calls) == 1
    assert not reports


@pytest.mark.parametrize("batch_dims", [0, 1])
def test_a_nested_state_gets_the_gradient_of_the_flat_one(batch_dims):
    f = TanhMap.make(n=6, batch=3)
    g = cotangent(f.x)
    deq = DEQ(FixedPointIteration(tol=1e-13, max_iter=300), JFB(), batch_dims=batch_dims)
    z, solution = deq(lambda s: tuple(f(torch.cat(s, 1)).split(3, 1)), tuple(f.z0.split(3, 1)))
    want = torch.autograd.grad(f(torch.cat(solution.z, 1)), f.wanted, g)
    assert error(torch.autograd.grad(torch.cat(z, 1), f.wanted, g), want) < 1e-14


def test_frozen_parameters_two_calls_and_two_backward_passes():
    f = TanhMap.make(n=6, batch=2)
    f.w.requires_grad_(False)
    deq, g = DEQ(TIGHT, JFB()), cotangent(f.x)
    loss = (deq(f, f.z0)[0] * g).sum() + (deq(f, f.z0)[0] * g).sum()
    (one,) = torch.autograd.grad(loss, f.x, retain_graph=True)
    (two,) = torch.autograd.grad(loss, f.x)
    z = solve_exactly(f, f.z0)
    assert error([one], [2 * g * (1 - f(z) ** 2).detach()]) < 1e-12
    assert torch.equal(one, two)


def test_forward_mode_raises():
    f = TanhMap.make(n=4, batch=2)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        DEQ(TIGHT, JFB())(TanhMap(f.w, forward_ad.make_dual(f.x.detach(), torch.ones_like(f.x))), f.z0)
