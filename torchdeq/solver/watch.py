"""What the loop knows of each sample: its best iterate, and whether it goes on.

After an evaluation the loop asks the device one question: did anything happen? Nearly always nothing did. Who takes
part came closer without arriving, who does not stayed where it was. Only otherwise is there something to sort out.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torchdeq.solver.base import SolverLoop

#: Residuals within so many units of rounding of a state's size may consist of rounding, if f is well conditioned …
_NEAR_ROUNDING = 100.0
#: … and no residual above this part of it does, whatever the dtype: eight units of bfloat16.
_NO_ROUNDING = 1 / 16


class Iterate(NamedTuple):
    """An evaluated state, and what was measured of it. Where leaves count apart, sizes are (B, leaves)."""

    z: Tensor  # (B, D)
    size: Tensor  # (B,), ‖f(z) − z‖
    scale: Tensor  # (B,), what a relative residual divides by, ‖f(z)‖
    measure: Tensor  # (B,), what is compared with tol

    def where(self, mask: Tensor, other: Iterate) -> Iterate:
        """Per sample: this one where `mask` (B,), else `other`."""
        return Iterate(
            *(
                torch.where(mask if a.dim() == 1 else mask[:, None], a, b)
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


class Watch:
    """The samples of one solve.

    Arguments:
        solver: whose `tol`, `min_iter`, `patience` and so on hold.
        start: the start, not yet evaluated.
        resolution: ε of the narrowest dtype that f computes in.
    """

    def __init__(self, solver: SolverLoop, start: Iterate, resolution: float):
        self.solver = solver
        self.level = min(_NEAR_ROUNDING * resolution, _NO_ROUNDING)
        self.best = self.single = self.now = start  # best per sample; best evaluation of all samples at once
        self.stale: Tensor | float = 0.0  # evaluations since the best one, (B,)
        count, device = start.z.shape[0], start.z.device
        self.failed = torch.zeros(count, dtype=torch.bool, device=device)  # non-finite once too often
        self.stalled = self.failed
        self.active = ~self.failed
        self.coupled = self.failed.any()  # whether a sample at rest was seen to move
        self.nstep = torch.zeros(count, dtype=torch.int64, device=device)
        self.strikes = torch.zeros_like(self.nstep)  # non-finite evaluations
        self.struck: Tensor | None = None  # who was not finite just now and may try again, (B,)
        self.flag = StopFlag(late=device.type == "cuda")
        # What the host knows. On an accelerator that is the state one evaluation ago.
        self.all_active, self.count = count > 0, count
        self.done = count == 0
        self.knows = True  # whether it has heard of all that happened

    def see(self, now: Iterate, k: int) -> None:
        """Take note of evaluation k."""
        asks = k % self.solver.check_every == 0
        self.struck = None
        if asks and self.knows and not self.flag.late and self._quiet(now):
            self.best = self.single = self.now = now
            self.stale = 0.0
            return
        self._sort_out(now, k)
        self.all_active = self.knows = False
        if asks:
            answer = self.flag(self.active.sum(dim=0, keepdim=True))
            if answer is not None:
                (self.count,), self.knows = answer, True
                self.done = self.count == 0
                # What is late may be out of date.
                self.all_active = self.count == len(self.active) and not self.flag.late

    def rows(self, index: Tensor) -> Watch:
        """The watch of some of the samples, as it stands."""
        part = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Iterate):
                setattr(part, name, value.rows(index))
            elif isinstance(value, Tensor) and value.dim() == 1:
                setattr(part, name, value[index])
        part.all_active, part.count = True, len(index)
        return part

    def _quiet(self, now: Iterate) -> bool:
        quiet = (now.measure < self.best.measure) & (now.measure > self.solver.tol)
        if not self.all_active:
            quiet = torch.where(self.active, quiet, now.measure == self.now.measure)
        return bool(quiet.all())

    def _sort_out(self, now: Iterate, k: int) -> None:
        solver, count = self.solver, now.z.shape[0]
        self.nstep = self.nstep.masked_fill(self.active, k)
        finite = now.measure.isfinite()
        if solver.recovers:
            self.strikes = self.strikes + (self.active & ~finite)
            hopeless = (self.strikes > solver.recovers) | ~self.best.measure.isfinite() | ~self.active
            self.failed = self.failed | (~finite & hopeless)
            self.struck = self.active & ~finite & ~self.failed
        else:
            self.failed = self.failed | ~finite
        improves = finite & (now.measure < self.best.measure)
        self.best = now.where(improves, self.best)
        if count > 1:
            better = _total(now, self.failed) < _total(self.single, self.failed)
            if self.flag.late or solver.check_every > 1:
                self.single = now.where(better.expand(count), self.single)
            elif bool(better):
                self.single = now
        reached = (now.measure <= solver.tol) & ~self.failed
        # A sample that rests stays as it is, unless f couples it to others that move.
        rests = ~(self.active | self.failed | self.stalled)
        self.coupled = self.coupled | (rests & (now.measure > 1.5 * solver.tol)).any()
        if solver.patience and solver.tol > 0 and not solver.return_final:
            waits = self.active & ~improves
            self.stale = torch.where(waits, self.stale + 1, 0.0)
            rounding = leaf_max(relative(now.size, now.scale)) <= self.level
            self.stalled = self.stalled | ((self.stale >= solver.patience) & rounding & self.active)
        if solver.return_final or k < solver.min_iter:
            self.active = ~self.failed
        else:
            # Recomputed, not accumulated: one that has risen above tol again takes part again. Once f is known to
            # couple samples, all take part until they have arrived together.
            able = ~(self.failed | self.stalled)
            self.active = able & (~reached | (self.coupled & (able & ~reached).any()))
        self.now = now

    def hold(self, z_next: Tensor, z: Tensor) -> Tensor:
        """z_next for the samples that take part, and z, or the best state, for those at rest."""
        if self.all_active:
            return z_next
        at_rest = torch.where((self.failed | self.stalled)[:, None], self.best.z, z)
        return torch.where(self.active[:, None], z_next, at_rest)


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


def _total(iterate: Iterate, failed: Tensor) -> Tensor:
    """The largest measure of the samples that have not failed, (): how good an evaluation is as a whole."""
    return iterate.measure.masked_fill(failed, 0.0).amax()
