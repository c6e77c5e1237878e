"""What goes from turn to turn of a compiled loop, as few tensors.

A graph takes and gives tensors one by one, and each costs time at every turn. So those of a shape (B,) or () are
stacked, by their dtype. Histories, of three dimensions or more, do not go round: they are written to in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Packing:
    """How the tensors of named tuples, nested in each other, are packed.

    Arguments:
        tree: named tuples of tensors and None.

    Example:
        >>> from typing import NamedTuple
        >>> class Pair(NamedTuple):
        ...     a: torch.Tensor
        ...     b: torch.Tensor
        >>> pair = Pair(torch.zeros(3), torch.ones(3))
        >>> packing = Packing(pair)
        >>> tensors, histories = packing.pack(pair)
        >>> [tuple(t.shape) for t in tensors], packing.unpack(tensors, histories).b
        ([(2, 3)], tensor([1., 1., 1.]))
    """

    def __init__(self, tree: Any):
        leaves = leaves_of(tree)
        self.count = len(leaves)
        self.template, _ = _numbered(tree, 0)
        small: dict[Any, list[int]] = {}
        for i, leaf in enumerate(leaves):
            if leaf.dim() <= 1:
                small.setdefault((leaf.dtype, leaf.shape), []).append(i)
        self.small = tuple(tuple(group) for group in small.values())
        self.large = tuple(i for i, leaf in enumerate(leaves) if leaf.dim() == 2)
        self.histories = tuple(i for i, leaf in enumerate(leaves) if leaf.dim() > 2)

    @property
    def key(self) -> Any:
        """Equal for packings that are alike."""
        return self.template, self.small, self.large, self.histories

    def pack(self, tree: Any) -> tuple[list[Tensor], list[Tensor]]:
        """The tensors that go round, and the histories."""
        leaves = leaves_of(tree)
        stacked = [torch.stack([leaves[i] for i in group]) for group in self.small]
        return stacked + [leaves[i] for i in self.large], [leaves[i] for i in self.histories]

    def unpack(self, tensors: Sequence[Tensor], histories: Sequence[Tensor]) -> Any:
        """What was packed."""
        leaves: list[Any] = [None] * self.count
        for group, stacked in zip(self.small, tensors, strict=False):
            for i, leaf in zip(group, stacked.unbind(0), strict=True):
                leaves[i] = leaf
        for i, leaf in zip(self.large, tensors[len(self.small) :], strict=True):
            leaves[i] = leaf
        for i, leaf in zip(self.histories, histories, strict=True):
            leaves[i] = leaf
        return _filled(self.template, leaves)


def leaves_of(tree: Any) -> list[Tensor]:
    """The tensors of nested tuples, in their order."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, tuple):
        return [leaf for part in tree for leaf in leaves_of(part)]
    return []


def _numbered(tree: Any, first: int) -> tuple[Any, int]:
    """The tree with the numbers of its tensors, from `first`, in their places, and the next number."""
    if tree is None:
        return None, first
    if isinstance(tree, Tensor):
        return first, first + 1
    parts = []
    for part in tree:
        numbered, first = _numbered(part, first)
        parts.append(numbered)
    return type(tree)(*parts), first


def _filled(template: Any, leaves: Sequence[Any]) -> Any:
    if template is None:
        return None
    if isinstance(template, int):
        return leaves[template]
    return type(template)(*[_filled(part, leaves) for part in template])
