"""The leading eigenvalue of the Jacobian of f, and the spectral radius, per sample."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.problems import F64, TanhMap
from torchdeq import DEQ, get_deq
from torchdeq.diagnostics import leading_eigenvalue, spectral_radius

TURN = 0.9 * torch.tensor([[0.5, -math.sqrt(0.75)], [math.sqrt(0.75), 0.5]], dtype=F64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_spectral_radius_where_a_rayleigh_quotient_fails() -> None:
    """0.1.0's power method says .33 or .45 for a complex pair of modulus .9, and NaN for J = 0."""
    z = torch.zeros(2, 2, dtype=F64)
    assert torch.allclose(spectral_radius(lambda z: z @ TURN.T, z), torch.full((2,), 0.9, dtype=F64))
    assert torch.equal(spectral_radius(lambda z: 0 * z, z), torch.zeros(2, dtype=F64))
    assert torch.equal(spectral_radius(lambda z: torch.ones_like(z), z), torch.zeros(2, dtype=F64))


def test_each_sample_has_its_own() -> None:
    f = TanhMap.make(n=20, batch=3, gain=1.3)
    at = torch.randn(3, 20, dtype=F64, generator=seeded())
    jacobian = torch.autograd.functional.jacobian
    exact = torch.stack(
        [
            torch.linalg.eigvals(jacobian(lambda v, x=x: torch.tanh(f.w @ v + x), v)).abs().max()
            for v, x in zip(at, f.x.detach(), strict=True)
        ]
    )
    assert torch.allclose(spectral_radius(f, at, steps=20), exact, rtol=1e-8)


def test_the_eigenvalue_comes_with_its_place_and_an_error() -> None:
    found = leading_eigenvalue(lambda z: z @ TURN.T, torch.zeros(3, 2, dtype=F64))
    assert torch.allclose(found.value.real, torch.full((3,), 0.45, dtype=F64))
    assert torch.allclose(found.value.imag.abs(), torch.full((3,), 0.9 * math.sqrt(0.75), dtype=F64))
    assert (found.error < 1e-13).all()
    assert found.products == 2


def test_few_products_say_that_they_were_too_few() -> None:
    values = torch.linspace(-0.9, 0.95, 100, dtype=F64)
    few, many = (
        leading_eigenvalue(
            lambda z: values * z, torch.ones(1, 100, dtype=F64), steps=steps, generator=seeded()
        )
        for steps in (5, 60)
    )
    assert few.error > 0.05
    assert (few.value - 0.95).abs() <= few.error
    assert many.error < 1e-4
    assert (many.value - 0.95).abs() <= many.error


def test_samples_that_f_couples_are_one_system() -> None:
    a = torch.tensor([[0.0, 0.8], [0.5, 0.0]], dtype=F64)
    z = torch.zeros(2, 3, dtype=F64)
    radius = spectral_radius(lambda z: a @ z, z, batch_dims=0)
    assert torch.allclose(radius, torch.tensor([math.sqrt(0.4)], dtype=F64))


def test_a_nested_and_an_empty_state() -> None:
    state = {"u": torch.zeros(2, 3), "v": torch.zeros(2, 3)}
    radius = spectral_radius(lambda s: {"u": 0.4 * s["v"], "v": 0.9 * s["u"]}, state)
    assert torch.allclose(radius, torch.full((2,), 0.6))
    assert spectral_radius(torch.cos, torch.zeros(0, 3)).shape == (0,)


def test_under_autocast_only_f_is_in_half_precision() -> None:
    a = 0.5 * torch.linalg.qr(torch.randn(64, 64, generator=seeded())).Q

    def f(z: Tensor) -> Tensor:
        return (z @ a.T).float()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        radius = spectral_radius(f, torch.zeros(4, 64), steps=64)
    assert torch.allclose(radius, torch.full((4,), 0.5), rtol=0.01)  # bfloat16 has eight bits


def test_without_grad_mode_it_is_the_same() -> None:
    with torch.no_grad():
        radius = spectral_radius(lambda z: z @ TURN.T, torch.zeros(1, 2, dtype=F64))
    assert radius.item() == pytest.approx(0.9)


def test_get_deq_reports_it_in_eval_mode() -> None:
    f = TanhMap.make(n=10, batch=3, gain=0.8)
    states, info = get_deq(f_tol=1e-8, f_max_iter=200).eval()(
        f, torch.zeros(3, 10, dtype=F64), sradius_mode=True
    )
    exact = torch.linalg.eigvals((1 - states[-1].square())[:, :, None] * f.w).abs().amax(dim=1)
    assert torch.allclose(info["sradius"], exact, rtol=1e-6)


def test_what_it_cannot_use_is_said() -> None:
    with pytest.raises(ValueError, match=r"spectral_radius\(steps=0\).*at least 1"):
        spectral_radius(torch.cos, torch.zeros(1, 2), steps=0)
    with pytest.raises(ValueError, match=r"leading_eigenvalue\(m=2\).*at least 8"):
        leading_eigenvalue(torch.cos, torch.zeros(1, 2), m=2)


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_tuple_state_is_one_argument_and_for_get_deq_several_and_the_other_is_told_so(kind) -> None:
    z = kind([torch.zeros(2, 3, dtype=F64), torch.zeros(2, 1, dtype=F64)])

    def several(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return 0.5 * a + 1, 0.25 * b

    def one(s: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return several(*s)

    assert spectral_radius(one, z).tolist() == pytest.approx([0.5, 0.5])
    norm = torch.nn.BatchNorm1d(3)  # f is held, and is still seen as it is
    held = lambda a, b: (0.5 * norm(a.float()).double(), b)  # noqa: E731
    for wrong in (several, held):
        for ask in (leading_eigenvalue, spectral_radius, lambda f, z: DEQ()(f, z)):
            with pytest.raises(
                TypeError, match=r"f takes 2 arguments, and is called with one.*lambda state: f\(\*state\)"
            ):
                ask(wrong, z)
    for deq in (get_deq(), get_deq(ift=True).eval()):
        deq(several, z)
        with pytest.raises(
            TypeError, match=r"f takes one argument, and is called with 2.*lambda \*state: f\(state\)"
        ):
            deq(one, z)


def test_an_error_from_within_f_is_its_own() -> None:
    def inner(a: Tensor, b: Tensor) -> Tensor:
        return a

    z = (torch.zeros(2, 3), torch.zeros(2, 1))
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'b'") as caught:
        spectral_radius(lambda s: inner(s), z)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'b'") as old:
        get_deq()(lambda a, b: inner(a), z)
    assert caught.value.__cause__ is None
    assert old.value.__cause__ is None


def test_in_inference_mode_it_is_the_same() -> None:
    """Where autograd records nothing, J is not zero for that."""
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm1d(4)
    norm(torch.randn(8, 4))
    layer = torch.nn.Sequential(
        torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(4, 4)), norm
    ).eval()
    x, z = torch.randn(3, 4), torch.zeros(3, 4)

    def f(z: Tensor) -> Tensor:
        return torch.tanh(0.7 * layer(z) + x)

    wanted = spectral_radius(f, z)
    _, info = get_deq(f_tol=1e-6).eval()(f, z, sradius_mode=True)
    assert (wanted > 0.1).all()
    with torch.inference_mode():
        assert torch.allclose(spectral_radius(f, z.clone()), wanted, rtol=1e-5)
        assert leading_eigenvalue(lambda z: 0.95 * z, torch.ones(1, 3)).value.item() == pytest.approx(0.95)
        _, inside = get_deq(f_tol=1e-6).eval()(f, z, sradius_mode=True)
    assert torch.allclose(inside["sradius"], info["sradius"], rtol=1e-4)


def test_a_tensor_made_in_inference_mode_that_f_multiplies_by_is_named_as_the_cause() -> None:
    with torch.inference_mode():
        gain = torch.ones(1, 3)
        with pytest.raises(RuntimeError, match="Inference tensors") as caught:
            spectral_radius(lambda z: gain * z, torch.ones(1, 3))
    assert "under torch.no_grad() instead" in caught.value.__notes__[0]


@pytest.mark.parametrize("way", ["no_grad", "detach", "detach beside weights"])
def test_what_autograd_does_not_see_is_an_error_and_not_zero(way: str) -> None:
    w = torch.eye(3, dtype=F64, requires_grad=True)
    hidden = {
        "no_grad": torch.no_grad()(lambda z: 0.9 * z),
        "detach": lambda z: 0.9 * z.detach(),
        "detach beside weights": lambda z: z.detach() @ w,
    }[way]
    z = torch.zeros(2, 3, dtype=F64)
    with pytest.raises(ValueError, match=r"f\(z\) depends on z, but autograd does not know it.*no_grad"):
        leading_eigenvalue(hidden, z)
    with pytest.raises(ValueError, match="depends on z, but autograd"):
        get_deq().eval()(hidden, z, sradius_mode=True)


def test_a_constant_f_has_radius_zero_though_it_is_noisy_or_changes_buffers() -> None:
    norm, w = torch.nn.BatchNorm1d(3, momentum=0.5), torch.randn(4, 3, generator=seeded())
    w.requires_grad_()
    for f in (lambda z: norm(w), lambda z: torch.nn.functional.dropout(w), lambda z: torch.rand(4, 3)):
        norm.reset_running_stats()
        assert torch.equal(spectral_radius(f, torch.zeros(4, 3)), torch.zeros(4))
        assert norm.num_batches_tracked <= 1  # the call of f itself
