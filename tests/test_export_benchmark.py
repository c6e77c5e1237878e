"""benchmarks/export.py runs and prints a row for each problem."""

from __future__ import annotations

import pytest

from tests.programs import program


def test_quick_benchmark_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    with program("benchmarks", "export", "matplotlib") as benchmark:
        benchmark.main(["--quick"])
    head, _, row = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert "AOTInductor" in head
    name, evaluations, python, exported, ahead = (cell.strip() for cell in row.strip("|").split("|"))
    assert name == "tanh 4×8"
    assert int(evaluations) > 2
    assert float(python.split()[0]) > 0  # the median; quartiles follow
    assert float(exported.split()[0]) > 0
    assert ahead == "–"
