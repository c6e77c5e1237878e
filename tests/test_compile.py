"""A compiled module does what it does without: the same evaluations, results and gradients, and few graphs.

Most tests run the graphs by torch's own operations (backend "eager"), which takes no compiler and little time.
"""

from __future__ import annotations

import copy
import functools
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from torchdeq import (
    DEQ,
    GMRES,
    IFT,
    JFB,
    Anderson,
    BiCGSTAB,
    Broyden,
    ConvergenceWarning,
    FixedPointIteration,
    Multisecant,
    NewtonKrylov,
    PhantomGrad,
    Reversible,
    Solution,
    Solver,
    SolverModule,
    Status,
    Unroll,
    apply_norm,
)
from torchdeq.solver.graphs import Graphs, Program
from torchdeq.solver.packing import Packing

F64 = torch.float64
QUICK = {"backend": "eager"}
ADJOINT = IFT(solver=GMRES(tol=1e-10))


class _Pair(NamedTuple):
    a: Tensor
    b: Tensor


class _Nested(NamedTuple):
    a: Tensor
    b: None
    c: _Pair
    d: Tensor
    e: Tensor


@pytest.fixture(autouse=True)
def nothing_left_over() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@contextmanager
def graphs(at_least: int, at_most: int) -> Iterator[None]:
    """So many graphs are made within."""
    before = counters["stats"]["unique_graphs"]
    yield
    assert at_least <= counters["stats"]["unique_graphs"] - before <= at_most


def layer_of(n: int = 64, gain: float = 0.8) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(n, n, dtype=F64)
    with torch.no_grad():
        layer.weight.mul_(gain / torch.linalg.matrix_norm(layer.weight, 2))
    return layer


def data(batch: int, seed: int, n: int = 64) -> Tensor:
    return torch.randn(batch, n, dtype=F64, generator=torch.Generator().manual_seed(seed))


def step(
    deq: DEQ, f: Callable[..., Any], z0: Any, parameters: list[Tensor]
) -> tuple[list[Tensor], list[Tensor], Solution]:
    """A solve and its backward pass: the state's leaves, the gradients, and the account."""
    z, solution = deq(f, z0)
    leaves = list(z.values()) if isinstance(z, dict) else [z]
    loss = sum(leaf.abs().square().sum() for leaf in leaves)
    return leaves, list(torch.autograd.grad(loss, parameters)), solution


def agree(one: tuple[Any, ...], other: tuple[Any, ...], level: float = 1e-10) -> None:
    """The same states, gradients and accounts."""
    for a, b in zip([*one[0], *one[1]], [*other[0], *other[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=level, atol=level)
    a, b = one[2], other[2]
    assert a.nfe == b.nfe
    assert torch.equal(a.nstep, b.nstep)
    assert torch.equal(a.status, b.status)
    torch.testing.assert_close(a.abs_trace, b.abs_trace, rtol=level, atol=level)
    torch.testing.assert_close(a.rel_trace, b.rel_trace, rtol=level, atol=level)


@pytest.mark.parametrize(
    "solver",
    [
        FixedPointIteration(tol=1e-9, max_iter=120),
        Anderson(tol=1e-9, stop_mode="rel"),
        Broyden(tol=1e-9),
        Multisecant(tol=1e-9),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_the_same_solve_and_gradient_and_no_graph_more_for_other_inputs(solver: Solver) -> None:
    layer = layer_of()
    plain, compiled = DEQ(solver, ADJOINT), DEQ(solver, ADJOINT, compile=QUICK)
    # Forward, and the adjoint, whose space grows: at first of one size, then of any.
    first, other = (2, 4), (2, 2)
    none = (0, 0)
    for batch, seed, more in (
        (3, 1, first), (3, 2, none), (3, 3, none), (3, 4, none), (5, 5, other), (4, 6, none)
    ):  # fmt: skip
        x = data(batch, seed)
        f = lambda z, x=x: torch.tanh(layer(z) + x)  # noqa: E731
        want = step(plain, f, torch.zeros_like(x), [layer.weight])
        with graphs(*more):
            agree(step(compiled, f, torch.zeros_like(x), [layer.weight]), want)


@pytest.mark.parametrize(
    "solver",
    [FixedPointIteration(tol=1e-10, max_iter=120), Anderson(tol=1e-10)],
    ids=lambda solver: type(solver).__name__,
)
def test_an_adjoint_is_solved_by_iterations_too_and_counts_the_products_that_were_made(
    solver: Solver,
) -> None:
    layer, x = layer_of(), data(3, 1)
    seen: list[Solution] = []
    ways = [DEQ(grad=IFT(solver=solver), compile=way, on_backward=seen.append) for way in (False, QUICK)]
    f = lambda z: torch.tanh(layer(z) + x)  # noqa: E731
    with graphs(0, 0):
        want = step(ways[0], f, torch.zeros_like(x), [layer.weight])
    with graphs(2, 2):
        got = step(ways[1], f, torch.zeros_like(x), [layer.weight])
    agree(got, want)
    plain, compiled = seen
    assert torch.equal(plain.nstep, compiled.nstep)
    assert bool(compiled.converged.all())
    assert plain.nfe <= compiled.nfe < plain.nfe + 4
    torch.testing.assert_close(plain.abs_trace, compiled.abs_trace[: plain.nfe], rtol=1e-8, atol=1e-12)


class Block(nn.Module):
    def __init__(self, x: Tensor):
        super().__init__()
        self.inner, self.x = layer_of(), x

    def forward(self, z: Tensor) -> Tensor:
        return self.injected(self.x, z)

    def injected(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(self.inner(z) + x)


def test_f_may_be_a_module_or_a_partial_of_a_method() -> None:
    x = data(3, 1)
    block = Block(x)
    for f in (block, functools.partial(block.injected, x)):
        want, got = [
            step(DEQ(grad=JFB(), compile=way), f, torch.zeros_like(x), [block.inner.weight])
            for way in (False, QUICK)
        ]
        agree(got, want)


def test_a_start_that_is_not_contiguous() -> None:
    layer, x = layer_of(), data(3, 1)
    z0 = torch.zeros(64, 3, dtype=F64).T
    want, got = (
        DEQ(grad=JFB(), compile=way)(lambda z: torch.tanh(layer(z) + x), z0)[0] for way in (False, QUICK)
    )
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_states_of_several_leaves_and_samples_of_the_trajectory() -> None:
    layer, x = layer_of(), data(3, 1)

    def f(state: dict[str, Tensor]) -> dict[str, Tensor]:
        a, c = state["a"], state["c"]
        return {"a": torch.tanh(layer(a) + x + 0.1 * c.real), "c": torch.complex(c.imag.cos(), a.sin() / 2)}

    z0 = {"a": torch.zeros_like(x), "c": torch.complex(x, x)}
    solver = Broyden(tol=1e-9, norm="max")
    plain, compiled = (
        DEQ(solver, PhantomGrad(), record=(2, 9), compile=way) for way in (False, {"backend": "aot_eager"})
    )
    agree(step(compiled, f, z0, [layer.weight]), step(plain, f, z0, [layer.weight]))
    with torch.no_grad():
        for got, want in zip(compiled(f, z0)[1].states, plain(f, z0)[1].states, strict=True):
            torch.testing.assert_close(got["a"], want["a"], rtol=1e-10, atol=1e-10)


def test_parametrized_weights_are_evaluated_before_and_have_their_gradients() -> None:
    x = data(3, 1)
    made = []
    for way in (False, QUICK):
        layer = layer_of()
        apply_norm(layer)
        nn.utils.parametrizations.spectral_norm(inner := layer_of(gain=3.0))
        f = lambda z, layer=layer, inner=inner: torch.tanh(layer(z) / 2 + inner(z) / 3 + x)  # noqa: E731
        made.append(
            step(DEQ(Anderson(tol=1e-9), ADJOINT, compile=way), f, torch.zeros_like(x), [*layer.parameters()])
        )
        made[-1][1].extend(buffer for buffer in inner.buffers())  # u and v, which a call changes once
    agree(made[1], made[0])


def test_a_compiled_f_makes_its_tracked_call_compiled_too() -> None:
    layer, x = layer_of(), data(3, 1)
    f = lambda z: torch.tanh(layer(z) + x)  # noqa: E731
    want = step(DEQ(Anderson(tol=1e-9), JFB()), f, torch.zeros_like(x), [layer.weight])
    deq, g = DEQ(Anderson(tol=1e-9), JFB(), compile=QUICK), torch.compile(f, backend="eager", fullgraph=True)
    with graphs(2, 2):  # the loop, and the call after it
        agree(step(deq, g, torch.zeros_like(x), [layer.weight]), want)
    with graphs(0, 0):
        agree(step(deq, g, torch.zeros_like(x), [layer.weight]), want)


def test_f_sees_its_globals_change_though_it_was_made_by_exec() -> None:
    x = data(3, 1)
    names: dict[str, Any] = {"torch": torch, "x": x, "scale": 0.5}
    exec("def f(z):\n    return torch.tanh(scale * z + x)", names)
    plain, compiled = DEQ(), DEQ(compile=QUICK)
    for scale, shift in ((0.5, 0.0), (0.8, 0.0), (0.3, 0.0), (0.3, 1.0)):
        names["scale"], names["x"] = scale, x + shift
        want, got = (deq(names["f"], torch.zeros_like(x))[0] for deq in (plain, compiled))
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_autocast_is_for_f_alone() -> None:
    layer, x = layer_of().float(), data(3, 1).float()
    made = []
    for way in (False, QUICK):
        with torch.autocast("cpu", torch.bfloat16):
            made.append(
                step(
                    DEQ(Anderson(tol=1e-2), IFT(solver=GMRES(tol=1e-2)), compile=way),
                    lambda z: torch.tanh(layer(z) + x),
                    torch.zeros_like(x),
                    [layer.weight],
                )
            )
    agree(made[1], made[0], level=1e-4)  # float32


def test_samples_end_as_they_do_without() -> None:
    layer, x = layer_of(), data(4, 1)
    spoilt = torch.tensor([False, True, False, False])[:, None]

    def f(z: Tensor) -> Tensor:
        slow = torch.arange(4)[:, None] == 2
        return torch.where(spoilt, z / 0, torch.where(slow, z + 1, torch.tanh(layer(z) + x)))

    def ended(way: Any) -> Solution:
        with pytest.warns(ConvergenceWarning):
            return DEQ(FixedPointIteration(max_iter=45), compile=way)(f, torch.zeros_like(x))[1]

    got, want = ended(QUICK), ended(False)
    assert got.status.tolist() == [Status.CONVERGED, Status.NON_FINITE, Status.MAX_ITER, Status.CONVERGED]
    assert torch.equal(got.status, want.status)
    assert torch.equal(got.nstep, want.nstep)
    torch.testing.assert_close(got.residual, want.residual)


def test_buffers_that_f_changes_are_an_error_and_in_eval_mode_are_not() -> None:
    layer, x, norm = layer_of(), data(8, 1), nn.BatchNorm1d(64, dtype=F64)
    deq = DEQ(grad=JFB(), compile=QUICK)
    f = lambda z: torch.tanh(layer(norm(z)) / 4 + x)  # noqa: E731
    with pytest.raises(RuntimeError, match=r"changes its buffers running_mean.*eval\(\)"):
        deq(f, torch.zeros_like(x))
    assert int(norm.num_batches_tracked) == 0
    norm.eval()
    z, solution = deq(f, torch.zeros_like(x))
    assert bool(solution.converged.all())


def test_what_torch_cannot_capture_is_said_with_the_line() -> None:
    def looks(z: Tensor) -> Tensor:
        return z / 2 if float(z.detach().sum()) > 1e9 else z.cos()

    deq = DEQ(compile=QUICK)
    with pytest.raises(RuntimeError, match=r"compile=False.*torch says: .*1e9"):
        deq(looks, torch.zeros(3, 4))


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (lambda z: z[:, :3], "f returned shape"),
        (lambda z: z.double(), "f returned dtype"),
        (lambda z: z > 0, "f returned dtype"),
        (lambda z: z.mul_(0.5) + 1, "changed its argument in place"),
        (lambda z: z @ torch.ones(3, 3), "cannot be multiplied"),
    ],
    ids=["shape", "dtype", "bool", "in place", "its own"],
)
def test_what_is_wrong_with_f_is_said_as_without(f: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        DEQ(compile=QUICK)(f, torch.zeros(2, 4))


def test_a_structure_with_more_in_it_is_an_error_as_without() -> None:
    with pytest.raises(TypeError, match="f returned the structure"):
        DEQ(compile=QUICK)(lambda s: {**s, "more": s["a"]}, {"a": torch.zeros(2, 4)})


class _Learned(SolverModule):
    fixed_shape, separate = True, False

    def init(self, z: Tensor) -> None:
        return None

    def step(self, f: Any, z: Tensor, fz: Tensor, state: None) -> tuple[Tensor, None]:
        return fz, None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": _Learned()}, "a module may change"),
        ({"solver": NewtonKrylov()}, "NewtonKrylov.* cannot be compiled"),
        ({"solver": Anderson(compact=True)}, "compact=False"),
        ({"eval_solver": NewtonKrylov()}, "NewtonKrylov.* cannot be compiled"),
        ({"grad": IFT(solver=BiCGSTAB())}, "BiCGSTAB.* cannot be compiled"),
        ({"grad": Unroll()}, r"Unroll\(\) makes the steps"),
        ({"solver": FixedPointIteration(), "grad": Reversible()}, "makes the steps"),
        ({"compile": {"bakend": "eager"}}, "no option 'bakend'"),
    ],
    ids=str,
)
def test_what_cannot_be_compiled_raises_when_it_is_asked_for(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        DEQ(**{"compile": True, **options})


@pytest.mark.parametrize("given", [None, 1, "eager", ["eager"]], ids=str)
def test_what_compile_may_be_is_said(given: Any) -> None:
    with pytest.raises(ValueError, match="compile is False, True, 'fixed', or a dictionary"):
        DEQ(compile=given)


def test_a_backend_that_does_not_exist_is_not_a_fault_of_f() -> None:
    with pytest.raises(Exception, match="inductr") as caught:
        DEQ(compile={"backend": "inductr"})(torch.cos, torch.zeros(2, 3))
    assert "f cannot be captured" not in str(caught.value)


def test_noise_is_not_held_in_a_graph() -> None:
    with pytest.raises(ValueError, match="hold_noise"):
        DEQ(hold_noise=True, compile=True)


def test_compile_switches_it_on_and_it_is_printed_and_goes_with_copies() -> None:
    x = data(3, 1)
    deq = DEQ(Anderson())
    deq.compile(backend="eager")
    assert repr(deq) == "DEQ(Anderson(), IFT(), compile={'backend': 'eager'})"
    assert repr(DEQ(Anderson(), compile=True)) == "DEQ(Anderson(), IFT(), compile=True)"
    f = lambda z: (z / 2 + x).cos()  # noqa: E731
    want = deq(f, torch.zeros_like(x))[0]
    for other in (copy.deepcopy(deq), pickle.loads(pickle.dumps(deq))):
        assert repr(other) == repr(deq)
        before = counters["stats"]["unique_graphs"]
        assert torch.equal(other(f, torch.zeros_like(x))[0], want)
        assert counters["stats"]["unique_graphs"] == before + 1


def test_compile_after_a_fixed_count_stops_when_it_has_arrived() -> None:
    deq = DEQ(FixedPointIteration(tol=1e-3, max_iter=40), JFB(), compile="fixed")
    assert deq(torch.cos, torch.zeros(2, 3))[1].nfe == 40
    deq.compile(backend="eager")
    assert repr(deq).endswith("compile={'backend': 'eager'})")
    assert deq(torch.cos, torch.zeros(2, 3))[1].nfe < 25


def test_an_empty_batch_is_nothing_to_compile() -> None:
    with graphs(0, 0):
        z, solution = DEQ(compile=QUICK)(torch.cos, torch.zeros(0, 3))
    assert (z.shape, solution.nfe) == ((0, 3), DEQ()(torch.cos, torch.zeros(0, 3))[1].nfe)


def test_more_kinds_of_f_than_torch_keeps_begin_anew() -> None:
    program = Program(lambda: lambda k, z: z * k, {"backend": "eager", "dynamic": False})
    with torch._dynamo.config.patch(recompile_limit=2):
        for k in ("ab", "abc", "abcd", "abcde"):
            assert program(len(k), torch.ones(1)).tolist() == [len(k)]


def test_graphs_are_kept_by_their_key() -> None:
    kept = Graphs(QUICK)
    make: Callable[[], Any] = lambda: lambda z: z + 1  # noqa: E731
    assert kept("a", make) is kept("a", make)
    assert kept("a", make) is not kept("b", make)
    assert copy.deepcopy(kept)("a", make) is not kept("a", make)


def test_packing_stacks_what_is_small_and_leaves_histories_where_they_are() -> None:
    tree = (torch.zeros(3), None, (torch.ones(3), torch.ones(2, 3)), torch.ones(2, 3, 4), torch.tensor(1))
    state = _Nested(*tree[:2], _Pair(*tree[2]), *tree[3:])
    packing = Packing(state)
    tensors, histories = packing.pack(state)
    assert [tuple(t.shape) for t in tensors] == [(2, 3), (1,), (2, 3)]
    assert histories[0] is state.d
    again = packing.unpack(tensors, histories)
    assert again.b is None
    assert again.c.a.tolist() == [1, 1, 1]
    assert int(again.e) == 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_gives_the_same_to_rounding() -> None:
    layer, x = layer_of(), data(3, 1)
    f = lambda z: torch.tanh(layer(z) + x)  # noqa: E731
    want = step(DEQ(Anderson(tol=1e-9), ADJOINT), f, torch.zeros_like(x), [layer.weight])
    with graphs(2, 4):
        got = step(DEQ(Anderson(tol=1e-9), ADJOINT, compile=True), f, torch.zeros_like(x), [layer.weight])
    agree(got, want, level=1e-9)
