"""Spectral normalisation against singular values."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from tests.norm.test_weight_norm import F64, LAYERS
from torchdeq import DEQ, FixedPointIteration, SpectralNorm, apply_norm, reset_norm


def norm_of(weight, dim=0):
    return torch.linalg.matrix_norm(weight.detach().movedim(dim, 0).flatten(1), 2).item()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("learn_scale", [True, False])
def test_the_weight_has_the_norm_that_is_asked_for_from_the_first(name, learn_scale, clip):
    torch.manual_seed(0)
    make, dim = LAYERS[name]
    layer = make(dtype=F64)
    w = layer.weight.detach().clone()
    options = {} if clip is None else {"clip": True, "clip_value": clip}
    apply_norm(layer, "spectral_norm", learn_scale=learn_scale, target_norm=0.7, **options)
    factor = min(0.7 / norm_of(w, dim), clip or torch.inf)
    assert torch.allclose(layer.weight, factor * w, rtol=2e-3, atol=0)
    if learn_scale and clip is None:
        with torch.no_grad():
            layer.weight_g[(0,) * (w.dim())] *= 3
        assert torch.allclose(layer.weight.select(dim, 0), 3 * factor * w.select(dim, 0), rtol=2e-3, atol=0)


@pytest.mark.parametrize("steps", [1, 3])
def test_each_evaluation_in_training_mode_makes_power_iterations(steps):
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, dtype=F64)
    apply_norm(layer, "spectral_norm", n_power_iterations=steps)
    u = normalize(torch.randn(3, dtype=F64), dim=0)
    layer.weight_u = u.clone()
    w = layer.weight_orig.detach()
    layer.eval()
    layer(torch.randn(2, 4, dtype=F64))
    assert torch.equal(layer.weight_u, u)
    layer.train()
    layer(torch.randn(2, 4, dtype=F64))
    for _ in range(steps):
        v = normalize(w.T @ u, dim=0)
        u = normalize(w @ v, dim=0)
    assert torch.allclose(layer.weight_u, u)
    assert torch.allclose(layer.weight_v, v)
    assert torch.allclose(layer.eval().weight, w * (layer.weight_g / (u @ w @ v)))
    layer.train()
    torch.func.vmap(layer)(torch.randn(2, 4, dtype=F64))
    assert torch.allclose(layer.weight_u, u), "none under a transform"


def test_resetting_once_and_solving_once_makes_one():
    torch.manual_seed(0)
    layer = nn.Linear(4, 4, dtype=F64)
    apply_norm(layer, "spectral_norm")
    layer.weight_u = normalize(torch.randn(4, dtype=F64), dim=0)
    twin = copy.deepcopy(layer)
    deq = DEQ(FixedPointIteration(tol=1e-9, max_iter=100))
    for _ in range(3):
        reset_norm(layer)
        deq(lambda z: torch.tanh(0.5 * layer(z) + 1), torch.zeros(2, 4, dtype=F64))
        twin(torch.zeros(2, 4, dtype=F64))
        assert torch.allclose(layer.weight_u, twin.weight_u, atol=1e-14)


def test_derivatives_take_the_vectors_for_constants():
    torch.manual_seed(0)
    w = torch.randn(3, 2, 2, dtype=F64, requires_grad=True)
    norm = SpectralNorm(w, dim=1, n_power_iterations=1).eval()

    def weight(w, g):
        return torch.func.functional_call(norm, {"g": g}, (w,))

    g = (torch.rand(1, 2, 1, dtype=F64) + 0.5).requires_grad_()
    assert torch.autograd.gradcheck(weight, (w, g))
    assert torch.autograd.gradgradcheck(weight, (w, g))
    # Where they have converged that is the derivative of the largest singular value.
    for _ in range(200):
        norm.train()(w)
    norm.eval()
    got = torch.autograd.grad(norm(w).sum(), w)[0]
    exact = w / torch.linalg.matrix_norm(w.movedim(1, 0).flatten(1), 2)
    assert torch.allclose(got, torch.autograd.grad(exact.sum(), w)[0])


def test_a_graph_is_not_spoilt_by_later_evaluations():
    torch.manual_seed(0)
    layer = nn.Linear(4, 4, dtype=F64)
    apply_norm(layer, "spectral_norm")
    x = torch.randn(3, 4, dtype=F64)
    outs = [layer.train(training)(x) for training in (False, True, True)]
    for out in outs:
        out.sum().backward()
    assert layer.weight_g.grad.isfinite().all()


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_evaluates_the_same_weight_again(reentrant):
    torch.manual_seed(0)
    layer = nn.Linear(4, 4, dtype=F64)
    apply_norm(layer, "spectral_norm")
    layer.weight_u = normalize(torch.randn(4, dtype=F64), dim=0)
    twin = copy.deepcopy(layer)
    x = torch.randn(3, 4, dtype=F64, requires_grad=True)
    layer(x).square().sum().backward()
    checkpoint(twin, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(layer.weight_u, twin.weight_u)
    for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_autocast_makes_no_difference():
    torch.manual_seed(0)
    layer = nn.Linear(30, 20)
    apply_norm(layer, "spectral_norm")
    want = layer.eval().weight
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.weight, want)


def test_half_precision():
    torch.manual_seed(0)
    layer = nn.Linear(300, 200).to(torch.bfloat16)
    apply_norm(layer, "spectral_norm", learn_scale=False, target_norm=0.5)
    assert layer.weight_u.dtype == layer.weight.dtype == torch.bfloat16
    assert abs(norm_of(layer.weight.float()) - 0.5) < 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_power_iterations": 0}, "n_power_iterations counts steps"),
        ({"n_power_iterations": 1.5}, "n_power_iterations counts steps"),
        ({"eps": 0}, "eps must be positive"),
        ({"target_norm": -1}, "target_norm must be positive"),
    ],
)
def test_values_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        apply_norm(nn.Linear(2, 2), "spectral_norm", **options)


def test_weights_without_a_norm_are_refused():
    layer = nn.Linear(3, 4)
    nn.init.zeros_(layer.weight)
    with pytest.raises(ValueError, match=r"\(4, 3\) as a matrix, is all zero"):
        apply_norm(layer, "spectral_norm")
    with pytest.raises(ValueError, match="for real weights"):
        apply_norm(nn.Linear(2, 2, dtype=torch.complex64), "spectral_norm")
    with torch.no_grad():
        layer.weight[:, 0] = 1  # most of what is drawn is not orthogonal to this, but if it were
    norm = SpectralNorm(layer.weight.detach().double())
    norm.u.zero_()
    assert abs(norm.right_inverse(layer.weight.detach().double()).norm() - 2) < 1e-12


def test_it_can_be_registered_with_torch():
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, dtype=F64)
    parametrize.register_parametrization(
        layer, "weight", SpectralNorm(layer.weight, learn_scale=False, target_norm=2)
    )
    assert abs(norm_of(layer.weight) - 2) < 1e-3
    assert repr(layer.parametrizations.weight[0]) == "SpectralNorm(learn_scale=False, target_norm=2.0)"
