"""The default solver of DEQ."""

from __future__ import annotations

import pytest
import torch

from benchmarks.problems import attention, tanh
from tests.problems import F64, TanhMap, random_matrix
from torchdeq import DEQ, GMRES, AffineMap, Anderson, Broyden, Multisecant


def test_is_what_deq_uses():
    assert DEQ().solver == Multisecant()


def test_on_an_affine_contraction_it_is_anderson_with_all_of_its_memory_and_so_gmres():
    n, steps = 24, 12
    a = random_matrix(n, 0.4)
    b = torch.randn(3, n, dtype=F64, generator=torch.Generator().manual_seed(1))
    f = AffineMap(lambda u: u @ a.T, b)
    krylov = GMRES(tol=0.0, max_iter=steps + 1).run(f).z
    mine = Multisecant(tol=0.0, max_iter=steps + 2, return_final=True)(f, torch.zeros_like(b))
    assert (mine.z - f(krylov)).norm() / b.norm() < 1e-6  # λ = 1e-8


def test_where_the_first_step_says_little_it_begins_as_broydens():
    """To rounding: the first Picard step of this map leaves more than 0.7 of the residual."""
    f = TanhMap.make(gain=4.0)
    first = Multisecant(max_iter=2, tol=0.0)(f, f.z0).trace
    assert (first[1] > 0.7 * first[0]).all()
    mine = Multisecant(max_iter=15, tol=0.0, return_final=True)(f, f.z0)
    other = Broyden(max_iter=15, tol=0.0, return_final=True)(f, f.z0)
    assert torch.allclose(mine.z, other.z, rtol=0, atol=1e-8)  # a chaotic map: rounding grows a thousandfold


def test_a_grown_residual_makes_twenty_steps_of_broydens():
    f = TanhMap.make(n=8, batch=2, gain=0.5)
    solver = Multisecant()
    z, state = f.z0, solver.init(f.z0)
    for _ in range(3):
        z, state = solver.step(f, z, f(z).detach(), state)
    assert (state.more >= 20).all()  # calm
    z = z.clone()
    z[1] += 50
    z, state = solver.step(f, z, f(z).detach(), state)
    assert state.more[0] >= 20
    assert state.more[1] == 0


@pytest.mark.parametrize("seed", [0, 1, 3])
def test_reaches_where_anderson_does_not(seed):
    """Far from a contraction: Picard diverges, Anderson's method goes in circles, Broyden's arrives."""
    p = tanh(2.0, batch=2, seed=seed)
    options = {"tol": 1e-5, "stop_mode": "rel", "max_iter": 250}
    anderson = Anderson(**options)(p.f, p.z0)
    mine = Multisecant(**options)(p.f, p.z0)
    assert not anderson.converged.all()
    assert mine.converged.all()


@pytest.mark.parametrize(
    "problem", [tanh(0.8), tanh(1.1), attention(0.3), attention(0.7), attention(1.0)], ids=lambda p: p.name
)
def test_is_within_a_fifth_of_the_best_of_the_family_where_anderson_is_at_home(problem):
    options = {"tol": 1e-5, "stop_mode": "rel", "max_iter": 60}
    counts = [
        solver.replace(**options)(problem.f, problem.z0).nfe
        for solver in (Anderson(), Anderson(m=10), Broyden(), Broyden(kind="bad"))
    ]
    assert Multisecant(**options)(problem.f, problem.z0).nfe <= 1.2 * min(counts)


def test_a_wrong_history_length_teaches():
    with pytest.raises(ValueError, match=r"Multisecant\(m=0\).*at least 1"):
        Multisecant(m=0)
