"""`apply_norm` and its fellows: which layers, which options, and back."""

from __future__ import annotations

import argparse
import inspect
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from torchdeq import (
    DEQConfig,
    SpectralNorm,
    WeightNorm,
    apply_norm,
    register_norm,
    register_norm_module,
    remove_norm,
    reset_norm,
)
from torchdeq.norm.functional import NORMS

F64 = torch.float64
BOTH = pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])


def normed(model):
    """The names of the layers that have a normalised weight."""
    return [name for name, module in model.named_modules() if parametrize.is_parametrized(module)]


def net():
    return nn.ModuleDict(
        {
            "embed": nn.Embedding(3, 4),
            "encoder": nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Conv1d(2, 3, 1)),
            "decoder": nn.ModuleDict({"inject": nn.Linear(4, 4), "out": nn.Linear(4, 2)}),
        }
    )


@pytest.mark.parametrize(
    ("filters", "left"),
    [
        ({}, ["encoder.0", "encoder.2", "decoder.inject", "decoder.out"]),
        ({"filter_out": "inject"}, ["encoder.0", "encoder.2", "decoder.out"]),
        ({"filter_out": ["inject", "0"]}, ["encoder.2", "decoder.out"]),
        ({"prefix_filter_out": "enc"}, ["decoder.inject", "decoder.out"]),
        ({"prefix_filter_out": ["encoder.0", "emb"]}, ["encoder.2", "decoder.inject", "decoder.out"]),
        ({"prefix_filter_out": ["encoder"], "filter_out": ["out"]}, ["decoder.inject"]),
    ],
)
def test_filters_leave_out_by_prefix_or_by_part_of_the_name(filters, left):
    model = net()
    apply_norm(model, **filters)
    assert normed(model) == left


def options_of(layer):
    return layer.parametrizations.weight[0].options()


ARGS = {
    "norm_type": "spectral_norm",
    "norm_no_scale": True,
    "norm_target_norm": 0.5,
    "norm_clip": True,
    "norm_clip_value": 0.9,
    "sn_n_power_iters": 2,
    "another_programs": 1,
}


class Plain:
    def __init__(self, **values):
        self.__dict__.update(values)


@pytest.mark.parametrize("form", [dict, argparse.Namespace, Plain, lambda **kw: DEQConfig(kw)])
def test_options_come_from_any_configuration_and_given_ones_win(form):
    args = form(**ARGS)
    layer = nn.Linear(3, 3)
    apply_norm(layer, args=args)
    assert isinstance(layer.parametrizations.weight[0], SpectralNorm)
    assert options_of(layer) == {
        "dim": 0,
        "learn_scale": False,
        "target_norm": 0.5,
        "clip": True,
        "clip_value": 0.9,
        "n_power_iterations": 2,
        "eps": 1e-12,
    }
    layer = nn.Linear(3, 3)
    apply_norm(layer, args=args, learn_scale=True, clip=False, target_norm=2.0)
    got = options_of(layer)
    assert (got["learn_scale"], got["clip"], got["target_norm"], got["clip_value"]) == (True, False, 2, 0.9)
    for call in (
        lambda m: apply_norm(m, "weight_norm", None, None, args),
        lambda m: apply_norm(m, norm_type="weight_norm", args=args),
    ):
        layer = nn.Linear(3, 3)
        call(layer)
        assert isinstance(layer.parametrizations.weight[0], WeightNorm), "also where it is the default"
    layer = nn.Linear(3, 3)
    apply_norm(layer, "none", args=args)
    apply_norm(layer, args={"norm_type": "none"})
    assert type(layer) is nn.Linear
    assert DEQConfig(args).config == ARGS, "the configuration is not changed"


def test_the_signature_is_that_of_the_first_version():
    names = "model norm_type='weight_norm' prefix_filter_out=None filter_out=None args=None **norm_kwargs"
    shown = inspect.signature(apply_norm).replace(return_annotation=inspect.Signature.empty)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in shown.parameters.values()]
    assert str(shown.replace(parameters=bare)) == f"({names.replace(' ', ', ')})"


def test_mistakes_are_named():
    with pytest.raises(TypeError, match=r"has no option 'learn_scales'. Did you mean 'learn_scale'\?"):
        apply_norm(nn.Linear(2, 2), learn_scales=True)
    with pytest.raises(TypeError, match="weight_norm.*has no option 'n_power_iterations'"):
        apply_norm(nn.Linear(2, 2), n_power_iterations=2)
    with pytest.raises(ValueError, match="no normalisation 'spectral'. Did you mean 'spectral_norm'"):
        apply_norm(nn.Linear(2, 2), "spectral")
    with pytest.raises(ValueError, match="Did you mean 'weight_norm'"):
        register_norm_module(nn.Bilinear, "weightnorm")
    with pytest.raises(ValueError, match="not equally many"):
        register_norm_module(nn.Bilinear, "weight_norm", ["weight", "bias"], 0)
    with pytest.warns(UserWarning, match="'norm_typ'.*Did you mean 'norm_type'"):
        apply_norm(nn.Linear(2, 2), args={"norm_typ": "none"})
    with pytest.warns(UserWarning, match=r"apply_norm\(ReLU, 'weight_norm'\) found no layer"):
        apply_norm(nn.ReLU())
    with pytest.raises(ValueError, match="lazy. Call the model once"):
        apply_norm(nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"shape \(2, 2\), which has no dimension 5"):
        apply_norm(nn.Linear(2, 2), names="weight", dims=5)


@pytest.mark.parametrize("call", [apply_norm, reset_norm, remove_norm], ids=["apply", "reset", "remove"])
def test_what_is_no_module_is_refused(call):
    with pytest.raises(TypeError, match=r"got the class Linear; make one first, Linear\(...\)"):
        call(nn.Linear)
    with pytest.raises(TypeError, match="got a list; put them into a torch.nn.ModuleList"):
        call([nn.Linear(2, 2)])
    with pytest.raises(TypeError, match="got a NoneType."):
        call(None)


def test_what_cannot_be_registered():
    with pytest.raises(
        TypeError, match="takes a class with a dictionary `_target_modules`.*register_norm_module"
    ):
        register_norm("mine", nn.Linear)
    with pytest.raises(ValueError, match="'none' stands for no normalisation"):
        register_norm("none", WeightNorm)
    assert "mine" not in NORMS
    with pytest.raises(TypeError, match=r"class of modules, got Bilinear\(.*\). Give its class, Bilinear"):
        register_norm_module(nn.Bilinear(2, 2, 2), "weight_norm")
    with pytest.raises(TypeError, match="class of modules, got <class 'int'>"):
        register_norm_module(int, "weight_norm")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("weight_norm", {"target_norm": 0.3}, r"target_norm=0.3 changes nothing.*Add learn_scale=False"),
        ("weight_norm", {"clip_value": 0.3}, r"clip_value=0.3 changes nothing without clip=True"),
        ("spectral_norm", {"clip_value": 0.3}, r"clip_value=0.3 changes nothing"),
        (
            "weight_norm",
            {"filter_out": ["decoder", "encodr"]},
            r"filter_out='encodr'.*Did you mean 'encoder'",
        ),
        ("weight_norm", {"prefix_filter_out": "inject"}, r"no module of ModuleDict.*begins with it"),
    ],
)
def test_what_changes_nothing_is_warned_of(kind, options, message):
    with pytest.warns(UserWarning, match=message) as caught:
        apply_norm(net(), kind, **options)
    assert [w.filename for w in caught] == [__file__]


def test_options_that_change_something_or_are_the_default_or_in_a_configuration_are_not():
    quiet = [
        ("weight_norm", {"target_norm": 0.3, "learn_scale": False, "clip": True, "clip_value": 0.3}),
        ("spectral_norm", {"target_norm": 0.3}),
        ("weight_norm", {"target_norm": 1.0, "clip_value": 1.0}),
        ("weight_norm", {"args": {"norm_target_norm": 0.3, "norm_clip_value": 0.3}}),
        ("weight_norm", {"clip_value": 0.3, "args": {"norm_clip": True}}),
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for kind, options in quiet:
            apply_norm(net(), kind, **options)
    assert [str(w.message) for w in caught] == []


@pytest.mark.parametrize("given", [True, 1])
def test_switches_are_true_or_false(given):
    for options in ({"clip": given}, {"args": {"norm_clip": given}}):
        layer = nn.Linear(2, 2)
        apply_norm(layer, clip_value=0.5, **options)
        assert options_of(layer)["clip"] is True
    layer = nn.Linear(2, 2)
    apply_norm(layer, args={"norm_no_scale": given})
    assert options_of(layer)["learn_scale"] is False
    for options, name in (
        ({"clip": "False"}, "clip"),
        ({"learn_scale": 2}, "learn_scale"),
        ({"args": {"norm_clip": "False"}}, "norm_clip"),
        ({"args": {"norm_no_scale": "no"}}, "norm_no_scale"),
    ):
        with pytest.raises(TypeError, match=f"^{name} is a switch, True or False, got"):
            apply_norm(nn.Linear(2, 2), **options)


def deep(layer):
    return nn.ModuleDict({"features": nn.Sequential(nn.ReLU(), nn.ModuleDict({"conv": layer}))})


def zeroed():
    layer = nn.Conv1d(2, 2, 1)
    nn.init.zeros_(layer.weight)
    return layer


def old_weight_norm():
    with pytest.warns(FutureWarning, match="deprecated"):
        return nn.utils.weight_norm(nn.Conv1d(2, 2, 1))


@BOTH
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (zeroed, r"'weight' of features.1.conv \(Conv1d\): .*all zero"),
        (lambda: nn.LazyConv1d(2, 1), r"features.1.conv \(LazyConv1d\) has no shape yet"),
        (
            lambda: nn.utils.spectral_norm(nn.Conv1d(2, 2, 1)),
            r"conv \(Conv1d\) has torch.nn.utils.spectral_norm already.*filter_out='features.1.conv'",
        ),
        (
            old_weight_norm,
            r"has torch.nn.utils.weight_norm already.*filter_out='features.1.conv'",
        ),
        (lambda: prune.identity(nn.Conv1d(2, 2, 1), "weight"), r"is pruned by torch.nn.utils.prune"),
    ],
    ids=["zero", "lazy", "spectral_norm", "weight_norm", "pruned"],
)
def test_an_error_says_where_the_weight_is_and_what_it_has(kind, make, message):
    model = deep(make())
    with pytest.raises(ValueError, match=message):
        apply_norm(model, kind)


@BOTH
def test_nothing_of_the_layers_is_overwritten(kind):
    layer = nn.Conv1d(2, 2, 1)
    layer.weight_g = gain = nn.Parameter(torch.ones(1))
    with pytest.raises(
        ValueError, match=r"features.1.conv \(Conv1d\) would be computed from 'weight_g', but"
    ):
        apply_norm(deep(layer), kind)
    assert layer.weight_g is gain
    apply_norm(layer, kind, learn_scale=False)
    assert layer.weight_g is gain
    remove_norm(layer)
    assert layer.weight_g is gain


@BOTH
def test_a_second_normalisation_is_refused_and_changes_nothing(kind):
    model = net()
    apply_norm(model, kind, prefix_filter_out="decoder")
    with pytest.raises(
        ValueError,
        match=r"'weight' of encoder.0 \(Linear\) is normalised already. Call remove_norm first",
    ):
        apply_norm(model, kind)
    assert normed(model) == ["encoder.0", "encoder.2"]
    apply_norm(model, kind, prefix_filter_out="encoder")
    assert len(normed(model)) == 4


class Mine(nn.Linear):
    pass


@BOTH
def test_classes_derived_from_a_layer_are_layers(kind):
    layer = Mine(3, 2)
    apply_norm(layer, kind)
    assert isinstance(layer, Mine)
    assert layer.weight_g.shape == (2, 1)
    attention = nn.MultiheadAttention(4, 2)
    with pytest.warns(
        UserWarning, match="found no layer"
    ):  # its layer is an implementation's; 0.1.0 left it too
        apply_norm(attention, kind)


@BOTH
def test_removing_leaves_plain_parameters_with_the_values_that_there_were(kind):
    torch.manual_seed(0)
    model = net()
    apply_norm(model, kind)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x = torch.randn(5, 4)
    for _ in range(3):
        model["decoder"]["inject"](x).square().sum().backward()
        optimizer.step()
    layer = model["decoder"]["inject"]
    layer.weight_orig.requires_grad_(False) if kind == "spectral_norm" else None
    model.eval()
    want = layer.weight.detach().clone()
    model.train()
    remove_norm(model)
    assert torch.equal(layer.weight, want), "without another power iteration"
    assert type(layer) is nn.Linear
    assert isinstance(layer.weight, nn.Parameter)
    assert layer.weight.requires_grad == (kind == "weight_norm")
    assert [name for name, _ in layer.named_parameters()] == ["bias", "weight"]
    assert normed(model) == []
    assert not hasattr(layer, "weight_g")
    apply_norm(model, kind)


class Scaled(nn.Module):
    def forward(self, w):
        return 0.5 * w

    def right_inverse(self, w):
        return 2 * w


def test_together_with_parametrizations_of_ones_own():
    torch.manual_seed(0)
    layer = nn.Linear(3, 3, dtype=F64)
    parametrize.register_parametrization(layer, "weight", Scaled())
    with pytest.raises(ValueError, match="must come first.*learn_scale=False"):
        apply_norm(layer, "weight_norm")
    apply_norm(layer, "spectral_norm", target_norm=0.9)
    assert abs(torch.linalg.matrix_norm(layer.weight.detach(), 2) - 0.9) < 1e-3
    with pytest.raises(ValueError, match="normalised already"):
        apply_norm(layer, "spectral_norm")
    want = layer.eval().weight.detach().clone()
    remove_norm(layer)
    assert torch.equal(layer.weight, want)

    layer = nn.Linear(3, 3, dtype=F64)
    apply_norm(layer)
    parametrize.register_parametrization(layer, "bias", Scaled())
    parametrize.register_parametrization(layer, "weight", Scaled())
    assert torch.allclose(layer.weight.norm(dim=1), 0.5 * layer.weight_g[:, 0])
    target = torch.randn(3, 3, dtype=F64)
    layer.weight = target
    assert torch.allclose(layer.weight, target)
    bias = layer.bias.detach().clone()
    remove_norm(layer)
    assert torch.allclose(layer.weight, target)
    assert torch.equal(layer.bias, bias), "another parameter keeps its own"
    assert parametrize.is_parametrized(layer, "bias")


class Foreign:
    """A normalisation as 0.1.0 wants it: half the weight, made anew at each reset."""

    _target_modules = {nn.Linear: ("weight", 0)}  # noqa: RUF012

    def __init__(self, factor):
        self.factor = factor

    @classmethod
    def apply(cls, module, deq_args=None, factor=0.5):
        weight = module.weight
        del module._parameters["weight"]
        module.register_parameter("weight_raw", weight)
        self = cls(deq_args.get("norm_target_norm", factor))
        self(module)
        return self

    def __call__(self, module):
        module.weight = self.factor * module.weight_raw

    def remove(self, module):
        del module.weight, module._parameters["weight_raw"]
        module.register_parameter("weight", nn.Parameter(torch.zeros(1)))


def test_a_normalisation_in_the_first_versions_form_works():
    register_norm("half", Foreign)
    try:
        model = nn.Sequential(nn.Linear(2, 2), nn.Conv1d(1, 1, 1))
        apply_norm(model, "half", factor=0.25)
        assert torch.equal(model[0].weight, 0.25 * model[0].weight_raw)
        with torch.no_grad():
            model[0].weight_raw.mul_(2)
        reset_norm(model)
        assert torch.equal(model[0].weight, 0.25 * model[0].weight_raw)
        remove_norm(model)
        assert model[0].weight.shape == (1,)
        assert not hasattr(model[0], "_deq_norm")
        other = nn.Linear(2, 2)
        apply_norm(other, "half", args={"norm_target_norm": 3.0})
        assert torch.equal(other.weight, 3 * other.weight_raw)
    finally:
        del NORMS["half"]


class Pair(nn.Module):
    """Two weights, a bias between them and a child, to see in which order they come."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn(3, 2))
        self.bias = nn.Parameter(torch.zeros(2))
        self.b = nn.Parameter(torch.randn(2, 3))
        self.child = nn.Linear(2, 2)
        self.nothing = None


def test_modules_of_ones_own_with_several_weights():
    register_norm_module(Pair, "weight_norm", ["a", "b"], [0, -1])
    try:
        pair = Pair()
        apply_norm(pair, filter_out="child")
        assert pair.a_g.shape == (3, 1)
        assert pair.b_g.shape == (1, 3)
        order = [id(p) for p in pair.parameters()]
        want = (pair.bias, pair.a_g, pair.a_v, pair.b_g, pair.b_v, *pair.child.parameters())
        assert order == [id(p) for p in want], "that of the first version, by which optimisers save"
        remove_norm(pair)
        assert type(pair) is Pair
        assert pair.a.shape == (3, 2)
        apply_norm(pair, names=["a"], dims=[1], filter_out="child")
        assert pair.a_g.shape == (1, 2)
        assert isinstance(pair.b, nn.Parameter)
    finally:
        del WeightNorm._target_modules[Pair]


def test_only_parameters_are_normalised():
    register_norm_module(nn.BatchNorm1d, "weight_norm", "running_mean")
    try:
        with pytest.raises(ValueError, match="'running_mean' of BatchNorm1d is not a parameter but a Tensor"):
            apply_norm(nn.BatchNorm1d(3))
    finally:
        del WeightNorm._target_modules[nn.BatchNorm1d]
