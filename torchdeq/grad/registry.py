"""The names of gradient methods."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from torchdeq.grad.base import GradMethod
from torchdeq.grad.ift import IFT
from torchdeq.grad.phantom import PhantomGrad
from torchdeq.grad.unroll import Unroll

#: Gradient methods by name. Tests, the command line and the benchmarks read this table.
GRADS: dict[str, Callable[..., GradMethod]] = {
    "ift": IFT,
    "phantom": PhantomGrad,
    "unroll": Unroll,
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
    near = difflib.get_close_matches(str(method), GRADS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"there is no gradient method {method!r}.{hint} Give one of {', '.join(map(repr, GRADS))}, an integer "
        f"k ≥ 1 for a phantom gradient of k steps, or a GradMethod."
    )
