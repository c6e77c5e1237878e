"""The linear systems at a state of a monotone map, solved by the splitting that solved the map.

    J = D W,  D = diag σ'(W z + c) with entries in [0, 1].
    u = Jᵀ u + g:   p = D (Wᵀ p + g),  u = Wᵀ p + g.
    v = J v + t:    q = D (W q + W t),  v = q + t.

p and q are fixed points of monotone maps with the same m and L: multiplication by d is the proximal operator of
φ(z) = ½ (1/d − 1) z². Source: Winston and Kolter (2020), arXiv 2006.08591, theorem 2, for the first of the two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from torchdeq._state import FlatMap, Layout, Map, layout_of, per_sample
from torchdeq.solution import Solution, Status
from torchdeq.solver.base import SolverLoop
from torchdeq.solver.maps import AffineMap
from torchdeq.solver.monotone import MonotoneMap
from torchdeq.solver.prox import Prox
from torchdeq.solver.splitting import Splitting
from torchdeq.solver.watch import Iterate, relative


class SplitSystem(SolverLoop):
    """A solver of u = J u + b, or of u = Jᵀ u + b, for the J of a monotone map at one state.

    What a solve has measured in the end, with two products more, is the residual of the system itself. Its traces are
    those of p or q, of Jᵀ times 1 + 1.2 L, and so bounds of that residual. To this bound it is solved, until rounding
    ends that: then what counts is again what is measured in the end.

    Arguments:
        splitting: solves it.
        f: the monotone map.
        z: the state, (B, D).
        transposed: whether the systems are those of Jᵀ.
        layout: of the state; None for that of a (B, D) tensor.
    """

    def __init__(
        self, splitting: Splitting, f: MonotoneMap, z: Tensor, layout: Layout | None, *, transposed: bool
    ):
        self.tol = splitting.tol
        self.splitting = splitting
        self.f = f
        self.transposed = transposed
        self.layout = layout or layout_of(z)
        with torch.inference_mode(False), torch.enable_grad():
            y = f.before(self.layout.unravel(z.clone())).detach().requires_grad_()
            (d,) = torch.autograd.grad(f.prox(y).sum(), y, materialize_grads=True)
        self.d = self.layout.ravel(d)  # (B, D)

    def run(
        self,
        f: Map,
        z0: Tensor | None = None,
        *,
        record: Sequence[int] = (),
        layout: Layout | None = None,
        together: bool = True,
    ) -> Solution:
        """See `Solver.run`; f is the `AffineMap` of J or Jᵀ, and its samples may be scaled by themselves."""
        assert isinstance(f, AffineMap)
        b: Tensor = f.shift
        large = self.f.lipschitz()  # before `dual`, which takes it along
        weight = self.f.weight.mT if self.transposed else self.f.weight
        inject = b if self.transposed else self._flat(self.f.weight, b)
        scaling = _scaling(self.d.reshape(self.layout.shapes[0]))
        dual = self.f.dual(weight, self.layout.unravel(inject), scaling, transposed=self.transposed)
        # u = Wᵀ p + g has the residual Wᵀ (f(p) − p), and ‖W‖ ≤ 1 + L; 1.2 because L is found to a sixth.
        shrink = 1 / (1 + 1.2 * float(large)) if self.transposed else 1.0
        splitting = self.splitting.replace(tol=shrink * self.tol, stop_mode="abs", compact=False)
        found = splitting.run(FlatMap(dual, self.layout), self.d * inject, layout=self.layout)
        u = self._flat(weight, found.z) + b if self.transposed else found.z + b
        size, scale = per_sample(f(u) - u), per_sample(b)
        measure = relative(size, scale) if self.splitting.stop_mode == "rel" else size
        return self.splitting._solution(
            Iterate(u, size, scale, measure),
            (found.status == Status.NON_FINITE) | ~size.isfinite(),
            found.nstep,
            found.nfe + 2,
            [(trace / shrink, scale) for trace in found.abs_trace],
            [],
            stalled=found.status == Status.STALLED,
        )

    def _flat(self, weight: Tensor, v: Tensor) -> Tensor:
        """W v, (B, D)."""
        return self.layout.ravel(self.layout.unravel(v) @ weight.mT)


@dataclasses.dataclass(frozen=True, eq=False)
class SplitSystems:
    """The linear systems of a monotone map, at whatever state.

    Arguments:
        splitting: solves them.
        f: the monotone map.
        layout: of its state; None for that of a (B, D) tensor.
    """

    splitting: Splitting
    f: MonotoneMap
    layout: Layout | None

    def at(self, z: Tensor, *, transposed: bool) -> SplitSystem:
        """Those at the state z, (B, D)."""
        return SplitSystem(self.splitting, self.f, z, self.layout, transposed=transposed)


def _scaling(d: Tensor) -> Prox:
    return lambda y, alpha: y * (d / (d + alpha * (1 - d)))
