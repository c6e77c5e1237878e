"""torchdeq 0.1.0's own wheel, unpacked beside this library under another name, to compare with.

    peer()                      the package in this process, as `torchdeq_peer`
    folder_for("torchdeq")      a folder to put on PYTHONPATH, where the package is called `torchdeq` again

The wheel is downloaded once, checked against its hash and kept in the user's cache. Several processes may ask at the
same time: what is written goes to a folder of their own first and is then renamed.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path
from types import ModuleType

NAME = "torchdeq_peer"
WHEEL = "torchdeq-0.1.0-py3-none-any.whl"
SHA256 = "c162cb5bc3df436a42c52ee8a2ee515208222757aa682963cd5c449cc979e9e6"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torchdeq" / "peer-0.1.0"


class UnreachableError(RuntimeError):
    """The wheel is not in the cache, and the package registry does not answer."""


def wheel() -> Path:
    """The wheel, from the cache or else from the registry."""
    kept = CACHE / WHEEL
    if not kept.exists():
        try:
            CACHE.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UnreachableError(f"there is no place to keep torchdeq 0.1.0: {error}") from error
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            _download(Path(folder))
            (Path(folder) / WHEEL).replace(kept)
    if hashlib.sha256(kept.read_bytes()).hexdigest() != SHA256:
        kept.unlink()
        raise UnreachableError(
            f"{kept} was not the published torchdeq 0.1.0: its hash differs. It was deleted."
        )
    return kept


def _download(folder: Path) -> None:
    """By pip, which knows the registry and the proxies of this machine; offline it gives up in seconds."""
    options = ["--quiet", "--no-deps", "--no-cache-dir", "--retries", "1", "--timeout", "5"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), "torchdeq==0.1.0"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired as error:
        raise UnreachableError("the package registry did not answer within a minute") from error
    if run.returncode or not (folder / WHEEL).exists():
        last = (run.stderr.strip() or "it gave another file").splitlines()[-1]
        raise UnreachableError(f"torchdeq 0.1.0 cannot be downloaded: {last}")


@functools.cache
def folder_for(name: str) -> Path:
    """A folder that holds 0.1.0 as a package of this name. Its modules import one another relatively."""
    source, folder = wheel(), CACHE / f"as-{name}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            with zipfile.ZipFile(source) as archive:
                archive.extractall(scratch, [n for n in archive.namelist() if n.startswith("torchdeq/")])
            fresh = Path(scratch) / "fresh"
            fresh.mkdir()
            (Path(scratch) / "torchdeq").rename(fresh / name)
            try:
                fresh.rename(folder)
            except OSError:
                if not folder.exists():  # else another process was faster
                    raise
    return folder


@functools.cache
def peer() -> ModuleType:
    """The package `torchdeq_peer` with all its modules.

    Raises:
        UnreachableError: there is no wheel and no registry.
    """
    path = str(folder_for(NAME))
    if path not in sys.path:
        sys.path.append(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its docstrings have invalid escapes, which the compiler warns of
        package = importlib.import_module(NAME)
        for module in MODULES:
            importlib.import_module(f"{NAME}.{module}")
    return package


#: The modules of 0.1.0.
MODULES = (
    "core", "dropout", "grad", "loss", "loss.correction", "loss.jacobian", "norm", "norm.base_norm",
    "norm.spectral_norm", "norm.weight_norm", "solver", "solver.anderson", "solver.broyden", "solver.fp_iter",
    "solver.stat", "solver.utils", "utils", "utils.arg_utils", "utils.config", "utils.init", "utils.layer_utils",
    "utils.mem",
)  # fmt: skip
