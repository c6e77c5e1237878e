"""Modules with normalised weights: their class.

As in `torch.nn.utils.parametrize`, a module gets a class of its own, derived from the one it had, in which the weight
is a property. Unlike with torch's class, its parameters stay its own, and it can be pickled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchdeq.norm.base import Home, Norm
from torchdeq.norm.lists import NormedList, Parametrizations


def attach(module: nn.Module, name: str, norm: Norm, tied: NormedList | None) -> NormedList:
    """Make the parameter `name` of a module a normalised weight.

    Arguments:
        module, name: where.
        norm: the normalisation.
        tied: that of another module which has the same parameter, and so has all parts of it.
    """
    weight, base = module._parameters[name], _base(module)
    assert weight is not None
    parts = norm.release(weight)
    module.parametrizations = Parametrizations(
        dict(parametrizations_of(module)) if parametrize.is_parametrized(module) else None
    )
    delattr(module, name)
    for part, tensor in parts.items():
        tensor = tensor if tied is None else tied.home.part(part)
        if isinstance(tensor, nn.Parameter):
            module.register_parameter(f"{name}_{part}", tensor)
        else:
            module.register_buffer(f"{name}_{part}", tensor)
    one = parametrizations_of(module)[name] = NormedList(norm, Home(module, name))
    module.__class__ = _class(base, tuple(parametrizations_of(module)))
    return one


def detach(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Make it a plain parameter again."""
    parametrizations, base = parametrizations_of(module), _base(module)
    del parametrizations[name]
    if len(parametrizations):
        module.__class__ = _class(base, tuple(parametrizations))
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
    before = getattr(type(module), "_before_norm", None)
    return before or parametrize.type_before_parametrizations(module)


def _class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The class of one module. Not shared: torch changes it when a parametrization is added or removed.

    It has the name of the class that was there, as in 0.1.0 the module had that class.
    """
    members: dict[str, Any] = {
        "_before_norm": base,
        "_normed": frozenset(names),
        "__doc__": base.__doc__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__reduce_ex__": _reduce,
        "__setattr__": _set,
        "_apply": _apply,
        "state_dict": _state_dict,
        "_load_from_state_dict": _load,
    }
    return type(base.__name__, (base,), {**members, **{name: _weight(name) for name in names}})


def _weight(name: str) -> property:
    def read(self: nn.Module) -> Tensor:
        one: Any = self._modules["parametrizations"]._modules[name]  # type: ignore[union-attr]
        evaluate = one
        if isinstance(one, NormedList):
            evaluate = one.handed_out
            if one.home.layer is not self:
                one.move_to(Home(self, name))
        if not parametrize._cache_enabled or torch.compiler.is_compiling():
            return evaluate()
        key: Any = (id(one), name)
        weight = parametrize._cache.get(key)
        if weight is None:
            weight = parametrize._cache[key] = evaluate()
        return weight

    def write(self: nn.Module, value: Tensor) -> None:
        one: Any = parametrizations_of(self)[name]
        one.right_inverse(value)

    return property(read, write, doc=f"The parametrized {name}.")


def _set(self: Any, name: str, value: Any) -> None:
    """A parameter that is given for a weight sets it, rather than to be registered."""
    if name in self._normed and name in type(self).__dict__:  # torch may have removed it
        object.__setattr__(self, name, value)
    else:
        self._before_norm.__setattr__(self, name, value)


def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
    """See `torch.nn.Module._apply`. Buffers stay the same tensors, as parameters do: layers that share a weight
    share them."""
    shared: dict[str, Any] = {
        f"{name}_{part}": one.home.part(part)
        for name, one in lists_of(self).items()
        for part in one.norm.parts()
        if f"{name}_{part}" in self._buffers
    }
    self._before_norm._apply(self, fn, recurse)
    for name, buffer in shared.items():
        new = self._buffers[name]
        if torch._has_compatible_shallow_copy_type(buffer, new):
            buffer.data = new
            self._buffers[name] = buffer
    return self


def _reduce(self: Any, protocol: Any) -> Any:
    """For pickle and copy: a class is made where the module is, and the rest is state."""
    for one in lists_of(self).values():
        one.prepare()
    return _rebuilt, (self._before_norm, tuple(parametrizations_of(self))), self.__getstate__()


def _rebuilt(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    cls = _class(base, names)
    return cls.__new__(cls)


def _state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
    """See `torch.nn.Module.state_dict`."""
    for one in lists_of(self).values():
        one.prepare()
    return self._before_norm.state_dict(self, *args, **kwargs)


def _load(self: Any, state_dict: Any, prefix: str, *args: Any) -> None:
    """See `torch.nn.Module._load_from_state_dict`. Checkpoints of torch's own parametrizations are loaded too."""
    for name, one in lists_of(self).items():
        one.prepare()
        for part, path in one.norm.parts().items():
            torchs = f"{prefix}parametrizations.{name}.{path}"
            if torchs in state_dict:
                state_dict[f"{prefix}{name}_{part}"] = state_dict.pop(torchs)
    self._before_norm._load_from_state_dict(self, state_dict, prefix, *args)
