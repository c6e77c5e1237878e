"""The comparison of gradient methods says what dense algebra says, and leaves the model alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import torchdeq
from torchdeq import DEQ, GMRES, IFT, Anderson, FixedPointIteration, PhantomGrad, Unroll
from torchdeq.diagnostics import Candidate, Comparison, compare_gradients, default_candidates
from torchdeq.diagnostics.memory import SavedBytes


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
        row = found["phantom, 1 step" if k == 1 else "phantom, 5 steps"]
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
    assert {found[name].nfe for name in ("IFT", "IFT, hook", "phantom, 1 step")} == {solution.nfe}
    assert found["IFT"].vjps == found["IFT, hook"].vjps
    assert found["phantom, 1 step"].vjps is None
    assert found["unrolled"].vjps is None
    for row in found.values():
        assert row.converged
        assert row.residual <= 1e-6
        assert 0 < row.quartiles[0] <= row.seconds <= row.quartiles[1]


def test_only_unrolling_saves_more_for_more_evaluations() -> None:
    def saved(gain: float) -> dict[str, int]:
        table = compare_gradients(Linear(gain=gain), loss, X, repeats=1)
        return {row.name: row.saved_bytes for row in table.rows}

    few, many = saved(0.2), saved(0.9)
    assert many["unrolled"] > 1.5 * few["unrolled"]
    for name in ("IFT", "IFT, hook", "phantom, 1 step", "phantom, 5 steps"):
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
    unrolled = default_candidates(solver)[-1]
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
