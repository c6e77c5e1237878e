"""The digits model: a contraction whatever its weights, solved to what it says, with the right gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

import torchdeq
from torchdeq.zoo.digits import DigitsDEQ, nonexpansive


def operator_norm(kernel: Tensor, size: int = 6) -> float:
    """Of the zero-padded convolution of a size × size image, by its dense matrix."""
    channels = kernel.shape[1]
    basis = torch.eye(channels * size**2, dtype=kernel.dtype).reshape(-1, channels, size, size)
    columns = conv2d(basis, kernel, padding=kernel.shape[-1] // 2).flatten(1)
    return float(torch.linalg.matrix_norm(columns, ord=2))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("shape", [(4, 4, 3, 3), (6, 2, 3, 3), (2, 6, 3, 3), (3, 3, 5, 5), (3, 3, 1, 1)])
def test_a_nonexpansive_kernel_does_not_expand(shape: tuple[int, ...], scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for skew in (0.0, 3.0):  # a common sign is the worst case for a sum of absolute values
        kernel = scale * (torch.randn(shape, dtype=torch.float64, generator=generator) + skew)
        assert operator_norm(nonexpansive(kernel)) <= 1 + 1e-12


def test_the_bound_is_reached_by_an_orthogonal_kernel() -> None:
    kernel = torch.zeros(4, 4, 3, 3, dtype=torch.float64)
    kernel[:, :, 1, 1] = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    torch.testing.assert_close(nonexpansive(7.0 * kernel), kernel)


def test_an_empty_channel_stays_empty_and_has_a_finite_gradient() -> None:
    kernel = torch.randn(3, 3, 3, 3)
    kernel[:, 1] = 0
    kernel.requires_grad_()
    scaled = nonexpansive(kernel)
    assert bool((scaled[:, 1] == 0).all())
    scaled.sum().backward()
    assert kernel.grad is not None
    assert float(kernel.grad.abs().max()) < 1e4


@pytest.mark.parametrize("factor", [1.0, 100.0])
def test_every_sample_converges_whatever_the_weights(factor: float) -> None:
    torch.manual_seed(0)
    deq = torchdeq.DEQ(torchdeq.FixedPointIteration(tol=1e-4, stop_mode="rel", max_iter=100))
    model = DigitsDEQ(deq, channels=8, contraction=0.8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    _, solution = model(torch.rand(6, 1, 8, 8))
    assert bool(solution.converged.all())
    # ‖f(z_k) − z_k‖ ≤ 0.8^k ‖f(0)‖ and ‖z*‖ ≥ ‖f(0)‖ / 1.8, so 1e-4 takes at most 44 steps from near z*.
    assert solution.nfe <= 50


def test_the_gradient_is_that_of_200_unrolled_steps() -> None:
    torch.manual_seed(0)
    exact = torchdeq.DEQ(
        torchdeq.Anderson(tol=1e-12, stop_mode="rel", max_iter=200),
        torchdeq.IFT(solver=torchdeq.GMRES(tol=1e-12)),
    )
    model = DigitsDEQ(exact, channels=4).double()
    unrolled = copy.deepcopy(model)
    unrolled.deq = torchdeq.DEQ(torchdeq.FixedPointIteration(tol=1e-13, max_iter=200), torchdeq.Unroll())
    x = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    for m in (model, unrolled):
        m(x)[0].square().sum().backward()
    for ours, theirs in zip(model.parameters(), unrolled.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-9)


def test_a_sample_does_not_depend_on_its_neighbours_in_eval_mode() -> None:
    torch.manual_seed(0)
    deq = torchdeq.DEQ(torchdeq.Anderson(tol=1e-6, stop_mode="rel"))
    model = DigitsDEQ(deq, channels=8).eval()
    x = torch.rand(5, 1, 8, 8)
    with torch.no_grad():
        together, alone = model(x)[0], model(x[2:3])[0]
    torch.testing.assert_close(together[2:3], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contraction": 1.0}, "expected ρ in \\(0, 1\\)"),
        ({"contraction": 0.0}, "expected ρ in \\(0, 1\\)"),
        ({"channels": 6}, "multiple of 4"),
        ({"channels": 0}, "multiple of 4"),
    ],
)
def test_values_out_of_range_are_errors(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DigitsDEQ(**options)  # type: ignore[arg-type]
