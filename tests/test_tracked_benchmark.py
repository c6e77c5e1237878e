"""benchmarks/tracked.py runs, prints a row for each layer, and writes only where it is told to."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.programs import program


def test_quick_benchmark_prints_and_writes_a_table(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with program("benchmarks", "tracked", "matplotlib") as benchmark:
        benchmark.main(["--quick", "--out", str(tmp_path)])
    _, _, row = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    name, plain, compiled, ratio = (cell.strip() for cell in row.strip("|").split("|"))
    assert name == "tanh 4×8"
    assert min(float(cell.split()[0]) for cell in (plain, compiled, ratio)) > 0  # medians; quartiles follow
    assert row in (tmp_path / "tracked.md").read_text()
