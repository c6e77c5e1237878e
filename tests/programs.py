"""Programs of the repository as modules, which find their neighbours as they do when they are run."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parent.parent


@contextmanager
def program(folder: str, name: str, *needed: str) -> Iterator[ModuleType]:
    """A file of a folder, such as "examples"; skipped without the packages that it needs. What it changes is put back.

    Arguments:
        folder: of the repository.
        name: of the file, without its ending.
        needed: packages.
    """
    for package in needed:
        pytest.importorskip(package)
    path, before, threads = str(ROOT / folder), set(sys.modules), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path)
        try:
            yield importlib.import_module(name)
        finally:
            torch.set_num_threads(threads)
            for other in set(sys.modules) - before:
                if path in str(getattr(sys.modules[other], "__file__", "")):
                    del sys.modules[other]
