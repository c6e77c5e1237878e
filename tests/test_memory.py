"""What solvers and gradient methods hold, as the allocator counts it, in multiples of the state.

A state has B D numbers. `held` is what there is, beyond the start, when f is called: neither f's own work space is in
it, nor what a step needs for a moment.
"""

from __future__ import annotations

import gc
import importlib.util
import itertools
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from torchdeq import (
    DEQ,
    GMRES,
    IFT,
    JFB,
    AffineMap,
    Anderson,
    BiCGSTAB,
    Broyden,
    ConvergenceWarning,
    FixedPointIteration,
    Multisecant,
    PhantomGrad,
    SimpleFixedPointIteration,
)
from torchdeq.diagnostics import SavedBytes

BATCH, SIZE = 8, 4096
STATE = 4 * BATCH * SIZE
#: Norms, traces, masks and small systems, of some numbers per sample and evaluation.
SMALL = 0.5
#: Where all samples come closer at each step: the iterate, the last one, its residual, and the image.
CALM = 4
#: Where some do not: also the best iterates, those that were best together, and what is taken back.
ROUGH = 9


@pytest.fixture(scope="module")
def allocator():
    """benchmarks/allocator.py."""
    path = Path(__file__).parent.parent / "benchmarks" / "allocator.py"
    spec = importlib.util.spec_from_file_location("allocator", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "allocator", module)  # where its dataclass looks for itself
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def solve(allocator):
    """`solve(solver)`: the states held at each call of f, the most between calls, and what is left, in a long solve."""
    shift = torch.linspace(0, 1, BATCH * SIZE).reshape(BATCH, SIZE)
    slope = torch.linspace(-0.95, 0.95, SIZE)
    z0 = torch.zeros_like(shift)

    def run(solver, *, affine=False):
        solver = solver.replace(tol=1e-30) if affine else solver.replace(tol=0.0, patience=0)
        f = allocator.Marked((lambda z: slope * z) if affine else (lambda z: slope * torch.sin(z) + shift))
        problem = (AffineMap(f, shift), None) if affine else (f, z0)
        with torch.no_grad():
            memory = allocator.allocations(lambda: solver.run(*problem, together=False))
        calls = memory.spans[allocator.CALL]
        between = [memory.between(end, begin) for (_, end), (begin, _) in itertools.pairwise(calls)]
        held = [n / STATE for n in memory.at_calls()[: solver.max_iter]]  # not the call that measures the end
        return held, max(between) / STATE, memory.end / STATE

    run(FixedPointIteration(max_iter=3))  # what is made once
    return run


def test_the_allocator_is_read_right(allocator):
    def run():
        a = torch.ones(1000)
        f(a)
        b = torch.ones(500)
        del a
        f(b)
        return b

    f = allocator.Marked(lambda t: t + t)
    run()
    memory = allocator.allocations(run)
    assert memory.at_calls() == [4000, 2000]
    assert memory.peak == 2 * 4000
    assert memory.end == 2000
    (first, second) = memory.spans[allocator.CALL]
    assert memory.between(*first) == 2 * 4000
    assert memory.between(first[1], second[0]) == 2 * 4000  # what f returned is outside of its call


@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_picard_iteration_holds_three_states_while_all_come_closer(solve, tau):
    """The iterate, the best, and the image that it was made from."""
    held, most, left = solve(FixedPointIteration(tau=tau, max_iter=25))
    assert max(held) <= 3 + SMALL
    assert most <= 6 + SMALL
    assert left <= 1 + SMALL


def test_picard_iteration_holds_a_fixed_number_at_the_level_of_rounding(solve):
    """Also those that were best together, and the last one."""
    held, most, _ = solve(FixedPointIteration(tau=0.5, max_iter=80))
    assert max(held) <= 5 + SMALL
    assert most <= 8 + SMALL


def test_iteration_that_does_not_look_holds_two(solve):
    held, _, left = solve(SimpleFixedPointIteration(max_iter=40))
    assert max(held) <= 2 + SMALL
    assert left <= 1 + SMALL


@pytest.mark.parametrize("m", [1, 2, 5, 8])
@pytest.mark.parametrize("kind", [1, 2])
def test_anderson_holds_two_states_for_each_difference_and_a_fixed_number(solve, m, kind):
    held, _, left = solve(Anderson(m=m, type=kind, max_iter=40))
    assert held[3] <= 2 * max(m, 4) + CALM + SMALL  # room for four
    assert max(held) <= 2 * m + ROUGH + SMALL
    assert held[20] >= 2 * m
    assert left <= 1 + SMALL


@pytest.mark.parametrize("solver", [Broyden(), Multisecant()], ids=lambda s: type(s).__name__)
def test_the_memory_of_a_quasi_newton_method_follows_its_evaluations_and_not_max_iter(solve, solver):
    """Two states for each difference, and room for seven more."""
    short, _, left = solve(solver.replace(max_iter=24))
    long, _, _ = solve(solver.replace(max_iter=40))
    assert short == long[: len(short)]
    for k, held in enumerate(long):  # before evaluation k + 1 there are k − 1 differences
        assert held <= 2 * max(k - 1, 0) + 2 * 7 + ROUGH + SMALL
    assert long[-1] >= 2 * (40 - 2)
    assert left <= 1 + SMALL


@pytest.mark.parametrize("solver", [Broyden(m=6), Multisecant(m=6)], ids=lambda s: type(s).__name__)
def test_a_memory_limit_is_kept(solve, solver):
    held, _, _ = solve(solver.replace(max_iter=40))
    assert max(held) <= 2 * 6 + ROUGH + SMALL


@pytest.mark.parametrize(
    ("solver", "affine"),
    [(Anderson(), False), (Broyden(), False), (Multisecant(), False), (GMRES(), True)],
    ids=lambda value: type(value).__name__,
)
def test_a_step_needs_at_most_as_much_again_and_eight_states(solve, solver, affine):
    """As much again for a moment, when the histories grow."""
    held, most, _ = solve(solver.replace(max_iter=40), affine=affine)
    assert most <= 2 * max(held) + 8 + SMALL


def test_gmres_holds_a_state_for_each_product_with_room_for_as_many_again(solve):
    held, _, left = solve(GMRES(max_iter=40), affine=True)
    for k, states in enumerate(held):
        assert states <= max(4, 2 * (k + 1)) + 6 + SMALL
    assert left <= 1 + SMALL
    restarted, _, _ = solve(GMRES(m=4, max_iter=40), affine=True)
    assert max(restarted) <= 8 + 8 + SMALL


def test_bicgstab_holds_a_fixed_number_of_states(solve):
    held, _, _ = solve(BiCGSTAB(max_iter=40), affine=True)
    assert max(held) <= 9 + SMALL


# Gradient methods -----------------------------------------------------------------------------------------------------


class Deep(torch.nn.Module):
    """Ten layers, whose graph is much larger than the state."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.full((10, SIZE), 0.9))

    def forward(self, z):
        for scale in self.scale:
            z = torch.sin(scale * z + 0.1)
        return z


@pytest.fixture
def deep():
    torch.manual_seed(0)
    return Deep()


def graph_of_one_call(f):
    z = torch.ones(BATCH, SIZE, requires_grad=True)
    with SavedBytes(ignore=f.parameters()) as saved:
        fz = f(z)
        size = saved.now
        del fz
    return size / STATE


def held_by(allocator, f, grad, k):
    """States between forward and backward, beyond the start; and the most in backward, beyond the gradients."""
    z0, layer = torch.zeros(BATCH, SIZE), DEQ(FixedPointIteration(max_iter=k, tol=0.0, patience=0), grad)

    def step():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            z, _ = layer(f, z0)
            loss = z.sum()
            del z
            with torch.profiler.record_function("backward"):
                loss.backward()

    step()
    f.zero_grad()
    gc.collect()
    memory = allocator.allocations(step, "backward")
    ((begin, end),) = memory.spans["backward"]
    f.zero_grad()
    return memory.at(begin) / STATE, memory.between(begin, end) / STATE


@pytest.mark.parametrize(
    ("grad", "graphs"),
    [(IFT(), 1), (IFT(hook=True), 1), (IFT(order=2), 2), (JFB(), 1), (PhantomGrad(steps=3), 3)],
    ids=str,
)
def test_what_is_held_for_the_backward_pass_is_the_graph_of_so_many_calls_of_f(allocator, deep, grad, graphs):
    """And z* and f(z*), whatever the number of evaluations."""
    one = graph_of_one_call(deep)
    assert one >= 15  # what is counted is the graph and not the state
    few, many = (held_by(allocator, deep, grad, k)[0] for k in (6, 30))
    assert (graphs - 0.5) * one <= few <= graphs * one + 3 + SMALL
    assert many - few <= SMALL


class Checkpointed(Deep):
    """Which keeps no graph, and is evaluated again for its backward pass."""

    def forward(self, z):
        return checkpoint(super().forward, z, use_reentrant=False)


@pytest.mark.parametrize("order", [1, 2])
def test_no_graph_is_held_of_an_f_that_is_checkpointed(allocator, deep, order):
    torch.manual_seed(0)
    bare, method = Checkpointed(), IFT(order=order)
    assert held_by(allocator, bare, method, 6)[0] <= 3 * order + SMALL
    want, got = (torch.autograd.grad(_loss(f, method), f.scale)[0] for f in (deep, bare))
    assert torch.equal(got, want)


def _loss(f, method):
    return DEQ(grad=method)(f, torch.zeros(BATCH, SIZE))[0].sum()


def test_the_backward_pass_evaluates_f_once_more_or_not_at_all(allocator, deep):
    """Beyond what was held: with a hook the basis of GMRES; without one the graph of one call of f more."""
    one, products = graph_of_one_call(deep), 9
    work = 2 * 2 * products + 12  # bases that grow, and what a product takes
    solver = GMRES(max_iter=products, tol=1e-30)
    for grad, graphs in ((IFT(hook=True, solver=solver), 0), (IFT(solver=solver), 1)):
        held, most = held_by(allocator, deep, grad, 6)
        assert most - held <= graphs * one + work + SMALL
