"""jaxopt and optimistix behind a pipe: their environment, made once, and the process that works in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from layers import Step
from peers import CACHE
from timing import Turn

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "requirements-jax.txt"

#: One thread, as torch has in this process; and jaxopt need not say that it is no longer maintained.
ENVIRONMENT = {
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    "NPROC": "1",
    "OMP_NUM_THREADS": "1",
    "JAX_PLATFORMS": "cpu",
    "PYTHONWARNINGS": "ignore",
}


class JaxError(RuntimeError):
    """There is no environment with jax, or a request to the process in it failed."""


def python_with_jax(given: Path | None = None) -> Path:
    """The interpreter of an environment with jax: the one that is given, or that of `.cache/env-jax`.

    That one is made with the packages of requirements-jax.txt, which takes a minute and a network, and again when they
    have changed. Nothing is installed elsewhere.

    Raises:
        JaxError: it cannot be made.
    """
    if given is not None:
        if not given.is_file():
            raise JaxError(f"--jax-python {given}: there is no such file")
        return given
    home = CACHE / "env-jax"
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    wanted, ready = REQUIREMENTS.read_text(encoding="utf-8"), home / "ready.txt"
    if python.is_file() and ready.is_file() and ready.read_text(encoding="utf-8") == wanted:
        return python
    CACHE.mkdir(exist_ok=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _call([sys.executable, "-m", "venv", "--clear", home], "making an environment for jax")
    _call([*pip, "--retries", "1", "--requirement", REQUIREMENTS], "installing jax")
    ready.write_text(wanted, encoding="utf-8")
    return python


def _call(command: Sequence[str | Path], what: str) -> None:
    try:
        run = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=900)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise JaxError(f"{what} failed: {error}") from error
    if run.returncode:
        last = (run.stderr.strip() or run.stdout.strip() or "no reason given").splitlines()[-1]
        raise JaxError(f"{what} failed: {last}")


class JaxPeer:
    """The process, and what it can do. A context manager that ends it.

    Arguments:
        python: an interpreter with jax, jaxopt and optimistix.

    Raises:
        JaxError: it does not start.
    """

    def __init__(self, python: Path):
        self.process = subprocess.Popen(
            [str(python), str(HERE / "jax_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | ENVIRONMENT,
        )
        self.folder = tempfile.TemporaryDirectory()
        try:
            said = self.ask("hello")
        except JaxError:
            self.close()
            raise
        self.versions: dict[str, str] = said["versions"]
        self.settings: dict[str, str] = said["settings"]

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Make a request and wait for the answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError as error:
            raise JaxError(f"the process of jax has ended: {error}") from error
        if not line:
            raise JaxError(
                f"the process of jax has ended with code {self.process.wait()}; to see why, run "
                f"{self.process.args[0]} {self.process.args[1]} by hand"  # type: ignore[index]
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise JaxError(answer["error"])
        return answer

    def prepare(self, step: Step) -> None:
        """Send the data of a training step."""
        path = Path(self.folder.name) / "data.npz"
        np.savez(path, **{name: getattr(step, name).detach().numpy() for name in ("w", "u", "x", "b")})
        self.ask("prepare", file=str(path))

    def residuals(self, step: Step, setting: str, tol: float, b_tol: float) -> tuple[float, float]:
        """Of a step with these tolerances, measured here; see `Step.residuals`."""
        path = Path(self.folder.name) / "result.npz"
        self.ask("step", setting=setting, tol=tol, b_tol=b_tol, file=str(path))
        with np.load(path) as arrays:
            z, c_grad = (torch.from_numpy(arrays[name]) for name in ("z", "c_grad"))
        return step.residuals(z, c_grad, at_image=False)

    def turn(self, setting: str, tol: float, b_tol: float, processor: list[float]) -> Turn:
        """A turn as `timing.clocked` takes it, on the clock of that process; its processor time is noted too, over
        its wall time."""

        def take() -> float:
            answer = self.ask("time", setting=setting, tol=tol, b_tol=b_tol, repeat=2)
            processor.append(answer["cpu"][1] / answer["seconds"][1])
            seconds: float = answer["seconds"][1]
            return seconds

        return take

    def __enter__(self) -> JaxPeer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        if self.process.stdin is not None:
            self.process.stdin.close()  # the end of its input ends it
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.folder.cleanup()
