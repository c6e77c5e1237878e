"""The caller's autocast state, kept for f and kept away from the solver's own sums.

Autocast would turn the Gram matrices and inner products of a solver into half precision, so solvers run
with it off; f must see what its author switched on, also when it is evaluated again in a backward pass.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch


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
