"""Modules with normalised weights: their class, and how they are saved.

As in `torch.nn.utils.parametrize`, a module gets a class of its own, derived from the one it had, in which the weight
is a property. Its checkpoints have the names of torchdeq 0.1.0: `weight_g` rather than
`parametrizations.weight.original0`. Both are loaded. Unlike with torch's class, the module can be pickled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchdeq.norm.lists import NormedList

Names = tuple[
    tuple[str, tuple[str, ...]], ...
]  # of weights, and what is there of each: ("weight", ("g", "v"))


def attach(module: nn.Module, name: str, one: NormedList) -> None:
    """Make the parameter `name` of a module the weight of a list."""
    base = _base(module)
    if not parametrize.is_parametrized(module):
        module.parametrizations = nn.ModuleDict()
        # First, so that parameters come in the order that they have in 0.1.0, by which optimisers save.
        inner = module._modules
        for other in [key for key in inner if key != "parametrizations"]:
            inner[other] = inner.pop(other)
    delattr(module, name)
    parametrizations_of(module)[name] = one
    module.__class__ = _class(base, _names(module))


def detach(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Make it a plain parameter again."""
    parametrizations, base = parametrizations_of(module), _base(module)
    del parametrizations[name]
    if len(parametrizations):
        module.__class__ = _class(base, _names(module))
    else:
        del module.parametrizations
        module.__class__ = base
    module.register_parameter(name, parameter)


def lists_of(module: nn.Module) -> dict[str, NormedList]:
    """The normalised weights of a module itself, by name."""
    if not parametrize.is_parametrized(module):
        return {}
    items = parametrizations_of(module).items()
    return {name: one for name, one in items if isinstance(one, NormedList)}


def parametrizations_of(module: nn.Module) -> nn.ModuleDict:
    """All parametrizations of a parametrized module."""
    return module.parametrizations  # type: ignore[return-value]


def _base(module: nn.Module) -> type[nn.Module]:
    own = getattr(type(module), "_before_norm", None)
    return own or parametrize.type_before_parametrizations(module)


def _names(module: nn.Module) -> Names:
    return tuple(
        (name, tuple(one.norm.parts()) if isinstance(one, NormedList) else ())
        for name, one in parametrizations_of(module).items()
    )


def _class(base: type[nn.Module], names: Names) -> type[nn.Module]:
    """The class of one module. Not shared: torch changes it when a parametrization is added or removed."""
    members: dict[str, Any] = {
        "_before_norm": base,
        "__doc__": base.__doc__,
        "__module__": base.__module__,
        "__reduce_ex__": _reduce,
        "__setattr__": _set,
        "state_dict": _state_dict,
        "_load_from_state_dict": _load,
    }
    normed: dict[str, Any] = {}
    for name, parts in names:
        normed[name] = _weight(name)
        normed |= {f"{name}_{part}": _part(name, part) for part in parts}
    members |= {**normed, "_normed": frozenset(normed)}
    return type(f"Parametrized{base.__name__}", (base,), members)


def _weight(name: str) -> property:
    def read(self: nn.Module) -> Tensor:
        one: Any = parametrizations_of(self)[name]
        own = isinstance(one, NormedList)
        if not parametrize._cache_enabled or torch.compiler.is_compiling():
            return one.handed_out() if own else one()
        key: Any = (id(one), name)
        weight = parametrize._cache.get(key)
        if weight is None:
            weight = parametrize._cache[key] = one.handed_out() if own else one()
        return weight

    def write(self: nn.Module, value: Tensor) -> None:
        one: Any = parametrizations_of(self)[name]
        one.right_inverse(value)

    return property(read, write, doc=f"The parametrized {name}.")


def _part(name: str, part: str) -> property:
    def read(self: nn.Module) -> Tensor:
        return lists_of(self)[name].part(part)

    def write(self: nn.Module, value: Tensor) -> None:
        with torch.no_grad():
            read(self).copy_(value)

    return property(read, write, doc=f"{part} of the normalised {name}.")


def _set(self: Any, name: str, value: Any) -> None:
    """A parameter that is given for a weight sets it, rather than to be registered."""
    if name in self._normed:
        object.__setattr__(self, name, value)
    else:
        self._before_norm.__setattr__(self, name, value)


def _reduce(self: Any, protocol: Any) -> Any:
    """For pickle and copy: a class is made where the module is, and the rest is state."""
    return _rebuilt, (self._before_norm, _names(self)), self.__getstate__()


def _rebuilt(base: type[nn.Module], names: Names) -> nn.Module:
    cls = _class(base, names)
    return cls.__new__(cls)


def _state_dict(
    self: Any, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False
) -> Any:
    """See `torch.nn.Module.state_dict`; in the names of 0.1.0."""
    if len(args) > 1:
        prefix = args[1]
    for one in lists_of(self).values():
        one.prepare()
    found = self._before_norm.state_dict(
        self, *args, destination=destination, prefix=prefix, keep_vars=keep_vars
    )
    for old, new in _renamed(self, prefix):
        if new in found:
            found[old] = found.pop(new)
    return found


def _load(self: Any, state_dict: Any, prefix: str, *args: Any) -> None:
    for one in lists_of(self).values():
        one.prepare()
    for old, new in _renamed(self, prefix):
        if old in state_dict:
            state_dict[new] = state_dict.pop(old)
    self._before_norm._load_from_state_dict(self, state_dict, prefix, *args)


def _renamed(module: nn.Module, prefix: str) -> list[tuple[str, str]]:
    return [
        (f"{prefix}{name}_{part}", f"{prefix}parametrizations.{name}.{path}")
        for name, one in lists_of(module).items()
        for part, path in one.norm.parts().items()
    ]
