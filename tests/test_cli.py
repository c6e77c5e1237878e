"""The command line: what it offers, that every option matters, that a run can be killed, and what it leaves."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import torchdeq.cli.train
from torchdeq.cli import main
from torchdeq.cli.config import TrainConfig
from torchdeq.cli.folder import RunFolder
from torchdeq.cli.loop import Run
from torchdeq.cli.progress import ProgressBar
from torchdeq.cli.tasks import TASKS
from torchdeq.zoo.digits import DigitsDEQ

#: A run that is over in a second: two epochs of two steps on a small model.
SMALL = ["--epochs", "2", "--batch-size", "512", "--channels", "4"]


def train(*options: str | Path) -> int:
    return main(["train", "digits", *map(str, options)])


def state_of(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(folder / "state.pt", weights_only=True)
    return state


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was not interrupted."""
    folder = tmp_path_factory.mktemp("run") / "straight"
    assert train(*SMALL, "--out", folder) == 0
    return folder


@pytest.fixture
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the table and the picture, which take seconds, where only the training matters."""
    monkeypatch.setattr(torchdeq.cli.train, "report", lambda training, folder: None)


# What it offers --------------------------------------------------------------------------------------------


def test_help_shows_every_option_and_every_choice(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--help") == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in text
    for name in (*torchdeq.SOLVERS, *torchdeq.GRADS, "--out", "--resume", "--overwrite"):
        assert name in text


def test_a_solver_that_is_registered_is_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(torchdeq.SOLVERS, "damped", torchdeq.FixedPointIteration(tau=0.5))
    config = TrainConfig.from_options({"solver": "damped", "adjoint_solver": "damped"})
    assert config.forward_solver() == torchdeq.FixedPointIteration(
        tau=0.5, tol=1e-2, max_iter=40, stop_mode="rel"
    )


def test_a_solver_of_affine_maps_is_no_forward_solver(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--solver", "gmres") == 2
    assert "invalid choice: 'gmres'" in capsys.readouterr().err


def test_the_command_without_arguments_says_what_it_wants(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "COMMAND" in capsys.readouterr().err


# Every option matters --------------------------------------------------------------------------------------

LAYER: Callable[[TrainConfig], Any] = lambda config: repr(config.deq())  # noqa: E731
STEPS: Callable[[TrainConfig], Any] = lambda config: Run(TASKS["digits"], config).schedule.total_steps  # noqa: E731


def first_order(config: TrainConfig) -> list[int]:
    run = Run(TASKS["digits"], config)
    return torch.randperm(10, generator=run.generator).tolist()


def weights(config: TrainConfig) -> Tensor:
    return torch.cat([p.detach().flatten() for p in Run(TASKS["digits"], config).model.parameters()])


def threads_of(config: TrainConfig) -> int:
    with torchdeq.cli.train.cpu_threads(config.threads):
        return torch.get_num_threads()


#: For each option: a value, what shows that it is used, and other options it needs.
EFFECTS: dict[str, tuple[Any, Callable[[TrainConfig], Any], dict[str, Any]]] = {
    "solver": ("broyden", LAYER, {}),
    "tol": (1e-4, LAYER, {}),
    "max_iter": (7, LAYER, {}),
    "eval_tol": (1e-5, LAYER, {}),
    "grad": ("phantom", LAYER, {}),
    "adjoint_solver": ("anderson", LAYER, {}),
    "adjoint_tol": (1e-6, LAYER, {}),
    "adjoint_max_iter": (9, LAYER, {}),
    "hook": (True, LAYER, {}),
    "phantom_steps": (2, LAYER, {"grad": "phantom"}),
    "phantom_tau": (0.5, LAYER, {"grad": "phantom"}),
    "epochs": (3, STEPS, {}),
    "batch_size": (100, STEPS, {}),
    "lr": (1e-3, lambda config: Run(TASKS["digits"], config).optimizer.param_groups[0]["max_lr"], {}),
    "channels": (8, lambda config: weights(config).shape, {}),
    "seed": (5, lambda config: (weights(config).sum().item(), first_order(config)), {}),
    "device": ("cpu:0", lambda config: config.torch_device(), {}),
    "threads": (2, lambda config: threads_of(config), {}),
}


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(TrainConfig)])
def test_every_option_changes_what_happens(name: str) -> None:
    value, effect, others = EFFECTS[name]
    default = TrainConfig.from_options(others)
    changed = TrainConfig.from_options({**others, name: value})
    assert effect(default) != effect(changed)
    assert effect(changed) == effect(changed)


def test_the_epochs_of_a_run_use_the_layer_of_its_configuration() -> None:
    config = TrainConfig(solver="fixed_point_iter", eval_tol=5e-3, grad="phantom", batch_size=512, channels=4)
    run = Run(TASKS["digits"], config)
    assert repr(run.model.deq.solver) == repr(config.forward_solver())
    run.train_epoch(lambda means: None)
    assert "vjps" not in run.history[0]
    assert run.evaluate().solution.tol == 5e-3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--grad", "unroll"], "--grad unroll works with --solver fixed_point_iter or"),
        (
            ["--grad", "phantom", "--adjoint-tol", "1e-3"],
            "--adjoint-tol would change nothing with --grad phantom",
        ),
        (["--phantom-steps", "3"], "--phantom-steps would change nothing with --grad ift"),
        (["--grad", "phantom", "--hook"], "it belongs to --grad ift"),
        (["--grad", "phantom", "--phantom-tau", "3"], "the damping tau must lie in (0, 2)"),
        (["--tol", "-1"], "tol must be a number of at least 0"),
        (["--max-iter", "0"], "max_iter counts evaluations of f"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used"),
        (["--device", "toaster"], "--device toaster cannot be used"),
        (["--device", "meta"], "--device meta cannot be used"),
        (["--threads", "0"], "--threads 0: expected at least 1"),
        (["--epochs", "0"], "--epochs 0: expected at least 1"),
        (["--batch-size", "1"], "--batch-size 1: "),
        (["--batch-size", "9999"], "--batch-size 9999: "),
        (["--lr", "0"], "--lr 0.0: expected a positive number"),
        (["--channels", "6"], "multiple of 4"),
        (["--resume", "--overwrite"], "give one of them"),
        (["--overwrite"], "--overwrite needs --out"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(
    options: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train(*options) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.startswith("torchdeq: error: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())  # no folder is left behind


def test_unrolling_runs_with_picard_iteration() -> None:
    assert TrainConfig.from_options({"grad": "unroll", "solver": "fixed_point_iter"}).adjoint_solver is None


def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    real = importlib.import_module

    def without_tqdm(name: str) -> Any:
        if name.startswith("tqdm"):
            raise ModuleNotFoundError("No module named 'tqdm'")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", without_tqdm)
    assert train("--out", tmp_path / "run") == 2
    assert 'pip install "torchdeq[train,viz]"' in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# What a run leaves -----------------------------------------------------------------------------------------


def test_a_run_ends_with_its_accuracy_and_leaves_its_folder(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "model.safetensors").read_bytes()
    assert train("--resume", "--out", finished) == 0  # a finished run is only reported once more
    assert (finished / "model.safetensors").read_bytes() == before
    printed = capsys.readouterr().out
    last = printed.splitlines()[-1]
    assert re.fullmatch(r"test accuracy [01]\.\d{4}", last)
    assert re.search(r"^converged \d+ of 360 test samples to relative 1e-03", printed, re.M)
    for method in ("as trained", "IFT", "phantom", "unrolled"):
        assert re.search(rf"^{method}", printed, re.M)
    assert sorted(p.name for p in finished.iterdir()) == [
        "config.json", "convergence.png", "gradients.md", "metrics.json", "model.safetensors", "state.pt"
    ]  # fmt: skip
    assert (finished / "convergence.png").read_bytes().startswith(b"\x89PNG")

    # The weights alone give the accuracy that was printed.
    model = DigitsDEQ(torchdeq.DEQ(torchdeq.Anderson(tol=1e-3, stop_mode="rel")), channels=4).eval()
    model.load_state_dict(load_file(finished / "model.safetensors"))
    data = TASKS["digits"].load()
    with torch.no_grad():
        accuracy = (model(data.test_x)[0].argmax(dim=1) == data.test_y).double().mean().item()
    assert last == f"test accuracy {accuracy:.4f}"
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["test_accuracy"] == accuracy
    assert len(metrics["epochs"]) == 2
    assert json.loads((finished / "config.json").read_text())["options"]["channels"] == 4


def test_the_split_is_stratified_disjoint_and_always_the_same() -> None:
    data, again = TASKS["digits"].load(), TASKS["digits"].load()
    assert torch.equal(data.test_x, again.test_x)
    assert len(data.train_x) + len(data.test_x) == 1797
    counts = data.test_y.bincount()
    assert int(counts.min()) >= 34
    assert int(counts.max()) <= 38


def test_without_out_every_run_gets_a_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert RunFolder.numbered("digits").path == Path("runs/digits-1")
    (tmp_path / "runs" / "digits-1").mkdir(parents=True)
    (tmp_path / "runs" / "digits-10").mkdir()
    (tmp_path / "runs" / "digits-best").mkdir()
    assert RunFolder.numbered("digits").path == Path("runs/digits-11")


# Killed and resumed ----------------------------------------------------------------------------------------


def kill_in_epoch(epoch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make training end with an exception in the middle of an epoch, as a signal would."""
    real = ProgressBar.step

    def step(bar: ProgressBar, means: dict[str, float]) -> None:
        real(bar, means)
        if bar.epoch == epoch:
            raise KeyboardInterrupt

    monkeypatch.setattr(ProgressBar, "step", step)


@pytest.mark.usefixtures("_no_report")
@pytest.mark.parametrize("epoch", [1, 2])
def test_a_killed_run_resumes_to_the_same_weights_bit_for_bit(
    epoch: int,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        kill_in_epoch(epoch, patch)
        assert train(*SMALL, "--out", tmp_path / "run") == 130
    assert f"--resume --out {tmp_path / 'run'}" in capsys.readouterr().out
    torch.manual_seed(99)  # a new process would be in another state
    assert train("--resume", "--out", tmp_path / "run") == 0
    ours, straight = (
        load_file(tmp_path / "run" / "model.safetensors"),
        load_file(finished / "model.safetensors"),
    )
    assert ours.keys() == straight.keys()
    for name in ours:
        assert torch.equal(ours[name], straight[name]), name


@pytest.mark.usefixtures("_no_report")
def test_without_out_the_newest_run_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        kill_in_epoch(2, patch)
        assert train(*SMALL) == 130
    (tmp_path / "runs" / "digits-2").mkdir()  # holds no run
    assert train("--resume") == 0
    assert "resuming runs/digits-1 after epoch 1 of 2" in capsys.readouterr().out


def test_options_that_contradict_the_run_are_refused(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--resume", "--out", finished, "--epochs", "3") == 2
    assert "--epochs 3 contradicts the run" in capsys.readouterr().err
    assert train("--resume", "--out", finished, "--phantom-tau", "0.5") == 2
    assert "phantom_tau=None" in capsys.readouterr().err


def test_a_folder_without_a_run_cannot_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--resume", "--out", tmp_path) == 2
    assert "holds no run" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert train("--resume") == 2
    assert "there is no run in runs/digits-*" in capsys.readouterr().err


def test_a_run_is_not_overwritten_unless_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.start("digits", TrainConfig(), overwrite=False)
    (folder.path / "state.pt").write_text("of the old run")
    (folder.path / "notes.txt").write_text("the user's own")
    assert train(*SMALL, "--out", folder.path) == 2
    assert "already holds a run" in capsys.readouterr().err
    kill_in_epoch(1, monkeypatch)
    assert train(*SMALL, "--out", folder.path, "--overwrite") == 130
    assert sorted(p.name for p in folder.path.iterdir()) == ["config.json", "notes.txt"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"task": "digits", "options": {"solvr": 1}}'])
def test_a_foreign_configuration_is_refused(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(text)
    assert train("--resume", "--out", tmp_path) == 2
    assert "is not a configuration of this version" in capsys.readouterr().err


def test_a_file_is_old_or_new_but_never_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    folder.write_text("a.txt", "old")

    def dies(path: Path) -> None:
        path.write_text("ne")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        folder.write("a.txt", dies)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            folder.write_text("a.txt", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


# The progress bar ------------------------------------------------------------------------------------------

MEANS = {"loss": 0.1234, "nfe": 5.5, "residual": 8e-3, "vjps": 4.0, "adjoint_residual": 7e-3}


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_the_bar_shows_the_five_numbers(stream: type[io.StringIO]) -> None:
    out = stream()
    with ProgressBar(epochs=2, steps=3, file=out) as bar:
        for _ in range(2):
            for _ in range(3):
                bar.step(MEANS)
            bar.end_epoch(0.99)
    last = out.getvalue().replace("\r", "\n").rstrip("\n").splitlines()[-1]
    assert "100%" in last
    for part in ("loss 0.123", "evals 5.5, residual 8.0e-03", "VJPs 4.0, residual 7.0e-03", "test 0.9900"):
        assert part in last


def test_where_there_is_no_terminal_an_epoch_is_one_line() -> None:
    out = io.StringIO()
    with ProgressBar(epochs=3, steps=50, done=1, file=out) as bar:
        for _ in range(2):
            for _ in range(50):
                bar.step({"loss": 1.0, "nfe": 5, "residual": 1e-3})
            bar.end_epoch(0.9)
    lines = out.getvalue().splitlines()
    assert [re.search(r"epoch \d/\d", line)[0] for line in lines] == ["epoch 2/3", "epoch 3/3"]  # type: ignore[index]
    assert all("no adjoint solve" in line and "\r" not in line for line in lines)


def test_the_package_is_a_command_too() -> None:
    run = subprocess.run([sys.executable, "-m", "torchdeq", "--version"], capture_output=True, text=True)
    assert run.stdout == f"torchdeq {torchdeq.__version__}\n"
