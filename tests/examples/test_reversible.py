"""The reversible model against back-propagation through its steps, written out, and its study."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import torchdeq
from torchdeq.diagnostics import SavedBytes
from torchdeq.zoo.reversible import ReversibleDEQ

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
F64 = torch.float64


def model_and_images() -> tuple[ReversibleDEQ, Tensor]:
    torch.manual_seed(0)
    model = ReversibleDEQ(channels=4).double()
    # At 0 and without a shift relu has no derivative, and a start is rebuilt to rounding only.
    with torch.no_grad():
        model.first[1].bias.normal_()
        model.inner.bias.normal_()
    return model, torch.rand(3, 1, 8, 8, dtype=F64)


def written_out(model: ReversibleDEQ, x: Tensor, steps: int, beta: float) -> Tensor:
    """The logits after so many steps of the two equations."""
    x = model.inject(x)
    y = z = torch.zeros_like(x)
    for _ in range(steps):
        y = (1 - beta) * y + beta * model.block(z, x)
        z = (1 - beta) * z + beta * model.block(y, x)
    return model.head(model.block(z, x))


def gradients(model: ReversibleDEQ, logits: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(logits.square().sum(), list(model.parameters())))


@pytest.mark.parametrize(("steps", "beta"), [(0, 0.5), (1, 0.5), (4, 0.5), (6, 0.3), (3, 0.8)])
def test_value_and_gradient_are_those_of_the_steps(steps: int, beta: float) -> None:
    model, x = model_and_images()
    solver = torchdeq.SimpleFixedPointIteration(max_iter=2 * steps + 1, tol=float("inf"))
    model.deq = torchdeq.DEQ(solver, torchdeq.Reversible(beta=beta))
    logits, solution = model(x)
    expected = written_out(model, x, steps, beta)
    assert solution.nfe == 2 * steps + 1
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    for ours, exact in zip(gradients(model, logits), gradients(model, expected), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-8, atol=1e-8)


def test_the_default_makes_four_steps_in_float64_of_a_block_in_float32() -> None:
    model, x = model_and_images()
    model, x = model.float(), x.float()
    logits, solution = model(x)
    assert (logits.dtype, solution.nfe) == (torch.float32, 9)
    torch.testing.assert_close(logits, written_out(model, x, 4, 0.5), rtol=1e-4, atol=1e-5)


def test_without_grad_mode_the_value_is_the_same() -> None:
    model, x = model_and_images()
    with torch.no_grad():
        torch.testing.assert_close(model(x)[0], written_out(model, x, 4, 0.5))


def test_memory_does_not_grow_with_the_steps() -> None:
    model, x = model_and_images()
    peaks = []
    for count in (5, 9, 17):
        solver = torchdeq.SimpleFixedPointIteration(max_iter=count, tol=float("inf"))
        model.deq = torchdeq.DEQ(solver, torchdeq.Reversible())
        with SavedBytes(ignore=model.parameters()) as saved:
            model(x)[0].sum().backward()
        peaks.append(saved.peak)
    assert len(set(peaks)) == 1


def test_other_layers_work_on_the_same_network() -> None:
    model, x = model_and_images()
    model.deq = torchdeq.DEQ(torchdeq.Anderson(tol=1e-9, max_iter=200), torchdeq.IFT())
    features, (z, _) = (
        model.inject(x),
        model.deq(lambda z: model.block(z, model.inject(x)), torch.zeros(3, 4, 8, 8, dtype=F64)),
    )
    torch.testing.assert_close(model.block(z, features), z, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", [{"channels": 5}, {"channels": 0}, {"groups": 0}])
def test_channels_that_do_not_fall_into_groups_are_errors(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="positive multiple of groups"):
        ReversibleDEQ(**options)


def test_steps_that_are_undone_lead_back_to_the_start(study: ModuleType) -> None:
    model, x = model_and_images()
    assert study.rebuilt(model, x, 9, 0.5, F64) < 1e-10
    # By 1 / (1 − β) for each evaluation, rounding of 1e-16 grows to this at least.
    assert study.rebuilt(model, x, 41, 0.8, F64) > 1


def test_the_study_runs_and_says_what_is_true_of_the_methods(study: ModuleType, tmp_path: Path) -> None:
    assert study.main(["--quick", "--out", str(tmp_path)]) == 0
    (found,) = json.loads((tmp_path / "reversible.json").read_text())["measured"]
    assert found["error float64, β = 0.5"] < 1e-10
    assert found["error float32 in float64, β = 0.5"] < 1e-5
    assert found["implicit 9"] > 100 * found["error float32, β = 0.5"]
    assert len(set(found["rev MiB curve"][1:])) == 1
    assert found["unrolled MiB growth"] > 0
    assert found["missed float32, β = 0.8, 9"] > found["missed float32, β = 0.5, 9"]
    assert (tmp_path / "reversible.png").stat().st_size > 10_000
