"""The Jacobian losses, and second derivatives of solutions, where f attends by a fused kernel of torch."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.problems import F64
from torchdeq import DEQ, IFT, FixedPointIteration, get_deq
from torchdeq.loss import deq_jac_loss, jac_reg


class Fused(nn.Module):
    """z + x through attention by `scaled_dot_product_attention`."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12, dtype=F64)

    def forward(self, z: Tensor) -> Tensor:
        q, k, v = self.qkv(z)[:, None].chunk(3, -1)
        return 0.3 * F.scaled_dot_product_attention(q, k, v)[:, 0]


class MultiHead(nn.Module):
    """The same by `nn.MultiheadAttention`, which takes the fused kernel where no weights are needed."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, batch_first=True, dtype=F64)

    def forward(self, z: Tensor) -> Tensor:
        return 0.3 * self.inner(z, z, z, need_weights=False)[0]


@pytest.fixture(params=[Fused, MultiHead])
def block(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return request.param()


X = torch.randn(2, 3, 4, dtype=F64, generator=torch.Generator().manual_seed(1))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(2)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("old", [True, False])
def test_deq_jac_loss_trains_through_attention(block: nn.Module, old: bool, training: bool) -> None:
    deq = (get_deq(ift=True) if old else DEQ()).train(training)
    block.train(training)
    found, _ = deq(lambda z: block(z) + X, torch.zeros_like(X))
    z = (found[-1] if old else found).detach().requires_grad_()
    loss = deq_jac_loss(deq, lambda z: block(z) + X, z, generator=seeded())
    got = torch.autograd.grad(loss, list(block.parameters()), allow_unused=True)
    with sdpa_kernel(SDPBackend.MATH):
        want = torch.autograd.grad(
            jac_reg(block(z) + X, z, generator=seeded()), list(block.parameters()), allow_unused=True
        )
    assert any(g is not None and bool(g.any()) for g in want)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-12, atol=1e-15)
    value = deq_jac_loss(deq, lambda z: block(z) + X, z, create_graph=False, generator=seeded())
    assert value.item() == pytest.approx(loss.item(), rel=1e-12)


def test_deq_jac_loss_leaves_the_choice_of_kernels_as_it_was() -> None:
    def enabled() -> tuple[bool, ...]:
        b = torch.backends.cuda
        return (
            b.flash_sdp_enabled(),
            b.mem_efficient_sdp_enabled(),
            b.cudnn_sdp_enabled(),
            b.math_sdp_enabled(),
        )

    before, second, inside = enabled(), threading.Event(), []

    def f(z: Tensor) -> Tensor:
        inside.append(enabled())
        if threading.current_thread() is threading.main_thread():
            other.start()
            second.wait(0.2)  # were both within at once, they would put back what they found of each other
        else:
            second.set()
        return 0.5 * z * z

    other = threading.Thread(target=lambda: deq_jac_loss(DEQ(), f, X.clone()))
    deq_jac_loss(DEQ(), f, X.clone())
    other.join()
    assert inside == [(False, False, False, True)] * 2
    assert enabled() == before
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        chosen = enabled()
        deq_jac_loss(DEQ(), lambda z: 0.5 * z * z, X.clone())
        assert enabled() == chosen


def test_the_backward_pass_of_jac_reg_says_how_to_differentiate_attention_twice(block: nn.Module) -> None:
    z = X.clone().requires_grad_()
    loss = jac_reg(block(z) + X, z, vecs=2)
    assert loss.item() > 0  # as a monitor it is right
    with pytest.raises(NotImplementedError, match=r"SDPBackend\.MATH"):
        loss.backward()

    def stubborn(z: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return block(z)

    with pytest.raises(NotImplementedError, match=r"SDPBackend\.MATH"):
        deq_jac_loss(DEQ(), stubborn, z).backward()
    with sdpa_kernel(SDPBackend.MATH):
        loss = jac_reg(block(z) + X, z)
    loss.backward()


def test_attention_in_what_feeds_f_is_differentiated_once_and_is_no_error(block: nn.Module) -> None:
    z, x = X.clone().requires_grad_(), block(X)
    jac_reg(torch.tanh(0.5 * z + x), z).backward()
    assert all(p.grad is not None for p in block.parameters())


def test_a_second_derivative_through_attention_says_how(block: nn.Module) -> None:
    def gradient() -> Tensor:
        deq = DEQ(FixedPointIteration(tol=1e-10), IFT(order=2))
        x = X.clone().requires_grad_()
        (g,) = torch.autograd.grad(deq(lambda z: block(z) + x, X)[0].square().sum(), x, create_graph=True)
        return g.square().sum()

    with pytest.raises(RuntimeError) as caught:
        gradient().backward()
    assert "SDPBackend.MATH" in "".join(getattr(caught.value, "__notes__", []))
    with sdpa_kernel(SDPBackend.MATH):
        gradient().backward()
