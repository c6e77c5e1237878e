"""SHINE: what the forward solve has learned of the inverse, against dense algebra and exact adjoints."""

from __future__ import annotations

import itertools
import math
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
    exact_gradient,
    random_matrix,
)
from tests.solver.test_secant import N, bad, good, type_one, type_two
from torchdeq import (
    CG,
    DEQ,
    GMRES,
    IFT,
    JFB,
    RRE,
    SHINE,
    Anderson,
    Broyden,
    CouplingWarning,
    Fallback,
    FixedPointIteration,
    Multisecant,
    NewtonKrylov,
    PhantomGrad,
    Status,
)
from torchdeq._state import FlatMap, layout_of
from torchdeq.diagnostics.memory import SavedBytes

SOLVERS = pytest.mark.parametrize(
    "solver",
    [
        Broyden(),
        Broyden(kind="bad"),
        Broyden(m=4),
        Anderson(m=3),
        Anderson(type=1),
        Anderson(tau=0.6),
        Multisecant(),
    ],
    ids=repr,
)


def dense(learned, batch, n):
    """H of each sample, (B, n, n)."""
    columns = [learned(torch.eye(n, dtype=F64)[i].expand(batch, n)) for i in range(n)]
    return torch.stack(columns, dim=2)


def adjoint_of(solver, f, z0, g, **options):
    """û for the cotangent g, through f + x, whose derivative in x is the identity; and the reported account."""
    x, accounts = torch.zeros_like(z0, requires_grad=True), []
    deq = DEQ(solver, SHINE(**options), on_backward=accounts.append)
    z, solution = deq(lambda z: f(z) + x, z0)
    (u,) = torch.autograd.grad(z, x, g)
    return u, accounts, solution


# H --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solver", "recursion"),
    [
        (Broyden(), good),
        (Broyden(m=3), good),
        (Broyden(kind="bad"), bad),
        (Broyden(kind="bad", m=3), bad),
        (Anderson(m=5, type=1), type_one),
        (Anderson(m=3, lam=0.0), type_two),
        (Anderson(m=3, lam=0.0, tau=0.4), type_two),
    ],
    ids=lambda value: getattr(value, "__name__", repr(value)),
)
def test_is_the_matrix_of_the_updates_written_out_one_after_the_other(solver, recursion):
    """For iterates and residuals at random, in two samples; beyond the memory limit, of the last m. The recursions give
    −H."""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        zs, rs = torch.randn(2, 7, 2, N, dtype=F64, generator=generator)
        rs = rs / rs.norm(
            dim=2, keepdim=True
        )  # one that has grown to more than twice its size empties a history
        pair = iter(rs)
        state = solver.init(zs[0])
        for z in zs[:-1]:
            _, state = solver.step(None, z, z + next(pair), state)
        estimate = solver.estimate(None, zs[-1], zs[-1] + next(pair), state)
        assert not hasattr(solver, "m") or solver.m is None or estimate.k.shape[1] == solver.m
        for sample in range(2):
            z, r = zs[:, sample], rs[:, sample]
            s, y = z.diff(dim=0), r.diff(dim=0)
            if solver.m is not None:
                s, y = s[-solver.m :], y[-solver.m :]
            want = -recursion(s, y)
            eye = torch.eye(N, dtype=F64)
            got = torch.stack([estimate.times(e.expand(2, N), transposed=False)[sample] for e in eye], dim=1)
            back = torch.stack([estimate.times(e.expand(2, N), transposed=True)[sample] for e in eye], dim=1)
            # Random pairs make H as large as 1e3, and rounding with it.
            assert float((got - want).norm() / want.norm()) < 1e-9
            assert float((back - want.T).norm() / want.norm()) < 1e-9


@SOLVERS
def test_is_the_matrix_of_the_step(solver):
    """z⁺ = z + H r where there is no damping; with it, z⁺ = z + H r − (1 − τ)(r − Yᵀγ), which shows H by itself."""
    f = TanhMap.make(n=10, batch=3, gain=0.6)
    z, state = f.z0, solver.init(f.z0)
    with torch.no_grad():
        for _ in range(7):
            z_next, state_next = solver.step(f, z, f(z), state)
            estimate = solver.estimate(f, z, f(z), state)
            r = f(z) - z
            full = z + estimate.times(r, transposed=False)
            if solver.tau == 1:
                assert torch.allclose(z_next, full, rtol=0, atol=1e-12)
            z, state = z_next, state_next


@SOLVERS
def test_the_transpose_is_the_transpose(solver):
    f = TanhMap.make(n=20, gain=1.1)
    _, learned = solver.replace(tol=1e-6, max_iter=100).solve_and_learn(f, f.z0)
    v, w = cotangent(f.x, 1), cotangent(f.x, 2)
    assert torch.allclose((w * learned(v)).sum(1), (learned.transposed(w) * v).sum(1), rtol=1e-10, atol=1e-10)


def test_on_a_linear_map_broydens_method_ends_with_the_updates_it_has_made():
    """Within 2n steps (Gay, 1979), with H⁻¹ = I − A − (−A) Π (I − s sᵀ/sᵀs): what each step teaches, and no more."""
    n = 6
    a, x = random_matrix(n, 0.9), cotangent(torch.zeros(1, n, dtype=F64))
    seen = []

    def f(z):
        seen.append(z)
        return z @ a.T + x

    solution, learned = Broyden(tol=1e-9).solve_and_learn(f, torch.zeros(1, n, dtype=F64))
    assert solution.nfe <= 2 * n + 1
    left = torch.eye(n, dtype=F64)
    for before, after in itertools.pairwise(seen):
        s = (after - before)[0]
        left = left @ (torch.eye(n, dtype=F64) - torch.outer(s, s) / s.dot(s))
    h = dense(learned, 1, n)[0]
    want = torch.linalg.inv(torch.eye(n, dtype=F64) - a + a @ left)
    assert (
        float((h - want).norm() / want.norm()) < 1e-6
    )  # the last steps are 1e-9, and known to 1e-7 of themselves


@pytest.mark.parametrize("type_", [1, 2])
def test_as_many_secant_equations_as_unknowns_make_a_linear_gradient_exact(type_):
    n = 6
    a = random_matrix(n, 0.9).requires_grad_()
    x = cotangent(torch.zeros(2, n, dtype=F64)).requires_grad_()
    solver = Anderson(m=n, type=type_, tol=1e-10, **({"lam": 0.0} if type_ == 2 else {}))
    f = lambda z: z @ a.T + x  # noqa: E731
    z, _ = DEQ(solver, SHINE(fallback=math.inf))(f, torch.zeros(2, n, dtype=F64))
    g = cotangent(x, 5)
    # The last differences, of 1e-10, are known to 1e-6 of themselves.
    assert error(torch.autograd.grad(z, (a, x), g), exact_gradient(f, z, g, (a, x))) < 1e-4


# The gradient ---------------------------------------------------------------------------------------------


def test_the_error_is_bounded_by_the_reported_residual_in_a_hundred_contractions():
    for seed in range(100):
        w = random_matrix(8, 1.0, seed)
        w = w * (0.3 + 0.006 * seed) / torch.linalg.matrix_norm(w, 2)
        x = cotangent(torch.zeros(2, 8, dtype=F64), seed)
        f = lambda z, w=w, x=x: torch.tanh(z @ w.T) + x  # noqa: E731
        g = cotangent(x, seed + 1000)
        u, (account,), solution = adjoint_of(
            Multisecant(tol=1e-10), f, torch.zeros_like(x), g, fallback=math.inf
        )
        z = solution.z
        exact = exact_adjoint(f, z, g)
        jacobians = (1 - torch.tanh(z @ w.T).square())[:, :, None] * w
        norms = torch.linalg.matrix_norm(jacobians, 2)
        size = g.norm(dim=1)
        assert bool(((u - exact).norm(dim=1) <= account.residual * size / (1 - norms) * (1 + 1e-9)).all())
        zz = z.clone().requires_grad_()
        (product,) = torch.autograd.grad(f(zz), zz, u)
        measured = (g - u + product).norm(dim=1) / size
        assert torch.allclose(account.residual, measured, rtol=1e-10, atol=1e-12)


def test_the_account_says_what_was_done_and_warns_of_nothing():
    f = TanhMap.make()
    u, (account,), _ = adjoint_of(Broyden(), f, f.z0, cotangent(f.x))
    assert (account.nfe, account.tol) == (1, math.inf)
    assert bool(account.converged.all())
    assert (
        float(account.residual.min()) > 0.1
    )  # far from a solution, and no warning, which would be an error here
    again, accounts, _ = adjoint_of(Broyden(), f, f.z0, cotangent(f.x), certify=False)
    assert accounts == []
    assert torch.equal(u, again)


class Products(torch.autograd.Function):
    """The identity on z, which counts the products with its transpose."""

    count = 0

    @staticmethod
    def forward(ctx, z):
        return z.clone()

    @staticmethod
    def backward(ctx, g):
        Products.count += 1
        return g


def test_makes_no_product_with_the_transpose_unless_it_is_to_be_measured():
    f = TanhMap.make()
    for options, products in (({"certify": False}, 0), ({}, 1)):
        z, _ = DEQ(Broyden(), SHINE(**options))(lambda z: f(Products.apply(z)), f.z0)
        Products.count = 0
        torch.autograd.grad(z.sum(), f.wanted)
        assert Products.count == products


@pytest.mark.parametrize("solver", [Broyden(), Anderson(m=30)], ids=repr)
def test_refined_it_is_exact_with_fewer_products_than_without_the_inverse(solver):
    """Measured at n = 100, to a residual of 1e-4: 38 products by itself and 19 with H of Broyden's method at a gain of
    1.5, 22 and 16 at 1.1, 10 and 9 at 0.5."""
    f = TanhMap.make(n=60, gain=1.5)
    g = cotangent(f.x)
    solver = solver.replace(tol=1e-9, max_iter=150)
    want = None
    for tol, accuracy in (
        (1e-4, 1e-2),
        (1e-12, 1e-7),
    ):  # times the condition of I − J, and that of the state, 1e-9
        counts = {}
        for method in (IFT(solver=GMRES(tol=tol, max_iter=70)), SHINE(refine=GMRES(tol=tol, max_iter=70))):
            accounts = []
            z, solution = DEQ(solver, method, on_backward=accounts.append)(f, f.z0)
            assert bool(solution.converged.all())
            if want is None:
                want = torch.autograd.grad(f(solution.z), f.wanted, exact_adjoint(f, solution.z, g))
            assert error(torch.autograd.grad(z, f.wanted, g), want) < accuracy
            assert bool((accounts[0].residual <= tol).all())
            counts[type(method)] = accounts[0].nfe
        if tol == 1e-4:
            assert counts[SHINE] <= 0.75 * counts[IFT]


def test_falls_back_to_the_cotangent_where_the_estimate_is_too_large():
    """f = a z + x: û is 1.11 g for a = 0.1, and 2 g for a = 0.5."""
    a = torch.tensor([[0.1], [0.5]], dtype=F64)
    z0, g = torch.zeros(2, 1, dtype=F64), torch.tensor([[3.0], [-4.0]], dtype=F64)
    f = lambda z: a * z + 1  # noqa: E731
    solver = Broyden(tol=1e-10)
    want = g / (1 - a)
    u, (account,), _ = adjoint_of(solver, f, z0, g)
    assert torch.allclose(u, torch.stack([want[0], g[1]]))
    assert torch.allclose(account.residual, torch.tensor([0.0, 0.5], dtype=F64), atol=1e-9)
    u, _, _ = adjoint_of(solver, f, z0, g, fallback=2.1)
    assert torch.allclose(u, want)


def test_does_not_depend_on_the_scale_of_the_loss():
    f = TanhMap.make()
    g = cotangent(f.x)
    u, _, _ = adjoint_of(Broyden(), f, f.z0, g)
    for scale in (1e-30, 1e30):
        scaled, _, _ = adjoint_of(Broyden(), f, f.z0, scale * g)
        assert torch.allclose(scaled / scale, u, rtol=1e-12, atol=0)
    zero, (account,), _ = adjoint_of(Broyden(), f, f.z0, 0 * g)
    assert not bool(zero.any())
    assert bool((account.residual == 0).all())


# Samples --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("solver", [Anderson(m=3), Broyden(), Broyden(m=2), Multisecant()], ids=repr)
def test_a_sample_that_rests_keeps_what_it_has_learned(solver, compact):
    """The slow ones make many more steps than a short history holds."""
    rate = torch.tensor([0.1, 1.4, 0.5, 1.2, 0.0], dtype=F64)[:, None]
    w, x = random_matrix(12, 1.0), cotangent(torch.zeros(5, 12, dtype=F64))
    x[4] = 0  # at rest from the start
    g = cotangent(x, 9)
    solver = solver.replace(tol=1e-6, max_iter=200, compact=compact)

    def f(z, rows=slice(None)):
        return torch.tanh(rate[rows] * (z @ w.T)) + x[rows]

    flat = FlatMap(f, layout_of(x))  # which can leave samples out
    together, learned = solver.solve_and_learn(flat, torch.zeros_like(x))
    assert len(set(together.nstep.tolist())) >= 4
    u = learned.transposed(g)
    assert torch.equal(u[4], g[4])
    for i in range(4):
        alone = solver.solve_and_learn(lambda z, i=i: f(z, slice(i, i + 1)), torch.zeros(1, 12, dtype=F64))[1]
        want = alone.transposed(g[i : i + 1])[0]
        assert float((want - g[i]).norm()) > 1e-3
        # Rounding of 1e-16 in differences of 1e-6, times the condition of K. Without its history u would be g.
        assert float((u[i] - want).norm() / want.norm()) < 1e-5


def test_a_sample_that_goes_on_in_the_next_solver_learns_there_and_the_others_keep_what_they_have():
    rate = torch.tensor([[0.3], [1.5]], dtype=F64)
    w, x = random_matrix(12, 1.0), cotangent(torch.zeros(2, 12, dtype=F64))
    f = lambda z: torch.tanh(rate * (z @ w.T)) + x  # noqa: E731
    z0, g = torch.zeros_like(x), cotangent(x, 9)
    first, then = Broyden(tol=1e-7, max_iter=12), Multisecant(tol=1e-7, max_iter=80)
    solution, learned = Fallback(first, then).solve_and_learn(f, z0)
    assert bool(solution.converged.all())
    assert solution.nstep[0] <= 12 < solution.nstep[1]
    half, early = first.solve_and_learn(f, z0)
    _, late = then.solve_and_learn(f, half.z)
    u = learned.transposed(g)
    assert torch.allclose(u[0], early.transposed(g)[0], rtol=1e-9, atol=1e-9)
    assert torch.allclose(u[1], late.transposed(g)[1], rtol=1e-9, atol=1e-9)
    _, kept = Fallback(first, NewtonKrylov(tol=1e-7)).solve_and_learn(f, z0)
    assert torch.equal(kept.transposed(g), early.transposed(g))


@pytest.mark.filterwarnings("ignore::torchdeq.ConvergenceWarning")
def test_samples_that_are_coupled_share_one_inverse():
    """batch_dims=0 says so, and a solve that finds it out learns it for the whole."""
    f = CoupledMap.make(batch=6, n=8, gain=1.6)
    g = cotangent(f.x)
    refined = SHINE(refine=GMRES(tol=1e-10, max_iter=60))
    want = exact_gradient(
        f, DEQ(Multisecant(tol=1e-11, max_iter=200), batch_dims=0)(f, f.z0)[0].detach(), g, f.wanted
    )
    z, _ = DEQ(Multisecant(tol=1e-10, max_iter=200), refined, batch_dims=0)(f, f.z0)
    assert error(torch.autograd.grad(z, f.wanted, g), want) < 1e-7
    with pytest.warns(CouplingWarning):
        solution, learned = Anderson(tol=1e-8, max_iter=60).solve_and_learn(f, f.z0)
    assert solution.coupled
    assert learned.whole is not None
    v, w = cotangent(f.x, 1), cotangent(f.x, 2)
    assert torch.allclose((w * learned(v)).sum(), (learned.transposed(w) * v).sum(), rtol=1e-10)
    only = torch.zeros_like(g)
    only[0] = g[0]
    assert bool(learned.transposed(only)[1:].any())
    with pytest.warns(CouplingWarning):
        u, _, _ = adjoint_of(Anderson(tol=1e-8, max_iter=60), f, f.z0, only, fallback=math.inf)
    assert torch.allclose(u, learned.transposed(only), rtol=1e-6, atol=1e-9)


def test_what_converges_at_once_has_learned_nothing_and_gets_the_one_step_gradient():
    f = TanhMap.make()
    z, _ = DEQ(Broyden(tol=1e-12, max_iter=100))(f, f.z0)
    z0, g = z.detach(), cotangent(f.x)
    z, solution = DEQ(Broyden(tol=1e-9), SHINE())(f, z0)
    assert solution.nfe == 1
    got = torch.autograd.grad(z, f.wanted, g)
    (want,) = JFB().attach(f, z0)
    assert error(got, torch.autograd.grad(want, f.wanted, g)) < 1e-14


@pytest.mark.filterwarnings("ignore::torchdeq.ConvergenceWarning")
def test_a_sample_that_is_not_finite_spoils_nothing():
    x = torch.tensor([[0.3, 0.1], [0.2, 0.4]], dtype=F64, requires_grad=True)
    second = torch.tensor([[False], [True]])

    def f(z):
        return 0.5 * torch.cos(z) + x + torch.where(second & (z > 0.55), math.inf, 0.0)

    for solver in (Broyden(tol=1e-8), Anderson(tol=1e-8), Multisecant(tol=1e-8)):
        solution, learned = solver.solve_and_learn(f, torch.zeros(2, 2, dtype=F64))
        assert solution.status.tolist() == [Status.CONVERGED, Status.NON_FINITE]
        g = torch.ones_like(x)
        u = learned.transposed(g)
        assert bool(u.isfinite().all())
        alone = solver.solve_and_learn(lambda z: 0.5 * torch.cos(z) + x[:1], torch.zeros(1, 2, dtype=F64))[1]
        assert torch.allclose(u[:1], alone.transposed(g[:1]), rtol=1e-9)


# What f and the state may be ------------------------------------------------------------------------------


def test_reaches_inputs_that_are_not_leaves_and_is_an_ordinary_module_to_hooks():
    torch.manual_seed(0)
    encoder, layer = torch.nn.Linear(5, 8), torch.nn.Linear(8, 8)
    x, seen = encoder(torch.randn(3, 5)), []
    layer.weight.register_hook(seen.append)
    deq = DEQ(Broyden(tol=1e-4), SHINE())
    one, _ = deq(lambda z: torch.tanh(0.5 * layer(z) + x), torch.zeros(3, 8))
    two, _ = deq(lambda z: torch.tanh(0.2 * layer(z) + x), torch.zeros(3, 8))
    parameters = [*encoder.parameters(), *layer.parameters()]
    first = torch.autograd.grad(one.sum(), parameters, retain_graph=True)
    second = torch.autograd.grad(two.sum(), parameters, retain_graph=True)
    del seen[:]
    (one.sum() + two.sum()).backward()
    assert len(seen) == 1
    assert all(
        torch.allclose(p.grad, a + b, rtol=1e-5) for p, a, b in zip(parameters, first, second, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_maps_and_structures_go(dtype):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(8, 8, dtype=dtype), torch.randn(4, 8, dtype=dtype)

    def f(state):
        out = torch.tanh(layer(torch.cat([state["a"], state["b"]], dim=1)) + x)
        return {"a": out[:, :3], "b": out[:, 3:]}

    z0 = {"a": torch.zeros(4, 3, dtype=dtype), "b": torch.zeros(4, 5, dtype=dtype)}
    accounts = []
    for method in (SHINE(), SHINE(refine=GMRES(tol=0.05))):
        deq = DEQ(Multisecant(tol=0.02, stop_mode="rel"), method, on_backward=accounts.append)
        z, _ = deq(f, z0)
        (z["a"].sum() + z["b"].square().sum()).backward()
        assert z["a"].dtype == layer.weight.grad.dtype == dtype
        assert bool(layer.weight.grad.isfinite().all())
    assert all(account.abs_residual.dtype == torch.float32 for account in accounts)
    assert float(accounts[1].residual.max()) <= 0.05 < float(accounts[0].residual.max())


def test_a_line_search_teaches_too():
    """One unknown: the secant through the last two states is the derivative of a linear f."""
    f = lambda z: -3 * z + 1  # noqa: E731
    g = torch.ones(1, 1, dtype=F64)
    u, _, solution = adjoint_of(Broyden(ls=True, tol=1e-10), f, torch.zeros(1, 1, dtype=F64), g)
    assert bool(solution.converged.all())
    assert u.item() == pytest.approx(0.25, rel=1e-6)


# Memory ---------------------------------------------------------------------------------------------------


def test_keeps_two_states_for_each_step_and_the_backward_pass_frees_them():
    f = TanhMap.make(n=512, batch=2, gain=1.3)
    state = 2 * 512 * 8
    held = {}
    for name, method in (("shine", SHINE(certify=False)), ("ift", IFT())):
        with SavedBytes() as saved, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            z, solution = DEQ(Broyden(max_iter=16, tol=0.0), method)(f, f.z0)
            held[name] = saved.now
            z.sum().backward()
            assert saved.now == 0
    more = (held["shine"] - held["ift"]) / state
    assert 2 * 15 <= more <= 2 * (15 + 8) + 2  # room for seven more, and small matrices
    with SavedBytes(), pytest.raises(RuntimeError, match="second time"):
        z.sum().backward()
    z, _ = DEQ(Broyden(max_iter=16, tol=1.0), SHINE())(f, f.z0)
    twice = [torch.autograd.grad(z.sum(), f.x, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*twice)


# What cannot be done --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "solver",
    [FixedPointIteration(), RRE(), NewtonKrylov(), Fallback(FixedPointIteration(), Broyden())],
    ids=repr,
)
def test_a_solver_that_learns_nothing_is_refused_before_it_runs(solver):
    calls = []
    with pytest.raises(TypeError, match=r"learns none.*Broyden\(\)"):
        DEQ(solver, SHINE())(lambda z: calls.append(z) or z, torch.zeros(1, 1))
    assert not calls
    with pytest.raises(TypeError, match="makes none"):
        solver.solve_and_learn(torch.cos, torch.zeros(1, 1))


def test_a_solved_state_alone_is_refused():
    with pytest.raises(TypeError, match=r"DEQ\(Broyden\(\), SHINE\(\)\)"):
        SHINE().attach(torch.cos, torch.zeros(1, 1))
    with pytest.raises(TypeError, match="recorded states"):
        DEQ(Broyden(), SHINE(), record=[2])(torch.cos, torch.zeros(1, 1))
    z, solution = DEQ(Broyden(), [PhantomGrad(), SHINE()], record=[2])(torch.cos, torch.zeros(1, 1))
    assert len(solution.states) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fallback": 0.0}, "must be above 0"),
        ({"refine": Broyden()}, "allows a preconditioner"),
        ({"refine": CG()}, "allows a preconditioner"),
        ({"refine": GMRES(), "fallback": 2.0}, "Leave them out"),
        ({"refine": GMRES(), "certify": False}, "Leave them out"),
    ],
)
def test_options_out_of_range_or_without_effect_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SHINE(**options)


@pytest.mark.parametrize("refine", [None, GMRES()], ids=repr)
def test_modes_of_differentiation_that_it_has_not_raise(refine):
    f = TanhMap.make(n=3)
    deq = DEQ(Broyden(), SHINE(refine=refine))
    solve = lambda x: deq(lambda z: torch.tanh(z + x) / 2, f.z0)[0].square().sum()  # noqa: E731
    (g,) = torch.autograd.grad(solve(f.x), f.x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"SHINE.*first derivatives only.*IFT\(order=2\)"):
        torch.autograd.grad(g.sum(), f.x)
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(solve)(f.x.detach())
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        solve(forward_ad.make_dual(f.x.detach(), torch.ones_like(f.x)))


@pytest.mark.parametrize("batch_dims", [0, 1])
@pytest.mark.parametrize("scale", [1e200, 1e-200])
def test_cotangents_whose_squares_are_no_numbers(scale, batch_dims):
    f = TanhMap.make(n=6)
    deq, g, seen = DEQ(Broyden(tol=1e-8), SHINE(), batch_dims=batch_dims), cotangent(f.x), []
    deq.on_backward = seen.append
    want = torch.autograd.grad(deq(f, f.z0)[0], f.wanted, g)
    got = torch.autograd.grad(deq(f, f.z0)[0], f.wanted, scale * g)
    assert error([t / scale for t in got], want) < 1e-12
    assert torch.allclose(seen[0].abs_residual, seen[1].abs_residual, rtol=1e-9)
