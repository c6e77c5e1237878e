"""CG and CGNR against dense solves and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse.linalg
import torch

from tests.problems import F64, TanhMap, cotangent, error, exact_gradient, random_matrix, solve_exactly
from torchdeq import CG, CGNR, DEQ, GMRES, IFT, AffineMap, Anderson, BiCGSTAB, Neumann, Status

FORMS = pytest.mark.parametrize("hook", [False, True], ids=["function", "hook"])


def make(n, batch=3, gain=0.9, seed=0, symmetric=False):
    a = random_matrix(n, gain, seed)
    if symmetric:  # eigenvalues within ±gain
        values = torch.linspace(-gain, gain, n, dtype=F64)
        q = torch.linalg.qr(a).Q
        a = q * values @ q.T
    b = torch.randn(batch, n, dtype=F64, generator=torch.Generator().manual_seed(seed + 9))
    return a, b, AffineMap(lambda u: u @ a.T, b)


def exact(a, b):
    return torch.linalg.solve(torch.eye(len(a), dtype=F64) - a, b.T).T


# CG --------------------------------------------------------------------------------------------------------


def test_cg_solves_n_unknowns_in_n_products():
    a, b, f = make(12, symmetric=True)
    solution = CG(tol=1e-9).run(f)
    assert solution.converged.all()
    assert solution.nstep.max() <= 12
    assert torch.allclose(solution.z, exact(a, b), atol=1e-7)


def test_cg_has_the_same_iterates_as_scipy():
    a, b, f = make(40, batch=1, symmetric=True, gain=0.98)
    operator, right = np.eye(40) - a.numpy(), b[0].numpy()
    residuals = [np.linalg.norm(right)]
    scipy.sparse.linalg.cg(
        operator, right, rtol=1e-8, callback=lambda x: residuals.append(np.linalg.norm(right - operator @ x))
    )
    assert len(residuals) >= 20
    trace = CG(tol=1e-12, max_iter=60).run(f).trace[:, 0]
    assert np.allclose(trace[:20].numpy(), residuals[:20], rtol=1e-6)


def test_cg_needs_about_as_many_products_as_gmres():
    a, _, f = make(100, symmetric=True, gain=0.99)
    cg, gmres = (
        solver.run(f).nstep for solver in (CG(tol=1e-6, max_iter=200), GMRES(tol=1e-6, max_iter=200))
    )
    # ‖r‖ of CG is that of GMRES over the sine of an angle; both share the rate (√κ − 1)/(√κ + 1).
    assert (gmres <= cg).all()
    assert (cg <= gmres + 5).all()


def test_cg_ends_where_it_sees_that_the_system_is_not_positive_definite():
    a = torch.diag(torch.tensor([2.0, 0.5, 0.2], dtype=F64))  # I − L has the eigenvalue −1
    b = torch.tensor([[1.0, 0.1, 0.1], [0.0, 1.0, 1.0]], dtype=F64)  # the second sample has no part in it
    f = AffineMap(lambda u: u @ a, b)
    solution = CG(tol=1e-10).run(f)
    assert solution.status.tolist() == [Status.STALLED, Status.CONVERGED]
    assert solution.nfe < 10
    assert (solution.residual <= b.norm(dim=1)).all()
    assert CGNR(tol=1e-10).run(f).converged.all(), "as its docstring recommends"


def test_cg_on_a_singular_system_solves_what_can_be_solved():
    a = torch.diag(torch.tensor([1.0, 0.5, 0.2], dtype=F64))
    b = torch.tensor([[0.0, 1.0, 1.0], [1.0, 1.0, 1.0]], dtype=F64)  # in the range, and not
    f = AffineMap(lambda u: u @ a, b)
    solution = CG(tol=1e-10).run(f)
    assert solution.status.tolist() == [Status.CONVERGED, Status.STALLED]
    assert torch.allclose(solution.z[0], torch.tensor([0.0, 2.0, 1.25], dtype=F64))
    assert solution.z.isfinite().all()


def test_cg_does_not_call_a_nonsymmetric_system_solved():
    _, b, f = make(20, gain=0.9)
    solution = CG(tol=1e-8, max_iter=30).run(f)
    r = (f(solution.z) - solution.z).norm(dim=1)
    assert torch.allclose(r, solution.residual, rtol=1e-9)
    assert not solution.converged.any()
    assert (r <= b.norm(dim=1)).all()


def test_an_implicit_gradient_through_a_minimisation():
    """z* = argmin ½ zᵀ H z − xᵀ z as the fixed point of gradient descent; dL/dx = H⁻¹ g, in n products."""
    n, tau = 10, 0.1
    h = random_matrix(n, 1.0)
    h = h @ h.T + torch.eye(n, dtype=F64)
    x = torch.randn(3, n, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    reports = []
    (out,) = IFT(solver=CG(tol=1e-11)).attach(
        lambda z: z - tau * (z @ h - x), torch.linalg.solve(h, x.detach().T).T, on_backward=reports.append
    )
    g = cotangent(x)
    (got,) = torch.autograd.grad(out, [x], g)
    assert error([got], [torch.linalg.solve(h, g.T).T]) < 1e-9
    assert reports[0].nstep.max() <= n


# CGNR ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gain", [0.5, 0.9, 2.0])
def test_cgnr_solves_nonsymmetric_systems(gain):
    a, b, f = make(20, gain=gain, seed=1)
    solution = CGNR(tol=1e-9, max_iter=200).run(f)
    assert solution.converged.all()
    condition = float(torch.linalg.cond(torch.eye(20, dtype=F64) - a))
    assert (solution.z - exact(a, b)).norm() <= 1e-9 * condition * exact(a, b).norm()


def test_cgnr_is_cg_on_the_normal_equations_after_one_step_of_smallest_residual():
    a, b, f = make(30, batch=1)
    operator, right = np.eye(30) - a.numpy(), b[0].numpy()
    image = operator @ right
    first = right * (image @ right) / (image @ image)
    residuals = [np.linalg.norm(right - operator @ first)]
    scipy.sparse.linalg.cg(
        operator.T @ operator, operator.T @ right, x0=first, rtol=1e-9,
        callback=lambda x: residuals.append(np.linalg.norm(right - operator @ x)),
    )  # fmt: skip
    assert len(residuals) >= 12
    trace = CGNR(tol=1e-12, max_iter=80).run(f).trace[:, 0]
    # One product for the first step, then two for each step; the product with the transpose changes no residual.
    assert np.allclose(trace[1:25:2].numpy(), residuals[:12], rtol=1e-6)
    assert torch.equal(trace[2:24:2], trace[1:23:2])


def test_the_residual_of_cgnr_never_grows():
    _, _, f = make(40, gain=1.5)
    trace = CGNR(tol=1e-10, max_iter=80).run(f).trace
    assert (trace[1:] <= trace[:-1] * (1 + 1e-12)).all()


@pytest.mark.parametrize("max_iter", [2, 3, 4, 9])
def test_products_with_the_transpose_count(max_iter):
    a, b, _ = make(12)
    calls = []

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, u):
            calls.append("L")
            return u @ a.T

        @staticmethod
        def backward(ctx, g):
            calls.append("Lᵀ")
            return g @ a

    solution = CGNR(tol=0, max_iter=max_iter).run(AffineMap(Product.apply, b))
    assert len(calls) == solution.nfe == max_iter
    assert calls[:-1] == ["L", "Lᵀ", "L", "Lᵀ", "L", "Lᵀ", "L", "Lᵀ"][: max_iter - 1]
    assert calls[-1] == "L", "the last measures the residual"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_product_with_the_transpose_that_is_not_finite_ends_its_sample(bad):
    a, b, f = make(12)
    calls = []

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, u):
            return u @ a.T

        @staticmethod
        def backward(ctx, g):
            calls.append(1)
            struck = (torch.arange(3)[:, None] == 1) & (len(calls) == 3)
            return torch.where(struck, bad, g @ a)

    solution = CGNR(tol=1e-9, max_iter=100).run(AffineMap(Product.apply, b))
    assert solution.status.tolist() == [Status.CONVERGED, Status.NON_FINITE, Status.CONVERGED]
    assert torch.allclose(solution.z[[0, 2]], exact(a, b)[[0, 2]], atol=1e-7)
    assert solution.nstep[1] == 5, "A, Aᵀ, A, Aᵀ, A"
    assert solution.residual[1] < b[1].norm()


def test_cgnr_on_a_singular_system_gives_the_least_squares_answer_and_ends():
    n = 8
    q, s, v = torch.linalg.svd(random_matrix(n, 1.0))
    s = torch.linspace(1.0, 2.0, n, dtype=F64)
    s[-2:] = 0
    operator = q * s @ v
    a = torch.eye(n, dtype=F64) - operator
    b = torch.randn(3, n, dtype=F64, generator=torch.Generator().manual_seed(2))
    solution = CGNR(tol=1e-10).run(AffineMap(lambda u: u @ a.T, b))
    least = torch.linalg.lstsq(operator, b.T, driver="gelsd").solution.T
    assert torch.allclose(solution.residual, (b - least @ operator.T).norm(dim=1), rtol=1e-8)
    assert (solution.status == Status.STALLED).all()
    assert solution.nfe < 2 * n + 4


@pytest.mark.parametrize("eta", [1e-5, 0.1])
def test_eta_is_the_weight_of_a_regularised_least_squares_problem(eta):
    a, b, f = make(16, gain=1.0)
    solution = CGNR(tol=1e-12, max_iter=200, eta=eta).run(f)
    operator = torch.eye(16, dtype=F64) - a
    normal = operator.T @ operator + eta * torch.eye(16, dtype=F64)
    assert torch.allclose(solution.z, torch.linalg.solve(normal, operator.T @ b.T).T, rtol=1e-6, atol=1e-8)
    r = (f(solution.z) - solution.z).norm(dim=1)
    assert torch.allclose(r, solution.residual, rtol=1e-9), (
        "the residual is that of the system, not of the problem"
    )


def test_cgnr_solves_a_skew_system_at_once():
    """A rotation's normal equations are the identity; BiCGSTAB has no step here at all."""
    turn = torch.tensor([[1.0, 1.0], [-1.0, 1.0]], dtype=F64)
    solution = CGNR(tol=1e-12).run(AffineMap(lambda u: u @ turn.T, torch.tensor([[1.0, 2.0]], dtype=F64)))
    assert solution.converged.all()
    assert solution.nstep.item() == 3


@FORMS
def test_cgnr_as_adjoint_solver_gives_the_dense_gradient(hook):
    """CG-RBP. J comes from differentiating Jᵀu."""
    f = TanhMap.make(n=16, batch=3, gain=0.9)
    g = cotangent(f.x)
    reports = []
    deq = DEQ(Anderson(tol=1e-13, max_iter=200), IFT(solver=CGNR(tol=1e-12, max_iter=200), hook=hook),
              on_backward=reports.append)  # fmt: skip
    z, _ = deq(f, f.z0)
    got = torch.autograd.grad(z, f.wanted, g)
    assert error(got, exact_gradient(f, f.z0, g, f.wanted)) < 1e-9
    assert reports[0].converged.all()


@FORMS
def test_cgnr_is_the_cg_of_recurrent_back_propagation(hook):
    """((I − J)(I − Jᵀ) + η I) u = (I − J) g, from a dense Jacobian."""
    f = TanhMap.make(n=8, batch=2, gain=0.9)
    z, g, eta = solve_exactly(f, f.z0), cotangent(f.x), 0.05
    (out,) = IFT(solver=CGNR(tol=1e-13, max_iter=300, eta=eta), hook=hook).attach(
        f, z, on_backward=lambda s: None
    )
    got = torch.autograd.grad(out, f.wanted, g)
    j = torch.autograd.functional.jacobian(f, z).reshape(z.numel(), z.numel())
    i = torch.eye(len(j), dtype=F64)
    u = torch.linalg.solve((i - j) @ (i - j.T) + eta * i, (i - j) @ g.reshape(-1)).reshape(z.shape)
    assert error(got, torch.autograd.grad(f(z), f.wanted, u)) < 1e-9


def test_an_f_that_is_differentiable_once_only_is_an_error_that_teaches():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return z @ a.T

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return g @ a

    a, x, _ = make(6)
    (out,) = IFT(solver=CGNR()).attach(lambda z: Once.apply(z) + x.requires_grad_(), exact(a, x))
    with pytest.raises(RuntimeError, match="twice differentiable.*GMRES"):
        out.sum().backward()


def test_a_linear_part_without_a_graph_is_an_error_that_teaches():
    a, b, _ = make(6)
    with pytest.raises(RuntimeError, match="operations that autograd records.*GMRES"):
        CGNR().run(AffineMap(lambda u: torch.from_numpy(u.detach().numpy() @ a.T.numpy()), b))


def test_a_negative_eta_is_refused():
    with pytest.raises(ValueError, match="eta must be a number of at least 0, got -1"):
        CGNR(eta=-1)


# Cut on purpose ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [CG, CGNR, GMRES, BiCGSTAB, Neumann])
def test_min_iter_makes_all_products_though_the_tolerance_is_met(solver):
    _, _, f = make(30, symmetric=True)
    solution = solver(max_iter=6, min_iter=6, tol=math.inf).run(f)
    assert (solution.nfe, solution.nstep.tolist()) == (6, [5, 5, 5])
    assert solution.converged.all()
    assert torch.equal(solution.z, solver(max_iter=6, tol=0).run(f).z)


def test_what_is_solved_to_rounding_before_has_converged():
    a, b, f = make(3, symmetric=True)
    solution = CG(max_iter=40, min_iter=40, tol=math.inf).run(f)
    assert solution.converged.all()
    assert solution.nfe <= 6
    assert torch.allclose(solution.z, exact(a, b), rtol=1e-12)


@pytest.mark.parametrize("solver", [CG, GMRES, BiCGSTAB])
def test_what_an_ill_conditioned_system_leaves_to_rounding_is_no_breakdown(solver):
    q = torch.linalg.qr(random_matrix(6, 1.0, 0)).Q
    a = q * torch.logspace(0, -4, 6, dtype=F64) @ q.T  # I − L, of condition 1e4
    b = torch.ones(2, 6, dtype=F64)
    solution = solver(max_iter=60, min_iter=60, tol=math.inf).run(AffineMap(lambda u: u - u @ a, b))
    assert solution.nfe < 60  # it ends by itself, above 10 ε
    assert solution.converged.all()
    assert solution.rel_residual.max() < 1e-11


def test_what_breaks_down_before_has_stalled_whatever_its_tolerance():
    down = torch.tensor(
        [[0.5, 0.5, 0.5], [0.5, 0.2, 0.1], [-0.5, -0.5, -0.5]], dtype=F64
    )  # of I − L, by samples
    f = AffineMap(lambda u: u - down * u, torch.ones(3, 3, dtype=F64))
    solution = CG(max_iter=6, min_iter=6, tol=math.inf).run(f)
    assert solution.status.tolist() == [Status.CONVERGED, Status.CONVERGED, Status.STALLED]


def test_min_iter_is_one_or_all():
    with pytest.raises(ValueError, match=r"got min_iter=3\. Leave it at 1, or set it to 6"):
        CG(max_iter=6, min_iter=3)
    assert CG(max_iter=6, min_iter=6).replace(min_iter=1) == CG(max_iter=6)
