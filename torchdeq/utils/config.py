"""`DEQConfig`: 0.1.0's view of a configuration, whatever object it comes in."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

from torch import Tensor


class DEQConfig:
    """Options by name, copied from whatever holds them. The original is never changed; values are not copied.

    Arguments:
        config: where to take options from; None for none. An argparse.Namespace, a mapping or what behaves like one
            (OmegaConf's DictConfig), a dataclass, a named tuple, or any other object with attributes. Attributes that
            its class defines are options too, unless they are methods or properties or begin with an underscore; so a
            plain class or a module of Python that lists options can be given as it is.

    Raises:
        TypeError: there is nothing to read options from.

    Example:
        >>> config = DEQConfig({'f_solver': 'anderson'})
        >>> config.update(f_tol=1e-4)
        >>> config.get('f_solver'), config.get('f_tol'), config.get('tau', 1.0)
        ('anderson', 0.0001, 1.0)
    """

    config: dict[str, Any]

    def __init__(self, config: Any = None):
        self.config = _options_in(config)

    def get(self, key: str, default: Any = None) -> Any:
        """The option `key`, or `default` if it is not set."""
        return self.config.get(key, default)

    def update(self, **kwargs: Any) -> None:
        """Set options."""
        self.config.update(kwargs)

    def __repr__(self) -> str:
        return f"DEQConfig({self.config!r})"


def _options_in(config: Any) -> dict[str, Any]:
    """The options that an object holds, in a new dictionary."""
    if config is None:
        return {}
    if isinstance(config, DEQConfig):
        return dict(config.config)
    if isinstance(config, type) and dataclasses.is_dataclass(config):
        raise TypeError(
            f"a configuration is an object that holds options, got the dataclass {config.__name__} itself. Give an "
            f"instance: {config.__name__}()."
        )
    if isinstance(config, Mapping) or (
        not isinstance(config, type) and hasattr(config, "keys") and hasattr(config, "__getitem__")
    ):
        return {key: config[key] for key in config.keys()}  # noqa: SIM118 - all that is known is that it has keys()
    if isinstance(config, tuple) and hasattr(config, "_fields"):
        return dict(zip(config._fields, config, strict=True))
    found = _attributes(config)
    if found is None:
        raise TypeError(
            f"a configuration is an argparse.Namespace, a mapping, a dataclass or another object with attributes, got "
            f"{config!r}. Give options by name, or a dictionary of them."
        )
    return found


def _attributes(config: Any) -> dict[str, Any] | None:
    """The attributes of an object, those of its classes included; None if it is no object to hold options."""
    builtin = isinstance(config, type) or type(config).__module__ == "builtins"
    if isinstance(config, Tensor) or (builtin and not isinstance(config, type | types.ModuleType)):
        return None  # nor is a string, a number, a list, a function
    classes = config.__mro__ if isinstance(config, type) else type(config).__mro__
    found: dict[str, Any] = {}
    for cls in reversed(classes):
        if cls.__module__ == "builtins":
            continue
        for name, value in vars(cls).items():
            if isinstance(value, types.MemberDescriptorType):  # of __slots__
                if not isinstance(config, type) and hasattr(config, name):
                    found[name] = getattr(config, name)
            elif not hasattr(value, "__get__"):  # functions, properties, static methods
                found[name] = value
    found |= {} if isinstance(config, type) else getattr(config, "__dict__", {})
    found = {k: v for k, v in found.items() if not (isinstance(k, str) and k.startswith("_"))}
    can_hold = not isinstance(config, type) and (hasattr(config, "__dict__") or hasattr(config, "__slots__"))
    return found if found or can_hold else None
