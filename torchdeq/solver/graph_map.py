"""f on pytrees as a map on flat states that can be traced in the loop of a graph.

What is traced there meets Dynamo, which follows torch operations and plain Python: no `PyTreeSpec` from outside, no
`torch.Size` with a symbol in it, no counters that are written to. So the structure of the state is kept as plain
tuples here, and what can be known beforehand is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchdeq._state import Layout, Tree

#: The number of a leaf; or the type of a container, its keys, and what is in it.
Plan = int | tuple[Any, tuple[Any, ...], tuple[Any, ...]]


class GraphMap:
    """f as a map (B, D) -> (B, D); to `torchdeq.solver.traced` it is what a `Tally` is.

    Arguments:
        f: the user's map. That it keeps structure, shapes and dtypes of the state has been checked.
        layout: the layout of the state.

    Raises:
        TypeError: the state is made of other containers than tuples, named tuples, lists and dictionaries.

    Example:
        >>> from torchdeq._state import layout_of
        >>> state = {"a": torch.ones(2, 3), "b": torch.zeros(2)}
        >>> f = GraphMap(lambda z: {"a": z["a"] * 2, "b": z["b"] + 1}, layout_of(state))
        >>> f(torch.ones(2, 4))
        tensor([[2., 2., 2., 2.],
                [2., 2., 2., 2.]])
    """

    def __init__(self, f: Callable[[Tree], Tree], layout: Layout):
        self.f = f
        self.sizes = layout.sizes
        # With samples along the first dimension alone it is that of z: a size from outside would be one more input.
        self.batched = layout.depth == 1
        self.shapes = [tuple(shape)[layout.depth == 1 :] for shape in layout.shapes]
        self.dtypes = layout.dtypes
        self.real = [dtype.to_real() if dtype.is_complex else dtype for dtype in layout.dtypes]
        eps, *others = [torch.finfo(dtype).eps for dtype in (layout.dtype, *layout.dtypes)]
        self.resolution = max(eps, *others)
        self.narrow = [other > eps for other in others]
        self.whole = layout.plain is not None and layout.depth == 1 and len(layout.shapes[0]) == 2
        self.plan = plan_of(layout.spec)

    def __call__(self, z: Tensor) -> Tensor:
        if self.whole:
            image: Tensor = self.f(z)
            return image.contiguous()
        leaves = [
            _leaf(column, (z.shape[0], *shape) if self.batched else shape, *what)
            for column, shape, *what in zip(
                self._columns(z), self.shapes, self.dtypes, self.real, strict=True
            )
        ]
        images = leaves_of(self.plan, self.f(filled(self.plan, leaves)))
        parts = [
            _column(image, z, size, dtype)
            for image, size, dtype in zip(images, self.sizes, self.dtypes, strict=True)
        ]
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim=1)

    def residual(self, z: Tensor, fz: Tensor) -> Tensor:
        """f(z) − z, where fz = f(z), (B, D)."""
        return fz - z

    def rounded(self, z: Tensor) -> Tensor:
        """z in the precision in which f sees it."""
        if not any(self.narrow):
            return z
        parts = [
            column.to(real).to(z.dtype) if narrow else column
            for column, real, narrow in zip(self._columns(z), self.real, self.narrow, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _columns(self, z: Tensor) -> Sequence[Tensor]:
        return (z,) if len(self.sizes) == 1 else z.split(self.sizes, dim=1)


def _leaf(column: Tensor, shape: tuple[int, ...], dtype: torch.dtype, real: torch.dtype) -> Tensor:
    if dtype == real:
        return column.reshape(shape).to(dtype)
    pairs = column.to(real).reshape(*shape, 2)
    return torch.complex(pairs[..., 0], pairs[..., 1])


def _column(image: Tensor, z: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    image = image.to(dtype)
    if dtype.is_complex:
        image = torch.stack((image.real, image.imag), dim=-1)
    return image.reshape(z.shape[0], size).to(z.dtype)


def plan_of(spec: Any, first: int = 0) -> Plan:
    """The structure that optree describes, as plain tuples.

    Arguments:
        spec: optree's description.
        first: the number of its first leaf.
    """
    if spec.is_leaf():
        return first
    kind = spec.type
    if not (kind in (dict, OrderedDict, list, tuple) or hasattr(kind, "_fields")):
        raise TypeError(
            f"a state with a {getattr(kind, '__name__', kind)} in it cannot be exported. Make it of tensors, tuples, "
            f"named tuples, lists and dictionaries."
        )
    parts = []
    for child in spec.children():
        parts.append(plan_of(child, first))
        first += child.num_leaves
    return kind, tuple(spec.entries()), tuple(parts)


def filled(plan: Plan, leaves: Sequence[Tensor]) -> Tree:
    """The structure with these leaves."""
    if isinstance(plan, int):
        return leaves[plan]
    kind, keys, plans = plan
    parts = [filled(part, leaves) for part in plans]
    if issubclass(kind, dict):
        return kind(zip(keys, parts, strict=True))
    if hasattr(kind, "_fields"):
        return kind(*parts)
    return kind(parts)


def leaves_of(plan: Plan, tree: Tree) -> list[Tensor]:
    """The leaves of a tree of this structure, in which lists and tuples stand for each other."""
    if isinstance(plan, int):
        return [tree]
    kind, keys, plans = plan
    if len(tree) != len(plans):
        raise ValueError("f changes the structure of the state")  # FlatMap says it better
    parts = [tree[key] for key in keys] if issubclass(kind, dict) else list(tree)
    return [leaf for part, inner in zip(plans, parts, strict=True) for leaf in leaves_of(part, inner)]
