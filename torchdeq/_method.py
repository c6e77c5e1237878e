"""What solvers and gradient methods have in common: they print, check and vary like the call that made them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

from torchdeq._suggest import did_you_mean


class _Checked(type):
    """Classes whose calls name the nearest option when one is misspelt."""

    def __call__(cls, *args: Any, **options: Any) -> Any:
        params = cls.__dict__.get("__dataclass_params__")
        if params is not None and params.init:  # its __init__ takes the fields and nothing else
            this: Any = cls
            known = [f.name for f in dataclasses.fields(this) if f.init]
            if args:
                raise TypeError(
                    f"{cls.__name__} takes its options by name, got {', '.join(map(repr, args))} without one. "
                    f"Its options are {', '.join(known)}."
                )
            for name in options:
                if name not in known:
                    raise TypeError(_no_option(cls.__name__, name, known))
        return super().__call__(*args, **options)


def _no_option(method: str, name: str, known: list[str]) -> str:
    return f"{method} has no option {name!r}.{did_you_mean(name, known)} Its options are {', '.join(known)}."


@dataclass(frozen=True, kw_only=True)
class Method(metaclass=_Checked):
    """A frozen record of hyperparameters."""

    def replace(self, **options: Any) -> Self:
        """The same method with some hyperparameters changed.

        Raises:
            TypeError: there is no such hyperparameter; the nearest one is named.
        """
        if not options:
            return self
        known = [f.name for f in dataclasses.fields(self)]
        for name in options:
            if name not in known:
                raise TypeError(_no_option(type(self).__name__, name, known))
        return dataclasses.replace(self, **options)

    def require(self, condition: bool, message: str) -> None:
        """Raise a ValueError that shows this method's call, unless `condition` holds."""
        if not condition:
            raise ValueError(f"{self!r}: {message}.")

    def __repr__(self) -> str:
        changed = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default or type(getattr(self, f.name)) is not type(f.default)
        ]
        return f"{type(self).__name__}({', '.join(changed)})"
