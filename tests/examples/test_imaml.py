"""Implicit MAML: its meta-gradient against closed forms, and its study."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import torchdeq
from torchdeq.zoo.imaml import IMAML

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
F64 = torch.float64
EXACT = torchdeq.CG(max_iter=200, tol=1e-11)
PENALTY = 2.0


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def tasks(count: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y, query, target = (torch.randn(count, 6, n, dtype=F64, generator=generator) for n in (3, 1, 3, 1))
    return x, y, query, target


def meta_gradient(model: Any, network: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    x, y, query, target = batch
    loss = (model(x, y, query) - target).square().sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])


def dense(model: IMAML, x: Tensor, y: Tensor, query: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """∇²(L + λ/2 ‖φ − θ‖²) / λ and ∇L(φ*; query) of one task at what the model has adapted to."""
    phi = {n: p[0].detach() for n, p in model.adapted(x[None], y[None]).items()}
    names, sizes = list(phi), [p.numel() for p in phi.values()]

    def unflat(flat: Tensor) -> dict[str, Tensor]:
        return {n: t.reshape(phi[n].shape) for n, t in zip(names, flat.split(sizes), strict=True)}

    def fit(flat: Tensor) -> Tensor:
        return model.loss(functional_call(model.network, unflat(flat), (x,)), y)

    def outer(flat: Tensor) -> Tensor:
        return (functional_call(model.network, unflat(flat), (query,)) - target).square().sum()

    flat = torch.cat([p.flatten() for p in phi.values()])
    eye = torch.eye(len(flat), dtype=F64)
    return eye + torch.func.hessian(fit)(flat) / model.penalty, torch.func.grad(outer)(flat)


def test_of_a_linear_network_it_is_ridge_regression_around_theta() -> None:
    # φ* = θ + (XᵀX + λK/2 I)⁻¹ Xᵀ (y − X θ) for a mean square, which autograd differentiates by itself.
    torch.manual_seed(0)
    net = nn.Linear(3, 1).double()
    x, y, query, target = tasks()
    model = IMAML(net, nn.functional.mse_loss, penalty=PENALTY, rate=0.1, steps=400, adjoint=EXACT)
    theta = torch.cat([net.weight.mT, net.bias[None]])  # (4, 1)
    ones = torch.ones(3, 6, 1, dtype=F64)
    a, b = torch.cat([x, ones], dim=2), torch.cat([query, ones], dim=2)
    ridge = torch.linalg.solve(a.mT @ a + PENALTY * 3 * torch.eye(4, dtype=F64), a.mT @ (y - a @ theta))
    predictions = b @ (theta + ridge)
    torch.testing.assert_close(model(x, y, query), predictions, rtol=1e-9, atol=1e-10)
    loss = (predictions - target).square().sum()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])
    found = meta_gradient(model, net, (x, y, query, target))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_the_meta_gradient_is_that_of_a_dense_solve() -> None:
    net, batch = network(), tasks()
    model = IMAML(net, nn.functional.mse_loss, penalty=PENALTY, rate=0.1, steps=400, adjoint=EXACT)
    expected = sum(torch.linalg.solve(*dense(model, *task)) for task in zip(*batch, strict=True))
    torch.testing.assert_close(meta_gradient(model, net, batch), expected, rtol=1e-8, atol=1e-9)
    assert model.linear is not None
    assert bool(model.linear.converged.all())


def test_the_default_makes_five_steps_of_cg() -> None:
    net, batch = network(), tasks(1)
    model = IMAML(net, nn.functional.mse_loss, penalty=PENALTY, rate=0.1, steps=400)
    matrix, b = dense(model, *(t[0] for t in batch))
    u, r = torch.zeros_like(b), b
    p = r
    for _ in range(5):
        alpha = (r @ r) / (p @ matrix @ p)
        u, after = u + alpha * p, r - alpha * (matrix @ p)
        p = after + (after @ after) / (r @ r) * p
        r = after
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # five are meant
        found = meta_gradient(model, net, batch)
    torch.testing.assert_close(found, u, rtol=1e-8, atol=1e-9)
    assert (u - torch.linalg.solve(matrix, b)).norm() > 1e-6 * u.norm()  # else more steps would do too


def test_a_penalty_too_small_for_cg_is_told() -> None:
    net, batch = network(), tasks()
    model = IMAML(net, lambda p, y: -(p - y).square().mean(), penalty=1e-3, rate=0.01, steps=1)
    with pytest.warns(torchdeq.ConvergenceWarning, match="curves down"):
        meta_gradient(model, net, batch)
    assert model.linear is not None
    assert (model.linear.status == torchdeq.Status.STALLED).any()


@pytest.mark.parametrize(
    "options",
    [
        {"solver": torchdeq.NewtonCG(tol=1e-11, max_iter=500)},
        {
            "deq": torchdeq.DEQ(
                torchdeq.FixedPointIteration(tol=1e-12, max_iter=500), torchdeq.IFT(solver=EXACT)
            )
        },
        {"deq": torchdeq.DEQ(torchdeq.FixedPointIteration(tol=1e-10, max_iter=500), torchdeq.Unroll())},
    ],
    ids=["NewtonCG", "DEQ, IFT", "DEQ, Unroll"],
)
def test_other_solvers_and_gradient_methods_give_the_same(options: dict[str, Any]) -> None:
    net, batch = network(), tasks()
    setting: dict[str, Any] = {"penalty": PENALTY, "rate": 0.1, "adjoint": EXACT}
    own = IMAML(net, nn.functional.mse_loss, steps=400, **setting)
    other = IMAML(net, nn.functional.mse_loss, **setting, **options)
    torch.testing.assert_close(other(*batch[:3]), own(*batch[:3]), rtol=1e-8, atol=1e-9)
    found, expected = (meta_gradient(model, net, batch) for model in (other, own))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)


def test_a_task_does_not_see_the_others() -> None:
    net, batch = network(), tasks()
    model = IMAML(net, nn.functional.mse_loss, penalty=PENALTY, adjoint=EXACT)
    alone = torch.cat([model(*(t[i : i + 1] for t in batch[:3])) for i in range(3)])
    torch.testing.assert_close(model(*batch[:3]), alone, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty": 0.0}, "penalty=0.0.*above 0"),
        ({"rate": -1.0}, "rate=-1.0.*above 0"),
        ({"steps": 0}, "steps=0.*above 0"),
        ({"solver": "anderson", "deq": torchdeq.DEQ()}, "one of them"),
    ],
)
def test_values_out_of_range_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IMAML(network(), nn.functional.mse_loss, **options)


# The study ------------------------------------------------------------------------------------------------


def test_its_baselines_are_what_they_are_called(study: ModuleType) -> None:
    net, batch = network(), tasks()
    setting: dict[str, Any] = {"penalty": PENALTY, "rate": 0.1}
    model = IMAML(net, nn.functional.mse_loss, steps=400, adjoint=EXACT, **setting)
    unrolled = study.Unrolled(model=model, steps=300, **setting)
    torch.testing.assert_close(unrolled(*batch[:3]), model(*batch[:3]), rtol=1e-8, atol=1e-9)
    found, exact = (meta_gradient(one, net, batch) for one in (unrolled, model))
    torch.testing.assert_close(found, exact, rtol=1e-7, atol=1e-8)
    first = study.Unrolled(model=model, steps=300, first_order=True, **setting)
    expected = sum(dense(model, *task)[1] for task in zip(*batch, strict=True))
    torch.testing.assert_close(meta_gradient(first, net, batch), expected, rtol=1e-8, atol=1e-9)


def test_its_options_change_what_is_measured(study: ModuleType) -> None:
    net, batch = network(), tasks()
    gradients = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torchdeq.ConvergenceWarning)
        for options in ({}, {"grad": "jfb"}, {"solver": "anderson"}):
            options = sys.modules["study"].Options(**options)
            model = study.implicit(
                options, net, nn.functional.mse_loss, 5, steps=5, penalty=PENALTY, rate=0.1
            )
            gradients.append(meta_gradient(model, net, batch))
    own, jfb, anderson = gradients
    assert (jfb - own).norm() > 1e-3 * own.norm()
    assert (anderson - own).norm() > 1e-3 * own.norm()


def test_tasks_of_test_are_of_classes_that_training_has_not(study: ModuleType) -> None:
    digits = study.Digits(0)
    pools = {split: torch.cat(pool) for split, pool in digits.pools.items()}
    assert (len(digits.pools["train"]), len(digits.pools["test"])) == (7, 3)
    assert sum(len(pool) for pool in pools.values()) == 1797
    x, y, query, target = digits.draw(study.seeded(0), 5, "test")
    assert (x.shape, y.shape, query.shape, target.shape) == ((5, 3, 64), (5, 3), (5, 15, 64), (5, 15))
    known = {tuple(image.tolist()) for image in pools["train"]}
    assert not any(tuple(image.tolist()) in known for image in query.flatten(0, 1))


def test_the_study_runs(study: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert study.main(["--quick", "--out", str(tmp_path)]) == 0
    assert "Meta-learning with implicit gradients" in capsys.readouterr().out
    (found,) = json.loads((tmp_path / "imaml.json").read_text())["measured"]
    text = (tmp_path / "imaml.md").read_text()
    assert all(claim.text in text for claim in study.STUDY.claims)
    assert (tmp_path / "imaml.png").stat().st_size > 10_000
    # Eight steps of descent are nearer to the minimum than one, and autograd remembers all of those it unrolls.
    for arm in study.ARMS:
        assert found[f"gradient {arm} error"] < found[f"gradient {arm} first error"]
    assert found["gradient imaml5 growth"] < 1.1 < 2 < found["gradient unrolled growth"]
    assert found["sinusoid first steps then"] >= 2
