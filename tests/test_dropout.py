"""Variational dropout."""

from __future__ import annotations

import pytest
import torch

from torchdeq import dropout
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
