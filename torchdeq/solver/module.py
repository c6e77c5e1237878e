"""Solvers that learn: the loop around an `nn.Module`."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, Self

from torch import nn

from torchdeq.solver.base import Solver, SolverLoop


class SolverModule(SolverLoop, nn.Module):
    """A solver with parameters of its own. It defines `init` and `step` like any other solver.

    It goes wherever a `Solver` goes. `DEQ` runs it without a graph, as it runs every forward solver; to train its
    parameters, call `run` under grad mode, which keeps the graph of the steps, and differentiate a loss of the result.

    Arguments:
        **options: those of `Solver`.

    Example:
        A mixing that is learned.

        >>> import torch
        >>> class Mixing(SolverModule):
        ...     def __init__(self, **options):
        ...         super().__init__(**options)
        ...         self.raw = torch.nn.Parameter(torch.zeros(()))
        ...     def init(self, z):
        ...         return None
        ...     def step(self, f, z, fz, state):
        ...         return torch.lerp(z, fz, 2 * self.raw.sigmoid()), state
        >>> solver = Mixing(max_iter=5, tol=0.0, return_final=True)
        >>> f = lambda z: -0.5 * z + 3
        >>> adam = torch.optim.Adam(solver.parameters(), lr=0.3)
        >>> for _ in range(60):
        ...     adam.zero_grad()
        ...     z = solver.run(f, torch.zeros(1, 1)).z
        ...     (f(z) - z).square().sum().backward()
        ...     adam.step()
        >>> 0.6 < 2 * solver.raw.sigmoid().item() < 0.7  # 1 / (1 − J) = 2/3
        True
    """

    def __init__(self, **options: Any):
        nn.Module.__init__(self)
        self._set(Solver().replace(**options))

    def _set(self, options: Solver) -> None:
        for field in dataclasses.fields(Solver):
            setattr(self, field.name, getattr(options, field.name))

    def replace(self, **options: Any) -> Self:
        """The same solver, with the same parameters, under other options."""
        if not options:
            return self
        now = {field.name: getattr(self, field.name) for field in dataclasses.fields(Solver)}
        other = copy.copy(self)
        other._set(Solver(**now).replace(**options))
        return other

    def extra_repr(self) -> str:
        """The options that are not the default ones."""
        return ", ".join(
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(Solver)
            if getattr(self, field.name) != field.default
        )
