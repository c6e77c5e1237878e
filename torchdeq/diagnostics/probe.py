"""f at a state of its layout, its products with J and Jᵀ there, and difference quotients beside them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import optree
import torch
from torch import Tensor

from torchdeq._replay import AutocastState, RandomState
from torchdeq._state import Layout, Map, Tree, per_sample
from torchdeq.diagnostics.slopes import Slope, slope
from torchdeq.solver.maps import with_transpose


class Unfit(Exception):  # noqa: N818 - it ends an examination and reports no error
    """Why an examination cannot go on."""


class Subject:
    """f as it is examined: under the caller's autocast, and once that is known to be needed, with a copy of its
    argument and with the random numbers of the first call."""

    def __init__(self, f: Callable[[Tree], Tree], amp: AutocastState):
        self.f, self.amp = f, amp
        self.copies = False
        self.random: RandomState | None = None

    def __call__(self, tree: Tree) -> Tree:
        if self.copies:
            tree = optree.tree_map(torch.clone, tree)
        with self.amp.on(), self.random.again() if self.random else contextlib.nullcontext():
            return self.f(tree)


class Probe:
    """f at one state.

    Arguments:
        subject: f.
        layout: of the state.
        z: the state, (B, D).
        eps: the precision of the narrowest dtype that f computes in.

    Attributes:
        point: z as a leaf, once `track` has been called.
        fz: f(point), with its graph.
    """

    point: Tensor
    fz: Tensor

    def __init__(self, subject: Subject, layout: Layout, z: Tensor, eps: float):
        self.subject, self.layout, self.z, self.eps = subject, layout, z, eps
        self.generator = torch.Generator().manual_seed(0)
        # Changes of the state are measured by this, (B, leaves): its size, or that of f(z). Each leaf of each sample
        # counts alike, since a small one would be lost in the rounding of a large one.
        self.numbers = torch.tensor(layout.sizes).clamp_min(1).to(z)  # (leaves,), in each leaf of a sample
        block = torch.maximum(self.norms(z), self.norms(self.value(z)).nan_to_num())
        level = torch.linalg.vector_norm(block, dim=1, keepdim=True)
        share = torch.where(level > 0, level / self.numbers.sum().sqrt(), 1.0) * self.numbers.sqrt()
        # What is nearly zero beside its sample is measured by that: it may be the rounding of a difference.
        self.block = torch.maximum(block, torch.where(level > 0, eps ** (1 / 3) * share, share))
        self.level = torch.linalg.vector_norm(self.block, dim=1)  # (B,)

    @property
    def size(self) -> float:
        """What rounding is relative to in ⟨u, f(z)⟩ for a `cotangent` u: one for each leaf of each sample."""
        return float(self.block.numel())

    def norms(self, z: Tensor) -> Tensor:
        """Norms of the leaves of each sample of z, (B, leaves)."""
        return torch.stack([per_sample(part) for part in z.split(self.layout.sizes, dim=1)], dim=1)

    def spread(self, block: Tensor) -> Tensor:
        """Each number of (B, leaves) repeated for all entries of its leaf, (B, D)."""
        return block.repeat_interleave(torch.tensor(self.layout.sizes, device=block.device), dim=1)

    def flat(self, z: Tensor) -> Tensor:
        """f(z), on flat states."""
        return self.layout.ravel(self.subject(self.layout.unravel(z)))

    def value(self, z: Tensor) -> Tensor:
        """f(z) without a graph."""
        with torch.no_grad():
            return self.flat(z)

    def track(self) -> None:
        """Evaluate f with a graph."""
        self.point = self.z.clone().requires_grad_()
        with torch.enable_grad():
            self.fz = self.flat(self.point)

    def vjp(self, u: Tensor) -> Tensor | None:
        """Jᵀu; None if autograd knows no path from z to f(z)."""
        if not self.fz.requires_grad:
            return None
        return torch.autograd.grad(self.fz, self.point, u, retain_graph=True, allow_unused=True)[0]

    def vjp_or_zero(self, u: Tensor) -> Tensor:
        """Jᵀu."""
        w = self.vjp(u)
        return torch.zeros_like(u) if w is None else w

    def jvp(self) -> Map:
        """J, from the derivative of u -> Jᵀu; where there is none, from difference quotients."""

        def again(u: Tensor) -> Tensor:
            (w,) = torch.autograd.grad(self.fz, self.point, u, create_graph=True)
            return w

        try:
            _, product = with_transpose(again, self.noise())
            product(self.noise())
        except RuntimeError:
            return self.quotient
        return product

    def product_at(self, z: Tensor, u: Tensor, d: Tensor) -> float:
        """⟨Jᵀu, d⟩ at z."""
        with torch.enable_grad():
            z = z.clone().requires_grad_()
            (w,) = torch.autograd.grad(self.flat(z), z, u)
        return dot(w, d)

    def noise(self) -> Tensor:
        """Normal numbers, (B, D), always the same sequence."""
        return torch.randn(self.z.shape, generator=self.generator, dtype=torch.float64).to(self.z)

    def direction(self) -> Tensor:
        """A random change of the state, (B, D), for each leaf of each sample of about its own size."""
        return self.noise() * self.spread(self.block / self.numbers.sqrt())

    def beside(self) -> Tensor:
        """A state off z where f is finite; z itself if there is none to be had."""
        z = self.z + self.direction()
        try:
            return z if bool(self.value(z).isfinite().all()) else self.z
        except Exception:  # f need not be made for states off its way
            return self.z

    def quotient(self, v: Tensor) -> Tensor:
        """Jv as a difference quotient, for v of any size."""
        size = per_sample(v)
        h = (self.eps ** (1 / 3) * self.level / torch.where(size > 0, size, 1.0))[:, None]
        return (self.value(self.z + h * v) - self.value(self.z - h * v)) / (2 * h)

    def is_rounding(self, image: Tensor) -> bool:
        """Whether Jd, a quotient for some `direction` d, is nothing but rounding."""
        return bool(self._rounding(image).all())

    def _rounding(self, image: Tensor) -> Tensor:
        return self.norms(image) * self.eps ** (1 / 3) <= 4 * self.eps * self.block

    def cotangent(self, image: Tensor) -> Tensor:
        """In each leaf of each sample a vector along Jd, or anywhere if Jd is nothing but rounding there, as long as
        its state is large inversely: all count alike in ⟨u, Jd⟩."""
        u = torch.where(self.spread(self._rounding(image)), self.noise(), image)
        size = self.norms(u) * self.block
        return u / self.spread(torch.where(size > 0, size, 1.0))

    def slope(self, u: Tensor, d: Tensor) -> Slope:
        """Of ⟨u, f(z + t d)⟩ at t = 0."""
        return slope(lambda t: dot(u, self.value(self.z + t * d)), self.eps, 2 * self.size)

    def bend(self, u: Tensor, d: Tensor, e: Tensor) -> Slope:
        """Of ⟨Jᵀu, d⟩ at z + t e, at t = 0."""
        size = float((self.norms(self.vjp_or_zero(u)) * self.norms(d)).sum())
        return slope(lambda t: self.product_at(self.z + t * e, u, d), self.eps, 2 * size)


def dot(a: Tensor, b: Tensor) -> float:
    """⟨a, b⟩ over everything, in double precision."""
    return float((a.detach().double() * b.detach().double()).sum())


def told(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
