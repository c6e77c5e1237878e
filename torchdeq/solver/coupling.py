"""Whether a linear map mixes the samples of a batch, for which no Krylov space per sample is right."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchdeq._state import Map, per_sample


def couples_samples(linear: Map, u: Tensor) -> bool:
    """Whether the linear map mixes samples: whether it fails to commute with scaling each sample by itself.

    Scaling by powers of two is exact in floating point, so only rounding inside the map can blur the answer.
    Two products with the map.

    Arguments:
        linear: (B, D) -> (B, D).
        u: where to probe it, (B, D).

    Example:
        >>> u = torch.ones(3, 2)
        >>> couples_samples(lambda u: 0.5 * u, u), couples_samples(lambda u: u - u.mean(0), u)
        (False, True)
    """
    # Fixed at random: regular exponents would miss couplings at a distance of their period.
    exponents = torch.randint(-6, 7, (u.shape[0], 1), generator=torch.Generator().manual_seed(0))
    scale = torch.exp2(exponents.to(u.dtype)).to(u.device)  # (B, 1)
    image = linear(u)
    apart = per_sample(linear(u * scale) / scale - image)
    level = math.sqrt(torch.finfo(u.dtype).eps) * (per_sample(image) + per_sample(u))
    return bool((apart > level).any())
