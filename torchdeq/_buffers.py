"""Buffers lent to an evaluation: it works on a copy, and what it has made of the copy is noted.

Copies, rather than writing the old values back: what an evaluation has saved for its backward pass is never written to.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_copies: dict[int, int | None] = {}  # those that are lent: their versions by their ids


class Change(NamedTuple):
    """What an evaluation has made of a copy.

    Arguments:
        found: the tensor that is in its place now.
        other: whether that is another tensor.
        written: whether the copy has a new version.
    """

    found: Tensor | None
    other: bool
    written: bool

    @property
    def certain(self) -> bool:
        """Whether the change is one for all to see. Otherwise it takes the values to know."""
        return self.other or self.written


class Buffer:
    """One buffer, in all the places that modules keep it.

    Arguments:
        tensor: the buffer.
    """

    def __init__(self, tensor: Tensor):
        self.start = tensor  # until `settle`, the user's own tensor, which nothing writes to
        self.places: list[tuple[nn.Module, str]] = []
        self.lent: Loan | None = None  # to an evaluation of f that is going on
        self.last: Change | None = None

    def take_back(self) -> tuple[Loan, Change]:
        """The end of what `lent` is."""
        assert self.lent is not None
        loan, self.lent = self.lent, None
        return loan, loan.end()

    def settle(self) -> None:
        """Give the user's tensor its new value; keep the old one for later evaluations."""
        if self.last is None:
            return
        (found, other, written), users = self.last, self.start
        self.start = users.clone()
        if other:  # f puts another tensor in its place
            for module, name in self.places:
                module._buffers[name] = found
        elif found is not None:
            with torch.no_grad():
                # A new version exactly if f makes one: to a graph of the user's, one call of f has been made.
                (users if written else users.data).copy_(found)


class Loan:
    """A copy of a buffer's start, where modules look, until `end`.

    Arguments:
        buffer: what to copy.
    """

    def __init__(self, buffer: Buffer):
        self.buffer = buffer
        self.copy = buffer.start.clone()
        self.before = _version(self.copy)
        _copies[id(self.copy)] = self.before
        self.users = [module._buffers[name] for module, name in buffer.places]
        for module, name in buffer.places:
            module._buffers[name] = self.copy

    def change(self) -> Change:
        """What has been made of the copy so far."""
        module, name = self.buffer.places[0]
        found = module._buffers.get(name)
        return Change(
            found, found is not self.copy, self.before is None or _version(self.copy) != self.before
        )

    def end(self) -> Change:
        """Put back what was there before, and tell what was made of the copy."""
        change = self.change()
        del _copies[id(self.copy)]
        for (module, name), tensor in zip(self.buffer.places, self.users, strict=True):
            module._buffers[name] = tensor
        return change


def is_as_lent(tensor: Tensor | None) -> bool:
    """Whether it is a copy that has been lent and not been written to."""
    return tensor is not None and id(tensor) in _copies and _copies[id(tensor)] == _version(tensor)


def buffers_of(modules: Iterable[nn.Module]) -> list[Buffer]:
    """The buffers of those modules that are in training mode, each once."""
    found: dict[int, Buffer] = {}
    for module in modules:
        if not module.training:
            continue
        for name, tensor in module._buffers.items():
            if tensor is not None and not is_lazy(tensor):
                found.setdefault(id(tensor), Buffer(tensor)).places.append((module, name))
    return list(found.values())


def changed(loans: list[tuple[Loan, Change]]) -> list[Buffer]:
    """The buffers that an evaluation has changed. The device is waited for once, if values must tell.

    Batch normalisation writes its statistics without a new version, and at z = 0 it writes the mean that was there. So
    a buffer goes with one of its module that has the same shape and was written in that way.
    """
    open_ones = [loan for loan, change in loans if not change.certain and loan.copy.layout == torch.strided]
    differ = [(loan.copy != loan.buffer.start).any().to(open_ones[0].copy.device) for loan in open_ones]
    silent = {
        (module, loan.buffer.start.shape)
        for loan, differs in zip(open_ones, torch.stack(differ).tolist() if differ else (), strict=True)
        if differs
        for module, _ in loan.buffer.places
    }
    return [
        loan.buffer
        for loan, change in loans
        if change.certain
        or any((module, loan.buffer.start.shape) in silent for module, _ in loan.buffer.places)
    ]


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
