"""What the command line says when it cannot do what was asked."""

from __future__ import annotations

import importlib
import importlib.util
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
        raise missing(module.partition(".")[0], str(error), extras) from error


def need_installed(package: str, extras: str = "train,viz") -> None:
    """Raise if a package is not installed, without importing it: for commands that start another program.

    Raises:
        UsageError: it is not installed.

    Example:
        >>> need_installed("json")
    """
    if importlib.util.find_spec(package) is None:
        raise missing(package, "it is not installed", extras)


def missing(package: str, why: str, extras: str) -> UsageError:
    """The error that says which extras bring a package.

    Example:
        >>> print(missing("tqdm", "not there", "train"))
        this command needs tqdm, which cannot be imported (not there). Install it with: pip install "torchdeq[train]"
    """
    return UsageError(
        f"this command needs {package}, which cannot be imported ({why}). Install it with: "
        f'pip install "torchdeq[{extras}]"'
    )
