"""Products with Jᵀ as maps that know what they are made of, for those who make them in another way."""

from __future__ import annotations

from torch import Tensor

from torchdeq._replay import AutocastState
from torchdeq._state import FlatMap, Map


class Product:
    """u ↦ Jᵀ u.

    Arguments:
        product: makes it, (B, D) -> (B, D).
        f: whose Jacobian J is.
        z: where, (B, D).
        amp: the autocast state of f.
    """

    def __init__(self, product: Map, f: FlatMap, z: Tensor, amp: AutocastState):
        self.product, self.f, self.z, self.amp = product, f, z, amp

    def __call__(self, u: Tensor) -> Tensor:
        return self.product(u)


class Weighted:
    """u ↦ L(w u) / w: products at the scale of 1, whatever that of the samples is.

    Arguments:
        linear: L, (B, D) -> (B, D).
        weight: w, (B, 1).
    """

    def __init__(self, linear: Map, weight: Tensor):
        self.linear, self.weight = linear, weight

    def __call__(self, u: Tensor) -> Tensor:
        return self.linear(u * self.weight) / self.weight
