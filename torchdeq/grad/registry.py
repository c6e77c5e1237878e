"""The names of gradient methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchdeq._suggest import did_you_mean
from torchdeq.grad.base import GradMethod
from torchdeq.grad.ift import IFT
from torchdeq.grad.jfb import JFB
from torchdeq.grad.neumann_phantom import NeumannPhantom
from torchdeq.grad.phantom import PhantomGrad
from torchdeq.grad.reversible import Reversible
from torchdeq.grad.shine import SHINE
from torchdeq.grad.truncated_cycle import TruncatedCycle
from torchdeq.grad.unroll import Unroll

#: Gradient methods by name. Tests, the command line and the benchmarks read this table.
GRADS: dict[str, Callable[..., GradMethod]] = {
    "ift": IFT,
    "phantom": PhantomGrad,
    "phantom_neumann": NeumannPhantom,
    "jfb": JFB,
    "shine": SHINE,
    "reversible": Reversible,
    "unroll": Unroll,
    "truncated_cycle": TruncatedCycle,
}


def as_grad(method: str | int | GradMethod, **options: Any) -> GradMethod:
    """A gradient method from a registered name, a number k of phantom steps, or an object.

    Raises:
        ValueError: the name is not registered; the nearest one is given.

    Example:
        >>> as_grad(5, tau=0.5)
        PhantomGrad(steps=5, tau=0.5)
    """
    if isinstance(method, GradMethod):
        return method.replace(**options)
    if isinstance(method, int) and not isinstance(method, bool):
        return PhantomGrad(steps=method, **options)
    if isinstance(method, str) and method in GRADS:
        return GRADS[method](**options)
    raise ValueError(
        f"there is no gradient method {method!r}.{did_you_mean(method, GRADS)} Give one of "
        f"{', '.join(map(repr, GRADS))}, an integer k ≥ 1 for a phantom gradient of k steps, or a GradMethod."
    )
