"""How torchdeq 0.1.0 hands f to its solvers: `deq_decorator`, for DEQ classes that were written for it.

The classes of this library and their solvers take any f as it is. A class of one's own that keeps 0.1.0's `forward`
wraps f here, solves with `self.f_solver`, and turns states back with `vec2list`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from torchdeq._state import layout_of

__all__ = ["DEQWrapper", "MDEQWrapper", "SpeedyMDEQWrapper", "deq_decorator"]

States = Sequence[Tensor]


class DEQWrapper:
    """f of one tensor, damped on request: τ f(z) + (1 − τ) z.

    Arguments:
        func: f.
        z_init: the start, which says what a state looks like.

    Example:
        >>> import torch
        >>> DEQWrapper(torch.cos, torch.zeros(1, 1))(torch.zeros(1, 1), tau=0.5)
        tensor([[0.5000]])
    """

    def __init__(self, func: Callable[..., Any], z_init: Any):
        self.func = func

    def __call__(self, z: Any, tau: float = 1.0) -> Any:
        """f(z), damped."""
        out = self.list2vec(self.func(*self._arguments(z)))
        return out if tau == 1 else tau * out + (1 - tau) * z

    def _arguments(self, z: Any) -> States:
        return (z,)

    def list2vec(self, z: Any) -> Any:
        """The state as the solver has it, from the state as f has it."""
        return z

    def vec2list(self, z: Any) -> Any:
        """The state as f has it, from the state as the solver has it."""
        return z

    def detach(self, z: Any) -> Any:
        """The state without a graph."""
        return z.detach()

    def norm_diff(self, z_new: Any, z_old: Any, show_list: bool = False) -> Any:
        """The sum of the sizes of all changes; with `show_list` one for each tensor."""
        pairs = zip(self._arguments(z_new), self._arguments(z_old), strict=True)
        sizes = [(new - old).norm(p=1).item() for new, old in pairs]
        return sizes if show_list else sum(sizes)


class MDEQWrapper(DEQWrapper):
    """f of several tensors, which the solver has as one (B, D) tensor.

    Example:
        >>> import torch
        >>> z_init = [torch.zeros(2, 3), torch.zeros(2, 1, 4)]
        >>> func = MDEQWrapper(lambda a, b: (a + 1, b), z_init)
        >>> z = func(func.list2vec(z_init))
        >>> z.shape, [leaf.shape for leaf in func.vec2list(z)]
        (torch.Size([2, 7]), [torch.Size([2, 3]), torch.Size([2, 1, 4])])
    """

    def __init__(self, func: Callable[..., Any], z_init: States):
        super().__init__(func, z_init)
        self.layout = layout_of(list(z_init))

    def _arguments(self, z: Tensor) -> States:
        return self.vec2list(z)

    def list2vec(self, z: States) -> Tensor:
        """The tensors side by side, (B, D)."""
        return self.layout.ravel(list(z))

    def vec2list(self, z: Tensor) -> list[Tensor]:
        """The tensors in their shapes."""
        tensors: list[Tensor] = self.layout.unravel(z)
        return tensors


class SpeedyMDEQWrapper(DEQWrapper):
    """f of several tensors, which stay apart: for solvers that take no norms.

    Example:
        >>> import torch
        >>> func = SpeedyMDEQWrapper(lambda a, b: (b, a), None)
        >>> func([torch.zeros(1), torch.ones(1)])
        [tensor([1.]), tensor([0.])]
    """

    def __call__(self, z: States, tau: float = 1.0) -> list[Tensor]:
        """f(z), each tensor damped."""
        out = self.func(*z)
        return list(out) if tau == 1 else [tau * a + (1 - tau) * b for a, b in zip(out, z, strict=True)]

    def _arguments(self, z: States) -> States:
        return z

    def detach(self, z: States) -> list[Tensor]:
        """The state without a graph."""
        return [leaf.detach() for leaf in z]


def deq_decorator(
    func: Callable[..., Any], z_init: Any = None, no_stat: bool | None = True
) -> tuple[DEQWrapper, Any]:
    """f and its start as 0.1.0's solvers take them.

    Arguments:
        func: f, of one tensor or of several.
        z_init: the start: a tensor, or a tuple or list of tensors (B, …).
        no_stat: several tensors stay apart, for `simple_fixed_point_iter`; otherwise they become one.

    Returns:
        The wrapped f, and the start in the form that it takes.

    Raises:
        TypeError: the start is something else.

    Example:
        >>> import torch
        >>> func, z = deq_decorator(lambda a, b: (a, b), (torch.zeros(2, 3), torch.zeros(2, 4)), no_stat=False)
        >>> z.shape
        torch.Size([2, 7])
    """
    if isinstance(z_init, Tensor):
        return DEQWrapper(func, z_init), z_init
    if not isinstance(z_init, tuple | list):
        raise TypeError(
            f"deq_decorator takes a tensor, or a tuple or list of tensors, as the start, got {type(z_init).__name__}. "
            f"For other states use torchdeq.DEQ, which takes any pytree."
        )
    if no_stat:
        return SpeedyMDEQWrapper(func, z_init), z_init
    wrapped = MDEQWrapper(func, z_init)
    return wrapped, wrapped.list2vec(z_init)
