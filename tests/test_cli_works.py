"""`torchdeq train WORK` runs the study of the checkout with the options it was given, and says so if there is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import torchdeq
from torchdeq.cli import main
from torchdeq.cli.works import WORKS

ROOT = Path(__file__).parent.parent


def test_each_work_has_a_study() -> None:
    shared = {"study", "forces", "classifier"}
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} - shared == set(WORKS)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that would have been run."""
    commands: list[list[str]] = []

    def run(words: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(list(words))
        return subprocess.CompletedProcess(words, 3)

    monkeypatch.setattr("torchdeq.cli.works.subprocess.run", run)
    return commands


def test_options_are_handed_on_and_so_is_the_exit_code(ran: list[list[str]]) -> None:
    words = ["--seeds", "0", "1", "--quick", "--grad", "jfb", "--out", "somewhere"]
    assert main(["train", "rbp", *words]) == 3
    (command,) = ran
    assert command[:2] == [sys.executable, str(ROOT / "examples" / "rbp.py")]
    assert sorted(command[2:]) == sorted(words)


def test_one_seed_or_several(ran: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "jfb", "--seed", "1", "--seeds", "2"]) == 2
    assert "give one of them" in capsys.readouterr().err
    assert not ran


def test_without_the_repository_it_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ran: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torchdeq, "__file__", str(tmp_path / "torchdeq" / "__init__.py"))
    assert main(["train", "lm"]) == 2
    assert "Clone the repository" in capsys.readouterr().err
    assert not ran


def test_a_package_that_is_missing_is_named_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, ran: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert main(["train", "rbp"]) == 2
    assert (
        'needs sklearn, which cannot be imported (it is not installed). Install it with: pip install "torchdeq['
        in (capsys.readouterr().err)
    )
    assert not ran
