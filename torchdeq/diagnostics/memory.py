"""How much autograd holds in order to differentiate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from types import TracebackType
from typing import Self

import torch
from torch import Tensor


class SavedBytes:
    """Counts the bytes of the storages that autograd saves while the context is open.

    A storage that is saved twice, or through several views, counts once; it counts until the last graph that
    saved it is freed. What a checkpoint evaluates again in a backward pass has hooks of its own and does not count.
    torch.func allows no such hooks: what uses it, as `implicit_minimum` does, is a RuntimeError inside the context.

    Arguments:
        ignore: tensors whose storages do not count, such as parameters: they exist anyway.

    Attributes:
        now: bytes held at present.
        peak: the most there were.

    Example:
        >>> x = torch.ones(256, requires_grad=True)
        >>> with SavedBytes() as saved:
        ...     y = x.exp().sin().sum()  # exp saves its result, which sin saves as its argument
        ...     held = saved.now
        ...     y.backward()
        >>> held, saved.now, saved.peak
        (1024, 0, 1024)
    """

    def __init__(self, ignore: Iterable[Tensor] = ()):
        self.now = 0
        self.peak = 0
        self._ignored = {t.untyped_storage().data_ptr() for t in ignore}
        self._uses: Counter[int] = Counter()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor)

    def _pack(self, tensor: Tensor) -> _Held:
        return _Held(tensor, self)

    def _use(self, storage: torch.UntypedStorage, change: int) -> None:
        key = storage.data_ptr()
        if key in self._ignored:
            return
        before = self._uses[key] > 0
        self._uses[key] += change
        after = self._uses[key] > 0
        self.now += (after - before) * storage.nbytes()
        self.peak = max(self.peak, self.now)

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)


class _Held:
    """A saved tensor, which tells the count when the graph lets go of it."""

    def __init__(self, tensor: Tensor, count: SavedBytes):
        # Detached: a saved result knows the node that saves it, and that cycle would never be freed.
        self.tensor, self.count = tensor.detach(), count
        count._use(tensor.untyped_storage(), 1)

    def __del__(self) -> None:
        self.count._use(self.tensor.untyped_storage(), -1)
