"""Reduced rank extrapolation, in cycles: m Picard steps and then the combination of them with the least residual.

    z_{i+1} = f(z_i),   r_i = z_{i+1} − z_i,   γ = argmin ‖r_m − Σ γ_i (r_i − r_{i−1})‖²,   z' = z_{m+1} − Σ γ_i r_i.

Sources: Eddy (1979) and Mešina (1977); Sidi (1991), doi 10.1016/0377-0427(91)90013-A, for the relation to Krylov
methods: on an affine map z' is f of the m-th iterate of GMRES. Departures: γ per sample; differences of unit norm
and a relative regularisation, as in `Anderson`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from torchdeq._state import Map, per_sample
from torchdeq.solver.anderson import regularised
from torchdeq.solver.base import Solver
from torchdeq.solver.secant import padding, solve_small


class RREState(NamedTuple):
    """The residuals of this cycle."""

    r: Tensor  # (B, m + 1, D), and zeros for alignment
    n: int  # how many of them


@dataclass(frozen=True, kw_only=True, repr=False)
class RRE(Solver):
    """Reduced rank extrapolation. Memory m + 1 states, about half of `Anderson`'s for the same m.

    Arguments:
        m: Picard steps before an extrapolation, at least 1. f must not be far from a contraction: an extrapolation
            is as good as the steps it is made of.

    Example:
        >>> import torch
        >>> from torchdeq import FixedPointIteration
        >>> f = lambda z: torch.cos(z + torch.tensor([0.0, 0.2, 0.4]))
        >>> z0 = torch.zeros(1, 3, dtype=torch.float64)
        >>> RRE(tol=1e-8)(f, z0).nfe < FixedPointIteration(tol=1e-8)(f, z0).nfe
        True
    """

    m: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            isinstance(self.m, int) and self.m >= 1,
            f"the number of steps m must be an integer of at least 1, got {self.m!r}. For plain iteration use "
            f"FixedPointIteration()",
        )

    def init(self, z: Tensor) -> RREState:
        """An empty cycle."""
        batch, size = z.shape
        return RREState(z.new_zeros(batch, self.m + 1, size + padding(size, z)), 0)

    def step(self, f: Map, z: Tensor, fz: Tensor, state: RREState) -> tuple[Tensor, RREState]:
        """A Picard step, or the extrapolation that ends the cycle."""
        d = z.shape[1]
        torch.sub(fz, z, out=state.r[:, state.n, :d])
        n = state.n + 1
        if n <= self.m:
            return fz.clone(), RREState(state.r, n)  # f may write its next output into the same memory
        r = state.r
        y = r[:, 1:] - r[:, :-1]  # (B, m, D)
        length = torch.stack([per_sample(row) for row in y.unbind(1)], dim=1)  # (B, m)
        valid = length > torch.finfo(z.dtype).tiny
        weight = torch.where(valid, 1 / length, 0.0)
        y = y * weight[:, :, None]
        eye = torch.eye(self.m, dtype=y.dtype, device=y.device)
        gram = torch.where(valid[:, :, None] & valid[:, None], torch.bmm(y, y.mT), eye)
        b = torch.bmm(r[:, -1:], y.mT)[:, 0]
        gamma = solve_small(regularised(gram), torch.where(valid, b, 0.0))
        weighted = torch.nn.functional.pad(gamma * weight, (0, padding(self.m, z)))[:, None, : self.m]
        return fz - torch.bmm(weighted, r[:, 1:])[:, 0, :d], RREState(r, 0)
