"""What the studies share: quick runs say nothing, options are told of, wrong ones end a study before it begins."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch


@pytest.fixture
def small(study: ModuleType) -> Any:
    """A study that measures 2 for seed 0, 3 for seed 1 and so on, and counts how often it is asked."""
    asked: list[int] = []

    def measure(options: Any, progress: Any) -> dict[str, Any]:
        asked.append(options.seed)
        return {"two": 2.0 + options.seed}

    claim = study.Claim(
        text="a claim", paper="2", ours=lambda r: r["two"].cell(1), shows=lambda r: r["two"].mean > 1
    )
    made = study.Study(
        name="small",
        title="Small?",
        source="Nobody (2026)",
        replaces="--grad is in the place of nothing.",
        smaller=["all"],
        claims=[claim],
        measure=measure,
        tables=lambda r: [],
        draw=lambda figure, found: figure.subplots(),
    )
    return SimpleNamespace(study=made, asked=asked)


def report(small: Any, folder: Path, *words: str) -> str:
    assert small.study.main([*words, "--out", str(folder)]) == 0
    return (folder / "small.md").read_text()


def test_a_claim_is_judged_over_the_seeds(small: Any, tmp_path: Path) -> None:
    text = report(small, tmp_path, "--seeds", "0", "1")
    assert "| a claim | 2     | 2.5 (2.0–3.0) | yes         |" in text
    assert "seeds 0, 1: the mean, and the smallest and largest" in text
    assert small.asked == [0, 1]


def test_a_quick_run_says_nothing_and_stays_apart(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert small.study.main(["--quick"]) == 0
    text = (tmp_path / "runs" / "quick" / "small.md").read_text()
    assert "| quick       |" in text
    assert "| yes" not in text
    assert "Its numbers, of tiny sizes, say nothing" in text
    assert not (tmp_path / "runs" / "small.md").exists()


def test_what_an_option_replaces_is_told(small: Any, tmp_path: Path) -> None:
    assert "**With --grad jfb.** --grad is in the place of nothing." in report(
        small, tmp_path, "--grad", "jfb"
    )
    assert "**With" not in report(small, tmp_path)


@pytest.mark.parametrize("words", [["--solver", "cg"], ["--grad", "nosuch"], ["--device", "nosuch"]])
def test_what_cannot_be_used_is_refused_before_anything_is_measured(
    small: Any, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        small.study.main(words)
    assert f"argument {words[0]}" in capsys.readouterr().err
    assert not small.asked


def test_a_folder_that_cannot_be_made_is_an_error_before_anything_is_measured(
    small: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        small.study.main(["--out", str(tmp_path / "file" / "folder")])
    assert not small.asked


def test_a_device_that_is_there_can_be_used(study: ModuleType) -> None:
    assert study.usable("cpu") == torch.device("cpu")
    with pytest.raises(argparse.ArgumentTypeError, match="'nosuch' cannot be used"):
        study.usable("nosuch")


def test_peaks_are_what_is_allocated_at_a_time(study: ModuleType) -> None:
    def allocate(count: int) -> None:
        kept = [torch.ones(2**18) for _ in range(count)]  # 1 MiB each
        del kept
        torch.ones(2**18)  # not at the same time

    one, three = study.peaks([lambda: allocate(1), lambda: allocate(3)], torch.device("cpu"))
    assert one == pytest.approx(1, abs=0.05)
    assert three == pytest.approx(3, abs=0.05)


@pytest.mark.parametrize(
    ("gains", "good"),
    [
        ([-0.2], True),
        ([-0.6], False),
        ([-0.4, -0.3, -0.2], False),
        ([-0.4, 0.1, -0.2], True),
        ([-2.0, 0.1], False),
    ],
)
def test_as_good_is_near_in_the_mean_and_not_worse_for_every_seed(
    study: ModuleType, gains: list[float], good: bool
) -> None:
    assert importlib.import_module("classifier").as_good(study.Spread(gains)) is good
