"""The benchmarks run, and count what a `Solution` counts. Their numbers are not tested."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from torchdeq import (
    GRADS,
    JFB,
    Multisecant,
    NeumannPhantom,
    PhantomGrad,
    SimpleFixedPointIteration,
    TruncatedCycle,
    Unroll,
    as_grad,
)

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
MODULES = (
    "allocator",
    "derivatives",
    "gradients",
    "memory",
    "models",
    "peers",
    "problems",
    "record",
    "report",
    "solver_memory",
    "solvers",
    "stability",
)


@pytest.fixture(scope="module")
def bench():
    """benchmarks/solvers.py as a module, found as it finds its neighbours when it is run."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        for name in MODULES:
            patch.delitem(sys.modules, name, raising=False)
        import solvers

        yield solvers
        for name in MODULES:
            sys.modules.pop(name, None)


def test_a_quick_run_writes_both_tables_and_the_plot(bench: ModuleType, tmp_path: Path):
    bench.main(["--quick", "--out", str(tmp_path)])
    text = (tmp_path / "solvers.md").read_text(encoding="utf-8")
    forward, adjoint = text.split("## Adjoint")
    for table, rows in (
        (forward, bench.forward_rows(0, quick=True)),
        (adjoint, bench.adjoint_rows(0, quick=True)),
    ):
        for row in rows:
            assert f"| {row.name} " in table
    assert "missing: all: --quick" in text
    assert (tmp_path / "solvers.png").stat().st_size > 10_000


@pytest.mark.parametrize("row", range(4))
def test_the_record_counts_what_the_solution_counts(bench: ModuleType, row: int):
    problem = bench.forward_rows(0, quick=True)[row]
    curve = bench.worst(bench.solve_forward(Multisecant(), problem))
    for level in bench.FORWARD_LEVELS:
        solution = Multisecant(tol=level, stop_mode="rel", max_iter=100)(problem.f, problem.z0)
        assert bench.count(curve, level) == solution.nfe


@pytest.mark.parametrize("k", range(8))
def test_adjoint_solves_arrive_and_need_more_for_more(bench: ModuleType, k: int):
    problem = bench.adjoint_rows(0, quick=True)[0]
    low, high = bench.solve_adjoint(bench.ADJOINT[k], problem, bench.ADJOINT_LEVELS[:2])
    assert low < high < math.inf


def test_a_missing_peer_is_named(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    peers = sys.modules["peers"]
    monkeypatch.setattr(peers, "CACHE", tmp_path)
    monkeypatch.setitem(sys.modules, "jax", None)  # importing it is an error now
    found = peers.find_peers([tmp_path / "absent.whl"], 1e-5)
    assert [reason.split(":")[0] for reason in found.missing[:2]] == ["torchdeq 0.1.0", "jaxopt"]
    assert not [method for method in found.forward if method.name.startswith(("0.1.0", "jaxopt"))]


@pytest.fixture
def memory(bench: ModuleType) -> ModuleType:
    """benchmarks/memory.py, beside the others."""
    return importlib.import_module("memory")


def test_a_quick_run_measures_the_memory_of_every_method(memory: ModuleType, tmp_path: Path):
    memory.main(["--quick", "--out", str(tmp_path)])
    text = (tmp_path / "memory.md").read_text(encoding="utf-8")
    solvers, methods = text.split("## Gradient methods")
    for solver in (*memory.solver_memory.OURS, *memory.solver_memory.ADJOINT):
        assert f"| `{solver!r}" in solvers
    for method, _ in memory.METHODS:
        assert f"| `{method!r}` " in methods
    assert {type(method) for method, _ in memory.METHODS} == {type(as_grad(name)) for name in GRADS}
    assert (tmp_path / "memory.png").stat().st_size > 10_000


def test_the_allocator_is_read_right(memory: ModuleType):
    problem = memory.Problem.make(batch=32, n=64)
    state, weights = 4 * 32 * 64, 4 * 64 * 64
    method, kind = memory.METHODS[[repr(m) for m, _ in memory.METHODS].index("Unroll()")]
    few, many = (memory.measure(problem, method, kind(max_iter=k, tol=0.0, patience=0)) for k in (5, 15))
    # An evaluation more holds its product with W, or the sum with x, and its image: no less than one state, and no
    # more than two and a few numbers per sample.
    assert 10 * state <= many.held - few.held <= 10 * (2 * state + 64 * 32)
    assert many.saved <= many.held + 2 * state
    assert many.held <= many.forward
    assert many.backward >= many.held + weights
    method, kind = memory.METHODS[0]
    few, many = (memory.measure(problem, method, kind(max_iter=k, tol=0.0, patience=0)) for k in (5, 15))
    assert many.held - few.held <= 10 * 64 * 32  # traces


def test_a_quick_run_measures_what_derivatives_cost(bench: ModuleType, tmp_path: Path):
    importlib.import_module("derivatives").main(["--quick", "--out", str(tmp_path)])
    text = (tmp_path / "derivatives.md").read_text(encoding="utf-8")
    assert text.count("| `fixed_point` ") == 4
    assert text.count("| `IFT(order=2)` ") == 4


@pytest.fixture
def gradients(bench: ModuleType) -> ModuleType:
    """benchmarks/gradients.py, beside the others."""
    return importlib.import_module("gradients")


def test_a_quick_run_compares_every_method_on_three_models(gradients: ModuleType, tmp_path: Path):
    gradients.main(["--quick", "--out", str(tmp_path)])
    text = (tmp_path / "gradients.md").read_text(encoding="utf-8")
    candidates = gradients.methods(Multisecant(stop_mode="rel"))
    assert {type(c.grad) for c in candidates} == {type(as_grad(name)) for name in GRADS}
    comparison, training = text.split("## Training")
    for c in candidates:
        assert comparison.count(f"| `{c.name}` ") == 3
    assert "failed" not in comparison
    for name in gradients.TRAINED:
        assert training.count(f"| `{name}` ") == len(gradients.RATES)
    assert (tmp_path / "gradients.png").stat().st_size > 10_000


def test_calls_and_products_are_counted_where_they_are_known(gradients: ModuleType):
    w = torch.tensor([[0.5, 0.1], [0.0, 0.4]], dtype=torch.float64, requires_grad=True)
    x = torch.ones(3, 2, dtype=torch.float64)
    picard = SimpleFixedPointIteration(max_iter=7)
    for grad, calls, passes in (
        (JFB(), 7 + 1, 1),
        (PhantomGrad(steps=3), 7 + 3, 3),
        (NeumannPhantom(terms=3), 7 + 1, 3 + 1),  # the last term goes to the residual, and one product to w
        (Unroll(checkpoint=True), 2 * 7 + 1, 7),
        (TruncatedCycle(grad_steps=2), 7, 2),
    ):
        layer = gradients.Counting(picard.replace(tol=math.inf), grad)
        layer(lambda z: torch.tanh(z @ w.T + x), torch.zeros_like(x))[0].sum().backward()
        assert (layer.calls, layer.passes) == (calls, passes), grad


def test_a_quick_run_compares_what_there_is_for_stability(bench: ModuleType, tmp_path: Path):
    stability = importlib.import_module("stability")
    stability.main(["--quick", "--out", str(tmp_path)])
    easy, hard = (tmp_path / "stability.md").read_text(encoding="utf-8").split("## Without an encoder")
    for variant in stability.VARIANTS:
        assert f"| {variant.name} " in easy
        assert f"| {variant.name} " in hard
    assert (tmp_path / "stability.png").stat().st_size > 10_000
