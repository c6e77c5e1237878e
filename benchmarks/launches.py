"""What an action asks of the device: kernels that are launched, and waits of the host for it.

On a CUDA device both are calls of the CUDA runtime, as the profiler records them. On the CPU, where nothing is launched
and nobody waits, an ATen operation that computes counts as a launch, and one that hands a value to Python as a wait.
Operations within other operations count, and those that only look at memory in another way, or allocate it, do not.
What a compiler has generated is not seen on the CPU.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

LAUNCHES = {
    "cudaLaunchKernel",
    "cudaLaunchKernelExC",
    "cudaLaunchCooperativeKernel",
    "cuLaunchKernel",
    "cuLaunchKernelEx",
    "cudaGraphLaunch",
}
#: The host waits until all that was queued is done.
WAITS = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpy"}
#: It waits for one point in the queue, which is there already if the read is late.
LATE = {"cudaEventSynchronize"}
#: An operation on the CPU may look at a number by itself; only what Python calls is a read.
READS = {"aten::item", "aten::is_nonzero", "aten::_local_scalar_dense"}
SPAN = "what is counted"


class Counts(NamedTuple):
    """Of one action."""

    launches: int
    waits: int  # which let the queue run empty
    late: int  # waits for what was queued earlier

    def per(self, less: Counts, steps: int) -> float:
        """Launches for each of so many steps, which this has more of than `less`."""
        return (self.launches - less.launches) / steps


def count(action: Callable[[], Any], device: torch.device) -> Counts:
    """What the action asks of the device, after it was run once unseen."""
    action()
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.synchronize(device)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=kinds) as watch, record_function(SPAN):
        action()
    events = watch.profiler.kineto_results.events()
    ((begin, end),) = [(e.start_ns(), e.end_ns()) for e in events if e.name() == SPAN and _on_host(e)]
    inside = [e for e in events if begin <= e.start_ns() <= end]
    names = [e.name() for e in inside]
    if on_cuda:
        return Counts(*(sum(name in kind for name in names) for kind in (LAUNCHES, WAITS, LATE)))
    operations = [(e.start_ns(), e.end_ns(), e.name()) for e in inside if e.name().startswith("aten::")]
    launches = sum(1 for _ in _innermost(operations))
    return Counts(launches, sum(name in READS for name in _outermost(operations)), 0)


def _on_host(event: Any) -> bool:
    return bool(event.device_type() == torch.autograd.DeviceType.CPU)


def _innermost(operations: Iterable[tuple[int, int, str]]) -> Iterator[str]:
    """The names of those that compute and have no other such within them."""
    spans = sorted((begin, -end, name) for begin, end, name in operations if _computes(name))
    for (_, end, name), (begin, _, _) in itertools.pairwise([*spans, (math.inf, 0, "")]):
        if begin >= -end:
            yield name


def _outermost(operations: Iterable[tuple[int, int, str]]) -> Iterator[str]:
    """The names of those that are not within another: what Python has called."""
    until = -1
    for begin, end, name in sorted(operations, key=lambda o: (o[0], -o[1])):
        if begin >= until:
            until = end
            yield name


@functools.cache
def _computes(name: str) -> bool:
    """Whether an ATen operation works on numbers, rather than on where they are."""
    packet = getattr(torch.ops.aten, name.removeprefix("aten::"), None)
    if packet is None or "empty" in name or "resize" in name or name in READS:
        return False
    returns = [r.alias_info for o in packet.overloads() for r in getattr(packet, o)._schema.returns]
    return not any(alias is not None and not alias.is_write for alias in returns)
