"""What the command line says when it cannot do what was asked."""

from __future__ import annotations

import importlib
from typing import Any


class UsageError(Exception):
    """The arguments, or the machine, do not allow what was asked. Shown in one line, without a traceback.

    Example:
        >>> str(UsageError("--epochs 0: expected at least 1."))
        '--epochs 0: expected at least 1.'
    """


def need(module: str, extras: str = "train,viz") -> Any:
    """An optional module, imported when a command needs it.

    Arguments:
        module: its name.
        extras: those of this package that bring it.

    Raises:
        UsageError: it is not installed.

    Example:
        >>> need("json").dumps([1])
        '[1]'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"this command needs {module.partition('.')[0]}, which cannot be imported ({error}). Install it with: "
            f'pip install "torchdeq[{extras}]"'
        ) from error
