"""`mem_gc` gives what a plain call gives, derivatives of any order included, and keeps the arguments only."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils.checkpoint import CheckpointError

from tests.problems import F64, TanhMap
from torchdeq import DEQ, IFT, FixedPointIteration, Multisecant, PhantomGrad, Unroll, get_deq
from torchdeq.diagnostics import SavedBytes
from torchdeq.utils import mem_gc


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def net(*extra: nn.Module, n: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(n, 4 * n), nn.Tanh(), *extra, nn.Linear(4 * n, n), nn.Tanh()).double()


def data(batch: int = 5, n: int = 6) -> Tensor:
    return torch.randn(batch, n, dtype=F64, generator=seeded()).requires_grad_()


def gradients(out: Tensor, *of: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out.square().sum(), of))


def test_value_and_gradients_are_those_of_a_plain_call() -> None:
    layer, z = net(), data()
    plain, again = layer(z), mem_gc(layer, (z,))
    assert torch.equal(plain, again)
    wanted = gradients(plain, z, *layer.parameters())
    assert all(map(torch.equal, gradients(again, z, *layer.parameters()), wanted))


def test_a_function_need_not_name_what_it_closes_over() -> None:
    layer, z, gain = net(), data(), torch.tensor(0.7, dtype=F64, requires_grad=True)
    wanted = gradients(gain * layer(z), z, gain, *layer.parameters())
    got = gradients(mem_gc(lambda z: gain * layer(z), (z,)), z, gain, *layer.parameters())
    assert all(map(torch.equal, got, wanted))


def test_only_the_arguments_are_kept() -> None:
    layer, z = net(), data(batch=32)
    with SavedBytes(ignore=layer.parameters()) as saved:
        out = z
        for _ in range(10):
            out = mem_gc(layer, (out,))
        # Ten arguments of 32 × 6 numbers; a plain call keeps 4 × 6 more at least, twice.
        assert saved.now <= 10 * 32 * 6 * 8 + 10 * 64
    with SavedBytes(ignore=layer.parameters()) as plain:
        out = z
        for _ in range(10):
            out = layer(out)
        assert plain.now > 4 * saved.peak


def test_a_backward_pass_evaluates_once_more() -> None:
    calls = []

    def f(z: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return z.sin().exp()

    z = data()
    out = mem_gc(f, (z,))
    assert len(calls) == 1
    out.sum().backward(retain_graph=True)
    assert len(calls) == 2
    out.sum().backward()
    assert len(calls) == 3
    with torch.no_grad():
        mem_gc(f, (z,))
    mem_gc(f, (z.detach(),))  # nothing to differentiate
    assert len(calls) == 5


def test_random_numbers_are_drawn_once() -> None:
    """In 0.1.0 the backward pass drew another mask than the forward pass."""
    layer, z = net(nn.Dropout(0.5)), data()
    torch.manual_seed(3)
    plain = layer(z)
    state = torch.get_rng_state()
    wanted = gradients(plain, z, *layer.parameters())
    torch.manual_seed(3)
    again = mem_gc(layer, (z,))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    after = torch.get_rng_state()
    assert all(map(torch.equal, gradients(again, z, *layer.parameters()), wanted))
    assert torch.equal(torch.get_rng_state(), after)


def test_running_statistics_are_updated_once() -> None:
    """0.1.0 updated them once more in each backward pass."""
    layer, z = net(nn.BatchNorm1d(24)), data()
    other = net(nn.BatchNorm1d(24))
    out = mem_gc(layer, (z,))
    wanted = gradients(other(z), z, *other.parameters())
    for _ in range(2):
        got = torch.autograd.grad(out.square().sum(), (z, *layer.parameters()), retain_graph=True)
        assert all(map(torch.equal, got, wanted))
    for ours, theirs in zip(layer.buffers(), other.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_statistics_are_as_after_plain_calls_in_a_chain() -> None:
    layer, other, z = net(nn.BatchNorm1d(24)), net(nn.BatchNorm1d(24)), data()
    out, plain = z, z
    for _ in range(3):
        out, plain = mem_gc(layer, (out,)), other(plain)
    assert all(
        map(torch.equal, gradients(out, z, *layer.parameters()), gradients(plain, z, *other.parameters()))
    )
    assert all(map(torch.equal, layer.buffers(), other.buffers()))


def test_autocast_is_that_of_the_call() -> None:
    layer, z = net().float(), data().float().detach().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, again = layer(z), mem_gc(layer, (z,))
    assert again.dtype == torch.bfloat16
    assert torch.equal(plain, again)
    wanted = gradients(plain.float(), z, *layer.parameters())
    assert all(map(torch.equal, gradients(again.float(), z, *layer.parameters()), wanted))


def test_derivatives_of_first_and_second_order() -> None:
    z = data(2, 3)
    w = torch.randn(3, 3, dtype=F64, generator=seeded(1)).requires_grad_()

    def f(z: Tensor, w: Tensor) -> Tensor:
        return mem_gc(lambda z: torch.tanh(z @ w), (z,))

    assert gradcheck(f, (z, w))
    assert gradgradcheck(f, (z, w))


def test_frozen_parameters_and_inputs() -> None:
    layer, z = net(), data()
    for parameter in layer[0].parameters():
        parameter.requires_grad_(False)
    out = mem_gc(layer, (z.detach(),))
    out.sum().backward()
    assert layer[0].weight.grad is None
    assert layer[2].weight.grad is not None
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    assert not mem_gc(layer, (z.detach(),)).requires_grad


def test_arguments_and_outputs_may_be_anything() -> None:
    z = data()
    out = mem_gc(lambda z, factor, name: (factor * z.sin(), name, [z.cos()], None), (z, 3, "name"))
    assert isinstance(out, tuple)
    assert out[1] == "name"
    assert out[3] is None
    (got,) = torch.autograd.grad(out[0].sum() + out[2][0].sum(), z)
    assert torch.allclose(got, 3 * z.cos() - z.sin())
    assert mem_gc(lambda: 7) == 7
    assert torch.equal(mem_gc(torch.sin, [z]), z.sin())


def test_transforms_and_tangents() -> None:
    z = data(3, 2).detach()

    def f(z: Tensor) -> Tensor:
        return mem_gc(lambda z: z.sin().exp(), (z,))

    assert torch.allclose(torch.func.grad(lambda z: f(z).sum())(z), z.sin().exp() * z.cos())
    assert torch.allclose(torch.vmap(f)(z), z.sin().exp())
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(z, torch.ones_like(z)))).tangent
    assert torch.allclose(tangent, z.sin().exp() * z.cos())


@pytest.mark.parametrize(
    "method", [IFT(), IFT(hook=True), PhantomGrad(steps=3), Unroll(), Unroll(checkpoint=True)]
)
def test_inside_of_f(method) -> None:
    """The gradients are those of the same f without checkpoints; its statistics are updated once for a solve."""
    results = []
    for checkpointed in (True, False):
        layer = net(nn.BatchNorm1d(24))
        solver = FixedPointIteration(max_iter=15) if isinstance(method, Unroll) else Multisecant()
        x, deq = data(), DEQ(solver, method, batch_dims=0)

        def f(z: Tensor, layer=layer, x=x, checkpointed=checkpointed) -> Tensor:
            return 0.3 * (mem_gc(layer, (z,)) if checkpointed else layer(z)) + x

        z, _ = deq(f, torch.zeros_like(x), tol=1e-5)
        assert layer[2].num_batches_tracked == 1
        grads = gradients(z, x, *layer.parameters())
        assert layer[2].num_batches_tracked == 1
        results.append([z.detach(), *grads, *layer.buffers()])
    for ours, plain in zip(*results, strict=True):
        assert torch.allclose(ours.double(), plain.double(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_normalised_weights(kind: str) -> None:
    """Inside of f, and by themselves: the same number of tensors is saved when they are made again."""
    results = []
    for checkpointed in (True, False):
        torch.manual_seed(1)
        layer = getattr(nn.utils.parametrizations, kind)(nn.Linear(4, 4, dtype=F64))
        x = torch.randn(3, 4, dtype=F64, generator=seeded()).requires_grad_()

        def twice(z: Tensor, layer=layer) -> Tensor:
            return layer(layer(z))

        def f(z: Tensor, x=x, twice=twice, checkpointed=checkpointed) -> Tensor:
            return torch.tanh(0.5 * (mem_gc(twice, (z,)) if checkpointed else twice(z)) + x)

        states, _ = get_deq(ift=True, b_tol=1e-12, f_tol=1e-12, f_max_iter=100, b_max_iter=100)(
            f, torch.zeros_like(x)
        )
        grads = gradients(states[-1], x, *layer.parameters())
        results.append([states[-1].detach(), *grads, *layer.buffers()])
    for ours, plain in zip(*results, strict=True):
        assert torch.allclose(ours, plain, rtol=1e-8, atol=1e-10)


def test_as_f_itself() -> None:
    f = TanhMap.make(n=5, batch=2)
    z, _ = DEQ()(lambda z: mem_gc(f, (z,)), torch.zeros(2, 5, dtype=F64), tol=1e-10)
    plain, _ = DEQ()(f, torch.zeros(2, 5, dtype=F64), tol=1e-10)
    assert all(map(torch.equal, gradients(z, f.w, f.x), gradients(plain, f.w, f.x)))


def test_what_it_cannot_use_is_said() -> None:
    with pytest.raises(TypeError, match=r"func is a list.*nn.Sequential"):
        mem_gc([nn.Tanh()], (data(),))
    with pytest.raises(TypeError, match=r"in_args is a Tensor.*\(z,\)"):
        mem_gc(nn.Tanh(), data())


def test_a_function_that_is_not_the_same_again_is_an_error() -> None:
    widths = iter([3, 5])
    z = data()
    out = mem_gc(lambda z: z.repeat(1, next(widths)).sin()[:, :2].exp(), (z,))
    with pytest.raises(CheckpointError):
        out.sum().backward()


@pytest.mark.parametrize("kind", [torch.float32, F64, torch.complex128])
def test_numbers_that_are_not_the_same_again_are_an_error(kind: torch.dtype) -> None:
    """What func closes over has changed before the backward pass: the gradient would be that of neither map."""
    scale = 1
    z = torch.ones(3, 2, dtype=kind, requires_grad=True)
    out = mem_gc(lambda z: (scale * z).square(), (z,))
    (same,) = torch.autograd.grad(out.abs().sum(), z, retain_graph=True)
    assert torch.equal(same, 2 * z)
    scale = 10
    with pytest.raises(CheckpointError, match=r"another value in the backward pass.*closes over has changed"):
        out.abs().sum().backward()


def test_weights_that_are_updated_in_place_before_the_backward_pass_are_an_error() -> None:
    layer, z = net(), data()
    out = mem_gc(layer, (z,))
    with torch.no_grad():
        layer[0].weight.mul_(1.01)
    with pytest.raises(CheckpointError, match="call backward first"):
        out.sum().backward()


def test_a_generator_of_its_own_is_an_error_where_torchs_are_drawn_from_again() -> None:
    own, z = seeded(), data()
    noisy = mem_gc(lambda z: (z + torch.rand(z.shape, generator=own, dtype=F64)).square(), (z,))
    with pytest.raises(CheckpointError, match="its generator's state"):
        noisy.sum().backward()
    mem_gc(lambda z: (z + torch.rand(z.shape, dtype=F64)).square(), (z,)).sum().backward()


def test_what_is_not_finite_and_what_holds_no_numbers_is_not_compared() -> None:
    z = torch.tensor([0.0, 1.0], dtype=F64, requires_grad=True)
    out, count, nothing = mem_gc(lambda z: (z.log(), torch.ones(2, dtype=torch.long), z[:0]), (z,))
    assert count.tolist() == [1, 1]
    assert nothing.shape == (0,)
    (got,) = torch.autograd.grad(out.sum(), z)
    assert got.tolist() == [math.inf, 1.0]


def test_checkpoints_inside_of_checkpoints() -> None:
    layer, z = net(), data()
    out = mem_gc(lambda z: layer(mem_gc(layer, (z,))), (z,))
    wanted = gradients(layer(layer(z)), z, *layer.parameters())
    assert all(map(torch.equal, gradients(out, z, *layer.parameters()), wanted))
