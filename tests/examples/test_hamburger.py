"""Hamburger: its decompositions, the gradient of their last step, and its study."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import torchdeq
from torchdeq.diagnostics import SavedBytes
from torchdeq.zoo.hamburger import NMF, VQ, Hamburger

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
F64 = torch.float64
HAMS = (NMF(), VQ())


def data(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def low_rank(rank: int = 2) -> Tensor:
    """Non-negative (2, 6, 40) of this rank."""
    return data(2, 6, rank, seed=1) @ data(2, rank, 40, seed=2)


def block(**options: Any) -> Hamburger:
    torch.manual_seed(0)
    return Hamburger(6, rank=3, **options).double()


def gradients(block: Hamburger, z: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(block(z).square().sum(), list(block.parameters())))


# The decompositions ---------------------------------------------------------------------------------------


def test_no_step_of_nmf_makes_the_error_grow() -> None:
    x, ham = data(3, 6, 40), NMF()
    factors, errors = ham.start(x, data(6, 3, seed=1)), []
    for _ in range(30):
        d, c = factors
        errors.append((x - d @ c).flatten(1).norm(dim=1))
        factors = ham.step(x, factors)
    after = torch.stack(errors)
    # The guard against 0 / 0 adds 1e-12 to a denominator; so much may be lost, of errors of about 5.
    assert bool((after[1:] <= after[:-1] + 1e-9).all())
    assert bool((after[-1] < 0.6 * after[0]).all())


def test_nmf_finds_what_is_of_low_rank() -> None:
    x, ham = low_rank(), NMF()
    factors = ham.start(x, data(6, 2, seed=3))
    for _ in range(3000):
        factors = ham.step(x, factors)
    d, c = factors
    assert bool((d >= 0).all())
    assert bool((c >= 0).all())
    assert (x - d @ c).norm() < 1e-2 * x.norm()  # multiplicative updates converge sublinearly


def test_an_exact_factorisation_is_a_fixed_point_of_nmf() -> None:
    d, c = data(2, 6, 2, seed=1), data(2, 2, 40, seed=2)
    after = NMF().step(d @ c, (d, c))
    for found, expected in zip(after, (d, c), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


def test_cold_vq_is_k_means_by_angles() -> None:
    x = torch.randn(1, 6, 40, dtype=F64, generator=torch.Generator().manual_seed(0))
    bases = torch.randn(6, 3, dtype=F64, generator=torch.Generator().manual_seed(1))
    ham = VQ(temperature=1e-4)
    d, c = ham.step(x, ham.start(x, bases))
    nearest = (normalize(bases, dim=0).mT @ normalize(x[0], dim=0)).argmax(dim=0)
    means = torch.stack([x[0][:, nearest == k].mean(dim=1) for k in range(3)], dim=1)
    torch.testing.assert_close(d[0], means, rtol=1e-9, atol=1e-10)
    assert bool((c[0].argmax(dim=0) == nearest).all())


# The block ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ham", HAMS, ids=["NMF", "VQ"])
def test_the_value_is_that_of_k_steps_whatever_is_tracked(ham: Any) -> None:
    z, outs = data(2, 6, 5, 5), []
    for tracked in (1, 2, 6):
        outs.append(block(ham=ham, tracked=tracked)(z))
    for other in outs[1:]:
        torch.testing.assert_close(other, outs[0], rtol=1e-12, atol=1e-12)
    plain = block(ham=ham)
    x = ham.enter(plain.lower(z).flatten(2))
    factors = ham.start(x, plain.bases)
    for _ in range(6):
        factors = ham.step(x, factors)
    expected = z + plain.norm(plain.upper((factors[0] @ factors[1]).unflatten(2, (5, 5))))
    torch.testing.assert_close(outs[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ham", HAMS, ids=["NMF", "VQ"])
def test_the_one_step_gradient_is_that_of_the_last_step_alone(ham: Any) -> None:
    z, own = data(2, 6, 5, 5), block(ham=ham)
    x = ham.enter(own.lower(z).flatten(2))
    factors = ham.start(x, own.bases)
    for _ in range(5):
        factors = ham.step(x, factors)
    d, c = ham.step(x, (factors[0].detach(), factors[1].detach()))
    loss = (z + own.norm(own.upper((d @ c).unflatten(2, (5, 5))))).square().sum()
    expected = torch.autograd.grad(loss, list(own.parameters()))
    for found, one in zip(gradients(block(ham=ham), z), expected, strict=True):
        torch.testing.assert_close(found, one, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("ham", HAMS, ids=["NMF", "VQ"])
def test_all_steps_tracked_give_the_derivative_of_the_value(ham: Any) -> None:
    z = data(1, 6, 3, 3).requires_grad_()
    own = block(ham=ham, tracked=6, inner=4)
    assert torch.autograd.gradcheck(own, z, fast_mode=True)
    (one,) = torch.autograd.grad(block(ham=ham, inner=4)(z).pow(3).sum(), z)
    (all_of_them,) = torch.autograd.grad(own(z).pow(3).sum(), z)
    assert (one - all_of_them).norm() > 1e-6 * all_of_them.norm()  # the one step is another gradient


def test_evaluation_makes_its_own_number_of_steps() -> None:
    z = data(2, 6, 5, 5)
    few, many = block(eval_steps=1).eval(), block(eval_steps=7).eval()
    assert (few(z) - many(z)).norm() > 1e-3 * many(z).norm()
    torch.testing.assert_close(block(steps=7).eval()(z), many(z), rtol=0, atol=0)


def test_a_deq_takes_the_place_of_the_steps() -> None:
    z = data(2, 6, 5, 5)
    deq = torchdeq.DEQ(torchdeq.SimpleFixedPointIteration(max_iter=6, tol=torch.inf), torchdeq.JFB())
    # A solver returns the iterate that its last evaluation has seen, and the gradient method makes one step from there.
    torch.testing.assert_close(block(deq=deq)(z), block(steps=6)(z), rtol=1e-10, atol=1e-10)
    for a, b in zip(gradients(block(deq=deq), z), gradients(block(steps=6), z), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_memory_does_not_depend_on_the_number_of_steps() -> None:
    peaks = {}
    for tracked in ("one", "all"):
        for steps in (3, 12):
            own = block(steps=steps, tracked=1 if tracked == "one" else steps)
            with SavedBytes(own.parameters()) as saved:
                own(data(2, 6, 5, 5)).sum().backward()
            peaks[tracked, steps] = saved.peak
    assert peaks["one", 12] == peaks["one", 3]
    assert peaks["all", 12] > 2 * peaks["all", 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0.*at least 1"),
        ({"eval_steps": 0}, "eval_steps=0.*at least 1"),
        ({"steps": 2, "tracked": 3}, "1 ≤ tracked ≤ steps"),
        ({"tracked": 0}, "1 ≤ tracked ≤ steps"),
    ],
)
def test_values_out_of_range_are_errors(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Hamburger(6, **{"rank": 3, **options})


# The study ------------------------------------------------------------------------------------------------


def test_mean_iou(study: ModuleType) -> None:
    y = torch.tensor([[0, 0, 1, 1]])
    assert study.mean_iou(y, y, 3) == 1
    # Of class 0 one pixel of two, of class 1 two of three; class 2 does not occur.
    assert study.mean_iou(torch.tensor([[0, 1, 1, 1]]), y, 3) == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_the_pattern_of_a_pixel_is_told_by_the_image(study: ModuleType) -> None:
    task = study.Patterns(0)
    x, y, has = task.told(study.seeded(1), 4)
    assert (x.shape, y.shape) == ((4, 8, 16, 16), (4, 16, 16))
    assert all(set(y[i].unique().tolist()) == set(has[i].tolist()) for i in range(4))
    alone, told = task.bounds(2, 20)
    assert alone + 0.2 < told < 0.95  # there is something to learn from the image, and noise is left
    assert study.Patterns(0, noise=1e-3).bounds(2, 20) == (1, 1)


def test_its_options_change_the_blocks(study: ModuleType) -> None:
    options = sys.modules["study"].Options
    assert study.block(options(), "nmf").deq is None
    deq = study.block(options(grad="phantom", solver="anderson"), "vq").deq
    assert "PhantomGrad" in repr(deq)
    assert "Anderson" in repr(deq)


def test_the_study_runs(study: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert study.main(["--quick", "--out", str(tmp_path)]) == 0
    assert "matrix decomposition" in capsys.readouterr().out
    (found,) = json.loads((tmp_path / "hamburger.json").read_text())["measured"]
    text = (tmp_path / "hamburger.md").read_text()
    assert all(claim.text in text for claim in study.STUDY.claims)
    assert (tmp_path / "hamburger.png").stat().st_size > 10_000
    for ham in ("nmf", "vq"):
        assert found[f"{ham} growth"] == 1 < found[f"{ham} unrolled growth"]
        assert found[f"{ham} cosine"] < 1
    assert all(0 <= found[f"{task} {arm}"] <= 1 for task in ("patterns", "digits") for arm in study.ARMS)
