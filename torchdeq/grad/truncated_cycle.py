"""Truncated cycles, the training mode of recursive reasoners: T evaluations without a graph, then k with one.

    z_{j+1} = f(z_j),   j < T + k,   z_0 = z0 + σ ε,   dL/dθ through z_T … z_{T+k} only.

From a fixed point it is the phantom gradient of k steps, û = (I − (Jᵀ)^k) u; from elsewhere

    ‖û − u‖ ≤ γ^k ‖u‖ + L ‖z_T − z*‖ ‖g‖ / (1 − γ)²,

where û stands for the exact adjoint u, ‖J‖ ≤ γ < 1 on the way and L is a Lipschitz constant of J; see
`torchdeq.grad.unroll`. Where f is far from a contraction there is no such bound, nor need z* exist: it is then the
gradient of the last k steps, and no more.

Sources: Wang et al. (2025), arXiv 2506.21734 (HRM: the one-step gradient, deep supervision); Jolicoeur-Martineau
(2025), arXiv 2510.04871 (TRM: T − 1 recursions without a graph, then one with it, the carry detached).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torchdeq._modes import without_tangents
from torchdeq._state import Map
from torchdeq.grad.base import GradMethod, OnBackward
from torchdeq.grad.phantom import PhantomGrad
from torchdeq.grad.unroll import plain_iteration, run_to_the_end
from torchdeq.solution import Solution
from torchdeq.solver.base import SolverLoop
from torchdeq.solver.fp_iter import FixedPointIteration


@dataclass(frozen=True, kw_only=True, repr=False)
class TruncatedCycle(GradMethod):
    """A fixed number of plain evaluations of f, T without a graph and k with one. No stop test, no adjoint solve.

    Works with `FixedPointIteration` and its simple form; a τ of theirs damps all steps but the last. `Solution.nfe` is
    T + k and its residual that of the last iterate, z_{T+k−1}, which the last evaluation measures; the returned state
    is z_{T+k}. The solver's `tol` judges the residual and stops nothing; with tol=inf no residual is too large, and
    nothing warns.

    Bias: ‖J‖^k ‖u‖ and a term of first order in ‖z_T − z*‖. Memory: k graphs of f. Cost: T + k calls of f; in a
    backward pass one through each of the k. The derivative is that of the k steps, and so are those of higher order.

    Arguments:
        cycles: T ≥ 0. None: what the solver's max_iter leaves, so that T + k = max_iter, and a call without grad mode
            gives the same value. A number: so many, whatever max_iter is, which is then how many evaluations a call
            without grad mode makes.
        grad_steps: k ≥ 1.
        noise: σ ≥ 0, of the Gaussian noise that is added to a copy of z0 at each call in grad mode. With z0 = 0 that is
            a random start. It follows the global seed, and is drawn for the batch at once: which numbers a sample gets
            depends on its place in the batch. For a generator of your own, add the noise to z0 yourself.

    Raises:
        ValueError: a value is out of range.
        TypeError: the solver is another one.
        RuntimeError: in forward mode.

    Example:
        Deep supervision. The state is carried from one segment to the next; no graph is, as z0 gets no gradient.

        >>> import math, torch, torchdeq
        >>> _ = torch.manual_seed(0)
        >>> net, x, y = torch.nn.Linear(8, 8), torch.randn(4, 8), torch.randn(4, 8).tanh()
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> solver = torchdeq.SimpleFixedPointIteration(max_iter=6, tol=math.inf)
        >>> deq = torchdeq.DEQ(solver, TruncatedCycle(grad_steps=2))  # T = 4, k = 2
        >>> z, losses = torch.zeros(4, 8), []
        >>> for segment in range(20):
        ...     z, solution = deq(lambda z: torch.tanh(net(z) + x), z)
        ...     loss = (z - y).square().mean()
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        ...     losses.append(loss.item())
        >>> losses[-1] < losses[0], solution.nfe
        (True, 6)
    """

    own_steps: ClassVar[bool] = True

    cycles: int | None = None
    grad_steps: int = 1
    noise: float = 0.0

    def __post_init__(self) -> None:
        self.require(
            self.cycles is None or (type(self.cycles) is int and self.cycles >= 0),
            f"cycles counts the evaluations of f without a graph and must be an integer of at least 0, or None for "
            f"what the solver's max_iter leaves, got {self.cycles!r}",
        )
        self.require(
            type(self.grad_steps) is int and self.grad_steps >= 1,
            f"grad_steps counts tracked evaluations of f and must be an integer of at least 1, got {self.grad_steps!r}",
        )
        self.require(
            0 <= self.noise < float("inf"),
            f"noise is a standard deviation, at least 0 and finite, got {self.noise!r}",
        )

    def attach(self, f: Map, z: Tensor, *, on_backward: OnBackward | None = None) -> list[Tensor]:
        """The whole cycle from z, where T is 0 if `cycles` is None; `on_backward` is not called."""
        z = self._start(z)
        with torch.no_grad(), without_tangents():
            for _ in range(self.cycles or 0):
                z = f(z)
        return PhantomGrad(steps=self.grad_steps).attach(f, z)

    def __call__(
        self,
        f: Map,
        z0: Tensor,
        solver: SolverLoop,
        *,
        record: Sequence[int] = (),
        on_backward: OnBackward | None = None,
    ) -> tuple[list[Tensor], Solution]:
        """T + k evaluations from z0."""
        picard = plain_iteration(self, solver)
        total = picard.max_iter if self.cycles is None else self.cycles + self.grad_steps
        self.require(
            total >= self.grad_steps,
            f"grad_steps are more evaluations than max_iter={picard.max_iter} of {picard!r}. Raise max_iter, or give "
            f"cycles, how many come before them",
        )
        picard = picard.replace(max_iter=total, min_iter=min(picard.min_iter, total))
        out, solution = run_to_the_end(f, self._start(z0), picard, self.grad_steps, record)
        return [out], solution

    def without_grad(
        self, f: Map, z0: Tensor, solver: SolverLoop, *, record: Sequence[int] = ()
    ) -> tuple[Tensor, Solution]:
        """The last of the solver's `max_iter` evaluations from z0, without noise; another solver runs as it is."""
        if not isinstance(solver, FixedPointIteration):
            return super().without_grad(f, z0, solver, record=record)
        return run_to_the_end(f, z0, solver, 1, record)

    def _start(self, z: Tensor) -> Tensor:
        """A start of our own: z without a graph, in grad mode with noise."""
        z = z.detach()
        return z + self.noise * torch.randn_like(z) if self.noise and torch.is_grad_enabled() else z
