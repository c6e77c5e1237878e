"""`mem_gc`: activations that are computed again in the backward pass instead of being kept ("gradient checkpointing").

The work is done by `torch.utils.checkpoint`, in its non-reentrant form: random state and autocast are those of the
first evaluation, parameters are found by autograd wherever the function has them, and second derivatives are right.
What it leaves to be done is that the second evaluation updates no buffer, which is `torchdeq._held`, and that it gives
the same numbers, which is `torchdeq.grad.fingerprint`: torch compares shapes and dtypes only.

Source: Chen et al. (2016), arXiv 1604.06174.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import optree
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError, checkpoint

from torchdeq._held import hold, release
from torchdeq._modes import in_transform
from torchdeq.grad.fingerprint import Fingerprint

__all__ = ["mem_gc"]


def mem_gc(func: Callable[..., Any], in_args: Sequence[Any] | None = None) -> Any:
    """func(*in_args), whose backward pass evaluates func again instead of keeping what it needs.

    Of each call only the arguments are kept, and a number for each sample of the result. A backward pass costs one
    more evaluation of func. Autocast is the same in it, and so are random numbers from torch's own generators, those
    that `torch.manual_seed` sets. The running statistics of batch normalisation and other buffers are updated once, by
    the first evaluation. Without grad mode, and inside a transform of torch.func, where torch allows no checkpoints,
    it is a plain call.

    Arguments:
        func: a module, function or closure. Its parameters need not be named. It must compute the same again: what it
            reads from elsewhere may not change until the backward pass is over, nor may it draw from a generator of
            its own or from those of Python and NumPy.
        in_args: its arguments, in a tuple or list: tensors or anything else. None for none.

    Returns:
        What func returns: a tensor, a tuple, or any other structure. Tensors have their gradients.

    Raises:
        TypeError: func cannot be called, or in_args is no tuple or list.
        torch.utils.checkpoint.CheckpointError: in the backward pass, where func does not compute the same again, up to
            rounding. Under `torch.compile` only other shapes and dtypes are seen.

    Departure from torchdeq 0.1.0: func need not be a module, and may be differentiated twice.

    Example:
        >>> layer, z = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh()), torch.ones(2, 4)
        >>> for _ in range(10):  # ten states are kept, and nothing from inside of the layer
        ...     z = mem_gc(layer, (z,))
        >>> z.sum().backward()
        >>> layer[0].weight.grad.shape
        torch.Size([4, 4])
    """
    if not callable(func):
        raise TypeError(
            f"mem_gc(func): func is a {type(func).__name__}; expected something to call, such as a module. For several "
            f"modules one after the other: torch.nn.Sequential(*modules)."
        )
    if isinstance(in_args, Tensor) or not isinstance(in_args, Sequence | None) or isinstance(in_args, str):
        raise TypeError(
            f"mem_gc(func, in_args): in_args is a {type(in_args).__name__}; expected the arguments of func in a tuple: "
            f"mem_gc(func, (z,))."
        )
    args = tuple(in_args or ())
    if not torch.is_grad_enabled() or in_transform():
        return func(*args)
    held = hold(func)
    if torch.compiler.is_compiling():  # the graph holds what func has closed over
        out = checkpoint(held, *args, use_reentrant=False)
    else:
        # Stopped early, as is the default, the second evaluation would not come to its result.
        out = checkpoint(_Compared(held), *args, use_reentrant=False, early_stop=False)
    release(held)  # from here on an evaluation changes no buffer
    return out


class _Compared:
    """A function whose later calls must give what the first gave.

    Arguments:
        f: the function.
    """

    def __init__(self, f: Callable[..., Any]):
        self.f = f
        self.seen: list[Fingerprint] | None = None

    def __call__(self, *args: Any) -> Any:
        out = self.f(*args)
        values = [_columns(leaf) for leaf in optree.tree_leaves(out, none_is_leaf=True) if _is_value(leaf)]
        if self.seen is None:
            self.seen = [Fingerprint.of(value, None) for value in values]
            return out
        try:
            for seen, value in zip(self.seen, values, strict=True):
                seen.check(value, "mem_gc")
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(str(error)) from None
        return out


def _is_value(leaf: Any) -> bool:
    return (
        isinstance(leaf, Tensor)
        and leaf.layout == torch.strided
        and (leaf.is_floating_point() or leaf.is_complex())
    )


def _columns(value: Tensor) -> Tensor:
    """As (B, D), without a graph."""
    value = value.detach()
    value = torch.view_as_real(value) if value.is_complex() else value
    return value.flatten(1) if value.dim() > 1 else value.reshape(1, -1)
