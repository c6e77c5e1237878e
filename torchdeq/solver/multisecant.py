"""Anderson's type II steps where they lead down, Broyden's where they do not: the default solver of `DEQ`.

    z_{k+1} = z_k + r_k − Uᵀ γ,      with the γ of Anderson's type II for a sample that is calm,
                                     and of Broyden's good method for one that is not.

A sample is calm if its first Picard step brought the residual down to 0.7 of it, or if the residual has not grown for
twenty steps; and not if it has just grown.

On a contraction type II, which makes the predicted residual smallest, needs the fewest evaluations. Far from one its
predictions fail; the good method, which trusts old differences less, goes on to converge there. Both read their γ off
the same differences (see `torchdeq.solver.secant`), so changing from one to the other costs nothing and forgets
nothing.

Sources: Martínez (2000), doi 10.1016/S0377-0427(00)00434-9, for choosing between two updates at every step; Fang and
Saad (2009), doi 10.1002/nla.617, for the two as members of one family. The rule of choice is ours, found on the maps of
`benchmarks/solvers.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torchdeq.solver.anderson import default_lam
from torchdeq.solver.secant import Entries, SecantSolver, against

_CAUTION = 20  # steps without growth that make a sample calm
_STRONG = 0.7  # what the first Picard step leaves of the residual where f contracts strongly


@dataclass(frozen=True, kw_only=True, repr=False)
class Multisecant(SecantSolver):
    """Anderson's and Broyden's methods in one, chosen per sample and step. One evaluation per step.

    Arguments:
        m: the largest number of differences in use, at least 1; beyond it the oldest is forgotten. Memory is two states
            for each, as they are used, and room for some more: a solve that takes 12 evaluations holds about 32. None:
            all of them, which hard maps reward. 20 is nearly as good on the others.

    Example:
        Plain iteration diverges here.

        >>> import torch
        >>> sol = Multisecant(tol=1e-8)(lambda z: 3 * torch.cos(z), torch.zeros(1, 1, dtype=torch.float64))
        >>> bool(sol.converged), round(sol.z.item(), 4)
        (True, 1.1701)
    """

    m: int | None = None

    matrices: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.m is None or (isinstance(self.m, int) and self.m >= 1),
            f"the history length m must be None or an integer of at least 1, got {self.m!r}",
        )

    @property
    def depth(self) -> int:
        """m, or as many as there are steps."""
        return self.m or self.max_iter

    def entries(self, v: Tensor, u: Tensor, s: Tensor, y: Tensor, r: Tensor) -> Entries:
        """Of Y Yᵀ, and of S Yᵀ + strictly lower part of S Sᵀ; and both Y r and S r."""
        yy, yr = against(v, y, r)
        uy, ur, us = against(u, y, r, s)
        row, column = torch.cat((yy, us), dim=1), torch.cat((yy, uy - yy), dim=1)  # S = U − Y
        return Entries(row, column, None, (yr[:, 0], (ur - yr)[:, 0]))

    def begin(self, z: Tensor) -> Tensor:
        """Steps since the residual last grew, (B,); −1 before the first."""
        return torch.full_like(z[:, 0] if z.shape[1] else z.sum(1), -1.0)

    def notice(self, size: Tensor, before: Tensor, more: Tensor) -> Tensor:
        """One step more, unless the residual has grown; at once many, if the first has brought it down far."""
        strong = (more < 0) & (size <= _STRONG * before)
        return (more + 1).masked_fill(strong, _CAUTION).masked_fill(size > before, 0.0)

    def of_y(self, more: Tensor) -> Tensor:
        """Where a sample is calm."""
        return more >= _CAUTION

    def ridge(self, dtype: torch.dtype) -> tuple[float, ...]:
        """That of `model`, for Anderson's matrix."""
        return default_lam(dtype), 0.0

    def model(self, k: Tensor, b: tuple[Tensor, Tensor], more: Tensor) -> tuple[Tensor, Tensor]:
        """Anderson's for a sample that is calm, Broyden's for one that is not."""
        calm = self.of_y(more)
        gram, good = k.unbind(1)
        k = torch.where(calm[:, None, None], gram, good)
        k.diagonal(dim1=1, dim2=2).add_(calm[:, None], alpha=default_lam(b[0].dtype))
        return k, torch.where(calm[:, None], *b)
