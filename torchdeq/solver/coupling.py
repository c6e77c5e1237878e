"""Whether a map mixes the samples of a batch, for which coefficients found for each sample alone are not right."""

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


def mixes_samples(f: Map, z: Tensor) -> bool | None:
    """Whether f(z) of some samples changes when others do. Three evaluations, and a fourth if it seems so.

    The samples are divided in two halves, at random but always alike. A coupling within both halves only is not seen,
    nor one that changes f(z) by less than √ε of its size. None if it cannot be asked: f raises or is not finite there.

    Arguments:
        f: (B, D) -> (B, D).
        z: where to look, (B, D), finite.

    Example:
        >>> z = torch.ones(4, 2)
        >>> mixes_samples(torch.cos, z), mixes_samples(lambda z: z - z.mean(0), z)
        (False, True)
    """
    count, size = z.shape
    generator = torch.Generator().manual_seed(0)
    half = torch.randperm(count, generator=generator).to(z.device) < (count + 1) // 2  # (B,)
    noise = torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z)
    try:
        here = f(z)
        level = torch.maximum(per_sample(z), per_sample(here)) / max(size, 1) ** 0.5
        moved = z + noise * torch.where(level > 0, level, level.mean().clamp_min(1e-6))[:, None]
        others, both = f(torch.where(half[:, None], z, moved)), f(moved)
    except Exception:  # f is not made for states off its way; a solve does not fail over a question
        return None

    def apart(a: Tensor, b: Tensor, where: Tensor) -> bool:
        allowed = math.sqrt(torch.finfo(z.dtype).eps) * (per_sample(a) + per_sample(b))
        return bool((where & (per_sample(a - b) > allowed)).any())

    if not (apart(here, others, half) or apart(others, both, ~half)):
        finite = all(bool(value.isfinite().all()) for value in (here, others, both))
        return False if finite else None
    return not apart(here, f(z), half | True)  # an f that is random mixes nothing, it only looks so


def is_random(f: Map, z: Tensor) -> bool:
    """Whether f gives two values at one z, beyond rounding (64 ε, as where mixtures are measured). Two evaluations.

    Arguments:
        f: (B, D) -> (B, D).
        z: where to look, (B, D).

    Example:
        >>> is_random(torch.cos, torch.ones(2, 2)), is_random(torch.rand_like, torch.ones(2, 2))
        (False, True)
    """
    once, twice = f(z), f(z)
    return bool((per_sample(once - twice) > 64 * torch.finfo(z.dtype).eps * per_sample(once)).any())
