"""`mem_gc`: activations that are computed again in the backward pass instead of being kept ("gradient checkpointing").

The work is done by `torch.utils.checkpoint`, in its non-reentrant form: random state and autocast are those of the
first evaluation, parameters are found by autograd wherever the function has them, and second derivatives are right.
What it leaves to be done is that the second evaluation updates no buffer, and that is `torchdeq._held`.

Source: Chen et al. (2016), arXiv 1604.06174.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from torchdeq._held import hold, release
from torchdeq._modes import in_transform

__all__ = ["mem_gc"]


def mem_gc(func: Callable[..., Any], in_args: Sequence[Any] | None = None) -> Any:
    """func(*in_args), whose backward pass evaluates func again instead of keeping what it needs.

    Of each call only the arguments are kept. A backward pass costs one more evaluation of func. Random numbers and
    autocast are the same in it; the running statistics of batch normalisation and other buffers are updated once, by
    the first. Without grad mode, and inside a transform of torch.func, where torch allows no checkpoints, it is a
    plain call.

    Arguments:
        func: a module, function or closure. Its parameters need not be named. It must compute the same again: what it
            reads from elsewhere may not change until the backward pass is over.
        in_args: its arguments, in a tuple or list: tensors or anything else. None for none.

    Returns:
        What func returns: a tensor, a tuple, or any other structure. Tensors have their gradients.

    Raises:
        TypeError: func cannot be called, or in_args is no tuple or list.
        torch.utils.checkpoint.CheckpointError: in the backward pass, where func does not compute the same again.

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
    out = checkpoint(held, *args, use_reentrant=False)
    release(held)  # from here on an evaluation changes no buffer
    return out
