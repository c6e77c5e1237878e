"""What can be seen inside a function: the modules and tensors it holds. A look at f must leave them as they were."""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torchdeq._replay import RandomState

_DEPTH = 5  # containers within containers
_COUNT = 3000  # things looked at: f may hold a data set


class Inside:
    """What f holds: found in f itself, if it is a module or an object, in the object of a bound method, in what a
    function closes over, its defaults and the globals it names, in a `functools.partial`, and in containers of those.

    Arguments:
        f: any callable.

    Attributes:
        modules: the modules by name, submodules too.
        tensors: tensors that are no module's, by name.
        generators: random generators.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> list(Inside(lambda z: layer(z)).modules)
        ['layer']
    """

    def __init__(self, f: Any):
        self.modules: dict[str, nn.Module] = {}
        self.tensors: dict[str, Tensor] = {}
        self.generators: list[torch.Generator] = []
        self._seen: dict[int, Any] = {}  # keeps what it has seen alive, so that an id stays one thing's
        self._look(f, "", 0)

    def _look(self, thing: Any, name: str, depth: int) -> None:
        if depth > _DEPTH or len(self._seen) > _COUNT or id(thing) in self._seen:
            return
        self._seen[id(thing)] = thing
        if isinstance(thing, nn.Module):
            for path, module in thing.named_modules():
                self._seen[id(module)] = module
                full = _joined(name, path)
                self.modules[full] = module
                for key, value in vars(module).items():
                    if key not in _OF_EVERY_MODULE:
                        self._look(value, _joined(full, key), depth + 1)
        elif isinstance(thing, Tensor):
            self.tensors[name] = thing
        elif isinstance(thing, torch.Generator):
            self.generators.append(thing)
        else:
            for part, inner in _parts(thing):
                self._look(inner, _joined(name, part), depth + 1)

    @contextmanager
    def untouched(self, device: torch.device) -> Iterator[Held]:
        """A context that leaves all of this, and torch's generators, as it found them."""
        held = Held(self)
        states = [generator.get_state() for generator in self.generators]
        try:
            with RandomState.capture(device).again():
                yield held
        finally:
            held.restore()
            for generator, state in zip(self.generators, states, strict=True):
                generator.set_state(state)


class Held:
    """The modules and tensors of an `Inside` as they are now.

    Values are kept of buffers, of tensors that are no module's and of `.grad`; of parameters only their version.
    """

    def __init__(self, inside: Inside):
        self.inside = inside
        self._attributes = [
            (module, dict(vars(module)), {key: dict(vars(module)[key]) for key in _TABLES})
            for module in inside.modules.values()
            if not isinstance(module, torch.jit.ScriptModule)
        ]
        self._values = [(name, t, t.detach().clone()) for name, t in self._named(inside)]
        self._parameters = [(name, p, p._version) for name, p in _parameters(inside)]
        leaves = [p for _, p, _ in self._parameters] + [t for _, t, _ in self._values if t.is_leaf]
        self._grads = [(p, p.grad, None if p.grad is None else p.grad.clone()) for p in leaves]

    @staticmethod
    def _named(inside: Inside) -> Iterator[tuple[str, Tensor]]:
        for name, module in inside.modules.items():
            for key, buffer in module.named_buffers(recurse=False):
                yield _joined(name, key), buffer
        yield from inside.tensors.items()

    def moved(self) -> list[str]:
        """The names of buffers, tensors and parameters that have another value than they had."""
        now = dict(self._named(self.inside))
        values = [name for name, _, value in self._values if name not in now or not same(now[name], value)]
        return values + [name for name, p, version in self._parameters if p._version != version]

    def owner(self, name: str) -> nn.Module | None:
        """The module whose buffer or parameter has this name."""
        return self.inside.modules.get(name.rpartition(".")[0])

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back."""
        for module, attributes, tables in self._attributes:
            vars(module).clear()
            vars(module).update(attributes)
            for key, table in tables.items():
                vars(module)[key].clear()
                vars(module)[key].update(table)
        for _, t, value in self._values:
            if not same(t, value):
                t.copy_(value)
        for p, grad, kept in self._grads:
            if p.grad is not grad:
                p.grad = grad
            if grad is not None and kept is not None and not same(grad, kept):
                grad.copy_(kept)


#: Where a module keeps what is registered; its other attributes are replaced as a whole.
_TABLES = ("_parameters", "_buffers", "_modules")
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def _parameters(inside: Inside) -> Iterator[tuple[str, Tensor]]:
    for name, module in inside.modules.items():
        for key, parameter in module.named_parameters(recurse=False):
            yield _joined(name, key), parameter


def _joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether they are equal, and NaN where the other is."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = a.detach(), b.detach()
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _parts(thing: Any) -> Iterable[tuple[str, Any]]:
    """What a function, method, partial, container or plain object is made of, by name."""
    if isinstance(thing, functools.partial):
        return [("", thing.func), *(("", a) for a in thing.args), *thing.keywords.items()]
    if isinstance(thing, types.MethodType):
        return [("", thing.__self__), ("", thing.__func__)]
    if isinstance(thing, types.FunctionType):
        return _closed_over(thing)
    if isinstance(thing, dict):
        return [(str(key), value) for key, value in thing.items()]
    if isinstance(thing, list | tuple | set | frozenset):
        return [(str(i), value) for i, value in enumerate(thing)]
    if isinstance(thing, type | types.ModuleType) or type(thing).__module__.split(".")[0] in (
        "builtins",
        "torch",
    ):
        return []
    return list(getattr(thing, "__dict__", {}).items())


def _closed_over(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # a name that has no value yet
            continue
    names = [function.__code__.co_names]
    for constant in function.__code__.co_consts:  # functions within it
        if isinstance(constant, types.CodeType):
            names.append(constant.co_names)
    for name in dict.fromkeys(itertools.chain(*names)):
        if name in function.__globals__:
            yield name, function.__globals__[name]
    yield from (("", value) for value in function.__defaults__ or ())
    yield from (function.__kwdefaults__ or {}).items()
    if hasattr(function, "__wrapped__"):
        yield "", function.__wrapped__
