"""Solvers with learned parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.problems import F64, TanhMap
from torchdeq import DEQ, IFT, SOLVERS, Fallback, NewtonKrylov, SolverModule, as_solver, register_solver
from torchdeq.grad.base import GradMethod


class Mixing(SolverModule):
    """Picard iteration with a mixing that is learned."""

    def __init__(self, start: float = 0.0, **options):
        super().__init__(**options)
        self.raw = nn.Parameter(torch.tensor(start, dtype=F64))

    def init(self, z):
        return None

    def step(self, f, z, fz, state):
        return torch.lerp(z, fz, 2 * self.raw.sigmoid()), state


def test_goes_where_a_solver_goes():
    f = TanhMap.make(gain=0.6)
    solver = Mixing(tol=1e-9, max_iter=200)
    assert solver(f, f.z0).converged.all()
    deq = DEQ(solver, IFT(solver=solver.replace(tol=1e-8)))
    z, solution = deq(f, f.z0)
    assert solution.converged.all()
    z.sum().backward()
    assert f.w.grad.isfinite().all()
    assert [name for name, _ in deq.named_parameters()] == ["solver.raw"]
    assert isinstance(deq.grad, GradMethod)


def test_varies_without_losing_its_parameters():
    solver = Mixing(tol=1e-3)
    other = solver.replace(tol=1e-9, max_iter=7)
    assert (solver.tol, other.tol, other.max_iter) == (1e-3, 1e-9, 7)
    assert other.raw is solver.raw
    assert solver.replace() is solver
    assert repr(other) == "Mixing(max_iter=7, tol=1e-09)"


def test_learns_the_best_mixing():
    """f has slope −0.5: the mixing 2/3 solves it in one step."""
    solver = Mixing(max_iter=4, tol=0.0, return_final=True)
    f = lambda z: -0.5 * z + 3  # noqa: E731
    adam = torch.optim.Adam(solver.parameters(), lr=0.1)
    before = solver(f, torch.zeros(1, 1, dtype=F64)).residual
    for _ in range(150):
        adam.zero_grad()
        z = solver.run(f, torch.zeros(1, 1, dtype=F64)).z
        (f(z) - z).square().sum().backward()
        adam.step()
    assert abs(2 * solver.raw.sigmoid().item() - 2 / 3) < 0.1
    assert solver(f, torch.zeros(1, 1, dtype=F64)).residual < 0.01 * before


def test_is_registered_as_a_class_or_as_an_object():
    solver = Mixing()
    register_solver("mixing", Mixing)
    register_solver("my_mixing", solver)
    try:
        assert isinstance(as_solver("mixing", max_iter=9), Mixing)
        assert as_solver("my_mixing", max_iter=9).raw is solver.raw
    finally:
        del SOLVERS["mixing"], SOLVERS["my_mixing"]


def test_wrong_options_teach():
    with pytest.raises(TypeError, match="no option 'max_itr'. Did you mean 'max_iter'"):
        Mixing(max_itr=3)
    with pytest.raises(ValueError, match="at least 1"):
        Mixing(max_iter=0)


def test_inside_a_chain_or_a_gradient_method_its_parameters_are_those_of_the_module():
    mix = Mixing()
    for deq in (DEQ(Fallback(mix, NewtonKrylov())), DEQ(grad=IFT(solver=mix)), DEQ(mix, IFT(solver=mix))):
        assert list(deq.parameters()) == [mix.raw]
