"""`DEQ(compile="fixed")`: max_iter evaluations, right gradients, and one graph for a whole training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from torchdeq import (
    DEQ,
    GMRES,
    IFT,
    JFB,
    SHINE,
    Anderson,
    BiCGSTAB,
    Broyden,
    ConvergenceWarning,
    FixedPointIteration,
    Multisecant,
    NewtonKrylov,
    PhantomGrad,
    Solver,
    Status,
)
from torchdeq.grad.base import GradMethod

F64 = torch.float64
EXACT = DEQ(Anderson(tol=1e-13), IFT(solver=GMRES(tol=1e-13)))


def layer_of(n: int = 6, gain: float = 0.5) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(n, n, dtype=F64)
    with torch.no_grad():
        layer.weight.mul_(gain / torch.linalg.matrix_norm(layer.weight, 2))
    return layer


def data(batch: int = 3, n: int = 6) -> Tensor:
    return torch.randn(batch, n, dtype=F64, generator=torch.Generator().manual_seed(1))


def step(deq: DEQ, layer: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z, the gradient of a loss, and the residual."""
    z, solution = deq(lambda z: torch.tanh(layer(z) + x), torch.zeros_like(x))
    (grad,) = torch.autograd.grad(z.sin().sum(), layer.weight)
    return z, grad, solution.residual


@pytest.mark.parametrize(
    ("solver", "grad"),
    [
        (FixedPointIteration(max_iter=60), IFT(solver=FixedPointIteration(max_iter=60))),
        (Anderson(max_iter=25), IFT(solver=GMRES(max_iter=6))),
        (Anderson(max_iter=25), IFT(solver=GMRES(max_iter=60, m=3))),
        (Broyden(max_iter=25), IFT(solver=Broyden(max_iter=25))),
        (Multisecant(max_iter=25), IFT(solver=Anderson(max_iter=25))),
    ],
    ids=["picard", "gmres", "restarted", "broyden", "anderson"],
)
def test_the_last_state_and_its_gradient_are_those_of_the_fixed_point(
    solver: Solver, grad: GradMethod
) -> None:
    layer, x = layer_of(), data()
    z, g, residual = step(DEQ(solver, grad, compile="fixed"), layer, x)
    want_z, want_g, _ = step(EXACT, layer, x)
    assert float(residual.max()) < 1e-11
    torch.testing.assert_close(z, want_z, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(g, want_g, rtol=1e-10, atol=1e-10)


def test_a_few_evaluations_are_those_of_picard_iteration() -> None:
    calls = 0

    def f(z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return z / 2 + 1

    z, solution = DEQ(FixedPointIteration(max_iter=3), JFB(), compile="fixed")(f, torch.zeros(2, 1))
    assert (calls, solution.nfe, solution.nstep.tolist()) == (3, 3, [3, 3])
    assert z[:, 0].tolist() == [1.75, 1.75]
    assert solution.z[:, 0].tolist() == [1.5, 1.5]
    assert solution.residual.tolist() == [0.25, 0.25]
    assert solution.status.tolist() == [Status.MAX_ITER] * 2


@pytest.mark.parametrize("grad", [JFB(), PhantomGrad(steps=3, tau=0.7)], ids=["jfb", "phantom"])
def test_steps_that_are_tracked_give_the_gradient_of_those_steps(grad: GradMethod) -> None:
    layer, x = layer_of(), data()
    z, g, _ = step(DEQ(Anderson(max_iter=25), grad, compile="fixed"), layer, x)
    want_z, want_g, _ = step(DEQ(Anderson(tol=1e-13), grad), layer, x)
    torch.testing.assert_close(z, want_z, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(g, want_g, rtol=1e-11, atol=1e-11)


def test_samples_of_any_scale_of_loss_have_their_gradients() -> None:
    a = torch.tensor([[0.5], [0.2], [0.9]], dtype=F64, requires_grad=True)
    weights = torch.tensor([[1e-140], [0.0], [1e3]], dtype=F64)
    deq = DEQ(FixedPointIteration(max_iter=400), IFT(solver=GMRES(max_iter=4)), compile="fixed")
    z, _ = deq(lambda z: a * z + 1, torch.zeros(3, 1, dtype=F64))
    (g,) = torch.autograd.grad((z * weights).sum(), a)
    torch.testing.assert_close(g, weights / (1 - a.detach()) ** 2, rtol=1e-10, atol=0)


@pytest.mark.parametrize("solver", [GMRES(max_iter=4), Anderson(max_iter=20)], ids=["gmres", "anderson"])
@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf])
def test_a_cotangent_that_is_not_finite_spoils_the_gradient_of_its_sample_alone(
    solver: Solver, spoilt: float
) -> None:
    a = torch.full((3, 2), 0.5, dtype=F64, requires_grad=True)
    deq = DEQ(FixedPointIteration(max_iter=60), IFT(solver=solver), compile="fixed")
    z, _ = deq(lambda z: a * z + 1, torch.zeros(3, 2, dtype=F64))
    (g,) = torch.autograd.grad(z, a, torch.tensor([[1.0, 1.0], [spoilt, 1.0], [1.0, 1.0]], dtype=F64))
    assert g[1].isnan().all()
    torch.testing.assert_close(g[[0, 2]], torch.full((2, 2), 4.0, dtype=F64))  # 1 / (1 − a)²


def test_cotangents_that_float32_can_hardly_hold_have_their_gradients() -> None:
    a = torch.full((3, 1), 0.5, requires_grad=True)
    deq = DEQ(FixedPointIteration(max_iter=40), IFT(solver=GMRES(max_iter=3)), compile="fixed")
    z, _ = deq(lambda z: a * z + 1, torch.zeros(3, 1))
    (g,) = torch.autograd.grad(z, a, torch.tensor([[1.0], [1e-37], [0.0]]))
    torch.testing.assert_close(g, torch.tensor([[4.0], [4e-37], [0.0]]), rtol=1e-5, atol=0)


def test_what_f_changes_in_place_is_an_error_and_names_are_refused() -> None:
    deq = DEQ(FixedPointIteration(max_iter=3), JFB(), compile="fixed")
    with pytest.raises(RuntimeError, match="in place"):
        deq(lambda z: z.mul_(0.5) + 1, torch.zeros(2, 3))
    norm = nn.BatchNorm1d(3)
    with pytest.raises(RuntimeError, match=r"buffer in place.*eval\(\)"):
        deq(lambda z: norm(z) / 2, torch.randn(4, 3))
    deq(lambda z: norm.eval()(z) / 2, torch.randn(4, 3))
    with pytest.raises(ValueError, match="modules="):
        DEQ(modules=[norm], compile="fixed")


def test_an_f_that_has_changed_before_the_backward_pass_is_an_error() -> None:
    layer, x, scale = layer_of(), data(), 0.9
    deq = DEQ(Anderson(max_iter=5), IFT(solver=GMRES(max_iter=3)), compile="fixed")
    z, _ = deq(lambda z: torch.tanh(scale * layer(z) + x), torch.zeros_like(x))
    scale = 0.2
    with pytest.raises(RuntimeError, match="f gave another value in the backward pass"):
        z.sum().backward()


def test_leaves_are_measured_apart_if_the_norm_says_so() -> None:
    f = lambda s: {"big": 0 * s["big"] + 1e3, "small": s["small"].cos()}  # noqa: E731
    z0 = {"big": torch.zeros(1, 100), "small": torch.zeros(1, 1)}
    solver = FixedPointIteration(max_iter=5, tol=1e-3, stop_mode="rel", norm="max")
    got = DEQ(solver, JFB(), compile="fixed")(f, z0)[1]
    with pytest.warns(ConvergenceWarning):
        want = DEQ(solver, JFB())(f, z0)[1]
    assert got.status.tolist() == [Status.MAX_ITER]
    assert float(got.residual) > 0.1
    torch.testing.assert_close(got.residual, want.residual)


@pytest.mark.parametrize(
    "returned", [None, [1.0], torch.ones(2, 3, dtype=torch.bool)], ids=["none", "list", "bool"]
)
def test_what_f_returns_is_looked_at(returned: Any) -> None:
    with pytest.raises(TypeError, match="f returned"):
        DEQ(FixedPointIteration(max_iter=2), JFB(), compile="fixed")(lambda z: returned, torch.zeros(2, 3))


def test_what_is_returned_is_not_the_callers_memory() -> None:
    z0 = torch.zeros(2, 3)
    z, solution = DEQ(FixedPointIteration(max_iter=1), JFB(), compile="fixed")(lambda z: z, z0)
    for part in (z, solution.z):
        assert part.untyped_storage().data_ptr() != z0.untyped_storage().data_ptr()


def test_a_state_of_several_leaves_and_a_system_that_is_one_sample() -> None:
    layer, x = layer_of(), data()

    def f(state: dict[str, Any]) -> dict[str, Any]:
        a, c = state["a"], state["c"]
        return {
            "a": torch.tanh(layer(a) + x + 0.1 * c.real),
            "c": torch.complex(c.imag.cos() / 2, a.sin() / 2),
        }

    z0 = {"a": torch.zeros_like(x), "c": torch.complex(x, x)}
    for options in ({}, {"batch_dims": 0}):
        made = []
        for deq in (
            DEQ(Anderson(max_iter=40), IFT(solver=GMRES(max_iter=40)), compile="fixed", **options),
            DEQ(Anderson(tol=1e-12), IFT(solver=GMRES(tol=1e-12)), **options),
        ):
            z, _ = deq(f, z0)
            loss = z["a"].sum() + z["c"].abs().square().sum()
            made.append([z["a"], z["c"], *torch.autograd.grad(loss, layer.weight)])
        for got, want in zip(*made, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_a_sample_that_is_not_finite_is_said_to_be_so() -> None:
    _, solution = DEQ(FixedPointIteration(max_iter=4), JFB(), compile="fixed")(
        lambda z: torch.tensor([[0.5], [torch.inf]]) * z + 1, torch.zeros(2, 1)
    )
    assert solution.status.tolist() == [Status.MAX_ITER, Status.NON_FINITE]


@pytest.mark.parametrize(
    ("solver", "grad"),
    [
        (FixedPointIteration(max_iter=4), PhantomGrad(steps=2)),
        (Anderson(max_iter=4), IFT(solver=GMRES(max_iter=3))),
        (Broyden(max_iter=4), IFT(solver=FixedPointIteration(max_iter=3))),
    ],
    ids=["phantom", "gmres", "picard"],
)
def test_a_training_step_is_one_graph(solver: Solver, grad: GradMethod) -> None:
    layer, encoder, x = layer_of(), layer_of(), data()
    deq = DEQ(solver, grad, compile="fixed")
    parameters = [layer.weight, encoder.weight]

    def loss(x: Tensor) -> Tensor:
        u = encoder(x)
        z, solution = deq(lambda z: torch.tanh(layer(z) + u), torch.zeros_like(u))
        return z.square().sum() + solution.residual.sum()

    graphs = CompileCounter()
    whole: Callable[[Tensor], Tensor] = torch.compile(loss, fullgraph=True, backend=graphs)
    want = torch.autograd.grad(loss(x), parameters)
    got = torch.autograd.grad(whole(x), parameters)
    assert graphs.frame_count == 1
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    whole(data() * 2)
    assert graphs.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"solver": NewtonKrylov()}, TypeError, "NewtonKrylov.* no fixed count"),
        ({"solver": Anderson(compact=True)}, TypeError, "no fixed count"),
        ({"grad": IFT(solver=BiCGSTAB())}, TypeError, r"IFT\(solver=BiCGSTAB\(\)\) has no fixed count"),
        ({"grad": IFT(clip=2.0)}, TypeError, "without clip"),
        ({"grad": SHINE()}, TypeError, "SHINE.* has no fixed count"),
        ({"record": (2,)}, ValueError, "record"),
        ({"throw": True}, ValueError, "throw"),
        ({"compile": "fix"}, ValueError, "'fixed', or a dictionary"),
    ],
    ids=str,
)
def test_what_has_no_fixed_count_raises(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        DEQ(**{"compile": "fixed", **options})


def test_it_prints_as_the_call() -> None:
    assert repr(DEQ(Anderson(), JFB(), compile="fixed")) == "DEQ(Anderson(), JFB(), compile='fixed')"
