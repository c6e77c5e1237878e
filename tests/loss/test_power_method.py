"""`power_method` in 0.1.0's form, right where a Rayleigh quotient is not."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.problems import F64, TanhMap
from tests.test_ritz import nonnormal, seeded
from torchdeq.loss import power_method


def at(batch: int, n: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(batch, n, dtype=dtype, generator=seeded(1)).requires_grad_()


@pytest.mark.parametrize("batch", [1, 8])
def test_a_complex_pair(batch: int) -> None:
    """Of modulus .9 at 60°, where the quotient gives .45 and in 0.1.0 by chance .33."""
    turn = 0.9 * torch.tensor([[0.5, -math.sqrt(0.75)], [math.sqrt(0.75), 0.5]], dtype=F64)
    z = at(batch, 2)
    vector, radius = power_method(z @ turn.T, z)
    assert vector.shape == z.shape
    assert torch.allclose(radius, torch.full((batch,), 0.9, dtype=F64), rtol=1e-12)


@pytest.mark.parametrize("batch", [1, 8])
def test_a_nonnormal_jacobian(batch: int) -> None:
    a, radius = nonnormal(60, norm=5.0)
    z = at(batch, 60)
    _, found = power_method(z @ a.T, z)
    assert torch.allclose(found, torch.full((batch,), radius, dtype=F64), rtol=1e-6)


@pytest.mark.parametrize("batch", [1, 8])
def test_a_zero_jacobian(batch: int) -> None:
    z = at(batch, 5)
    vector, radius = power_method(0 * z, z)
    assert torch.equal(radius, torch.zeros(batch, dtype=F64))
    assert torch.allclose(vector.norm(dim=1), torch.ones(batch, dtype=F64))


def test_each_sample_has_its_own_jacobian() -> None:
    f = TanhMap.make(n=40, batch=5, gain=1.3)
    z = at(5, 40)
    _, radius = power_method(f(z), z)
    exact = [
        torch.linalg.eigvals(torch.diag(1 - f(z)[i].square()) @ f.w).abs().max().detach() for i in range(5)
    ]
    assert torch.allclose(radius, torch.stack(exact), rtol=1e-8)


def test_the_vector_is_a_left_eigenvector() -> None:
    a = torch.diag(torch.tensor([0.2, 0.5, -0.9], dtype=F64)) + torch.triu(torch.ones(3, 3, dtype=F64), 1)
    z = at(4, 3)
    vector, radius = power_method(z @ a.T, z)
    assert torch.allclose(vector @ a, -0.9 * vector, atol=1e-12)
    assert torch.allclose(vector.norm(dim=1), torch.ones(4, dtype=F64))


def test_a_nested_state_is_one_vector() -> None:
    """J = [[0, a], [b, 0]] has the eigenvalues ±√(ab)."""
    state = {"u": at(3, 2), "v": at(3, 2)}
    image = {"u": 0.4 * state["v"], "v": 0.9 * state["u"]}
    vector, radius = power_method(image, state)
    assert sorted(vector) == ["u", "v"]
    assert torch.allclose(radius, torch.full((3,), 0.6, dtype=F64), rtol=1e-12)
    norm = vector["u"].square().sum(dim=1) + vector["v"].square().sum(dim=1)
    assert torch.allclose(norm, torch.ones(3, dtype=F64))


def test_a_leaf_that_f_does_not_use_is_a_row_of_zeros() -> None:
    state = (at(3, 2), at(3, 2))
    _, radius = power_method((0.5 * state[0], torch.ones(3, 2, dtype=F64)), state)
    assert torch.allclose(radius, torch.full((3,), 0.5, dtype=F64))


def test_a_complex_state() -> None:
    z = torch.randn(2, 4, dtype=torch.complex128, generator=seeded()).requires_grad_()
    vector, radius = power_method(z * torch.tensor([0.3j, -0.7 + 0.1j, 0.2, 0.1]), z)
    assert torch.allclose(radius, torch.full((2,), abs(-0.7 + 0.1j), dtype=F64))
    assert vector.dtype == z.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_carried_in_float32(dtype: torch.dtype) -> None:
    z = at(2, 6, dtype)
    vector, radius = power_method(0.5 * z, z)
    assert vector.dtype == dtype
    assert radius.dtype == torch.float32
    assert torch.allclose(radius, torch.full((2,), 0.5), rtol=torch.finfo(dtype).eps)


def test_under_autocast_only_f_is_in_half_precision() -> None:
    a = 0.5 * torch.linalg.qr(torch.randn(64, 64, generator=seeded())).Q
    z = at(4, 64, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, radius = power_method(z @ a.T, z)
    assert torch.allclose(radius, torch.full((4,), 0.5), rtol=0.01)  # bfloat16 has eight bits


def test_the_graph_is_kept_and_the_result_has_none() -> None:
    f = TanhMap.make(n=4, batch=2)
    z = at(2, 4)
    fz = f(z)
    vector, radius = power_method(fz, z, 3)
    assert not vector.requires_grad
    assert not radius.requires_grad
    fz.sum().backward()
    assert z.grad is not None


def test_a_generator_makes_it_repeatable() -> None:
    z = at(2, 50)
    fz = z.sin() * z.roll(1, 1)
    runs = [power_method(fz, z, 5, generator=seeded(4))[1] for _ in range(2)]
    assert torch.equal(*runs)
    assert not torch.equal(runs[0], power_method(fz, z, 5, generator=seeded(5))[1])


def test_an_empty_state() -> None:
    z = torch.zeros(0, 3, requires_grad=True)
    vector, radius = power_method(2 * z, z)
    assert vector.shape == (0, 3)
    assert radius.shape == (0,)


def test_what_it_cannot_use_is_said() -> None:
    z = at(2, 3)
    with pytest.raises(ValueError, match="does not require a gradient"):
        power_method(z.detach(), z.detach())
    with pytest.raises(ValueError, match="has no graph"):
        power_method(z.detach(), z)
    with pytest.raises(ValueError, match="was not computed from z0"):
        power_method(at(2, 3) * 2, z)
    with pytest.raises(ValueError, match="shapes"):
        power_method((z * 2)[:, :2], z)
    with pytest.raises(ValueError, match="n_iters=0"):
        power_method(z * 2, z, 0)
    with pytest.raises(ValueError, match="m=3"):
        power_method(z * 2, z, m=3)
