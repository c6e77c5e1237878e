"""fixed_point under every transform, against an unrolled loop, gradcheck and dense solves, in float64."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from tests.problems import F64, random_matrix
from torchdeq import (
    DEQ,
    GMRES,
    IFT,
    Anderson,
    Broyden,
    ConvergenceError,
    ConvergenceWarning,
    FixedPointIteration,
    Multisecant,
    Neumann,
    NewtonKrylov,
    as_solver,
    fixed_point,
)

GENERATOR = torch.Generator().manual_seed(3)
W = random_matrix(3, 0.4, seed=1)
X = torch.randn(4, 3, dtype=F64, generator=GENERATOR)
TIGHT = {"solver": Multisecant(tol=1e-14, max_iter=100), "adjoint": GMRES(tol=1e-13)}


def tanh_map(z, w, x):
    return torch.tanh(z @ w.mT + x)


def zeros_of(x):
    return torch.zeros(x.shape, dtype=F64)


# Problems, each a map of (w, x) with a real vector as result: solved, and as a plain loop -----------------


def vector(solve):
    return lambda w, x: solve(tanh_map, zeros_of(x), w, x)


def batch(solve):
    return lambda w, x: solve(
        tanh_map, torch.zeros(2, 3, dtype=F64), w, torch.stack((x, -2 * x)), batch_dims=1
    )


def tree(solve):
    def f(z, theta, x):
        a, b = z["a"], z["b"][0]
        return {"a": torch.sin(theta["w"] @ a + b.sum()) / 2, "b": (torch.cos(b * x[:2]) / 2 + a[:2] / 4,)}

    def solved(w, x):
        z = solve(f, {"a": zeros_of(x), "b": (torch.zeros(2, dtype=F64),)}, {"w": w, "unused": [w]}, x)
        return torch.cat((z["a"], *z["b"]))

    return solved


def complex_state(solve):
    """Not holomorphic, with a complex parameter."""

    def f(z, c, x):
        return c @ z.conj() + x * torch.cos(z.abs()) / 2 + 0.3j

    def solved(w, x):
        z = solve(f, torch.zeros(3, dtype=torch.complex128) + 0.1, torch.complex(w, w.mT) / 2, x)
        return torch.view_as_real(z).flatten()

    return solved


def implicit(f, z0, *theta, **options):
    return fixed_point(f, z0, *theta, **options, **TIGHT)


def unrolled(f, z0, *theta, batch_dims=0, steps=45):
    z = z0
    for _ in range(steps):  # the maps contract by a half or more
        z = f(z, *theta)
    return z


PROBLEMS = [vector, batch, tree, complex_state]
BOTH = (0, 1)


def square(g):
    return lambda *a: g(*a).square().sum()


def tangents(w, x):
    return torch.cos(w), torch.sin(x)


TRANSFORMS = {
    "value": lambda g: g,
    "grad": lambda g: grad(square(g), BOTH),
    "vjp": lambda g: lambda w, x: vjp(g, w, x)[1](torch.ones_like(g(w, x).detach())),
    "jvp": lambda g: lambda w, x: jvp(g, (w, x), tangents(w, x)),
    "jacrev": lambda g: jacrev(g, BOTH),
    "jacfwd": lambda g: jacfwd(g, BOTH),
    "hessian": lambda g: hessian(g, BOTH),
    "jacrev of jacrev": lambda g: jacrev(jacrev(g, BOTH), BOTH),
    "jacfwd of jacfwd": lambda g: jacfwd(jacfwd(g, BOTH), BOTH),
    "jacrev of jacfwd": lambda g: jacrev(jacfwd(g, BOTH), BOTH),
    "jvp of grad": lambda g: lambda w, x: jvp(grad(square(g), BOTH), (w, x), tangents(w, x)),
    "third order": lambda g: lambda w, x: grad(lambda x: hessian(square(g), 1)(w, x).sin().sum())(x),
    "third order, forward": lambda g: lambda w, x: jacfwd(jacfwd(jacfwd(g, 1), 1), 1)(w, x),
    "vmap over x": lambda g: lambda w, x: vmap(g, (None, 0))(w, X),
    "vmap over w": lambda g: lambda w, x: vmap(g, (2, None))(torch.stack((w, w.mT, -w), 2), x),
    "vmap over both": lambda g: lambda w, x: vmap(g)(torch.stack((w, w.mT)), X[:2]),
    "nested vmap": lambda g: lambda w, x: vmap(lambda w: vmap(lambda x: g(w, x))(X))(torch.stack((w, w.mT))),
    "vmap of grad": lambda g: lambda w, x: vmap(grad(square(g), BOTH), (None, 0))(w, X),
    "vmap of jacrev": lambda g: lambda w, x: vmap(jacrev(g, BOTH), (None, 0))(w, X),
    "vmap of jacfwd": lambda g: lambda w, x: vmap(jacfwd(g, BOTH), (None, 0))(w, X),
    "vmap of hessian": lambda g: lambda w, x: vmap(hessian(square(g), BOTH), (None, 0))(w, X),
    "grad of vmap": lambda g: lambda w, x: grad(lambda w: vmap(g, (None, 0))(w, X).square().sum())(w),
    "jvp of vmap": lambda g: lambda w, x: jvp(lambda w: vmap(g, (None, 0))(w, X), (w,), (w.cos(),)),
    "hessian of vmap": lambda g: (
        lambda w, x: hessian(lambda w: vmap(g, (None, 0))(w, X[:2]).square().sum())(w)
    ),
    "grad of vmap of grad": lambda g: (
        lambda w, x: grad(lambda w: vmap(grad(square(g), 1), (None, 0))(w, X).square().sum())(w)
    ),
}


def largest_gap(a, b):
    a, b = (torch.utils._pytree.tree_leaves(t) for t in (a, b))
    return max(float((p - q).detach().abs().max()) for p, q in zip(a, b, strict=True))


# The other states differ from a vector only in how they come in and go out, whatever the order.
FOR_ALL = (
    "vjp",
    "jvp",
    "hessian",
    "jacfwd of jacfwd",
    "nested vmap",
    "vmap of hessian",
    "grad of vmap of grad",
)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        pytest.param(name, problem, id=f"{name}, {problem.__name__}")
        for name in TRANSFORMS
        for problem in (PROBLEMS if name in FOR_ALL else PROBLEMS[:1])
    ],
)
def test_every_transform_agrees_with_the_unrolled_loop(name, problem):
    transform = TRANSFORMS[name]
    got, want = (transform(problem(solve))(W, X[0]) for solve in (implicit, unrolled))
    assert largest_gap(got, want) < 1e-8


# Autograd -----------------------------------------------------------------------------------------------


SOLVERS = {
    "picard": FixedPointIteration(tol=1e-14, max_iter=200),
    "anderson": Anderson(tol=1e-14, max_iter=200),
    "broyden": Broyden(tol=1e-14, max_iter=200),
}
ADJOINTS = {
    "gmres": GMRES(tol=1e-13),
    "anderson": Anderson(tol=1e-13, max_iter=200),
    "neumann": Neumann(tol=1e-13, max_iter=200),
}


def third_derivative(solve):
    """d³/ds³ of a loss at x + s, by reverse mode three times over."""
    s = torch.zeros((), dtype=F64, requires_grad=True)
    value = solve(W, X[0] + s).square().sum()
    for order in range(3):
        (value,) = torch.autograd.grad(value, s, create_graph=order < 2)
    return value


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_gradcheck_gradgradcheck_and_third_order(solver, adjoint):
    """Reverse over reverse and forward over reverse against differences; third order against the loop."""
    options = {"solver": SOLVERS[solver], "adjoint": ADJOINTS[adjoint]}
    w, x = W.clone().requires_grad_(), X[0].clone().requires_grad_()

    def solve(w, x):
        return fixed_point(tanh_map, zeros_of(x), w, x, **options)

    assert gradcheck(solve, (w, x), check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(solve, (w, x), check_fwd_over_rev=True, fast_mode=True)
    assert abs(third_derivative(solve) - third_derivative(vector(unrolled))) < 1e-8


def test_gradcheck_with_the_default_solvers():
    """A tolerance of 3.7e-11 is what the differences of gradcheck, of 1e-6, allow."""
    w, x = W.clone().requires_grad_(), X[:2].clone().requires_grad_()

    def solve(w, x):
        return fixed_point(tanh_map, torch.zeros(2, 3, dtype=F64), w, x)

    assert gradcheck(solve, (w, x), check_forward_ad=True)
    assert gradgradcheck(solve, (w, x), check_fwd_over_rev=True, fast_mode=True)


def test_a_complex_state_passes_gradcheck():
    c = torch.complex(W, W.mT).div(2).requires_grad_()
    x = torch.complex(X[0], X[1]).requires_grad_()

    def solve(c, x):
        return implicit(lambda z, c, x: c @ z.conj() + torch.cos(z.abs()) / 3 + x, torch.zeros_like(x), c, x)

    assert gradcheck(solve, (c, x), check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(solve, (c, x), check_fwd_over_rev=True, fast_mode=True)


def test_backward_of_a_vmap_and_of_its_gradient():
    """The graph below torch.func is autograd's own."""
    w, x = W.clone().requires_grad_(), X.clone().requires_grad_()
    mapped = vmap(vector(implicit), (None, 0))
    assert gradcheck(mapped, (w, x), check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(mapped, (w, x), check_fwd_over_rev=True, fast_mode=True)
    assert gradcheck(vmap(grad(square(vector(implicit))), (None, 0)), (w, x), fast_mode=True)


def test_forward_and_reverse_mode_are_adjoint():
    """⟨w, J v⟩ = ⟨Jᵀ w, v⟩ for the Jacobian of θ ↦ z*."""
    g = vector(implicit)
    direction = (W.cos(), X[1])
    z, v = jvp(g, (W, X[0]), direction)
    cotangent = z.exp()
    pulled = vjp(g, W, X[0])[1](cotangent)
    left, right = (cotangent * v).sum(), sum((a * b).sum() for a, b in zip(pulled, direction, strict=True))
    assert abs(left - right) < 1e-10 * abs(left)


def test_a_vjp_that_is_called_after_its_transform_has_ended():
    z, pull = vjp(vector(implicit), W, X[0])
    want = vjp(vector(unrolled), W, X[0])[1](z.detach())
    assert largest_gap(pull(z.detach()), want) < 1e-10


def test_duals_of_forward_ad():
    want = jvp(vector(unrolled), (W, X[0]), tangents(W, X[0]))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(p, t) for p, t in zip((W, X[0]), tangents(W, X[0]), strict=True)]
        got = forward_ad.unpack_dual(vector(implicit)(*duals))
    assert largest_gap(tuple(got), want) < 1e-10


def nested(solve):
    """An equilibrium in every evaluation of another."""

    def inner(y, z, w):
        return torch.tanh(w @ y / 4 + z)

    def outer(z, w, x):
        return torch.sin(solve(inner, torch.zeros_like(z), z, w)) / 4 + x / 3

    return lambda w, x: solve(outer, zeros_of(x), w, x)


@pytest.mark.parametrize("name", ["jacrev", "jvp of grad", "vmap of grad"])
def test_an_equilibrium_within_another(name):
    transform = TRANSFORMS[name]
    loop = functools.partial(unrolled, steps=20)  # these contract by a quarter
    got, want = (transform(nested(solve))(W, X[0]) for solve in (implicit, loop))
    assert largest_gap(got, want) < 1e-8


def test_the_gradient_is_that_of_deq():
    x = X.clone().requires_grad_()
    w = W.clone().requires_grad_()
    z, _ = DEQ(TIGHT["solver"], IFT(solver=TIGHT["adjoint"]))(
        lambda z: tanh_map(z, w, x), torch.zeros_like(X)
    )
    got = fixed_point(tanh_map, torch.zeros_like(X), w, x, batch_dims=1, **TIGHT)
    want = torch.autograd.grad(z.cos().sum(), (w, x))
    assert largest_gap(torch.autograd.grad(got.cos().sum(), (w, x)), want) < 1e-11


# What theta may hold ------------------------------------------------------------------------------------


def test_theta_holds_tensors_of_all_kinds_and_other_things():
    def f(z, w, index, *, flag=None):
        a, on, nothing, name = w["a"], w["on"], w["nothing"], w["name"]
        assert nothing is None
        assert name == "cos"
        assert on is True
        return torch.cos(z) * a.index_select(0, index).sum() / 4 * w["mask"]

    a = X[0].clone().requires_grad_()
    frozen = torch.tensor(0.9, dtype=F64)

    def theta(a):
        return {
            "a": a,
            "on": True,
            "nothing": None,
            "name": "cos",
            "mask": torch.tensor([True]),
            "frozen": frozen,
        }

    index = torch.tensor([0, 2])
    z = fixed_point(f, torch.zeros(1, dtype=F64), theta(a), index, **TIGHT)
    (got,) = torch.autograd.grad(z.sum(), a)
    s = a[0].item() + a[2].item()
    slope = torch.cos(z).item() / 4 / (1 + s / 4 * torch.sin(z).item())  # dz = (cos z/4) ds − (s/4) sin z dz
    assert torch.allclose(got, torch.tensor([slope, 0.0, slope], dtype=F64), atol=1e-12)
    rows = vmap(
        lambda i: grad(lambda a: fixed_point(f, torch.zeros(1, dtype=F64), theta(a), i).sum())(a.detach())
    )
    assert torch.allclose(rows(index[None])[0], got, atol=1e-9)


def test_a_frozen_parameter_gets_no_gradient_and_costs_nothing():
    x = X[0].clone().requires_grad_()
    z = implicit(tanh_map, zeros_of(x), W, x)
    z.sum().backward()
    assert W.grad is None
    assert largest_gap(x.grad, grad(lambda x: unrolled(tanh_map, zeros_of(x), W, x).sum())(X[0])) < 1e-10


def test_f_that_does_not_depend_on_z_or_on_theta():
    a = X[0].clone().requires_grad_()
    z0 = torch.zeros_like(X[0])
    assert gradcheck(lambda a: fixed_point(lambda z, a: a.sin(), z0, a), a, check_forward_ad=True)
    assert gradgradcheck(lambda a: fixed_point(lambda z, a: a.sin(), z0, a), a, check_fwd_over_rev=True)
    independent = lambda a: fixed_point(lambda z, a: torch.cos(z), z0, a).sum()  # noqa: E731
    for derivative in (grad(independent), lambda a: hessian(independent)(a).sum(0)):
        assert not derivative(X[0]).any()


def test_the_start_gets_no_derivative():
    start = X[0].clone().requires_grad_()
    assert not fixed_point(tanh_map, start, W, X[1]).requires_grad
    assert not grad(lambda z0: implicit(tanh_map, z0, W, X[1]).sum())(X[0]).any()
    assert not jvp(lambda z0: implicit(tanh_map, z0, W, X[1]), (X[0],), (X[0],))[1].any()
    assert largest_gap(vmap(lambda z0: implicit(tanh_map, z0, W, X[1]))(X), vector(implicit)(W, X[1])) < 1e-12


def test_parameters_of_a_module_and_per_sample_gradients():
    torch.manual_seed(0)
    layer = nn.Linear(3, 3, dtype=F64)
    parameters = {name: p.detach() / 2 for name, p in layer.named_parameters()}

    def loss(solve):
        def f(z, p, x):
            return torch.tanh(functional_call(layer, p, (z,)) + x)

        return lambda p, x: solve(f, zeros_of(x), p, x).square().sum()

    got, want = (vmap(grad(loss(solve)), (None, 0))(parameters, X) for solve in (implicit, unrolled))
    assert got["weight"].shape == (4, 3, 3)
    assert largest_gap(got, want) < 1e-10


# One system, and instances of it ------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 8])
def test_a_rotation_is_solved_and_differentiated(n):
    """|λ| = 1: plain iteration goes round for ever."""
    angles = torch.linspace(0.7, 2.5, n // 2, dtype=F64)
    blocks = [
        torch.stack((torch.stack((a.cos(), -a.sin())), torch.stack((a.sin(), a.cos())))) for a in angles
    ]
    r, b = torch.block_diag(*blocks), X.flatten()[:n]
    matrix = torch.eye(n, dtype=F64) - r
    solve = lambda b: fixed_point(lambda z, b: r @ z + b, torch.zeros(n, dtype=F64), b)  # noqa: E731
    assert torch.allclose(solve(b), torch.linalg.solve(matrix, b), atol=1e-9)
    inverse = torch.linalg.inv(matrix)
    assert torch.allclose(jacrev(solve)(b), inverse, atol=1e-9)
    assert torch.allclose(jacfwd(solve)(b), inverse, atol=1e-9)


def test_mapped_instances_stop_by_themselves_and_equal_a_loop_over_them():
    x = torch.cat((X, torch.zeros(1, 3, dtype=F64), 20 * X[:1]))

    def solve(x):
        z, solution = fixed_point(tanh_map, zeros_of(x), W, x, return_solution=True)
        return z, solution.nstep, solution.residual, solution.converged, solution.z

    got = vmap(solve)(x)
    want = [torch.stack(column) for column in zip(*map(solve, x), strict=True)]
    assert got[1].shape == (6, 1)
    assert len(set(got[1].flatten().tolist())) >= 3  # tanh(0) needs one evaluation, a saturated one few
    assert torch.equal(got[1], want[1])
    assert largest_gap(got[0], want[0]) < 1e-12
    assert torch.equal(got[0], got[4])
    assert bool(got[3].all())
    residual = torch.linalg.vector_norm(tanh_map(got[0], W, x) - got[0], dim=1) / got[0].norm(
        dim=1
    ).clamp_min(1e-9)
    assert torch.allclose(got[2][:, 0], residual, atol=1e-14)


def test_the_solution_has_the_shapes_of_one_instance_under_vmap():
    def figures(x):
        z, s = fixed_point(tanh_map, torch.zeros(2, 3, dtype=F64), W, x, batch_dims=1, return_solution=True)
        return s.z, s.status, s.nstep, s.abs_residual, s.rel_residual, s.trace

    single = figures(X[:2])
    mapped = vmap(figures)(torch.stack((X[:2], X[2:], X[1:3])))
    nested = vmap(vmap(figures))(X[None, None, :2].expand(5, 3, 2, 3))
    assert [t.shape[1:] for t in mapped[:5]] == [t.shape for t in single[:5]]
    assert [t.shape[2:] for t in nested] == [
        t.shape for t in single
    ]  # the same instance, so the same trace too
    assert torch.equal(nested[5][4, 2], single[5])
    for i, rows in enumerate((X[:2], X[2:], X[1:3])):
        assert torch.equal(mapped[2][i], figures(rows)[2])
    steps = grad(
        lambda w: (lambda r: (r[0].sum(), r[1].nstep))(
            fixed_point(tanh_map, zeros_of(X), w, X, return_solution=True)
        ),
        has_aux=True,
    )(W)[1]
    assert steps.shape == (1,)


def test_aux_is_that_of_the_solution_with_its_derivatives():
    def f(z, w, x):
        return tanh_map(z, w, x), {"energy": (z * (w @ z)).sum(), "shape": tuple(z.shape)}

    def energy(w):
        z, aux, solution = fixed_point(
            f, zeros_of(X[0]), w, X[0], has_aux=True, return_solution=True, **TIGHT
        )
        assert aux["shape"] == (3,)
        assert bool(solution.converged)
        return aux["energy"]

    def want(w):
        z = vector(unrolled)(w, X[0])
        return (z * (w @ z)).sum()

    assert largest_gap(hessian(energy)(W), hessian(want)(W)) < 1e-8


# Solves -------------------------------------------------------------------------------------------------


def test_the_linear_solves_are_shown_and_counted():
    seen = []
    solve = lambda x: fixed_point(tanh_map, zeros_of(x), W, x, on_backward=seen.append, **TIGHT)  # noqa: E731
    grad(lambda x: solve(x).sum())(X[0])
    assert len(seen) == 1
    hessian(lambda x: solve(x).sum())(X[0])  # the adjoint, the tangents, and the adjoints of the tangents
    assert len(seen) == 4
    assert all(bool(s.converged.all()) for s in seen)
    assert all(s.nfe <= 3 + 1 for s in seen)  # GMRES ends after as many products as unknowns, and measures


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_derivatives_do_not_depend_on_the_scale_of_what_comes_in(scale):
    g = lambda x: fixed_point(tanh_map, zeros_of(x), W, x)  # noqa: E731
    one, other = vjp(g, X[0])[1](X[1])[0], vjp(g, X[0])[1](scale * X[1])[0]
    assert torch.allclose(other / scale, one, rtol=1e-12, atol=0)
    one, other = jvp(g, (X[0],), (X[1],))[1], jvp(g, (X[0],), (scale * X[1],))[1]
    assert torch.allclose(other / scale, one, rtol=1e-12, atol=0)


def test_what_does_not_converge_is_said_once_or_thrown():
    x = X[0].clone().requires_grad_()
    short = {"solver": Anderson(tol=1e-12, max_iter=2)}
    with pytest.warns(ConvergenceWarning, match="2 evaluations") as caught:
        vmap(lambda x: fixed_point(tanh_map, zeros_of(x), W, x, **short))(X)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with pytest.raises(ConvergenceError):
        fixed_point(tanh_map, zeros_of(x), W, x, throw=True, **short)
    adjoint = GMRES(tol=1e-12, max_iter=2)
    with pytest.warns(ConvergenceWarning, match="adjoint") as caught:
        fixed_point(tanh_map, zeros_of(x), W, x, adjoint=adjoint).sum().backward()
    assert len(caught) == 1
    z = fixed_point(tanh_map, zeros_of(x), W, x, adjoint=adjoint, throw=True)
    with pytest.raises(ConvergenceError, match="adjoint"):
        z.sum().backward()
    with pytest.raises(ConvergenceError):
        jvp(lambda x: fixed_point(tanh_map, zeros_of(x), W, x, adjoint=adjoint, throw=True), (X[0],), (X[0],))


def test_solvers_are_objects_or_names():
    want = vector(unrolled)(W, X[0])
    for solver in ("newton_krylov", "broyden", NewtonKrylov(tol=1e-10), as_solver("multisecant", tol=1e-8)):
        options = {"tol": 1e-10} if isinstance(solver, str) else {}
        solver = as_solver(solver, **options)
        got = fixed_point(tanh_map, zeros_of(X[0]), W, X[0], solver=solver, adjoint="bicgstab")
        assert largest_gap(got, want) < 1e-7
    assert largest_gap(fixed_point(tanh_map, zeros_of(X[0]), W, X[0], solver="anderson"), want) < 1e-2


# Modes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [None, "newton_krylov"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_derivatives(mode, solver):
    w = W.clone().requires_grad_()
    with mode():
        z = fixed_point(tanh_map, zeros_of(X[0]), w, X[0] * 1, solver=solver)
        closed = fixed_point(lambda z: tanh_map(z, w, X[0]), zeros_of(X[0]), solver=solver)  # nothing to lose
    assert not z.requires_grad
    assert torch.equal(z, closed)


def test_under_autocast_f_is_in_half_precision_and_the_algebra_is_not():
    torch.manual_seed(0)
    w, x = (torch.randn(32, 32) * 0.1).requires_grad_(), torch.randn(4, 32)
    seen = []

    def f(z, w, x):
        out = nn.functional.linear(z, w)
        seen.append(out.dtype)
        return torch.tanh(out + x)

    def run(w):
        return fixed_point(f, torch.zeros(4, 32), w, x, batch_dims=1)

    (exact,) = torch.autograd.grad(run(w).sum(), w)
    seen.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = run(w)
        assert nn.functional.linear(
            x, w
        ).requires_grad  # no half of w without a graph is left in autocast's cache
        transformed = grad(lambda w: run(w).sum())(w.detach())
    assert z.dtype == torch.float32
    (got,) = torch.autograd.grad(z.sum(), w, create_graph=True)
    assert set(seen) == {torch.bfloat16}
    assert got.dtype == torch.float32
    for g in (got.detach(), transformed):  # bfloat16 has 8 bits
        assert (g - exact).norm() < 0.1 * exact.norm()


def test_random_numbers_are_the_same_in_every_evaluation():
    def f(z, w, x):
        return nn.functional.dropout(tanh_map(z, w, x), 0.4)

    w = W.clone().requires_grad_()
    torch.manual_seed(5)
    z = fixed_point(f, zeros_of(X[0]), w, X[0], **TIGHT)
    after = torch.rand(1)
    (got,) = torch.autograd.grad(z.sum(), w, create_graph=True)
    torch.manual_seed(5)
    mask = nn.functional.dropout(torch.ones(3, dtype=F64), 0.4)
    assert torch.equal(after, torch.rand(1))  # the generator has moved on by one evaluation
    want = lambda w: unrolled(lambda z, w, x: mask * tanh_map(z, w, x), zeros_of(X[0]), w, X[0]).sum()  # noqa: E731
    assert largest_gap(got, grad(want)(W)) < 1e-10
    (second,) = torch.autograd.grad(got.square().sum(), w)
    assert largest_gap(second, grad(lambda w: grad(want)(w).square().sum())(W)) < 1e-9


def test_a_half_precision_state_keeps_its_dtype():
    x = X[0].bfloat16().requires_grad_()
    z = fixed_point(lambda z, x: torch.cos(z) / 2 + x, torch.zeros(3, dtype=torch.bfloat16), x)
    z.sum().backward()
    assert z.dtype == x.grad.dtype == torch.bfloat16
    slope = 1 / (1 + torch.sin(z.double()) / 2)
    assert torch.allclose(x.grad.double(), slope, rtol=2**-5)


# Errors -------------------------------------------------------------------------------------------------


def closed_over(w, x=X[0], solver=None):
    return fixed_point(lambda z, x: tanh_map(z, w, x), zeros_of(x), x, solver=solver)


def test_closing_over_what_wants_a_derivative_is_an_error():
    w = W.clone().requires_grad_()
    layer = nn.Linear(3, 3, dtype=F64)
    lost = [
        lambda: closed_over(w),
        lambda: closed_over(w, solver="newton_krylov"),
        lambda: closed_over(w * 2),
        lambda: fixed_point(lambda z: torch.tanh(layer(z)), zeros_of(X[0])),
        lambda: grad(lambda w: closed_over(w).sum())(W),
        lambda: jvp(closed_over, (W,), (W,)),
        lambda: vmap(closed_over)(torch.stack((W, W))),
        lambda: vmap(lambda x: closed_over(w, x))(X),
        lambda: vmap(lambda w: grad(lambda x: closed_over(w, x).sum())(X[0]))(torch.stack((W, W))),
        lambda: jvp(lambda w: grad(lambda x: closed_over(w, x).sum())(X[0]), (W,), (W,)),
        lambda: grad(lambda w: jvp(lambda x: closed_over(w, x), (X[0],), (X[0],))[1].sum())(W),
        lambda: grad(lambda w: vmap(lambda x: closed_over(w, x))(X).sum())(W),
    ]
    for call in lost:
        with pytest.raises(RuntimeError, match="Pass the tensor in theta"):
            call()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="Pass the tensor in theta"):
        closed_over(forward_ad.make_dual(W, W))


def test_closing_over_a_constant_is_none():
    want = vector(implicit)(W, X[0])
    assert largest_gap(closed_over(W.clone().requires_grad_().detach()), want) < 1e-9
    got, want = (grad(lambda x, g=g: g(W, x).sum())(X[0]) for g in (closed_over, vector(implicit)))
    assert largest_gap(got, want) < 1e-8


@pytest.mark.parametrize("solver", [None, FixedPointIteration(tol=1e-9), Anderson(tol=1e-9)])
@pytest.mark.parametrize("transformed", [False, True])
def test_every_evaluation_of_f_in_the_forward_solve_is_counted(solver, transformed):
    """Under a transform one is made to see what f closes over; otherwise that is the first of the solve."""
    calls = []

    def f(z, x):
        calls.append(1)
        return tanh_map(z, W, x)

    def count(x):
        solution = fixed_point(f, zeros_of(x), x, solver=solver, return_solution=True)[1]
        assert len(calls) == solution.nfe
        return solution.nstep

    (vmap(count) if transformed else count)(X)


def test_errors_teach():
    z0 = zeros_of(X[0])
    cases = [
        (lambda: fixed_point(lambda z: z.sum(), z0), ValueError, "keep the shape of z"),
        (
            lambda: vmap(lambda x: fixed_point(lambda z, x: z.sum() + x.sum(), z0, x))(X),
            ValueError,
            "shape of z",
        ),
        (lambda: fixed_point(lambda z: [z], z0), TypeError, "structure"),
        (lambda: fixed_point(lambda z: z.mul_(0.5), z0), RuntimeError, "in place"),
        (
            lambda: vmap(lambda x: fixed_point(lambda z, x: z.mul_(0.5) + x, z0, x))(X),
            RuntimeError,
            "in place",
        ),
        (lambda: fixed_point(torch.cos, z0, solver="andersen"), ValueError, "Did you mean 'anderson'"),
        (lambda: fixed_point(torch.cos, z0, adjoint=1e-6), TypeError, "adjoint=1e-06"),
        (lambda: fixed_point(torch.cos, z0, solver="gmres"), TypeError, "affine maps"),
        (lambda: fixed_point(torch.cos, z0, batch_dims=3), ValueError, "expected 0, 1 or 2"),
        (lambda: fixed_point(torch.cos, z0, has_aux=True), TypeError, r"\(value, aux\)"),
        (lambda: fixed_point(torch.cos, z0, solver=Anderson(compact=True)), ValueError, "compact=False"),
        (lambda: fixed_point(torch.cos, 0.0), TypeError, "torch.as_tensor"),
        (lambda: fixed_point("cos", z0), TypeError, "callable"),
    ]
    for call, kind, text in cases:
        with pytest.raises(kind, match=text):
            call()


def test_the_old_vmap_of_autograd_is_refused():
    x = X[0].clone().requires_grad_()
    eye = torch.eye(3, dtype=F64)
    solve = lambda x: vector(implicit)(W, x)  # noqa: E731
    jacobian = torch.autograd.functional.jacobian
    for call in (
        lambda: torch.autograd.grad(solve(x), x, eye, is_grads_batched=True),
        lambda: jacobian(solve, X[0], vectorize=True),
        lambda: jacobian(solve, X[0], vectorize=True, strategy="forward-mode"),
    ):
        with pytest.raises(RuntimeError, match="Use torch.func.jacrev"):
            call()
    assert largest_gap(jacobian(solve, X[0]), jacrev(solve)(X[0])) < 1e-12


def test_an_f_that_can_be_differentiated_once_has_first_derivatives_only():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            ctx.save_for_backward(z)
            return z.sin()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return g * ctx.saved_tensors[0].cos()

    x = X[0].clone().requires_grad_()
    z = fixed_point(lambda z, x: Once.apply(z) / 2 + x, zeros_of(x), x, **TIGHT)
    (got,) = torch.autograd.grad(z.sum(), x, create_graph=True)
    assert largest_gap(got, 1 / (1 - torch.cos(z) / 2)) < 1e-11
    with pytest.raises(RuntimeError, match="must itself be differentiable"):
        torch.autograd.grad(got.sum(), x)


def test_nothing_is_warned_of_where_all_converges():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hessian(lambda x: vector(implicit)(W, x).sum())(X[0])


def test_a_solver_by_name_has_the_tolerance_of_the_default():
    z0 = torch.zeros(3, dtype=torch.float64)
    _, by_default = fixed_point(lambda z: torch.cos(z), z0, return_solution=True)
    _, by_name = fixed_point(lambda z: torch.cos(z), z0, solver="anderson", return_solution=True)
    assert (by_name.tol, by_name.stop_mode) == (by_default.tol, by_default.stop_mode)


def test_a_module_in_theta_is_refused_where_its_parameters_would_want_gradients():
    layer, z0 = torch.nn.Linear(2, 2), torch.zeros(2)
    with pytest.raises(TypeError, match="functional_call"):
        fixed_point(lambda z, m: torch.tanh(m(z)), z0, layer)
    with torch.no_grad():
        assert fixed_point(lambda z, m: torch.tanh(0.1 * m(z)), z0, layer).shape == (2,)
