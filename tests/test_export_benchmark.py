"""benchmarks/export.py runs and prints a row for each problem."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_quick_benchmark_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        before = set(sys.modules)
        benchmark = importlib.import_module("export")
        threads = torch.get_num_threads()
        benchmark.main(["--quick"])
        torch.set_num_threads(threads)
        for name in set(sys.modules) - before:
            if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]
    head, _, row = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert "AOTInductor" in head
    name, evaluations, python, program, ahead = (cell.strip() for cell in row.strip("|").split("|"))
    assert name == "tanh 4×8"
    assert int(evaluations) > 2
    assert float(python.split()[0]) > 0  # the median; quartiles follow
    assert float(program.split()[0]) > 0
    assert ahead == "–"
