"""The maps that solvers see: affine ones, ones whose calls are counted, and the transpose of a linear one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchdeq._replay import AutocastState
from torchdeq._state import Map


@dataclass(frozen=True, eq=False)
class AffineMap:
    """f(u) = linear(u) + shift, a map that is known to be affine.

    Krylov solvers need to know; and every solver gets f(0) = shift without an evaluation.

    Arguments:
        linear: the linear part L, shape-preserving.
        shift: the constant part, in the shape of the state.
        preconditioner: a linear map near (I − L)⁻¹, shape-preserving and not counted as an evaluation. Krylov
            solvers that allow one search the space of (I − L) P instead, which has the same solution. None: none.

    Example:
        >>> f = AffineMap(lambda u: 0.5 * u, torch.ones(1, 2))
        >>> f(torch.ones(1, 2))
        tensor([[1.5000, 1.5000]])
    """

    linear: Callable[[Any], Any]
    shift: Any
    preconditioner: Callable[[Any], Any] | None = None

    def __call__(self, u: Tensor) -> Tensor:
        return self.linear(u) + self.shift


class Tally:
    """f with its calls counted, evaluated under the caller's autocast state."""

    def __init__(self, f: Map, amp: AutocastState):
        self.f = f
        self.amp = amp
        self.calls = 0

    def __call__(self, z: Tensor) -> Tensor:
        self.calls += 1
        if not self.amp.enabled:
            return self.f(z)
        with self.amp.on():
            return self.f(z)


def transpose(linear: Map, like: Tensor) -> Map:
    """Lᵀ of a linear map L: (B, D) -> (B, D), by differentiating one call of it.

    Because L is linear, the graph of one call, at 0, serves for every product. `linear` must be differentiable;
    where it is itself made of vector–Jacobian products Jᵀu, they need `create_graph=True`, and Lᵀ is J.

    Arguments:
        linear: L.
        like: a tensor (B, D) of the dtype and device of its argument.

    Raises:
        RuntimeError: L has no graph, for example because it is computed outside of torch.

    Example:
        >>> a = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> transpose(lambda u: u @ a.T, torch.zeros(1, 2))(torch.tensor([[1.0, 0.0]]))
        tensor([[1., 2.]])
    """
    with torch.enable_grad():
        u = torch.zeros_like(like).requires_grad_()
        image = linear(u)
    if not image.requires_grad:
        raise RuntimeError(
            f"the transpose of {linear!r} was asked for, but what it returns does not depend on its argument through "
            f"operations that autograd records. Write it in torch operations, without detach() or no_grad()."
        )

    def transposed(v: Tensor) -> Tensor:
        (product,) = torch.autograd.grad(image, u, v, retain_graph=True, materialize_grads=True)
        return product

    return transposed
