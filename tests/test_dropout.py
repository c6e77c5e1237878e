"""Variational dropout."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from torchdeq import DEQ, FixedPointIteration, deq_jac_loss, dropout, get_deq
from torchdeq.diagnostics import check_fixed_point, spectral_radius
from torchdeq.dropout import VariationalDropout, reset_dropout

SHARED = [
    ("VariationalDropout1d", (2, 5, 3), (2, 1, 3)),
    ("VariationalDropout2d", (2, 5, 4, 3), (2, 1, 1, 3)),
    ("VariationalDropout3d", (2, 5, 4, 6, 3), (2, 1, 1, 1, 3)),
    ("VariationalDropToken1d", (2, 5, 3), (2, 5, 1)),
    ("VariationalDropToken2d", (2, 5, 4, 3), (2, 5, 4, 1)),
    ("VariationalDropToken3d", (2, 5, 4, 6, 3), (2, 5, 4, 6, 1)),
]


@pytest.mark.parametrize(("name", "shape", "mask"), SHARED)
def test_masks_are_shared_along_the_right_dimensions(name, shape, mask):
    cls = getattr(dropout, name)
    layer = cls(0.5)
    layer(torch.ones(shape))
    assert layer.mask.shape == mask
    layer = cls(0.5, token_first=False)
    layer(torch.ones(shape).movedim(-1, 1))
    assert layer.mask.shape == torch.ones(mask).movedim(-1, 1).shape
    with pytest.raises(ValueError, match="dimension"):
        layer(torch.ones(2, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_mask_is_kept_scaled_and_of_the_inputs_dtype(dtype):
    torch.manual_seed(0)
    layer, x = VariationalDropout(0.25), torch.ones(100, 100, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert torch.equal(layer(x), y)
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.75, dtype=dtype).item()}
    assert abs(y.float().mean() - 1) < 0.03
    reset_dropout(layer)
    assert not torch.equal(layer(x), y)


def test_the_ends_of_the_range_and_eval_mode():
    x = torch.ones(3, 4)
    assert torch.equal(VariationalDropout(0.0)(x), x)
    assert torch.equal(VariationalDropout(1.0)(x), torch.zeros(3, 4))
    assert torch.equal(VariationalDropout(0.5).eval()(x), x)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        VariationalDropout(1.5)


def test_a_new_batch_size_asks_for_a_reset():
    layer = VariationalDropout(0.5)
    layer(torch.ones(4, 3))
    with pytest.raises(ValueError, match="reset_dropout"):
        layer(torch.ones(5, 3))


EVERY = [("VariationalDropout", (4, 5, 3), (4, 5, 3)), *SHARED]
make_generator = torch.Generator


def layer_of(name: str, p: float = 0.5, **options) -> VariationalDropout:
    return getattr(dropout, name)(p, **options)


@pytest.mark.parametrize(("name", "shape", "mask"), EVERY)
def test_a_seeded_mask_is_a_bernoulli_draw_of_its_shape(name, shape, mask):
    """The draws of 0.1.0: of as many numbers as the mask has, from the global generator."""
    torch.manual_seed(3)
    layer = layer_of(name, 0.3)
    y = layer(torch.ones(shape))
    after = torch.get_rng_state()
    torch.manual_seed(3)
    expected = torch.zeros(mask).bernoulli_(0.7) / 0.7
    assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(layer.mask, expected)
    assert torch.equal(y, expected.expand(shape))


@pytest.mark.parametrize(("name", "shape", "mask"), EVERY)
def test_gradients_go_through_the_mask_alone(name, shape, mask):
    torch.manual_seed(0)
    layer, x = layer_of(name), torch.ones(shape, dtype=torch.float64, requires_grad=True)
    (got,) = torch.autograd.grad(layer(x).sum(), x)
    assert torch.equal(got, layer.mask.to(x).expand(shape))
    assert not layer.mask.requires_grad


def test_the_mask_keeps_its_digits_when_the_dtype_changes():
    """Drawn under bfloat16 and used for float64, its scale is 1 / 0.75 to all digits; and back."""
    layer, x = VariationalDropout(0.25), torch.ones(50, 50)
    half = layer(x.bfloat16())
    wide = layer(x.double())
    assert half.dtype == torch.bfloat16
    assert set(wide.unique().tolist()) == {0.0, 1 / 0.75}
    assert torch.equal(half != 0, wide != 0)
    assert torch.equal(layer.double()(x), wide.float())


def test_under_autocast_the_mask_goes_by_the_input():
    linear, layer = torch.nn.Linear(8, 8), VariationalDropout(0.5)
    x = torch.randn(4, 8)
    plain = layer(linear(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = layer(linear(x))
    assert cast.dtype == torch.bfloat16
    assert torch.equal(cast == 0, plain == 0)


def test_complex_numbers_and_integers():
    layer = VariationalDropout(0.5)
    z = layer(torch.full((20, 20), 1 + 2j, dtype=torch.complex128))
    assert set(z.flatten().tolist()) == {0j, 2 + 4j}
    with pytest.raises(TypeError, match="floating-point or complex"):
        VariationalDropout(0.5)(torch.ones(2, 3, dtype=torch.long))


@pytest.mark.parametrize(("name", "shape", "mask"), EVERY)
def test_everything_is_dropped_at_one_and_nothing_at_zero(name, shape, mask):
    """At one 0.1.0 gave NaN."""
    x = torch.ones(shape, dtype=torch.float64)
    assert torch.equal(layer_of(name, 1.0)(x), torch.zeros_like(x))
    layer = layer_of(name, 0.0)
    assert layer(x) is x
    assert layer.mask is None


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_the_mask_and_the_same_draws_to_come(how, drawn):
    generator = make_generator().manual_seed(1)
    model = torch.nn.Sequential(
        VariationalDropout(0.5, generator=generator),
        dropout.VariationalDropout1d(0.5, generator=generator),
        VariationalDropout(0.5),
    )
    x = torch.ones(4, 6, 8)
    if drawn:
        model(x)
    copied = how(model)
    assert copied[0].generator is copied[1].generator
    assert copied[0].generator is not generator
    if drawn:
        assert torch.equal(model(x), copied(x))
        reset_dropout(copied)
        assert model[0].mask is not None
        reset_dropout(model)
    assert torch.equal(model[:2](x), copied[:2](x))


def test_the_state_dict_does_not_know_of_masks():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), VariationalDropout(0.5))
    before = list(model.state_dict())
    model(torch.ones(2, 3))
    assert list(model.state_dict()) == before
    model.load_state_dict(model.state_dict())


def test_a_generator_makes_masks_repeatable_and_leaves_the_global_one_alone():
    x, before = torch.ones(30, 30), torch.get_rng_state()
    masks = []
    for _ in range(2):
        layer = VariationalDropout(0.5, generator=make_generator().manual_seed(7))
        first = layer(x)
        reset_dropout(layer)
        masks.append((first, layer(x)))
    assert torch.equal(masks[0][0], masks[1][0])
    assert torch.equal(masks[0][1], masks[1][1])
    assert not torch.equal(*masks[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_mask_drawn_in_inference_can_be_trained_with():
    layer, x = VariationalDropout(0.5), torch.ones(3, 4, requires_grad=True)
    with torch.inference_mode():
        seen = layer(torch.ones(3, 4))
    layer(x).sum().backward()
    assert torch.equal(x.grad, seen.clone())


def test_a_mask_drawn_under_a_transform_outlives_it():
    layer, x = VariationalDropout(0.5), torch.ones(3, 4)
    seen = torch.func.grad(lambda x: layer(x).sum())(x)
    assert torch.equal(layer(x), seen)
    assert torch.equal(copy.deepcopy(layer)(x), seen)


def test_reset_mask_draws_one_at_once():
    layer = VariationalDropout(0.5)
    layer.reset_mask(torch.ones(3, 4))
    mask = layer.mask
    assert mask.shape == (3, 4)
    assert torch.equal(layer(torch.ones(3, 4)), mask)


def test_a_subclass_draws_its_own_masks():
    class Halves(VariationalDropout):
        """Drops the first half, always."""

        def reset_mask(self, x):
            self.mask = (torch.arange(x.shape[1]) >= x.shape[1] // 2).to(x).expand(x.shape)

    layer = Halves(0.5)
    reset_dropout(layer)
    assert layer(torch.ones(1, 4)).tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize(
    "make", [lambda: get_deq(ift=True, f_tol=1e-7), lambda: DEQ(FixedPointIteration(tol=1e-7))]
)
@pytest.mark.parametrize(("name", "shape", "mask"), EVERY)
def test_one_mask_for_a_solve_and_its_backward_pass(name, shape, mask, make):
    """The state is the fixed point under the mask that is held, and its gradient is that of this fixed point."""
    torch.manual_seed(0)
    layer = layer_of(name)
    x = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    found, _ = make()(lambda z: 0.3 * layer(z) + x, torch.zeros_like(x))
    z = found[-1] if isinstance(found, list) else found
    held = layer.mask.to(x).expand(shape)
    assert torch.allclose(z, x / (1 - 0.3 * held), atol=1e-6)
    (got,) = torch.autograd.grad(z.sum(), x)
    assert torch.allclose(got, 1 / (1 - 0.3 * held), atol=1e-5)
    assert torch.equal(layer.mask.to(x).expand(shape), held)
    reset_dropout(layer)
    assert layer.mask is None


def test_nothing_that_looks_at_f_draws_another_mask():
    torch.manual_seed(0)
    layer, x = VariationalDropout(0.5), torch.ones(4, 6, dtype=torch.float64)
    linear = torch.nn.Linear(6, 6, dtype=torch.float64)

    def f(z):
        return torch.tanh(0.3 * linear(layer(z)) + x)

    report = check_fixed_point(f, torch.zeros_like(x))  # which leaves everything as it was
    assert not [finding for finding in report.findings if finding.verdict == "fault"]
    assert layer.mask is None
    f(x)
    held = layer.mask
    check_fixed_point(f, torch.zeros_like(x))
    spectral_radius(f, torch.zeros_like(x))
    deq_jac_loss(DEQ(), f, torch.zeros_like(x))
    assert layer.mask is held


@pytest.mark.parametrize("p", ["0.5", None, [0.5], True, False])
def test_a_probability_that_is_no_number_is_refused(p):
    with pytest.raises(TypeError, match=r"VariationalDropout\(dropout=.*must be a number"):
        VariationalDropout(p)


def test_reset_dropout_wants_a_module():
    with pytest.raises(
        TypeError, match=r"reset_dropout\(model\): model is a function; expected the torch\.nn\.Module"
    ):
        reset_dropout(lambda z: z)
