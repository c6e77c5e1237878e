"""What a second evaluation of f must find again: the caller's autocast and random states.

Autocast is also kept away from the solver's own sums, which it would turn into half precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AutocastState:
    """The autocast state of one device type, to be entered as often as wanted."""

    device_type: str
    enabled: bool
    dtype: torch.dtype
    cache_enabled: bool

    @classmethod
    def capture(cls, device: torch.device) -> AutocastState:
        """The state that is in force now, for the type of `device`."""
        kind = device.type
        if not torch.amp.is_autocast_available(kind):
            return cls(kind, False, torch.float32, False)
        return cls(
            kind,
            torch.is_autocast_enabled(kind),
            torch.get_autocast_dtype(kind),
            torch.is_autocast_cache_enabled(),
        )

    def on(self) -> AbstractContextManager[object]:
        """A context in which this state is in force again."""
        if self.enabled == self._enabled_now():
            return nullcontext()
        return torch.autocast(
            self.device_type,
            dtype=self.dtype,
            enabled=self.enabled,
            cache_enabled=self.cache_enabled,
        )

    def off(self) -> AbstractContextManager[object]:
        """A context without autocast; free if there was none."""
        if not self.enabled:
            return nullcontext()
        return torch.autocast(self.device_type, enabled=False)

    def _enabled_now(self) -> bool:
        return torch.amp.is_autocast_available(self.device_type) and torch.is_autocast_enabled(
            self.device_type
        )


@dataclass(frozen=True)
class RandomState:
    """The state of the random generators of the CPU and of one device."""

    device: torch.device
    cpu: Tensor
    own: Tensor | None

    @classmethod
    def capture(cls, device: torch.device) -> RandomState:
        """The states now."""
        module = None if device.type == "cpu" else torch.get_device_module(device)
        return cls(device, torch.get_rng_state(), module.get_rng_state(device) if module else None)

    def is_now(self) -> bool:
        """Whether the generators are in these states."""
        now = RandomState.capture(self.device)
        own = self.own is None or now.own is None or torch.equal(now.own, self.own)
        return own and torch.equal(now.cpu, self.cpu)

    @contextmanager
    def again(self) -> Iterator[None]:
        """A context that begins with these states and leaves the generators as it found them."""
        devices = [] if self.own is None else [self.device]
        with torch.random.fork_rng(devices, device_type=self.device.type if devices else "cuda"):
            torch.set_rng_state(self.cpu)
            if self.own is not None:
                torch.get_device_module(self.device).set_rng_state(self.own, self.device)
            yield
