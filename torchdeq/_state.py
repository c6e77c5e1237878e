"""Any pytree of tensors as one real (B, D) tensor, and back.

Solvers and gradient methods only ever see a state of shape (B, D): B independent samples with D real
numbers each. This module is the door. What comes in is remembered in a `Layout`; what goes out has the
same structure, shapes and dtypes.

* A single real tensor is viewed, not copied.
* A complex leaf is a pair of real numbers. The fixed point of a map that is not holomorphic (a
  conjugate, an absolute value) is then solved, and differentiated, by the same real algebra.
* A half-precision leaf is carried in float32: the map sees its own dtype, the solver's sums do not
  lose digits.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor
from torch.autograd import forward_ad

Tree = Any
Map = Callable[[Tensor], Tensor]

_WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


@dataclass(frozen=True)
class Layout:
    """How a pytree of tensors lies in one (B, D) tensor.

    Arguments:
        spec: the structure, as optree describes it.
        shapes: the shape of each leaf.
        dtypes: the dtype of each leaf.
        sizes: real numbers per sample in each leaf.
        batch: B, the number of samples.
        dtype: dtype of the (B, D) tensor, at least float32.
        depth: how many leading dimensions of the leaves count samples.
    """

    spec: Any
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    sizes: tuple[int, ...]
    batch: int
    dtype: torch.dtype
    depth: int

    @property  # not a cached one, which a graph cannot hold
    def plain(self) -> torch.Size | None:
        """The shape of a state that is one real tensor in the dtype of the solver, and only viewed; otherwise None."""
        return self.shapes[0] if self.spec.is_leaf() and self.dtypes[0] == self.dtype else None

    def unravel(self, z: Tensor) -> Tree:
        """The (B, D) tensor `z` in the structure of the state. A view wherever dtypes allow."""
        if self.plain is not None:
            return z if z.shape == self.plain else z.reshape(self.plain)
        columns = (z,) if len(self.sizes) == 1 else z.split(self.sizes, dim=1)
        leaves = [
            _from_columns(c, shape, dtype)
            for c, shape, dtype in zip(columns, self.shapes, self.dtypes, strict=True)
        ]
        return optree.tree_unflatten(self.spec, leaves)

    def ravel(self, tree: Tree, *, source: str = "f") -> Tensor:
        """`tree`, which must have this layout, as a (B, D) tensor. `source` names it in errors."""
        plain = self.plain is not None and isinstance(tree, Tensor)
        if plain and tree.shape == self.plain and tree.dtype == self.dtype:
            flat = tree.dim() == 2 and self.depth == 1
            return tree if flat else tree.reshape(self.batch, self.sizes[0])
        leaves = self._leaves(tree, source)
        columns = [
            _to_columns(leaf.to(dtype) if dtype.is_complex else leaf, self.batch, size, self.dtype)
            for leaf, size, dtype in zip(leaves, self.sizes, self.dtypes, strict=True)
        ]
        return columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)

    @property
    def rounds(self) -> bool:
        """Whether a leaf is in a narrower dtype than the (B, D) tensor."""
        return any(_is_narrower(dtype, self.dtype) for dtype in self.dtypes)

    def rounded(self, z: Tensor) -> Tensor:
        """The (B, D) tensor as it is once it has been through the dtypes of the leaves, in which f sees it."""
        if not any(_is_narrower(dtype, z.dtype) for dtype in self.dtypes):
            return z
        columns = [
            c.to(real).to(z.dtype) if _is_narrower(dtype, z.dtype) else c
            for c, dtype in zip(z.split(self.sizes, dim=1), self.dtypes, strict=True)
            for real in (dtype.to_real() if dtype.is_complex else dtype,)
        ]
        return columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)

    def shape(self, z: Tensor) -> torch.Size:
        """The shape of the state that the (B, D) tensor z stands for, if it is one tensor of these very numbers."""
        whole = len(self.shapes) == 1 and self.depth == 1 and self.shapes[0].numel() == z.numel()
        return self.shapes[0] if whole else z.shape

    def select(self, count: int) -> Layout:
        """The layout of `count` samples."""
        shapes = tuple(torch.Size((count, *shape[1:])) for shape in self.shapes)
        return dataclasses.replace(self, shapes=shapes, batch=count)

    def _leaves(self, tree: Tree, source: str) -> list[Tensor]:
        if isinstance(tree, Tensor) and self.spec.is_leaf():
            leaves = [tree]
        else:
            leaves, spec = optree.tree_flatten(tree)
            if spec != self.spec and not _alike(spec, self.spec):
                raise TypeError(
                    f"{source} returned the structure {spec}, but the state has the structure "
                    f"{self.spec}. Return the state in the structure z0 was given in."
                )
        for i, (leaf, shape, dtype) in enumerate(zip(leaves, self.shapes, self.dtypes, strict=True)):
            where = f" (leaf {i})" if len(self.shapes) > 1 else ""
            if not isinstance(leaf, Tensor):
                raise TypeError(f"{source} returned a {type(leaf).__name__}{where}, not a tensor.")
            if leaf.shape != shape:
                raise ValueError(
                    f"{source} returned shape {tuple(leaf.shape)}{where}, but the state has shape "
                    f"{tuple(shape)}. A fixed point z = f(z) needs f to keep the shape of z: check for "
                    f"a missing or an extra dimension, and that z0 has the batch size of the input."
                )
            if leaf.dtype != dtype and not fits(leaf.dtype, dtype):
                wider = leaf.is_floating_point() or leaf.is_complex()
                raise TypeError(
                    f"{source} returned dtype {leaf.dtype}{where}, but the state has dtype {dtype}. "
                    + (
                        f"Give z0 as {leaf.dtype}, or return z.to({dtype})."
                        if wider
                        else f"Return z.to({dtype})."
                    )
                )
        return leaves


def layout_of(z0: Tree, batch_dims: int = 1) -> Layout:
    """The layout of the state `z0`.

    Arguments:
        z0: a tensor, or any pytree (tuple, list, dict, named tuple, dataclass registered with optree) of
            floating-point or complex tensors.
        batch_dims: how many leading dimensions count samples. 1: the first dimension is the batch.
            0: the whole state is one sample, as for a graph or any f that couples everything. 2: one
            sample per token. A state whose leaves are all 0-D is one sample.

    Raises:
        TypeError: a leaf is not a floating-point or complex tensor.
        ValueError: there is no leaf, or the leaves disagree about the batch or the device.
    """
    leaves, spec = optree.tree_flatten(z0)
    if not leaves:
        raise ValueError(f"the state {z0!r} has no tensor in it; a fixed-point solve needs at least one.")
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"the state holds a {type(leaf).__name__} ({leaf!r}); every leaf must be a tensor. "
                f"Wrap numbers with torch.as_tensor, and close f over whatever is not part of the state."
            )
        if not (leaf.is_floating_point() or leaf.is_complex()):
            raise TypeError(
                f"the state has dtype {leaf.dtype}; a fixed point is solved in floating-point or complex "
                f"numbers. Use z0.float() or z0.double()."
            )
        if leaf.device != leaves[0].device:
            raise ValueError(
                f"the leaves of the state lie on {leaves[0].device} and {leaf.device}; "
                f"move them to one device."
            )
    scalars = all(leaf.dim() == 0 for leaf in leaves)
    depth = 0 if scalars else batch_dims
    first = leaves[0].shape[:depth]
    if any(leaf.dim() < depth or leaf.shape[:depth] != first for leaf in leaves):
        raise ValueError(
            f"the leaves of the state have shapes {[tuple(leaf.shape) for leaf in leaves]}, which do not "
            f"agree in their first {depth} dimension(s), the batch. Use batch_dims=0 if the state is one "
            f"system rather than a batch of samples."
        )
    batch = math.prod(first)
    real = [_real_dtype(leaf.dtype) for leaf in leaves]
    dtype = real[0]
    for other in real[1:]:
        dtype = torch.promote_types(dtype, other)
    return Layout(
        spec=spec,
        shapes=tuple(leaf.shape for leaf in leaves),
        dtypes=tuple(leaf.dtype for leaf in leaves),
        sizes=tuple(math.prod(leaf.shape[depth:]) * (2 if leaf.is_complex() else 1) for leaf in leaves),
        batch=batch,
        dtype=dtype,
        depth=depth,
    )


class FlatMap:
    """A user's map on pytrees, seen as a map (B, D) -> (B, D), and checked at the door.

    Arguments:
        f: the user's map. It gets the state in its own structure and returns it so.
        layout: the layout of the state.

    Raises:
        ValueError, TypeError: f changes shape, structure or dtype of the state.
        RuntimeError: f changes its argument in place, which would spoil the solver's iterates.
    """

    def __init__(self, f: Callable[[Tree], Tree], layout: Layout):
        if not callable(f):
            raise TypeError(f"f must be a callable that maps the state to the state, got {type(f).__name__}.")
        self.f = f
        self.layout = layout
        self.plain = layout.plain
        self.checked = False

    def __call__(self, z: Tensor) -> Tensor:
        fz = self.dual(z)
        # Outside a dual level, the usual case, this is one comparison.
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(fz).tangent is not None:
            raise RuntimeError(
                "forward-mode derivatives (torch.func.jvp, jacfwd, torch.autograd.forward_ad) were asked where they "
                "would be wrong: what a tangent carried through the steps of a solve, or through some of them, would "
                "give is not the tangent of the solution. DEQ(grad=IFT()) has exact ones under forward_ad, and "
                "torchdeq.fixed_point under torch.func too; or use backward() and torch.autograd.grad."
            )
        return fz

    def dual(self, z: Tensor) -> Tensor:
        """f(z), which may have a tangent, for those who know what to do with it."""
        # Inference tensors count no versions; there the first call is compared by value.
        before = None if z.is_inference() else z._version
        kept = z.clone() if before is None and not self.checked else None
        tree = z if z.shape == self.plain else self.layout.unravel(z)
        try:
            image = self.f(tree)
        except TypeError as error:
            if hint := _of_several(self.f, tree):
                raise TypeError(hint) from error
            raise
        same = z.dim() == 2 and isinstance(image, Tensor) and image.shape == self.plain == z.shape
        fz = image if same and image.dtype == self.layout.dtype else self.layout.ravel(image)
        self.checked = True
        if (before is not None and z._version != before) or (kept is not None and not torch.equal(z, kept)):
            raise RuntimeError(
                "f changed its argument in place (an operation such as z.add_, z += … or z[…] = …). A "
                "solver keeps its iterates, so f must return a new tensor: write z = z + … instead."
            )
        return fz

    def select(self, rows: Tensor) -> FlatMap:
        """The map on the samples `rows` alone, which gets their numbers as the keyword `rows` if it has one.

        Raises:
            ValueError: samples are not the rows of the state.
        """
        if self.layout.depth != 1:
            raise ValueError(
                f"compact=True leaves finished samples out of the batch, the first dimension of the state; it cannot "
                f"with batch_dims={self.layout.depth}. Use compact=False."
            )
        bound = self.f
        if isinstance(bound, functools.partial) and "rows" in bound.keywords:  # a selection of a selection
            f, rows = bound.func, bound.keywords["rows"][rows]
        else:
            f = bound
        if takes_rows(f):
            f = functools.partial(f, rows=rows)
        return FlatMap(f, self.layout.select(len(rows)))

    def __repr__(self) -> str:
        return f"FlatMap({self.f!r})"


def _of_several(f: Callable[..., Any], tree: Tree) -> str:
    """What to do, if f takes the tensors of a tuple state one by one; else nothing."""
    if not isinstance(tree, tuple | list):
        return ""
    try:
        signature = inspect.signature(f)
        signature.bind(*tree)
    except (TypeError, ValueError):
        return ""
    try:
        signature.bind(tree)
    except TypeError:
        return (
            f"f takes {len(tree)} arguments, and is called with one: a state that is a {type(tree).__name__} comes as "
            f"it is. Write f(state), or give lambda state: f(*state). Only the modules of get_deq hand a tuple or list "
            f"over as several arguments."
        )
    return ""


def takes_rows(f: Callable[..., Any]) -> bool:
    """Whether f has a parameter `rows`, the numbers of the samples it is asked about."""
    try:
        return "rows" in inspect.signature(getattr(f, "forward", f)).parameters
    except (TypeError, ValueError):  # a callable without a signature
        return False


def select_rows(f: Map, rows: Tensor) -> Map:
    """f, a map (B, D) -> (B, D), for some of its samples. A bare map is taken to be the same for all."""
    return f.select(rows) if isinstance(f, FlatMap) else f


def with_tangents(f: Map) -> Map:
    """f, which may return dual tensors in forward-mode differentiation, where a `FlatMap` would raise."""
    return f.dual if isinstance(f, FlatMap) else f


def per_sample(z: Tensor) -> Tensor:
    """Euclidean norm per sample of a (B, D) tensor, (B,), in its dtype.

    Squares of float32 numbers overflow above 1e19 and vanish below 1e-23, so they are summed in float64.
    """
    if z.dtype == torch.float64:
        return torch.linalg.vector_norm(z, dim=1)
    if torch.compiler.is_compiling():  # one loop, fused with what made z; on a GPU conversions cost more
        on_cpu = z.device.type == "cpu"
        return z.double().square().sum(dim=1).sqrt().to(z.dtype) if on_cpu else _scaled_norm(z)
    return torch.linalg.vector_norm(z, dim=1, dtype=torch.float64).to(z.dtype)


def _scaled_norm(z: Tensor) -> Tensor:
    if z.shape[1] == 0:
        return z.new_zeros(z.shape[0])
    largest = z.abs().amax(dim=1)
    scale = torch.where(largest > 0, largest, 1.0)
    return scale * torch.linalg.vector_norm(z / scale[:, None], dim=1)


def rough_norm(z: Tensor) -> Tensor:
    """`per_sample` with the squares summed in the dtype of z: several times as fast in float32.

    Wrong where squares overflow or vanish. A result between 1e-15 and infinity is right.
    """
    return torch.linalg.vector_norm(z, dim=1)


def _real_dtype(dtype: torch.dtype) -> torch.dtype:
    real = dtype.to_real() if dtype.is_complex else dtype
    return _WIDER.get(real, real)


def _is_narrower(leaf: torch.dtype, state: torch.dtype) -> bool:
    return torch.finfo(leaf).eps > torch.finfo(state).eps


def _to_columns(leaf: Tensor, batch: int, size: int, dtype: torch.dtype) -> Tensor:
    if leaf.is_complex():
        # Not view_as_real: its backward views the gradient, which may lie at an odd offset among other leaves.
        leaf = torch.stack((leaf.real, leaf.imag), dim=-1)
    return leaf.reshape(batch, size).to(dtype)


def _from_columns(columns: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    if dtype.is_complex:
        pairs = columns.to(dtype.to_real()).reshape(*shape, 2)
        *outer, inner = pairs.stride()
        if inner == 1 and pairs.storage_offset() % 2 == 0 and all(s % 2 == 0 for s in outer):
            return torch.view_as_complex(pairs)
        return torch.complex(pairs[..., 0], pairs[..., 1])
    return columns.reshape(shape).to(dtype)


def fits(got: torch.dtype, state: torch.dtype) -> bool:
    """Whether a value of dtype `got` goes into the state without loss (autocast returns half floats)."""
    return torch.promote_types(got, state) == state and (got.is_floating_point or got.is_complex)


def _alike(got: Any, want: Any) -> bool:
    """Lists and tuples stand for each other, at any depth."""
    if got.is_leaf() or want.is_leaf():
        return bool(got == want)
    sequences = (list, tuple)
    if got.type in sequences and want.type in sequences:
        same = got.num_children == want.num_children
    else:
        same = got.type == want.type and got.entries() == want.entries()
    return same and all(_alike(a, b) for a, b in zip(got.children(), want.children(), strict=True))
