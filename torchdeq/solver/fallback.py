"""Solvers in a row: the samples that one leaves unconverged go on in the next, from their best iterate."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchdeq.solution import Solution
from torchdeq.solver.affine import AffineSolver
from torchdeq.solver.base import Solver, SolverLoop, start_of
from torchdeq.solver.learned import Learned
from torchdeq.solver.maps import AffineMap, Tally

_FROM_FIRST = ("tol", "stop_mode", "norm", "min_iter", "patience", "check_every", "compact")


@dataclass(frozen=True, kw_only=True, repr=False, init=False)
class Fallback(Solver):
    """A chain of solvers. Samples that have converged rest; the next solver sees them at the state they have.

    Arguments:
        *solvers: two or more, in the order in which they are tried. Each makes at most its own `max_iter`
            evaluations, the first of them at the iterate it begins with.
        **options: `max_iter` limits all of them together and is the sum of theirs if not given. `tol`, `stop_mode` and
            the other options of `Solver` hold for all, and are those of the first if not given.

    Raises:
        ValueError: fewer than two solvers.

    Example:
        >>> import torch
        >>> from torchdeq import FixedPointIteration, NewtonKrylov
        >>> chain = Fallback(FixedPointIteration(max_iter=30, tol=1e-9), NewtonKrylov())
        >>> f = lambda z: torch.tensor([[0.5], [-2.0]], dtype=torch.float64) * z + 3  # the second diverges
        >>> sol = chain(f, torch.zeros(2, 1, dtype=torch.float64))
        >>> sol.converged.tolist(), sol.z.round(decimals=6).flatten().tolist()
        ([True, True], [6.0, 1.0])
        >>> chain
        Fallback(FixedPointIteration(max_iter=30, tol=1e-09), NewtonKrylov())
    """

    solvers: tuple[SolverLoop, ...] = ()

    def __init__(self, *chain: SolverLoop, solvers: Sequence[SolverLoop] = (), **options: Any):
        chain = chain or tuple(solvers)
        object.__setattr__(self, "solvers", chain)
        given = Solver().replace(**options)  # so that an unknown option is an error, with the nearest named
        for field in dataclasses.fields(Solver):
            value = options.get(field.name, getattr(given, field.name))
            object.__setattr__(self, field.name, value)
        if len(chain) < 2 or not all(isinstance(solver, SolverLoop) for solver in chain):
            raise ValueError(
                f"Fallback{chain!r}: expected two or more solvers, such as "
                f"Fallback(Anderson(), NewtonKrylov())."
            )
        for name, value in self._derived(chain).items():
            if name not in options:
                object.__setattr__(self, name, value)
        self.__post_init__()

    @staticmethod
    def _derived(chain: Sequence[SolverLoop]) -> dict[str, Any]:
        derived = {name: getattr(chain[0], name) for name in _FROM_FIRST}
        return {**derived, "max_iter": sum(solver.max_iter for solver in chain)}

    def _given(self) -> dict[str, Any]:
        """The options that are not what they would be by themselves."""
        derived = self._derived(self.solvers)
        values = {
            f.name: (getattr(self, f.name), derived.get(f.name, f.default))
            for f in dataclasses.fields(Solver)
        }
        return {name: value for name, (value, default) in values.items() if value != default}

    def replace(self, **options: Any) -> Fallback:
        """The same chain with some options changed; those that follow from its solvers follow from new ones."""
        chain = options.pop("solvers", self.solvers)
        return Fallback(*chain, **{**self._given(), **options})

    def __repr__(self) -> str:
        options = [f"{name}={value!r}" for name, value in self._given().items()]
        return f"Fallback({', '.join([*map(repr, self.solvers), *options])})"

    @property
    def learns(self) -> bool:  # type: ignore[override]
        """Whether the first does, which sees all samples. What a later one learns counts for those that it solves."""
        return self.solvers[0].learns

    def _loop(self, f: Tally, z0: Tensor | None, record: Sequence[int]) -> Solution:
        z, limit = (start_of(f.f) if z0 is None else z0), f.limit
        solution: Solution | None = None
        learned = f.learned
        for solver in self.solvers:
            if isinstance(solver, AffineSolver) and not isinstance(f.f, AffineMap):
                raise TypeError(
                    f"{self!r}: {solver!r} solves affine maps only, and f is not known to be one."
                )
            before = f.calls
            f.limit = min(limit, before + solver.max_iter)
            f.learned = Learned() if learned is not None and solver.learns else None
            part = self._one(solver)._loop(f, z, [r for r in record if r > before])
            if learned is not None and f.learned is not None:
                done = torch.zeros_like(part.converged) if solution is None else solution.converged
                learned.take_but(f.learned, done)
            solution = part if solution is None else _joined(solution, part, record, before)
            z = solution.z
            if (bool(solution.converged.all()) and not self.return_final) or f.calls >= limit:
                break
        f.limit, f.learned = limit, learned
        assert solution is not None
        return solution

    def _one(self, solver: SolverLoop) -> SolverLoop:
        """A solver of the chain under the options of the chain, as far as it has them."""
        names = [*_FROM_FIRST, "return_final"]
        if isinstance(solver, AffineSolver):
            names = ["tol", "stop_mode", "norm", "check_every"]
        shared = {name: getattr(self, name) for name in names}
        if "min_iter" in shared:
            shared["min_iter"] = min(self.min_iter, solver.max_iter)
        return solver.replace(**shared)


def _joined(first: Solution, then: Solution, record: Sequence[int], before: int) -> Solution:
    """One account of two solves, the second from where the first ended."""
    done = first.converged
    return dataclasses.replace(
        then,
        nstep=torch.where(done & then.converged, first.nstep, then.nstep),
        abs_trace=torch.cat([first.abs_trace, then.abs_trace]),
        rel_trace=torch.cat([first.rel_trace, then.rel_trace]),
        states=[*first.states[: sum(r <= before for r in record)], *then.states],
        coupled=first.coupled or then.coupled,
    )
