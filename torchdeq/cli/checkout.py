"""The programs of the repository, which an installed package does not have."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torchdeq
from torchdeq.cli.errors import UsageError


def programs(folder: str, names: Iterable[str], extras: str) -> Path:
    """The folder of the checkout that torchdeq is imported from, such as "examples", in which these programs are.

    Arguments:
        folder: its name.
        names: of the files, without their ending.
        extras: of this package, that the programs need.

    Raises:
        UsageError: torchdeq is not imported from a checkout of its repository.
    """
    path = Path(torchdeq.__file__).resolve().parent.parent / folder
    if not all((path / f"{name}.py").is_file() for name in names):
        raise UsageError(
            f"the {folder} are part of the repository and not of the installed package, and {path} is not there. Clone "
            f'the repository, install it by pip install -e ".[{extras}]", and run the command again.'
        )
    return path
