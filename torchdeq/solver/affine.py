"""What solvers of affine maps u = L u + b share: counting, freezing, and the true residual.

A Krylov method evaluates L at probe vectors of its own rather than f at its iterate, so it cannot be a `step`
of the general loop without wasting evaluations. It runs here instead, under the same rules: one count,
per-sample freezing, non-finite samples set aside, status per sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchdeq._state import Map, per_sample
from torchdeq.solution import Solution, Status
from torchdeq.solver.base import Iterate, Solver, relative
from torchdeq.solver.maps import AffineMap, Tally


@dataclass(frozen=True, kw_only=True, repr=False)
class AffineSolver(Solver):
    """A solver of u = L u + b, that is of (I − L) u = b. It accepts only an `AffineMap`.

    A method supplies `first` (its state from the residual b − (I − L) u₀), `advance` (from L at the last probe:
    the new state with the next probe and a residual estimate), and `correction` (the u − u₀ that the
    state stands for).

    The estimate that a Krylov recurrence gives is the residual only if L treats samples separately and
    rounding is small. So the last evaluation goes to the residual itself, b − (I − L) u, and this is what
    `Solution.residual` reports and what `converged` means. `max_iter` includes it.

    Example:
        The Neumann series u = b + L b + L² b + …, as a method whose probe is the last term.

        >>> from dataclasses import dataclass
        >>> from typing import NamedTuple
        >>> import torch
        >>> class Series(NamedTuple):
        ...     probe: torch.Tensor
        ...     total: torch.Tensor
        >>> @dataclass(frozen=True, kw_only=True, repr=False)
        ... class Neumann(AffineSolver):
        ...     def first(self, r):
        ...         return Series(r, r)
        ...     def advance(self, lp, state):
        ...         return Series(lp, state.total + lp), lp.norm(dim=1)
        ...     def correction(self, state, steps):
        ...         return state.total
        >>> sol = Neumann(tol=1e-5).run(AffineMap(lambda u: 0.5 * u, torch.ones(1, 2)))
        >>> sol.converged.tolist(), [round(x, 3) for x in sol.z[0].tolist()]
        ([True], [2.0, 2.0])
    """

    def first(self, r: Tensor) -> Any:
        """The state that has r (B, D) as residual; its field `probe` (B, D) is where L is wanted first."""
        raise NotImplementedError

    def advance(self, lp: Tensor, state: Any) -> tuple[Any, Tensor]:
        """The state after L(state.probe) = lp has become known, and the estimated residual norms (B,)."""
        raise NotImplementedError

    def correction(self, state: Any, steps: Tensor) -> Tensor:
        """What the first `steps` (B,) steps of each sample add to its start, (B, D)."""
        raise NotImplementedError

    def run(self, f: Map, z0: Tensor | None = None, *, record: Sequence[int] = ()) -> Solution:
        """See `Solver.run`. `z0=None` starts at 0, where the residual is b and costs nothing."""
        if not isinstance(f, AffineMap):
            raise TypeError(
                f"{self!r} solves affine maps u = L u + b only, and f={f!r} is not known to be one. Wrap "
                f"it as AffineMap(linear, shift), or use Anderson() or Broyden() for a general f."
            )
        if len(record):
            raise ValueError(
                f"{self!r} has no trajectory to sample: its iterates exist only at the end. Use "
                f"Anderson() or FixedPointIteration()."
            )
        return super().run(f, z0)

    def _loop(self, f: Tally, z0: Tensor | None, record: Sequence[int]) -> Solution:
        affine = f.f
        assert isinstance(affine, AffineMap)
        linear, b = Tally(affine.linear, f.amp), affine.shift
        u0 = torch.zeros_like(b) if z0 is None else z0
        r0 = b if z0 is None else b + linear(u0) - u0
        scale = per_sample(b)  # (B,), what 'rel' divides by
        limit = self.tol * scale if self.stop_mode == "rel" else torch.full_like(scale, self.tol)

        def measured(u: Tensor, size: Tensor) -> Iterate:
            return Iterate(u, size, scale, relative(size, scale) if self.stop_mode == "rel" else size)

        r, best = r0, measured(u0, per_sample(r0))
        sizes = [(best.size, scale)]
        failed = ~best.size.isfinite()
        steps = torch.zeros(b.shape[0], dtype=torch.int64, device=b.device)
        while True:
            # One Krylov space, from the residual r of u.
            start, size = best, best.size  # `size` is the estimate of each sample's residual
            active = (size > limit) & ~failed
            taken = torch.zeros_like(steps)
            state = self.first(r)
            while linear.calls < self.max_iter - 1 and bool(active.any()):
                state, estimate = self.advance(linear(state.probe), state)
                failed = failed | (active & ~estimate.isfinite())
                active = active & ~failed
                taken = taken + active
                size = torch.where(active, estimate, size)
                sizes.append((size, scale))
                active = active & (estimate > limit)
            if not bool(taken.any()):
                break
            steps = steps + taken
            u = start.z + self.correction(state, taken)
            r = b + linear(u) - u
            size = per_sample(r)
            best = measured(u, size).where(size <= start.size, start)  # never worse than where it began
            # What rounding has made of the estimate, another space mends; what coupling has, none does.
            short = (best.size > limit) & ~failed
            mends = short & (best.size < 0.1 * start.size)
            if not bool(mends.any()) or linear.calls > self.max_iter - 2:
                break
        short_of = Status.STALLED if linear.calls < self.max_iter else Status.MAX_ITER
        return self._solution(best, failed, steps, linear.calls, sizes, [], short_of)


def back_substitute(r: Tensor, b: Tensor, steps: Tensor) -> Tensor:
    """y with R y = b in the leading `steps` unknowns of each sample and y = 0 in the others.

    Arguments:
        r: upper triangular, (B, n, n). A pivot that vanishes to rounding gives y_i = 0.
        b: (B, n).
        steps: how many unknowns count, (B,).
    """
    used = torch.arange(b.shape[1], device=b.device) < steps[:, None]  # (B, n)
    pivots = r.diagonal(dim1=1, dim2=2).masked_fill(~used, 0.0)
    floor = torch.finfo(r.dtype).eps * pivots.abs().amax(dim=1, keepdim=True)
    used = used & (pivots.abs() > floor)
    r = torch.where(used[:, None, :] & used[:, :, None], r, 0.0)
    r = torch.diagonal_scatter(r, torch.where(used, pivots, 1.0), dim1=1, dim2=2)
    b = torch.where(used, b, 0.0)
    return torch.linalg.solve_triangular(r, b[..., None], upper=True)[..., 0]
