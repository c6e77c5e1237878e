"""On an accelerator a solve does not wait for the device in each iteration, and builds nothing on the host.

No accelerator is needed to see it. Tensors on the device `meta` have no values, and solvers take the way of an
accelerator with them. A dispatch mode sees every operation: those by which the host asks for values, which it counts
and answers, and those that make a tensor on the CPU or carry one across. Per iteration there must be none: a long solve
has as many as a short one. The stop flag itself, which is read late and without waiting, is left out.
"""

from __future__ import annotations

import collections
import traceback
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import torchdeq
from tests.problems import F64, TanhMap
from torchdeq import DEQ, IFT, JFB, SOLVERS, AffineMap, Anderson, PhantomGrad, as_solver
from torchdeq._replay import RandomState
from torchdeq.grad.inverse import Inverse
from torchdeq.solver import AffineSolver
from torchdeq.solver.watch import StopFlag

LIBRARY = str(Path(torchdeq.__file__).parent)
CPU = torch.device("cpu")
SHORT, LONG = 8, 20
AFFINE = [name for name in SOLVERS if isinstance(as_solver(name), AffineSolver)]
#: It makes a linear solve in every step.
INNER = ["newton_krylov"]
GENERAL = [name for name in SOLVERS if name not in (*AFFINE, *INNER)]
ATEN = torch.ops.aten
#: Operations whose result, or its shape, the host must know the values for.
READS = {
    ATEN._local_scalar_dense.default,  # item(), bool(), float(), int()
    ATEN.equal.default,
    ATEN.nonzero.default,  # and a mask as an index
    ATEN.masked_select.default,
    ATEN._unique2.default,
}


class Host(TorchDispatchMode):
    """Counts what the host asks of the device, and what it builds by itself, by the line that does it."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: collections.Counter[str] = collections.Counter()
        self.builds: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        before = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        on_device = any(t.is_meta for t in before)
        if func in READS:
            self.reads[line_of_the_library()] += 1
            if func is ATEN._local_scalar_dense.default and on_device:
                return before[0].dtype.is_floating_point or 1  # true, and one
        out = func(*args, **kwargs)
        after = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        if on_device and any(not t.is_meta for t in after):
            self.reads[line_of_the_library()] += 1
        elif any(not t.is_meta for t in (*before, *after)):
            self.builds[line_of_the_library()] += 1
        return out


def line_of_the_library() -> str:
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(LIBRARY):
            return f"{frame.filename.removeprefix(LIBRARY)}:{frame.lineno}"
    return "outside"


def watched(run) -> Host:
    with Host() as host, warnings.catch_warnings():
        warnings.simplefilter("ignore", torchdeq.ConvergenceWarning)
        run()
    return host


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch):
    """The flag that tells the host to stop never arrives, so that a solve makes all its evaluations."""
    monkeypatch.setattr(StopFlag, "__call__", lambda self, flags: None)


def tanh_map(batch=4, n=16):
    w, x = torch.empty(n, n, device="meta"), torch.empty(batch, n, device="meta")
    return lambda z: torch.tanh(z @ w.T + x), x


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in GENERAL),
        ("anderson", {"type": 1}),
        ("anderson", {"tau": 0.5, "stop_mode": "rel"}),
        ("broyden", {"m": 3}),
        ("broyden", {"kind": "bad"}),
        ("broyden", {"ls": True}),
        ("multisecant", {"m": 3}),
        ("fixed_point_iter", {"tau": 0.5}),
        ("fixed_point_iter", {"return_final": True}),
        ("fixed_point_iter", {"check_every": 3, "min_iter": 5, "patience": 0}),
    ],
    ids=str,
)
def test_an_iteration_reads_and_builds_nothing_on_the_host(name, options):
    f, x = tanh_map()
    short, long = (
        watched(lambda k=k: as_solver(name, max_iter=k, **options)(f, torch.empty_like(x)))
        for k in (SHORT, LONG)
    )
    assert long.reads == short.reads
    assert long.builds == short.builds == collections.Counter()
    assert 1 <= short.reads.total() <= 4  # what a solve ends with; none would mean that reads are not seen


def test_an_iteration_on_a_nested_state_with_norms_by_leaf_reads_nothing():
    f, x = tanh_map()
    pair = lambda s: {"a": f(s["a"]), "b": 0.5 * torch.cos(s["b"])}  # noqa: E731
    z0 = {"a": torch.empty_like(x), "b": torch.empty(4, 2, 3, device="meta")}
    short, long = (watched(lambda k=k: Anderson(max_iter=k, norm="max")(pair, z0)) for k in (SHORT, LONG))
    assert long.reads == short.reads
    assert long.builds == collections.Counter()


@pytest.mark.parametrize("name", AFFINE)
def test_a_product_of_a_krylov_solver_reads_and_builds_nothing_on_the_host(name):
    w, b = torch.empty(16, 16, device="meta"), torch.empty(4, 16, device="meta")
    f = AffineMap(lambda u: u @ w.T, b)
    short, long = (watched(lambda k=k: as_solver(name, max_iter=k).run(f)) for k in (SHORT, LONG))
    assert long.reads == short.reads
    assert long.builds == short.builds == collections.Counter()
    assert short.reads.total() <= 6  # of one space, and of how a solve ends


def test_a_batch_with_values_that_are_not_finite_is_sorted_out_without_a_read(monkeypatch):
    """With values, on the CPU, where the flag arrives late as on an accelerator."""
    monkeypatch.undo()
    usually = StopFlag.__init__
    monkeypatch.setattr(StopFlag, "__init__", lambda self, *, late: usually(self, late=True))
    f = TanhMap.make(gain=0.8)
    bad = torch.tensor([[torch.nan], [0.0], [0.0], [0.0]], dtype=F64)
    calls = []

    def g(z):
        calls.append(1)
        return f(z) + (bad if len(calls) == 4 else 0.0)

    def solve(k):
        calls.clear()
        solution = Anderson(max_iter=k, tol=1e-14, patience=0)(g, f.z0)
        assert solution.nfe >= k

    short, long = (watched(lambda k=k: solve(k)) for k in (SHORT, LONG))
    in_the_loop = {line: n for line, n in (long.reads - short.reads).items() if n >= LONG - SHORT}
    assert not in_the_loop


@pytest.mark.parametrize(
    "grad",
    [IFT(), IFT(hook=True), IFT(order=2), IFT(solver=Anderson()), JFB(), PhantomGrad(steps=3)],
    ids=str,
)
def test_a_training_step_waits_as_often_however_long_its_solves_are(grad, monkeypatch):
    # The state of a generator is not known for `meta`; and any two values are as good as equal there.
    monkeypatch.setattr(RandomState, "capture", lambda device: RandomState(CPU, torch.get_rng_state(), None))
    monkeypatch.setattr(Inverse, "_check_same", lambda self, fz, again: None)
    net, (_, x) = torch.nn.Linear(16, 16, device="meta"), tanh_map()

    def step(k):
        method = grad.replace(solver=grad.solver.replace(max_iter=k)) if isinstance(grad, IFT) else grad
        z, _ = DEQ(Anderson(max_iter=k), method)(lambda z: torch.tanh(net(z) + x), torch.empty_like(x))
        z.sum().backward()

    short, long = (watched(lambda k=k: step(k)) for k in (SHORT, LONG))
    assert long.reads == short.reads
    assert short.reads.total() <= 10
    assert long.builds == collections.Counter()
