"""A random start of which half is zero."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["mixed_init"]


def mixed_init(
    z_shape: int | Sequence[int],
    device: torch.device | str | None = None,
    *,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A state of normal numbers, each set to zero with probability one half.

        z = ξ m,   ξ ~ N(0, 1),  m ~ Bernoulli(1/2)

    Trained from such starts a model learns solutions that do not depend on where the solver begins, and can spend
    more evaluations at test time than it was trained with.

    Arguments:
        z_shape: the shape, or one number for a vector.
        device: as for `torch.zeros`.
        dtype: of real or complex numbers; None for the default one.
        generator: where the numbers come from; None for the global one of the device.

    Raises:
        TypeError: z_shape is no shape.

    Source: Anil et al. (2022), arXiv 2211.09961, section 5. The draws are those of torchdeq 0.1.0.

    Example:
        >>> z = mixed_init((100, 20), generator=torch.Generator().manual_seed(0))
        >>> z.shape, 0.45 < (z == 0).double().mean().item() < 0.55
        (torch.Size([100, 20]), True)
    """
    shape = (z_shape,) if isinstance(z_shape, int) else z_shape
    if not isinstance(shape, Sequence) or not all(hasattr(size, "__index__") for size in shape):
        raise TypeError(
            f"mixed_init(z_shape={z_shape!r}): expected a shape, such as (16, 32), or z.shape, or a number."
        )
    z = torch.randn(tuple(shape), device=device, dtype=dtype, generator=generator)
    real = z.real if z.is_complex() else z
    return z * torch.zeros_like(real).bernoulli_(0.5, generator=generator)
