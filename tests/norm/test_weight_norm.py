"""Weight normalisation against its formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from torchdeq import WeightNorm, apply_norm

F64 = torch.float64
LAYERS = {
    "linear": (lambda **kw: nn.Linear(4, 3, **kw), 0),
    "conv1d": (lambda **kw: nn.Conv1d(2, 3, 3, **kw), 0),
    "conv2d": (lambda **kw: nn.Conv2d(2, 3, (3, 2), **kw), 0),
    "conv3d": (lambda **kw: nn.Conv3d(2, 3, (1, 3, 2), **kw), 0),
    "transposed1d": (lambda **kw: nn.ConvTranspose1d(2, 3, 3, **kw), 1),
    "transposed2d": (lambda **kw: nn.ConvTranspose2d(2, 3, (3, 2), **kw), 1),
    "transposed3d": (lambda **kw: nn.ConvTranspose3d(2, 3, (1, 3, 2), **kw), 1),
}


def lengths(weight, dim):
    return torch.stack([weight.select(dim, i).reshape(-1).norm() for i in range(weight.shape[dim])])


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("clip", [None, 0.6, 2.0])
@pytest.mark.parametrize("learn_scale", [True, False])
def test_the_weight_of_each_output_has_the_length_of_the_formula(name, learn_scale, clip):
    torch.manual_seed(0)
    make, dim = LAYERS[name]
    layer = make(dtype=F64)
    w = layer.weight.detach().clone()
    options = {} if clip is None else {"clip": True, "clip_value": clip}
    apply_norm(layer, learn_scale=learn_scale, target_norm=1.0 if learn_scale else 0.7, **options)
    if learn_scale:
        assert torch.allclose(layer.weight, w * min(1.0, clip or 1.0))
        with torch.no_grad():
            layer.weight_g *= torch.linspace(0.2, 3, 3, dtype=F64).reshape(layer.weight_g.shape)
        g = layer.weight_g.reshape(-1)
    else:
        g = torch.full((3,), 0.7, dtype=F64)
    factor = (g / lengths(w, dim)).clamp(max=clip or torch.inf)
    assert torch.allclose(lengths(layer.weight, dim), factor * lengths(w, dim))
    shape = [1] * w.dim()
    shape[dim] = 3
    assert torch.allclose(layer.weight, w * factor.reshape(shape))


@pytest.mark.parametrize("learn_scale", [True, False])
def test_first_and_second_derivatives(learn_scale):
    torch.manual_seed(0)
    norm = WeightNorm(dim=1, learn_scale=learn_scale)
    v = torch.randn(2, 3, 2, dtype=F64, requires_grad=True)
    g = (torch.rand(1, 3, 1, dtype=F64) + 0.5).requires_grad_()
    inputs = (g, v) if learn_scale else (v,)
    assert torch.autograd.gradcheck(norm, inputs)
    assert torch.autograd.gradgradcheck(norm, inputs)


def test_at_the_clip_where_a_learned_scale_begins_half_the_derivative_passes():
    """As in the first version, so that training is the same from the first step."""
    layer = nn.Linear(3, 1, dtype=F64)
    apply_norm(layer, clip=True)
    (layer.weight * layer.weight_v.detach()).sum().backward()
    # W = v min(1, g/‖v‖), so ⟨v, ∂W/∂g⟩ is ‖v‖ below the clip and 0 above.
    assert torch.allclose(layer.weight_g.grad, 0.5 * layer.weight_g)


def test_half_precision_is_summed_in_single():
    layer = nn.Linear(4000, 2).half()
    with torch.no_grad():
        layer.weight.fill_(8.0)  # the sum of squares is beyond float16
    apply_norm(layer, learn_scale=False)
    assert layer.weight.dtype == torch.float16
    assert torch.allclose(layer.weight.float().norm(dim=1), torch.ones(2), rtol=1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        single = nn.Linear(4, 2)
        apply_norm(single)
        assert single.weight.dtype == torch.float32


class Operations(TorchDispatchMode):
    """Counts what torch computes."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_read_takes_no_more_operations_than_the_formula():
    for layer in (nn.Linear(4, 3), nn.Conv2d(2, 3, 3, dtype=F64)):
        apply_norm(layer)
        with torch.no_grad(), Operations() as done:
            layer.weight  # noqa: B018
        assert done.names == ["linalg_vector_norm", "div", "mul", "detach"]


def test_a_vector_and_torchs_own_registration():
    layer = nn.LayerNorm(3, dtype=F64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, -2.0, 0.5]))
    parametrize.register_parametrization(layer, "weight", WeightNorm(learn_scale=False, target_norm=2))
    assert layer.weight.tolist() == [2.0, -2.0, 2.0]
    linear = nn.Linear(3, 2, dtype=F64)
    before = linear.weight.detach().clone()
    parametrize.register_parametrization(linear, "weight", WeightNorm())
    assert torch.allclose(linear.weight, before)
    assert linear.parametrizations.weight.original0.shape == (2, 1)


@pytest.mark.parametrize("learn_scale", [True, False])
def test_an_output_without_a_direction_is_refused(learn_scale):
    layer = nn.Linear(3, 4)
    nn.init.zeros_(layer.weight[1])
    with pytest.raises(ValueError, match=r"output\(s\) 1 are all zero.*filter_out"):
        apply_norm(layer, learn_scale=learn_scale)
    assert type(layer) is nn.Linear
    assert isinstance(layer.weight, nn.Parameter)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_norm": 0}, "target_norm must be positive"),
        ({"clip_value": -1}, "clip_value must be positive"),
    ],
)
def test_values_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        WeightNorm(**options)


def test_it_prints_what_is_not_the_default():
    assert repr(WeightNorm(dim=1, clip=True)) == "WeightNorm(dim=1, clip=True)"
