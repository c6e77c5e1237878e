"""Unrolling: back-propagation through every step of the solver.

    z_{k+1} = τ f(z_k) + (1 − τ) z_k,   k < max_iter,   all of them in the graph.

The derivative of the program rather than of the fixed point: right to any order as the iteration converges, at a
memory of one graph of f per evaluation. It is the yardstick for the methods that do without that memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from torchdeq._state import Map
from torchdeq.grad.base import GradMethod, OnBackward
from torchdeq.grad.phantom import PhantomGrad
from torchdeq.solution import Solution
from torchdeq.solver.base import SolverLoop
from torchdeq.solver.fp_iter import FixedPointIteration


@dataclass(frozen=True, kw_only=True, repr=False)
class Unroll(GradMethod):
    """Differentiate through every step of a (damped) Picard iteration. Derivatives of any order.

    Works with `FixedPointIteration` and its simple form, whose steps build nothing but the graph of f.

    Example:
        >>> import torch, torchdeq
        >>> a = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        >>> deq = torchdeq.DEQ(FixedPointIteration(tol=1e-12), Unroll())
        >>> z, _ = deq(lambda z: a * z + 1, torch.zeros(1, 1, dtype=torch.float64))
        >>> (g,) = torch.autograd.grad(z.sum(), a, create_graph=True)
        >>> (h,) = torch.autograd.grad(g, a)
        >>> round(g.item(), 6), round(h.item(), 6)  # 1/(1 − a)² and 2/(1 − a)³
        (4.0, 16.0)
    """

    def attach(self, f: Map, z: Tensor, *, on_backward: OnBackward | None = None) -> list[Tensor]:
        """One tracked step: a state that is already solved has no other graph."""
        return PhantomGrad().attach(f, z)

    def __call__(
        self,
        f: Map,
        z0: Tensor,
        solver: SolverLoop,
        *,
        record: Sequence[int] = (),
        on_backward: OnBackward | None = None,
    ) -> tuple[list[Tensor], Solution]:
        """Solve from z0 with the graph of every evaluation kept."""
        if not isinstance(solver, FixedPointIteration):
            raise TypeError(
                f"Unroll differentiates the steps of FixedPointIteration, whose iterates are functions of "
                f"f alone; got {solver!r}. Use DEQ(FixedPointIteration(), Unroll())."
            )
        solution = solver.run(f, z0, record=record)
        return self.attach(f, solution.z), solution.detach()
