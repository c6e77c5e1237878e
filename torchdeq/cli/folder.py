"""The folder of a run. Every file in it is complete at any time: it is written beside its place, then moved there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import torchdeq
from torchdeq.cli.config import TrainConfig, flag
from torchdeq.cli.errors import UsageError, need

CONFIG, WEIGHTS, STATE = "config.json", "model.safetensors", "state.pt"
METRICS, TABLE, PLOT = "metrics.json", "gradients.md", "convergence.png"


class RunFolder:
    """Where a run keeps its configuration, weights, state and results.

    Arguments:
        path: the folder. It need not exist.

    Example:
        >>> import tempfile
        >>> folder = RunFolder(Path(tempfile.mkdtemp()))
        >>> folder.holds_run()
        False
    """

    def __init__(self, path: Path):
        self.path = path

    @classmethod
    def numbered(cls, task: str, *, newest: bool = False) -> RunFolder:
        """runs/TASK-1, runs/TASK-2, …: the first free one, or the newest that holds a run.

        Raises:
            UsageError: there is no run yet and the newest is wanted.
        """
        taken = [
            int(p.name.removeprefix(f"{task}-"))
            for p in Path("runs").glob(f"{task}-*")
            if p.name.removeprefix(f"{task}-").isdecimal()
        ]
        if newest:
            taken = [n for n in taken if cls(Path("runs") / f"{task}-{n}").holds_run()]
            if not taken:
                raise UsageError(
                    f"--resume: there is no run in runs/{task}-*. Name its folder with --out, or leave out "
                    f"--resume to start one."
                )
            return cls(Path("runs") / f"{task}-{max(taken)}")
        return cls(Path("runs") / f"{task}-{max(taken, default=0) + 1}")

    def holds_run(self) -> bool:
        """Whether a run was started here."""
        return (self.path / CONFIG).exists()

    def start(self, task: str, config: TrainConfig, *, overwrite: bool) -> None:
        """Make the folder and write the configuration.

        Raises:
            UsageError: it holds a run that is not to be overwritten, or it cannot be written to.
        """
        if self.holds_run() and not overwrite:
            raise UsageError(
                f"{self.path} already holds a run. Continue it with --resume, start over with --overwrite, or "
                f"name another folder with --out."
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # The configuration goes first and comes last: a folder without one holds no run.
            for name in (CONFIG, STATE, WEIGHTS, METRICS, TABLE, PLOT):
                (self.path / name).unlink(missing_ok=True)
            record = {"task": task, "torchdeq": torchdeq.__version__, "torch": torch.__version__}
            self.write_text(CONFIG, json.dumps({**record, "options": config.as_dict()}, indent=2) + "\n")
        except OSError as error:
            raise UsageError(f"--out {self.path}: cannot be written to ({error}).") from error

    def config(self, task: str, given: Mapping[str, Any]) -> TrainConfig:
        """The configuration of the run that is here.

        Raises:
            UsageError: there is no run, it is of another task, or an option contradicts it.
        """
        if not self.holds_run():
            raise UsageError(
                f"--resume: {self.path} holds no run (it has no {CONFIG}). Check --out, or leave out --resume "
                f"to start one."
            )
        try:
            saved = json.loads((self.path / CONFIG).read_text(encoding="utf-8"))
            config = TrainConfig(**saved["options"])
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"--resume: {self.path / CONFIG} is not a configuration of this version of torchdeq ({error})."
            ) from error
        if saved.get("task") != task:
            raise UsageError(f"--resume: {self.path} holds a run of {saved.get('task')!r}, not of {task!r}.")
        for name, value in given.items():
            if getattr(config, name) != value:
                raise UsageError(
                    f"{flag(name)} {value} contradicts the run in {self.path}, which has "
                    f"{name}={getattr(config, name)!r}. Leave it out to resume, or start another run with --out."
                )
        config.check()
        return config

    def save(self, state: dict[str, Any]) -> None:
        """Write the state to go on from, then the weights by themselves.

        The state holds the weights too, so that a run killed between the two goes on from one moment.
        """
        self.write(STATE, lambda path: torch.save(state, path))
        weights = {name: tensor.contiguous() for name, tensor in state["model"].items()}
        self.write(WEIGHTS, lambda path: need("safetensors.torch").save_file(weights, path))

    def load(self) -> dict[str, Any] | None:
        """The last saved state, or None if no epoch was finished."""
        path = self.path / STATE
        if not path.exists():
            return None
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state

    def files(self) -> list[str]:
        """The names of the files of the run."""
        return sorted(p.name for p in self.path.iterdir() if not p.name.startswith("."))

    def write_text(self, name: str, text: str) -> None:
        """Write a text file."""
        self.write(name, lambda path: path.write_text(text, encoding="utf-8"))

    def write(self, name: str, writer: Callable[[Path], Any]) -> None:
        """Let `writer` write a file beside its place, and move it there when it is complete and on the disk."""
        unfinished = self.path / f".{name}.part"
        try:
            writer(unfinished)
            with unfinished.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(unfinished, self.path / name)
        finally:
            unfinished.unlink(missing_ok=True)
