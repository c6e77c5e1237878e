"""What the loop knows of each sample: its best iterate, and whether it goes on.

After an evaluation the loop asks one question: did all come closer? Nearly always they did, and then nothing can have
happened but that some have arrived. Only otherwise is there something to sort out. What is sorted out is a function of
tensors, in which the host reads nothing.
"""

from __future__ import annotations

import copy
import ctypes
import math
import operator
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torchdeq.solver.base import SolverLoop

#: Residuals within so many units of rounding of a state's size may consist of rounding, if f is well conditioned …
_NEAR_ROUNDING = 100.0
#: … and no residual above this part of it does, whatever the dtype: eight units of bfloat16.
_NO_ROUNDING = 1 / 16
#: A norm below this may have lost squares that were too small for float32 …
TOO_SMALL = 1e-15
#: … and from this one on squares may come near to the largest float32, 3e38, of which the root is 1.8e19.
TOO_LARGE = 1e18
#: Of up to so many samples the host takes the norms as lists: two operations, where tensors need nine.
_FEW = 256
#: A residual that has fallen by this part of it differs from the one before by more than rounding.
_CLEARLY = 1e-3


class Iterate(NamedTuple):
    """An evaluated state, and what was measured of it. Where leaves count apart, sizes are (B, leaves)."""

    z: Tensor  # (B, D)
    size: Tensor  # (B,), ‖f(z) − z‖
    scale: Tensor  # (B,), what a relative residual divides by, ‖f(z)‖
    measure: Tensor  # (B,), what is compared with tol

    def where(self, mask: Tensor, other: Iterate) -> Iterate:
        """Per sample: this one where `mask` (B,), else `other`; or for all, where it is ()."""
        return Iterate(
            *(
                torch.where(mask[:, None] if mask.dim() and a.dim() > 1 else mask, a, b)
                for a, b in zip(self, other, strict=True)
            )
        )

    def rows(self, index: Tensor) -> Iterate:
        """Some of the samples."""
        return Iterate(*(t[index] for t in self))

    def put(self, index: Tensor, other: Iterate) -> Iterate:
        """With these samples taken from `other`, which has only them."""
        return Iterate(*(a.index_copy(0, index, b) for a, b in zip(self, other, strict=True)))


def relative(size: Tensor, scale: Tensor) -> Tensor:
    """size / scale, with 0 / 0 = 0, and finite (1e30) rather than infinite where only the scale is 0."""
    return size / torch.maximum(scale, 1e-30 * size).clamp_min(torch.finfo(scale.dtype).tiny)


class Samples(NamedTuple):
    """What is known of the samples of a solve, as tensors: all that decides who goes on, and what is returned."""

    best: Iterate  # the best of each
    single: Iterate  # the evaluation that was best for all of them at once
    now: Iterate  # the last one
    active: Tensor  # (B,), who takes part
    failed: Tensor  # (B,), who was not finite once too often
    stalled: Tensor  # (B,)
    coupled: Tensor  # (), whether a sample at rest was seen to move
    nstep: Tensor  # (B,), evaluations until each stopped
    strikes: Tensor  # (B,), its evaluations that were not finite
    struck: Tensor  # (B,), whose last one was not, and who may try again
    stale: Tensor  # (B,), evaluations since its best

    @classmethod
    def of(cls, start: Iterate) -> Samples:
        """Before the first evaluation."""
        count, device = start.z.shape[0], start.z.device
        zero = torch.zeros(count, dtype=torch.int64, device=device)
        none = torch.zeros(count, dtype=torch.bool, device=device)
        return cls(start, start, start, ~none, none, none, none.any(), zero, zero, none, zero)


class Sure(NamedTuple):
    """What the host is sure of, so that what then has no effect can be left out. A graph is sure of nothing."""

    finite: bool = False  # the last evaluation was, for all samples
    sound: bool = False  # nobody has failed or stalled
    active: bool = False  # everybody has taken part until now
    apart: bool = False  # no sample at rest was seen to move before


def sort_out(
    solver: SolverLoop,
    known: Samples,
    now: Iterate,
    k: Tensor | int,
    level: float,
    sure: Sure = Sure(),  # noqa: B008 - immutable
) -> Samples:
    """What is known after evaluation k. The host reads nothing.

    Arguments:
        solver: whose `tol`, `min_iter`, `patience` and so on hold.
        known: what was known before.
        now: what has been measured.
        k: the number of the evaluation, from 1; a number or a tensor ().
        level: relative residuals below it may be rounding.
        sure: what the host is sure of.
    """
    active, failed, stalled, strikes, struck = known[3:6] + known[8:10]
    nstep = torch.where(active, k, known.nstep)
    improves = now.measure < known.best.measure
    if not sure.finite:
        finite = now.measure < math.inf  # NaN is not
        improves = finite & improves
        if solver.recovers:
            strikes = strikes + (active & ~finite)
            hopeless = (strikes > solver.recovers) | (known.best.measure == math.inf) | ~active
            failed = failed | (~finite & hopeless)
            struck = active & ~finite & ~failed
        else:
            failed = failed | ~finite
    best = now.where(improves, known.best)
    better = _total(now, failed, sure) < _total(known.single, failed, sure)
    single = now.where(better, known.single)
    moves = now.measure > solver.tol
    reached = ~moves if sure.finite and sure.sound else (now.measure <= solver.tol) & ~failed
    coupled = known.coupled
    if not sure.active:
        # A sample that rests stays as it is, unless f couples it to others that move.
        rests = ~active if sure.sound else ~(active | failed | stalled)
        coupled = coupled | (rests & (now.measure > 1.5 * solver.tol)).any()
    stale = known.stale
    if solver.patience and solver.tol > 0 and not solver.return_final:
        stale = torch.where(active & ~improves, stale + 1, 0)
        if not (isinstance(k, int) and k < solver.patience):
            relatively = now.measure if solver.stop_mode == "rel" else leaf_max(relative(now.size, now.scale))
            stalled = stalled | ((stale >= solver.patience) & (relatively <= level) & active)
    sound = ~failed
    if not solver.return_final and not (isinstance(k, int) and k < solver.min_iter):
        # Recomputed, not accumulated: one that has risen above tol again takes part again. Once f is known to couple
        # samples, all take part until they have arrived together.
        able = ~(failed | stalled)
        rising = able & ~reached
        if not (sure.apart and sure.active):
            rising = torch.where(coupled & rising.any(), able, rising)
        sound = torch.where(k < solver.min_iter, sound, rising) if isinstance(k, Tensor) else rising
    return Samples(best, single, now, sound, failed, stalled, coupled, nstep, strikes, struck, stale)


class Glance(NamedTuple):
    """The numbers of an evaluation as the host has read them, one for each sample."""

    size: list[float]
    scale: list[float]
    measure: list[float]

    @classmethod
    def at(cls, now: Iterate) -> Glance:
        """Those of sizes (B,)."""
        size, scale = now.size.tolist(), now.scale.tolist()
        return cls(size, scale, size if now.measure is now.size else now.measure.tolist())

    @property
    def finite(self) -> bool:
        """Whether all of them are. Sums see what `min` and `max` overlook: NaN."""
        return math.isfinite(sum(self.size) + sum(self.scale))

    def above(self, least: float) -> bool:
        """Whether they are finite, and all of them above this."""
        return self.finite and min(self.size) > least and min(self.scale) > least

    def fell(self, before: Glance, rests: list[bool] | None) -> bool:
        """Whether every residual is clearly smaller than before, and its difference to that one safe in float32.

        Arguments:
            before: the evaluation before.
            rests: who rests, and so may be as before; None if nobody does.
        """
        lower = [(1 - _CLEARLY) * size for size in before.size]
        return self._all(before, rests, map(operator.lt, self.size, lower))

    def changed(self, before: Glance, rests: list[bool] | None) -> bool:
        """Whether the norm of every residual clearly is another, likewise. So the difference is not rounding."""
        change = map(abs, map(operator.sub, self.size, before.size))
        least = [_CLEARLY * size for size in self.size]
        return self._all(before, rests, map(operator.gt, change, least))

    def _all(self, before: Glance, rests: list[bool] | None, holds: Iterable[bool]) -> bool:
        if not self.finite or max(before.size) + max(self.size) >= TOO_LARGE:  # the difference is below that
            return False
        least = TOO_SMALL / _CLEARLY
        if rests is None:
            return min(self.size) > least and min(self.scale) > least and all(holds)
        return all(
            (rest and size == old) or (hold and size > least and scale > least)
            for size, scale, old, rest, hold in zip(
                self.size, self.scale, before.size, rests, holds, strict=True
            )
        )


class Watch:
    """The samples of one solve, and what the host knows of them.

    Arguments:
        solver: whose `tol`, `min_iter`, `patience` and so on hold.
        start: the start, not yet evaluated.
        resolution: ε of the narrowest dtype that f computes in.
    """

    def __init__(self, solver: SolverLoop, start: Iterate, resolution: float):
        self.solver = solver
        self.level = rounding_level(resolution)
        self.tol = (
            float(ctypes.c_float(solver.tol).value) if start.size.dtype == torch.float32 else solver.tol
        )
        self.struck: Tensor | None = None  # who was not finite just now and may try again, (B,)
        self.flag = StopFlag(late=start.z.device.type != "cpu")
        # What the host knows. On an accelerator that is the state one evaluation ago.
        self.count = len(start.z)
        self.all_active = self.count > 0
        self.all_sound = True  # nobody has failed or stalled
        self.coupled = self.any_stale = False
        self.done = self.count == 0
        self.knows = True  # whether it has heard of all that happened
        self.clean = False  # whether the last evaluation was the best of every sample
        self.glance: Glance | None = None  # at the last evaluation, if it may be asked for
        self.before: Glance | None = None  # and at the one before
        self._known = Samples.of(start)
        # The last evaluation, if all came closer; `_known` does not have it yet.
        self._now: Iterate | None = None
        # Who rests, and after how many evaluations, in lists as long as `_known` does not have it.
        self._rests: list[bool] | None = None
        self._nstep: list[int] | None = None
        self._mask: Tensor | None = None  # (B, 1), who does not rest

    @property
    def samples(self) -> Samples:
        """What is known up to the last evaluation."""
        if self._now is None and self._nstep is None:
            return self._known
        known = self._known
        if self._nstep is not None and self._rests is not None:
            device = known.active.device
            known = known._replace(
                active=torch.tensor(self._rests, device=device).logical_not_(),
                nstep=torch.tensor(self._nstep, device=device),
            )
            self._nstep = None
        if (now := self._now) is not None:
            known, self._now = known._replace(best=now, single=now, now=now), None
            if self.any_stale:
                known, self.any_stale = known._replace(stale=torch.zeros_like(known.stale)), False
        self._known = known
        return known

    @samples.setter
    def samples(self, known: Samples) -> None:
        self._known, self._now, self._rests, self._nstep, self._mask = known, None, None, None, None

    @property
    def now(self) -> Iterate:
        """The last evaluation."""
        return self._known.now if self._now is None else self._now

    @property
    def best(self) -> Iterate:
        """The best of each sample."""
        return self._known.best if self._now is None else self._now

    @property
    def active(self) -> Tensor:
        """Who takes part, (B,)."""
        return self._known.active if self._nstep is None else self.samples.active

    @property
    def failed(self) -> Tensor:
        """Who was not finite once too often, (B,)."""
        return self._known.failed

    @property
    def rests(self) -> list[bool] | None:
        """Who does not take part; None if everybody does."""
        if self.all_active:
            return None
        if self._rests is None:
            self._rests = self._known.active.logical_not().tolist()
        return self._rests

    @property
    def fell(self) -> bool:
        """Whether at the last evaluation every residual had become clearly smaller; see `Glance.fell`."""
        if self.glance is None or self.before is None:
            return False
        return self.glance.fell(self.before, self.rests)

    @property
    def changed(self) -> bool:
        """Whether its norm had clearly changed; see `Glance.changed`."""
        if self.glance is None or self.before is None:
            return False
        return self.glance.fell(self.before, self.rests) or self.glance.changed(self.before, self.rests)

    def see(self, now: Iterate, k: int, again: Callable[[], Iterate] | None = None) -> None:
        """Take note of evaluation k.

        Arguments:
            now: what was measured.
            k: its number.
            again: measures again, more carefully. None: what was measured is safe.
        """
        asks = k % self.solver.check_every == 0
        reads = asks and self.knows and not self.flag.late
        before, self.glance = self.glance, None
        self.before = before
        if reads and now.size.dim() == 1 and 0 < len(now.size) <= _FEW:
            self.glance = Glance.at(now)
            if again is not None and not self.glance.above(TOO_SMALL):
                now = again()
                self.glance = Glance.at(now)
        elif reads and again is not None and not _is_safe(now):
            now = again()
        self.clean = reads and not self.coupled and self._came_closer(now, before if self.clean else None)
        if self.clean:
            self._arrive(now, k)
            return
        sure = Sure()
        if reads:
            finite = not len(now.z) or float(now.measure.amax()) < math.inf
            sure = Sure(finite, self.all_sound, self.all_active, not self.coupled)
        self.samples = known = sort_out(self.solver, self.samples, now, k, self.level, sure)
        self.struck = known.struck if self.solver.recovers and not sure.finite else None
        self.all_active = self.all_sound = self.knows = False
        self.any_stale = True
        if not asks:
            return
        out = known.failed | known.stalled
        coupled = known.coupled.expand_as(out)
        answer = self.flag(torch.stack((known.active, out, known.struck, coupled)).sum(dim=1))
        if answer is None:
            return
        self.count, unsound, struck, moved = answer
        self.knows, self.done, self.coupled = True, self.count == 0, moved > 0
        if not self.flag.late:  # what is late may be out of date
            self.all_active, self.all_sound = self.count == len(out), unsound == 0
            self.struck = self.struck if struck else None

    def rows(self, index: Tensor) -> Watch:
        """The watch of some of the samples, as it stands."""
        parts: list[Any] = [
            t.rows(index) if isinstance(t, Iterate) else t[index] if t.dim() else t for t in self.samples
        ]
        part = copy.copy(self)
        part.samples = Samples(*parts)
        part.struck = None if self.struck is None else self.struck[index]
        part.all_active, part.count = True, len(index)
        part.glance = part.before = None
        return part

    def _came_closer(self, now: Iterate, before: Glance | None) -> bool:
        """Whether who takes part has come closer, and who does not stays where it was. NaN is neither.

        Arguments:
            now: the evaluation.
            before: the one before, if it was the best of every sample.
        """
        if self.glance is not None and (before is not None or self.all_active):
            best = self.best.measure.tolist() if before is None else before.measure
            if (rests := self.rests) is None:
                return all(map(operator.lt, self.glance.measure, best))
            return all(
                a == b if rest else a < b for a, b, rest in zip(self.glance.measure, best, rests, strict=True)
            )
        closer = now.measure < self.best.measure
        if not self.all_active:
            closer = torch.where(self.active, closer, now.measure == self.now.measure)
        return bool(closer.all())

    def _arrive(self, now: Iterate, k: int) -> None:
        """All have come closer. So nothing can have happened but that some have arrived."""
        solver = self.solver
        self.struck, self._now = None, now
        if k < solver.min_iter or solver.return_final:
            return
        if self.glance is not None:
            measure = self.glance.measure
            if min(measure) > self.tol:
                return
            rests = self.rests or [False] * len(measure)
            new = [
                i
                for i, (a, rest) in enumerate(zip(measure, rests, strict=True))
                if a <= self.tol and not rest
            ]
            if not new:
                return
            nstep = self._nstep or self._known.nstep.tolist()
            for i in new:
                rests[i], nstep[i] = True, k
            self._rests, self._nstep, self._mask = rests, nstep, None
            self.count = rests.count(False)
        elif not self.all_active or float(now.measure.amin()) <= self.tol:
            known = self.samples
            goes_on = known.active & (now.measure > solver.tol)
            self.samples = known._replace(nstep=torch.where(known.active, k, known.nstep), active=goes_on)
            self.count = int(goes_on.sum())
        self.done, self.all_active = self.count == 0, self.count == len(now.z)

    def hold(self, z_next: Tensor, z: Tensor) -> Tensor:
        """z_next for the samples that take part, and z, or the best state, for those at rest."""
        if self.all_active:
            return z_next
        if not self.all_sound:
            return held(self.samples, z_next, z)
        if self._mask is None:
            self._mask = self.active[:, None]
        return torch.where(self._mask, z_next, z)


def held(known: Samples, z_next: Tensor, z: Tensor) -> Tensor:
    """See `Watch.hold`. The host reads nothing."""
    at_rest = torch.where((known.failed | known.stalled)[:, None], known.best.z, z)
    return torch.where(known.active[:, None], z_next, at_rest)


def rounding_level(resolution: float) -> float:
    """The relative residual that may consist of rounding, for an f that computes with this ε."""
    return min(_NEAR_ROUNDING * resolution, _NO_ROUNDING)


def _is_safe(now: Iterate) -> bool:
    """Whether no square has overflowed or vanished in norms that were summed in their own dtype, float32."""
    if not now.size.numel():
        return True
    low, high = torch.stack((now.size, now.scale)).aminmax()
    return float(low) > TOO_SMALL and float(high) < math.inf


class StopFlag:
    """Numbers on the device, read by the host: at once, or one evaluation late and without waiting for the device.

    On an accelerator a read waits until all that is queued is done, and the queue then runs empty. Those of the
    evaluation before are there already. The price is one evaluation more, which changes nothing: every sample rests.

    Arguments:
        late: whether to read late.

    Example:
        >>> flag = StopFlag(late=True)
        >>> flag(torch.tensor([3])), flag(torch.tensor([0])), flag(torch.tensor([0]))
        (None, [3], [0])
    """

    def __init__(self, *, late: bool):
        self.late = late
        self.pending: tuple[Tensor, torch.Event | None] | None = None

    def __call__(self, flags: Tensor) -> list[int] | None:
        """The newest ones that are known; None if none are."""
        if not self.late:
            return list(flags.tolist())
        before, self.pending = self.pending, self._send(flags)
        if before is None:
            return None
        host, arrived = before
        if arrived is not None:
            arrived.synchronize()
        return list(host.tolist())

    @staticmethod
    def _send(flags: Tensor) -> tuple[Tensor, torch.Event | None]:
        if flags.device.type == "cpu":
            return flags, None
        host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
        host.copy_(flags, non_blocking=True)
        arrived = torch.Event(flags.device)
        arrived.record()
        return host, arrived


def leaf_max(size: Tensor) -> Tensor:
    """Per sample the largest over the leaves, (B,), of sizes (B,) or (B, leaves)."""
    return size if size.dim() == 1 else size.amax(dim=1)


def _total(iterate: Iterate, failed: Tensor, sure: Sure) -> Tensor:
    """The largest measure of the samples that have not failed, (): how good an evaluation is as a whole."""
    measure = iterate.measure if sure.finite and sure.sound else iterate.measure.masked_fill(failed, 0.0)
    return measure.amax()
