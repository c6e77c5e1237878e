"""`mixed_init`: half normal, half zero."""

from __future__ import annotations

import pytest
import torch

from torchdeq import mixed_init


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_half_is_zero_and_half_is_normal(dtype: torch.dtype) -> None:
    z = mixed_init((100, 400), dtype=dtype, generator=seeded())
    assert z.dtype == dtype
    count = z.numel()
    kept = z[z != 0]
    # 4σ of a binomial, of a mean, and of a mean of squares (kurtosis 3; less for complex numbers).
    assert abs(len(kept) / count - 0.5) < 4 * 0.5 / count**0.5
    assert abs(kept.mean()) < 4 / len(kept) ** 0.5
    assert abs(kept.abs().square().mean() - 1) < 4 * (2 / len(kept)) ** 0.5


def test_the_draws_are_those_of_a_normal_and_then_a_bernoulli() -> None:
    torch.manual_seed(5)
    z = mixed_init((3, 4))
    torch.manual_seed(5)
    normal = torch.randn(3, 4)
    assert torch.equal(z, normal * torch.zeros(3, 4).bernoulli_(0.5))
    assert torch.equal(mixed_init((3, 4), generator=seeded(5)), z)


@pytest.mark.parametrize("shape", [(4, 3), [4, 3], torch.Size([4, 3])])
def test_shapes(shape) -> None:
    assert mixed_init(shape, "cpu").shape == (4, 3)
    assert mixed_init(7).shape == (7,)
    assert mixed_init(()).shape == ()


@pytest.mark.parametrize("shape", ["a", 0.5, (2, "3"), None, (2.0, 3)])
def test_what_is_no_shape_is_refused(shape: object) -> None:
    with pytest.raises(TypeError, match=r"mixed_init\(z_shape=.*expected a shape"):
        mixed_init(shape)
