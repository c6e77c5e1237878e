"""What a solve has learned of (I − J)⁻¹, sample by sample.

A quasi-Newton method ends with H ≈ (I − J)⁻¹, the matrix of its steps z + H r. Each sample has the one of its own
solve, also if it came to rest before the others: what was known of it then is set aside, before its history fills with
differences that are zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import optree
import torch
from torch import Tensor

if TYPE_CHECKING:
    from torchdeq.solver.base import SolverLoop
    from torchdeq.solver.maps import Tally
    from torchdeq.solver.together import Whole
    from torchdeq.solver.watch import Watch


class Estimate(Protocol):
    """H of some samples, a named tuple of tensors that have a row for each of them."""

    def times(self, r: Tensor, *, transposed: bool) -> Tensor:
        """H r, or Hᵀ r, (B, D)."""
        ...

    def select(self, rows: Tensor) -> Self:
        """That of some of the samples."""
        ...


class Part(NamedTuple):
    """What is known of the samples `rows`, of all of them if that is None."""

    rows: Tensor | None
    estimate: Any  # an Estimate


class Learned:
    """H ≈ (I − J)⁻¹, to be multiplied with, (B, D) -> (B, D); the identity for a sample of which nothing is known.

    Arguments:
        parts: what is known of which samples. A later part overrides an earlier one.
        whole: how the batch is one sample, if it was solved so.

    Example:
        On a linear map, as many secant equations as there are unknowns make it the inverse.

        >>> from torchdeq import Anderson
        >>> a = torch.tensor([[0.5, 0.4], [-0.3, 0.9]], dtype=torch.float64)
        >>> solver, z0 = Anderson(m=2, type=1, tol=1e-12), torch.zeros(1, 2, dtype=torch.float64)
        >>> _, learned = solver.solve_and_learn(lambda z: z @ a.T + 1, z0)
        >>> g = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
        >>> u = learned.transposed(g)
        >>> torch.allclose(u, u @ a + g)  # u = Jᵀ u + g
        True
    """

    def __init__(self, parts: Sequence[Part] = (), whole: Whole | None = None):
        self.parts = list(parts)
        self.whole = whole
        self._at_rest: Tensor | None = None  # (B,), whose parts are there and up to date
        self._active: Tensor | None = None  # as they were when last looked at

    def __call__(self, r: Tensor) -> Tensor:
        """H r."""
        return self._times(r, False)

    def transposed(self, g: Tensor) -> Tensor:
        """Hᵀ g."""
        return self._times(g, True)

    def _times(self, r: Tensor, transposed: bool) -> Tensor:
        r = r if self.whole is None else self.whole.joined(r)
        out = r
        for rows, estimate in self.parts:
            if rows is None:
                out = estimate.times(r, transposed=transposed)
            else:
                out = out.index_copy(0, rows, estimate.times(r[rows], transposed=transposed))
        return out if self.whole is None else self.whole.divided(out)

    # What a solve does with it ------------------------------------------------------------------------

    def look(
        self, solver: SolverLoop, f: Tally, z: Tensor, fz: Tensor, state: Any, watch: Watch, over: bool
    ) -> None:
        """Set aside what is known of the samples that have just come to rest; of all others when the solve is over.

        Arguments:
            solver: whose `estimate` knows H.
            f, z, fz, state: as for `step`, which is not made yet.
            watch: who takes part.
            over: whether this was the last evaluation.
        """
        if not over and watch.active is self._active:
            return
        self._active = active = watch.active
        at_rest = torch.zeros_like(active) if self._at_rest is None else self._at_rest & ~active
        wanted = ~at_rest if over else ~(at_rest | active)
        self._at_rest = at_rest | ~active
        if over and not self.parts:  # nothing is copied
            self.parts.append(Part(None, solver.estimate(f, z, fz, state)))
            return
        rows = wanted.nonzero()[:, 0]
        if len(rows):
            few = optree.tree_map(
                lambda t: t[rows] if isinstance(t, Tensor) else t, state, namespace="torchdeq"
            )
            self.parts.append(Part(rows, solver.estimate(f, z[rows], fz[rows], few)))

    def take(self, few: Learned, rows: Tensor) -> None:
        """And what a solve of the samples `rows` alone has learned."""
        for inner, estimate in few.parts:
            self.parts.append(Part(rows if inner is None else rows[inner], estimate))

    def take_but(self, later: Learned, done: Tensor) -> None:
        """And what a solve from where this one ended has learned of the samples that were not `done` (B,) before."""
        everyone = torch.arange(len(done), device=done.device)
        for rows, estimate in later.parts:
            rows = everyone if rows is None else rows
            index = (~done[rows]).nonzero()[:, 0]
            if len(index):
                self.parts.append(Part(rows[index], estimate.select(index)))

    def become(self, joint: Learned, whole: Whole) -> None:
        """What the solve of the batch as one sample has learned instead."""
        self.parts, self.whole = joint.parts, whole
