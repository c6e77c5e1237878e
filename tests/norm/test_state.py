"""A normalised weight is never out of date: optimisers, casts, copies, files, checkpoints, what is written to it."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from tests.norm.test_weight_norm import F64
from torchdeq import DEQ, FixedPointIteration, apply_norm, remove_norm, reset_norm

BOTH = pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
DEQ_TIGHT = DEQ(FixedPointIteration(tol=1e-12, max_iter=200))


def layer_of(kind, n=4, **options):
    torch.manual_seed(0)
    layer = nn.Linear(n, n, dtype=F64)
    apply_norm(layer, kind, **options)
    return layer


def formula(layer):
    """The weight of a layer in eval mode, from its parameters."""
    if hasattr(layer, "weight_orig"):
        w = layer.weight_orig
        return w * (layer.weight_g / (layer.weight_u @ w @ layer.weight_v))
    return layer.weight_v * (layer.weight_g / layer.weight_v.norm(dim=1, keepdim=True))


def up_to_date(layer):
    training = layer.training
    layer.eval()
    plain = torch.allclose(layer.weight, formula(layer), rtol=1e-5)
    x = torch.ones(2, layer.in_features, dtype=layer.weight.dtype)
    f = lambda z: torch.tanh(0.1 * layer(z) + x)  # noqa: E731
    with torch.no_grad():
        z = DEQ(FixedPointIteration(tol=1e-5))(f, torch.zeros_like(x))[0]
        solved = torch.allclose(
            z, torch.tanh(0.1 * nn.functional.linear(z, formula(layer), layer.bias) + x), atol=1e-4
        )
    layer.train(training)
    return plain and solved


# Optimisers, casts, moves ---------------------------------------------------------------------------------


@BOTH
def test_after_steps_of_optimisers(kind):
    layer = layer_of(kind)
    for make in (torch.optim.SGD, torch.optim.Adam):
        optimizer = make(layer.parameters(), 0.1)
        before = layer.weight.detach().clone()
        layer(torch.ones(2, 4, dtype=F64)).square().sum().backward()
        optimizer.step()
        assert not torch.allclose(layer.weight, before)
        assert up_to_date(layer)
    for p in layer.parameters():  # as optimisers do that count no versions
        p.data.mul_(1.5)
    assert up_to_date(layer)


@BOTH
def test_parameters_are_the_ones_that_there_were(kind):
    layer = nn.Linear(3, 3, dtype=F64)
    weight = layer.weight
    optimizer = torch.optim.SGD(layer.parameters(), 0.5)
    apply_norm(layer, kind)
    assert (layer.weight_orig if kind == "spectral_norm" else layer.weight_v) is weight
    before = weight.detach().clone()
    layer(torch.ones(2, 3, dtype=F64)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(weight, before), "an optimiser made before has it"


@BOTH
def test_after_a_cast_and_a_move(kind):
    layer = layer_of(kind)
    layer.weight  # noqa: B018
    layer.float()
    assert layer.weight.dtype == layer.weight_g.dtype == torch.float32
    assert up_to_date(layer)
    layer.double()
    assert up_to_date(layer)
    nn.init.eye_(layer.weight)
    layer.float()
    assert torch.allclose(layer.weight, torch.eye(4), atol=1e-6)
    layer.to(torch.bfloat16)
    assert layer(torch.ones(1, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    layer = layer_of(kind).to("meta")
    assert layer.weight.is_meta
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert layer.weight.isfinite().all()
    assert up_to_date(layer)
    with torch.device("meta"):
        layer = nn.Linear(3, 3)
    apply_norm(layer, kind)
    assert layer.weight_g.is_meta


@BOTH
def test_frozen_parameters_stay_frozen(kind):
    layer = nn.Linear(3, 3)
    layer.weight.requires_grad_(False)
    apply_norm(layer, kind)
    assert [p.requires_grad for p in layer.parameters()] == [True, False, False]


# Copies and files -----------------------------------------------------------------------------------------


def pickled(module):
    return pickle.loads(pickle.dumps(module))


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = pytest.mark.parametrize(
    "make", [copy.deepcopy, pickled, saved], ids=["deepcopy", "pickle", "torch.save"]
)


@COPIES
@BOTH
@pytest.mark.parametrize("when", ["before", "after a forward", "after a solve", "after a write"])
def test_copies_are_whole_and_apart(kind, when, make):
    model = nn.Sequential(layer_of(kind), nn.Tanh())
    layer = model[0]
    if when == "after a forward":
        model(torch.ones(2, 4, dtype=F64)).sum().backward()
    elif when == "after a solve":
        z, _ = DEQ_TIGHT(lambda z: 0.3 * model(z) + 1, torch.zeros(2, 4, dtype=F64))
        z.sum().backward()
    elif when == "after a write":
        nn.init.normal_(layer.weight)
    twin = make(model)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
        assert p is not q
    assert "_handed" not in vars(twin[0].parametrizations.weight), "only what was read from it counts"
    model.eval(), twin.eval()
    assert torch.equal(twin[0].weight, layer.weight)
    with torch.no_grad():
        twin[0].weight_g.mul_(2)
    assert not torch.equal(twin[0].weight, layer.weight)
    assert up_to_date(twin[0])
    assert list(twin.state_dict()) == list(model.state_dict())
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin[0].weight, layer.weight)
    nn.init.normal_(twin[0].weight)
    twin[0].weight = torch.eye(4, dtype=F64)
    assert torch.allclose(twin[0].weight, torch.eye(4, dtype=F64))
    remove_norm(model)
    assert torch.allclose(twin[0].weight, torch.eye(4, dtype=F64)), "the copy keeps its class"
    remove_norm(twin)
    assert type(twin[0]) is nn.Linear


@COPIES
def test_copies_keep_what_is_shared_and_what_hangs_on_them(make):
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    apply_norm(model)
    model["a"].register_forward_hook(doubled)
    parametrize.register_parametrization(model["a"], "bias", Half())
    twin = make(model)
    assert twin["a"].weight_v is twin["b"].weight_v
    assert twin["a"].weight_g is twin["b"].weight_g
    x = torch.ones(1, 3)
    assert torch.equal(twin["a"](x), model["a"](x))
    assert torch.equal(twin["a"].bias, model["a"].bias)


def doubled(module, args, out):
    return 2 * out


class Half(nn.Module):
    def forward(self, b):
        return 0.5 * b


# Checkpoints ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "names"),
    [
        ("weight_norm", {}, ["bias", "weight_g", "weight_v"]),
        ("weight_norm", {"learn_scale": False}, ["bias", "weight_v"]),
        ("spectral_norm", {}, ["bias", "weight_orig", "weight_g", "weight_u", "weight_v"]),
        ("spectral_norm", {"learn_scale": False}, ["bias", "weight_orig", "weight_u", "weight_v"]),
    ],
)
def test_checkpoints_have_the_names_of_the_first_version(kind, options, names):
    model = nn.Sequential(layer_of(kind, **options))
    state = model.state_dict()
    assert list(state) == [f"0.{name}" for name in names]
    for name in names:
        assert torch.equal(getattr(model[0], name), state[f"0.{name}"])
    other = {name: torch.rand_like(t) for name, t in state.items()}
    result = model.load_state_dict(other)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert all(torch.equal(t, other[name]) for name, t in model.state_dict().items())
    for assign in (False, True):
        model.load_state_dict({name: 2 * t for name, t in other.items()}, assign=assign)
        assert all(torch.equal(t, 2 * other[name]) for name, t in model.state_dict().items())
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({name: t for name, t in other.items() if name != f"0.{names[-1]}"})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict({**other, "0.weight_x": torch.ones(1)})


@pytest.mark.parametrize(
    ("kind", "torchs"),
    [
        ("weight_norm", {"weight_g": "original0", "weight_v": "original1"}),
        (
            "spectral_norm",
            {"weight_orig": "original", "weight_g": "0.g", "weight_u": "0.u", "weight_v": "0.v"},
        ),
    ],
)
def test_checkpoints_in_torchs_names_are_loaded_too(kind, torchs):
    layer = layer_of(kind)
    other = {name: torch.rand_like(t) for name, t in layer.state_dict().items()}
    layer.load_state_dict(
        {f"parametrizations.weight.{torchs[n]}" if n in torchs else n: t for n, t in other.items()}
    )
    assert all(torch.equal(t, other[name]) for name, t in layer.state_dict().items())
    assert up_to_date(layer)


@BOTH
def test_parameters_have_the_names_that_they_have_in_checkpoints(kind):
    layer = layer_of(kind)
    names = {name for name, _ in (*layer.named_parameters(), *layer.named_buffers())}
    assert names == set(layer.state_dict())
    assert type(layer).__name__ == "Linear"
    assert parametrize.is_parametrized(layer, "weight")
    assert layer.parametrizations.weight[0] is layer.parametrizations.weight.norm


@BOTH
def test_functional_call_takes_a_checkpoint_and_leaves_the_layer_as_it_was(kind):
    layer, other = layer_of(kind).eval(), layer_of(kind).eval()
    with torch.no_grad():
        other.weight_g.mul_(3)
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    kept, x = dict(layer.named_parameters()), torch.ones(1, 4, dtype=F64)
    got = torch.func.functional_call(layer, other.state_dict(), (x,))
    assert torch.equal(got, other(x))
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())
    assert all(p is kept[name] for name, p in layer.named_parameters())
    g = layer.weight_g.detach()
    loss = lambda g: torch.func.functional_call(layer, {"weight_g": g}, (x,)).sum()  # noqa: E731
    assert torch.allclose(torch.func.grad(loss)(g), torch.autograd.grad(layer(x).sum(), layer.weight_g)[0])


@BOTH
def test_after_loading_a_checkpoint(kind):
    layer, other = layer_of(kind), layer_of(kind)
    with torch.no_grad():
        other.weight_g.mul_(3)
    layer(torch.ones(1, 4, dtype=F64))
    nn.init.normal_(layer.weight)  # not read since: what is loaded comes later
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.eval().weight, other.eval().weight)


def test_a_checkpoint_after_a_write_has_what_was_written():
    layer = layer_of("weight_norm")
    nn.init.normal_(layer.weight)
    state = layer.state_dict()
    assert torch.allclose(state["weight_v"], layer.weight)


# What is written to the weight ----------------------------------------------------------------------------


def assigned(layer, t):
    layer.weight = t


def assigned_as_parameter(layer, t):
    layer.weight = nn.Parameter(t)


def assigned_in_another_dtype(layer, t):
    layer.weight = t.copy_(t.float()).float()


def copied(layer, t):
    with torch.no_grad():
        layer.weight.copy_(t)


def by_elements(layer, t):
    with torch.no_grad():
        for i, row in enumerate(t):
            layer.weight[i] = row


def through_a_detached_view(layer, t):
    layer.weight.detach().copy_(t)


WRITES = [
    assigned,
    assigned_as_parameter,
    assigned_in_another_dtype,
    copied,
    by_elements,
    through_a_detached_view,
]


@BOTH
@pytest.mark.parametrize("write", WRITES, ids=[w.__name__ for w in WRITES])
@pytest.mark.parametrize("clip", [None, 0.5, 2.0])
@pytest.mark.parametrize("then", ["read", "solve", "remove"])
def test_what_is_written_is_what_is_read(kind, write, clip, then):
    options = {} if clip is None else {"clip": True, "clip_value": clip}
    layer = layer_of(kind, **options)
    parameters = [id(p) for p in layer.parameters()]
    t = torch.randn(4, 4, dtype=F64)
    if kind == "spectral_norm" and write is by_elements:
        layer.eval()  # each row is a write by itself, after which a step of power iteration follows
    write(layer, t)
    kept = t.clone()
    if then == "solve":
        x = torch.ones(2, 4, dtype=F64)
        layer.eval()
        z, _ = DEQ_TIGHT(lambda z: torch.tanh(0.1 * layer(z) + x), torch.zeros_like(x))
        want = torch.tanh(0.1 * nn.functional.linear(z, t, layer.bias) + x)
        assert torch.allclose(z, want, atol=1e-10)
    elif then == "remove":
        remove_norm(layer)
        assert torch.allclose(layer.weight, t, rtol=1e-6)
        return
    assert [id(p) for p in layer.parameters()] == parameters
    assert torch.allclose(layer.weight, t, rtol=1e-3 if layer.training and kind == "spectral_norm" else 1e-10)
    t.zero_()
    assert torch.allclose(layer.eval().weight, kept, rtol=1e-3), "it was copied"


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_without_a_scale_what_is_written_is_normalised(kind):
    layer = layer_of(kind, learn_scale=False, target_norm=0.5)
    t = torch.randn(4, 4, dtype=F64)
    layer.weight = t
    size = t.norm(dim=1, keepdim=True) if kind == "weight_norm" else torch.linalg.matrix_norm(t, 2)
    assert torch.allclose(layer.weight, 0.5 * t / size, rtol=1e-3)


INITIALISERS = {
    "orthogonal": lambda layer: nn.init.orthogonal_(layer.weight),
    "normal": lambda layer: nn.init.normal_(layer.weight, std=0.1),
    "reset_parameters": lambda layer: layer.reset_parameters(),
    "apply": lambda layer: layer.apply(
        lambda m: nn.init.uniform_(m.weight) if isinstance(m, nn.Linear) else None
    ),
}


@BOTH
@pytest.mark.parametrize("name", INITIALISERS)
def test_initialising_after_normalising_is_not_undone(kind, name):
    layer, plain = layer_of(kind), nn.Linear(4, 4, dtype=F64)
    for one in (layer, plain):
        torch.manual_seed(1)
        INITIALISERS[name](one)
    reset_norm(layer)
    assert torch.allclose(layer.eval().weight, plain.weight)


def test_what_cannot_be_written():
    layer = layer_of("weight_norm")
    with pytest.raises(ValueError, match=r"shape \(4, 4\) was given a value of shape \(4, 1\)"):
        layer.weight = torch.ones(4, 1)
    nn.init.zeros_(layer.weight)
    with pytest.raises(ValueError, match="all zero"):
        layer.weight  # noqa: B018
    assert up_to_date(layer), "and it is as it was"
    parametrize.register_parametrization(layer, "weight", Half())
    nn.init.ones_(layer.weight)
    with pytest.raises(RuntimeError, match="Half.* has no right_inverse"):
        layer.weight  # noqa: B018


def test_reading_keeps_no_graph():
    layer = layer_of("weight_norm")
    layer.weight  # noqa: B018
    handed, _ = layer.parametrizations.weight._handed
    assert handed.grad_fn is None


def test_a_part_can_be_replaced():
    layer = layer_of("weight_norm")
    layer.weight_g = new = nn.Parameter(torch.full((4, 1), 2.0, dtype=F64))
    assert dict(layer.named_parameters())["weight_g"] is new
    assert torch.allclose(layer.weight.norm(dim=1), torch.full((4,), 2.0, dtype=F64))
    layer(torch.ones(1, 4, dtype=F64)).sum().backward()
    assert new.grad is not None
    layer.other = 3
    layer.child = nn.ReLU()
    assert layer.other == 3
    assert "child" in dict(layer.named_children())


class Exp(nn.Module):
    def forward(self, g):
        return g.exp()

    def right_inverse(self, g):
        return g.log()


@BOTH
def test_a_part_may_have_a_parametrization_of_its_own(kind):
    layer, plain = layer_of(kind).eval(), layer_of(kind).eval()
    parametrize.register_parametrization(layer, "weight_g", Exp())
    assert torch.allclose(layer.weight, plain.weight)
    layer.weight = t = torch.randn(4, 4, dtype=F64)
    assert torch.allclose(layer.weight, t, rtol=1e-3)
    plain.weight = t
    x, grads = torch.ones(2, 4, dtype=F64), []
    for one in (layer, copy.deepcopy(layer), plain):
        f = lambda z, one=one: torch.tanh(0.1 * one(z) + x)  # noqa: E731
        DEQ_TIGHT(f, torch.zeros_like(x))[0].sum().backward()
        g = one.weight_g if one is plain else one.parametrizations.weight_g.original
        grads.append(g.grad if one is not plain else g.grad * g.detach())
    assert torch.equal(grads[0], grads[1])
    assert torch.allclose(grads[0], grads[2], rtol=1e-3)
    want = layer.weight.detach().clone()
    remove_norm(layer)
    assert torch.equal(layer.weight, want)
    assert type(layer) is nn.Linear
    assert [name for name, _ in layer.named_parameters()] == ["bias", "weight"]


@BOTH
def test_a_part_may_be_computed_as_by_pruning(kind):
    layer = layer_of(kind)
    part = "weight_v" if kind == "weight_norm" else "weight_orig"
    prune.custom_from_mask(layer, part, torch.ones(4, 4).tril())
    x = torch.ones(2, 4, dtype=F64)
    z, _ = DEQ_TIGHT(lambda z: torch.tanh(0.1 * layer(z) + x), torch.zeros_like(x))
    z.sum().backward()
    mask = getattr(layer, f"{part}_mask")
    assert torch.equal(layer.weight != 0, mask == 1)
    grad = getattr(layer, f"{part}_orig").grad
    assert grad.any()
    assert not grad[mask == 0].any()
    with pytest.raises(ValueError, match=rf"'0.weight' is computed from '{part}'.*prune.remove"):
        remove_norm(nn.Sequential(layer))
    prune.remove(layer, part)
    remove_norm(layer)
    assert torch.equal(layer.weight != 0, mask == 1)


def replica_of(model, scale):
    """As torch.nn.parallel.replicate makes one: its parameters are plain attributes with a graph."""
    modules = list(model.modules())
    copies = {module: module._replicate_for_data_parallel() for module in modules}
    for module, twin in copies.items():
        twin._former_parameters = {}
        for name, child in module._modules.items():
            setattr(twin, name, copies[child])
        for name, p in module._parameters.items():
            setattr(twin, name, scale * p)
        for name, b in module._buffers.items():
            setattr(twin, name, b.clone())
    return copies[model]


@BOTH
def test_a_replica_solves_with_its_own_tensors(kind):
    model = nn.Sequential(layer_of(kind)).eval()
    x, grads = torch.ones(2, 4, dtype=F64), []
    for scale in (1.0, 0.5):
        twin = replica_of(model, scale)
        z, _ = DEQ_TIGHT(lambda z, twin=twin: torch.tanh(0.1 * twin(z) + x), torch.zeros_like(x))
        weight, bias = twin[0].weight.detach(), scale * model[0].bias.detach()
        assert torch.allclose(z, torch.tanh(0.1 * nn.functional.linear(z, weight, bias) + x), atol=1e-10)
        grads.append(torch.autograd.grad(z.sum(), model[0].weight_g)[0])
    assert not torch.allclose(*grads)
    weight = model[0].weight.detach()
    bias = model[0].bias.detach()
    z, _ = DEQ_TIGHT(lambda z: torch.tanh(0.1 * model(z) + x), torch.zeros_like(x))
    assert torch.allclose(z, torch.tanh(0.1 * nn.functional.linear(z, weight, bias) + x), atol=1e-10)
    assert torch.allclose(torch.autograd.grad(z.sum(), model[0].weight_g)[0], grads[0])


@BOTH
@pytest.mark.parametrize("other", [False, True])
def test_torchs_own_function_removes_it_whole(kind, other):
    layer = layer_of(kind).eval()
    want = layer.weight.detach().clone()
    if other:
        parametrize.register_parametrization(layer, "bias", Half())
    parametrize.remove_parametrizations(layer, "weight")
    assert torch.equal(layer.weight, want)
    assert list(layer._parameters) == (["weight"] if other else ["bias", "weight"])
    assert not layer._buffers
    layer.weight = new = nn.Parameter(2 * want)
    assert layer._parameters["weight"] is new
    if other:
        parametrize.remove_parametrizations(layer, "bias")
    assert type(layer) is nn.Linear
    apply_norm(layer, kind)
    assert torch.allclose(layer.weight, 2 * want if kind == "weight_norm" else layer.weight)


# Shared weights, transforms -------------------------------------------------------------------------------


def tied(kind, **options):
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(4, 4, dtype=F64),
            "a": nn.Linear(4, 4, dtype=F64),
            "b": nn.Linear(4, 4, bias=False, dtype=F64),
        }
    )
    model["a"].weight = model["b"].weight = model["embed"].weight
    apply_norm(model, kind, **options)
    return model


@BOTH
def test_layers_that_share_a_weight_share_its_normalisation(kind):
    model = tied(kind)
    a, b, embed = model["a"], model["b"], model["embed"].weight
    for name in ("weight_g", "weight_v", *(("weight_u", "weight_orig") if kind == "spectral_norm" else ())):
        assert getattr(a, name) is getattr(b, name), name
    assert embed is (a.weight_orig if kind == "spectral_norm" else a.weight_v)
    assert len(list(model.parameters())) == 3
    model.float().double()
    assert a.weight_v is b.weight_v
    a.weight = torch.diag(torch.arange(1.0, 5.0, dtype=F64))
    model.eval()
    assert torch.equal(a.weight, b.weight)
    assert up_to_date(a)
    state = copy.deepcopy(model.state_dict())
    assert {"a.weight_g", "b.weight_g"} <= set(state)
    model.load_state_dict(state)
    twin = copy.deepcopy(model)
    assert twin["a"].weight_g is twin["b"].weight_g
    want, raw = a.weight.detach().clone(), embed.detach().clone()
    remove_norm(model)
    assert a.weight is b.weight
    assert torch.equal(a.weight, want)
    assert torch.equal(embed, raw), "another module that has the parameter keeps its values"


@BOTH
def test_functional_call_leaves_layers_that_share_a_weight_as_they_were(kind):
    model = nn.Sequential(nn.Linear(4, 4, dtype=F64), nn.Linear(4, 4, dtype=F64))
    model[1].weight = model[0].weight
    apply_norm(model, kind)
    model.eval()
    before = {name: id(p) for name, p in model.named_parameters()}
    x = torch.ones(1, 4, dtype=F64)
    own = {name: p.detach().clone() for name, p in model.named_parameters()}
    want = model(x)
    assert torch.equal(torch.func.functional_call(model, own, (x,)), want)
    own = {name: 2 * p for name, p in own.items()}
    assert not torch.allclose(torch.func.functional_call(model, own, (x,)), want)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert torch.equal(model(x), want)


def test_layers_that_share_a_weight_across_another_dimension_are_refused():
    model = nn.ModuleList([nn.Conv1d(4, 4, 1), nn.ConvTranspose1d(4, 4, 1)])
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"shared with another layer, where it has WeightNorm\(\)"):
        apply_norm(model)
    assert type(model[0]) is nn.Conv1d


@BOTH
def test_a_transform_of_torch_func_sees_the_parameters(kind):
    layer = layer_of(kind).eval()
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    x = torch.randn(3, 4, dtype=F64)

    def loss(p):
        return torch.func.functional_call(layer, p, (x,)).square().sum()

    got = torch.func.grad(loss)(parameters)
    layer(x).square().sum().backward()
    for name, p in layer.named_parameters():
        assert torch.allclose(got[name], p.grad), name
    hessian = torch.func.hessian(lambda g: loss({**parameters, name_of_scale(layer): g}))(
        layer.weight_g.detach()
    )
    assert hessian.shape == (4, 1, 4, 1)
    assert hessian.isfinite().all()
    assert torch.func.vmap(layer)(x).shape == (3, 4)


def name_of_scale(layer):
    return next(name for name, p in layer.named_parameters() if p is layer.weight_g)
