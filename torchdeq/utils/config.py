"""`DEQConfig`: 0.1.0's view of a configuration, whatever object it comes in."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any


class DEQConfig:
    """Options by name, copied from a Namespace, a mapping, a dataclass or any object with attributes.

    The original is never changed.

    Arguments:
        config: where to take options from; None for none.

    Raises:
        TypeError: the object has no attributes to read.

    Example:
        >>> config = DEQConfig({'f_solver': 'anderson'})
        >>> config.update(f_tol=1e-4)
        >>> config.get('f_solver'), config.get('f_tol'), config.get('tau', 1.0)
        ('anderson', 0.0001, 1.0)
    """

    config: dict[str, Any]

    def __init__(self, config: Any = None):
        if config is None:
            values: dict[str, Any] = {}
        elif isinstance(config, DEQConfig):
            values = dict(config.config)
        elif isinstance(config, Mapping):
            values = dict(config)
        elif isinstance(config, argparse.Namespace) or hasattr(config, "__dict__"):
            values = dict(vars(config))
        else:
            raise TypeError(
                f"a configuration is an argparse.Namespace, a mapping or an object with attributes, got {config!r}."
            )
        self.config = values

    def get(self, key: str, default: Any = None) -> Any:
        """The option `key`, or `default` if it is not set."""
        return self.config.get(key, default)

    def update(self, **kwargs: Any) -> None:
        """Set options."""
        self.config.update(kwargs)

    def __repr__(self) -> str:
        return f"DEQConfig({self.config!r})"
