"""Operator splitting for monotone maps f(z) = σ(W z + c), in the two forms of Winston and Kolter (2020).

    y = prox_{αφ}(z − α F(z)),   F(z) = (I − W) z − c = z − (W z + c)
    forward–backward:     z⁺ = y
    Peaceman–Rachford:    z⁺ = z + 2 V (y − z),   V = (I + α (I − W))⁻¹

Source: arXiv 2006.08591, algorithms 1 and 2. Departure: Peaceman–Rachford is written for the iterate in front of σ,
z = V(s + α c), their z^{k+1/2}. Then F(z), which f itself needs, is all that a step needs, nothing is remembered, and
rounding in V moves no fixed point. The contraction factors per step, with m and L = ‖I − W‖, are
√(1 − 2αm + α²L²) and √(1 − 4αm / (1 + 2αm + α²L²)); they are least at α = m/L² and at α = 1/L. These are bounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchdeq._held import Held
from torchdeq._state import FlatMap, Map, layout_of, select_rows
from torchdeq.solution import Solution
from torchdeq.solver.base import Solver, SolverLoop
from torchdeq.solver.maps import Tally
from torchdeq.solver.monotone import MonotoneMap


@dataclass(frozen=True, kw_only=True, repr=False)
class Splitting(Solver):
    """What the two have in common: the step length, and that f is taken apart.

    A method supplies `length`, the α to take where none is given, and `step`.
    """

    alpha: float | None = None

    #: α is one for all samples.
    separate: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.alpha is None
            or (
                isinstance(self.alpha, int | float)
                and not isinstance(self.alpha, bool)
                and 0 < self.alpha < math.inf
            ),
            f"the step length alpha must be a number above 0, or None to be chosen, got {self.alpha!r}",
        )

    def length(self, f: MonotoneMap) -> Tensor:
        """The default of α, ()."""
        raise NotImplementedError(f"{type(self).__name__} must define length and step")

    def taken_apart(self, f: Map) -> MonotoneMap:
        """The monotone map inside what a solver sees of it.

        Raises:
            TypeError: there is none.
        """
        inner: Any = f
        while isinstance(inner, FlatMap | Held):
            inner = inner.f
        if isinstance(inner, MonotoneMap):
            return inner
        raise TypeError(
            f"{self!r} takes f(z) = σ(W z + c) apart, and f={f!r} is no MonotoneMap. Make one by "
            f"MonotoneLinear(n, m=0.1).map(x), or MonotoneMap(weight, bias, m); for another f use Multisecant(), for "
            f"the linear systems of its backward pass GMRES()."
        )

    def init(self, z: Tensor) -> None:
        """A splitting remembers nothing."""
        return None

    def _loop(self, f: Tally, z0: Tensor | None, record: Sequence[int]) -> Solution:
        monotone = self.taken_apart(f.f)
        assert z0 is not None  # only an affine map may have none
        shapes = [z0.shape] if f.layout is None else f.layout.shapes
        if len(shapes) != 1:
            raise ValueError(f"{monotone!r}: the state has {len(shapes)} tensors, and the map takes one.")
        monotone.check_state(shapes[0])
        large = float(monotone.lipschitz())
        if large == 0:
            raise ValueError(
                f"{self!r}: {monotone!r} has W = I in {monotone.weight.dtype}, so no m above 0 is right for it: f(z) = "
                f"σ(z + c) has no fixed point, or many. W needs (I − W) + (I − W)ᵀ ⪰ 2 m I, as MonotoneLinear makes it."
            )
        parts = Parts.of(f, monotone, z0, large)
        parts.option, parts.alpha = self.alpha, self.length(monotone) if self.alpha is None else self.alpha
        solution = self._iterate(parts, z0, None, record)
        f.calls = parts.calls
        return solution


@dataclass(frozen=True, kw_only=True, repr=False)
class ForwardBackward(Splitting):
    """Forward–backward splitting of a `MonotoneMap`: z⁺ = prox_{αφ}(z − α ((I − W) z − c)). One product with W a step.

    With α = 1 it is plain iteration. For a small m/L it is slow, by about 2 (L/m)² steps for a factor e, and
    `PeacemanRachford` needs L/m; but nothing is factorised, and nothing is as large as W. The default step depends on
    the `m` of the map.

    Arguments:
        alpha: the step length α. It converges for 0 < α < 2m/L², L = ‖I − W‖. None: m/L², where its contraction factor,
            √(1 − m²/L²), is least; L by 30 steps of the power method, once per solve.

    Raises:
        TypeError: when it is called with another f.
        ValueError: W = I, for which no m > 0 is right.

    Example:
        >>> import torch
        >>> from torchdeq import MonotoneMap
        >>> f = MonotoneMap(torch.tensor([[0.0, 3.0], [-3.0, 0.0]]), torch.tensor([[1.0, 5.0]]), m=1.0)
        >>> sol = ForwardBackward(tol=1e-4, max_iter=400)(f, torch.zeros(1, 2))
        >>> bool(sol.converged), [round(x, 3) for x in sol.z[0].tolist()]
        (True, [1.6, 0.2])
    """

    def length(self, f: MonotoneMap) -> Tensor:
        """m / L²."""
        large = f.lipschitz()
        return f.m / large / large

    def step(self, f: Map, z: Tensor, fz: Tensor, state: None) -> tuple[Tensor, None]:
        """prox_{αφ}(z − α F(z))."""
        assert isinstance(f, Parts)
        return f.forward_backward(z), None


@dataclass(frozen=True, kw_only=True, repr=False)
class PeacemanRachford(Splitting):
    """Peaceman–Rachford splitting of a `MonotoneMap`. It converges from anywhere, for any α, however large ‖W‖ is.

    A solve begins with one inversion of an n×n matrix, of the cost of some n products of a vector with W, and the map
    keeps the result for the backward pass of `IFT(solver=PeacemanRachford())`. A step is two evaluations: f, and a
    product with V, which counts as one; so give it a `max_iter` of twice the steps. `Multisecant` often needs fewer,
    and may not converge; this does. It does not use the `m` of the map, on which only its speed depends. Of a backward
    pass, the traces are bounds of the residual, and what is measured is the residual in the end.

    Arguments:
        alpha: the step length α > 0. None: 2/L, L = ‖I − W‖ by 30 steps of the power method, once per solve. The bound
            of the contraction factor is least at 1/L, √((L − m)/(L + m)) ≈ 1 − m/L, and 1 − 0.8 m/L at 2/L. But of 180
            maps with random A and B, those with L/m of 5 or more, where steps are many, needed 0.5 to 0.8 times as many
            evaluations with 2/L, and those with L/m near 1 up to 2.7 times as many: 19 instead of 7.

    Raises:
        TypeError: when it is called with another f.
        ValueError: W = I, for which no m > 0 is right.

    Example:
        >>> import torch
        >>> from torchdeq import MonotoneMap
        >>> f = MonotoneMap(torch.tensor([[0.0, 3.0], [-3.0, 0.0]]), torch.tensor([[1.0, 5.0]]), m=1.0)
        >>> sol = PeacemanRachford(tol=1e-4, max_iter=100)(f, torch.zeros(1, 2))
        >>> bool(sol.converged), [round(x, 3) for x in sol.z[0].tolist()]
        (True, [1.6, 0.2])
    """

    def length(self, f: MonotoneMap) -> Tensor:
        """2 / L."""
        return 2 / f.lipschitz()

    def step(self, f: Map, z: Tensor, fz: Tensor, state: None) -> tuple[Tensor, None]:
        """z + 2 V (prox_{αφ}(z − α F(z)) − z)."""
        assert isinstance(f, Parts)
        y = f.forward_backward(z)
        if f.calls >= f.limit - 1:  # a product with V would take the evaluation of what it leads to
            return y, None
        return z + 2 * f.resolve(y - z), None


def splits(solver: SolverLoop) -> bool:
    """Whether a solver is a splitting, or a chain with one in it.

    Example:
        >>> from torchdeq import Fallback, FixedPointIteration
        >>> splits(PeacemanRachford()), splits(Fallback(FixedPointIteration(), FixedPointIteration()))
        (True, False)
    """
    return isinstance(solver, Splitting) or any(splits(s) for s in getattr(solver, "solvers", ()))


class Parts(Tally):
    """W z + c with its calls counted, the other parts of the map, and what is known of it where it was called last."""

    monotone: MonotoneMap
    large: float = 1.0  # L = ‖I − W‖
    option: float | None = None  # the α that was asked for
    alpha: float | Tensor = 1.0
    inverse: Tensor | None = None  # V, (n, n)

    @classmethod
    def of(cls, f: Tally, monotone: MonotoneMap, z0: Tensor, large: float) -> Parts:
        """For the f of another tally, which is `monotone`, with a count that goes on from there."""
        layout = f.layout or layout_of(z0)
        parts = cls(FlatMap(monotone.before, layout), f.amp, f.limit, layout)
        parts.calls, parts.monotone, parts.large = f.calls, monotone, large
        return parts

    def __call__(self, z: Tensor) -> Tensor:
        self.before = super().__call__(z)  # (B, D)
        return self.prox(self.before, 1.0)

    def forward_backward(self, z: Tensor) -> Tensor:
        """prox_{αφ}(z − α F(z)) at the z of the last call, (B, D)."""
        return self.prox(z + self.alpha * (self.before - z), self.alpha)

    def prox(self, y: Tensor, alpha: float | Tensor) -> Tensor:
        """prox_{αφ}(y), (B, D). σ sees y in the shape of the state: each of its n units may be another function."""
        assert isinstance(self.f, FlatMap)
        return self.monotone.prox(y.reshape(self.f.layout.shapes[0]), alpha).reshape(y.shape)

    def resolution(self, z: Tensor) -> float:
        """See `Tally.resolution`. W z is rounded to some 0.1 ε L to 0.2 ε L of ‖z‖, which for a large L is coarser."""
        return super().resolution(z) * max(1.0, self.large / 20)

    def resolve(self, d: Tensor) -> Tensor:
        """V d, (B, D). Counts as an evaluation."""
        n = len(self.monotone.weight)
        if self.inverse is None:
            self.inverse = self.monotone.keep(("V", self.option, d.dtype), lambda: self._inverse(d))
        self.calls += 1
        return (d.reshape(-1, n) @ self.inverse.mT).reshape(d.shape)

    @torch.no_grad()
    def _inverse(self, like: Tensor) -> Tensor:
        eye = torch.eye(len(self.monotone.weight), dtype=like.dtype, device=like.device)
        return torch.linalg.inv(eye + self.alpha * (eye - self.monotone.weight.to(like.dtype)))

    def select(self, rows: Tensor) -> Parts:
        """See `Tally.select`."""
        few = Parts(select_rows(self.f, rows), self.amp, self.limit, self.layout)
        few.calls, few.monotone = self.calls, self.monotone
        few.large, few.option, few.alpha, few.inverse = self.large, self.option, self.alpha, self.inverse
        return few
