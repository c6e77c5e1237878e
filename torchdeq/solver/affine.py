"""What solvers of affine maps u = L u + b share: counting, freezing, and the true residual.

A Krylov method evaluates L at probe vectors of its own rather than f at its iterate, so it cannot be a `step`
of the general loop without wasting evaluations. It runs here instead, under the same rules: one count,
per-sample freezing, non-finite samples set aside, status per sample.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from torchdeq._state import Layout, Map, per_sample
from torchdeq.solution import Solution, Status
from torchdeq.solver.base import Solver
from torchdeq.solver.maps import AffineMap, Operator, Tally
from torchdeq.solver.watch import Iterate, StopFlag, leaf_max, relative


@dataclass(frozen=True, kw_only=True, repr=False)
class AffineSolver(Solver):
    """A solver of u = L u + b, that is of (I − L) u = b. It accepts only an `AffineMap`.

    A method supplies `first` (its state from a unit residual), `advance` (from A at the last probe: the state
    with the next probe, and a residual estimate), and `correction` (what the state adds to the start). A is
    I − L. With a preconditioner P it is (I − L) P, and the correction is multiplied by P at the end; a method
    does not notice. The loop hands a method residuals of norm 1, so that no scale of b overflows its products.

    A sample stops where its estimate reaches the tolerance, where a product is not finite, and where the next probe
    is zero, by which a method says that it can do no more.

    The estimate that a Krylov recurrence gives is the residual only if L treats samples separately and
    rounding is small. So the last evaluation goes to the residual itself, b − (I − L) u, and this is what
    `Solution.residual` reports and what `converged` means. `max_iter` includes it. A relative residual is divided by
    ‖b‖.

    `min_iter` may be `max_iter`: a solve that is cut on purpose, as in `CG(max_iter=6, min_iter=6, tol=inf)` for five
    steps, makes them all unless a sample is solved to rounding. One that breaks down before, with a residual above
    √ε ‖b‖, is `STALLED`, whatever `tol` is. Other `min_iter`, `patience`, `compact` and `return_final` are for
    iterations of f and an error here.

    Example:
        Orthomin(1): u ← u + ω r with the ω that makes the residual smallest. The probe is the residual.

        >>> from dataclasses import dataclass
        >>> from typing import NamedTuple
        >>> import torch
        >>> class Descent(NamedTuple):
        ...     probe: torch.Tensor
        ...     u: torch.Tensor
        >>> @dataclass(frozen=True, kw_only=True, repr=False)
        ... class MinimalResidual(AffineSolver):
        ...     def first(self, r):
        ...         return Descent(r, torch.zeros_like(r))
        ...     def advance(self, ap, state):
        ...         r, u = state
        ...         omega = (dot(ap, r) / dot(ap, ap))[:, None]
        ...         return Descent(r - omega * ap, u + omega * r), (r - omega * ap).norm(dim=1)
        ...     def correction(self, state, steps):
        ...         return state.u
        >>> f = AffineMap(lambda u: u * torch.tensor([0.5, -0.5]), torch.ones(1, 2))
        >>> sol = MinimalResidual(tol=1e-5).run(f)
        >>> sol.converged.tolist(), [round(x, 3) for x in sol.z[0].tolist()]
        ([True], [2.0, 0.667])
    """

    #: Whether a sample's last iterate is its best, and `correction` still gives it after further steps at a zero
    #: probe. Otherwise the loop keeps each sample's best.
    monotone: ClassVar[bool] = False
    #: Whether the method allows a preconditioner.
    preconditionable: ClassVar[bool] = True
    #: Whether the method needs I − L to be symmetric.
    symmetric_only: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.min_iter in (1, self.max_iter),
            f"a solver of affine maps makes as many products as its residual needs, or with min_iter=max_iter all; got "
            f"min_iter={self.min_iter!r}. Leave it at 1, or set it to {self.max_iter!r}",
        )
        for name in ("patience", "compact", "return_final"):
            default = Solver.__dataclass_fields__[name].default
            self.require(
                getattr(self, name) == default,
                f"{name} is for iterations of f; a solver of affine maps has no use for it. Leave it at {default!r}",
            )

    def first(self, r: Tensor) -> Any:
        """The state that has r (B, D) as residual, of norm 1 or 0 per sample.

        A `NamedTuple`; its field `probe` (B, D) is where A is wanted first.
        """
        raise NotImplementedError

    def advance(self, ap: Tensor, state: Any) -> tuple[Any, Tensor]:
        """The state after A state.probe = ap (B, D) has become known, and the estimated residual norms (B,)."""
        raise NotImplementedError

    def correction(self, state: Any, steps: Tensor) -> Tensor:
        """What the first `steps` (B,) steps of each sample add to its start, (B, D)."""
        raise NotImplementedError

    def alive(self, state: Any) -> Tensor:
        """Which samples have a next probe that is not zero, (B,)."""
        return state.probe.any(dim=1)

    def product(self, operator: Operator, state: Any) -> Tensor:
        """A at the probe, (B, D). A method that needs products with Aᵀ makes them here."""
        return operator(state.probe)

    @property
    def cycle(self) -> int | None:
        """After how many steps a new space begins at the true residual; None: only to mend rounding."""
        return None

    def run(
        self,
        f: Map,
        z0: Tensor | None = None,
        *,
        record: Sequence[int] = (),
        layout: Layout | None = None,
        together: bool = True,
    ) -> Solution:
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
        return super().run(f, z0, layout=layout, together=together)

    def _loop(self, f: Tally, z0: Tensor | None, record: Sequence[int]) -> Solution:
        affine = f.f
        assert isinstance(affine, AffineMap)
        b = affine.shift
        linear = Tally(affine.linear, f.amp)
        linear.calls = f.calls
        scale = self._norms(b, f)
        if scale.dim() == 2:  # a leaf without a right-hand side is measured against that of the whole sample
            scale = torch.where(scale > 0, scale, per_sample(b)[:, None])
        # The norm of a sample's residual is at least that of each leaf; so this is enough for every leaf.
        least = scale if scale.dim() == 1 else scale.amin(dim=1)  # (B,)
        limit = self.tol * least if self.stop_mode == "rel" else torch.full_like(least, self.tol)
        cut, eps = self.min_iter == self.max_iter > 1, torch.finfo(b.dtype).eps
        if cut:  # to where b itself is rounded
            limit = torch.minimum(limit, 10 * eps * least)
        found = self.solve(linear, b, z0, limit=limit, budget=f.limit, preconditioner=affine.preconditioner)
        f.calls = linear.calls
        u = f.rounded(found.u)  # L sees it so, and so it is returned; rounding it adds to the residual
        size = self._norms(found.r + (found.u - u), f)
        measure = leaf_max(relative(size, scale) if self.stop_mode == "rel" else size)
        solution = self._solution(
            Iterate(u, size, scale, measure),
            found.failed,
            found.steps,
            f.calls,
            [(estimate, least) for estimate in found.trace],
            [],
            stalled=~found.unfinished,
        )
        if not cut:
            return solution
        # Rounding leaves up to about ε κ ‖b‖, κ the condition of A. Below √ε that is a solution, for κ up to 1/√ε.
        broken = ~found.unfinished & (found.size > eps**0.5 * least) & solution.converged
        return dataclasses.replace(solution, status=solution.status.masked_fill(broken, Status.STALLED))

    def _norms(self, r: Tensor, f: Tally) -> Tensor:
        """Norms of r (B, D) per sample, (B,), or with norm='max' per leaf, (B, leaves)."""
        if not self._by_leaf(f):
            return per_sample(r)
        return torch.stack([per_sample(leaf) for leaf in r.split(f.sizes, dim=1)], dim=1)

    def solve(
        self,
        linear: Tally,
        b: Tensor,
        u0: Tensor | None = None,
        *,
        limit: Tensor,
        budget: int,
        preconditioner: Map | None = None,
        check: bool = True,
    ) -> Krylov:
        """Solve (I − L) u = b inside another method, under its limits and its count.

        Arguments:
            linear: L, (B, D) -> (B, D), with its calls counted.
            b: (B, D).
            u0: where to start, (B, D). None: at 0, which costs no product.
            limit: (B,), the absolute residual norm that is enough for each sample. A sample whose limit is inf
                takes no step and is carried along at 0.
            budget: what `linear.calls` may rise to.
            preconditioner: P, near (I − L)⁻¹; see `AffineMap`.
            check: whether the last product measures the residual. Without it `Krylov.size` is the method's
                estimate, and no product is spent on a residual unless a new space begins there.

        Raises:
            ValueError: the method allows no preconditioner, and there is one.
        """
        self.require(
            preconditioner is None or self.preconditionable,
            "this method allows no preconditioner, which would spoil the structure of I − L that it lives on. "
            "Leave AffineMap.preconditioner at None, or use GMRES() or BiCGSTAB()",
        )
        operator = Operator(linear, preconditioner)
        u, r = (torch.zeros_like(b), b) if u0 is None else (u0, b + linear(u0) - u0)
        size = per_sample(r)
        failed = ~size.isfinite()
        steps = torch.zeros(b.shape[0], dtype=torch.int64, device=b.device)
        trace = [size]
        active = (size > limit) & ~failed
        while True:
            space = self._space(operator, r, size, active, limit, budget - check)
            trace.extend(space.trace)
            failed = failed | space.failed
            steps = steps + space.steps
            unfinished = space.active
            if not bool(space.steps.any()):
                break
            # A new space makes sense from a measured residual only, and if a product is left to search it.
            room = linear.calls <= budget - 2
            if not check and not (room and bool(unfinished.any())):
                return Krylov(u + space.correction, r, space.size, failed, unfinished, steps, trace)
            u_new = u + space.correction
            r_new = b + linear(u_new) - u_new
            new = per_sample(r_new)
            failed = failed | ~new.isfinite()
            # Never worse than where it began. A sample that took no step is where it was, so what is measured there now
            # is its residual: if L couples samples, that of one without a right-hand side is no longer 0.
            better = (new <= size) | (space.steps == 0)
            start = size
            u, r = torch.where(better[:, None], u_new, u), torch.where(better[:, None], r_new, r)
            size = torch.where(better, new, size)
            short = (size > limit) & ~failed
            # What rounding has made of the estimate, another space mends; what coupling has, none does.
            mends = short & (space.size <= limit) & (size < 0.1 * start)
            unfinished = (short & unfinished) | mends
            # A cycle that gains nothing would gain nothing again.
            active = mends | (unfinished & (size < 0.999 * start))
            if not room:
                break
            if not bool(active.any()):
                unfinished = active
                break
        return Krylov(u, r, size, failed, unfinished, steps, trace)

    def _space(
        self, operator: Operator, r: Tensor, start: Tensor, active: Tensor, limit: Tensor, until: int
    ) -> _Space:
        """One Krylov space, from residuals r (B, D) of norms `start` (B,), for the samples that are `active`."""
        unit = torch.where(active[:, None], r / start[:, None], 0.0)
        failed = torch.zeros_like(active)
        steps = torch.zeros_like(active, dtype=torch.int64)
        size = least = start
        best = torch.zeros_like(r)
        trace: list[Tensor] = []
        search = getattr(operator.linear.f, "search", None)  # products that are made in a compiled graph
        if search is not None and operator.preconditioner is None:
            found, trace = search(self, operator.linear, unit, start, active, limit, until)
            best = torch.where((found.steps > 0)[:, None], self.correction(found.state, found.steps), 0.0)
            return _Space(best * start[:, None], found.size, found.failed, found.active, found.steps, trace)
        state = self.first(unit)
        calls = operator.linear
        flag = StopFlag(late=r.device.type != "cpu")
        looks = not flag.late and self.check_every == 1 and self.monotone
        enough = limit / start  # of a unit residual
        count, more = self._count(flag, active), 0
        while calls.calls < until and len(trace) != self.cycle and count:
            if (
                count < r.shape[0] or flag.late or self.check_every > 1
            ):  # who has stopped is carried along at 0
                state = state._replace(probe=torch.where(active[:, None], state.probe, 0.0))
            state, estimate = self.advance(self.product(operator, state), state)
            if looks and count == r.shape[0] and bool(((estimate > enough) & self.alive(state)).all()):
                more += 1  # all go on
                size = estimate * start
                trace.append(size)
                continue
            estimate = estimate * start
            finite = estimate.isfinite()
            failed = failed | (active & ~finite)
            active = active & finite
            steps = steps + active
            size = torch.where(active, estimate, size)
            trace.append(size)
            if not self.monotone:
                better = active & (estimate < least)
                best = torch.where(better[:, None], self.correction(state, steps), best)
                least = torch.where(better, estimate, least)
            active = active & (estimate > limit) & self.alive(state)
            if len(trace) % self.check_every == 0:
                count = self._count(flag, active)
        steps = steps + more
        if self.monotone and trace:
            best, least = self.correction(state, steps), size
        correction = operator.preconditioned(torch.where((steps > 0)[:, None], best * start[:, None], 0.0))
        return _Space(correction, least, failed, active, steps, trace)

    def _count(self, flag: StopFlag, active: Tensor) -> int:
        """How many samples take part, as far as the host knows."""
        answer = flag(active.sum(dim=0, keepdim=True))
        return len(active) if answer is None else answer[0]


class Krylov(NamedTuple):
    """What `AffineSolver.solve` has found, per sample."""

    u: Tensor  # (B, D)
    r: Tensor  # (B, D), b − (I − L) u; that of the start if the last one was not measured
    size: Tensor  # (B,), the norm of the last residual, or its estimate if it was not measured
    failed: Tensor  # (B,), bool: a product was not finite; u is what was known before
    unfinished: Tensor  # (B,), bool: the budget ended it, above its limit
    steps: Tensor  # (B,), int64: products until it stopped
    trace: list[Tensor]  # (B,) each: the residual norm at the start, and its estimate after each product


class _Space(NamedTuple):
    """One Krylov space: what it adds to the start, and how the samples ended."""

    correction: Tensor  # (B, D)
    size: Tensor  # (B,), the estimated residual norm with it
    failed: Tensor  # (B,)
    active: Tensor  # (B,), would go on
    steps: Tensor  # (B,)
    trace: list[Tensor]


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product per sample of two (B, D) tensors, (B,), in their dtype; summed in float64.

    Not a batched matrix product: its rounding would depend on the size of the batch.
    """
    return (a * b).sum(dim=1, dtype=torch.float64).to(a.dtype)


def ratio(a: Tensor, b: Tensor, where: Tensor) -> Tensor:
    """a / b where it is wanted and 0 elsewhere, all (B,)."""
    return torch.where(where, a, 0.0) / torch.where(where, b, 1.0)
