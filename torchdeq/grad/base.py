"""What a gradient method is: it gives a solved state its derivative."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torchdeq._method import Method
from torchdeq._modes import without_tangents
from torchdeq._state import Map
from torchdeq.solution import Solution
from torchdeq.solver.base import SolverLoop

OnBackward = Callable[[Solution], None]


@dataclass(frozen=True, kw_only=True, repr=False)
class GradMethod(Method):
    """A way to differentiate z* = f(z*). Its fields are its choices; it prints as the call that made it.

    A method supplies `attach`. One that must own the forward loop overrides `__call__`, and one whose loop gives
    another value than the solver's overrides `without_grad` too.

    Example:
        A method is a frozen dataclass with `attach`. This one is the one-step gradient.

        >>> from dataclasses import dataclass
        >>> import torch, torchdeq
        >>> @dataclass(frozen=True, kw_only=True, repr=False)
        ... class OneStep(GradMethod):
        ...     def attach(self, f, z, *, on_backward=None):
        ...         return [f(z)]
        >>> x = torch.ones(2, 3, requires_grad=True)
        >>> z, _ = torchdeq.DEQ(grad=OneStep())(lambda z: 0.5 * z + x, torch.zeros(2, 3))
        >>> z.sum().backward()
        >>> x.grad[0].tolist(), OneStep()
        ([1.0, 1.0, 1.0], OneStep())
    """

    #: Whether it can do nothing with a solved state, so that `attach` raises.
    needs_solve: ClassVar[bool] = False
    #: Whether its derivative is that of steps of plain iteration, whose last image it returns in either grad mode.
    own_steps: ClassVar[bool] = False

    def attach(self, f: Map, z: Tensor, *, on_backward: OnBackward | None = None) -> list[Tensor]:
        """States that carry the derivative, made from the solved state z.

        Parameters and inputs are reached through a tracked call of f and never listed.

        Arguments:
            f: the map, (B, D) -> (B, D).
            z: the solved state, (B, D), detached.
            on_backward: called with the `Solution` of the adjoint solve, once per backward pass, by the
                methods that solve one.

        Returns:
            The sampled states, (B, D) each, the last of them the method's final one.
        """
        raise NotImplementedError(f"{type(self).__name__} must define attach")

    def __call__(
        self,
        f: Map,
        z0: Tensor,
        solver: SolverLoop,
        *,
        record: Sequence[int] = (),
        on_backward: OnBackward | None = None,
    ) -> tuple[list[Tensor], Solution]:
        """Solve from z0 (B, D) without a graph, then `attach`.

        Returns:
            What `attach` returns, and the `Solution` of the forward solve on the flat state.
        """
        with torch.no_grad(), without_tangents():
            solution = solver.run(f, z0, record=record)
        return self.attach(f, solution.z, on_backward=on_backward), solution

    def without_grad(
        self, f: Map, z0: Tensor, solver: SolverLoop, *, record: Sequence[int] = ()
    ) -> tuple[Tensor, Solution]:
        """What a call without grad mode gives: the solver's state, (B, D), and the `Solution`.

        Where the derivative is that of a loop of the method's own rather than of the fixed point, it is that loop's
        state: a forward pass without grad mode that is made again with it, as in a reentrant checkpoint, must agree.
        """
        solution = solver.run(f, z0, record=record)
        return solution.z, solution
