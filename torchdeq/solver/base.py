"""The one loop that every fixed-point solver runs in.

A solver proposes; the loop disposes. It alone evaluates f, counts, measures residuals per sample, keeps
the best iterate, freezes samples that are done, sets aside samples whose f is not finite, and stops.
A solver supplies only `init` and `step`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from torchdeq._method import Method
from torchdeq._replay import AutocastState
from torchdeq._state import FlatMap, Layout, Map, Tree, layout_of, per_sample
from torchdeq.solution import Solution, Status
from torchdeq.solver.maps import AffineMap, Tally


@dataclass(frozen=True, kw_only=True, repr=False)
class Solver(Method):
    """A method for z = f(z). Its fields are its hyperparameters; it prints as the call that made it.

    Calling a solver runs it: `Anderson(tol=1e-6)(f, z0)` returns a `Solution`. The call builds no
    autograd graph; for derivatives use `torchdeq.DEQ`.

    Arguments:
        max_iter: the largest number of evaluations of f, at least 1, counted alike for every solver. One
            more is made if the samples' best iterates come from different evaluations of a solve that
            did not converge: it measures them together, because an f that couples samples would make
            such a mixture worthless (in that case the best single iterate is returned).
        tol: a sample has converged when its residual is at most `tol`. 0 asks for all evaluations.
        stop_mode: the residual is ‖f(z) − z‖ for 'abs', ‖f(z) − z‖ / ‖f(z)‖ for 'rel'. Euclidean norms
            over everything that belongs to one sample.
        return_final: make all `max_iter` evaluations and return the last iterate rather than the best.

    Raises:
        ValueError: a hyperparameter is out of its range.

    Example:
        A method is a frozen dataclass with `init` and `step`; the loop does the rest.

        >>> from dataclasses import dataclass
        >>> import torch
        >>> @dataclass(frozen=True, kw_only=True, repr=False)
        ... class Halfway(Solver):
        ...     def init(self, z):
        ...         return None
        ...     def step(self, f, z, fz, state):
        ...         return (z + fz) / 2, state
        >>> sol = Halfway(tol=1e-4, max_iter=60)(torch.cos, torch.zeros(2, 3))
        >>> sol.converged.tolist(), Halfway(tol=1e-4)
        ([True, True], Halfway(tol=0.0001))
    """

    max_iter: int = 50
    tol: float = 1e-3
    stop_mode: Literal["abs", "rel"] = "abs"
    return_final: bool = False

    #: Whether residuals are measured at every evaluation (and the solve can stop early).
    monitors: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.require(
            isinstance(self.max_iter, int) and self.max_iter >= 1,
            f"max_iter counts evaluations of f and must be an integer of at least 1, got {self.max_iter!r}",
        )
        self.require(
            isinstance(self.tol, int | float) and self.tol >= 0,
            f"tol must be a number of at least 0, got {self.tol!r}",
        )
        self.require(
            self.stop_mode in ("abs", "rel"),
            f"stop_mode must be 'abs' or 'rel', got {self.stop_mode!r}",
        )

    # What a method supplies ---------------------------------------------------------------------------

    def init(self, z: Tensor) -> Any:
        """The state in which `step` keeps what it must remember; z has shape (B, D)."""
        raise NotImplementedError(f"{type(self).__name__} must define init and step, or run")

    def step(self, f: Map, z: Tensor, fz: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The next iterate (B, D) and state, from the iterate z and its image fz. No host reads."""
        raise NotImplementedError(f"{type(self).__name__} must define init and step, or run")

    # What the loop does -------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        f: Callable[[Tree], Tree] | AffineMap,
        z0: Tree,
        *,
        record: Sequence[int] = (),
        batch_dims: int = 1,
    ) -> Solution:
        """Solve z = f(z) from z0.

        Arguments:
            f: a map from the state to the state, or an `AffineMap`.
            z0: where to start: a tensor or a pytree of tensors; its first `batch_dims` dimensions count
                samples.
            record: evaluations k ≥ 1, increasing, after which the best state so far is kept in
                `Solution.states`. A solve that ends earlier gives its final state for the rest.
            batch_dims: see `torchdeq.DEQ`.

        Returns:
            A `Solution` with z in the structure of z0.
        """
        layout = layout_of(z0, batch_dims)
        start = layout.ravel(z0, source="z0")
        return unravel_solution(self.run(flatten_map(f, layout), start, record=record), layout)

    def run(self, f: Map, z0: Tensor | None = None, *, record: Sequence[int] = ()) -> Solution:
        """The loop, on a flat state (B, D).

        `z0=None` is for an `AffineMap` and starts at f(0), which is known without an evaluation.
        """
        record = checked_record(record, self.max_iter)
        amp = AutocastState.capture((start_of(f) if z0 is None else z0).device)
        tally = Tally(f, amp)
        with amp.off():
            solution = self._loop(tally, z0, record)
        if z0 is None or all(z is not z0 for z in (solution.z, *solution.states)):
            return solution
        # The start is the caller's memory; what is returned is not.
        own = z0.clone()
        return dataclasses.replace(
            solution,
            z=own if solution.z is z0 else solution.z,
            states=[own if z is z0 else z for z in solution.states],
        )

    def _loop(self, f: Tally, z0: Tensor | None, record: Sequence[int]) -> Solution:
        z = start_of(f.f) if z0 is None else z0
        count = z.shape[0]
        best = single = self._unknown(z)  # best per sample; best evaluation of all samples at once
        last = best.measure
        failed = torch.zeros(count, dtype=torch.bool, device=z.device)
        active = ~failed
        all_active = count > 0
        nstep = torch.zeros(count, dtype=torch.int64, device=z.device)
        sizes: list[tuple[Tensor, Tensor]] = []
        states: dict[int, Tensor] = {}
        state = self.init(z)

        for k in range(1, self.max_iter + 1):
            fz = f(z)
            if not self.monitors and k < self.max_iter:
                if k in record:
                    states[k] = z
                z, state = self.step(f, z, fz, state)
                continue
            now = self._measured(z, fz)
            sizes.append((now.size, now.scale))

            # Nearly always nothing happens: who takes part comes closer without arriving, who does not stays
            # where it is. Then this iterate is the best of every sample, and there is no more to keep.
            quiet = (now.measure < best.measure) & (now.measure > self.tol)
            if not all_active:
                quiet = torch.where(active, quiet, now.measure == last)
            last = now.measure
            if bool(quiet.all()):
                best = single = now
            else:
                nstep = nstep.masked_fill(active, k)
                finite = now.measure.isfinite()
                failed = failed | ~finite
                best = now.where(finite & (now.measure < best.measure), best)
                if count > 1 and bool(_total(now, failed) < _total(single, failed)):
                    single = now
                # Recomputed, not accumulated: if f couples samples, one that had converged can rise above tol
                # again as its neighbours move, and then it takes part again.
                converged = (now.measure <= self.tol) & ~failed
                active = ~failed if self.return_final else ~(converged | failed)
                all_active = bool(active.all())
            if k in record:
                states[k] = best.z
            if not all_active and not bool(active.any()):
                break
            if k < self.max_iter:
                z_next, state = self.step(f, z, fz, state)
                if all_active:
                    z = z_next
                else:
                    z = torch.where(active[:, None], z_next, torch.where(failed[:, None], best.z, z))

        nstep = nstep.masked_fill(active, k)
        finite = now.measure.isfinite()
        failed = failed | ~finite
        final = now
        if self.return_final:
            final = now.where(~failed, best)
        else:
            current = finite & ((now.measure <= best.measure) | ((now.measure <= self.tol) & ~failed))
            if not bool(current.all()):
                final = now.where(current, best)
                if count > 1:
                    final = self._measured_together(f, final, single.where(~failed, best), failed)
        return self._solution(final, failed, nstep, f.calls, sizes, [states.get(r) for r in record])

    def _unknown(self, z: Tensor) -> Iterate:
        worst = z.new_full((z.shape[0],), math.inf)
        return Iterate(z, worst, torch.ones_like(worst), worst)

    def _measured(self, z: Tensor, fz: Tensor) -> Iterate:
        """z with its residual, from fz = f(z)."""
        size, scale = per_sample(fz - z), per_sample(fz)
        return Iterate(z, size, scale, relative(size, scale) if self.stop_mode == "rel" else size)

    def _measured_together(self, f: Map, mixed: Iterate, single: Iterate, failed: Tensor) -> Iterate:
        """`mixed` if its residuals hold when f sees those states at once, otherwise `single`."""
        now = self._measured(mixed.z, f(mixed.z))
        # At the level of rounding the residual is noise; 1.5 tells noise from coupling.
        noise = 64 * torch.finfo(now.size.dtype).eps * (now.scale if self.stop_mode == "abs" else 1.0)
        holds = (now.measure <= 1.5 * mixed.measure + noise) | failed
        return now.where(~failed, mixed) if bool(holds.all()) else single

    def _solution(
        self,
        final: Iterate,
        failed: Tensor,
        nstep: Tensor,
        nfe: int,
        sizes: list[tuple[Tensor, Tensor]],
        states: list[Tensor | None],
        short_of: Status = Status.MAX_ITER,
    ) -> Solution:
        """The account of a solve, from its final iterate and the norms (residual, scale) along the way.

        `short_of` is the status of samples that are finite and above the tolerance.
        """
        met = (final.measure <= self.tol) & ~failed
        status = torch.full_like(nstep, short_of)
        status = status.masked_fill(met, Status.CONVERGED).masked_fill(failed, Status.NON_FINITE)
        trace = torch.stack([size for size, _ in sizes])
        scale = torch.stack([scale for _, scale in sizes])
        return Solution(
            z=final.z,
            abs_residual=_no_nan(final.size),
            rel_residual=_no_nan(relative(final.size, final.scale)),
            stop_mode=self.stop_mode,
            tol=self.tol,
            status=status,
            nstep=nstep,
            nfe=nfe,
            abs_trace=_no_nan(trace),
            rel_trace=_no_nan(relative(trace, scale)),
            states=[final.z if s is None else s for s in states],
        )


class Iterate(NamedTuple):
    """An evaluated state z (B, D), and per sample, each (B,):"""

    z: Tensor
    size: Tensor  # ‖f(z) − z‖
    scale: Tensor  # what a relative residual divides by, ‖f(z)‖
    measure: Tensor  # what is compared with tol

    def where(self, mask: Tensor, other: Iterate) -> Iterate:
        """Per sample: this one where `mask` (B,), else `other`."""
        return Iterate(
            torch.where(mask[:, None], self.z, other.z),
            *(torch.where(mask, a, b) for a, b in zip(self[1:], other[1:], strict=True)),
        )


def relative(size: Tensor, scale: Tensor) -> Tensor:
    """size / scale, with 0 / 0 = 0, and finite (1e30) rather than infinite where only the scale is 0."""
    return size / torch.maximum(scale, 1e-30 * size).clamp_min(torch.finfo(scale.dtype).tiny)


def _total(iterate: Iterate, failed: Tensor) -> Tensor:
    """The largest measure of the samples that have not failed, (): how good an evaluation is as a whole."""
    return iterate.measure.masked_fill(failed, 0.0).amax()


def _no_nan(size: Tensor) -> Tensor:
    return size.nan_to_num(nan=math.inf, posinf=math.inf)


def start_of(f: Map) -> Tensor:
    """f(0) of an affine map, free of charge."""
    if not isinstance(f, AffineMap):
        raise TypeError(f"a solve without z0 needs an AffineMap, whose f(0) is known; got {f!r}.")
    shift: Tensor = f.shift
    return shift


def flatten_map(f: Callable[[Tree], Tree] | AffineMap, layout: Layout) -> Map:
    """f on pytrees as a map (B, D) -> (B, D); an affine map stays one."""
    if isinstance(f, AffineMap):
        return AffineMap(FlatMap(f.linear, layout), layout.ravel(f.shift, source="AffineMap.shift"))
    return FlatMap(f, layout)


def unravel_solution(solution: Solution, layout: Layout) -> Solution:
    """The solution with z and states in the structure of the layout."""
    return dataclasses.replace(
        solution,
        z=layout.unravel(solution.z),
        states=[layout.unravel(s) for s in solution.states],
    )


def checked_record(record: Sequence[int], max_iter: int) -> tuple[int, ...]:
    """`record` as a tuple of increasing evaluation counts within 1 … max_iter."""
    steps = tuple(int(r) for r in record)
    if any(b <= a for a, b in itertools.pairwise(steps)) or any(not 1 <= s <= max_iter for s in steps):
        raise ValueError(
            f"the evaluations to sample must increase and lie within 1 … max_iter={max_iter}, got "
            f"{list(steps)}."
        )
    return steps
