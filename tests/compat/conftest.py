"""`old`: torchdeq 0.1.0 itself. Tests that ask for it are skipped where its wheel cannot be had."""

from __future__ import annotations

from types import ModuleType

import pytest

from tests.compat.peer import UnreachableError, peer


@pytest.fixture(scope="session")
def old() -> ModuleType:
    """The package that is compared with."""
    try:
        return peer()
    except UnreachableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def old_or_none() -> ModuleType | None:
    """The same for tests that have something to say without it."""
    try:
        return peer()
    except UnreachableError:
        return None
