"""A value f(z) with its graph, and the z it was computed from: what the functions here measure ∂f/∂z on."""

from __future__ import annotations

from typing import Any

import optree
import torch
from torch import Tensor

from torchdeq._state import Tree


def checked_pair(f0: Tree, z0: Tree, name: str) -> tuple[list[Tensor], list[Tensor]]:
    """The leaves of f0 and of z0, which must fit.

    Arguments:
        f0: f(z0).
        z0: the state.
        name: of the function that is asked, for errors.
    """
    images, states = optree.tree_leaves(f0), optree.tree_leaves(z0)
    for which, leaves in (("f0", images), ("z0", states)):
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                raise ValueError(
                    f"{name}(f0, z0): {which} holds a {type(leaf).__name__}. f0 is the value f(z0), not the function: "
                    f"{name}(f(z), z)."
                )
    shapes = [tuple(leaf.shape) for leaf in images], [tuple(leaf.shape) for leaf in states]
    if shapes[0] != shapes[1] or not states:
        raise ValueError(
            f"{name}(f0, z0): f0 has the shapes {shapes[0]} and z0 has {shapes[1]}. Give f(z) and z, with at least "
            f"one tensor in them."
        )
    if not all(z.requires_grad for z in states):
        raise ValueError(
            f"{name}(f0, z0): z0 does not require a gradient, so ∂f0/∂z0 was not recorded. Evaluate f once more with "
            f"one: z = z.detach().requires_grad_(); {name}(f(z), z)."
        )
    if not any(image.requires_grad for image in images):
        raise ValueError(
            f"{name}(f0, z0): f0 has no graph. It was computed under torch.no_grad(), or by an f that detaches its "
            f"argument; evaluate f under grad mode."
        )
    return images, states


def vjp(
    images: list[Tensor], states: list[Tensor], v: list[Tensor], name: str, *, create_graph: bool = False
) -> list[Tensor | None]:
    """Jᵀv, a leaf for each state, None where it is zero. The graph is kept.

    Arguments:
        images, states: as `checked_pair` returns them.
        v: cotangents of the images.
        name: of the function that is asked, for errors.
        create_graph: whether the product can be differentiated.
    """
    tracked = [(image, u.to(image.dtype)) for image, u in zip(images, v, strict=True) if image.requires_grad]
    outputs, cotangents = zip(*tracked, strict=True)  # rows of J that belong to the others are zero
    products = torch.autograd.grad(
        outputs, states, cotangents, retain_graph=True, create_graph=create_graph, allow_unused=True
    )
    if all(product is None for product in products):
        raise ValueError(
            f"{name}(f0, z0): f0 was not computed from z0, so ∂f0/∂z0 is not there to be measured. Evaluate f at the "
            f"very tensor you give: z = z.detach().requires_grad_(); {name}(f(z), z)."
        )
    return list(products)


def teach_second(loss: Tensor, name: str) -> None:
    """Have the backward pass of a loss made of `vjp` say what to do, where an operation of f has no second derivative.

    Torch puts a node in the graph for it that raises when it is reached. Nothing is raised before: the value is right.

    Arguments:
        loss: the loss, with its graph.
        name: of the function that is asked, for errors.
    """
    if torch.compiler.is_compiling() or loss.grad_fn is None:
        return

    def teach(*_: Any) -> None:
        raise NotImplementedError(
            f"the gradient of {name} differentiates f twice, and an operation in f has no second derivative in torch. "
            f"The fused kernels of scaled_dot_product_attention have none, those that nn.MultiheadAttention calls with "
            f"need_weights=False included. Evaluate the attention in f within `with torch.nn.attention.sdpa_kernel("
            f"torch.nn.attention.SDPBackend.MATH):`, which computes the same."
        )

    seen, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::NotImplemented":
            node.register_prehook(teach)
        todo += [following for following, _ in node.next_functions if following is not None]
