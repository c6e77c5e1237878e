"""Newton–CG: a smooth function φ is minimised, given its gradient as f(y) = y − ∇φ(y).

    H d = −∇φ  by CG, to ‖∇φ + H d‖ ≤ η ‖∇φ‖ or until φ curves down along a direction;   y⁺ = y + α d,   H = ∇²φ.

To a solver of fixed points −∇φ is the residual, and I − J is H. Source: Nocedal and Wright, Numerical Optimization
(2006), algorithm 7.1, with the forcing term η of Eisenstat and Walker (1996), doi 10.1137/0917003, choice 2. φ itself
is not seen, and may rise. So the line search looks at the slope φ'(α) = ⟨∇φ(y + α d), d⟩ and accepts where
φ'(α) ≤ −0.8 φ'(0), which is Armijo's condition with the constant 0.1 for the difference of φ by the trapezoidal rule;
Hager and Zhang (2005), doi 10.1137/030601880, equation 4.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from torchdeq._state import Map, per_sample, select_rows
from torchdeq.solution import Solution
from torchdeq.solver.affine import dot
from torchdeq.solver.base import Solver, start_of
from torchdeq.solver.cg import CG, CGState
from torchdeq.solver.maps import Tally
from torchdeq.solver.newton_krylov import Linearised

_STEEPEST = 0.8  # how far uphill a trial may look, as a part of how far downhill the direction began
_SMALLEST = 1e-16  # the step length that is accepted in any case
_ETA, _GAMMA = 0.5, 0.9  # the first forcing term, also the largest; and Eisenstat and Walker's γ


class NewtonCGState(NamedTuple):
    """What Newton–CG remembers: the last accepted iterate, and the trial that began there."""

    z: Tensor  # (B, D)
    size: Tensor  # (B,), the norm of its residual
    d: Tensor  # (B, D), the direction
    slope: Tensor  # (B,), ⟨−∇φ, d⟩ there, positive
    alpha: Tensor  # (B,), the length tried
    eta: Tensor  # (B,), the forcing term that gave d


@dataclass(frozen=True, kw_only=True, repr=False)
class NewtonCG(Solver):
    """Newton–CG with a line search, per sample, for an f(y) = y − ∇φ(y). The default of `implicit_minimum`.

    Each direction leads downhill at first, so that it leaves a saddle or a maximum for a minimum, unless it is started
    exactly there. How far it goes is decided by the slope at the end alone: φ may be higher there, behind a rise within
    one step, and nothing keeps y inside a domain outside of which ∇φ still is a number. Each product with H counts as
    an evaluation. Memory is that of one graph of f and of some ten states.

    Example:
        The minimum of y⁴/4 − y²/2, from beside the maximum at 0.

        >>> import torch
        >>> gradient = lambda y: y**3 - y
        >>> sol = NewtonCG(tol=1e-10)(lambda y: y - gradient(y), torch.full((1, 1), 0.1, dtype=torch.float64))
        >>> bool(sol.converged), round(sol.z.item(), 6)
        (True, 1.0)
    """

    recovers: ClassVar[int] = 20  # the line search comes back from there by itself
    #: Whether J has to be symmetric.
    symmetric_only: ClassVar[bool] = True

    def init(self, z: Tensor) -> NewtonCGState:
        """Nothing tried yet: whatever comes is accepted."""
        row = z.new_ones(z.shape[0])
        return NewtonCGState(z, row * torch.inf, torch.zeros_like(z), row, row, row)

    def rescue(
        self, z: Tensor, fz: Tensor, state: NewtonCGState, struck: Tensor, strikes: Tensor
    ) -> tuple[Tensor, Tensor, NewtonCGState]:
        """Nothing: a slope that is not a number is not accepted, so `step` shortens the trial."""
        return z, fz, state

    def step(self, f: Map, z: Tensor, fz: Tensor, state: NewtonCGState) -> tuple[Tensor, NewtonCGState]:
        """A new direction where the last trial was accepted; a shorter trial where it was not."""
        assert isinstance(f, Hessian)
        r = f.residual(z, fz)
        size = per_sample(r)
        slope = dot(r, state.d)
        accepted = (
            (slope >= -_STEEPEST * state.slope) | (state.size == torch.inf) | (state.alpha <= _SMALLEST)
        )
        accepted = accepted & size.isfinite()
        keep = accepted[:, None]

        eta = _GAMMA * (size / state.size) ** 2
        floor = _GAMMA * state.eta**2
        eta = torch.where(floor > 0.1, torch.maximum(eta, floor), eta).clamp(max=_ETA)
        # A residual below half the tolerance is never needed; a sample within it needs no direction at all.
        now = self._measured(z, fz, f)
        least = now.scale if now.scale.dim() == 1 else now.scale.amin(dim=1)
        enough = 0.5 * self.tol * (least if self.stop_mode == "rel" else torch.ones_like(size))
        limit = torch.maximum(eta * size, enough)
        limit = torch.where(accepted & (now.measure > self.tol), limit, torch.inf)
        d = f.solve(Truncated(), torch.where(keep, r, 0.0), limit)

        # Where the slope has turned too far, the zero of its secant, between a tenth and a half of the last length; a
        # tenth where there is no number, as in a flat region, whose steps lead far away.
        cut = (state.slope / (state.slope - slope)).nan_to_num(nan=0.1).clamp(0.1, 0.5)
        state = NewtonCGState(
            torch.where(keep, z, state.z),
            torch.where(accepted, size, state.size),
            torch.where(keep, d, state.d),
            torch.where(accepted, dot(r, d), state.slope),
            torch.where(accepted, 1.0, state.alpha * cut),
            torch.where(accepted, eta, state.eta),
        )
        return state.z + state.alpha[:, None] * state.d, state

    def _loop(self, f: Tally, z0: Tensor | None, record: Sequence[int]) -> Solution:
        z = start_of(f.f) if z0 is None else z0
        traced = Hessian.of(f)
        solution = self._iterate(traced, z, self.init(z), record)
        f.calls = traced.calls
        return solution


class Hessian(Linearised):
    """f, and products with its Jacobian, which is symmetric, where it was called last."""

    def select(self, rows: Tensor) -> Hessian:
        """See `Tally.select`."""
        few = Hessian(select_rows(self.f, rows), self.amp, self.limit, self.layout)
        few.calls = self.calls
        return few

    def solve(self, linear: Truncated, r: Tensor, limit: Tensor) -> Tensor:  # type: ignore[override]
        """d with (I − J) d = r to the residual norms `limit` (B,), within the evaluations that are left but one."""
        if self.calls >= self.limit - 1 or not bool(limit.isfinite().any()) or not self.image.requires_grad:
            return r
        root = self._root(r)
        if root is not None:  # where φ is flat, as far as if its curvature were that of H
            linear = linear.replace(flat=torch.finfo(r.dtype).eps ** 0.5)
        products = Tally(self._product, self.amp)
        products.calls = self.calls
        found = self._found(linear, products, r, limit, root)
        self.calls = products.calls
        return torch.where((found.steps > 0)[:, None], found.u, r)

    def _product(self, v: Tensor) -> Tensor:
        (product,) = torch.autograd.grad(self.image, self.at, v, retain_graph=True, materialize_grads=True)
        return product


@dataclass(frozen=True, kw_only=True, repr=False)
class Truncated(CG):
    """CG that keeps its last iterate: each leads downhill, further than the one before.

    Along a first direction in which φ curves down it goes as far as if φ curved up as much; where φ does not curve, as
    far as the residual.

    Arguments:
        flat: by how much to multiply the residual for that.

    Example:
        >>> import torch
        >>> r = torch.ones(1, 2)
        >>> [method.advance(-2 * r, method.first(r))[0].u.tolist() for method in (CG(), Truncated())]
        [[[0.0, 0.0]], [[0.5, 0.5]]]
    """

    flat: float = 1.0

    #: In what it minimises, φ's quadratic model.
    monotone: ClassVar[bool] = True

    def advance(self, ap: Tensor, state: CGState) -> tuple[CGState, Tensor]:
        """See `CG.advance`."""
        after, estimate = super().advance(ap, state)
        curvature = dot(state.probe, ap).abs()
        stuck = state.probe.any(dim=1) & ~state.u.any(dim=1) & ~after.u.any(dim=1)
        curves = curvature > torch.finfo(ap.dtype).eps * after.norm * state.rho
        length = torch.where(stuck, torch.where(curves, state.rho / curvature, self.flat), 0.0)
        return after._replace(u=after.u + length[:, None] * state.probe), estimate
