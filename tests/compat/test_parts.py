"""Normalisation, dropout, losses and utilities beside those of 0.1.0, wherever it is right."""

from __future__ import annotations

import argparse
import copy
from typing import Any

import pytest
import torch
from torch import nn

import torchdeq
import torchdeq.norm
from tests.compat.same import assert_same
from tests.problems import F64

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(3, 4, dtype=F64), (2, 3)),
    "Conv1d": (lambda: nn.Conv1d(3, 4, 3, dtype=F64), (2, 3, 5)),
    "Conv2d": (lambda: nn.Conv2d(3, 4, 3, dtype=F64), (2, 3, 5, 5)),
    "Conv3d": (lambda: nn.Conv3d(3, 4, 2, bias=False, dtype=F64), (2, 3, 3, 3, 3)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(3, 4, 3, dtype=F64), (2, 3, 5)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(3, 4, 3, dtype=F64), (2, 3, 5, 5)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(3, 4, 2, dtype=F64), (2, 3, 3, 3, 3)),
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"learn_scale": False, "target_norm": 0.7},
    {"clip": True, "clip_value": 0.6},
    {"args": {"norm_no_scale": True, "norm_target_norm": 0.5, "norm_clip": True, "norm_clip_value": 0.4}},
]


def data(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(5))


def train(lib: Any, model: nn.Module, x: torch.Tensor, steps: int) -> list[torch.Tensor]:
    """What a program of 0.1.0 does: reset, solve or call, backward, step. The outputs and the last weight."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    outputs = []
    for _ in range(steps):
        lib.reset_norm(model)
        out = model(x)
        optimiser.zero_grad()
        out.square().mean().backward()
        optimiser.step()
        outputs.append(out.detach())
    model.eval()  # so that the reset makes no further power iteration
    lib.reset_norm(model)
    return [*outputs, *(layer.weight.detach() for layer in model if hasattr(layer, "weight"))]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_weight_norm(old, layer, options):
    make, shape = LAYERS[layer]
    found = []
    for lib in (torchdeq, old):
        torch.manual_seed(0)
        model = nn.Sequential(make(), nn.ReLU())
        lib.apply_norm(model, "weight_norm", **copy.deepcopy(options))
        names, order = sorted(model.state_dict()), [p.shape for p in model.parameters()]
        found.append((names, order, train(lib, model, data(shape), 3)))
        lib.remove_norm(model)
        found[-1] += (
            model[0].weight.detach(),
            isinstance(model[0].weight, nn.Parameter),
            sorted(model.state_dict()),
        )
    assert_same(found[0], found[1], close=1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_spectral_norm_from_one_state(old, layer, options):
    """The vectors of the power iteration begin elsewhere (row 14), so ours takes 0.1.0's state by `load_state_dict`."""
    make, shape = LAYERS[layer]
    torch.manual_seed(0)
    models, libs = [nn.Sequential(make()), nn.Sequential(make())], (torchdeq, old)
    for lib, model in zip(libs, models, strict=True):
        lib.apply_norm(model, "spectral_norm", **copy.deepcopy(options))
    ours, theirs = models
    assert sorted(ours.state_dict()) == sorted(theirs.state_dict())
    assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]
    ours.load_state_dict(theirs.state_dict(), strict=True)
    found = [train(lib, model, data(shape), 3) for lib, model in zip(libs, models, strict=True)]
    assert_same(found[0][:1], found[1][:1], close=1e-6)  # 0.1.0's scale is a float32 number (row 13)
    assert_same(found[0], found[1], close=1e-5)
    theirs.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_checkpoints_and_the_state_of_an_optimiser_go_both_ways(old, norm):
    def model_of(lib: Any, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Conv1d(4, 4, 1))
        lib.apply_norm(model, norm)
        lib.reset_norm(model)
        return model.eval()

    def call(lib: Any, model: nn.Module) -> torch.Tensor:
        lib.reset_norm(model)
        x = data((3, 4, 5)).float()
        return model[2](model[0](x.mT).mT.tanh()).detach()

    for source, target in ((torchdeq, old), (old, torchdeq)):
        one, other = model_of(source, 0), model_of(target, 1)
        optimisers = [torch.optim.Adam(m.parameters()) for m in (one, other)]
        call_before = call(target, other)
        for p in one.parameters():
            p.grad = torch.randn_like(p)
        optimisers[0].step()
        other.load_state_dict(one.state_dict(), strict=True)
        optimisers[1].load_state_dict(optimisers[0].state_dict())
        assert not torch.equal(call(target, other), call_before)
        assert_same(call(target, other), call(source, one), close=1e-6)
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            assert_same(optimisers[1].state[b]["exp_avg"], optimisers[0].state[a]["exp_avg"], close=0)


@pytest.mark.parametrize(
    "filters",
    [
        {"filter_out": "up"},
        {"filter_out": ["down", "out"]},
        {"prefix_filter_out": "block.up"},
        {"prefix_filter_out": ["out"]},
    ],
    ids=str,
)
def test_filters(old, filters):
    names = []
    for lib in (torchdeq, old):
        block = nn.ModuleDict({"up": nn.Linear(2, 2), "down": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})
        model = nn.ModuleDict({"block": block, "out": nn.Linear(2, 2)})
        lib.apply_norm(model, "weight_norm", **filters)
        names.append(sorted(model.state_dict()))
    assert names[0] == names[1]


def test_a_norm_of_ones_own(old):
    """0.1.0's protocol: a table of modules, `apply`, a call at each reset, and `remove`."""

    class Halved:
        _target_modules: dict[Any, Any] = {}  # noqa: RUF012 - as 0.1.0 has it

        @classmethod
        def apply(cls, module, deq_args=None, factor=0.5):
            weight = module._parameters.pop("weight")
            module.register_parameter("weight_raw", nn.Parameter(weight.data))
            norm = cls()
            norm.factor = deq_args.get("factor", factor)
            norm(module)
            return norm

        def __call__(self, module):
            module.weight = module.weight_raw * self.factor

        def remove(self, module):
            del module.weight
            raw = module._parameters.pop("weight_raw")
            module.weight = nn.Parameter(raw.data * self.factor)

    found = []
    for lib in (torchdeq, old):
        lib.norm.register_norm("halved", Halved)
        lib.norm.register_norm_module(nn.Bilinear, "halved", "weight", 0)
        torch.manual_seed(0)
        model = nn.ModuleList([nn.Bilinear(2, 2, 3), nn.Linear(2, 2)])
        lib.apply_norm(model, "halved", factor=0.25)
        names, before = sorted(model.state_dict()), model[0].weight.detach().clone()
        with torch.no_grad():
            model[0].weight_raw.mul_(2)
        lib.reset_norm(model)
        after = model[0].weight.detach().clone()
        lib.remove_norm(model)
        found.append((names, before, after, sorted(model.state_dict()), model[0].weight.detach()))
    torchdeq.norm.functional.NORMS.pop("halved")
    assert_same(found[0], found[1], close=0)


def test_modules_of_ones_own_with_several_weights(old):
    """As the zoo's implicit graph network has its layer normed."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            generator = torch.Generator().manual_seed(1)
            self.W = nn.Parameter(torch.randn(3, 3, dtype=F64, generator=generator))
            self.Omega = nn.Parameter(torch.randn(3, 2, dtype=F64, generator=generator))

        def forward(self, x):
            return self.W @ (self.Omega @ x)

    found = []
    for lib in (torchdeq, old):
        lib.register_norm_module(Layer, "weight_norm", names=["W", "Omega"], dims=[0, 0])
        layer = Layer()
        lib.apply_norm(
            layer, "weight_norm", args=argparse.Namespace(norm_target_norm=0.9, norm_no_scale=True)
        )
        lib.reset_norm(layer)
        out = layer(data((2, 2)))
        out.sum().backward()
        found.append((out.detach(), [layer.W_v.grad, layer.Omega_v.grad], sorted(layer.state_dict())))
        (lib.norm.WeightNorm if lib is torchdeq else old.norm.weight_norm.WeightNorm)._target_modules.pop(
            Layer
        )
    assert_same(found[0], found[1], close=1e-12)


DROPOUTS = [
    *(
        (f"Variational{kind}{n}d", n, first)
        for kind in ("Dropout", "DropToken")
        for n in (1, 2, 3)
        for first in (True, False)
    ),
    ("VariationalDropout", 1, None),
]


@pytest.mark.parametrize(("name", "space", "first"), DROPOUTS, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3, 0.8])
def test_dropout_draws_the_same_masks(old, name, space, first, p):
    outputs = []
    for lib in (torchdeq, old):
        torch.manual_seed(3)
        layer = getattr(lib, name)(p) if first is None else getattr(lib, name)(dropout=p, token_first=first)
        x = torch.ones(2, *(3, 4, 5)[:space], 6)
        outputs.append([layer(x), layer(2 * x)])
        lib.reset_dropout(layer)
        outputs[-1] += [layer(x), layer.eval()(x), list(layer.state_dict())]
    assert_same(outputs[0], outputs[1], close=1e-6)


@pytest.mark.parametrize(
    "weights", [{}, {"gamma": 0.5}, {"weight_func": "linear", "gamma": 0.6, "bias": 0.1}], ids=str
)
@pytest.mark.parametrize("values", [False, True])
def test_fp_correction(old, weights, values):
    found = []
    for lib in (torchdeq, old):
        states = [data((4, 3)).mul(k + 1).requires_grad_() for k in range(3)]
        target, mask = data((4, 3)).flip(0), data((4, 3)).abs()
        criterion = lambda z, y, m: ((z - y).square() * m).mean()  # noqa: E731
        result = lib.fp_correction(criterion, (states, target, mask), return_loss_values=values, **weights)
        loss = result[0] if values else result
        grads = torch.autograd.grad(loss, states)
        found.append((loss.detach(), list(result[1]) if values else None, list(grads)))
    assert_same(found[0], found[1], close=1e-12)


def test_a_weight_function_of_ones_own(old):
    found = []
    for lib in (torchdeq, old):
        lib.register_weight_func("cubic", lambda n, k, power=3, **kwargs: ((k + 1) / n) ** power)
        found.append(
            lib.fp_correction(
                nn.MSELoss(), ([data((2,)), 2 * data((2,))], data((2,)) * 0), weight_func="cubic"
            )
        )
    torchdeq.loss.correction.WEIGHTS.pop("cubic")
    assert_same(found[0], found[1], close=1e-12)


@pytest.mark.parametrize("vecs", [1, 3])
def test_jac_reg_draws_the_same_probes(old, vecs):
    found = []
    for lib in (torchdeq, old):
        torch.manual_seed(0)
        w = (0.3 * torch.randn(5, 5)).requires_grad_()
        z = torch.randn(4, 5, requires_grad=True)
        torch.manual_seed(1)
        loss = lib.jac_reg(torch.tanh(z @ w), z, vecs=vecs)
        loss.backward()
        found.append((loss.detach(), w.grad))
    assert_same(found[0], found[1], close=1e-5)


def test_power_method(old):
    """Where 0.1.0 is right: a positive leading eigenvalue, alone in its modulus, of a symmetric J."""
    basis = torch.linalg.qr(data((6, 6))).Q
    j = basis @ torch.diag(torch.tensor([0.9, 0.5, 0.3, -0.2, 0.1, 0.0], dtype=F64)) @ basis.T
    found = []
    for lib in (torchdeq, old):
        z = data((3, 6)).requires_grad_()
        vector, radius = lib.power_method(z @ j, z, n_iters=200)
        found.append((vector * vector[:, :1].sign(), radius))
    assert_same(found[0], found[1], close=1e-9)


@pytest.mark.parametrize("shape", [(4,), (3, 5, 2), torch.Size([2, 2])], ids=str)
def test_mixed_init_draws_the_same_numbers(old, shape):
    drawn = []
    for lib in (torchdeq, old):
        torch.manual_seed(7)
        drawn.append(lib.mixed_init(shape, device="cpu"))
    assert_same(drawn[0], drawn[1], close=0)


def test_mem_gc(old):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(3, 3, dtype=F64)

        def forward(self, a, b, scale):
            return torch.tanh(self.layer(a)) * scale, a + b

    found = []
    for lib in (torchdeq, old):
        module, a, b = Two(), data((2, 3)).requires_grad_(), data((2, 3)).add(1)
        one, other = lib.mem_gc(module, (a, b, 2.0))
        single = lib.mem_gc(module.layer, (one,))
        (single.square().sum() + other.sum()).backward()
        found.append(
            (one.detach(), other.detach(), [a.grad, b.grad is None, *(p.grad for p in module.parameters())])
        )
        assert isinstance(lib.mem_gc(module, (a, b, 1.0)), tuple)
    assert_same(found[0], found[1], close=1e-12)


def test_reset_deq(old):
    """One call for both, before each solve."""
    found = []
    for lib in (torchdeq, old):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), lib.VariationalDropout(0.5))
        lib.apply_norm(model, "weight_norm")
        torch.manual_seed(1)
        outputs = []
        for _ in range(3):
            lib.reset_deq(model)
            outputs.append(model(torch.ones(2, 4)).detach())
        found.append(outputs)
    assert_same(found[0], found[1], close=1e-6)
    assert not torch.equal(found[0][0], found[0][1]), "new masks"


def test_config(old):
    for source in ({"a": 1}, argparse.Namespace(a=1), None):
        ours, theirs = (lib.utils.config.DEQConfig(copy.deepcopy(source)) for lib in (torchdeq, old))
        for config in (ours, theirs):
            config.update(b=2, c=None)
        for key in ("a", "b", "c", "d"):
            assert ours.get(key, "none") == theirs.get(key, "none")
        assert ours.get("d") is theirs.get("d") is None
