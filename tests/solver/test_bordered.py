"""In a graph K⁻¹ is bordered: it is the inverse of K, and a loop made of it makes the steps of the eager loop."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from torchdeq import Anderson, Broyden, FixedPointIteration, Multisecant, Solution, Solver
from torchdeq._replay import AutocastState
from torchdeq._state import layout_of
from torchdeq.solver.bordered import border
from torchdeq.solver.programs import Bound, Seen
from torchdeq.solver.secant import SecantSolver
from torchdeq.solver.traced import Carry, begin, goes_on, turn

F64 = torch.float64
B, N = 3, 6


class Slots:
    """Matrices K of which slots come and go, and their inverses as they are bordered."""

    def __init__(self, matrices: int, seed: int):
        self.random = torch.Generator().manual_seed(seed)
        self.k = torch.eye(N, dtype=F64).repeat(B, matrices, 1, 1)
        self.m = self.k.clone()
        self.valid = torch.zeros(B, N, dtype=torch.bool)

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random, dtype=F64)

    def insert(
        self,
        slot: int,
        kept: Tensor,
        *,
        corner: float | None = None,
        void: Tensor | None = None,
        ridge: tuple[float, ...] | None = None,
    ) -> Tensor:
        """A new pair in a slot, with the pairs that count now being `kept`; returns whose pair counts."""
        matrices = self.k.shape[1]
        here = torch.arange(N) == slot
        others = self.valid & kept & ~here
        row, column = self.draw(B, matrices, N) / 4, self.draw(B, matrices, N) / 4
        column[:, :, slot] = 1 + self.draw(B, matrices).abs()
        void = torch.zeros(B, dtype=torch.bool) if void is None else void
        ridge = ridge or (0.0,) * matrices
        self.m, counts = border(self.m, others, here, row, column, corner, void, ridge)
        # K of those that count, by itself.
        self.k[:, :, slot] = row
        self.k[:, :, :, slot] = column
        self.k[:, :, slot, slot] = column[:, :, slot] + torch.tensor(ridge) if corner is None else corner
        use = others | (here & ~void[:, None])
        self.k = torch.where(use[:, None, :, None] & use[:, None, None], self.k, torch.eye(N, dtype=F64))
        self.valid = use
        return counts

    def check(self) -> None:
        torch.testing.assert_close(self.m, torch.linalg.inv(self.k), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("matrices", [1, 2])
@pytest.mark.parametrize("corner", [None, 2.0])
def test_slots_are_filled_one_after_the_other_and_then_anew(matrices: int, corner: float | None) -> None:
    slots = Slots(matrices, seed=matrices)
    everybody = torch.ones(B, N, dtype=torch.bool)
    for number in range(3 * N):
        assert slots.insert(number % N, everybody, corner=corner).all()
        slots.check()


def test_a_ridge_is_on_the_diagonal_of_its_matrix() -> None:
    slots = Slots(2, seed=3)
    for number in range(N):
        slots.insert(number, torch.ones(B, N, dtype=torch.bool), ridge=(0.5, 0.0))
    slots.check()


def test_a_sample_that_forgets_all_begins_anew_and_a_void_pair_changes_nothing() -> None:
    slots = Slots(1, seed=4)
    everybody = torch.ones(B, N, dtype=torch.bool)
    for number in range(4):
        slots.insert(number, everybody)
    forgets = everybody.clone()
    forgets[1] = False
    counts = slots.insert(4, forgets, void=torch.tensor([False, False, True]))
    assert counts.tolist() == [True, True, False]
    slots.check()
    assert slots.valid.sum(dim=1).tolist() == [5, 1, 4]
    slots.insert(5, everybody)
    slots.check()


def test_a_pair_that_would_make_k_singular_does_not_count() -> None:
    k = torch.tensor([[2.0, 1.0], [4.0, 2.0]], dtype=F64)
    m = torch.eye(2, dtype=F64).repeat(1, 1, 1, 1)
    m[..., 0, 0] = 1 / 2
    others, here = torch.tensor([[True, False]]), torch.tensor([False, True])
    after, counts = border(
        m, others, here, k[None, None, 1], k[None, None, :, 1], None, torch.tensor([False]), (0.0,)
    )
    assert counts.tolist() == [False]
    assert torch.equal(after, m)


def contraction(size: int, dtype: torch.dtype) -> tuple[Any, Tensor]:
    random = torch.Generator().manual_seed(size)
    w = torch.randn(size, size, generator=random, dtype=F64)
    w = (0.95 * w / torch.linalg.matrix_norm(w, 2)).to(dtype)
    x = torch.randn(4, size, generator=random, dtype=F64).to(dtype)
    return lambda z: torch.tanh(z @ w + x), torch.zeros(4, size, dtype=dtype)


def by_hand(solver: Solver, f: Any, z0: Tensor) -> Carry:
    """The loop of a graph, without one."""
    seen = Seen(layout_of(z0), AutocastState.capture(z0.device))
    map_: Any = Bound(seen, f)
    limit = torch.tensor(solver.max_iter)
    with torch.no_grad():
        carry = begin(solver, z0, map_, solver.max_iter)
        while goes_on(carry, limit):
            carry = turn(solver, map_, carry, seen.resolution)
    return carry


SOLVERS = (
    functools.partial(FixedPointIteration, max_iter=200),
    Anderson,
    functools.partial(Anderson, type=1),
    Broyden,
    functools.partial(Broyden, m=4),
    functools.partial(Broyden, kind="bad"),
    functools.partial(Broyden, ls=True),
    Multisecant,
    functools.partial(Multisecant, m=5),
)


@pytest.mark.parametrize("number", range(len(SOLVERS)))
@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("size", [6, 40])
def test_a_loop_made_of_turns_makes_the_steps_of_the_eager_one(
    number: int, dtype: torch.dtype, size: int
) -> None:
    """K and its inverse round differently, so that counts may differ by one where a residual is at the tolerance."""
    tol = 1e-10 if dtype == F64 else 1e-4
    solver = SOLVERS[number](tol=tol)
    f, z0 = contraction(size, dtype)
    eager: Solution = solver(f, z0)
    carry = by_hand(solver, f, z0)
    assert bool(eager.converged.all())
    assert abs(int(carry.k) - eager.nfe) <= 1
    final = carry.known.best.z
    assert float((f(final) - final).norm(dim=1).max()) <= tol
    torch.testing.assert_close(final, eager.z, rtol=0, atol=20 * tol)  # ‖(I − J)⁻¹‖ is 20 at most


@pytest.mark.parametrize(
    "solver",
    [Broyden(max_iter=40, tol=1e-9), Multisecant(max_iter=40, tol=1e-9)],
    ids=lambda s: type(s).__name__,
)
def test_a_sample_whose_inverse_is_spoilt_makes_a_picard_step_and_begins_anew(solver: SecantSolver) -> None:
    f, z0 = contraction(6, F64)
    seen = Seen(layout_of(z0), AutocastState.capture(z0.device))
    map_: Any = Bound(seen, f)
    with torch.no_grad():
        carry = begin(solver, z0, map_, solver.max_iter)
        for _ in range(5):
            carry = turn(solver, map_, carry, seen.resolution)
        clean = carry._replace(state=type(carry.state)(*[_copy(t) for t in carry.state]))
        carry.state.k[1] = torch.nan
        fz = f(carry.z)
        after, unspoilt = (turn(solver, map_, c, seen.resolution) for c in (carry, clean))
    torch.testing.assert_close(after.z[1], fz[1])
    assert not after.state.valid[1].any()
    others = [0, 2, 3]
    assert torch.equal(after.z[others], unspoilt.z[others])
    assert torch.equal(after.state.valid[others], unspoilt.state.valid[others])
    with torch.no_grad():
        while goes_on(after, torch.tensor(solver.max_iter)):
            after = turn(solver, map_, after, seen.resolution)
    assert not after.known.failed.any()
    assert float(after.known.best.measure[1]) <= solver.tol


def _copy(part: Any) -> Any:
    return part.clone() if isinstance(part, Tensor) else part
