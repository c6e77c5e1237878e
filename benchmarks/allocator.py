"""What PyTorch's allocator does while something runs: bytes over time, and at calls that are marked.

    marked = Marked(f)
    memory = allocations(lambda: Anderson()(marked, z0))
    memory.at_calls()   # bytes held when each call of f begins
    memory.peak         # the most at any time

Bytes count from the beginning of the run: what was there before is not seen, what is freed of it is negative. Run
something once before, so that what is made only once, such as a work space, does not count.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

CALL = "a call of f"
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes two lines to stderr for each run


class Marked:
    """f, whose calls the profiler can tell from what is around them."""

    def __init__(self, f: Callable[..., Any]):
        self.f = f

    def __call__(self, *args: Any) -> Any:
        with record_function(CALL):
            return self.f(*args)


@dataclass(frozen=True)
class Allocations:
    """Bytes allocated over time.

    Arguments:
        times: when something changed, in nanoseconds, increasing.
        bytes: how much there was from then on.
        spans: begin and end of what was marked, by name.
    """

    times: Sequence[int]
    bytes: Sequence[int]
    spans: dict[str, list[tuple[int, int]]]

    @property
    def peak(self) -> int:
        """The most at any time."""
        return max(self.bytes, default=0)

    @property
    def end(self) -> int:
        """What is left at the end."""
        return self.bytes[-1] if self.bytes else 0

    def at(self, when: int) -> int:
        """How much there was at a time."""
        before = bisect.bisect_left(self.times, when)
        return self.bytes[before - 1] if before else 0

    def after(self, when: int) -> int:
        """The most there was from a time on."""
        return self.between(when, self.times[-1]) if self.times else 0

    def between(self, begin: int, end: int) -> int:
        """The most there was from one time to another."""
        inside = self.bytes[bisect.bisect_left(self.times, begin) : bisect.bisect_right(self.times, end)]
        return max([self.at(begin), *inside])

    def at_calls(self, name: str = CALL) -> list[int]:
        """How much there was when each call began."""
        return [self.at(begin) for begin, _ in self.spans.get(name, [])]


def allocations(run: Callable[[], Any], *names: str) -> Allocations:
    """What the allocator does during `run`.

    Arguments:
        run: what to watch. Its result is kept until the end.
        names: of `record_function` spans that are wanted, besides the calls of a `Marked`.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
        result = run()
    del result
    events = watch.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    times, levels, now = [], [], 0
    for when, change in changes:
        now += change
        times.append(when)
        levels.append(now)
    spans: dict[str, list[tuple[int, int]]] = {}
    for e in sorted(events, key=lambda e: e.start_ns()):
        if e.name() == CALL or e.name() in names:
            spans.setdefault(e.name(), []).append((e.start_ns(), e.end_ns()))
    return Allocations(times, levels, spans)
