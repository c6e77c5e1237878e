"""Normalised weights, so that f is a contraction, or near one, whatever the optimiser does."""

from torchdeq.norm.functional import (
    apply_norm,
    register_norm,
    register_norm_module,
    remove_norm,
    reset_norm,
)
from torchdeq.norm.spectral_norm import SpectralNorm
from torchdeq.norm.weight_norm import WeightNorm

__all__ = [
    "SpectralNorm",
    "WeightNorm",
    "apply_norm",
    "register_norm",
    "register_norm_module",
    "remove_norm",
    "reset_norm",
]
