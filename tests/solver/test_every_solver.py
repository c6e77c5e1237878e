"""What every solver must satisfy, over the registry: a new solver is tested the moment it is registered."""

from __future__ import annotations

import itertools
import pickle
import warnings

import numpy as np
import pytest
import torch

import torchdeq
from tests.problems import F64, CoupledMap, TanhMap, random_matrix, solve_exactly
from torchdeq import SOLVERS, AffineMap, ConvergenceError, CouplingWarning, Status, as_solver
from torchdeq.solver import AffineSolver
from torchdeq.solver.watch import StopFlag

NAMES = list(SOLVERS)
GENERAL = [n for n in NAMES if not isinstance(as_solver(n), AffineSolver)]
MONITORED = [n for n in GENERAL if as_solver(n).monitors]
AFFINE = [n for n in NAMES if isinstance(as_solver(n), AffineSolver)]
#: Products with the Jacobian count as evaluations, but are no calls of f; and f must be differentiable.
DIFFERENTIATES = ["newton_krylov"]
SEPARATE = [n for n in MONITORED if as_solver(n).separate]


class Counted:
    """f with its calls counted."""

    def __init__(self, f):
        self.f, self.calls = f, 0

    def __call__(self, z):
        self.calls += 1
        return self.f(z)


class Product(torch.autograd.Function):
    """u Aᵀ; its transpose, which some solvers get by going back through it, is counted too."""

    @staticmethod
    def forward(ctx, u, a, counted):
        ctx.a, ctx.counted = a, counted
        return u @ a.T

    @staticmethod
    def backward(ctx, g):
        ctx.counted.calls += 1
        return g @ ctx.a, None, None


def affine_problem(n=12, batch=3, gain=0.7, symmetric=False):
    a = random_matrix(n, gain)
    if symmetric:  # the symmetric part has a norm of about √2 gain
        a = (a + a.T) / 2
    b = torch.randn(batch, n, dtype=F64, generator=torch.Generator().manual_seed(3))
    exact = torch.linalg.solve(torch.eye(n, dtype=F64) - a, b.T).T
    return a, b, exact


@pytest.mark.parametrize("name", GENERAL)
def test_reaches_the_fixed_point(name):
    f = TanhMap.make(gain=0.6)
    solution = as_solver(name, tol=1e-11, max_iter=120)(f, f.z0)
    assert solution.converged.all()
    # The error is at most the residual over 1 − ‖J‖; the map's ‖J‖ is below .9 here.
    assert (solution.z - solve_exactly(f, f.z0)).norm(dim=1).max() < 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_solves_an_affine_map(name):
    a, b, exact = affine_problem(symmetric=getattr(as_solver(name), "symmetric_only", False))
    solution = as_solver(name, tol=1e-11, max_iter=150)(AffineMap(lambda u: u @ a.T, b), torch.zeros_like(b))
    assert solution.converged.all()
    assert (solution.z - exact).norm() < 1e-9


@pytest.mark.parametrize("name", GENERAL)
@pytest.mark.parametrize("max_iter", [1, 2, 3, 7])
def test_max_iter_is_the_number_of_evaluations(name, max_iter):
    f = TanhMap.make()
    counted = Counted(f)
    solution = as_solver(name, tol=0.0, max_iter=max_iter)(counted, f.z0)
    assert solution.nfe == max_iter
    if name in DIFFERENTIATES:
        assert counted.calls <= max_iter
    else:
        assert counted.calls == max_iter
    assert len(solution.trace) == (max_iter if as_solver(name).monitors else 1)


@pytest.mark.parametrize("name", AFFINE)
@pytest.mark.parametrize("max_iter", [2, 3, 7])
def test_max_iter_of_an_affine_solver_includes_the_true_residual(name, max_iter):
    a, b, _ = affine_problem()
    counted = Counted(lambda u: Product.apply(u, a, counted))
    solution = as_solver(name, tol=0.0, max_iter=max_iter).run(AffineMap(counted, b))
    assert counted.calls == solution.nfe == max_iter
    assert solution.nstep.tolist() == [max_iter - 1] * 3
    counted.calls = 0
    solution = as_solver(name, tol=0.0, max_iter=1)(AffineMap(counted, b), torch.zeros_like(b))
    assert counted.calls == solution.nfe == 1


@pytest.mark.parametrize("name", MONITORED)
def test_stops_at_once_when_it_starts_at_the_fixed_point(name):
    f = TanhMap.make()
    solution = as_solver(name, tol=1e-10)(f, solve_exactly(f, f.z0))
    assert solution.nfe == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stop_mode", ["abs", "rel"])
def test_the_residual_reported_is_that_of_the_state_returned(name, stop_mode):
    a, b, _ = affine_problem()
    f = AffineMap(lambda u: u @ a.T, b)
    solution = as_solver(name, tol=1e-4, max_iter=30, stop_mode=stop_mode)(f, torch.zeros_like(b))
    r = (f(solution.z) - solution.z).norm(dim=1)
    scale = b if isinstance(as_solver(name), AffineSolver) else f(solution.z)
    assert torch.allclose(solution.abs_residual, r, rtol=1e-10, atol=1e-15)
    assert torch.allclose(solution.rel_residual, r / scale.norm(dim=1), rtol=1e-10, atol=1e-15)
    assert torch.equal(solution.residual, getattr(solution, f"{stop_mode}_residual"))


@pytest.mark.parametrize("name", GENERAL)
def test_an_unconverged_solve_reports_the_residual_of_what_it_returns(name):
    """Also where best states come from different evaluations: an expanding map, a rotation."""
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=F64)
    for f in (lambda z: -1.5 * z + 1, lambda z: z @ turn.T + 1, TanhMap.make(n=2, batch=3, gain=3.0)):
        z0 = torch.tensor([[1.0, 2.0], [-3.0, 0.5], [0.1, 0.1]], dtype=F64)
        solution = as_solver(name, tol=1e-12, max_iter=9)(f, z0)
        r = (f(solution.z) - solution.z).norm(dim=1)
        assert torch.allclose(solution.abs_residual, r, rtol=1e-9, atol=1e-14)
        if name in MONITORED:
            assert (r <= (f(z0) - z0).norm(dim=1) * (1 + 1e-12)).all(), "never worse than the start"


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_does_not_depend_on_its_neighbours(name):
    w = random_matrix(16, 0.9)
    gen = torch.Generator().manual_seed(5)
    x = torch.randn(5, 16, dtype=F64, generator=gen) * torch.tensor([[0.01], [1.0], [3.0], [10.0], [0.3]])
    solver = as_solver(name, tol=1e-8, max_iter=400 if name in DIFFERENTIATES else 25)

    def solve(index):
        b = x[index]
        if name in AFFINE:  # a sum, since the rounding of a matrix product depends on the size of the batch
            return solver(AffineMap(lambda u: (u[:, None] * w).sum(2), b), torch.zeros_like(b))
        return solver(lambda z: torch.tanh(z @ w.T + b), torch.zeros_like(b))

    together = solve([0, 1, 2, 3, 4])
    for index in ([2], [4, 2, 0], [3, 1]):
        apart = solve(index)
        assert (apart.z - together.z[index]).abs().max() < 1e-12
        if name not in DIFFERENTIATES:  # where the products that neighbours need count too
            assert torch.equal(apart.nstep, together.nstep[index])
        assert torch.equal(apart.status, together.status[index])


@pytest.mark.parametrize("name", MONITORED)
def test_a_sample_that_is_done_is_frozen(name):
    """Sample 0 starts at its fixed point; it stays there to the last bit while the other goes on."""
    f = TanhMap.make(batch=2)
    z0 = f.z0
    z0[0] = solve_exactly(f, f.z0)[0]
    solution = as_solver(name, tol=1e-9, max_iter=100)(f, z0)
    assert torch.equal(solution.z[0], z0[0])
    assert solution.nstep[0] == 1 < solution.nstep[1]
    assert solution.converged.all()


@pytest.mark.parametrize("name", GENERAL)
def test_a_non_finite_sample_is_flagged_and_the_others_are_not_affected(name):
    def f(z):  # NaN where a sample comes near its fixed point 2 from below, sample 1 only
        fz = 0.5 * z + 1
        bad = (torch.arange(3)[:, None] == 1) & (z > 1.5)
        return torch.where(bad, torch.nan, fz)

    solver = as_solver(name, tol=1e-9, max_iter=60)
    solution = solver(f, torch.zeros(3, 4, dtype=F64))
    clean = solver(lambda z: 0.5 * z + 1, torch.zeros(3, 4, dtype=F64))
    assert solution.status.tolist() == [Status.CONVERGED, Status.NON_FINITE, Status.CONVERGED]
    assert torch.equal(solution.z[[0, 2]], clean.z[[0, 2]])
    assert solution.z.isfinite().all()
    if name in MONITORED:  # the best state before the NaN is kept, with its residual
        assert (solution.z[1] > 0).all()
        assert torch.allclose(solution.abs_residual[1], (1 - 0.5 * solution.z[1]).norm())


@pytest.mark.parametrize("name", NAMES)
def test_empty_batches_and_empty_samples_come_back(name):
    for shape in ((0, 3), (2, 0)):
        z0 = torch.zeros(shape, dtype=F64)
        f = AffineMap(lambda u: 0.5 * u, torch.zeros_like(z0))
        solution = as_solver(name, max_iter=5)(f, z0)
        assert solution.z.shape == shape
        assert solution.residual.shape == (shape[0],)
        assert solution.converged.all()


@pytest.mark.parametrize("name", NAMES)
def test_prints_compares_and_pickles_as_the_call_that_made_it(name):
    solver = as_solver(name, tol=0.25, max_iter=7)
    assert repr(solver) == f"{type(solver).__name__}(max_iter=7, tol=0.25)"
    assert eval(repr(solver), vars(torchdeq)) == solver
    assert pickle.loads(pickle.dumps(solver)) == solver


@pytest.mark.parametrize("name", NAMES)
def test_wrong_options_are_errors_that_teach(name):
    with pytest.raises(TypeError, match=r"no option 'max_itr'. Did you mean 'max_iter'"):
        as_solver(name, max_itr=3)
    with pytest.raises(TypeError, match=r"no option 'max_itr'. Did you mean 'max_iter'"):
        type(as_solver(name))(max_itr=3)
    with pytest.raises(TypeError, match="takes its options by name, got 0.001"):
        type(as_solver(name))(1e-3)
    for bad in ({"max_iter": 0}, {"max_iter": 2.5}, {"tol": -1.0}, {"stop_mode": "relative"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            as_solver(name, **bad)


@pytest.mark.parametrize("name", GENERAL)
def test_records_as_many_states_as_asked(name):
    f = TanhMap.make(gain=0.5)
    full = as_solver(name, tol=1e-10, max_iter=60)(f, f.z0, record=[1, 3, 59])
    assert len(full.states) == 3
    assert torch.equal(full.states[0], f.z0)
    if name in MONITORED:  # converged long before 59: the solution stands in for what was not reached
        assert full.nfe < 59
        assert torch.equal(full.states[2], full.z)
    for bad in ([3, 1], [0], [61], [2, 2]):
        with pytest.raises(ValueError, match="increase"):
            as_solver(name, max_iter=60)(f, f.z0, record=bad)


@pytest.mark.parametrize("name", MONITORED)
def test_return_final_makes_all_evaluations_and_returns_the_last(name):
    f = Counted(TanhMap.make(gain=0.5))
    solution = as_solver(name, max_iter=20, tol=0.1, return_final=True)(f, f.f.z0)
    assert solution.nfe == 20
    assert f.calls == 20 or name in DIFFERENTIATES
    assert solution.converged.all()
    assert (solution.residual <= solution.trace.min(dim=0).values * (1 + 1e-6) + 1e-12).all()


@pytest.mark.parametrize("name", MONITORED)
def test_coupled_samples_converge_on_one_iterate_or_say_that_they_did_not(name):
    """Sample 2 starts with residual 0; where best states were mixed the answer was no fixed point at all."""
    mix = torch.tensor([[0.5, 0.45], [0.45, 0.5]], dtype=F64)
    f = lambda z: mix @ z + torch.tensor([[1.0], [0.0]], dtype=F64)  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CouplingWarning)
        solution = as_solver(name, tol=1e-6, max_iter=400)(f, torch.zeros(2, 1, dtype=F64))
    r = (f(solution.z) - solution.z).norm(dim=1)
    if solution.coupled and solution.abs_residual[0] == solution.abs_residual[1]:  # that of the one system
        assert torch.allclose(r.norm().expand(2), solution.abs_residual, atol=1e-14)
    else:
        assert torch.allclose(r, solution.abs_residual, atol=1e-14)
        assert torch.equal(solution.converged, r <= 1e-6)
    assert solution.converged.all()
    together = as_solver(name, tol=1e-6, max_iter=400)(f, torch.zeros(2, 1, dtype=F64), batch_dims=0)
    assert together.converged.all()
    assert torch.allclose(together.z, torch.tensor([[200 / 19], [180 / 19]], dtype=F64), rtol=1e-4)


@pytest.mark.parametrize("name", MONITORED)
def test_best_states_of_coupled_samples_are_not_mixed(name):
    f = CoupledMap.make(gain=1.6)
    solution = as_solver(name, tol=1e-13, max_iter=6)(f, f.z0)
    r = (f(solution.z) - solution.z).norm(dim=1)
    assert torch.allclose(r, solution.abs_residual, rtol=1e-9)


@pytest.mark.parametrize("name", GENERAL)
def test_tuples_and_dicts_come_back_as_they_were(name):
    z0 = {"a": torch.zeros(3, 2, dtype=F64), "b": torch.zeros(3, 4, 2, dtype=F64)}
    f = lambda s: {"a": 0.1 * s["b"].sum(1) + 0.2 * s["a"], "b": 0.2 * s["b"] + s["a"][:, None] * 0.1 + 1}  # noqa: E731
    solution = as_solver(name, tol=1e-9, max_iter=100)(f, z0)
    again = f(solution.z)
    assert solution.z["a"].shape == (3, 2)
    assert solution.z["b"].shape == (3, 4, 2)
    for key in z0:
        assert torch.allclose(again[key], solution.z[key], atol=1e-8)
        assert torch.equal(z0[key], torch.zeros_like(z0[key])), "the start is not changed"


@pytest.mark.parametrize("name", GENERAL)
def test_the_call_builds_no_graph(name):
    f = TanhMap.make()
    assert not as_solver(name, max_iter=5)(f, f.z0).z.requires_grad


@pytest.mark.parametrize("name", MONITORED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_state_that_dies_at_zero_is_a_fixed_point_also_in_relative_terms(name, dtype):
    f = lambda z: torch.relu(0.5 * z - 10)  # noqa: E731
    solution = as_solver(name, stop_mode="rel")(f, torch.full((2, 4), 5.0, dtype=dtype))
    assert solution.converged.all()
    assert torch.equal(solution.z, torch.zeros(2, 4, dtype=dtype))


@pytest.mark.parametrize("name", MONITORED)
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_float32_states_of_extreme_scale(name, scale):
    a = random_matrix(3, 0.5).float()
    b = torch.tensor([[1.0, -2.0, 0.5]]) * scale
    exact = torch.linalg.solve(torch.eye(3) - a, b[0])
    solution = as_solver(name, stop_mode="rel", tol=1e-5)(lambda z: z @ a.T + b, torch.zeros(1, 3))
    r = ((solution.z @ a.T + b - solution.z) / scale).norm() / (exact / scale).norm()
    assert solution.z.isfinite().all()
    assert bool(solution.converged) == bool(r <= 2e-5), "never a false 'converged'"
    if name == "fixed_point_iter":
        assert solution.converged.all()


@pytest.mark.parametrize("name", GENERAL)
def test_what_is_returned_is_not_the_callers_memory(name):
    for max_iter, z0 in ((1, torch.ones(2, 3)), (30, torch.zeros(2, 3))):
        solution = as_solver(name, max_iter=max_iter)(lambda z: 0.5 * z, z0, record=[1])
        for z in (solution.z, solution.states[0]):
            assert z.data_ptr() != z0.data_ptr()


@pytest.mark.parametrize("name", [n for n in GENERAL if n not in DIFFERENTIATES])
def test_an_f_that_reuses_its_output_memory_is_solved_right(name):
    buffer = np.zeros((1, 3))

    def f(z):
        np.multiply(z.numpy(), 0.5, out=buffer)
        buffer[:] += 1
        return torch.from_numpy(buffer)

    z = as_solver(name, tol=1e-9)(f, torch.zeros(1, 3, dtype=F64)).z
    assert torch.allclose(z, torch.full((1, 3), 2.0, dtype=F64))


@pytest.mark.parametrize("name", GENERAL)
def test_an_f_in_place_is_refused_under_inference_mode_too(name):
    with torch.inference_mode(), pytest.raises(RuntimeError, match="in place"):
        as_solver(name)(lambda z: z.mul_(0.5).add_(1), torch.ones(1, 1))


def test_an_empty_batch_takes_one_evaluation():
    for name in MONITORED:
        assert as_solver(name, max_iter=100)(lambda z: 0.5 * z, torch.zeros(0, 3)).nfe == 1


@pytest.mark.parametrize("name", MONITORED)
def test_a_nan_neighbour_does_not_hide_what_coupled_samples_reached(name):
    """Two samples that turn each other, and one that is NaN: the best evaluation of the two is returned."""

    def f(z):
        return torch.stack([0.9 * z[1] + 1, -0.9 * z[0], z[2] * torch.nan])

    with torch.no_grad():
        solution = as_solver(name, tol=1e-12, max_iter=6)(f, torch.zeros(3, 1, dtype=F64))
    assert solution.status[2] == Status.NON_FINITE
    assert solution.residual[:2].isfinite().all()
    r = (f(solution.z)[:2] - solution.z[:2]).norm(dim=1)
    assert torch.allclose(r, solution.abs_residual[:2], atol=1e-12)


# Bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [16, 33])
def test_a_sample_is_bit_identical_alone_and_among_any_neighbours(name, n):
    """In float64 on the CPU, with an f that is: a sum, where a matrix product would round by the size of the batch."""
    w = random_matrix(n, 0.9)
    if getattr(as_solver(name), "symmetric_only", False):
        w = (w + w.T) / 4
    x = (
        torch.randn(7, n, dtype=F64, generator=torch.Generator().manual_seed(5))
        * torch.logspace(-2, 1, 7)[:, None]
    )
    solver = as_solver(name, tol=1e-9, max_iter=400)

    def solve(index):
        b = x[index].clone()
        if name in AFFINE:
            return solver(AffineMap(lambda u: (u[:, None] * w).sum(2), b), torch.zeros_like(b)).z
        if name in DIFFERENTIATES:  # of which the derivative is such a map too
            return solver(lambda z: torch.tanh(0.6 * z - 0.7 * z.roll(1, 1) + b), torch.zeros_like(b)).z
        return solver(lambda z: torch.tanh((z[:, None] * w).sum(2) + b), torch.zeros_like(b)).z

    together = solve(list(range(7)))
    for index in ([0], [6], [3, 1], [5, 2, 4], [6, 5, 4, 3, 2, 1]):
        assert torch.equal(solve(index), together[index])


# The options of the loop --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MONITORED)
def test_min_iter_goes_on_after_convergence(name):
    f = TanhMap.make(gain=0.3)
    usual = as_solver(name, tol=1e-2)(f, f.z0)
    longer = as_solver(name, tol=1e-2, min_iter=usual.nfe + 3)(f, f.z0)
    assert longer.nfe >= usual.nfe + 3
    assert longer.converged.all()
    assert longer.residual.max() < usual.residual.max()
    with pytest.raises(ValueError, match="min_iter"):
        as_solver(name, min_iter=51)


@pytest.mark.parametrize("name", MONITORED)
@pytest.mark.parametrize("every", [2, 5])
def test_check_every_gives_the_same_solution_with_fewer_questions(name, every, monkeypatch):
    f = TanhMap.make(gain=0.8)
    usual = as_solver(name, tol=1e-8, max_iter=200)(f, f.z0)
    reads = []
    monkeypatch.setattr(StopFlag, "__call__", lambda self, flags: reads.append(1) or flags.tolist())
    seldom = as_solver(name, tol=1e-8, max_iter=200, check_every=every)(f, f.z0)
    assert torch.equal(seldom.z, usual.z)
    assert torch.equal(seldom.nstep, usual.nstep)
    assert torch.equal(seldom.status, usual.status)
    assert usual.nfe <= seldom.nfe
    if name not in DIFFERENTIATES:  # whose evaluations between iterates are never asked about
        assert seldom.nfe < usual.nfe + every
        assert len(reads) == seldom.nfe // every


@pytest.mark.parametrize("name", MONITORED)
def test_a_flag_that_is_read_late_changes_nothing_but_one_evaluation(name, monkeypatch):
    """What happens on a CUDA device, where the host reads the flags of the evaluation before."""
    f = TanhMap.make(gain=0.8)
    usual = as_solver(name, tol=1e-8, max_iter=200)(f, f.z0)
    usually = StopFlag.__init__
    monkeypatch.setattr(StopFlag, "__init__", lambda self, *, late: usually(self, late=True))
    solution = as_solver(name, tol=1e-8, max_iter=200)(f, f.z0)
    assert torch.equal(solution.z, usual.z)
    if name in DIFFERENTIATES:  # a product more in each linear solve
        assert solution.nfe <= 1.5 * usual.nfe
    else:
        assert torch.equal(solution.nstep, usual.nstep)
        assert solution.nfe == usual.nfe + 1
    assert solution.converged.all()


@pytest.mark.parametrize("name", MONITORED)
@pytest.mark.parametrize("mode", ["abs", "rel"])
def test_with_norm_max_a_small_leaf_cannot_hide_in_a_big_one(name, mode):
    """The big leaf is at its fixed point from the start; the small one is not."""
    f = lambda s: {"big": 0.5 * s["big"] + 1e6, "small": 0.5 * torch.cos(s["small"]) + s["small"] * 0.3}  # noqa: E731
    z0 = {"big": torch.full((2, 3), 2e6, dtype=F64), "small": torch.zeros(2, 2, dtype=F64)}
    tol = 1e-7 if mode == "rel" else 1e-3
    hidden = as_solver(name, tol=tol, stop_mode=mode)(f, z0)
    seen = as_solver(name, tol=tol, stop_mode=mode, norm="max")(f, z0)

    def residual(z, key):
        r = (f(z)[key] - z[key]).norm(dim=1)
        return r / f(z)[key].norm(dim=1) if mode == "rel" else r

    assert seen.converged.all()
    worst = torch.maximum(residual(seen.z, "big"), residual(seen.z, "small"))
    assert (worst <= tol).all()
    assert torch.allclose(worst, seen.residual, rtol=1e-6, atol=1e-12)
    assert seen.trace.shape == (len(seen.trace), 2)
    if mode == "rel":
        assert hidden.nfe < seen.nfe
        assert residual(hidden.z, "small").max() > 100 * tol


@pytest.mark.parametrize("name", MONITORED)
def test_a_half_precision_f_ends_by_stagnation_and_not_by_max_iter(name):
    """The residual of a bfloat16 f has a floor of some 2⁻⁹ relative (numbers: float32 sums, f in bfloat16)."""
    gen = torch.Generator().manual_seed(0)
    w = (torch.randn(64, 64, generator=gen) * 0.8 / 8).bfloat16()
    x = torch.randn(4, 64, generator=gen).bfloat16()
    solver = as_solver(name, tol=1e-6, stop_mode="rel", max_iter=400)
    solution = solver(lambda z: torch.tanh(z @ w.T + x), torch.zeros_like(x))
    assert solution.nfe < (300 if name in DIFFERENTIATES else 100)
    assert (solution.status == Status.STALLED).all()
    assert solution.z.isfinite().all()
    assert solution.residual.max() <= 2e-2
    assert "rounding" in Status.STALLED.sentence
    assert as_solver(name, tol=1e-6, stop_mode="rel", patience=0, max_iter=60)(
        lambda z: torch.tanh(z @ w.T + x), torch.zeros_like(x)
    ).nfe in range(60, 65)  # never gives up; and what an unconverged solve may add


@pytest.mark.parametrize("name", MONITORED)
def test_throw_raises(name):
    f = TanhMap.make(gain=0.8)
    with pytest.raises(ConvergenceError, match="4 of 4 samples did not converge.*max_iter"):
        as_solver(name, tol=1e-9, max_iter=3)(f, f.z0, throw=True)
    as_solver(name, tol=1e-2)(f, f.z0, throw=True)


# Samples that are done ----------------------------------------------------------------------------------


class Rows:
    """A map that knows which samples it is asked about, and how many it has computed."""

    def __init__(self, f: TanhMap):
        self.w, self.x, self.computed = f.w.detach(), f.x.detach(), 0

    def __call__(self, z, rows=None):
        self.computed += len(z)
        x = self.x if rows is None else self.x[rows]
        assert len(x) == len(z)
        return torch.tanh((z[:, None] * self.w).sum(2) + x)


@pytest.mark.parametrize("name", MONITORED)
def test_compact_leaves_out_who_is_done_and_gives_the_same_answer(name):
    f = TanhMap.make(batch=8, gain=1.2)
    f.x.data[:6] *= 20  # saturated: solved in a few steps
    whole, few = Rows(f), Rows(f)
    options = {"tol": 1e-9, "max_iter": 400}
    usual = as_solver(name, **options)(whole, f.z0)
    compact = as_solver(name, **options, compact=True)(few, f.z0)
    assert usual.converged.all()
    assert torch.equal(compact.z, usual.z)
    assert torch.equal(compact.status, usual.status)
    assert torch.allclose(compact.residual, usual.residual, atol=1e-15)
    if name in DIFFERENTIATES:  # which is done with all in so few iterates that half are never alone
        assert few.computed <= whole.computed
    else:
        assert few.computed < 0.7 * whole.computed
    assert compact.trace.shape[1] == 8


@pytest.mark.parametrize("name", MONITORED)
def test_compact_refuses_a_map_that_couples_samples(name):
    x = torch.tensor([[1.0], [2.0], [30.0], [4.0]], dtype=F64)
    f = lambda z: 0.4 * torch.tanh(z) + 0.3 * z.mean(0) + x[: len(z)] * 0.01  # noqa: E731
    z0 = torch.zeros(4, 1, dtype=F64)
    z0[:3] = solve_exactly(f, z0)[:3]
    solver = as_solver(name, tol=1e-2, compact=True)
    with pytest.raises(ValueError, match="does not treat samples separately"):
        solver(f, z0)


def test_compact_with_a_record_and_a_closure_over_the_batch():
    f = TanhMap.make(batch=4, gain=1.0)
    f.x.data[:3] *= 30
    solver = as_solver("anderson", tol=1e-10, max_iter=200)
    usual = solver(Rows(f), f.z0, record=[2, 9, 12])
    compact = solver.replace(compact=True)(Rows(f), f.z0, record=[2, 9, 12])
    assert torch.equal(compact.states[0], usual.states[0])
    sizes = [(f(z) - z).norm(dim=1) for z in (*compact.states, compact.z)]
    assert all((b <= a).all() for a, b in itertools.pairwise(sizes))
    with pytest.raises(RuntimeError, match="rows"):  # f closes over all of x and takes no `rows`
        solver.replace(compact=True)(lambda z: torch.tanh(z @ f.w.T + f.x), f.z0)


@pytest.mark.parametrize("name", MONITORED)
def test_a_slowly_drifting_input_costs_half_of_a_cold_start(name):
    w = random_matrix(64, 0.9)
    gen = torch.Generator().manual_seed(1)
    x, drift = (torch.randn(4, 64, dtype=F64, generator=gen) for _ in range(2))
    solver = as_solver(name, tol=1e-6, stop_mode="rel", max_iter=200)
    z = torch.zeros_like(x)
    for step in range(4):
        f = lambda z, now=x + 1e-4 * step * drift: torch.tanh(z @ w.T + now)  # noqa: E731
        cold, warm = solver(f, torch.zeros_like(x)), solver(f, z)
        assert warm.converged.all()
        z = warm.z
        if step:
            assert warm.nfe <= 0.5 * cold.nfe


# What was wrong once --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["multisecant", "broyden", "anderson"])
def test_a_half_precision_solve_far_from_rounding_is_not_given_up(name):
    gen = torch.Generator().manual_seed(0)
    w, x = torch.randn(64, 64, generator=gen) * 1.8 / 8, torch.randn(8, 64, generator=gen)
    solver = as_solver(name, tol=3e-2, stop_mode="rel", max_iter=300)
    with torch.autocast("cpu", torch.bfloat16):
        solution = solver(lambda z: torch.tanh(z @ w.T + x), torch.zeros_like(x))
    stalled = solution.status == Status.STALLED
    assert (solution.residual[stalled] < 0.1).all()


def test_when_a_sample_stalls_does_not_depend_on_its_neighbours():
    """One creeps in half precision; the other turns for ever, so that every evaluation is looked at closely."""
    slopes = torch.tensor([[0.9995], [-1.0]])
    solver = as_solver("fixed_point_iter", tol=1e-6, max_iter=60)

    def solve(rows):
        a = slopes[rows]
        with torch.autocast("cpu", torch.bfloat16):
            return solver(lambda z: a * z + (1 - a), torch.zeros(len(rows), 1))

    alone, beside = solve([0]), solve([0, 1])
    assert alone.nstep[0] == beside.nstep[0]
    assert alone.status[0] == beside.status[0]
    assert torch.equal(alone.z[0], beside.z[0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_said_of_a_half_precision_state_is_true_of_the_state_that_is_returned(name, dtype):
    """The state is carried in float32 and rounded when it is returned. Its residual is that of the rounded one."""
    gen = torch.Generator().manual_seed(1)
    for tol in (2e-2, 2e-3):
        w = (torch.randn(16, 16, generator=gen) * 0.15).to(dtype)
        if getattr(as_solver(name), "symmetric_only", False):
            w = (w + w.T) / 2
        x = torch.randn(6, 16, generator=gen).to(dtype)
        solver = as_solver(name, tol=tol, stop_mode="rel")
        if name in AFFINE:
            f = AffineMap(lambda u, w=w: u @ w.T, x)
            scale = x.float().norm(dim=1)
        else:
            f, scale = lambda z, w=w, x=x: torch.tanh(z @ w.T + x), None
        solution = solver(f, torch.zeros_like(x))
        if not as_solver(name).monitors and name not in AFFINE:
            continue
        fz = (f.linear(solution.z).float() + x.float()) if name in AFFINE else f(solution.z).float()
        r = (fz - solution.z.float()).norm(dim=1) / (fz.norm(dim=1) if scale is None else scale)
        assert torch.allclose(r, solution.residual, rtol=1e-3, atol=1e-6)
        assert (r[solution.converged] <= tol * (1 + 1e-3)).all()


@pytest.mark.parametrize("name", MONITORED)
def test_recording_does_not_change_the_answer(name):
    mix = torch.linalg.qr(torch.randn(24, 24, dtype=F64, generator=torch.Generator().manual_seed(0))).Q * 0.98
    f = lambda z: (mix @ z.reshape(-1)).reshape(z.shape) + 1  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CouplingWarning)
        plain = as_solver(name, tol=1e-8)(f, torch.zeros(6, 4, dtype=F64))
        recorded = as_solver(name, tol=1e-8)(f, torch.zeros(6, 4, dtype=F64), record=[5])
    assert torch.equal(plain.z, recorded.z)
    assert len(recorded.states) == 1


@pytest.mark.parametrize("name", MONITORED)
def test_an_unconverged_solve_whose_last_iterate_is_the_best_makes_no_evaluation_more(name):
    """Nor one whose samples all have their best at one evaluation: there is no mixture to measure."""
    calls = []
    f = lambda z: calls.append(1) or -2 * z + 1  # noqa: E731
    as_solver(name, max_iter=3, tol=1e-30)(f, torch.zeros(2, 2, dtype=F64))
    assert len(calls) <= 3


def test_with_min_iter_the_best_iterate_is_returned_all_the_same():
    residuals = iter([1.0, 1e-6, 5e-3, 5e-3, 5e-3])
    solution = as_solver("fixed_point_iter", tol=1e-2, min_iter=5)(
        lambda z: z + next(residuals), torch.zeros(1, 1, dtype=F64)
    )
    assert solution.nfe == 5
    assert float(solution.residual) == pytest.approx(1e-6)


# compact --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MONITORED)
@pytest.mark.parametrize("max_iter", range(1, 9))
def test_compact_at_any_budget(name, max_iter):
    c = torch.tensor([[0.1], [0.99]], dtype=F64)
    f = lambda z, rows=None: (c if rows is None else c[rows]) * torch.sin(z)  # noqa: E731
    solver = as_solver(name, tol=1e-2, max_iter=max_iter, compact=True)
    wanted = list(range(1, max_iter + 1))
    solution = solver(f, torch.ones(2, 3, dtype=F64), record=wanted)
    r = (f(solution.z) - solution.z).norm(dim=1)
    assert torch.allclose(r, solution.abs_residual, atol=1e-14)
    assert len(solution.states) == len(wanted)
    assert all(z.shape == (2, 3) for z in solution.states)
    assert len(solution.trace) in (solution.nfe, solution.nfe - 1)
    assert solution.nfe <= max_iter + 1


@pytest.mark.parametrize("name", [n for n in SEPARATE if as_solver(n).recovers])
def test_compact_while_a_sample_is_being_rescued(name):
    calls = []

    def f(z, rows=None):
        calls.append(len(z))
        rows = torch.arange(3) if rows is None else rows
        hard = rows[:, None] == 2
        out = torch.where(hard, torch.cos(z), 0.01 * z + 1)
        return torch.where(hard & torch.tensor(len(calls) == 3), torch.nan, out)

    solution = as_solver(name, tol=1e-2, compact=True)(f, torch.zeros(3, 2, dtype=F64))
    assert solution.converged.all()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_compact_never_asks_about_no_samples(every, late, monkeypatch):
    usually = StopFlag.__init__
    monkeypatch.setattr(StopFlag, "__init__", lambda self, *, late: usually(self, late=late_))
    late_ = late
    sizes = []
    c = torch.tensor([[0.1], [0.1], [0.9], [0.5]], dtype=F64)

    def f(z, rows=None):
        sizes.append(len(z))
        return (c if rows is None else c[rows]) * torch.cos(z)

    solver = as_solver("fixed_point_iter", tol=1e-6, max_iter=300, check_every=every, compact=True)
    assert solver(f, torch.zeros(4, 1, dtype=F64)).converged.all()
    assert min(sizes) >= 1
    assert sizes[-1] == 1


def test_compact_refuses_an_affine_map_at_the_door():
    with pytest.raises(ValueError, match="affine map"):
        as_solver("anderson", compact=True)(AffineMap(lambda u: u / 2, torch.ones(2, 3)), torch.zeros(2, 3))


def test_functions_as_solvers_can_be_hashed():
    function = lambda f, x0, **options: (x0, [], {})  # noqa: E731
    assert len({as_solver(function, m=3), as_solver(function, m=3), as_solver(function, tol=0.5)}) == 2


@pytest.mark.parametrize("strength", [1e-4, 1e-3, 1e-2])
def test_compact_does_not_call_converged_what_a_weak_coupling_keeps_from_it(strength):
    """It refuses, or what it returns is as good as it says."""
    gen = torch.Generator().manual_seed(0)
    w, x = torch.randn(8, 8, generator=gen) * 0.2, torch.randn(64, 8, generator=gen)
    scale = torch.linspace(0.1, 2.5, 64)[:, None]

    def f(z, rows=None):
        rows = torch.arange(64) if rows is None else rows
        return scale[rows] * torch.tanh(z @ w + strength * z.mean(0) + x[rows])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CouplingWarning)
        try:
            solution = as_solver("anderson", tol=1e-5, compact=True)(f, torch.zeros(64, 8))
        except ValueError as refusal:
            if "does not treat samples separately" not in str(refusal):
                raise
            return
    r = (f(solution.z) - solution.z).norm(dim=1)
    assert (r[solution.converged] <= 2e-5).all()


def test_no_more_differences_are_kept_than_can_say_anything():
    solver = as_solver("broyden", max_iter=300, tol=0.0)
    state, z = solver.init(torch.zeros(2, 3, dtype=F64)), torch.zeros(2, 3, dtype=F64)
    for _ in range(40):
        z, state = solver.step(None, z, torch.sin(40 * z) + z.flip(-1) + 1, state)
    assert state.v.shape[1] == 9
