"""The fixed-point network contracts by what it says, JFB's gradient is one step's, and the study runs."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, cross_entropy

from torchdeq import DEQ, GMRES, IFT, JFB, FixedPointIteration, Unroll
from torchdeq.zoo.jfb import FixedPointNetwork

ROOT = Path(__file__).parents[2]
EXACT = FixedPointIteration(tol=1e-13, stop_mode="rel", max_iter=100)


def network(method: JFB | IFT | Unroll, *, scale: float = 1.0, size: int = 4) -> FixedPointNetwork:
    """A small one in float64, solved to rounding, its convolutions scaled and constrained."""
    torch.manual_seed(0)
    model = FixedPointNetwork(DEQ(EXACT, method), channels=4, size=size).double()
    with torch.no_grad():
        model.first.weight.mul_(scale)
        model.second.weight.mul_(scale)
    model.constrain(steps=200, tol=0.0)
    return model.eval()


def operator_norm(kernel: Tensor, size: int) -> float:
    """Of the zero-padded convolution of a size × size image, by its dense matrix."""
    channels = kernel.shape[1]
    basis = torch.eye(channels * size**2, dtype=kernel.dtype).reshape(-1, channels, size, size)
    return torch.linalg.matrix_norm(conv2d(basis, kernel, padding=1).flatten(1), ord=2).item()


def test_the_convolutions_keep_the_norms_that_are_allowed() -> None:
    model = network(JFB(), scale=10.0)
    for conv in (model.first, model.second):
        assert operator_norm(conv.weight.detach(), 4) == pytest.approx(math.sqrt(0.5), rel=1e-6)


def test_weights_below_the_norm_are_left_alone() -> None:
    model = network(JFB(), scale=0.1)
    before = model.first.weight.clone()
    model.constrain()
    assert torch.equal(model.first.weight, before)
    assert operator_norm(before.detach(), 4) < 0.5


def test_a_block_without_weights_is_no_error_and_is_constrained_when_it_has_some_again() -> None:
    model = network(JFB())
    with torch.no_grad():
        model.first.weight.zero_()
        model.constrain()
        assert torch.equal(model.first.weight, torch.zeros_like(model.first.weight))
        model.first.weight.normal_()
    model.constrain(steps=200, tol=0.0)
    assert operator_norm(model.first.weight.detach(), 4) == pytest.approx(math.sqrt(0.5), rel=1e-4)


@pytest.mark.parametrize("rate", [1e-2, 3e-2])
def test_training_keeps_the_constraint(rate: float) -> None:
    torch.manual_seed(0)
    model = FixedPointNetwork(channels=8)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    x, y = torch.rand(32, 1, 8, 8), torch.randint(10, (32,))
    for _ in range(20):
        optimizer.zero_grad()
        cross_entropy(model(x)[0], y).backward()
        optimizer.step()
        model.constrain()
        norms = [operator_norm(conv.weight.detach(), 8) for conv in (model.first, model.second)]
        assert max(norms) < 1.06 * math.sqrt(
            0.5
        )  # power iteration is slow where two singular values are close
    assert min(norms) > 0.9 * math.sqrt(0.5)  # it is active here


def test_the_block_contracts_by_gamma() -> None:
    model = network(JFB(), scale=10.0)
    a, b, v = (torch.randn(8, 4, 4, 4, dtype=torch.float64) for _ in range(3))
    with torch.no_grad():
        moved = (model.block(a, v) - model.block(b, v)).flatten(1).norm(dim=1)
    assert bool((moved <= 0.5 * (1 + 1e-6) * (a - b).flatten(1).norm(dim=1)).all())


def test_the_exact_gradient_is_that_of_all_steps() -> None:
    x = torch.rand(3, 1, 4, 4, dtype=torch.float64)
    found = []
    for method in (IFT(solver=GMRES(tol=1e-13)), Unroll()):
        model = network(method, scale=10.0)
        model(x)[0].square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_the_gradient_of_jfb_is_that_of_one_step() -> None:
    x = torch.rand(3, 1, 4, 4, dtype=torch.float64)
    model = network(JFB(), scale=10.0)
    other = copy.deepcopy(model)
    model(x)[0].square().sum().backward()
    v = other.inject(x)
    with torch.no_grad():
        z, _ = other.deq(lambda z: other.block(z, v), torch.zeros_like(v))
    other.head(other.block(z, v)).square().sum().backward()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)


def test_the_cotangent_is_as_near_to_the_adjoint_solution_as_the_contraction_says() -> None:
    model = network(JFB(), scale=10.0)
    v = model.inject(torch.rand(1, 1, 4, 4, dtype=torch.float64)).detach()
    z, _ = model.deq(lambda z: model.block(z, v), torch.zeros_like(v))
    jacobian = torch.autograd.functional.jacobian(lambda z: model.block(z, v), z.detach()).reshape(64, 64)
    g = torch.randn(64, 100, dtype=torch.float64)
    u = torch.linalg.solve(torch.eye(64, dtype=torch.float64) - jacobian.mT, g)
    assert torch.linalg.matrix_norm(jacobian, ord=2) <= 0.5
    assert bool((torch.cosine_similarity(g, u, dim=0) >= math.sqrt(0.75)).all())


def test_the_explicit_network_is_one_step_from_zero() -> None:
    model = network(JFB())
    x = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        v = model.inject(x)
        assert torch.equal(model.explicit(x), model.head(model.block(torch.zeros_like(v), v)))
        assert not torch.allclose(model.explicit(x), model(x)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contraction": 1.0}, "at most 0.5 for JFB"),
        ({"contraction": 0.0}, "expected γ in \\(0, 1\\)"),
        ({"channels": 3}, "channels=3.*positive even"),
        ({"size": 0}, "size=0.*positive even"),
    ],
)
def test_values_out_of_range_are_errors(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FixedPointNetwork(**options)  # type: ignore[arg-type]


def test_the_study_runs_and_its_numbers_are_what_they_are_called(study: ModuleType, tmp_path: Path) -> None:
    assert study.main(["--quick", "--out", str(tmp_path)]) == 0
    (found,) = json.loads((tmp_path / "jfb.json").read_text())["measured"]
    assert (tmp_path / "jfb.png").stat().st_size > 10_000
    for name in ("jfb", "exact", "explicit"):
        assert 0 <= found[name] <= 100
        assert found[name] == found[f"{name} curve"][-1]
        assert 0 < found[f"{name} backward"] < found[f"{name} epoch"]
    assert 0.8 < found["least cosine"] <= found["mean cosine"] < 1 - 1e-6  # near, and not the same
    assert found["gain over exact"] == found["jfb"] - found["exact"]
    text = (tmp_path / "jfb.md").read_text()
    assert all(claim.text in text for claim in study.CLAIMS)


def test_the_options_change_what_is_measured(study: ModuleType, tmp_path: Path) -> None:
    assert study.main(["--quick", "--grad", "ift", "--solver", "anderson", "--out", str(tmp_path)]) == 0
    (found,) = json.loads((tmp_path / "jfb.json").read_text())["measured"]
    assert found["least cosine"] > 0.9999  # IFT in the place of JFB is exact, to the tolerance of the solve


def test_watching_a_model_leaves_it_as_it_is(study: ModuleType) -> None:
    model = network(JFB()).train()
    before = copy.deepcopy(model.state_dict())
    x, y = torch.rand(4, 1, 4, 4, dtype=torch.float64), torch.arange(4)
    study.gradient(model, JFB(), EXACT, x, y)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_images_of_another_size_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"expected \(B, 1, 8, 8\)"):
        FixedPointNetwork(channels=4)(torch.zeros(2, 1, 9, 9))
