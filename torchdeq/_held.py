"""f with its hidden state held for a solve: every evaluation begins with the same buffers, and the same noise.

    f(z) → f(z; s₀),   s₀ = the running statistics, spectral vectors, … as they are when the solve begins.

A module in training mode changes its buffers as it is evaluated: the running statistics of batch normalisation, the
vectors of spectral normalisation. Left to itself, f would be another map at each evaluation, and a solve of thirty
would count as thirty batches. Here each evaluation gets a copy of s₀ of its own, and what the last of the solve made
of it is what stays: one update for one solve. An evaluation after the solve, as in a backward pass, changes nothing.

Copies, rather than writing s₀ back: what an evaluation has saved for its backward pass is never written to.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from torchdeq._replay import RandomState

_FEW = 100  # a longer container holds data rather than modules, and would take time at each solve


def hold(
    f: Callable[..., Any],
    modules: Iterable[nn.Module] | None = None,
    *,
    noise: torch.device | None = None,
) -> Callable[..., Any]:
    """f for one solve, its hidden state held; f itself if it has none.

    Arguments:
        f: the map.
        modules: the modules whose buffers f may change. None: those that `modules_of` finds.
        noise: the device on which f draws random numbers that are to be the same at each evaluation. None: they are
            not held.
    """
    if isinstance(f, Held):
        return f
    buffers = list(_buffers_of(modules_of(f) if modules is None else modules))
    needed = buffers or noise is not None or parametrize._cache_enabled
    return Held(f, buffers, noise) if needed else f


def release(f: Callable[..., Any]) -> None:
    """The solve is over: the buffers take what its last evaluation made of them; later evaluations change nothing."""
    if isinstance(f, Held):
        f.release()


def draws_noise(
    f: Callable[..., Any], z: Any, device: torch.device, modules: Iterable[nn.Module] | None = None
) -> bool:
    """Whether f(z) draws random numbers. One call, which leaves the generators and the buffers as they were."""
    held = hold(f, modules)
    release(held)
    state = RandomState.capture(device)
    with torch.no_grad(), state.again():
        held(z)
        return not state.is_now()


class Held:
    """What `hold` returns. Copies are made of the buffers that the first evaluation changes; the others are let go.

    Arguments:
        f: the map.
        buffers: the buffers that it may change.
        noise: see `hold`.
    """

    def __init__(self, f: Callable[..., Any], buffers: list[Buffer], noise: torch.device | None):
        self.f = f
        self.__wrapped__ = getattr(f, "forward", f)  # the signature is that of f
        self.buffers = buffers
        self.noise = noise
        self.fresh = True
        self.open = True
        self._random: RandomState | None = None
        self._weights: dict[Any, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._same_noise(), self._own_weights():
            for buffer in self.buffers:
                buffer.lend()
            try:
                out = self.f(*args, **kwargs)
            finally:
                for buffer in self.buffers:
                    buffer.take_back()
        if self.fresh:
            self.buffers = _changed(self.buffers)
            self.fresh = False
        if self.open:
            for buffer in self.buffers:
                buffer.last = buffer.returned
        return out

    def release(self) -> None:
        """See `release`."""
        if self.open:
            self.open = False
            self._weights = {}
            for buffer in self.buffers:
                buffer.settle()

    def _same_noise(self) -> AbstractContextManager[None]:
        if self.noise is None:
            return nullcontext()
        if self._random is None:  # the first evaluation moves the generator on, as one call of f does
            self._random = RandomState.capture(self.noise)
            return nullcontext()
        return self._random.again()

    @contextmanager
    def _own_weights(self) -> Iterator[None]:
        """Within `parametrize.cached()`: weights computed without a graph are not left to calls that need theirs."""
        if not parametrize._cache_enabled or torch.is_grad_enabled():
            yield
            return
        outer = parametrize._cache
        parametrize._cache = self._weights
        try:
            yield
        finally:
            parametrize._cache = outer

    def __repr__(self) -> str:
        return f"Held({self.f!r})"


class Buffer:
    """One buffer, in all the places that modules keep it.

    Arguments:
        tensor: the buffer.
    """

    def __init__(self, tensor: Tensor):
        self.start = tensor  # until `settle`, the user's own tensor, which nothing writes to
        self.places: list[tuple[nn.Module, str]] = []
        self.last: tuple[Tensor | None, bool, bool] | None = None

    def lend(self) -> None:
        """Put a copy of the start where modules look."""
        self.copy = self.start.clone()
        self.before = _version(self.copy)
        self.users = [module._buffers[name] for module, name in self.places]
        for module, name in self.places:
            module._buffers[name] = self.copy

    def take_back(self) -> None:
        """Note what f has made of the copy and put the user's tensor in its place again."""
        module, name = self.places[0]
        found = module._buffers.get(name)
        written = self.before is None or _version(self.copy) != self.before
        self.returned = (found, found is not self.copy, written)
        for (module, name), tensor in zip(self.places, self.users, strict=True):
            module._buffers[name] = tensor

    def surely(self) -> bool:
        """Whether f has changed the buffer for all to see: put another in its place, or made a new version."""
        _, other, written = self.returned
        return other or written

    def perhaps(self) -> bool:
        """Whether it takes the values to know."""
        return not self.surely() and self.copy.layout == torch.strided

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


def modules_of(f: Callable[..., Any]) -> list[nn.Module]:
    """The modules that f is seen to be made of.

    f itself, the object it is a method of, the attributes of that object or of a callable one, the arguments of a
    `partial`; for a function what it closes over, its defaults and the globals it names. Functions among these are
    looked through in the same way; of those that are globals, the ones of the same file. So are lists, tuples and
    dictionaries of up to a hundred entries.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> modules_of(lambda z: layer(z)), modules_of(torch.tanh)
        ([Linear(in_features=2, out_features=2, bias=True)], [])
    """
    found: list[nn.Module] = []
    seen: set[int] = set()
    todo: list[Any] = [f]
    objects: list[Any] = [f]  # whose attributes count too
    while todo:
        part = todo.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, nn.Module):
            found.append(part)
        elif isinstance(part, list | tuple) and len(part) <= _FEW:
            todo += part
        elif isinstance(part, dict) and len(part) <= _FEW:
            todo += part.values()
        elif isinstance(part, functools.partial):
            todo += [part.func, *part.args, *part.keywords.values()]
        elif isinstance(part, types.MethodType):
            todo += [part.__func__, part.__self__]
            objects.append(part.__self__)
        elif isinstance(part, types.FunctionType):
            todo += _named_in(part)
        elif any(part is thing for thing in objects):
            todo += getattr(part, "__dict__", {}).values()
    return found


def _named_in(f: types.FunctionType) -> Iterator[Any]:
    """What the function f closes over, its defaults, and the modules and functions of its own file that it names."""
    for cell in f.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # nothing in it yet
            continue
    yield from f.__defaults__ or ()
    yield from (f.__kwdefaults__ or {}).values()
    for name in f.__code__.co_names:
        value = f.__globals__.get(name)
        if isinstance(value, nn.Module) or (
            isinstance(value, types.FunctionType) and value.__module__ == f.__module__
        ):
            yield value


def _buffers_of(modules: Iterable[nn.Module]) -> Iterable[Buffer]:
    """The buffers of modules in training mode, each once."""
    found: dict[int, Buffer] = {}
    for module in dict.fromkeys(inner for outer in modules for inner in outer.modules()):
        if not module.training:
            continue
        for name, tensor in module._buffers.items():
            if tensor is not None and not is_lazy(tensor):
                found.setdefault(id(tensor), Buffer(tensor)).places.append((module, name))
    return found.values()


def _changed(buffers: list[Buffer]) -> list[Buffer]:
    """The buffers that f changes, as its first evaluation shows. The device is waited for once, if values must tell.

    Batch normalisation writes its statistics without a new version, and at z = 0 it writes the mean that was there. So
    a buffer goes with one of its module that has the same shape and was written in that way.
    """
    open_ones = [buffer for buffer in buffers if buffer.perhaps()]
    differ = [(buffer.copy != buffer.start).any().to(open_ones[0].copy.device) for buffer in open_ones]
    silent = {
        (module, buffer.start.shape)
        for buffer, differs in zip(open_ones, torch.stack(differ).tolist() if differ else (), strict=True)
        if differs
        for module, _ in buffer.places
    }
    return [
        buffer
        for buffer in buffers
        if buffer.surely() or any((module, buffer.start.shape) in silent for module, _ in buffer.places)
    ]


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
