"""`torchdeq bench` and its programs: they run, and count, measure and fit what they say. Their times are not tested."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import torchdeq
from tests.compat.conftest import old_or_none  # noqa: F401 - the fixture
from torchdeq import DEQ, GMRES, IFT, FixedPointIteration
from torchdeq.cli import bench, main

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
MODULES = (
    "jax_peer",
    "layers",
    "overhead",
    "overhead_report",
    "peers",
    "problems",
    "record",
    "report",
    "scaling",
    "scaling_report",
    "timing",
    "training",
    "training_report",
)


@pytest.fixture(scope="module")
def programs() -> Iterator[Any]:
    """The programs as modules, found as they find their neighbours when they are run."""
    for name in ("matplotlib", "tqdm", "scipy"):
        pytest.importorskip(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        for name in MODULES:
            patch.delitem(sys.modules, name, raising=False)
        yield {name: importlib.import_module(name) for name in MODULES}
        for name in MODULES:
            sys.modules.pop(name, None)


# The command ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Instead of running programs, what would have been run."""
    seen: list[list[str]] = []

    def record(command: list[str]) -> subprocess.CompletedProcess[str]:
        seen.append([Path(command[1]).stem, *command[2:]])
        return subprocess.CompletedProcess(command, 3 if "fails" in command else 0)

    monkeypatch.setattr(bench.subprocess, "run", record)
    return seen


def test_the_command_runs_every_study_or_those_that_are_named(ran: list[list[str]]) -> None:
    assert main(["bench"]) == 0
    assert ran == [["overhead"], ["training"], ["scaling"]]
    ran.clear()
    assert main(["bench", "scaling", "--redraw"]) == 0
    assert ran == [["scaling", "--redraw"]]


def test_every_option_goes_to_the_programs_that_have_it(ran: list[list[str]], tmp_path: Path) -> None:
    wheel, python = tmp_path / "a.whl", tmp_path / "python"
    wheel.touch()
    python.touch()
    options = ["--quick", "--out", "here", "--no-compile", "--peers", str(wheel), "--jax-python", str(python)]
    assert main(["bench", *options]) == 0
    common, peers, jax = options[:3], options[3:6], options[6:]
    assert ran == [
        ["overhead", *common, *peers],
        ["training", *common, *peers, *jax],
        ["scaling", *common],
    ]


def test_a_program_that_fails_ends_the_command_with_its_code(
    ran: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--out", "fails"]) == 3
    assert len(ran) == 1
    assert "overhead ended with code 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["speed"], "there is no such study; expected overhead, training, scaling"),
        (["--quick", "--redraw"], "give one of them"),
        (["--peers", "absent.whl"], "--peers absent.whl: there is no such file"),
        (["--jax-python", "absent"], "--jax-python absent: there is no such file"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(
    options: list[str], says: str, ran: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *options]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not ran


def test_outside_of_a_checkout_the_command_says_where_the_benchmarks_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torchdeq, "__file__", str(tmp_path / "site-packages" / "torchdeq" / "__init__.py"))
    assert main(["bench"]) == 2
    assert "part of the repository and not of the installed package" in capsys.readouterr().err


def test_a_quick_run_of_everything_writes_reports_plots_and_numbers(
    programs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = subprocess.run

    def here(command: list[str], **options: Any) -> subprocess.CompletedProcess[Any]:
        if Path(command[1]).parent != BENCHMARKS:  # git, which tells the commit
            return process(command, **options)
        threads = torch.get_num_threads()  # a process would import torch again
        try:
            programs[Path(command[1]).stem].main(command[2:])
        finally:
            torch.set_num_threads(threads)
        return subprocess.CompletedProcess(command, 0)

    with monkeypatch.context() as patch:
        patch.setattr(bench.subprocess, "run", here)
        assert main(["bench", "--quick", "--out", str(tmp_path)]) == 0
    text = {}
    for name in bench.STUDIES:
        text[name] = (tmp_path / f"{name}.md").read_text(encoding="utf-8")
        assert "![" in text[name]
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
        json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
    for solver in ("Picard", "Anderson", "Broyden"):
        assert text["overhead"].count(f"| {solver} ") >= 2 * (2 + 1)  # two layers, forward twice and backward
        assert f"| ours {solver} " in text["training"]
    for solver in ("Picard", "Anderson", "Broyden", "Multisecant", "GMRES"):
        assert f"| {solver} " in text["scaling"]
    assert "missing: torchdeq 0.1.0: --quick" in text["overhead"]
    # As a process, from the numbers that are there.
    (tmp_path / "overhead.md").unlink()
    assert main(["bench", "overhead", "--redraw", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "overhead.md").read_text(encoding="utf-8") == text["overhead"]


# What they share -----------------------------------------------------------------------------------------------------


def test_contenders_take_one_turn_in_each_round_in_an_order_that_changes(programs: Any) -> None:
    turns: list[str] = []

    def turn(name: str) -> Any:
        def take() -> float:
            turns.append(name)
            return float(len(turns))

        return take

    seconds = programs["timing"].take_turns({name: turn(name) for name in "abc"}, 6, "test", warm=1)
    rounds = [turns[i : i + 3] for i in range(0, len(turns), 3)]
    assert len(rounds) == 7
    assert all(sorted(one) == list("abc") for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1
    counted = sorted(one for times in seconds.values() for one in times)
    assert counted == [float(i) for i in range(4, 22)]  # those of the first round do not count


def test_a_ratio_is_that_of_times_of_the_same_round(programs: Any) -> None:
    ratios = programs["timing"].ratios
    assert ratios([2.0, 20.0, 200.0], [1.0, 10.0, 100.0]) == (2.0, 2.0, 2.0)
    assert ratios([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5) == (2.0, 3.0, 4.0)


def test_an_action_is_timed_without_what_prepares_it(programs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(programs["timing"].time, "perf_counter", lambda: clock[0])

    def wait(seconds: float) -> None:
        clock[0] += seconds

    def prepare() -> Any:
        wait(100.0)
        return lambda: wait(1.5)

    assert programs["timing"].clocked(prepare)() == 1.5


def test_operations_are_counted(programs: Any) -> None:
    x = torch.ones(3)
    assert programs["timing"].operations(lambda: (x + x).exp()) == 2


def test_numbers_come_back_as_they_were_saved(programs: Any, tmp_path: Path) -> None:
    results = {"rows": [{"a": [1.5, 2.5], "b": None, "text": "[1, 2]"}], "circumstances": ["- a", "- b"]}
    programs["timing"].save(tmp_path / "x.json", results)
    assert programs["timing"].load(tmp_path / "x.json") == results
    with pytest.raises(SystemExit, match="run without --redraw first"):
        programs["timing"].load(tmp_path / "y.json")


# Overhead ------------------------------------------------------------------------------------------------------------


def test_calls_of_f_and_products_are_counted_from_outside(programs: Any) -> None:
    calls = programs["overhead"].Calls(programs["layers"].dense(2, 8))
    deq = DEQ(FixedPointIteration(max_iter=7, tol=math.inf, min_iter=7), IFT(solver=GMRES(tol=1e-5)))
    seen: list[int] = []
    deq.on_backward = lambda solution: seen.append(solution.nfe)
    z = deq(calls, torch.zeros(2, 8))[0]
    assert (calls.forward, calls.backward) == (7 + 1, 0)
    z.sum().backward()
    assert calls.forward == 7 + 1 + 1
    assert [calls.backward] == seen


def test_every_contender_makes_the_same_iterations(programs: Any, old_or_none: ModuleType | None) -> None:  # noqa: F811
    overhead, layer = programs["overhead"], programs["layers"].dense(2, 40)
    with pytest.warns(torchdeq.ConvergenceWarning):
        rows = {
            contender.name: overhead.account(contender, layer, backward=backward)
            for backward, found in (
                (False, overhead.forward_contenders),
                (True, overhead.backward_contenders),
            )
            for contender in found(layer, old_or_none)
        }
    for name, row in rows.items():
        # 0.1.0's Broyden makes one more. Ours may measure a mixture, and look if f couples samples.
        assert 20 <= row["calls"] <= 26, name
        if row["operations"] is not None:
            assert row["operations"] > 0, name
    assert ("Picard, 0.1.0" in rows) == (old_or_none is not None)


def test_an_iteration_more_is_charged_with_its_own_operations_only(programs: Any) -> None:
    overhead, layer = programs["overhead"], programs["layers"].dense(2, 40)

    def make(f: Any, k: int) -> Any:
        def solve() -> None:
            z = layer.solution.exp()  # what a solve does once is not counted
            for _ in range(k):
                z = f(z).neg().neg()

        return solve

    contender = overhead.Contender("Picard", "ours", make)
    row = overhead.account(contender, layer, backward=False)
    assert (row["calls"], row["operations"]) == (20, 2.0)


@pytest.mark.parametrize("backward", [False, True])
def test_a_compiled_solve_is_counted_as_it_says_and_one_that_fails_is_named(
    programs: Any, monkeypatch: pytest.MonkeyPatch, backward: bool
) -> None:
    overhead, layer = programs["overhead"], programs["layers"].dense(2, 40)
    contenders = overhead.backward_contenders if backward else overhead.forward_contenders
    monkeypatch.setitem(overhead.MODULES, "ours, compiled", {"compile": {"backend": "eager"}})
    compiled = next(one for one in contenders(layer, None, compiled=True) if one.compiled)

    def fails(f: Any, k: int) -> Any:
        raise RuntimeError("no such\nbackend")

    broken = overhead.Contender("Anderson", "ours, compiled", fails)
    # What inductor makes of f alone takes long to make, and is not looked at here.
    monkeypatch.setattr(overhead, "compiled_turn", lambda layer: lambda: 1e-6)
    with pytest.warns(torchdeq.ConvergenceWarning):
        case = overhead.measure(layer, [compiled, broken], 2, backward=backward)
    assert ("f, compiled" in case["pure"]) == (not backward)
    assert case["failed"] == {"Anderson, ours, compiled": "RuntimeError: no such"}
    (row,) = case["rows"]
    assert 20 <= row["calls"] <= 26
    assert row["first"] > 0
    assert len(row["seconds"]) == 2
    assert row["overhead"] > 0
    assert row["overhead (best)"] > 0


def test_the_best_overhead_is_that_of_the_shortest_times(programs: Any) -> None:
    report = programs["overhead_report"]
    pure = {"f": [1.0, 2.0, 4.0], "product": [5.0, 3.0, 6.0], "parameters": [7.0, 9.0, 8.0]}
    row = {"calls": 10, "seconds": [60.0, 30.0, 80.0]}
    assert report.best({"backward": False, "pure": pure}, row) == 30.0 / (10 * 1.0)
    assert report.overhead({"backward": False, "pure": pure}, row).middle == 80.0 / (10 * 4.0)
    assert report.best({"backward": True, "pure": pure}, row) == 30.0 / (10 * 3.0 + 1.0 + 7.0)


def test_the_peer_solves_without_recording_a_graph(programs: Any, old_or_none: ModuleType | None) -> None:  # noqa: F811
    if old_or_none is None:
        pytest.skip("torchdeq 0.1.0 is not there")
    layer = programs["layers"].dense(2, 8)
    modes: list[bool] = []

    def f(z: torch.Tensor) -> torch.Tensor:
        modes.append(torch.is_grad_enabled())
        return layer(z)

    for contender in programs["overhead"].forward_contenders(layer, old_or_none):
        if contender.who == "0.1.0":
            contender.make(f, 3)()
    assert modes
    assert not any(modes)


def test_goals_that_are_missed_are_named(programs: Any) -> None:
    report = programs["overhead_report"]
    pure = {"f": [1.0] * 3, "product": [2.0] * 3, "parameters": [3.0] * 3}

    def case(backward: bool, *rows: tuple[str, str, float]) -> dict[str, Any]:
        made = [
            {"solver": s, "who": who, "calls": 10, "seconds": [t] * 3, "operations": None, "first": None}
            for s, who, t in rows
        ]
        return {"case": "tanh 32×512", "backward": backward, "pure": pure, "rows": made}

    cases = [
        case(False, ("Picard", "0.1.0", 99.0), ("Picard", "ours", 12.9), ("Picard", "ours, compiled", 11.1)),
        case(True, ("Anderson", "ours, DEQ", 24 * 1.61), ("GMRES", "ours, DEQ", 999.0)),
    ]
    assert list(report.missed({"cases": cases})) == [
        "tanh 32×512, forward, Picard, ours, compiled: 1.11, goal 1.1",
        "tanh 32×512, backward, Anderson, ours, DEQ: 1.61, goal 1.6",
    ]


# Training ------------------------------------------------------------------------------------------------------------


def exact(step: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """z and the gradient by the injection, in float64 by Newton's method and a dense solve, for one sample."""
    w, c = step.w.detach().double(), step.injection.detach().double()
    z = torch.zeros_like(c)
    eye = torch.eye(len(w), dtype=torch.float64)
    for _ in range(30):
        fz = torch.tanh(z @ w.T + c)
        j = (1 - fz**2)[:, :, None] * w
        z = z + torch.linalg.solve(eye - j, fz - z)
    slope = 1 - z**2
    u = torch.linalg.solve((eye - slope[:, :, None] * w).mT, 2 * z / z.numel())
    return z, slope * u


@pytest.mark.parametrize("at_image", [True, False])
def test_residuals_are_those_of_the_solution_and_of_the_adjoint_solution(
    programs: Any, at_image: bool
) -> None:
    step = programs["layers"].Step.make(3, 6)
    z, c_grad = exact(step)
    forward, adjoint = step.residuals(z, c_grad, at_image=at_image)
    assert forward < 1e-12
    assert adjoint < 1e-12
    off = torch.zeros_like(z)
    off[1, 2] = 1e-3  # of one sample only: the worst one counts
    w = step.w.detach().double()
    fz = torch.tanh((z + off) @ w.T + step.injection.detach().double())
    wanted = ((fz - z - off).norm(dim=1) / fz.norm(dim=1))[1]
    assert step.residuals(z + off, c_grad, at_image=at_image)[0] == pytest.approx(float(wanted), rel=1e-6)
    # u is off by off / slope, and g − (I − Jᵀ)u by that less its product with Jᵀ.
    g = 2 * z / z.numel()
    wanted = ((off / (1 - z**2) - off @ w).norm(dim=1) / g.norm(dim=1))[1]
    assert step.residuals(z, c_grad + off, at_image=at_image)[1] == pytest.approx(float(wanted), rel=1e-6)


def test_the_loosest_tolerance_is_found_and_a_breakdown_is_none(programs: Any) -> None:
    training, error = programs["training"], programs["jax_peer"].JaxError

    def reached(tol: float) -> float:
        if tol < 1e-7:
            raise error("broke down")
        if 4e-4 < tol < 5e-4:  # which the bisection looks at
            raise error("broke down")
        return 1e-5 if tol <= 3e-4 else 1.0

    assert 2.8e-4 < training.loosest(reached) <= 3e-4
    with pytest.raises(error, match="does not reach 1e-05"):
        training.loosest(lambda tol: 1.0)


def test_every_setting_of_ours_reaches_what_is_asked_for(programs: Any) -> None:
    training, step = programs["training"], programs["layers"].Step.make(2, 16)
    rows: list[dict[str, Any]] = []
    for setting in training.settings(None, None):
        rows.append(training.account(step, setting, None, rows))
    assert {row["name"] for row in rows} >= {"ours Picard", "ours Anderson, GMRES", "ours default"}
    for row in rows:
        assert max(row["reached"]) <= training.GOAL
        assert min(row["reached"]) > 1e-3 * training.GOAL  # and not much more than that


def test_comparisons_name_what_is_missed(programs: Any) -> None:
    report = programs["training_report"]

    def row(name: str, group: str, seconds: float) -> dict[str, Any]:
        return {"name": name, "group": group, "seconds": [seconds] * 3, "slow": False}

    rows = [
        row("0.1.0 Picard", "0.1.0", 10.0),
        row("ours Picard", "ours", 3.0),
        row("ours default", "ours", 11.0),
        row("jaxopt FPI", "jaxopt", 1.0),
    ]
    found = {
        one.what: (one.ratio.middle, one.met) for one in report.comparisons({"case": "32×64", "rows": rows})
    }
    assert found == {
        "0.1.0 Picard / ours Picard": (10 / 3, True),
        "ours Picard / jaxopt FPI": (3.0, True),
        "ours default / 0.1.0 Picard": (1.1, False),
    }


# The process of jax --------------------------------------------------------------------------------------------------


def test_a_process_that_does_not_start_is_an_error(
    programs: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    jax_peer = programs["jax_peer"]
    monkeypatch.setattr(jax_peer, "HERE", tmp_path)
    (tmp_path / "jax_worker.py").write_text("import no_such_module")
    with pytest.raises(jax_peer.JaxError, match="has ended"):
        jax_peer.JaxPeer(Path(sys.executable))


def test_an_environment_that_cannot_be_made_says_why(
    programs: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    jax_peer = programs["jax_peer"]
    monkeypatch.setattr(jax_peer, "CACHE", tmp_path / "cache")

    def offline(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(
            command, int("pip" in command), "", "retrying\nERROR: no network\n"
        )

    monkeypatch.setattr(jax_peer.subprocess, "run", offline)
    with pytest.raises(jax_peer.JaxError, match="installing jax failed: ERROR: no network"):
        jax_peer.python_with_jax()
    with pytest.raises(jax_peer.JaxError, match="there is no such file"):
        jax_peer.python_with_jax(tmp_path / "python")


def test_jax_takes_the_same_step(programs: Any) -> None:
    jax_peer, step = programs["jax_peer"], programs["layers"].Step.make(2, 8)
    python = jax_peer.CACHE / "env-jax" / "bin" / "python"
    if not python.is_file():
        pytest.skip("the environment with jax has not been made; a run of benchmarks/training.py makes it")
    with jax_peer.JaxPeer(python) as peer:
        peer.prepare(step)
        forward, adjoint = peer.residuals(step, "jaxopt FPI, BiCGSTAB", 1e-6, 1e-6)
        assert forward < 1e-5
        assert adjoint < 1e-5
        processor: list[float] = []
        assert peer.turn("jaxopt FPI, BiCGSTAB", 1e-6, 1e-6, processor)() > 0
        assert len(processor) == 1
        with pytest.raises(jax_peer.JaxError, match="KeyError"):
            peer.residuals(step, "no such setting", 1e-6, 1e-6)


# Scaling -------------------------------------------------------------------------------------------------------------


def test_the_fit_finds_the_coefficients_that_made_the_numbers(programs: Any) -> None:
    report, scaling = programs["scaling_report"], programs["scaling"]
    wanted = dict(zip(report.TERMS, (3e-5, 1e-5, 2e-9, 0.0, 4e-9, 1e-10), strict=True))
    rows = []
    for cell in scaling.cells(quick=False):
        if cell.solver == "Anderson":
            row = cell._asdict() | {"history": cell.history, "small": cell.small}
            row["beyond"] = sum(value * report.TERMS[name](row) for name, value in wanted.items())
            rows.append(row | {"solve": row["beyond"]})
    found, error = report.fit(
        [[term(r) for term in report.TERMS.values()] for r in rows], [r["beyond"] for r in rows]
    )
    assert found == pytest.approx(list(wanted.values()), rel=1e-6, abs=1e-16)
    assert max(error) < 1e-6


def test_the_size_from_which_a_solver_does_not_matter(programs: Any) -> None:
    report = programs["scaling_report"]
    model = report.Model({"an evaluation": 1e-4}, (0.0, 0.0))
    layer = report.LayerModel((0.0, 0.0, 1e-10, 0.0), (0.0, 0.0))
    row = {"batch": 1, "iterations": 20, "history": 0.0, "small": 0.0}
    # 1e-4 ≤ share · 1e-10 D² from D = 1000 / √share on.
    for share in (0.5, 0.1):
        edge = 1000 / share**0.5
        assert edge <= report.vanishes(model, layer, row, share) <= 2**0.25 * edge
    never = report.Model({"h·B·D": 1.0}, (0.0, 0.0))
    assert report.vanishes(never, layer, row | {"history": 1.0}, 0.1) == math.inf


@pytest.mark.parametrize("solver", ["Picard", "Anderson", "Broyden", "Multisecant", "GMRES"])
def test_a_solve_of_the_study_makes_all_its_evaluations(programs: Any, solver: str) -> None:
    cell = programs["scaling"].Cell(solver, 5 if solver == "Anderson" else None, 4, 128, 50)
    with torch.no_grad():
        assert 50 <= cell.solve()() <= 51  # one more to measure a mixture of samples


def test_the_history_of_a_cell_is_its_mean_over_the_iterations(programs: Any) -> None:
    cell = programs["scaling"].Cell("Anderson", 2, 1, 8, 4)
    assert cell.history == (0 + 1 + 2 + 2) / 4
    assert cell.small == (0 + 1 + 8 + 8) / 4
    assert cell._replace(solver="Picard").history == 0
