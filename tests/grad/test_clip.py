"""IFT(clip=…), against adjoints from dense solves that are clipped by hand, in float64."""

from __future__ import annotations

import warnings

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
from torchdeq import DEQ, GMRES, IFT, Anderson, CouplingWarning, FixedPointIteration

TIGHT = Anderson(tol=1e-13, max_iter=300)
ADJOINT = GMRES(tol=1e-12, max_iter=100)
FORMS = pytest.mark.parametrize("hook", [False, True], ids=["function", "hook"])


def uneven(n: int = 12, batch: int = 6) -> TanhMap:
    """Samples of amplifications from 1.3 to 7.8: W has eigenvalues up to 0.95, and σ' is the less the larger x is."""
    f = TanhMap.make(n=n, batch=batch)
    q = torch.linalg.qr(random_matrix(n, 1.0, 3)).Q
    with torch.no_grad():
        f.w.copy_((q * torch.linspace(0.3, 0.95, n, dtype=F64)) @ q.mT)
        f.x *= torch.linspace(0.02, 1, batch, dtype=F64)[:, None]
    return f


def amplification(f, g):
    """‖u‖ / ‖g‖ per sample, from a dense solve."""
    u = exact_adjoint(f, solve_exactly(f, f.z0), g)
    return u.norm(dim=1) / g.norm(dim=1)


def clipped_gradient(f, g, factor):
    """Bᵀ (factor · u), from a dense solve."""
    z = solve_exactly(f, f.z0)
    u = exact_adjoint(f, z, g)
    return torch.autograd.grad(f(z), f.wanted, u * factor)


@FORMS
def test_the_gradient_is_that_of_the_clipped_adjoint(hook):
    f = uneven()
    g = cotangent(f.x) * torch.tensor([1e-3, 1, 10, 1, 1e2, 1], dtype=F64)[:, None]
    grown = amplification(f, g)
    clip = float(grown.sort().values[2:4].mean())
    seen = []
    deq = DEQ(TIGHT, IFT(solver=ADJOINT, hook=hook, clip=clip), on_backward=seen.append)
    got = torch.autograd.grad(deq(f, f.z0)[0], f.wanted, g)
    want = clipped_gradient(f, g, (clip / grown).clamp(max=1)[:, None])
    assert error(got, want) < 1e-9
    assert seen[0].clipped.tolist() == (grown > clip).tolist()
    assert int(seen[0].clipped.sum()) == 3
    assert bool(seen[0].converged.all())


@FORMS
def test_a_contraction_is_not_clipped_at_its_own_bound(hook):
    f = TanhMap.make(gain=0.4)
    norm = float(torch.linalg.matrix_norm(f.w.detach(), 2))
    assert norm < 1
    seen, g = [], cotangent(f.x)
    deq = DEQ(TIGHT, IFT(solver=ADJOINT, hook=hook, clip=1 / (1 - norm)), on_backward=seen.append)
    bounded = torch.autograd.grad(deq(f, f.z0)[0], f.wanted, g)
    free = torch.autograd.grad(DEQ(TIGHT, IFT(solver=ADJOINT, hook=hook))(f, f.z0)[0], f.wanted, g)
    assert not bool(seen[0].clipped.any())
    assert all(torch.equal(a, b) for a, b in zip(bounded, free, strict=True))


def test_without_clip_nothing_is_said_of_it():
    f, seen = TanhMap.make(), []
    DEQ(TIGHT, IFT(), on_backward=seen.append)(f, f.z0)[0].sum().backward()
    assert seen[0].clipped is None


@FORMS
@pytest.mark.parametrize("scale", [1e-12, 1e6, 1e200])
def test_it_is_proportional_to_the_loss(scale, hook):
    f = uneven()
    g = cotangent(f.x)
    deq = DEQ(TIGHT, IFT(solver=ADJOINT, hook=hook, clip=2.0))
    one = torch.autograd.grad(deq(f, f.z0)[0], f.wanted, g)
    many = torch.autograd.grad(deq(f, f.z0)[0], f.wanted, g * scale)
    assert error([t / scale for t in many], one) < 1e-9
    free = torch.autograd.grad(DEQ(TIGHT, IFT(solver=ADJOINT))(f, f.z0)[0], f.wanted, g)
    assert error(one, free) > 0.1


@FORMS
def test_a_sample_without_a_cotangent_stays_at_zero(hook):
    f = uneven()
    g = cotangent(f.x)
    g[1] = 0
    seen = []
    deq = DEQ(TIGHT, IFT(solver=ADJOINT, hook=hook, clip=1.5), on_backward=seen.append)
    (got,) = torch.autograd.grad(deq(f, f.z0)[0], f.x, g)
    assert not bool(got[1].any())
    assert bool(got.isfinite().all())
    assert seen[0].clipped.tolist() == [True, False, True, False, True, True]
    assert not bool(torch.autograd.grad(deq(f, f.z0)[0], f.x, torch.zeros_like(g))[0].any())


@FORMS
def test_a_state_that_is_one_system_is_clipped_as_one(hook):
    f = CoupledMap.make(gain=0.9)
    g = cotangent(f.x)
    u = exact_adjoint(f, solve_exactly(f, f.z0), g)
    grown = u.norm() / g.norm()
    clip = max(1.0, float(0.7 * grown))
    assert clip < grown
    deq = DEQ(TIGHT, IFT(solver=ADJOINT, hook=hook, clip=clip), batch_dims=0)
    got = torch.autograd.grad(deq(f, f.z0)[0], f.wanted, g)
    assert error(got, clipped_gradient(f, g, clip / grown)) < 1e-9


def test_samples_found_to_be_coupled_are_clipped_as_one():
    """Per sample, one that has no cotangent of its own would lose all that it owes to its neighbours'."""
    f = CoupledMap.make(gain=0.9)
    g = cotangent(f.x)
    g[0] = 0
    u = exact_adjoint(f, solve_exactly(f, f.z0), g)
    grown = u.norm() / g.norm()
    seen = []
    method = IFT(solver=ADJOINT, clip=max(1.0, float(0.7 * grown)))
    deq = DEQ(FixedPointIteration(tol=1e-13, max_iter=500), method, on_backward=seen.append)
    z, _ = deq(f, f.z0)
    with pytest.warns(CouplingWarning):
        got = torch.autograd.grad(z, f.wanted, g)
    assert bool(seen[0].clipped.all())
    assert error(got, clipped_gradient(f, g, method.clip / grown)) < 1e-7


@FORMS
def test_tuples_and_complex_states_are_measured_whole(hook):
    """z' = (A z + x) with complex A, beside a real leaf: u from the dense real system of both."""
    a = torch.complex(random_matrix(3, 0.7, 1), random_matrix(3, 0.7, 2))
    b = random_matrix(2, 0.9, 3)
    x = cotangent(torch.zeros(2, 3, dtype=torch.complex128), 4).requires_grad_()
    y = cotangent(torch.zeros(2, 2, dtype=F64), 5).requires_grad_()
    f = lambda s: (s[0] @ a.T + x, s[1] @ b.T + y)  # noqa: E731
    start = (torch.zeros_like(x.detach()), torch.zeros_like(y.detach()))
    g = (cotangent(x.detach(), 6), cotangent(y.detach(), 8))
    # An affine map: the cotangent of x is u itself.
    u = (
        torch.linalg.solve(torch.eye(3) - a.mH, g[0].mT).mT,
        torch.linalg.solve(torch.eye(2) - b.mT, g[1].mT).mT,
    )
    size = torch.stack([torch.linalg.vector_norm(t, dim=1) for t in u]).norm(dim=0)
    grown = size / torch.stack([torch.linalg.vector_norm(t, dim=1) for t in g]).norm(dim=0)
    clip = float(grown.mean())
    assert clip > 1
    factor = (clip / grown).clamp(max=1)[:, None]
    z, _ = DEQ(TIGHT, IFT(solver=ADJOINT, hook=hook, clip=clip))(f, start)
    got = torch.autograd.grad(z, (x, y), g)
    assert error(got, [t * factor for t in u]) < 1e-9


@FORMS
def test_half_precision(hook):
    f = uneven()
    g = cotangent(f.x)
    half = TanhMap(*(t.detach().half().requires_grad_() for t in f.wanted))
    wide = TanhMap(*(t.detach().to(F64).requires_grad_() for t in half.wanted))
    grown = amplification(wide, g)
    assert 1 < int((grown > 2).sum()) < 6
    want = clipped_gradient(wide, g, (2.0 / grown).clamp(max=1)[:, None])
    deq = DEQ(Anderson(tol=1e-2), IFT(solver=GMRES(tol=1e-2), hook=hook, clip=2.0))
    got = torch.autograd.grad(deq(half, half.z0)[0], half.x, g.half())
    # The tolerances are of 1e-2, and the condition of I − J is below 20.
    assert error([t.double() for t in got], want[1:]) < 0.2
    assert got[0].dtype == torch.float16


def test_what_is_clipped_is_not_differentiated_again():
    f = uneven()
    with pytest.raises(ValueError, match="not differentiated further"):
        IFT(clip=2.0, order=2)
    for hook in (False, True):
        z, _ = DEQ(TIGHT, IFT(solver=ADJOINT, hook=hook, clip=2.0))(f, f.z0)
        scale = torch.ones((), dtype=F64, requires_grad=True)
        (first,) = torch.autograd.grad((z * scale).square().sum(), f.x, create_graph=True)
        with pytest.raises(RuntimeError, match=r"clip=\.\.\."):
            torch.autograd.grad(first.sum(), f.w, retain_graph=True)
        # Without clip the gradient is linear in the cotangent, and this derivative would be right.
        with pytest.raises(RuntimeError, match=r"clip=\.\.\."):
            torch.autograd.grad(first.sum(), scale)


def test_tangents_raise():
    f = uneven()
    deq = DEQ(TIGHT, IFT(solver=ADJOINT, clip=2.0))
    with forward_ad.dual_level():
        moved = TanhMap(f.w, forward_ad.make_dual(f.x.detach(), torch.ones_like(f.x)))
        with pytest.raises(RuntimeError, match="tangent"):
            deq(moved, f.z0)
        z, _ = deq(f, f.z0)
        g = forward_ad.make_dual(cotangent(f.x), torch.ones_like(f.x))
        with pytest.raises(RuntimeError, match="tangent"):
            torch.autograd.grad(z, f.x, g, create_graph=True)


@pytest.mark.parametrize("clip", [0.5, 0, -1.0, float("nan"), "2", True])
def test_a_bound_that_is_none_is_refused(clip):
    with pytest.raises(ValueError, match="clip bounds"):
        IFT(clip=clip)


def test_it_prints_as_the_call_that_made_it():
    assert repr(IFT(clip=10.0)) == "IFT(clip=10.0)"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert IFT().replace(clip=3).clip == 3
