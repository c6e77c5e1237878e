"""What a turn of the loop costs beyond f: operations that torch dispatches, views among them.

Each costs one to three microseconds on a CPU whatever its size, and a launch on a GPU. torchdeq 0.1.0 needs 42, 90 and
152 a turn for Picard iteration, Anderson's and Broyden's method, counted in the same way. The bounds leave no room:
whoever adds an operation to a turn should know it, and change the number here.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torchdeq import GMRES, AffineMap, Anderson, Broyden, FixedPointIteration, Multisecant

B, D = 8, 16


class Operations(TorchDispatchMode):
    """Counts what is dispatched."""

    def __init__(self):
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


def operations_of(call):
    with torch.no_grad(), Operations() as operations:
        call()
    return operations.seen.total()


def contraction():
    """One operation, and every sample comes closer at every turn."""
    w = torch.randn(D, D, generator=torch.Generator().manual_seed(0)) * 0.5 / D**0.5
    shift = torch.ones(B, D)
    return lambda z: torch.addmm(shift, z, w)


@pytest.mark.parametrize(
    ("solver", "most"),
    [
        (FixedPointIteration(tol=1e-30), 4),
        (Anderson(tol=1e-30), 24),
        (Broyden(tol=1e-30), 45),
        (Broyden(tol=1e-30, kind="bad"), 46),
        (Multisecant(tol=1e-30), 71),
    ],
    ids=["picard", "anderson", "broyden", "bad broyden", "multisecant"],
)
def test_a_turn_that_brings_all_samples_closer(solver, most):
    """Between the eighth evaluation and the twelfth, where histories have reached their size for a while."""
    f, z0 = contraction(), torch.zeros(B, D)
    few, more = (solver.replace(max_iter=k) for k in (8, 12))
    assert few(f, z0).abs_trace.diff(dim=0).max() < 0  # so it is
    turns = operations_of(lambda: more(f, z0)) - operations_of(lambda: few(f, z0))
    assert turns / 4 - 1 <= most


def test_a_product_of_gmres():
    w = torch.eye(D) / 2 + torch.randn(D, D, generator=torch.Generator().manual_seed(0)) * 0.1
    system = AffineMap(lambda u: torch.mm(u, w), torch.eye(B, D))
    few, more = (GMRES(tol=1e-30, max_iter=k) for k in (7, 11))
    solves = [operations_of(lambda s=s: s.run(system, together=False)) for s in (few, more)]
    assert (solves[1] - solves[0]) / 4 - 1 <= 53


def test_a_solve_that_is_over_at_once():
    """What is not repeated: the door, the first evaluation, the account of the solve."""
    f, z0 = contraction(), torch.zeros(B, D)
    assert operations_of(lambda: FixedPointIteration(tol=1e30)(f, z0)) <= 34
