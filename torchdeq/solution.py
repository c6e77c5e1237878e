"""What a solve returns: the state, and an honest account of how it was reached."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal

import optree
import torch
from torch import Tensor

from torchdeq._state import Tree

StopMode = Literal["abs", "rel"]


class Status(IntEnum):
    """Why a sample's solve ended. `Solution.status` holds one code per sample.

    >>> Status(2).sentence
    'f returned a non-finite value; the best finite iterate before it is returned.'
    """

    CONVERGED = 0
    MAX_ITER = 1
    NON_FINITE = 2
    STALLED = 3

    @property
    def sentence(self) -> str:
        """The status in words."""
        return _SENTENCES[self]


_SENTENCES = {
    Status.CONVERGED: "the residual is at most tol.",
    Status.MAX_ITER: "max_iter evaluations of f were made and the residual is still above tol.",
    Status.STALLED: "evaluations are left, but the residual falls no further: it is at the level of rounding, or the "
    "solver has no direction left.",
    Status.NON_FINITE: "f returned a non-finite value; the best finite iterate before it is returned.",
}


class ConvergenceWarning(UserWarning):
    """A solve ended with at least one sample whose residual is above the tolerance.

    >>> issubclass(ConvergenceWarning, UserWarning)
    True
    """


class CouplingWarning(UserWarning):
    """A solve took samples for separate that f couples, fell short, and was done again with them as one.

    >>> issubclass(CouplingWarning, UserWarning)
    True
    """


class ConvergenceError(RuntimeError):
    """What `throw=True` raises where otherwise a `ConvergenceWarning` is given.

    >>> issubclass(ConvergenceError, RuntimeError)
    True
    """


@dataclass(frozen=True, kw_only=True, eq=False)
class Solution:
    """The result of a fixed-point solve of B samples. All tensors are detached.

    Arguments:
        z: the returned state, in the structure of z0; per sample the best iterate that was evaluated.
        abs_residual: ‖f(z) − z‖ of the returned z, per sample, (B,).
        rel_residual: ‖f(z) − z‖ / ‖f(z)‖ of the returned z, per sample, (B,). A solver of affine maps
            (GMRES) divides by the norm of the right-hand side instead, as is usual there.
        stop_mode: which of the two the solver compared with `tol`.
        tol: the tolerance.
        status: one `Status` code per sample, (B,), int64.
        nstep: evaluations of f until this sample stopped, (B,), int64.
        nfe: all calls of f in this solve.
        abs_trace: ‖f(z_k) − z_k‖ at each evaluation, (N, B). A stopped sample keeps its last value; a
            non-finite one shows inf.
        rel_trace: the same, relative, (N, B).
        states: the states asked for with `record`, in that order, each in the structure of z0.
        coupled: whether f was seen to couple the samples. False means that nothing was seen, not that it does not.
        clipped: of an adjoint solve under `IFT(clip=…)`, which samples' u was shortened, (B,), bool; otherwise None.

    Example:
        >>> import torch, torchdeq
        >>> sol = torchdeq.FixedPointIteration(tol=1e-6)(torch.cos, torch.zeros(3, 1))
        >>> sol.converged
        tensor([True, True, True])
        >>> bool((sol.residual <= 1e-6).all())
        True
    """

    z: Tree
    abs_residual: Tensor
    rel_residual: Tensor
    stop_mode: StopMode
    tol: float
    status: Tensor
    nstep: Tensor
    nfe: int
    abs_trace: Tensor
    rel_trace: Tensor
    states: list[Tree] = field(default_factory=list)
    coupled: bool = False
    clipped: Tensor | None = None

    @property
    def residual(self) -> Tensor:
        """The residual that was compared with `tol`, of the returned z, per sample, (B,)."""
        return self.rel_residual if self.stop_mode == "rel" else self.abs_residual

    @property
    def trace(self) -> Tensor:
        """The residual at each evaluation, in the solver's stop mode, (N, B)."""
        return self.rel_trace if self.stop_mode == "rel" else self.abs_trace

    @property
    def converged(self) -> Tensor:
        """Which samples reached the tolerance, (B,), bool."""
        return self.status == Status.CONVERGED

    def detach(self) -> Solution:
        """The same solution without any autograd graph."""

        def bare(tree: Tree) -> Tree:
            return optree.tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, tree)

        return dataclasses.replace(
            self, **{f.name: bare(getattr(self, f.name)) for f in dataclasses.fields(self)}
        )

    def problem(self) -> str | None:
        """None if every sample converged; otherwise a sentence on the worst sample."""
        if bool(self.converged.all()):
            return None
        # A non-finite sample is worse than any number.
        badness = self.residual.nan_to_num(nan=torch.inf).masked_fill(self.converged, -torch.inf)
        badness = badness.masked_fill(self.status == Status.NON_FINITE, torch.inf)
        worst = int(badness.argmax())
        kind = "relative" if self.stop_mode == "rel" else "absolute"
        return (
            f"{int((~self.converged).sum())} of {self.status.numel()} samples did not converge. "
            f"Worst is sample {worst}: {kind} residual {float(self.residual[worst]):.2e} against "
            f"tol={self.tol:.2e} after {int(self.nstep[worst])} evaluations; "
            f"{Status(int(self.status[worst])).sentence}"
        )

    def __repr__(self) -> str:
        count = self.status.numel()
        worst = float(self.residual.max()) if count else 0.0
        return (
            f"Solution({int(self.converged.sum())} of {count} converged, largest "
            f"{self.stop_mode} residual {worst:.2e}, tol={self.tol:.2e}, nfe={self.nfe})"
        )


class Reporter:
    """Warns about a solve that did not converge, the first time it is called with one.

    A training loop that runs on a fixed budget would otherwise warn at every step. What happened later is
    counted in `unconverged` and stands in each `Solution`.

    Arguments:
        remedy: what an unconverged solve means and what to do; the end of the warning.
        throw: raise a `ConvergenceError`, every time, rather than warn.

    Example:
        >>> Reporter("Raise max_iter.").unconverged
        0
    """

    def __init__(self, remedy: str, *, throw: bool = False):
        self.remedy = remedy
        self.throw = throw
        self.unconverged = 0

    def __call__(self, solution: Solution, cause: Callable[[], str | None] | None = None) -> None:
        """Look at one solution.

        Arguments:
            solution: it.
            cause: looks for a cause that is known to be one, and says what it is and what to do instead of the remedy;
                None for nothing found. Called only if there is something to say.
        """
        if bool(solution.converged.all()):
            return
        self.unconverged += 1
        if not self.throw and self.unconverged > 1:
            return
        problem = solution.problem()
        text = f"{problem} {(cause and cause()) or self.remedy}"
        if self.throw:
            raise ConvergenceError(text)
        warnings.warn(text, ConvergenceWarning, stacklevel=callers_level())


def callers_level() -> int:
    """The `stacklevel` that names the line of the user's that led here, past this library's and torch's."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in (
        "torch",
        "torchdeq",
    ):
        level, frame = level + 1, frame.f_back
    return level
