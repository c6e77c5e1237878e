"""benchmarks/tracked.py runs, prints a row for each layer, and writes only where it is told to."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_quick_benchmark_prints_and_writes_a_table(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        before = set(sys.modules)
        benchmark = importlib.import_module("tracked")
        threads = torch.get_num_threads()
        benchmark.main(["--quick", "--out", str(tmp_path)])
        torch.set_num_threads(threads)
        for name in set(sys.modules) - before:
            if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]
    _, _, row = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    name, plain, compiled, ratio = (cell.strip() for cell in row.strip("|").split("|"))
    assert name == "tanh 4×8"
    assert min(float(cell.split()[0]) for cell in (plain, compiled, ratio)) > 0  # medians; quartiles follow
    assert row in (tmp_path / "tracked.md").read_text()
