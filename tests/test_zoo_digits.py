"""The digits model: a contraction whatever its weights, solved to what it says, with the right gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, cross_entropy

import torchdeq
from torchdeq.zoo.digits import DigitsDEQ


def operator_norm(kernel: Tensor, size: int = 8) -> Tensor:
    """Of the zero-padded convolution of a size × size image, by its dense matrix."""
    channels = kernel.shape[1]
    basis = torch.eye(channels * size**2, dtype=kernel.dtype).reshape(-1, channels, size, size)
    columns = conv2d(basis, kernel, padding=kernel.shape[-1] // 2).flatten(1)
    return torch.linalg.matrix_norm(columns, ord=2)


def trained(steps: int, lr: float = 1e-2) -> DigitsDEQ:
    """A model after a few steps towards random classes."""
    torch.manual_seed(0)
    model = DigitsDEQ(channels=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    x, y = torch.rand(32, 1, 8, 8), torch.randint(10, (32,))
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(x)[0], y).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("steps", [0, 1, 50])
def test_the_block_has_the_norm_that_was_asked_for(steps: int) -> None:
    model = trained(steps)
    # Power iteration approaches from below; one step per training step lags behind the weights a little.
    assert 0.9 * (1 - 1e-5) <= operator_norm(model._weight().detach()) < 0.95


def test_the_norm_is_that_of_the_operator_and_has_its_gradient() -> None:
    model = trained(0).double().eval()
    kernel = model.block.weight
    with torch.no_grad():
        kernel.abs_()  # far from the second singular value, so that power iteration gets all digits
    for _ in range(200):
        model._power_step()
    (ours,) = torch.autograd.grad(model._weight().square().sum(), kernel)
    dense = 0.9 * kernel / operator_norm(kernel)
    (exact,) = torch.autograd.grad(dense.square().sum(), kernel)
    torch.testing.assert_close(model._weight(), dense, rtol=1e-9, atol=0)
    torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-9)


def test_a_block_without_weights_is_no_error() -> None:
    model = DigitsDEQ(channels=4)
    with torch.no_grad():
        model.block.weight.zero_()
    logits, solution = model(torch.rand(2, 1, 8, 8))
    assert bool(logits.isfinite().all())
    assert bool(solution.converged.all())


def test_every_sample_converges_as_a_contraction_does() -> None:
    model = trained(50)
    model.deq = torchdeq.DEQ(torchdeq.FixedPointIteration(tol=1e-4, stop_mode="rel", max_iter=150))
    _, solution = model(10 * torch.rand(6, 1, 8, 8))
    assert bool(solution.converged.all())
    # ‖f(z_k) − z_k‖ ≤ 0.95^k ‖f(0)‖ and ‖z*‖ ≥ ‖f(0)‖ / 1.95: relative 1e-4 after at most 193 steps. relu
    # switches off more than half of the state, so that far fewer do.
    assert solution.nfe <= 40


def test_two_forward_passes_can_share_a_backward_pass() -> None:
    model = DigitsDEQ(channels=4)
    x = torch.rand(2, 1, 8, 8)
    (model(x)[0] + model(x)[0]).sum().backward()
    assert model.block.weight.grad is not None


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
