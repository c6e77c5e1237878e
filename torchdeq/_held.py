"""f with its hidden state held for a solve: every evaluation begins with the same buffers, and the same noise.

    f(z) → f(z; s₀),   s₀ = the running statistics, spectral vectors, … as they are when the solve begins.

A module in training mode changes its buffers as it is evaluated: the running statistics of batch normalisation, the
vectors of spectral normalisation. Left to itself, f would be another map at each evaluation, and a solve of thirty
would count as thirty batches. Here each evaluation gets a copy of s₀ of its own, and what the last of the solve made
of it is what stays: one update for one solve. An evaluation after the solve, as in a backward pass, changes nothing.
`torchdeq._buffers` makes the copies. Parametrized weights are evaluated from s₀ too, by `torchdeq._weights`.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from torchdeq._buffers import Buffer, Change, Loan, buffers_of, changed
from torchdeq._modes import in_transform
from torchdeq._replay import RandomState
from torchdeq._weights import Weights, lists_in

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
    outer = modules_of(f) if modules is None else modules
    inside = list(dict.fromkeys(inner for module in outer for inner in module.modules()))
    lists = lists_in(inside)
    if not in_transform():
        for one in lists:
            one.prepare()
    buffers = buffers_of(inside)
    needed = buffers or lists or noise is not None or parametrize._cache_enabled
    return Held(f, buffers, Weights(lists, buffers), noise) if needed else f


def release(f: Callable[..., Any]) -> None:
    """The solve is over: the buffers take what its last evaluation made of them; later evaluations change nothing."""
    if isinstance(f, Held):
        f.release()


def sharing(f: Callable[..., Any]) -> AbstractContextManager[None]:
    """For a solver or a gradient method at work: within, each parametrized weight of f is evaluated once.

    Once for all evaluations without a graph, and once for all that have one.
    """
    return f.weights.shared() if isinstance(f, Held) and f.weights.of else nullcontext()


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
        weights: its parametrized weights.
        noise: see `hold`.
    """

    def __init__(
        self, f: Callable[..., Any], buffers: list[Buffer], weights: Weights, noise: torch.device | None
    ):
        self.f = f
        self.__wrapped__ = getattr(f, "forward", f)  # the signature is that of f
        self.buffers = buffers
        self.weights = weights
        self.noise = noise
        self.fresh = True
        self.open = True
        self._random: RandomState | None = None
        self._cache: dict[Any, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.noise is None and not parametrize._cache_enabled:
            return self._evaluate(args, kwargs)
        with self._same_noise(), self._own_cache():
            return self._evaluate(args, kwargs)

    def _evaluate(self, args: Any, kwargs: Any) -> Any:
        weights = self.weights if self.weights.of else None
        for buffer in self.buffers:
            buffer.lent = Loan(buffer)
        if weights:
            weights.begin()
        try:
            out = self.f(*args, **kwargs)
        finally:
            if weights:
                weights.end()
            ended = [buffer.take_back() for buffer in self.buffers]
        if self.fresh:
            self.buffers = changed(ended)
            self.fresh = False
        if self.open and ended:
            self._note(ended)
        return out

    def _note(self, ended: list[tuple[Loan, Change]]) -> None:
        """What stays of the buffers, if this was the last evaluation of the solve."""
        kept = {id(buffer) for buffer in self.buffers}
        inner = {id(buffer) for buffer in self.weights.buffers} if self.weights.of else ()
        for loan, change in ended:
            buffer = loan.buffer
            # Where a weight was there already nothing is written, which does not undo what its evaluation wrote.
            if id(buffer) in kept and (change.certain or id(buffer) not in inner):
                buffer.last = change

    def release(self) -> None:
        """See `release`."""
        if self.open:
            self.open = self.weights.open = False
            self._cache = {}
            inner = self.weights.buffers
            for buffer in inner:
                if buffer.last is None:  # evaluated by a solve around this one, which has yet to settle
                    buffer.start = buffer.start.clone()
            for buffer in {id(b): b for b in (*self.buffers, *inner)}.values():
                buffer.settle()

    def _same_noise(self) -> AbstractContextManager[None]:
        if self.noise is None:
            return nullcontext()
        if self._random is None:  # the first evaluation moves the generator on, as one call of f does
            self._random = RandomState.capture(self.noise)
            return nullcontext()
        return self._random.again()

    @contextmanager
    def _own_cache(self) -> Iterator[None]:
        """Within `parametrize.cached()`: weights computed without a graph are not left to calls that need theirs."""
        if not parametrize._cache_enabled or torch.is_grad_enabled():
            yield
            return
        outer = parametrize._cache
        for key, weight in outer.items():  # a weight that is there already is the one that all have
            if weight is not None:
                self._cache.setdefault(key, weight.detach())
        parametrize._cache = self._cache
        try:
            yield
        finally:
            parametrize._cache = outer

    def __repr__(self) -> str:
        return f"Held({self.f!r})"


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
