"""The Jacobian regulariser estimates ‖J‖_F² / n, and can be trained through."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from tests.problems import F64, TanhMap, random_matrix
from torchdeq.loss import jac_reg


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tanh_state(n: int = 6, batch: int = 3) -> tuple[TanhMap, Tensor]:
    f = TanhMap.make(n=n, batch=batch)
    return f, torch.randn(batch, n, dtype=F64, generator=seeded(3)).requires_grad_()


def dense(f: Any, z: Tensor) -> Tensor:
    return torch.autograd.functional.jacobian(f, z.detach()).reshape(z.numel(), z.numel())


def variance(jacobian: Tensor, distribution: str) -> float:
    """Of ‖Jᵀv‖² for one probe: 2 ‖A‖_F² for Gaussian v, without the diagonal for ±1; A = J Jᵀ."""
    a = jacobian @ jacobian.T
    squares = a.square().sum() - (a.diagonal().square().sum() if distribution == "rademacher" else 0)
    return float(2 * squares)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_the_mean_of_many_probes_is_within_three_sigma_of_the_frobenius_norm(distribution: str) -> None:
    f, z = tanh_state()
    jacobian = dense(f, z)
    vecs = 2000
    got = jac_reg(f(z), z, vecs, False, distribution=distribution, generator=seeded())
    sigma = math.sqrt(variance(jacobian, distribution) / vecs)
    assert abs(float(got) * z.numel() - float(jacobian.square().sum())) < 3 * sigma


def test_rademacher_probes_scatter_less_as_the_closed_forms_say() -> None:
    f, z = tanh_state()
    jacobian, fz, count = dense(f, z), f(z), 2000
    found = {}
    for distribution in ("gaussian", "rademacher"):
        generator = seeded(1)
        sizes = [
            float(jac_reg(fz, z, create_graph=False, distribution=distribution, generator=generator))
            for _ in range(count)
        ]
        found[distribution] = torch.tensor(sizes).mul(z.numel()).var().item()
        # A sample variance of N numbers scatters by sqrt((κ − 1) / N), κ ≤ 9 their kurtosis; four times that.
        expected = variance(jacobian, distribution)
        assert found[distribution] == pytest.approx(expected, rel=4 * math.sqrt(8 / count))
    assert found["rademacher"] < found["gaussian"]


def test_on_a_diagonal_jacobian_rademacher_probes_are_exact() -> None:
    z = torch.randn(2, 5, dtype=F64, generator=seeded()).requires_grad_()
    got = jac_reg(torch.sin(z), z, distribution="rademacher")
    assert got.item() == pytest.approx(z.cos().square().mean().item(), rel=1e-14)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_it_is_the_mean_over_probes_of_the_squared_norm_of_the_product_per_number(distribution: str) -> None:
    f, z = tanh_state()
    got = jac_reg(f(z), z, 3, distribution=distribution, generator=seeded(5))
    generator, jacobian, sizes = seeded(5), dense(f, z), []
    for _ in range(3):
        if distribution == "gaussian":
            v = torch.randn(z.shape, generator=generator).to(F64)  # drawn in the default dtype, as in 0.1.0
        else:
            v = torch.randint(0, 2, z.shape, generator=generator).to(F64) * 2 - 1
        sizes.append((jacobian.T @ v.reshape(-1)).square().sum())
    assert got.item() == pytest.approx((torch.stack(sizes).mean() / z.numel()).item(), rel=1e-12)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_its_gradient_is_right(distribution: str) -> None:
    f, z = tanh_state(n=4, batch=2)

    def regulariser(w: Tensor, x: Tensor, z: Tensor) -> Tensor:
        return jac_reg(torch.tanh(z @ w.T + x), z, 2, distribution=distribution, generator=seeded())

    assert gradcheck(regulariser, (f.w, f.x, z))


def test_its_expected_gradient_is_that_of_the_frobenius_norm() -> None:
    # J = W for f(z) = z Wᵀ, per sample; with probes e_i of all samples, exactly.
    w, z = (
        random_matrix(3, 0.8).requires_grad_(),
        torch.randn(1, 3, dtype=F64, generator=seeded()).requires_grad_(),
    )
    every_sign = [torch.tensor([signs], dtype=F64) for signs in itertools.product((-1.0, 1.0), repeat=3)]
    fz = z @ w.T
    mean = sum((torch.autograd.grad(fz, z, v, create_graph=True)[0].square().sum()) for v in every_sign) / 8
    assert mean.item() == pytest.approx(w.square().sum().item(), rel=1e-14)
    (got,) = torch.autograd.grad(
        jac_reg(fz, z, 4000, distribution="rademacher", generator=seeded()) * 3, w, retain_graph=True
    )
    (want,) = torch.autograd.grad(mean, w)
    assert float((got - want).norm() / want.norm()) < 0.1  # 4000 probes: some 2 %


def test_without_create_graph_it_is_a_number() -> None:
    f, z = tanh_state()
    assert not jac_reg(f(z), z, create_graph=False).requires_grad
    assert jac_reg(f(z), z).requires_grad


def test_a_nested_state_is_one_vector() -> None:
    f, z = tanh_state()
    whole = jac_reg(f(z), z, 1, distribution="gaussian", generator=seeded())
    a, b = (part.detach().clone().requires_grad_() for part in z.split([2, 4], dim=1))
    image = f(torch.cat([a, b], dim=1))
    parts = jac_reg({"a": image[:, :2], "b": image[:, 2:]}, {"a": a, "b": b}, 4000, False, generator=seeded())
    exact = float(dense(f, z).square().mean() * z.numel())  # ‖J‖_F² / n
    sigma = math.sqrt(variance(dense(f, z), "gaussian") / 4000) / z.numel()
    assert abs(float(parts) - exact) < 3 * sigma
    assert whole.shape == parts.shape == ()


def test_a_complex_number_is_two_real_ones() -> None:
    # f(z) = c z is the real map |c| × a rotation, in each of n = 2 · 6 real numbers: ‖J‖_F² / n = |c|².
    z = torch.randn(2, 3, dtype=torch.complex128, generator=seeded()).requires_grad_()
    got = jac_reg((0.3 + 0.4j) * z, z, distribution="rademacher")
    assert got.item() == pytest.approx(0.25, rel=1e-14)


def test_half_precision_is_summed_in_single() -> None:
    z = torch.ones(4, 64, dtype=torch.float16, requires_grad=True)
    got = jac_reg(30 * z, z, distribution="rademacher")  # ‖Jᵀv‖² = 230400, which float16 does not hold
    assert got.dtype == torch.float32
    assert got.item() == 900.0


def test_it_changes_neither_the_graph_nor_the_grad_fields() -> None:
    f, z = tanh_state()
    fz = f(z)
    jac_reg(fz, z)
    assert z.grad is None
    assert f.w.grad is None
    fz.sum().backward()  # the graph is still there


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, z: jac_reg(f(z.detach()), z.detach()), "z0 does not require a gradient"),
        (lambda f, z: jac_reg(f(z.detach()), z), "f0 was not computed from z0"),
        (lambda f, z: jac_reg(f(z).detach(), z), "f0 has no graph"),
        (lambda f, z: jac_reg(f, z), "f0 is the value"),
        (lambda f, z: jac_reg(f(z)[:1], z), "f0 has the shapes"),
        (lambda f, z: jac_reg(f(z), z, 0), "vecs=0"),
        (lambda f, z: jac_reg(f(z), z, distribution="normal"), "distribution='normal'"),
    ],
)
def test_errors_teach(call: Any, message: str) -> None:
    f, z = tanh_state()
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        call(f, z)


def test_a_leaf_that_is_not_tracked_has_rows_of_zeros() -> None:
    """f(a, b) = (2a, a constant): ‖J‖_F² = 4 · 6, and n = 12. With ±1 the estimate of a diagonal J is exact."""
    a, b = (torch.ones(2, 3, dtype=F64, requires_grad=True) for _ in range(2))
    got = jac_reg((2 * a, torch.zeros(2, 3, dtype=F64)), (a, b), distribution="rademacher")
    assert got == 2.0
