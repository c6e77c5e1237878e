"""The comparison of gradient methods says what dense algebra says, and leaves the model alone."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdeq
from torchdeq import (
    DEQ,
    GMRES,
    GRADS,
    IFT,
    Anderson,
    ConvergenceError,
    FixedPointIteration,
    PhantomGrad,
    SimpleFixedPointIteration,
    Unroll,
    as_grad,
    get_deq,
)
from torchdeq.diagnostics import Candidate, Comparison, compare_gradients, default_candidates
from torchdeq.diagnostics.memory import SavedBytes
from torchdeq.diagnostics.trials import with_method
from torchdeq.grad import TruncatedCycle


class Linear(nn.Module):
    """z = z Wᵀ + x, with everything known in closed form."""

    def __init__(self, n: int = 8, gain: float = 0.5, deq: DEQ | None = None):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        w = torch.randn(n, n, generator=generator)
        self.w = nn.Parameter(gain * w / torch.linalg.matrix_norm(w, ord=2))
        self.deq = deq or DEQ(Anderson(tol=1e-6, stop_mode="rel"), IFT(solver=GMRES(tol=1e-6)))

    def forward(self, x: Tensor) -> Tensor:
        z, _ = self.deq(lambda z: z @ self.w.T + x, torch.zeros_like(x))
        return z


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum() / 2


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def rows(comparison: Comparison) -> dict[str, torchdeq.diagnostics.Row]:
    return {row.name: row for row in comparison.rows}


def test_error_and_cosine_are_those_of_dense_algebra() -> None:
    model = Linear()
    found = rows(compare_gradients(model, loss, X, repeats=1))
    w, x = model.w.detach().double(), X.double()
    z = torch.linalg.solve(torch.eye(8, dtype=w.dtype) - w, x.T).T
    u = torch.linalg.solve(torch.eye(8, dtype=w.dtype) - w.T, z.T).T  # the cotangent of this loss is z
    exact = u.T @ z
    for k in (1, 5):
        v = sum(z @ torch.linalg.matrix_power(w, i) for i in range(k))
        phantom = v.T @ z
        row = found["JFB" if k == 1 else "phantom, 5 steps"]
        # The phantom steps also move the state on, by no more than the forward residual.
        assert row.error == pytest.approx(float((phantom - exact).norm() / exact.norm()), rel=1e-3, abs=1e-5)
        cosine = float((phantom * exact).sum() / phantom.norm() / exact.norm())
        assert row.cosine == pytest.approx(cosine, abs=1e-5)
    # Forward and adjoint residuals of 1e-6 are amplified by at most 1 / (1 − 0.5) each, and twice in a product.
    for name in ("IFT", "IFT, hook"):
        assert found[name].error < 1e-5
    # Unrolled k steps lack the terms W^i with i ≥ k of the adjoint's series; at z* = Σ W^i x these weigh k times.
    assert found["unrolled"].error < found["unrolled"].nfe * 1e-5


def test_costs_are_counted() -> None:
    found = rows(compare_gradients(Linear(), loss, X, repeats=3))
    solution = Linear().deq(lambda z: z @ Linear().w.T + X, torch.zeros_like(X))[1]
    assert {found[name].nfe for name in ("IFT", "IFT, hook", "JFB")} == {solution.nfe}
    assert found["IFT"].vjps == found["IFT, hook"].vjps
    assert found["JFB"].vjps is None
    assert found["unrolled"].vjps is None
    for name, row in found.items():
        # Half steps, at most 43 of them, leave 0.75^43 = 4e-6 of the error at ‖J‖ = 0.5.
        assert row.converged or name == "reversible"
        assert row.residual <= (1e-4 if name == "reversible" else 1e-6)
        assert 0 < row.quartiles[0] <= row.seconds <= row.quartiles[1]


def test_only_unrolling_saves_more_for_more_evaluations() -> None:
    def saved(gain: float) -> dict[str, int]:
        table = compare_gradients(Linear(gain=gain), loss, X, repeats=1)
        return {row.name: row.saved_bytes for row in table.rows}

    few, many = saved(0.2), saved(0.9)
    assert many["unrolled"] > 1.5 * few["unrolled"]
    for name in ("IFT", "IFT, hook", "JFB", "phantom, 5 steps"):
        assert many[name] == few[name] < few["unrolled"]


def test_the_model_is_not_changed() -> None:
    model = nn.Sequential(Linear(), nn.BatchNorm1d(8))
    model[0].w.grad = torch.ones(8, 8)
    deq, before = model[0].deq, copy.deepcopy(model.state_dict())
    compare_gradients(model, loss, X, repeats=1)
    assert model[0].deq is deq
    assert bool((model[0].w.grad == 1).all())
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_shared_layer_is_replaced_wherever_it_is_used() -> None:
    deq = DEQ(Anderson(tol=1e-6, stop_mode="rel"), Unroll())  # would raise if it were left in
    model = nn.Sequential(Linear(deq=deq), Linear(deq=deq))
    table = compare_gradients(model, loss, X, repeats=1)
    assert rows(table)["IFT"].error < 1e-5


def test_in_eval_mode_the_eval_solver_is_used() -> None:
    model = Linear(
        deq=DEQ(Anderson(tol=1e-2, stop_mode="rel"), eval_solver=Anderson(tol=1e-6, stop_mode="rel"))
    )
    assert rows(compare_gradients(model, loss, X, repeats=1))["IFT"].residual > 1e-6
    assert rows(compare_gradients(model.eval(), loss, X, repeats=1))["IFT"].residual <= 1e-6


def test_any_list_of_methods_can_be_compared() -> None:
    candidates = [
        Candidate(name="damped", grad=PhantomGrad(steps=3, tau=0.7)),
        Candidate(name="Picard", grad=Unroll(), solver=FixedPointIteration(tol=1e-3)),
    ]
    table = compare_gradients(Linear(), loss, X, candidates=candidates, repeats=1)
    assert [row.name for row in table.rows] == ["damped", "Picard"]
    assert len(str(table).splitlines()) == 6
    assert len({len(line) for line in str(table).splitlines()[:-1]}) == 1
    markdown = table.to_markdown().splitlines()
    assert all(line.count("|") == 9 for line in markdown[:4])


def test_unrolling_stops_where_the_forward_solver_does() -> None:
    solver = Anderson(tol=3e-4, stop_mode="rel", max_iter=20)
    (unrolled,) = (c for c in default_candidates(solver) if c.name == "unrolled")
    assert unrolled.solver == FixedPointIteration(tol=3e-4, stop_mode="rel", max_iter=200)


@pytest.mark.parametrize("max_iter", [2, 3])
def test_a_solve_that_did_not_converge_is_marked(max_iter: int) -> None:
    slow = Candidate(name="slow", grad=PhantomGrad(), solver=FixedPointIteration(tol=1e-6, max_iter=max_iter))
    table = compare_gradients(Linear(), loss, X, candidates=[slow], repeats=1)
    assert not table.rows[0].converged
    assert "* a solve did not converge" in str(table)


def test_without_an_exact_gradient_there_is_no_table() -> None:
    with pytest.raises(torchdeq.ConvergenceError, match="no exact gradient to compare with"):
        compare_gradients(Linear(), lambda m, x: m(x * float("nan")).sum(), X)


def test_no_grad_of_inputs_and_of_a_criterion_outside_the_model_is_touched() -> None:
    x, criterion = X.double().requires_grad_(), nn.Linear(8, 1, dtype=torch.float64)
    twice = 2 * x  # an input with a graph of its own
    random = torch.get_rng_state()
    table = compare_gradients(
        Linear().double(), lambda m, x: criterion(m(x)).mean() + 0 * torch.rand(1), twice, repeats=2
    )
    assert rows(table)["IFT"].error < 1e-5
    assert x.grad is None
    assert criterion.weight.grad is None
    assert torch.equal(torch.get_rng_state(), random)
    twice.sum().backward()  # its graph is still there


def test_random_numbers_of_the_loss_are_the_same_for_all() -> None:
    drop = nn.Dropout(0.5)
    table = compare_gradients(Linear(), lambda m, x: drop(m(x)).square().sum(), X, repeats=1)
    # Another mask would be an error of order one. Residuals of 1e-6 are amplified as without a mask.
    assert rows(table)["IFT"].error < 1e-5


@pytest.mark.parametrize("form", ["model", "map"])
def test_a_loss_that_is_not_the_same_each_time_is_an_error(form: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def noisy(z: Tensor) -> Tensor:
        return (z * torch.rand(z.shape, generator=generator, dtype=z.dtype)).sum()

    call: tuple[Any, ...] = (Linear(), lambda m, x: noisy(m(x)), X)
    if form == "map":
        call = (DEQ(), linear_map()[0], torch.zeros(5, 8, dtype=torch.float64), noisy)
    with pytest.raises(ValueError, match=r"the loss was \S+ and then .* torch.Generator"):
        compare_gradients(*call, repeats=1)


def test_a_zero_gradient_is_an_error() -> None:
    with pytest.raises(ValueError, match="the exact gradient is zero"):
        compare_gradients(Linear(), lambda m, x: 0 * m(x).sum(), X, repeats=1)


def test_a_deq_that_is_not_called_is_an_error() -> None:
    outside = Linear().double()
    for wrong in (lambda m, x: outside(x).sum() + m.w.sum(), lambda m, x: m.w.square().sum()):
        with pytest.raises(ValueError, match="called no torchdeq.DEQ of the copy of Linear"):
            compare_gradients(Linear().double(), wrong, X.double(), repeats=1)


def test_recorded_states_are_no_obstacle_to_shine() -> None:
    class Recorded(Linear):
        def forward(self, x: Tensor) -> Tensor:
            z, solution = self.deq(lambda z: z @ self.w.T + x, torch.zeros_like(x))
            assert len(solution.states) == 1
            return z

    model = Recorded(deq=DEQ(Anderson(tol=1e-6, stop_mode="rel"), record=[2]))
    found = rows(compare_gradients(model, loss, X, repeats=1))
    assert not found["SHINE"].failure
    assert found["SHINE, refined"].error < 1e-2  # its adjoint goes to the default tolerance of IFT


# A map of the user's ------------------------------------------------------------------------------------


def linear_map(dtype: torch.dtype = torch.float64) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """f(z) = z Wᵀ + x with its W and x, both leaves that require a gradient."""
    model = Linear().to(dtype)
    w, x = model.w.detach().requires_grad_(), X.clone().to(dtype).requires_grad_()
    return lambda z: z @ w.T + x, w, x


def half_square(z: Tensor) -> Tensor:
    return z.square().sum() / 2


def test_on_a_map_error_and_cosine_are_those_of_dense_algebra() -> None:
    f, w, x = linear_map()
    deq = DEQ(Anderson(tol=1e-9, stop_mode="rel"), IFT(solver=GMRES(tol=1e-9)))
    table = compare_gradients(deq, f, torch.zeros(5, 8, dtype=torch.float64), half_square, repeats=1)
    found, eye = rows(table), torch.eye(8, dtype=torch.float64)
    with torch.no_grad():
        z = torch.linalg.solve(eye - w, x.T).T
        u = torch.linalg.solve(eye - w.T, z.T).T
        exact = torch.cat([(u.T @ z).flatten(), u.flatten()])
        for name, k in (
            ("JFB", 1),
            ("phantom, 5 steps", 5),
            ("phantom, 5 terms", 5),
            ("unrolled, last 5", 5),
        ):
            v = sum(z @ torch.linalg.matrix_power(w, i) for i in range(k))
            biased = torch.cat([(v.T @ z).flatten(), v.flatten()])
            error = float((biased - exact).norm() / exact.norm())
            # The order of w and x in the vector is not ours to know, and neither norm nor cosine depends on it.
            # Plain iteration has reached 1e-9; its last five steps saw states a factor 0.5⁻⁵ further off.
            assert found[name].error == pytest.approx(error, abs=1e-7)
            cosine = float((biased * exact).sum() / biased.norm() / exact.norm())
            assert found[name].cosine == pytest.approx(cosine, abs=1e-7)
    for name in ("IFT", "IFT, hook", "IFT, order 2"):
        assert found[name].error < 1e-7
    assert "float64 to 1e-10" in table.setting


def test_on_a_map_in_single_precision_the_table_says_how_good_the_reference_is() -> None:
    f, _, _ = linear_map(torch.float32)
    deq = DEQ(Anderson(tol=1e-4, stop_mode="rel"))
    table = compare_gradients(deq, f, torch.zeros(5, 8), half_square, repeats=1)
    said = re.search(r"exact: float32, residuals (\S+) forward and (\S+) adjoint\.", table.setting)
    assert said
    assert (
        max(float(said[1]), float(said[2])) < 1e-5
    )  # rounding is 1.2e-7, and the condition of I − J at most 3
    assert rows(table)["IFT"].error < 1e-2


def test_a_map_its_tensors_and_the_random_state_are_not_changed() -> None:
    f, w, x = linear_map()
    norm = nn.BatchNorm1d(8, dtype=torch.float64)
    w.grad, before, random = torch.ones_like(w), copy.deepcopy(norm.state_dict()), torch.get_rng_state()
    deq = DEQ(batch_dims=0)
    candidates = [
        Candidate(name="noisy", grad=TruncatedCycle(noise=0.1), solver=SimpleFixedPointIteration()),
        Candidate(name="IFT", grad=IFT()),
    ]
    z0 = torch.zeros(5, 8, dtype=torch.float64)
    compare_gradients(
        deq, lambda z: torch.tanh(0.1 * norm(f(z)) + x), z0, half_square, candidates=candidates, repeats=1
    )
    assert bool((w.grad == 1).all())
    assert x.grad is None
    assert norm.weight.grad is None
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


def test_a_map_may_close_over_what_has_a_graph_of_its_own() -> None:
    encoder, inputs = nn.Linear(4, 8, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    f, w, _ = linear_map()
    x = encoder(inputs)
    table = compare_gradients(
        DEQ(Anderson(tol=1e-9), IFT(solver=GMRES(tol=1e-9))),
        lambda z: z @ w.T + x,
        torch.zeros(5, 8, dtype=torch.float64),
        half_square,
        repeats=2,
    )
    assert rows(table)["IFT"].error < 1e-7
    x.sum().backward()  # its graph is still there
    assert encoder.weight.grad is not None


def test_a_module_is_compared_on_its_parameters_and_a_state_may_be_nested() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6, dtype=torch.float64)

        def forward(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
            a = torch.tanh(0.3 * self.layer(state["a"]) + 1)
            return {"a": a, "b": (0.2j * state["b"] + a[:, :2])}

    z0 = {"a": torch.zeros(3, 6, dtype=torch.float64), "b": torch.zeros(3, 2, dtype=torch.complex128)}
    table = compare_gradients(
        DEQ(Anderson(tol=1e-9), IFT(solver=GMRES(tol=1e-9))),
        Block(),
        z0,
        lambda z: z["b"].abs().square().sum(),
        repeats=1,
    )
    assert rows(table)["IFT"].error < 1e-7


def test_a_method_that_fails_is_a_row_that_says_so() -> None:
    f, _, _ = linear_map()
    candidates = [
        Candidate(name="wrong solver", grad=Unroll()),
        Candidate(name="IFT", grad=IFT()),
    ]
    deq, z0 = DEQ(Anderson(tol=1e-6)), torch.zeros(5, 8, dtype=torch.float64)
    table = compare_gradients(deq, f, z0, half_square, candidates=candidates, repeats=1)
    assert table.rows[0].failure.startswith(
        "TypeError: Unroll differentiates the steps of FixedPointIteration"
    )
    assert math.isnan(table.rows[0].error)
    assert not table.rows[1].failure
    assert "wrong solver: TypeError" in str(table).splitlines()[-1]
    assert "wrong solver: TypeError" in table.to_markdown()
    model = compare_gradients(Linear(), loss, X, candidates=candidates, repeats=1)
    assert [bool(row.failure) for row in model.rows] == [True, False]


def test_every_registered_method_is_among_the_defaults() -> None:
    compared = {type(c.grad) for c in default_candidates(Anderson())}
    assert compared == {type(as_grad(name)) for name in GRADS}


def test_a_copy_of_a_model_holds_the_buffers_of_its_own_modules() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(8)
            self.deq = DEQ(Anderson(tol=1e-5), batch_dims=0, modules=[self.norm])

        def forward(self, x: Tensor) -> Tensor:
            return self.deq(lambda z: torch.tanh(0.1 * self.norm(z) + x), torch.zeros_like(x))[0]

    model = Normed()
    table = compare_gradients(model, loss, X, candidates=[Candidate(name="IFT", grad=IFT())], repeats=1)
    assert table.rows[0].error < 1e-3
    assert model.norm.num_batches_tracked.item() == 0
    copied = with_method(model, IFT(), None, [], [])
    copied(X)
    assert copied.norm.num_batches_tracked.item() == 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f, z0: compare_gradients(nn.Linear(8, 8), f, z0, half_square), TypeError, "got a Linear"),
        (
            lambda f, z0: compare_gradients(get_deq(), f, z0, half_square),
            TypeError,
            "Give a DEQ with the solver",
        ),
        (lambda f, z0: compare_gradients(DEQ(), f, z0), ValueError, "compare_gradients(deq, f, z0, loss)"),
        (
            lambda f, z0: compare_gradients(DEQ(), torch.cos, z0, half_square),
            ValueError,
            "no tensor that requires",
        ),
        (
            lambda f, z0: compare_gradients(DEQ(), lambda z: z + 1 + 0 * f(z), z0, half_square),
            ConvergenceError,
            "no exact",
        ),
        (lambda f, z0: compare_gradients(DEQ(), f, z0.long(), half_square), TypeError, "dtype torch.int64"),
    ],
)
def test_on_a_map_errors_teach(call: Any, error: type[Exception], message: str) -> None:
    f, _, _ = linear_map()
    with pytest.raises(error, match=re.escape(message)):
        call(f, torch.zeros(5, 8, dtype=torch.float64))


def test_a_model_without_an_equilibrium_is_an_error() -> None:
    with pytest.raises(ValueError, match="Linear contains no torchdeq.DEQ"):
        compare_gradients(nn.Linear(2, 2), loss, X)


def test_a_model_without_parameters_is_an_error() -> None:
    with pytest.raises(ValueError, match="requires_grad"):
        compare_gradients(Linear().requires_grad_(False), loss, X)


def test_no_repeats_is_an_error() -> None:
    with pytest.raises(ValueError, match="repeats=0"):
        compare_gradients(Linear(), loss, X, repeats=0)


def test_saved_bytes_counts_storages_once_and_leaves_out_what_is_ignored() -> None:
    w = torch.randn(32, 32, requires_grad=True)
    x = torch.randn(16, 32)
    with SavedBytes(ignore=[w]) as saved:
        y = (x @ w) @ w  # saves x, w, x w, w
        assert saved.now == 2 * 16 * 32 * 4
        z = y.view(32, 16).exp()  # saves its result
        a, b = z[:16], z[16:]
        (a * b).sum().backward()  # saves two views of it
    assert saved.peak == 3 * 16 * 32 * 4
    assert saved.now == 0


def test_saved_bytes_are_given_back_by_a_graph_that_is_dropped() -> None:
    x = torch.randn(64, requires_grad=True)
    with SavedBytes() as saved:
        y = x.exp()
        assert saved.now == 256
        del y
        assert saved.now == 0
    assert saved.peak == 256
