"""benchmarks/gpu.py runs, also without a GPU, and counts what it says it counts."""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch

from torchdeq import DEQ, IFT, SOLVERS, Anderson, FixedPointIteration, as_solver
from torchdeq.solver import AffineSolver

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


@pytest.fixture(scope="module")
def gpu():
    """benchmarks/gpu.py as a module, found as it finds its neighbours when it is run."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        before = set(sys.modules)
        yield importlib.import_module("gpu")
        for name in set(sys.modules) - before:
            if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]


@pytest.fixture(scope="module")
def launches(gpu: ModuleType) -> ModuleType:
    return importlib.import_module("launches")


def test_a_quick_run_writes_a_row_for_every_solver_on_every_map(gpu: ModuleType, tmp_path: Path, capsys):
    gpu.main(["--quick", "--out", str(tmp_path)])
    text = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith(("| tanh", "| transformer"))]
    for name in ("tanh 4×8", "tanh 4×96", "transformer 2×3×8"):
        assert sum(row.startswith(f"| {name} ") for row in rows) == len(gpu.SOLVERS) + 1
    printed = capsys.readouterr().out
    assert printed.count("IFT backward, GMRES") == 3


def test_operations_that_compute_are_counted_once_and_views_not_at_all(launches: ModuleType):
    z, w = torch.ones(4, 8), torch.ones(8, 8)
    for action, wanted in (
        (lambda: torch.tanh(torch.nn.functional.linear(z, w) * 0.4 + z), 4),
        (lambda: z.view(8, 4)[0].t().expand(3, 4), 0),
        (lambda: z.new_empty(3), 0),
    ):
        assert launches.count(action, CPU) == (wanted, 0, 0)


def test_values_that_python_asks_for_are_counted(launches: ModuleType):
    z = torch.ones(4, 8)
    for action, wanted in (
        (lambda: bool((z > 0).any()), 1),
        (lambda: float(z.sum()) + z.amax().item(), 2),
        (lambda: z.masked_fill(z > 0, 1.0), 0),
    ):
        assert launches.count(action, CPU).waits == wanted


def test_launches_of_an_iteration_are_a_difference(launches: ModuleType):
    few, many = launches.Counts(30, 4, 0), launches.Counts(90, 4, 12)
    assert many.per(few, 12) == 5


def test_large_states_have_maps_of_low_rank(gpu: ModuleType):
    """A matrix of 65536² would have 16 GiB."""
    small, large = gpu.Tanh(2, 64), gpu.Tanh(2, 65536)
    assert small.u is None
    assert sum(p.numel() for p in large.parameters()) == 2 * gpu.RANK * 65536
    assert large(large.x).shape == large.x.shape


def test_every_map_of_the_full_run_is_a_contraction_to_be_solved(gpu: ModuleType):
    """At the sizes of a quick run; a solve that diverges measures another way through the code."""
    for case in gpu.cases(CPU, quick=True):
        with torch.no_grad():
            _, solution = DEQ(FixedPointIteration(tol=1e-4, stop_mode="rel", max_iter=60))(case.f, case.z0)
        assert solution.converged.all(), case.name


# On a GPU -------------------------------------------------------------------------------------------------------------


@needs_cuda
@pytest.mark.parametrize("name", [n for n in SOLVERS if not isinstance(as_solver(n), AffineSolver)])
def test_on_a_gpu_a_solve_gives_what_it_gives_on_the_cpu(name):
    torch.manual_seed(0)
    w, x = 0.5 * torch.randn(16, 16, dtype=torch.float64) / 4, torch.randn(4, 16, dtype=torch.float64)

    def solve(device):
        a, b = w.to(device), x.to(device)
        return as_solver(name, tol=1e-10, max_iter=100)(
            lambda z: torch.tanh(z @ a.T + b), torch.zeros_like(b)
        )

    there, here = solve("cuda"), solve("cpu")
    assert there.z.is_cuda
    assert there.converged.all()
    torch.testing.assert_close(there.z.cpu(), here.z, rtol=0, atol=1e-9)


@needs_cuda
def test_on_a_gpu_a_gradient_is_what_it_is_on_the_cpu():
    torch.manual_seed(0)
    w, x = 0.5 * torch.randn(16, 16, dtype=torch.float64) / 4, torch.randn(4, 16, dtype=torch.float64)

    def gradient(device, grad):
        a, b = w.to(device).requires_grad_(), x.to(device)
        z, _ = DEQ(Anderson(tol=1e-10), grad)(lambda z: torch.tanh(z @ a.T + b), torch.zeros_like(b))
        z.square().sum().backward()
        return a.grad.cpu()

    for grad in (IFT(), IFT(hook=True)):
        torch.testing.assert_close(gradient("cuda", grad), gradient("cpu", grad), rtol=1e-4, atol=1e-6)


@needs_cuda
@pytest.mark.parametrize("name", ["fixed_point_iter", "anderson", "broyden", "multisecant"])
def test_on_a_gpu_a_longer_solve_waits_no_more_often(launches: ModuleType, name):
    device = torch.device("cuda")
    w, x = torch.randn(64, 64, device=device) / 16, torch.randn(32, 64, device=device)
    f = lambda z: torch.tanh(z @ w.T + x)  # noqa: E731

    def solve(k):
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            as_solver(name, max_iter=k, min_iter=k, tol=1e30)(f, torch.zeros_like(x))

    short, long = (launches.count(lambda k=k: solve(k), device) for k in (8, 20))
    assert long.waits == short.waits
    assert long.launches > short.launches
