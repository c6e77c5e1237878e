"""The one yardstick: whoever solves, f is watched from outside.

A `Record` stands in for f. It measures the relative residual at every point where f is evaluated, per sample. A
solver's count for a tolerance is the number of the evaluation by which every sample had been seen within it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from problems import Map


class Enough(Exception):  # noqa: N818 - it ends a solve and reports no error
    """All samples have arrived, or the evaluations are used up. Ends a solver that would go on."""


class Record:
    """f with the residual ‖f(z) − z‖ / ‖f(z)‖ measured at each of its first `cap` evaluations.

    Arguments:
        f: the map; its first dimension counts samples.
        cap: evaluations beyond these are not looked at.
        goal: the residual at which a sample has arrived.
        scale: what to divide by instead of ‖f(z)‖.
        interrupt: raise `Enough` as soon as there is no more to see.
    """

    def __init__(self, f: Map, *, cap: int, goal: float, scale: float | None = None, interrupt: bool = False):
        self.f, self.cap, self.goal, self.scale, self.interrupt = f, cap, goal, scale, interrupt
        self.residuals: list[Tensor] = []  # (B,) each

    def __call__(self, z: Tensor) -> Tensor:
        fz = self.f(z)
        if len(self.residuals) < self.cap:
            self.residuals.append(self._residual(z.detach().to(fz.dtype), fz.detach()))
        if self.interrupt and self.enough:
            raise Enough
        return fz

    def _residual(self, z: Tensor, fz: Tensor) -> Tensor:
        scale = fz.flatten(1).norm(dim=1) if self.scale is None else self.scale
        return ((fz - z).flatten(1).norm(dim=1) / scale).nan_to_num(nan=math.inf)

    @property
    def enough(self) -> bool:
        return len(self.residuals) >= self.cap or bool(self.best[-1].amax() <= self.goal)

    @property
    def best(self) -> Tensor:
        """The smallest residual of each sample so far, (N, B)."""
        return torch.stack(self.residuals).cummin(dim=0).values

    def clear(self) -> None:
        """Forget what has been seen."""
        self.residuals = []


def curves_of(best: Sequence[Tensor]) -> Tensor:
    """Each sample's best residual after each evaluation, (N, B), from one such tensor for each run of some samples.

    A run that ended early keeps its last value.
    """
    length = max(map(len, best))
    return torch.cat([torch.cat([b, b[-1:].expand(length - len(b), -1)]) for b in best], dim=1)


def worst(curves: Tensor) -> list[float]:
    """The largest of them after each evaluation."""
    return curves.amax(dim=1).tolist()


def count(curve: Sequence[float], level: float) -> float:
    """Evaluations until the curve is at most `level`; inf if it never is."""
    return next((k for k, residual in enumerate(curve, start=1) if residual <= level), math.inf)
