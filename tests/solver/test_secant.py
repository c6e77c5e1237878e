"""The family of Anderson's and Broyden's methods against dense algebra."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.problems import F64, TanhMap, random_matrix
from torchdeq import Anderson, Broyden, Multisecant

N = 10


def run(solver, f, z0, steps):
    """The iterates z_0 … z_steps, by `init` and `step` alone."""
    zs, z, state = [z0], z0, solver.init(z0)
    for _ in range(steps):
        z, state = solver.step(f, z, f(z), state)
        zs.append(z)
    return zs, state


def dense_step(zs, f, inverse_jacobian):
    """z − H r for one sample, H (N, N) from all differences so far."""
    rs = [f(z) - z for z in zs]
    s = torch.cat([b - a for a, b in itertools.pairwise(zs)])  # (k, N)
    y = torch.cat([b - a for a, b in itertools.pairwise(rs)])
    return zs[-1] - rs[-1] @ inverse_jacobian(s, y).T


def good(s, y):
    """Broyden's good updates of H = −I, one after the other."""
    h = -torch.eye(N, dtype=F64)
    for s_i, y_i in zip(s, y, strict=True):
        h = h + torch.outer(s_i - h @ y_i, s_i @ h) / (s_i @ h @ y_i)
    return h


def bad(s, y):
    """Broyden's bad updates of H = −I."""
    h = -torch.eye(N, dtype=F64)
    for s_i, y_i in zip(s, y, strict=True):
        h = h + torch.outer(s_i - h @ y_i, y_i) / (y_i @ y_i)
    return h


def type_one(s, y):
    """The inverse of the B nearest to −I with B s = y for all pairs."""
    b = -torch.eye(N, dtype=F64)
    b = b + (y.T - b @ s.T) @ torch.linalg.pinv(s.T)
    return torch.linalg.inv(b)


def type_two(s, y):
    """The H nearest to −I with H y = s for all pairs."""
    h = -torch.eye(N, dtype=F64)
    return h + (s.T - h @ y.T) @ torch.linalg.pinv(y.T)


@pytest.mark.parametrize(
    ("solver", "dense"),
    [
        (Broyden(), good),
        (Broyden(kind="bad"), bad),
        (Anderson(m=20, type=1), type_one),
        (Anderson(m=20, lam=0.0), type_two),
    ],
    ids=["good", "bad", "type I", "type II"],
)
def test_the_compact_form_is_the_method_of_the_books(solver, dense):
    w = random_matrix(N, 0.9, 3)
    f = lambda z: torch.tanh(z @ w.T + 0.5)  # noqa: E731
    zs, _ = run(solver, f, torch.zeros(1, N, dtype=F64), 7)
    for k in range(2, 8):
        expected = dense_step(zs[:k], f, dense)
        # The dense updates and the small system are solved in another order.
        assert (zs[k] - expected).norm() < 1e-9 * expected.norm()


@pytest.mark.parametrize(
    ("solver", "dense"),
    [(Broyden(m=3), good), (Broyden(m=3, kind="bad"), bad), (Anderson(m=3, lam=0.0), type_two)],
    ids=["good", "bad", "type II"],
)
def test_at_the_memory_limit_the_oldest_difference_is_dropped(solver, dense):
    w = random_matrix(N, 0.9, 3)
    f = lambda z: torch.tanh(z @ w.T + 0.5)  # noqa: E731
    zs, state = run(solver, f, torch.zeros(1, N, dtype=F64), 9)
    assert state.v.shape[1] == 3
    for k in range(5, 10):
        expected = dense_step(zs[k - 4 : k], f, dense)
        assert (zs[k] - expected).norm() < 1e-9 * expected.norm()


@pytest.mark.parametrize("solver", [Broyden(), Multisecant(), Anderson(m=40)])
def test_memory_grows_as_it_is_used(solver):
    f = TanhMap.make(n=8, batch=2, gain=0.5)
    state, z = solver.replace(max_iter=10_000).init(f.z0), f.z0
    held = []
    for _ in range(7):
        z, state = solver.step(f, z, f(z).detach(), state)
        held.append(state.u.shape[1])
    assert held == [0, 4, 4, 4, 4, 8, 8]


@pytest.mark.parametrize(
    "solver", [Anderson(), Anderson(type=1), Broyden(), Broyden(kind="bad"), Multisecant()]
)
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_iterates_do_not_depend_on_the_scale_of_f(solver, scale):
    w = random_matrix(N, 0.9, 3)
    f = lambda z: torch.tanh(z @ w.T + 0.5)  # noqa: E731
    plain, _ = run(solver, f, torch.zeros(1, N, dtype=F64), 8)
    scaled, _ = run(solver, lambda z: scale * f(z / scale), torch.zeros(1, N, dtype=F64), 8)
    for a, b in zip(plain, scaled, strict=True):
        assert torch.allclose(b / scale, a, rtol=0, atol=1e-9)


@pytest.mark.parametrize("solver", [Anderson(), Broyden(), Multisecant()])
def test_a_sample_that_met_a_nan_comes_back_and_its_spoilt_differences_are_not_used(solver):
    """f is linear but for one evaluation that is NaN; the answer is that of the linear map."""
    a = random_matrix(6, 0.8)
    calls = []

    def f(z):
        calls.append(1)
        out = z @ a.T + 1
        return out * torch.nan if len(calls) == 4 else out

    solution = solver.replace(tol=1e-11, max_iter=60)(f, torch.zeros(1, 6, dtype=F64))
    exact = torch.linalg.solve(torch.eye(6, dtype=F64) - a, torch.ones(6, dtype=F64))
    assert solution.converged.all()
    assert torch.allclose(solution.z[0], exact, atol=1e-9)
    assert torch.isinf(solution.trace[3])


def test_a_doubled_residual_empties_the_history_of_its_sample_alone():
    solver = Anderson(m=5)
    slopes = torch.tensor([[0.5, -0.3, 0.1], [0.5, -0.3, 0.1]], dtype=F64)
    f = lambda z: slopes * z + 1  # noqa: E731
    z0 = torch.zeros(2, 3, dtype=F64)
    zs, state = run(solver, f, z0, 3)
    z = zs[-1].clone()
    z[1] += 100  # sample 1 is thrown far away
    _, state = solver.step(f, z, f(z), state)
    assert state.valid.sum(dim=1).tolist() == [3, 0]


def test_rounding_is_no_difference():
    """Once the residual has stopped changing beyond rounding, nothing is learnt and nothing breaks."""
    f = lambda z: 0.5 * z + 1  # noqa: E731
    z = torch.full((1, 3), 2.0, dtype=F64)
    solver = Broyden()
    state = solver.init(z)
    for _ in range(5):
        z, state = solver.step(f, z, f(z), state)
    assert not state.v.any()
    assert torch.equal(z, torch.full((1, 3), 2.0, dtype=F64))


@pytest.mark.parametrize(
    "solver",
    [
        Anderson(),
        Anderson(m=12, tau=0.7),
        Anderson(type=1),
        Broyden(),
        Broyden(m=3, kind="bad"),
        Multisecant(),
    ],
    ids=str,
)
@pytest.mark.parametrize("n", [8, 64])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_quick_ways_make_the_same_steps_to_the_last_bit(solver, n, dtype, monkeypatch):
    """So a sample does not depend on whether its neighbours let the host take them."""
    w = random_matrix(n, 0.9, 3).to(dtype)
    f = lambda z: torch.tanh(z @ w.T + 0.5)  # noqa: E731
    z0 = torch.linspace(-1, 1, 8 * n, dtype=dtype).reshape(8, n)
    solver, taken = solver.replace(tol=0.0, max_iter=14), []
    usual = type(solver).is_usual
    monkeypatch.setattr(type(solver), "is_usual", lambda *args: usual(*args) and not taken.append(1))
    fast = solver(f, z0)
    assert len(taken) >= 8
    monkeypatch.setattr(type(solver), "is_usual", lambda *args: False)
    slow = solver(f, z0)
    assert torch.equal(fast.z, slow.z)
    assert torch.equal(fast.trace, slow.trace)


@pytest.mark.parametrize("solver", [Anderson(), Anderson(type=1), Broyden(), Multisecant()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_samples_at_rest_leave_the_quick_ways_to_the_others(solver, dtype, monkeypatch):
    """And change no bit of theirs. Samples arrive one after the other: sample i starts at a distance of 10^-i."""
    w = random_matrix(8, 0.9, 3).to(dtype)
    f = lambda z: z @ w.T  # noqa: E731
    z0 = torch.linspace(-1, 1, 32, dtype=dtype).reshape(4, 8) * 10.0 ** -torch.arange(4)[:, None]
    solver, at = solver.replace(tol=1e-4, max_iter=40), []
    usual = type(solver).is_usual

    def is_usual(self, z, state):
        at.append(int(state.pairs))
        return usual(self, z, state)

    monkeypatch.setattr(type(solver), "is_usual", is_usual)
    fast = solver(f, z0)
    assert fast.nstep.unique().numel() >= 3
    assert sum(pairs >= int(fast.nstep.min()) for pairs in at) >= 2
    monkeypatch.setattr(type(solver), "is_usual", lambda *args: False)
    slow = solver(f, z0)
    assert torch.equal(fast.z, slow.z)
    assert torch.equal(fast.trace, slow.trace)
    assert torch.equal(fast.nstep, slow.nstep)


@pytest.mark.parametrize("solver", [Anderson(), Anderson(type=1), Broyden(), Multisecant()], ids=str)
@pytest.mark.parametrize("power", [-60, 60, 100])
def test_steps_do_not_depend_on_the_scale_where_squares_are_beyond_float32(solver, power):
    w = random_matrix(8, 0.9, 3).float()
    x = torch.linspace(-1, 1, 32).reshape(4, 8)
    solver = solver.replace(tol=1e-3, stop_mode="rel")
    plain, scaled = (solver(lambda z, s=s: z @ w.T + s * x, torch.zeros(4, 8)) for s in (1.0, 2.0**power))
    assert torch.equal(scaled.nstep, plain.nstep)
    torch.testing.assert_close(scaled.rel_trace, plain.rel_trace, rtol=1e-2, atol=1e-5)
