"""Broyden's methods on r(z) = f(z) − z: a Newton step with a Jacobian learned on the way.

    d = −H r,   z⁺ = z + α d,   s = z⁺ − z,   y = r⁺ − r,
    good:  H⁺ = H + (s − H y) sᵀH / (sᵀH y)         bad:  H⁺ = H + (s − H y) yᵀ / (yᵀy)         H₀ = −I.

Sources: Broyden (1965), doi 10.1090/S0025-5718-1965-0198670-6; in deep equilibrium models Bai, Kolter and Koltun
(2019), arXiv 1909.01377. Departures: H is kept in the compact form of `torchdeq.solver.secant`, in which the oldest
update is dropped at the memory limit (a product of updates can only be begun afresh, and overwriting one factor of
it diverges); the line search backtracks per sample and its trials teach H too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from torchdeq._state import Map, per_sample
from torchdeq.solver.secant import Entries, SecantSolver, SecantState, against

_DECREASE = 1e-4  # Armijo's constant: accept α when ‖r⁺‖ ≤ (1 − 1e-4 α) ‖r‖
_SMALLEST = 1 / 64  # … or when α has become this small


class Trial(NamedTuple):
    """The line search's trial."""

    d: Tensor  # (B, D), the direction
    alpha: Tensor  # (B,), the length tried


@dataclass(frozen=True, kw_only=True, repr=False)
class Broyden(SecantSolver):
    """Broyden's method. One evaluation per step; memory two states per step, at most 2m.

    Arguments:
        m: the largest number of updates in use, at least 1; beyond it the oldest is forgotten. None: all of
            them. Memory grows as it is used.
        ls: backtrack along the direction, per sample, until the residual decreases (Armijo). Every trial is
            one of the counted evaluations.
        kind: 'good' updates the Jacobian least, 'bad' its inverse. The bad one is near to Anderson's method and as
            good on contractions; the good one reaches further.

    Example:
        >>> import torch
        >>> a = torch.tensor([[0.5, 0.4], [-0.3, 0.9]], dtype=torch.float64)
        >>> sol = Broyden(tol=1e-12)(lambda z: z @ a.T + 1, torch.zeros(1, 2, dtype=torch.float64))
        >>> sol.nfe <= 2 * 2 + 1  # a linear problem of n unknowns ends within 2n steps (Gay, 1979)
        True
    """

    m: int | None = None
    ls: bool = False
    kind: Literal["good", "bad"] = "good"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.m is None or (isinstance(self.m, int) and self.m >= 1),
            f"the memory limit m must be None or an integer of at least 1, got {self.m!r}",
        )
        self.require(self.kind in ("good", "bad"), f"kind must be 'good' or 'bad', got {self.kind!r}")

    @property
    def depth(self) -> int:
        """m, or as many as there are steps."""
        return self.m or self.max_iter

    @property
    def keeps_y(self) -> bool:  # type: ignore[override]
        """V is S for the good method, and Y for the bad one."""
        return self.kind == "bad"

    @property
    def needs_s(self) -> bool:  # type: ignore[override]
        """The bad method multiplies with differences of r only."""
        return self.kind == "good"

    def entries(self, v: Tensor, u: Tensor, s: Tensor, y: Tensor, r: Tensor) -> Entries:
        """Of S Yᵀ + strictly lower part of S Sᵀ, which in the newest row is U s; or of the upper part of Y Yᵀ."""
        column, b = against(v, y, r)
        if self.kind == "bad":
            return Entries(torch.zeros_like(column), column, 1.0, b[:, 0])
        (row,) = against(u, s)
        return Entries(row, column, None, b[:, 0])

    def is_usual(self, z: Tensor, state: SecantState) -> bool:
        """With the line search, differences need not be those to the last evaluation."""
        return not self.ls and super().is_usual(z, state)

    def begin(self, z: Tensor) -> Trial | None:
        """The line search has not tried anything."""
        return Trial(torch.zeros_like(z), z.new_ones(z.shape[0])) if self.ls else None

    def step(self, f: Map, z: Tensor, fz: Tensor, state: SecantState) -> tuple[Tensor, SecantState]:
        """The quasi-Newton step; with `ls`, half the last one from where it began if that went too far."""
        z_next, new = super().step(f, z, fz, state)
        if not self.ls:
            return z_next, new
        last: Trial = state.more
        accepted = per_sample(new.r) <= (1 - _DECREASE * last.alpha) * state.size
        accepted = accepted | (last.alpha <= _SMALLEST)
        if (
            not isinstance(state.pairs, int) or state.pairs < 0
        ):  # before the first evaluation there is nothing to accept
            accepted = accepted | (state.pairs < 0)
        keep = accepted[:, None]
        trial = Trial(torch.where(keep, z_next - z, last.d), torch.where(accepted, 1.0, last.alpha / 2))
        base = torch.where(keep, z, state.z)
        new = new._replace(
            z=base,
            r=torch.where(keep, new.r, state.r),
            size=torch.where(accepted, new.size, state.size),
            more=trial,
        )
        return base + trial.alpha[:, None] * trial.d, new
