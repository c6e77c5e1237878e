"""The leaves of an autograd graph: the tensors that a result can be differentiated with respect to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def leaves_of(results: Iterable[Tensor], without: Iterable[Tensor] = ()) -> list[Tensor]:
    """The leaf tensors that require a gradient and that `results` were computed from, each once, in a fixed order.

    Arguments:
        results: tensors, with or without a graph.
        without: leaves that are not wanted.

    What a reentrant checkpoint or a custom function holds without making it an input is not in the graph.

    Example:
        >>> import torch
        >>> a, b = torch.ones(2, requires_grad=True), torch.ones(2)
        >>> leaves_of([(a * b).sin()])[0] is a
        True
    """
    ignored = {id(t) for t in without}
    found: dict[int, Tensor] = {}
    todo: list[Any] = []
    for result in results:
        if result.grad_fn is not None:
            todo.append(result.grad_fn)
        elif result.requires_grad and id(result) not in ignored:
            found[id(result)] = result
    seen = set(todo)
    while todo:
        node = todo.pop()
        leaf = getattr(node, "variable", None)  # of an AccumulateGrad node
        if isinstance(leaf, Tensor) and not node.next_functions and id(leaf) not in ignored:
            found[id(leaf)] = leaf
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                todo.append(following)
    return list(found.values())
