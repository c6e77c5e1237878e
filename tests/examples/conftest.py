"""The study that a file of tests is about, by its name."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest

from tests.programs import program


@pytest.fixture(scope="module")
def study(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """examples/rbp.py as a module, for test_rbp.py."""
    name = request.module.__name__.rpartition("test_")[2]
    with program("examples", name, "sklearn", "tqdm", "matplotlib") as module:
        yield module
