"""The maps that solvers see: affine ones, ones whose calls are counted, and the transpose of a linear one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchdeq._replay import AutocastState
from torchdeq._state import Layout, Map, per_sample, select_rows

if TYPE_CHECKING:
    from torchdeq.solver.learned import Learned
    from torchdeq.solver.watch import Watch


@dataclass(frozen=True, eq=False)
class AffineMap:
    """f(u) = linear(u) + shift, a map that is known to be affine.

    Krylov solvers need to know; and every solver gets f(0) = shift without an evaluation.

    Arguments:
        linear: the linear part L, shape-preserving.
        shift: the constant part, in the shape of the state.
        preconditioner: a linear map near (I − L)⁻¹, shape-preserving and not counted as an evaluation. Krylov
            solvers that allow one search the space of (I − L) P instead, which has the same solution. None: none.

    Example:
        >>> f = AffineMap(lambda u: 0.5 * u, torch.ones(1, 2))
        >>> f(torch.ones(1, 2))
        tensor([[1.5000, 1.5000]])
    """

    linear: Callable[[Any], Any]
    shift: Any
    preconditioner: Callable[[Any], Any] | None = None

    def __call__(self, u: Tensor) -> Tensor:
        return self.linear(u) + self.shift


class Tally:
    """f with its calls counted, evaluated under the caller's autocast state.

    Arguments:
        f: the map, (B, D) -> (B, D).
        amp: the autocast state that f is called under.
        limit: how many calls it may come to.
        layout: what leaves the D numbers belong to; None if that is not known.
    """

    def __init__(self, f: Map, amp: AutocastState, limit: int = 0, layout: Layout | None = None):
        self.f = f
        self.amp = amp
        self.limit = limit
        self.layout = layout
        self._rounds = layout is not None and layout.rounds
        self.calls = 0
        self.learned: Learned | None = None  # what the solve learns of (I − J)⁻¹, if that is wanted
        #: Whether the host may read values on the way, and whether it knows that no residual has grown in this one.
        self.reads = self.closer = False
        self._watch: Watch | None = None  # what the loop knows of the samples
        self._last: tuple[Tensor, Tensor, Tensor] | None = None  # z, f(z), and f(z) − z
        self._size: Tensor | None = None  # (B,), the norm of the last of them

    def __call__(self, z: Tensor) -> Tensor:
        self.calls += 1
        if not self.amp.enabled:
            return self.f(z)
        with self.amp.on():
            return self.f(z)

    @property
    def fell(self) -> bool:
        """Whether every residual has clearly fallen just now; those of samples at rest, if there are any, are as they
        were."""
        return self._watch is not None and self._watch.fell

    @property
    def changed(self) -> bool:
        """Whether the norm of every residual has clearly changed just now, likewise."""
        return self._watch is not None and self._watch.changed

    @property
    def rest(self) -> bool:
        """Whether some sample rests."""
        return self._watch is not None and not self._watch.all_active

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many of the D numbers belong to each leaf."""
        return () if self.layout is None else self.layout.sizes

    def resolution(self, z: Tensor) -> float:
        """ε of the narrowest dtype that f is known to compute in, for a state z."""
        dtypes = [z.dtype, *([] if self.layout is None else self.layout.dtypes)]
        if self.amp.enabled:
            dtypes.append(self.amp.dtype)
        return max(torch.finfo(dtype).eps for dtype in dtypes)

    def rounded(self, z: Tensor) -> Tensor:
        """z in the precision in which f sees it."""
        return self.layout.rounded(z) if self._rounds and self.layout is not None else z

    def residual(self, z: Tensor, fz: Tensor) -> Tensor:
        """f(z) − z of the last call, fz = f(z), both (B, D). It is computed once."""
        if self._last is not None and self._last[0] is z and self._last[1] is fz:
            return self._last[2]
        r = self._difference_of(z, fz)
        self._last, self._size = (z, fz, r), None
        return r

    def _difference_of(self, z: Tensor, fz: Tensor) -> Tensor:
        return fz - z

    def note(self, size: Tensor | None, *, reads: bool, closer: bool, watch: Watch | None = None) -> None:
        """Remember for the step that follows what the loop has found out.

        Arguments:
            size: the norm of the residual, (B,), if it is known.
            reads: whether the host may read values.
            closer: whether no residual has grown.
            watch: what it knows of the samples.
        """
        self._size, self.reads, self.closer, self._watch = size, reads, closer, watch

    def forget(self) -> None:
        """Let go of the states of the last call, before the next one takes memory."""
        self._last = self._size = None

    def select(self, rows: Tensor) -> Tally:
        """f for some of the samples, with a count that goes on from here."""
        few = Tally(select_rows(self.f, rows), self.amp, self.limit, self.layout)
        few.calls = self.calls
        return few


def residual_of(f: Map, z: Tensor, fz: Tensor) -> tuple[Tensor, Tensor]:
    """fz − z (B, D) and its norm per sample (B,), where fz = f(z); those that the loop has computed, if it has.

    Example:
        >>> residual_of(torch.cos, torch.zeros(1, 4), torch.ones(1, 4))
        (tensor([[1., 1., 1., 1.]]), tensor([2.]))
    """
    if not isinstance(f, Tally):
        r = fz - z
        return r, per_sample(r)
    r = f.residual(z, fz)
    return r, per_sample(r) if f._size is None else f._size


def generic(like: Tensor) -> Tensor:
    """A vector v of the shape (B, D) and dtype of `like`, the same for all samples, which do not depend on each other.

    Its entries are of either sign and of sizes from 0.5 to 1.5, so that no column is overlooked, nor likely cancelled.
    """
    generator = torch.Generator().manual_seed(0)
    v = torch.rand(like.shape[1], generator=generator, dtype=torch.float64) * 2 - 1
    return (v + 0.5 * v.sign()).to(like).expand_as(like)


def size_of(linear: Map, like: Tensor) -> Tensor:
    """‖A v‖ / ‖v‖ per sample, (B,), for a generic v: about ‖A‖_F / √D, and never more than ‖A‖. One product.

    Arguments:
        linear: A or Aᵀ, (B, D) -> (B, D).
        like: of the shape and dtype of what it takes.

    Example:
        >>> torch.allclose(size_of(lambda v: -3 * v, torch.zeros(2, 4)), torch.tensor(3.0))
        True
    """
    v = generic(like)
    return per_sample(linear(v)) / per_sample(v).clamp_min(torch.finfo(like.dtype).tiny)


def root_of_scale(size: Tensor, target: float = 1.0) -> Tensor:
    """ρ, (B, 1), a power of two per sample with ρ² size between target/4 and target.

    A linear system A x = b is solved as ρAρ (x/ρ) = ρb. That stays symmetric if A is, and rounds nothing. A size of
    zero counts as 1.

    Example:
        >>> root_of_scale(torch.tensor([1.0, 1e-8, 0.0, torch.inf]))
        tensor([[1.0000e+00],
                [8.1920e+03],
                [1.0000e+00],
                [1.0000e+00]])
    """
    known = size.isfinite() & (size > 0)
    power = (math.log2(target) - torch.where(known, size, 1.0).double().log2()) / 2
    return torch.exp2(power.floor()).to(size.dtype)[:, None]


class Operator:
    """A = (I − L) P of a linear map L and a right preconditioner P, which is the identity if there is none.

    Every product with L or with Lᵀ counts.

    Arguments:
        linear: L, (B, D) -> (B, D), with its calls counted.
        preconditioner: P, (B, D) -> (B, D), not counted.

    Example:
        >>> counted = Tally(lambda u: 0.5 * u, AutocastState.capture(torch.device("cpu")))
        >>> Operator(counted)(torch.ones(1, 2)), counted.calls
        (tensor([[0.5000, 0.5000]]), 1)
    """

    def __init__(self, linear: Tally, preconditioner: Map | None = None):
        self.linear = linear
        self.preconditioner = preconditioner
        self._transpose: Map | None = None

    def __call__(self, p: Tensor) -> Tensor:
        """A p."""
        q = self.preconditioned(p)
        return q - self.linear(q)

    def preconditioned(self, p: Tensor) -> Tensor:
        """P p."""
        return p if self.preconditioner is None else self.preconditioner(p)

    def recorded(self, p: Tensor) -> Tensor:
        """A p without a preconditioner, by a call of L whose graph is kept for `transposed`."""
        image, self._transpose = with_transpose(self.linear, p)
        return p - image

    def transposed(self, p: Tensor) -> Tensor:
        """Aᵀ p, after `recorded`."""
        assert self._transpose is not None
        self.linear.calls += 1
        return p - self._transpose(p)


def with_transpose(linear: Map, u: Tensor) -> tuple[Tensor, Map]:
    """L u of a linear map L: (B, D) -> (B, D), and the map Lᵀ, from one call of L.

    Because L is linear, the graph of one call, at any u, serves for every product with Lᵀ. `linear` must be
    differentiable; where it is itself made of vector–Jacobian products Jᵀu, they need `create_graph=True`, and Lᵀ
    is J.

    Arguments:
        linear: L.
        u: where L is wanted, (B, D). Not zero: L u = 0 then tells an L that is zero from one without a graph.

    Raises:
        RuntimeError: the second map is called, and autograd cannot go back through L. It is computed outside of
            torch; or it is the adjoint of an f whose backward pass is not differentiable.

    Example:
        >>> a = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> image, transposed = with_transpose(lambda u: u @ a.T, torch.tensor([[0.0, 1.0]]))
        >>> image, transposed(torch.tensor([[1.0, 0.0]]))
        (tensor([[2., 4.]]), tensor([[1., 2.]]))
    """
    with torch.inference_mode(False), torch.enable_grad():
        u = u.detach().clone().requires_grad_()
        image = linear(u)

    def transposed(v: Tensor) -> Tensor:
        product = None
        try:
            if image.requires_grad:
                (product,) = torch.autograd.grad(image, u, v, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            raise RuntimeError(
                f"the transpose of {linear!r} was asked for, but autograd cannot go back through it: {error} If it is "
                f"the adjoint of an f, then f must be twice differentiable. GMRES() and BiCGSTAB() need no transpose."
            ) from error
        if product is not None:
            return product
        if bool(u.any()) and not bool(image.any()):  # no path from u to L u, and none is needed: L is zero
            return torch.zeros_like(v)
        raise RuntimeError(
            f"the transpose of {linear!r} was asked for, but what it returns does not depend on its argument through "
            f"operations that autograd records. Write it in torch operations, without detach() or no_grad(); if it is "
            f"the adjoint of an f, then f must be twice differentiable. GMRES() and BiCGSTAB() need no transpose."
        )

    return image.detach(), transposed
