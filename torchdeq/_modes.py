"""Which of PyTorch's ways to differentiate are at work: forward-mode duals, and the transforms of torch.func."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import (
    retrieve_current_functorch_interpreter,
    temporarily_pop_interpreter_stack,
)
from torch.autograd import forward_ad


def in_dual_level() -> bool:
    """Whether tensors may carry tangents. Outside of `forward_ad.dual_level`, the usual case, one comparison."""
    return bool(forward_ad._current_level >= 0)


def split_dual(z: Tensor) -> tuple[Tensor, Tensor | None]:
    """The primal and the tangent of z, None if there is none."""
    if not in_dual_level():
        return z, None
    primal, tangent = forward_ad.unpack_dual(z)
    return primal, tangent


def join_dual(primal: Tensor, tangent: Tensor | None) -> Tensor:
    """The dual tensor of both; the primal itself if there is no tangent."""
    if tangent is None:
        return primal
    dual: Tensor = forward_ad.make_dual(primal, tangent)
    return dual


def without_tangents() -> AbstractContextManager[Any]:
    """A context in which operations carry no tangents along: for a solve, whose steps are not to be differentiated."""
    return forward_ad._set_fwd_grad_enabled(False)


def in_transform() -> bool:
    """Whether a transform of torch.func (grad, vjp, jvp, jacrev, jacfwd, hessian, vmap) is at work."""
    return bool(torch._C._are_functorch_transforms_active())


def in_backward() -> bool:
    """Whether autograd is at work: code that runs now is a backward pass, or makes something again for one."""
    return torch._C._current_graph_task_id() != -1


def saves_elsewhere() -> bool:
    """Whether what is saved for a backward pass goes through hooks, as it does within a checkpoint."""
    return torch.is_grad_enabled() and torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def refuse_transforms(what: Callable[[], str]) -> None:
    """Raise if a transform of torch.func is at work, and name the function that allows them.

    Arguments:
        what: makes the name of what cannot be transformed.
    """
    if in_transform():
        raise RuntimeError(
            f"{what()} reaches what f depends on through what f closes over, which a transform of torch.func (grad, "
            f"vjp, jvp, jacrev, jacfwd, hessian, vmap) cannot follow. Use torchdeq.fixed_point(f, z0, *theta), which "
            f"takes it as arguments and works under all of them; or torch.autograd.grad and backward()."
        )


@contextmanager
def one_batch() -> Iterator[None]:
    """A solve, whose stop test reads values: where vmap forbids that, torch's error says what to do."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if ("vmap" in text and "data-dependent" in text) or "data pointer" in text:
            error.add_note(
                "A DEQ stops when its state has converged, which vmap cannot see. Use torchdeq.fixed_point, where each "
                "mapped instance is a sample of the solve; or put the instances into the batch, the state's first "
                "dimension."
            )
        raise


@contextmanager
def one_cotangent() -> Iterator[None]:
    """A backward pass that solves: where it is asked for many cotangents at once, torch's error says what to do."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if "Batching rule" in text or "random operations" in text or "data pointer" in text:
            error.add_note(
                "The backward pass of a DEQ solves for one cotangent at a time. Instead of is_grads_batched=True or "
                "vectorize=True use a loop, or torchdeq.fixed_point with torch.func.jacrev or vmap, where each "
                "cotangent is a sample of the solve."
            )
        raise


def refuse_old_vmap() -> None:
    """Raise under the vmap inside torch.autograd, which no custom Function can follow."""
    level = torch._C._vmapmode_increment_nesting()
    torch._C._vmapmode_decrement_nesting()
    if level > 1:
        raise RuntimeError(
            "is_grads_batched=True of torch.autograd.grad and vectorize=True of torch.autograd.functional map over a "
            "fixed-point solve with an old vmap that cannot see into it. Use torch.func.jacrev, jacfwd, hessian, vmap."
        )


def map_levels(t: Any) -> set[int]:
    """The levels of the vmaps over t."""
    functorch, levels = torch._C._functorch, set()
    while functorch.is_functorch_wrapped_tensor(t):
        if functorch.is_batchedtensor(t):
            levels.add(functorch.maybe_get_level(t))
        t = functorch.get_unwrapped(t)
    return levels


def is_tracked(t: Tensor) -> bool:
    """Whether t has a graph or a tangent, for autograd or for any transform of torch.func around."""
    functorch = torch._C._functorch
    mapped = functorch.is_batchedtensor(t)
    if not mapped and (
        t.requires_grad or (in_dual_level() and forward_ad.unpack_dual(t).tangent is not None)
    ):
        return True
    if not in_transform():
        return False
    # Each level answers for itself only, and only while it is the innermost.
    top = retrieve_current_functorch_interpreter().level()
    own = functorch.is_functorch_wrapped_tensor(t) and functorch.maybe_get_level(t) == top
    with temporarily_pop_interpreter_stack():
        return is_tracked(functorch.get_unwrapped(t) if own else t)
