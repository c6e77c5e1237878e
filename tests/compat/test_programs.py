"""Whole programs in the form of 0.1.0's users, run unchanged under both versions.

They train in double precision, from one seed, with solves that go to rounding, so that each step of the optimiser sees
the same gradient. Then the losses agree, and so do the parameters at the end.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.compat.peer import folder_for

PROGRAMS = Path(__file__).parent / "programs"
TIGHT = ["--double", "--f_tol", "1e-12", "--f_max_iter", "400", "--b_tol", "1e-12", "--b_max_iter", "400"]
RUNS: dict[str, tuple[str, str]] = {
    "one state": ("classifier", "--ift"),
    "states and correction": ("classifier", "--n_states 4 --grad 1 --gamma 0.7 --ift"),
    "phantom gradients": ("classifier", "--grad 3 --tau 0.8 --sup_gap 1"),
    "no learned scale": ("classifier", "--ift --norm_no_scale --norm_target_norm 0.6 --norm_clip"),
    "two resolutions": ("multiscale", "--ift --tau 0.9"),
    "two resolutions, hook": ("multiscale", "--hook_ift --n_states 2 --b_solver broyden"),
    "a transformer": ("sequence", "--ift --jac_loss_weight 0.5 --jac_loss_freq 0.7"),
    "a transformer, states": ("sequence", "--n_states 3 --grad 2 --dropout 0.4"),
}
DEFAULTS: list[tuple[str, str]] = [
    ("classifier", ""),
    (
        "classifier",
        "--norm_type spectral_norm --f_solver anderson --b_solver anderson --ift --core indexing --n_states 2",
    ),
    ("classifier", "--f_solver simple_fixed_point_iter --f_max_iter 12 --grad 3 --sup_gap 1"),
    ("multiscale", "--f_solver broyden --hook_ift --tau 0.7"),
    ("multiscale", "--norm_type none --f_solver anderson --grad 2 --tau 0.6"),
    ("sequence", "--jac_loss_weight 0.5 --jac_loss_freq 1 --n_states 2"),
]

#: Runs the programs that are named on standard input, one after the other, and prints what they return.
DRIVER = """
import importlib, json, sys
runs = json.load(sys.stdin)
print(json.dumps({name: importlib.import_module(program).main(words) for name, (program, words) in runs.items()}))
"""


def words(options: str, steps: int) -> list[str]:
    return [*TIGHT, "--steps", str(steps), *options.split()]


@pytest.fixture(scope="module")
def under_0_1_0(old: Any) -> dict[str, Any]:
    """What the programs give when `import torchdeq` is 0.1.0: one process for all, as importing torch takes longest."""
    runs = {name: (program, words(options, 5)) for name, (program, options) in RUNS.items()}
    path = os.pathsep.join([str(folder_for("torchdeq")), str(PROGRAMS)])
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DRIVER],
        input=json.dumps(runs),
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(autouse=True)
def _default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


def ours(program: str, argv: list[str]) -> dict[str, Any]:
    return importlib.import_module(f"tests.compat.programs.{program}").main(argv)


@pytest.mark.parametrize("name", RUNS)
def test_a_program_trains_alike(under_0_1_0, name):
    program, options = RUNS[name]
    got, want = ours(program, words(options, 5)), under_0_1_0[name]
    assert max(got["residuals"]) < 1e-10
    assert max(want["residuals"]) < 1e-10
    assert got["states"] == want["states"]
    assert got["losses"] == pytest.approx(want["losses"], rel=1e-8, abs=1e-9)
    assert got["norms"] == pytest.approx(want["norms"], rel=1e-7)
    assert got["losses"][0] != got["losses"][-2], "it trains"


@pytest.mark.filterwarnings("ignore::torchdeq.ConvergenceWarning", "ignore:.*has no use for tau:UserWarning")
@pytest.mark.parametrize(("program", "options"), DEFAULTS, ids=" ".join)
def test_a_program_runs_with_its_usual_tolerances(program, options):
    got = ours(program, ["--steps", "3", *options.split()])
    values = [*got["losses"], *got["residuals"], *got["norms"].values()]
    assert torch.tensor(values).isfinite().all()
    assert got["losses"][0] != got["losses"][-2]


def test_a_program_is_a_script(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sequence.py", "--steps", "1", "--f_solver", "anderson"])
    runpy.run_path(str(PROGRAMS / "sequence.py"), run_name="__main__")
    assert len(json.loads(capsys.readouterr().out)["losses"]) == 3
