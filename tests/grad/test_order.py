"""Derivatives of IFT of every order and in both modes: against finite differences, dense solves and a long unroll."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from tests.problems import F64, CoupledMap, TanhMap, cotangent, error, solve_exactly
from torchdeq import (
    DEQ,
    GMRES,
    IFT,
    Anderson,
    Broyden,
    ConvergenceWarning,
    FixedPointIteration,
    Neumann,
    Solver,
)

ADJOINT = GMRES(tol=1e-13, max_iter=60)
PICARD = FixedPointIteration(tol=1e-14, max_iter=400)
Model = Callable[[Tensor, Tensor], Tensor]

# torch scripts its own rules for forward mode at their first use, and warns about that.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def weights(n: int = 3, batch: int = 2) -> tuple[Tensor, Tensor]:
    f = TanhMap.make(n=n, batch=batch, gain=0.6)
    return f.w, f.x


def model(order: int, forward: Solver = PICARD, adjoint: Solver = ADJOINT) -> Model:
    deq = DEQ(forward, IFT(solver=adjoint, order=order))
    return lambda w, x: deq(TanhMap(w, x), torch.zeros_like(x.detach()))[0]


def unrolled(w: Tensor, x: Tensor) -> Tensor:
    z = torch.zeros_like(x.detach())
    for _ in range(150):
        z = TanhMap(w, x)(z)
    return z


def second(f: Model, w: Tensor, x: Tensor) -> Sequence[Tensor]:
    grads = torch.autograd.grad((f(w, x) * cotangent(x.double()).to(x)).sum(), (w, x), create_graph=True)
    return torch.autograd.grad(sum(g.sin().sum() for g in grads), (w, x), create_graph=True)


def third(f: Model, w: Tensor, x: Tensor) -> Sequence[Tensor]:
    """Of the second derivatives, and the function itself, so that derivatives of all orders meet in one pass."""
    return torch.autograd.grad(
        sum(h.cos().sum() for h in second(f, w, x)) + f(w, x).exp().sum(), (w, x), create_graph=True
    )


FORWARD = [PICARD, Anderson(tol=1e-13, max_iter=100), Broyden(tol=1e-13, max_iter=100)]
BACKWARD = [
    ADJOINT,
    Anderson(tol=1e-13, max_iter=100, m=10),
    Neumann(tol=1e-13, max_iter=300),
]


@pytest.mark.parametrize("adjoint", BACKWARD, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("forward", FORWARD, ids=lambda s: type(s).__name__)
def test_first_and_second_derivatives_in_both_modes(forward, adjoint):
    w, x = weights(n=2, batch=1)
    f = model(2, forward, adjoint)
    assert gradcheck(f, (w, x), check_forward_ad=True)
    assert gradgradcheck(f, (w, x), check_fwd_over_rev=True)


@pytest.mark.parametrize("adjoint", BACKWARD, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("forward", FORWARD, ids=lambda s: type(s).__name__)
def test_third_derivatives(forward, adjoint):
    w, x = weights()
    got, want = third(model(3, forward, adjoint), w, x), third(unrolled, w, x)
    assert error(got, want) < 1e-9


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_higher_order_changes_nothing_below(order):
    w, x = weights()
    f = model(order)
    g = cotangent(x)
    assert (
        error(torch.autograd.grad(f(w, x), (w, x), g), torch.autograd.grad(unrolled(w, x), (w, x), g)) < 1e-12
    )
    if order > 1:
        assert error(second(f, w, x), second(unrolled, w, x)) < 1e-11


def test_a_fourth_derivative():
    w, x = weights(n=2, batch=1)

    def fourth(f: Model) -> Sequence[Tensor]:
        return torch.autograd.grad(sum(h.sin().sum() for h in third(f, w, x)), (w, x))

    assert error(fourth(model(4)), fourth(unrolled)) < 1e-9


@pytest.mark.parametrize(("order", "derivative"), [(1, second), (2, third)])
def test_one_derivative_too_many_raises_and_names_the_remedy(order, derivative):
    w, x = weights()
    with pytest.raises(
        RuntimeError, match=rf"IFT\(order={order}\).*Use IFT\(order={order + 1}\).*fixed_point"
    ):
        derivative(model(order), w, x)


@pytest.mark.parametrize("wanted", ["w", "x"])
def test_too_many_derivatives_raise_whatever_the_next_one_is_taken_of(wanted):
    """The trap of a linear f: ∂f/∂x does not depend on z, so that only (I − J)⁻¹ could tell."""
    w, x = weights()
    for order in (1, 2):
        deq = DEQ(PICARD, IFT(solver=ADJOINT, order=order))
        z = deq(lambda z: z @ w.T + x, torch.zeros_like(x))[0]
        g = torch.autograd.grad(z.square().sum() if order == 2 else z.sum(), x, create_graph=True)[0]
        for _ in range(order - 1):
            g = torch.autograd.grad(g.square().sum(), w, create_graph=True)[0]
        with pytest.raises(RuntimeError, match="higher|second"):
            torch.autograd.grad(g.square().sum(), w if wanted == "w" else x)


def test_the_mixed_second_derivative_of_a_linear_map():
    """z* = (I − W)⁻¹ x: ∂/∂W of gᵀ(I − W)⁻¹ … the derivative of the inverse itself."""
    w, x = weights()
    z = DEQ(PICARD, IFT(solver=ADJOINT, order=2))(lambda z: z @ w.T + x, torch.zeros_like(x))[0]
    g = cotangent(x)
    inverse = torch.linalg.inv(torch.eye(3, dtype=F64) - w)
    (got,) = torch.autograd.grad(z, x, g, create_graph=True)
    want = g @ inverse
    assert error([got], [want]) < 1e-12
    assert error(torch.autograd.grad(got.sin().sum(), w), torch.autograd.grad(want.sin().sum(), w)) < 1e-11


def test_first_derivatives_cost_one_solve_and_one_call_of_f_per_order():
    w, x = weights(n=8)
    counts = []
    for order in (1, 2, 3):
        solves, calls = [], 0

        def f(z: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return TanhMap(w, x)(z)

        z, solution = DEQ(PICARD, IFT(solver=ADJOINT, order=order), on_backward=solves.append)(
            f, torch.zeros_like(x)
        )
        tracked = calls - solution.nfe
        z.square().sum().backward()
        counts.append((tracked, calls - solution.nfe - tracked, len(solves), solves[0].nfe))
    vjps = counts[0][3]
    assert counts == [(order, 1, 1, vjps) for order in (1, 2, 3)]


def test_penalty_and_loss_in_one_pass():
    """The cotangents of a first and of a second derivative meet at the same nodes."""
    w, x = weights()

    def gradient(f: Model, weight: float) -> Sequence[Tensor]:
        z = f(w, x)
        (g,) = torch.autograd.grad(z.square().sum(), x, create_graph=True)
        return torch.autograd.grad(z.sin().sum() + weight * g.square().sum(), (w, x))

    for weight in (1.0, 1e-4, 1e4):
        assert error(gradient(model(2), weight), gradient(unrolled, weight)) < 1e-11


def test_second_derivatives_do_not_depend_on_the_scale_of_the_loss():
    w, x = weights()

    def scaled(s: float, adjoint: Solver) -> Sequence[Tensor]:
        z = model(2, PICARD, adjoint)(w, x)
        (g,) = torch.autograd.grad(s * z.square().sum(), x, create_graph=True)
        return [h / s for h in torch.autograd.grad(g.sum(), (w, x))]

    loose = GMRES(tol=1e-4)
    want = scaled(1.0, loose)
    for s in (1e-8, 1e-4, 1e4):
        assert error(scaled(s, loose), want) < 1e-10
    assert error(want, scaled(1.0, ADJOINT)) < 1e-2  # and the tolerance is what limits it


# Forward mode ------------------------------------------------------------------------------------------


def tangent_of(f: Model, w: Tensor, x: Tensor, dw: Tensor, dx: Tensor) -> Tensor:
    tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(w, dw), forward_ad.make_dual(x, dx))).tangent
    assert tangent is not None
    return tangent


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("adjoint", BACKWARD, ids=lambda s: type(s).__name__)
def test_tangents_equal_the_dense_solve_and_are_transposed_to_gradients(adjoint, grad):
    w, x = weights(n=6, batch=3)
    dw, dx, g = cotangent(w, 1), cotangent(x, 2), cotangent(x, 3)
    f = model(1, PICARD, adjoint)
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        v = tangent_of(f, w, x, dw, dx)
    pulled = torch.autograd.grad(f(w, x), (w, x), g)
    inner = (g * v.detach()).sum()
    assert abs(float(inner - (pulled[0] * dw).sum() - (pulled[1] * dx).sum())) < 1e-10 * abs(float(inner))
    z = solve_exactly(TanhMap(w.detach(), x.detach()), torch.zeros_like(x))
    slope = 1 - z.square()  # (B, n)
    j = slope[:, :, None] * w.detach()  # (B, n, n)
    t = slope * (z @ dw.T + dx)
    want = torch.linalg.solve(torch.eye(6, dtype=F64) - j, t)
    assert error([v], [want]) < 1e-11


@pytest.mark.parametrize("order", [1, 2])
def test_a_tangent_does_not_count_as_a_derivative(order):
    """Forward over reverse, reverse over forward, and with one reverse pass more where the order is higher."""
    w, x = weights()
    dw, dx, c = cotangent(w, 1), cotangent(x, 2), cotangent(x, 3)

    def forward_over_reverse(f: Model) -> list[Tensor]:
        with forward_ad.dual_level():
            duals = forward_ad.make_dual(w, dw), forward_ad.make_dual(x, dx)
            grads = torch.autograd.grad((f(*duals) * c).sum(), (w, x), create_graph=True)
            if order == 2:
                grads = torch.autograd.grad(sum(g.sin().sum() for g in grads), (w, x), create_graph=True)
            return [forward_ad.unpack_dual(g).tangent for g in grads]

    def reverse_over_forward(f: Model) -> Sequence[Tensor]:
        with forward_ad.dual_level():
            v = tangent_of(f, w, x, dw, dx)
            grads = torch.autograd.grad(v.sin().sum(), (w, x), create_graph=True)
            if order == 2:
                grads = torch.autograd.grad(sum(g.sin().sum() for g in grads), (w, x))
            return grads

    for take in (forward_over_reverse, reverse_over_forward):
        assert error(take(model(order)), take(unrolled)) < 1e-11


def test_a_reverse_pass_too_many_raises_for_tangents_too():
    w, x = weights()
    with forward_ad.dual_level():
        duals = forward_ad.make_dual(w, cotangent(w)), forward_ad.make_dual(x, cotangent(x))
        for of in (forward_ad.unpack_dual(model(1)(*duals)).tangent, model(1)(*duals)):
            grads = torch.autograd.grad(of.sum(), (w, x), create_graph=True)
            with pytest.raises(RuntimeError, match=r"Use IFT\(order=2\)"):
                torch.autograd.grad(sum(g.sin().sum() for g in grads), (w, x))


def test_the_tangent_of_the_derivative_of_a_tangent_is_not_a_number():
    """It would be wrong, and that it is wanted cannot be known where it arises."""
    w, x = weights()
    with forward_ad.dual_level():
        v = tangent_of(model(1), w, x, cotangent(w), cotangent(x))
        grads = torch.autograd.grad(v.sin().sum(), (w, x))
        assert all(forward_ad.unpack_dual(g).tangent.isnan().any() for g in grads)
        assert all(forward_ad.unpack_dual(g).primal.isfinite().all() for g in grads)


def test_a_state_without_a_tangent_stays_one_inside_a_dual_level():
    w, x = weights()
    with forward_ad.dual_level():
        z = model(1)(w, x)
        assert forward_ad.unpack_dual(z).tangent is None
        z.sum().backward()
    assert error([x.grad], torch.autograd.grad(unrolled(w, x).sum(), x)) < 1e-12


# What f may be -----------------------------------------------------------------------------------------


def test_nested_states_and_coupled_samples():
    f = CoupledMap.make(batch=3, n=4)
    deq = DEQ(PICARD, IFT(solver=ADJOINT, order=2), batch_dims=0)

    def by_ift(a: Tensor, x: Tensor) -> Tensor:
        def g(z: dict[str, Tensor]) -> dict[str, Tensor]:
            whole = CoupledMap(a, x)(torch.cat([z["left"], z["right"]], dim=1))
            return {"left": whole[:, :1], "right": whole[:, 1:]}

        z = deq(g, {"left": torch.zeros(3, 1, dtype=F64), "right": torch.zeros(3, 3, dtype=F64)})[0]
        return torch.cat([z["left"], z["right"]], dim=1)

    def by_steps(a: Tensor, x: Tensor) -> Tensor:
        z = torch.zeros_like(x.detach())
        for _ in range(200):
            z = CoupledMap(a, x)(z)
        return z

    assert error(second(by_ift, f.a, f.x), second(by_steps, f.a, f.x)) < 1e-10


def test_complex_states_and_parameters():
    w = (
        0.3 * torch.randn(2, 2, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    ).requires_grad_()
    x = torch.randn(
        1, 2, dtype=torch.complex128, generator=torch.Generator().manual_seed(1), requires_grad=True
    )

    def by_ift(w: Tensor, x: Tensor) -> Tensor:
        deq = DEQ(PICARD, IFT(solver=ADJOINT, order=2))
        return deq(lambda z: torch.tanh(z @ w.T + x.conj()), torch.zeros_like(x.detach()))[0]

    assert gradcheck(by_ift, (w, x))
    assert gradgradcheck(by_ift, (w, x))


def test_a_random_f_keeps_its_draw_in_every_call_of_every_pass():
    w, x = weights(n=6)

    def masked(f: Callable[[Callable[[Tensor], Tensor]], Tensor]) -> Sequence[Tensor]:
        torch.manual_seed(3)
        z = f(lambda z: torch.nn.functional.dropout(TanhMap(w, x)(z), 0.2))
        (g,) = torch.autograd.grad(z.square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.sum(), (w, x))

    torch.manual_seed(3)
    mask = torch.nn.functional.dropout(torch.ones_like(x), 0.2)

    def by_steps(f: Callable[[Tensor], Tensor]) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(150):
            z = TanhMap(w, x)(z) * mask
        return z

    deq = DEQ(PICARD, IFT(solver=ADJOINT, order=2), hold_noise=True)
    assert error(masked(lambda f: deq(f, torch.zeros_like(x))[0]), masked(by_steps)) < 1e-11


def test_f_that_does_not_depend_on_z():
    w, x = weights()
    deq = DEQ(PICARD, IFT(solver=ADJOINT, order=2))
    z = deq(lambda z: torch.sin(x), torch.zeros_like(x))[0]
    (g,) = torch.autograd.grad(z.sum(), x, create_graph=True)
    assert error([g], [x.cos()]) < 1e-15
    assert error(torch.autograd.grad(g.sum(), x), [-x.sin()]) < 1e-15


class OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return 0.5 * z.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 0.5 * g * ctx.saved_tensors[0].cos()


def test_an_f_that_is_not_twice_differentiable_is_told_so():
    x = torch.ones(1, 3, dtype=F64, requires_grad=True)
    z = DEQ(PICARD, IFT(solver=ADJOINT, order=2))(lambda z: OnceOnly.apply(z) + x, torch.zeros_like(x))[0]
    (g,) = torch.autograd.grad(z.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError) as caught:
        torch.autograd.grad(g.sum(), x)
    assert "once_differentiable" in "".join([str(caught.value), *getattr(caught.value, "__notes__", [])])


# What is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "transform",
    [
        lambda run, x: torch.func.grad(lambda x: run(x).sum())(x),
        lambda run, x: torch.func.vjp(run, x)[1](torch.ones_like(x)),
        lambda run, x: torch.func.jvp(run, (x,), (torch.ones_like(x),)),
        lambda run, x: torch.func.jacrev(run)(x),
        lambda run, x: torch.func.jacfwd(run)(x),
        lambda run, x: torch.vmap(run)(x[None]),
    ],
    ids=["grad", "vjp", "jvp", "jacrev", "jacfwd", "vmap"],
)
@pytest.mark.parametrize("hook", [False, True])
def test_transforms_of_closures_are_refused_and_the_functional_form_is_named(transform, hook):
    w, x = weights()
    deq = DEQ(PICARD, IFT(hook=hook))
    with pytest.raises(RuntimeError, match=r"torchdeq\.fixed_point"):
        transform(lambda x: deq(TanhMap(w.detach(), x), torch.zeros(2, 3, dtype=F64))[0], x.detach())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"order": 0}, "order=0.*at least 1"),
        ({"order": True}, "order"),
        ({"order": 2, "hook": True}, "hook=False"),
    ],
)
def test_wrong_orders(options, says):
    with pytest.raises(ValueError, match=says):
        IFT(**options)


def test_single_precision():
    """The cancellation that makes the lower lifts cost nothing is told from a cotangent at float32's rounding too."""
    w, x = (t.detach().float().requires_grad_() for t in weights(n=8))
    solves = []
    deq = DEQ(FixedPointIteration(tol=1e-6), IFT(solver=GMRES(tol=1e-5), order=3), on_backward=solves.append)
    f = lambda w, x: deq(TanhMap(w, x), torch.zeros_like(x.detach()))[0]  # noqa: E731
    f(w, x).sum().backward()
    assert len(solves) == 1
    want = third(unrolled, w.detach().double().requires_grad_(), x.detach().double().requires_grad_())
    assert error([g.double() for g in third(f, w, x)], want) < 1e-4  # the tolerance, ten times


@pytest.mark.parametrize("method", [IFT(), IFT(hook=True), IFT(order=2)], ids=repr)
def test_many_cotangents_at_once_are_refused_and_the_functional_form_is_named(method):
    w, x = weights()
    z = DEQ(PICARD, method)(TanhMap(w, x), torch.zeros_like(x))[0]
    with pytest.raises(RuntimeError) as caught:
        torch.autograd.grad(z, x, torch.stack([cotangent(x)] * 3), is_grads_batched=True)
    assert any("torchdeq.fixed_point" in note for note in caught.value.__notes__)


def test_a_large_sample_does_not_hide_a_small_one():
    """Whether the cotangents of a lower lift cancel is asked of each sample."""
    x = torch.tensor([[0.3], [0.7]], dtype=F64, requires_grad=True)
    first = torch.tensor([[1.0], [0.0]], dtype=F64)

    def second_of(size: float, solve: Callable[[Callable[[Tensor], Tensor]], Tensor]) -> Tensor:
        z = solve(lambda z: first * (0.5 * z + x) + (1 - first) * torch.tanh(0.5 * z + x))
        (g,) = torch.autograd.grad((first * size * z**2 / 2 + (1 - first) * z).sum(), x, create_graph=True)
        return torch.autograd.grad(g.sum(), x)[0]

    def by_steps(f: Callable[[Tensor], Tensor]) -> Tensor:
        z = torch.zeros(2, 1, dtype=F64)
        for _ in range(100):
            z = f(z)
        return z

    deq = DEQ(PICARD, IFT(solver=ADJOINT, order=2))
    for size in (1.0, 1e9, 1e13):
        got = second_of(size, lambda f: deq(f, torch.zeros(2, 1, dtype=F64))[0])
        want = second_of(size, by_steps)
        assert ((got - want).abs() / want.abs()).max() < 1e-12


@pytest.mark.parametrize("scale", [1e-200, 1e-160, 1e120, 1e160])
def test_the_scale_of_a_loss_may_be_extreme(scale):
    w, x = weights()

    def scaled(solve: Model) -> Sequence[Tensor]:
        (g,) = torch.autograd.grad(scale * (solve(w, x) ** 3).sum(), x, create_graph=True)
        return [h / scale for h in torch.autograd.grad(g.sum(), (w, x))]

    assert error(scaled(model(2)), scaled(unrolled)) < 1e-11


def test_a_tangent_that_is_not_a_number_spoils_its_own_sample_only():
    x = torch.tensor([[0.0], [2.0]], dtype=F64, requires_grad=True)

    def tangent(solve: Callable[[Callable[[Tensor], Tensor]], Tensor]) -> Tensor:
        with forward_ad.dual_level():
            moved = forward_ad.make_dual(x, torch.tensor([[0.0], [1.0]], dtype=F64))
            z = solve(lambda z: 0.5 * z + moved.sin())
            (g,) = torch.autograd.grad(z.clamp_min(0).pow(1.5).sum(), x)
            return forward_ad.unpack_dual(g).tangent

    def by_steps(f: Callable[[Tensor], Tensor]) -> Tensor:
        z = torch.zeros(2, 1, dtype=F64)
        for _ in range(100):
            z = f(z)
        return z

    want = tangent(by_steps)
    for order in (1, 2):
        deq = DEQ(PICARD, IFT(solver=ADJOINT, order=order))
        with pytest.warns(ConvergenceWarning, match="non-finite"):
            got = tangent(lambda f, deq=deq: deq(f, torch.zeros(2, 1, dtype=F64))[0])
        assert got[0].isnan().all()
        assert abs(got[1] - want[1]) < 1e-12 * abs(want[1])


def test_weights_that_have_moved_a_little_between_the_passes_are_noticed():
    w, x = weights()
    z = model(1)(w, x)
    with torch.no_grad():
        w += 1e-4
    with pytest.raises(RuntimeError, match="another value"):
        torch.autograd.grad(z.sum(), x)
