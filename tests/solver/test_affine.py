"""What every solver of affine maps must satisfy, over the registry."""

from __future__ import annotations

import pytest
import torch

from tests.problems import F64, random_matrix
from torchdeq import GMRES, SOLVERS, AffineMap, CouplingWarning, Status, as_solver
from torchdeq._replay import AutocastState
from torchdeq._state import layout_of
from torchdeq.solver import AffineSolver
from torchdeq.solver.affine import dot, ratio
from torchdeq.solver.maps import Tally

NAMES = [n for n in SOLVERS if isinstance(as_solver(n), AffineSolver)]
PRECONDITIONABLE = [n for n in NAMES if as_solver(n).preconditionable]


def symmetric_matrix(n, gain, seed=0):
    a = random_matrix(n, 1.0, seed)
    a = a + a.T
    return gain * a / torch.linalg.matrix_norm(a, 2)


def make(n=16, batch=3, gain=0.7, seed=0):
    """A contraction that is symmetric, so that every solver is at home."""
    a = symmetric_matrix(n, gain, seed)
    b = torch.randn(batch, n, dtype=F64, generator=torch.Generator().manual_seed(seed + 9))
    return a, b, AffineMap(lambda u: (u[:, None] * a).sum(2), b)


def exact(a, b):
    return torch.linalg.solve(torch.eye(len(a), dtype=F64) - a, b.T).T


def tally(linear, limit=1000):
    return Tally(linear, AutocastState.capture(torch.device("cpu")), limit)


# The loop --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_is_the_same_to_the_last_bit_alone_and_among_others(name):
    """With a map that rounds alike for any size of the batch."""
    a, b, f = make(batch=5)
    b = b * torch.tensor([[1e-6], [1.0], [0.0], [1e8], [1.0]], dtype=F64)
    b[4] = torch.linalg.eigh(a).eigenvectors[:, [0, 3, 9]].sum(dim=1)  # three eigenvectors, three steps
    solver = as_solver(name, tol=1e-8, stop_mode="rel", max_iter=200)
    together = solver.run(AffineMap(f.linear, b))
    assert len(together.nstep.unique()) > 2
    for index in ([0], [1], [3], [4, 1], [2, 0, 3]):
        apart = solver.run(AffineMap(f.linear, b[index]))
        assert torch.equal(apart.z, together.z[index])
        assert torch.equal(apart.residual, together.residual[index])
        assert torch.equal(apart.nstep, together.nstep[index])
        assert torch.equal(apart.status, together.status[index])


@pytest.mark.parametrize("name", NAMES)
def test_the_status_of_a_sample_does_not_depend_on_what_its_neighbours_use_up(name):
    """Sample 0 cannot be solved and ends early, while sample 1 uses up the budget."""
    a = torch.diag(torch.cat([torch.ones(1, dtype=F64), torch.linspace(-0.9, 0.9, 60, dtype=F64)]))
    b = torch.zeros(2, 61, dtype=F64)
    b[0, 0] = b[0, 40] = 1
    b[1, 1:] = 1
    solution = as_solver(name, tol=1e-12, max_iter=12).run(AffineMap(lambda u: u @ a, b), together=False)
    stalls = Status.MAX_ITER if name == "neumann" else Status.STALLED  # a series does not know
    assert solution.status.tolist() == [stalls, Status.MAX_ITER]
    assert solution.nfe == 12


@pytest.mark.parametrize("name", NAMES)
def test_a_zero_right_hand_side_gives_zero_without_a_product(name):
    calls = []
    f = AffineMap(lambda u: calls.append(1) or u / 2, torch.zeros(2, 5, dtype=F64))
    solution = as_solver(name).run(f)
    assert torch.equal(solution.z, torch.zeros(2, 5, dtype=F64))
    assert not calls
    assert solution.converged.all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_float32_right_hand_sides_of_extreme_scale(name, scale):
    a, b, _ = make(n=8)
    a, b = a.float(), b.float()
    solution = as_solver(name, stop_mode="rel", tol=1e-4, max_iter=100).run(
        AffineMap(lambda u: u @ a.T, b * scale)
    )
    assert solution.converged.all()
    assert torch.allclose(solution.z / scale, exact(a.double(), b.double()).float(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("when", [1, 4, 7])
def test_a_product_that_is_not_finite_ends_its_sample_and_keeps_the_steps_before(name, when, bad):
    _, b, f = make()
    calls = []

    def linear(u):
        calls.append(1)
        return (
            f.linear(u) if len(calls) < when else torch.where(torch.arange(3)[:, None] == 1, bad, f.linear(u))
        )

    solver = as_solver(name, tol=1e-9, max_iter=100)
    solution, clean = solver.run(AffineMap(linear, b)), solver.run(f)
    assert solution.status.tolist() == [Status.CONVERGED, Status.NON_FINITE, Status.CONVERGED]
    assert torch.allclose(solution.z[[0, 2]], clean.z[[0, 2]], rtol=1e-12)
    assert solution.z.isfinite().all()
    r = (f(solution.z) - solution.z)[1].norm()
    assert r <= b[1].norm() * (1 + 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_steps_before_a_product_that_is_not_finite_are_not_lost(name):
    _, b, f = make()
    calls = []

    def linear(u):
        calls.append(1)
        return f.linear(u) if len(calls) != 6 else torch.full_like(u, torch.nan)

    solution = as_solver(name, tol=1e-12, max_iter=100).run(AffineMap(linear, b))
    assert (solution.status == Status.NON_FINITE).all()
    assert len(calls) == 7, "one more to measure what was there before"
    assert (solution.residual < 0.2 * b.norm(dim=1)).all()
    r = (f(solution.z) - solution.z).norm(dim=1)
    assert torch.allclose(r, solution.residual, rtol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_a_last_product_that_is_not_finite_is_no_residual(name):
    """The one that measures: what the steps have found is not known to be any good, so the start is returned."""
    _, b, f = make()
    solver = as_solver(name, tol=1e-9, max_iter=100)
    calls = []
    counted = lambda u: calls.append(1) or f.linear(u)  # noqa: E731
    solver.run(AffineMap(counted, b))
    last = len(calls)
    calls.clear()
    linear = lambda u: counted(u) if len(calls) < last - 1 else counted(u) * torch.nan  # noqa: E731
    solution = solver.run(AffineMap(linear, b))
    assert (solution.status == Status.NON_FINITE).all()
    assert torch.equal(solution.z, torch.zeros_like(b))
    assert torch.allclose(solution.residual, b.norm(dim=1))


@pytest.mark.parametrize("name", NAMES)
def test_the_result_is_never_worse_than_the_start(name):
    """A map that couples samples so strongly that what each sample's recurrence believes makes both worse."""
    a, b, _ = make(batch=2)
    f = AffineMap(lambda u: u @ a.T + 20 * torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=F64) @ u, b)
    solution = as_solver(name, tol=1e-6).run(f, together=False)
    r = (f(solution.z) - solution.z).norm(dim=1)
    assert torch.allclose(r, solution.residual, rtol=1e-10)
    assert (r <= b.norm(dim=1) * (1 + 1e-12)).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_that_is_done_is_carried_along_at_zero(name):
    """Where no map is surprised: a probe beyond the solution, or a NaN, might do harm in a coupled map."""
    a, b, f = make()
    values, vectors = torch.linalg.eigh(a)
    b[1] = vectors[:, values.abs().argmin()]  # one product, or a short series
    seen = []
    linear = lambda u: seen.append(u[1].any()) or f.linear(u)  # noqa: E731
    solution = as_solver(name, tol=1e-8, max_iter=100).run(AffineMap(linear, b))
    assert solution.converged.all()
    *probes, check = torch.stack(seen).tolist()
    done = probes.index(False)
    assert 0 < done < len(probes) - 3
    assert not any(probes[done:])
    assert check, "the residual is that of its solution"


@pytest.mark.parametrize("name", NAMES)
def test_a_start_is_used(name):
    a, b, f = make()
    near = exact(a, b) + 1e-5
    solver = as_solver(name, tol=1e-8, max_iter=100)
    warm, cold = solver.run(f, near), solver.run(f)
    assert warm.converged.all()
    assert warm.nstep.max() < cold.nstep.max()
    assert torch.allclose(warm.z, cold.z, atol=1e-7)
    done = solver.run(f, exact(a, b))
    assert done.nfe == 1
    assert torch.equal(done.z, exact(a, b))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("check_every", [2, 5])
def test_asking_less_often_whether_to_stop_changes_no_sample(name, check_every):
    _, b, f = make()
    often = as_solver(name, tol=1e-8, max_iter=100).run(f)
    seldom = as_solver(name, tol=1e-8, max_iter=100, check_every=check_every).run(f)
    assert torch.allclose(often.z, seldom.z, rtol=1e-12)
    assert torch.equal(often.nstep, seldom.nstep)
    assert seldom.nfe - often.nfe == -int(often.nstep.max()) % check_every


@pytest.mark.parametrize("name", NAMES)
def test_the_products_run_under_the_callers_autocast_and_the_sums_do_not(name):
    a, b, _ = make()
    a, b = a.float(), b.float()
    seen = []

    def linear(u):
        out = u @ a.T
        seen.append((u.dtype, out.dtype))
        return out.float()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = as_solver(name, tol=0.05, stop_mode="rel").run(AffineMap(linear, b))
    assert set(seen) == {(torch.float32, torch.bfloat16)}
    assert solution.converged.all()


def test_a_map_that_couples_samples_is_solved_as_one_system_and_the_user_is_told():
    coupling = random_matrix(6, 0.9, 3)
    b = torch.randn(2, 3, dtype=F64, generator=torch.Generator().manual_seed(2))
    f = AffineMap(lambda u: (coupling @ u.reshape(-1)).reshape(2, 3), b)
    with pytest.warns(CouplingWarning):
        solution = GMRES(tol=1e-9).run(f)
    assert solution.converged.all()
    assert torch.allclose(solution.z.reshape(1, -1), exact(coupling, b.reshape(1, -1)), atol=1e-7)


# A preconditioner ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRECONDITIONABLE)
def test_with_the_inverse_as_preconditioner_one_product_is_enough(name):
    a, b, f = make(gain=0.95)
    inverse = torch.linalg.inv(torch.eye(16, dtype=F64) - a)
    solution = as_solver(name, tol=1e-9).run(AffineMap(f.linear, b, lambda p: p @ inverse.T))
    assert solution.converged.all()
    assert solution.nstep.tolist() == [1, 1, 1]
    assert torch.allclose(solution.z, exact(a, b), atol=1e-7)


@pytest.mark.parametrize("name", PRECONDITIONABLE)
def test_with_a_near_inverse_half_the_products_are_enough_and_its_own_are_not_counted(name):
    a, b, f = make(gain=0.9)
    near = torch.linalg.inv(torch.eye(16, dtype=F64) - a - random_matrix(16, 0.02, 3))
    calls = []
    solver = as_solver(name, tol=1e-8, max_iter=300)
    plain = solver.run(f)
    helped = solver.run(AffineMap(lambda u: calls.append(1) or f.linear(u), b, lambda p: p @ near.T))
    assert plain.converged.all()
    assert helped.converged.all()
    assert helped.nfe == len(calls) <= plain.nfe / 2
    assert torch.allclose(helped.z, exact(a, b), atol=1e-6)
    r = (f(helped.z) - helped.z).norm(dim=1)
    assert torch.allclose(r, helped.residual, rtol=1e-6, atol=1e-15), "of the system without preconditioner"


@pytest.mark.parametrize("name", PRECONDITIONABLE)
def test_a_preconditioner_goes_with_a_start_and_with_a_state_of_several_leaves(name):
    a = symmetric_matrix(6, 0.8)
    inverse = torch.linalg.inv(torch.eye(6, dtype=F64) - a)
    split = lambda z: (z[:, :2], z[:, 2:])  # noqa: E731
    apply = lambda m: lambda s: split(torch.cat(s, 1) @ m.T)  # noqa: E731
    b = torch.ones(2, 6, dtype=F64)
    solution = as_solver(name, tol=1e-9)(
        AffineMap(apply(a), split(b), apply(inverse)), split(torch.full_like(b, 3.0))
    )
    assert solution.converged.all()
    assert solution.nstep.tolist() == [1, 1]
    assert torch.allclose(torch.cat(solution.z, 1), exact(a, b), atol=1e-7)


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(PRECONDITIONABLE)))
def test_a_method_that_lives_on_symmetry_refuses_a_preconditioner(name):
    _, b, f = make()
    with pytest.raises(ValueError, match="allows no preconditioner.*GMRES"):
        as_solver(name).run(AffineMap(f.linear, b, lambda p: p))


# norm='max' ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stop_mode", ["abs", "rel"])
def test_with_the_largest_leaf_as_norm_no_leaf_hides(name, stop_mode):
    a = symmetric_matrix(40, 0.9)
    b = torch.randn(3, 40, dtype=F64, generator=torch.Generator().manual_seed(0))
    b[:, :3] *= 1e-5  # a small leaf
    b[1, 3:5] = 0  # a leaf without a right-hand side
    split = lambda z: (z[:, :3], z[:, 3:5], z[:, 5:])  # noqa: E731
    f = AffineMap(lambda s: split(torch.cat(s, 1) @ a.T), split(b))
    solution = as_solver(name, tol=1e-4, stop_mode=stop_mode, norm="max", max_iter=200)(
        f, split(torch.zeros_like(b))
    )
    z = torch.cat(solution.z, 1)
    r = torch.stack([leaf.norm(dim=1) for leaf in split(b + z @ a.T - z)], dim=1)
    scale = torch.stack([leaf.norm(dim=1) for leaf in split(b)], dim=1)
    scale = torch.where(scale > 0, scale, b.norm(dim=1, keepdim=True))
    assert solution.converged.all()
    assert torch.allclose(solution.abs_residual, r.amax(dim=1), rtol=1e-6, atol=1e-15)
    assert torch.allclose(solution.rel_residual, (r / scale).amax(dim=1), rtol=1e-6, atol=1e-12)
    if stop_mode == "rel":
        lax = as_solver(name, tol=1e-4, stop_mode="rel", max_iter=200)(f, split(torch.zeros_like(b)))
        assert (lax.nstep < solution.nstep).all(), "the test would pass without the option"


def test_the_largest_leaf_needs_leaves_that_are_known():
    """On a flat state, `layout` says where they are; without it the norm is that of the whole sample."""
    a, b, f = make(n=4)
    layout = layout_of((b[:, :1], b[:, 1:]))
    solver = GMRES(tol=0.0, norm="max", max_iter=2)
    whole, leaves = solver.run(f), solver.run(f, layout=layout)
    r = f(whole.z) - whole.z
    assert torch.equal(whole.z, leaves.z)
    assert torch.allclose(whole.residual, r.norm(dim=1))
    assert torch.allclose(leaves.residual, torch.maximum(r[:, 0].abs(), r[:, 1:].norm(dim=1)))


# Inside another method -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("check", [True, False])
def test_inside_another_method_each_sample_has_its_own_limit(name, check):
    a, b, f = make()
    linear = tally(f.linear)
    limit = torch.tensor([1e-6, torch.inf, 1e-2], dtype=F64)
    found = as_solver(name).solve(linear, b, limit=limit, budget=200, check=check)
    r = b + f.linear(found.u) - found.u
    assert (r.norm(dim=1)[[0, 2]] <= limit[[0, 2]] * (1 + 1e-6)).all()
    assert found.steps[0] > found.steps[2] > found.steps[1] == 0
    assert torch.equal(found.u[1], torch.zeros(16, dtype=F64)), "inf: carried along at 0"
    assert linear.calls == found.steps.max() + check
    assert torch.allclose(found.size[[0, 2]], r.norm(dim=1)[[0, 2]], rtol=1e-6)
    if check:
        assert torch.equal(found.r, r)
    assert not found.failed.any()
    assert not found.unfinished.any()


@pytest.mark.parametrize("name", NAMES)
def test_inside_another_method_the_count_and_the_budget_are_shared(name):
    _, b, f = make()
    linear = tally(f.linear)
    linear.calls = 90  # by the other method
    found = as_solver(name).solve(linear, b, limit=torch.full((3,), 1e-30, dtype=F64), budget=95, check=False)
    assert linear.calls == 95
    assert found.steps.tolist() == [5, 5, 5]
    assert found.unfinished.all()
    assert len(found.trace) == 6
    found = as_solver(name).solve(linear, b, limit=torch.ones(3, dtype=F64), budget=95)
    assert linear.calls == 95
    assert not found.steps.any()
    assert torch.equal(found.u, torch.zeros_like(b))


def test_a_residual_that_is_not_finite_stays_with_its_sample():
    _, b, f = make()
    b[1, 3] = torch.nan
    found = GMRES().solve(tally(f.linear), b, limit=torch.full((3,), 1e-8, dtype=F64), budget=50)
    assert found.failed.tolist() == [False, True, False]
    assert torch.equal(found.u[1], torch.zeros(16, dtype=F64))
    assert (found.size[[0, 2]] <= 1e-8).all()


# The algebra -----------------------------------------------------------------------------------------------


def test_inner_products_do_not_lose_what_float32_sums_lose():
    a = torch.tensor([[1e8, 1.0, -1e8]])
    assert dot(a, torch.ones_like(a)).dtype == torch.float32
    assert dot(a, torch.ones_like(a)) == 1


def test_a_ratio_that_is_not_wanted_is_zero_and_no_nan():
    a, b = torch.tensor([1.0, 1.0, torch.nan]), torch.tensor([2.0, 0.0, 0.0])
    assert ratio(a, b, torch.tensor([True, False, False])).tolist() == [0.5, 0.0, 0.0]
