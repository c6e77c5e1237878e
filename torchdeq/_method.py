"""What solvers and gradient methods have in common: they print, check and vary like the call that made them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

from torchdeq._suggest import did_you_mean


@dataclass(frozen=True, kw_only=True)
class Method:
    """A frozen record of hyperparameters."""

    def replace(self, **options: Any) -> Self:
        """The same method with some hyperparameters changed.

        Raises:
            TypeError: there is no such hyperparameter; the nearest one is named.
        """
        known = [f.name for f in dataclasses.fields(self)]
        for name in options:
            if name not in known:
                raise TypeError(
                    f"{type(self).__name__} has no option {name!r}.{did_you_mean(name, known)} "
                    f"Its options are {', '.join(known)}."
                )
        return dataclasses.replace(self, **options) if options else self

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
