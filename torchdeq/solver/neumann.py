"""The Neumann series for (I − L) u = b, truncated where its residual is small enough.

    u_k = b + L b + … + L^{k−1} b,   b − (I − L) u_k = L^k b.

Source: Liao et al. (2018), arXiv 1803.06396 (Neumann-RBP). It is plain iteration u ← L u + b, written so that
the residual of every partial sum is known without a further product. Departures: a stop test per sample; from a
start u₀ the series is that of the residual b − (I − L) u₀; with a preconditioner P it is that of I − (I − L) P.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from torchdeq._state import per_sample
from torchdeq.solver.affine import AffineSolver


class NeumannState(NamedTuple):
    """The first term that has not been added, and the sum of those before it."""

    probe: Tensor  # (B, D), L^k r
    total: Tensor  # (B, D), of k terms


@dataclass(frozen=True, kw_only=True, repr=False)
class Neumann(AffineSolver):
    """The truncated Neumann series. One product per term; memory three states.

    It converges if the spectral radius of L is below 1, and then no faster than plain iteration. Where it diverges,
    the partial sum of smallest residual is returned, which may be none at all. Its place is with budgets of
    about six products, where Krylov methods have nothing to learn from; `max_iter=k + 1, tol=0` gives k terms,
    and one product measures them.

    Example:
        >>> import torch
        >>> from torchdeq import AffineMap
        >>> f = AffineMap(lambda u: 0.5 * u, torch.ones(1, 2))
        >>> Neumann(tol=0, max_iter=4).run(f).z  # 1 + 1/2 + 1/4
        tensor([[1.7500, 1.7500]])
    """

    def first(self, r: Tensor) -> NeumannState:
        """No term yet; the first is the residual."""
        return NeumannState(r, torch.zeros_like(r))

    def advance(self, ap: Tensor, state: NeumannState) -> tuple[NeumannState, Tensor]:
        """The term L^k r goes into the sum; the next one is the residual of the sum."""
        term = state.probe - ap
        return NeumannState(term, state.total + state.probe), per_sample(term)

    def correction(self, state: NeumannState, steps: Tensor) -> Tensor:
        """The sum."""
        return state.total
