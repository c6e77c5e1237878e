"""Roots and minima and their derivatives, against closed forms and finite differences, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.functional import softplus

from tests.problems import F64
from torchdeq import (
    CG,
    GMRES,
    Anderson,
    ConvergenceError,
    ConvergenceWarning,
    CouplingWarning,
    NewtonCG,
    fixed_point,
    implicit_minimum,
    implicit_root,
)
from torchdeq.implicit import NewtonRoot

GENERATOR = torch.Generator().manual_seed(11)


def normal(*shape):
    return torch.randn(*shape, dtype=F64, generator=GENERATOR)


# Roots --------------------------------------------------------------------------------------------------


def cubic(y, a, b):
    """Each equation has one real root, and all are coupled: y³ + y + A y = b, A skew."""
    return y**3 + y + (a - a.mT) @ y - b


A, B = normal(3, 3), normal(3)


def root(a, b, **options):
    return implicit_root(cubic, torch.zeros_like(B), a, b, **options)


def test_the_derivative_of_a_root_is_that_of_the_implicit_function_theorem():
    y = root(A, B)
    assert cubic(y, A, B).norm() < 4e-11
    slope = jacrev(cubic)(y, A, B)
    for mode in (jacrev, jacfwd):
        da, db = mode(root, (0, 1))(A, B)
        assert torch.allclose(db, torch.linalg.inv(slope), atol=1e-9)
        partial = jacrev(cubic, 1)(y, A, B).reshape(3, 9)
        assert torch.allclose(da.reshape(3, 9), -torch.linalg.solve(slope, partial), atol=1e-9)


def test_gradcheck_of_a_root():
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    assert gradcheck(root, (a, b), check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(root, (a, b), check_fwd_over_rev=True, fast_mode=True)


def test_derivatives_of_a_root_in_one_dimension_to_third_order():
    """y³ = a: y = a^⅓."""
    solve = lambda a: implicit_root(lambda y, a: y**3 - a, torch.ones_like(a), a)  # noqa: E731
    a = torch.tensor([2.0, 8.0], dtype=F64)
    orders = [solve, grad(solve), hessian(solve), jacfwd(hessian(solve))]
    want = [a ** (1 / 3), a ** (-2 / 3) / 3, -2 / 9 * a ** (-5 / 3), 10 / 27 * a ** (-8 / 3)]
    for f, expected in zip(orders, want, strict=True):
        assert torch.allclose(vmap(f)(a), expected, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_newton_does_not_mind_the_scale_of_f(scale):
    """A Picard iteration y − F(y) would blow up, or never move."""
    adapted = NewtonRoot(tol=1e-10 * scale, max_iter=200)
    y, solution = implicit_root(
        lambda y, a, b: scale * cubic(y, a, b), 0 * B, A, B, solver=adapted, return_solution=True
    )
    reference = root(A, B, solver=NewtonRoot(tol=1e-10, max_iter=200), return_solution=True)
    assert torch.allclose(y, reference[0], atol=1e-9)
    assert solution.nfe == reference[1].nfe


def test_a_tree_of_unknowns_with_aux():
    def f(y, a):
        u, v = y["u"], y["v"][0]
        return {"u": u + v.sum() - a, "v": [v * 3 - u.sum()]}, u.sum() * a

    def solve(a):
        y, aux = implicit_root(
            f, {"u": torch.zeros(2, dtype=F64), "v": [torch.zeros(2, dtype=F64)]}, a, has_aux=True
        )
        return y["u"], y["v"][0], aux

    # u + 2v = a, v = 2u/3, so u = 3a/7, v = 2a/7 and aux = 6a²/7.
    a = torch.tensor(2.0, dtype=F64)
    u, v, aux = solve(a)
    assert torch.allclose(torch.cat((u, v)), torch.tensor([3, 3, 2, 2], dtype=F64) * a / 7, atol=1e-10)
    assert torch.allclose(jacrev(solve)(a)[2], 12 * a / 7, atol=1e-10)
    assert torch.allclose(hessian(lambda a: solve(a)[2])(a), torch.tensor(12 / 7, dtype=F64), atol=1e-9)


def test_a_complex_root():
    """y² = c, and dy = dc / 2y."""
    c = torch.tensor([-1.0 + 1.0j, 2.0j], dtype=torch.complex128, requires_grad=True)
    solve = lambda c: implicit_root(lambda y, c: y**2 - c, torch.ones_like(c) + 1j, c)  # noqa: E731
    y = solve(c)
    assert torch.allclose(y**2, c, atol=1e-10)
    (got,) = torch.autograd.grad(y, c, torch.ones_like(y))
    assert torch.allclose(got, (1 / (2 * y)).conj(), atol=1e-10)
    assert gradcheck(solve, c, check_forward_ad=True, fast_mode=True)


def test_mapped_roots_equal_a_loop():
    rows = normal(5, 3)
    got = vmap(lambda b: vjp(lambda a: root(a, b), A)[1](b)[0])(rows)
    want = torch.stack([vjp(lambda a, b=b: root(a, b), A)[1](b)[0] for b in rows])
    assert torch.allclose(got, want, atol=1e-10)


# Minima: quadratic --------------------------------------------------------------------------------------

N = 8
M = normal(N, N)
H = M @ M.mT / N + torch.eye(N, dtype=F64)
RHS = normal(N)


def quadratic(y, h, b):
    return (y @ (h @ y)) / 2 - b @ y


def test_a_quadratic_problem_has_the_closed_gradient_after_n_steps_of_cg():
    """min ½ yᵀHy − bᵀy, L = ½‖y − c‖²: with u = H⁻¹ (y − c), dL/db = u and dL/dH = −½ (u yᵀ + y uᵀ)."""
    seen = []
    c = torch.ones(N, dtype=F64)

    def loss(h, b):
        options = {"solver": NewtonCG(tol=1e-13), "adjoint": CG(tol=1e-12), "on_backward": seen.append}
        y = implicit_minimum(quadratic, torch.zeros_like(b), h, b, **options)
        return (y - c).square().sum() / 2

    dh, db = grad(loss, (0, 1))(H, RHS)
    y = torch.linalg.solve(H, RHS)
    u = torch.linalg.solve(H, y - c)
    assert (db - u).norm() < 1e-10 * u.norm()
    want = -(torch.outer(u, y) + torch.outer(y, u)) / 2
    assert (dh - want).norm() < 1e-10 * want.norm()
    (solve,) = seen
    assert int(solve.nstep) <= N
    assert solve.nfe <= N + 2  # one product finds the scale of the Hessian, and one measures the residual


def test_second_derivatives_of_a_quadratic_problem():
    """y = H⁻¹ b, differentiated twice, in every mode; against torch.linalg.solve."""

    def solved(g):
        return lambda t: g(H + t[0] * torch.eye(N, dtype=F64), t[1] * RHS).sum()

    def minimum(h, b):
        return implicit_minimum(quadratic, torch.zeros_like(b), h, b)

    t = torch.tensor([0.5, 2.0], dtype=F64)
    want = hessian(solved(torch.linalg.solve))(t)
    for second in (
        hessian,
        lambda g: jacrev(jacrev(g)),
        lambda g: jacfwd(jacfwd(g)),
        lambda g: jacrev(jacfwd(g)),
    ):
        assert torch.allclose(second(solved(minimum))(t), want, atol=1e-8)
    a = t.clone().requires_grad_()
    assert gradcheck(solved(minimum), a, check_forward_ad=True)
    assert gradgradcheck(solved(minimum), a, check_fwd_over_rev=True)


# Minima: learning problems ------------------------------------------------------------------------------

DATA, TARGET = normal(20, 4), normal(20)
VALID, ANSWER = normal(10, 4), normal(10)


def test_the_hyper_gradient_of_ridge_regression_is_the_closed_form():
    def objective(w, c):
        return (DATA @ w - TARGET).square().sum() / 2 + c.exp() * w.square().sum() / 2

    def outer(w):
        return (VALID @ w - ANSWER).square().mean()

    def solved(c):
        return outer(implicit_minimum(objective, torch.zeros(4, dtype=F64), c))

    def closed(c):
        return outer(torch.linalg.solve(DATA.mT @ DATA + c.exp() * torch.eye(4, dtype=F64), DATA.mT @ TARGET))

    c = torch.tensor(0.3, dtype=F64)
    for derivative in (grad, hessian, lambda g: grad(grad(grad(g)))):
        assert torch.allclose(derivative(solved)(c), derivative(closed)(c), atol=1e-8)
    several = torch.tensor([-1.0, 0.0, 2.0], dtype=F64)
    assert torch.allclose(vmap(grad(solved))(several), vmap(grad(closed))(several), atol=1e-8)


def logistic(w, theta, x, label):
    margin = label * (x @ w["w"] + w["b"])
    return softplus(-margin).mean() + theta["c"].exp() * (w["w"].square().sum() + w["b"] ** 2) / 2


LABEL = TARGET.sign()
START = {"w": torch.zeros(4, dtype=F64), "b": torch.zeros((), dtype=F64)}


def hyper(c, x, **options):
    w = implicit_minimum(logistic, START, {"c": c}, x, LABEL, **options)
    return softplus(-ANSWER.sign() * (VALID @ w["w"] + w["b"])).mean()


def test_the_hyper_gradient_of_logistic_regression_passes_gradcheck():
    """A tree of weights, a penalty, and each training point as a parameter."""
    c = torch.tensor(-1.0, dtype=F64, requires_grad=True)
    x = DATA.clone().requires_grad_()
    assert gradcheck(hyper, (c, x), check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(hyper, (c, x), check_fwd_over_rev=True, fast_mode=True)


def by_lbfgs(objective, w0, *theta):
    leaves = {name: t.clone().requires_grad_() for name, t in w0.items()}
    optimizer = torch.optim.LBFGS(
        leaves.values(), max_iter=200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = objective(leaves, *theta)
        value.backward()
        return value

    optimizer.step(closure)
    return leaves


def test_a_function_that_minimises_is_measured_and_differentiated():
    c = torch.tensor([-1.0, 0.0], dtype=F64)
    want = hyper(c[0], DATA), grad(hyper)(c[0], DATA), grad(grad(hyper))(c[0], DATA)
    options = {"solver": by_lbfgs, "tol": 1e-10}
    g = lambda c: hyper(c, DATA, **options)  # noqa: E731
    for got, expected in zip((g(c[0]), grad(g)(c[0]), grad(grad(g))(c[0])), want, strict=True):
        assert torch.allclose(got, expected, atol=1e-8)
    mapped = vmap(grad(lambda c, x: hyper(c, x, **options)), (0, None))(c, DATA)  # one call for each instance
    assert torch.allclose(mapped, torch.stack([grad(hyper)(one, DATA) for one in c]), atol=1e-8)


def test_nested_maps_hand_each_instance_of_theta_to_the_function():
    calls = []

    def exact(objective, y0, a, b):
        calls.append((a.item(), tuple(b.tolist())))
        return a * b

    def solve(a, b):
        return implicit_minimum(
            lambda y, a, b: (y - a * b).square().sum(), torch.zeros_like(b), a, b, solver=exact
        )

    a, b = torch.tensor([2.0, 3.0], dtype=F64), normal(3, 2)
    got = vmap(vmap(solve, (None, 1), 0), (0, None))(a, b.mT)  # b is mapped along its last dimension
    assert torch.equal(got, a[:, None, None] * b)
    assert calls == [(p.item(), tuple(q.tolist())) for p in a for q in b]


def test_a_sloppy_function_is_found_out():
    def sloppy(objective, w0, *theta):
        return w0

    c = torch.tensor(0.0, dtype=F64)
    with pytest.warns(ConvergenceWarning, match="norm of the objective's gradient"):
        hyper(c, DATA, solver=sloppy)
    with pytest.raises(ConvergenceError):
        hyper(c, DATA, solver=sloppy, throw=True)
    options = {"solver": sloppy, "tol": 10.0, "return_solution": True}
    solution = implicit_minimum(logistic, START, {"c": c}, DATA, LABEL, **options)[1]
    gradient = grad(logistic)(START, {"c": c}, DATA, LABEL)
    size = torch.cat([t.flatten() for t in gradient.values()]).norm()
    assert torch.allclose(solution.residual, size, atol=1e-14)
    assert bool(solution.converged)


@pytest.mark.parametrize("solver", [Anderson(tol=1e-11, max_iter=200), NewtonCG(tol=1e-11), "multisecant"])
def test_any_solver_may_find_the_minimum(solver):
    c = torch.tensor(0.0, dtype=F64)
    atol = 1e-9 if not isinstance(solver, str) else 1e-2
    assert torch.allclose(grad(hyper)(c, DATA, solver=solver), grad(hyper)(c, DATA), atol=atol)


def test_a_batch_of_problems_in_one_state_stops_sample_by_sample():
    """batch_dims=1: the objective is a sum over samples."""
    target = torch.stack((normal(3), 100 * normal(3), torch.zeros(3, dtype=F64)))

    def objective(y, t):
        return (torch.cosh(y) - t * y).sum()

    y, solution = implicit_minimum(
        objective, torch.zeros_like(target), target, batch_dims=1, return_solution=True
    )
    assert torch.allclose(y, torch.asinh(target), atol=1e-9)
    assert solution.nstep.shape == (3,)
    assert solution.nstep[2] == 1
    assert solution.nstep[0] < solution.nstep[1]


def test_meta_learning_steps_through_an_inner_problem():
    """iMAML: the inner problem is tied to the initial weights, which are what is learned."""
    task_x, task_y = normal(3, 5, 2), normal(3, 5)

    def loss(w0, x, y):
        def inner(w, w0):
            return (x @ w - y).square().mean() + (w - w0).square().sum() / 2

        return (x @ implicit_minimum(inner, torch.zeros_like(w0), w0) - y).square().mean()

    def closed(w0, x, y):
        h = 2 * x.mT @ x / 5 + torch.eye(2, dtype=F64)
        return (x @ torch.linalg.solve(h, 2 * x.mT @ y / 5 + w0) - y).square().mean()

    w0 = normal(2)
    with pytest.raises(RuntimeError, match="Pass the tensor in theta"):
        vmap(loss, (None, 0, 0))(w0, task_x, task_y)  # the inner objective closes over each task

    def proper(w0, x, y):
        def inner(w, w0, x, y):
            return (x @ w - y).square().mean() + (w - w0).square().sum() / 2

        return (x @ implicit_minimum(inner, torch.zeros_like(w0), w0, x, y) - y).square().mean()

    total = lambda g: lambda w0: vmap(g, (None, 0, 0))(w0, task_x, task_y).mean()  # noqa: E731
    assert torch.allclose(grad(total(proper))(w0), grad(total(closed))(w0), atol=1e-9)
    assert torch.allclose(hessian(total(proper))(w0), hessian(total(closed))(w0), atol=1e-8)


@pytest.mark.parametrize(
    "second",
    [hessian, lambda g: jacrev(jacrev(g)), lambda g: jacfwd(jacfwd(g))],
    ids=["hessian", "reverse", "forward"],
)
def test_an_objective_may_hold_an_equilibrium(second):
    """Its gradient is taken by a transform of its own, which has ended when the outer derivatives are made."""

    def unrolled(f, z, y):
        for _ in range(60):
            z = f(z, y)
        return z

    def outer(solve):
        def objective(y, c):
            z = solve(lambda z, y: torch.tanh(z) / 2 + y, torch.zeros_like(y), y)
            return (z - c).square().sum() + y.square().sum() / 10

        return lambda c: implicit_minimum(objective, torch.zeros_like(c), c).square().sum()

    c = torch.tensor([0.5, 1.0], dtype=F64)
    solved = lambda f, z, y: fixed_point(f, z, y, solver=Anderson(tol=1e-13), adjoint=GMRES(tol=1e-12))  # noqa: E731
    assert torch.allclose(second(outer(solved))(c), second(outer(unrolled))(c), atol=1e-8)


# No minimum ---------------------------------------------------------------------------------------------


def double_well(y, a):
    return (y**4 / 4 - a * y**2 / 2).sum()


ONE = torch.tensor(1.0, dtype=F64)


@pytest.mark.parametrize("start", [0.0, [0.0, 1.0]])
def test_a_stationary_point_that_is_no_minimum_is_reported(start):
    """At a maximum and at a saddle no solver moves: the gradient is zero there."""
    y0 = torch.tensor(start, dtype=F64)
    with pytest.warns(ConvergenceWarning, match="a saddle or a maximum"):
        y, solution = implicit_minimum(double_well, y0, ONE, return_solution=True)
    assert torch.equal(y, y0)
    assert not bool(solution.converged)
    assert float(solution.residual) == 0.0
    with pytest.raises(ConvergenceError, match="saddle"):
        implicit_minimum(double_well, y0, ONE, throw=True)
    with pytest.raises(ConvergenceError, match="saddle"):
        implicit_minimum(double_well, y0, ONE, solver=lambda objective, y0, a: y0, throw=True)


def test_without_a_look_the_backward_solve_still_reports_a_maximum():
    a = ONE.clone().requires_grad_()
    y = implicit_minimum(double_well, torch.zeros(2, dtype=F64), a, probes=0)
    with pytest.warns(ConvergenceWarning, match="singular or curves down"):
        y.sum().backward()


def test_from_beside_a_maximum_one_arrives_at_a_minimum():
    y0 = torch.tensor([1e-6, -0.1, 0.3], dtype=F64)
    a = torch.tensor(4.0, dtype=F64)
    y = implicit_minimum(double_well, y0, a)
    assert torch.allclose(y, 2 * y0.sign(), atol=1e-10)
    slope = jacrev(lambda a: implicit_minimum(double_well, y0, a))(a)  # y = ±√a
    assert torch.allclose(slope, y0.sign() / 4, atol=1e-10)


def test_each_mapped_instance_is_looked_at():
    starts = torch.tensor([0.0, 0.5, -3.0], dtype=F64)
    with pytest.warns(ConvergenceWarning, match="1 of 3"):
        converged = vmap(
            lambda y0: implicit_minimum(double_well, y0, ONE, return_solution=True)[1].converged
        )(starts)
    assert converged.flatten().tolist() == [False, True, True]


def test_a_flat_direction_is_no_saddle():
    """A least-squares problem with more unknowns than equations: nothing curves down."""
    x = normal(3, 6)
    y, solution = implicit_minimum(
        lambda y, t: (x @ y - t).square().sum(), torch.zeros(6, dtype=F64), TARGET[:3], return_solution=True
    )
    assert bool(solution.converged)
    assert torch.allclose(x @ y, TARGET[:3], atol=1e-9)


# Modes and errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_derivatives(mode):
    with mode():
        c = torch.tensor(0.0, dtype=F64) * 1
        value, y = hyper(c, DATA * 1), root(A * 1, B)
    assert torch.allclose(value, hyper(torch.tensor(0.0, dtype=F64), DATA))
    assert torch.allclose(y, root(A, B))
    assert not value.requires_grad


def test_forward_mode_of_a_minimum():
    t = torch.tensor([0.5, 2.0], dtype=F64)
    g = lambda t: implicit_minimum(quadratic, torch.zeros(N, dtype=F64), H * t[0], RHS * t[1])  # noqa: E731
    y, dy = jvp(g, (t,), (torch.ones_like(t),))
    assert torch.allclose(dy, y / t[1] - y / t[0], atol=1e-9)


def test_errors_teach():
    y0 = torch.zeros(2, dtype=F64)
    w = torch.ones(2, dtype=F64, requires_grad=True)
    square = lambda y: y.square().sum()  # noqa: E731
    cases = [
        (lambda: implicit_root(lambda y: y.sum(), y0), ValueError, "F returned shape"),
        (lambda: implicit_root(lambda y: y - w, y0), RuntimeError, "Pass the tensor in theta"),
        (lambda: implicit_root(0.0, y0), TypeError, "implicit_root takes a callable"),
        (lambda: implicit_root(torch.cos, y0, adjoint=3), TypeError, "adjoint=3"),
        (lambda: implicit_minimum(torch.square, y0), TypeError, r"shape \(2,\)"),
        (lambda: implicit_minimum(lambda y: (y.sum(), 1), y0), TypeError, "has_aux=True"),
        (lambda: implicit_minimum(lambda y: 1.0, y0), TypeError, "returned float"),
        (
            lambda: implicit_minimum(lambda y: (y - w).square().sum(), y0),
            RuntimeError,
            "Pass the tensor in theta",
        ),
        (lambda: implicit_minimum(square, y0, solver=3), TypeError, "a function"),
        (lambda: implicit_minimum(square, y0, tol=1e-3), ValueError, "solver that is a function"),
        (lambda: implicit_minimum(square, y0, probes=-1), ValueError, "probes=-1"),
        (lambda: implicit_minimum(square, y0, batch_dims=-1), ValueError, "expected 0, 1 or 2"),
        (
            lambda: implicit_minimum(square, y0, solver=lambda f, y: [y]),
            TypeError,
            "solver returned the structure",
        ),
        (lambda: implicit_minimum(square, y0, solver="cg"), TypeError, "affine maps"),
    ]
    for call, kind, text in cases:
        with pytest.raises(kind, match=text):
            call()


def test_a_saddle_is_differentiated_by_gmres_on_request():
    """½y₀² − ½y₁² + a·y: y = (−a₀, a₁)."""
    a = torch.tensor([1.0, 2.0], dtype=F64)
    saddle = lambda y, a: (y[0] ** 2 - y[1] ** 2) / 2 + a @ y  # noqa: E731
    exact = lambda objective, y0, a: torch.stack((-a[0], a[1]))  # noqa: E731
    g = lambda a: implicit_minimum(saddle, 0 * a, a, solver=exact, adjoint=GMRES(tol=1e-12), probes=0)  # noqa: E731
    assert torch.allclose(jacrev(g)(a), torch.diag(torch.tensor([-1.0, 1.0], dtype=F64)), atol=1e-12)


# Scale --------------------------------------------------------------------------------------------------


def bowl(y, t, w):
    """Of condition about 5, and no quadratic."""
    d = torch.tensor([1.0, 2.0, 5.0]).to(y)
    return w * ((d * (y - t) ** 2).sum() / 2 + 0.05 * (y**4).sum())


def test_a_gradient_that_is_small_beside_y_is_not_lost_in_it():
    """y − ∇φ(y) is y itself in float32, also where ∇φ is a tenth of what it is at 0; and the residual is that of φ."""
    target = 1000.0 + torch.randn(2000, generator=GENERATOR)
    objective = lambda y, t: (y - t).square().mean()  # noqa: E731
    y, solution = implicit_minimum(objective, target + 0.1, target, return_solution=True)
    assert (y - target).abs().max() < 1000 * 2.4e-5
    assert torch.allclose(solution.abs_residual[0], grad(objective)(y, target).norm())
    plain = Anderson(tol=1e-7)  # sees y − ∇φ(y), which does not move
    with pytest.warns(ConvergenceWarning, match="norm of the objective's gradient"):
        y, solution = implicit_minimum(objective, target + 0.1, target, solver=plain, return_solution=True)
    assert torch.allclose(solution.residual[0], grad(objective)(y, target).norm())
    assert solution.residual > 1e-3

    with pytest.warns(ConvergenceWarning, match="no root"):
        solution = implicit_root(
            lambda y: 1e-5 * (y - 1234.0), torch.full((4,), 1233.0), solver=plain, return_solution=True
        )[1]
    assert torch.allclose(solution.residual, torch.tensor(2e-5))  # ‖1e-5 (−1, −1, −1, −1)‖, and above 1e-7 …


@pytest.mark.parametrize(
    ("dtype", "weights"), [(torch.float32, (1e-8, 1e-4, 1e8)), (F64, (1e-12, 1e-6, 1e12))], ids=str
)
def test_derivatives_and_stop_tests_do_not_depend_on_the_scale(dtype, weights):
    """dy/dt = d / (d + 0.6 y²), to some units of rounding times the condition; second derivatives as for w = 1."""
    t = torch.tensor([0.5, 2.0, 3.0], dtype=dtype)
    eps, residuals = torch.finfo(dtype).eps, []

    seen = {"on_backward": lambda s: residuals.append(float(s.residual.max()))}

    def minimum(t, w, **options):
        options = {"adjoint": CG(tol=4 * eps), **seen, **options}
        return implicit_minimum(bowl, torch.ones_like(t), t, w, **options)

    def zero(t, w):
        return implicit_root(grad(bowl), torch.ones_like(t), t, w, adjoint=GMRES(tol=4 * eps))

    def slope(y):
        d = torch.tensor([1.0, 2.0, 5.0], dtype=dtype)
        return (d / (d + 0.6 * y**2)).diag()

    one = torch.ones((), dtype=dtype)
    want, solution = minimum(t, one, return_solution=True)
    bend = hessian(lambda t: minimum(t, one).sum())(t)
    for w in weights:
        y, got = minimum(t, one * w, return_solution=True)
        assert bool(got.converged)
        assert got.nfe == solution.nfe
        assert torch.allclose(y, want, rtol=100 * eps)
        for solve in (minimum, zero):
            for mode in (jacrev, jacfwd):
                jacobian = mode(solve)(t, one * w)
                assert torch.allclose(jacobian, slope(solve(t, one * w)), rtol=0, atol=100 * eps)
        again = hessian(lambda t: minimum(t, one * w).sum())(t)  # noqa: B023 - called at once
        assert torch.allclose(again, bend, rtol=0, atol=200 * eps)
    assert max(residuals) < 10 * eps
    scaled = torch.tensor(weights, dtype=dtype)
    each = vmap(lambda w: jacrev(minimum)(t, w))(scaled)  # each instance at a scale of its own
    assert torch.allclose(each, slope(want).expand_as(each), rtol=0, atol=100 * eps)


def test_an_adjoint_solver_that_minds_the_scale_sees_one_of_size_one():
    """Picard iteration on u = (I − sH) u + s g; for w = 1e-9 that on I − H would take 1e10 products."""
    t = torch.tensor([0.5, 2.0, 3.0], dtype=F64)
    for w in (1e-9, 1e9):
        w = torch.tensor(w, dtype=F64)
        solve = lambda t, w=w, **o: implicit_minimum(bowl, torch.ones_like(t), t, w, **o)  # noqa: E731
        got = jacrev(lambda t, solve=solve: solve(t, adjoint=Anderson(tol=1e-12, max_iter=200)))(t)
        assert torch.allclose(got, jacrev(solve)(t), atol=1e-10)


@pytest.mark.parametrize(("dtype", "below"), [(torch.float32, 3e-4), (F64, 1e-8)], ids=str)
@pytest.mark.parametrize("scale", [1e-7, 1.0])
def test_a_curvature_that_is_barely_negative_is_seen(dtype, below, scale):
    def objective(y, c):
        return scale * (y[0] ** 2 + c * y[1] ** 2) / 2

    y0 = torch.zeros(2, dtype=dtype)
    with pytest.warns(ConvergenceWarning, match="a saddle or a maximum"):
        implicit_minimum(objective, y0, torch.tensor(-below, dtype=dtype))
    implicit_minimum(objective, y0, torch.tensor(below, dtype=dtype))
    implicit_minimum(objective, y0, torch.tensor(0.0, dtype=dtype))


def test_a_stiff_saddle_is_seen():
    with pytest.warns(ConvergenceWarning, match="a saddle or a maximum"):
        implicit_minimum(lambda y: (1e6 * y[0] ** 2 - 1e-3 * y[1] ** 2) / 2, torch.zeros(2, dtype=F64))


def test_the_usual_stop_test_knows_no_scale():
    """At 0 the gradient 1e-12 is below any absolute tolerance; at 1e6 its rounding is above that."""
    small = implicit_minimum(lambda y: 1e-11 * ((y - 0.3) ** 2).sum(), torch.zeros(3, dtype=F64))
    assert torch.allclose(small, torch.full_like(small, 0.3), rtol=1e-10)
    target = normal(5)

    def steep(y, t):
        return 1e6 * (torch.cosh(y - t).log() + 0.1 * y**2).sum()

    y, solution = implicit_minimum(steep, torch.zeros_like(target), target, return_solution=True)
    assert bool(solution.converged)
    assert torch.allclose(torch.tanh(y - target) + 0.2 * y, torch.zeros_like(y), atol=1e-10)
    assert solution.nfe < 100
    # From 20 the curvature falls by 2e8 on the way; the test is made with that of the end.
    far = implicit_minimum(lambda y: (torch.cosh(y) - y).sum(), torch.full((2,), 20.0, dtype=F64))
    assert torch.allclose(far, torch.asinh(torch.ones_like(far)), atol=1e-9)
    # The solution 0, from elsewhere, and where the curvature at the start is none.
    zero = implicit_minimum(lambda y: torch.cosh(y).sum(), torch.ones(2, dtype=F64))
    assert zero.abs().max() < 1e-10
    flat = implicit_minimum(lambda y: (y**4 / 4 - y).sum(), torch.zeros(2, dtype=F64))
    assert torch.allclose(flat, torch.ones_like(flat), atol=1e-10)
    root = implicit_root(lambda y: 1e-9 * (y**3 + y - 2), torch.zeros(2, dtype=F64))
    assert torch.allclose(root, torch.ones_like(root), atol=1e-10)


def test_a_function_that_minimises_is_measured_at_the_objectives_scale():
    sloppy = lambda objective, y0, t: t + 0.1  # noqa: E731
    objective = lambda y, t: 1e-9 * (y - t).square().sum()  # noqa: E731
    with pytest.warns(ConvergenceWarning, match="norm of the objective's gradient"):
        implicit_minimum(objective, torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64), solver=sloppy)


def test_an_unknown_that_runs_away_does_not_excuse_the_others():
    """y − log y is a number below 0 too if only its gradient is looked at: 1 − 1/y."""
    with pytest.warns(ConvergenceWarning, match="did not converge"):
        implicit_minimum(lambda y: (y - y.log()).sum(), torch.tensor([1e-3, 50.0], dtype=F64))


def test_a_minimum_of_coupled_samples_is_no_saddle():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(12, 12, dtype=torch.float64, generator=generator)
    s, t = a @ a.T / 12 + 0.05 * torch.eye(12, dtype=torch.float64), torch.ones(4, 3, dtype=torch.float64)
    with pytest.warns(CouplingWarning):
        y, solution = implicit_minimum(
            lambda y: y.flatten() @ s @ y.flatten() / 2 - (t * y).sum(),
            torch.zeros(4, 3, dtype=torch.float64),
            batch_dims=1,
            return_solution=True,
        )
    assert torch.allclose(y.flatten(), torch.linalg.solve(s, t.flatten()), atol=1e-8)
    assert solution.converged.all()


@pytest.mark.parametrize("shape", [(3,), (3, 2, 1)])
def test_a_function_of_the_users_may_find_a_state_of_any_shape(shape):
    a = torch.arange(1.0, 1 + math.prod(shape), dtype=F64).reshape(shape).requires_grad_()
    square = lambda y, a: (y - a**2).square().sum()  # noqa: E731
    exact = lambda objective, y0, a: a.detach() ** 2  # noqa: E731
    y = implicit_minimum(square, torch.zeros(shape, dtype=F64), a, solver=exact, batch_dims=1)
    (g,) = torch.autograd.grad(y.sum(), a)
    assert torch.allclose(g, 2 * a.detach(), atol=1e-8)
