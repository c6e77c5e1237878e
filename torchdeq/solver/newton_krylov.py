"""Newton's method on r(z) = f(z) − z, its linear systems solved by a Krylov method.

    (I − J) d = r   to   ‖r − (I − J) d‖ ≤ η ‖r‖,        z⁺ = z + α d,        J = ∂f/∂z at z.

Sources: Eisenstat and Walker (1996), doi 10.1137/0917003, choice 2, for the forcing term η, which makes the linear
solves as loose as Newton's progress allows; Kelley, Iterative Methods for Linear and Nonlinear Equations (1995),
chapter 6. The system is the fixed point d = J d + r, an affine map like any other. J v is the derivative of Jᵀw with
respect to w, so that one graph of f serves for all products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor

from torchdeq._state import Map, per_sample, select_rows
from torchdeq.solution import Solution
from torchdeq.solver.affine import AffineSolver, Krylov
from torchdeq.solver.base import Solver, start_of
from torchdeq.solver.gmres import GMRES
from torchdeq.solver.maps import Tally, generic, root_of_scale, with_transpose

_DECREASE, _SMALLEST = 1e-4, 1 / 64  # Armijo's constant, and the step length that is accepted in any case
_ETA, _GAMMA = 0.5, 0.9  # the first forcing term, also the largest; and Eisenstat and Walker's γ


class NewtonState(NamedTuple):
    """What Newton–Krylov remembers: the last accepted iterate, and the trial that began there."""

    z: Tensor  # (B, D)
    r: Tensor  # (B, D), its residual
    size: Tensor  # (B,), the norm of r
    d: Tensor  # (B, D), the direction
    alpha: Tensor  # (B,), the length tried
    eta: Tensor  # (B,), the forcing term that gave d
    begun: bool


_NOT_EXACT = (
    "NewtonKrylov differentiates f, twice as far as autograd is concerned. For an f that does not allow that (one "
    "computed outside of torch, or with a fused attention kernel) use NewtonKrylov(derivative='difference'), or "
    "Multisecant(), which needs no derivative."
)


@dataclass(frozen=True, kw_only=True, repr=False)
class NewtonKrylov(Solver):
    """Newton–Krylov with backtracking. For high accuracy, and for maps on which Picard iteration diverges.

    Memory is that of one graph of f and of the Krylov space. Every product with J counts as an evaluation, and so does
    the product with Jᵀ that prepares those at an iterate.

    Arguments:
        linear: solves for the direction.
        derivative: 'exact': J v by automatic differentiation, which must be able to go through f twice.
            'difference': J v as the difference quotient of f along v, one call of f without a graph. It is right to
            half the digits, which is enough for tolerances down to some hundred ε.

    Example:
        >>> import torch
        >>> f = lambda z: 4 * torch.cos(z)  # Picard iteration does not converge
        >>> sol = NewtonKrylov(tol=1e-12)(f, torch.ones(1, 1, dtype=torch.float64))
        >>> bool(sol.converged), round(sol.z.item(), 6)
        (True, 1.252353)
    """

    linear: AffineSolver = GMRES()  # noqa: RUF009 - frozen
    derivative: Literal["exact", "difference"] = "exact"

    recovers: ClassVar[int] = 20  # the line search comes back from there by itself

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            isinstance(self.linear, AffineSolver),
            f"linear must be a solver of affine maps such as GMRES(), got {self.linear!r}",
        )
        self.require(
            self.derivative in ("exact", "difference"),
            f"derivative must be 'exact' or 'difference', got {self.derivative!r}",
        )

    def init(self, z: Tensor) -> NewtonState:
        """Nothing tried yet: whatever comes is better."""
        row = z.new_ones(z.shape[0])
        return NewtonState(z, z, torch.full_like(row, torch.inf), torch.zeros_like(z), row, row, False)

    def rescue(
        self, z: Tensor, fz: Tensor, state: NewtonState, struck: Tensor, strikes: Tensor
    ) -> tuple[Tensor, Tensor, NewtonState]:
        """Nothing: a residual that is not a number is no decrease, so `step` halves the trial."""
        return z, fz, state

    def step(self, f: Map, z: Tensor, fz: Tensor, state: NewtonState) -> tuple[Tensor, NewtonState]:
        """A new direction where the last trial was accepted; a shorter trial where it was not. First a Picard step."""
        assert isinstance(f, Linearised)
        r = f.residual(z, fz)
        size = per_sample(r)
        if not state.begun:
            # f is often at its worst where one begins: a norm layer has no useful derivative at 0.
            return z + r, state._replace(z=z, r=r, d=r, begun=True)
        accepted = size <= (1 - _DECREASE * state.alpha) * state.size
        accepted = accepted | ((state.alpha <= _SMALLEST) & size.isfinite())
        keep = accepted[:, None]

        eta = _GAMMA * (size / state.size) ** 2
        floor = _GAMMA * state.eta**2
        eta = torch.where(floor > 0.1, torch.maximum(eta, floor), eta).clamp(max=_ETA)
        # A residual below half the tolerance is never needed; a sample within it needs no direction at all.
        now = self._measured(z, fz, f)
        least = now.scale if now.scale.dim() == 1 else now.scale.amin(dim=1)  # that of the smallest leaf
        enough = 0.5 * self.tol * (least if self.stop_mode == "rel" else torch.ones_like(size))
        limit = torch.maximum(eta * size, enough)
        limit = torch.where(accepted & (now.measure > self.tol), limit, torch.inf)
        d = f.solve(self.linear, torch.where(keep, r, 0.0), limit)

        state = NewtonState(
            torch.where(keep, z, state.z),
            torch.where(keep, r, state.r),
            torch.where(accepted, size, state.size),
            torch.where(keep, d, state.d),
            torch.where(accepted, 1.0, state.alpha / 2),
            torch.where(accepted, eta, state.eta),
            True,
        )
        return state.z + state.alpha[:, None] * state.d, state

    def _loop(self, f: Tally, z0: Tensor | None, record: Sequence[int]) -> Solution:
        z = start_of(f.f) if z0 is None else z0
        traced = Linearised.of(f)
        traced.exact = self.derivative == "exact"
        solution = self._iterate(traced, z, self.init(z), record)
        f.calls = traced.calls
        return solution


class Linearised(Tally):
    """f, and products with its Jacobian where it was called last.

    An f that has a `displacement`, z -> f(z) − z, is asked for that alone: where the residual is small beside z, adding
    z to it and taking z off again would leave rounding. A = I − J then is −∂(f − z)/∂z, and to be handed to a solver of
    affine maps as I − L without loss it is scaled to be large beside the identity.

    Arguments:
        exact: whether the products are derivatives; else differences.
    """

    exact = True
    apart = False  # whether `self.f` is the displacement
    start: Tensor | None = None  # where it was called first

    @classmethod
    def of(cls, f: Tally) -> Self:
        """For the f of another tally, with a count that goes on from there."""
        displacement = getattr(f.f, "displacement", None)
        traced = cls(displacement or f.f, f.amp, f.limit, f.layout)
        traced.calls, traced.apart = f.calls, displacement is not None
        return traced

    def __call__(self, z: Tensor) -> Tensor:
        self._columns: Tensor | None = None
        self.at = z
        self.start = z if self.start is None else self.start
        if not self.exact:
            self.image = super().__call__(z).clone()  # f may write its next output into the same memory
        else:
            with torch.inference_mode(False), torch.enable_grad():
                self.at = z.detach().clone().requires_grad_()
                try:
                    # A copy, so that an f in place meets our error.
                    self.image = super().__call__(self.at.clone())
                except RuntimeError as error:
                    error.add_note(_NOT_EXACT)
                    raise
        image = self.image.detach()
        return z + image if self.apart else image

    def _difference_of(self, z: Tensor, fz: Tensor) -> Tensor:
        return self.image.detach() if self.apart else fz - z

    def columns(self) -> Tensor:
        """Aᵀv of a generic v, (B, D), A = I − J: each about as large as a column of A. One product per evaluation."""
        if self._columns is None:
            self.calls += 1
            with torch.inference_mode(False):
                v = generic(self.at.detach())
                product = (self._vjp if self.exact else self._difference)(v.clone()).detach()
            self._columns = product if self.apart else v - product
        return self._columns

    def select(self, rows: Tensor) -> Linearised:
        """See `Tally.select`."""
        few = Linearised(select_rows(self.f, rows), self.amp, self.limit, self.layout)
        few.calls, few.exact = self.calls, self.exact
        return few

    def solve(self, linear: AffineSolver, r: Tensor, limit: Tensor) -> Tensor:
        """d with (I − J) d = r to the residual norms `limit` (B,), within the evaluations that are left but one."""
        if self.calls >= self.limit - 2 or not bool(limit.isfinite().any()):
            return r
        root = self._root(r)
        products = Tally(self._difference, self.amp)
        products.calls = self.calls
        with torch.inference_mode(False):
            r = r.clone()
            if self.exact:
                if not self.image.requires_grad:  # f does not depend on z
                    return r
                _, products.f = with_transpose(self._vjp, r)
                products.calls += 1
            try:
                found = self._found(linear, products, r, limit, root)
            except RuntimeError as error:
                raise RuntimeError(f"{_NOT_EXACT} Autograd said: {error.__cause__ or error}") from error
        self.calls = products.calls
        return torch.where((found.steps > 0)[:, None], found.u, r)

    def _root(self, like: Tensor) -> Tensor | None:
        """ρ of `root_of_scale` that makes ρAρ large beside the identity; None if A is made from J."""
        if not self.apart:
            return None
        size = per_sample(self.columns()) / per_sample(generic(like))
        return root_of_scale(size, torch.finfo(like.dtype).eps ** -0.5)

    def _found(
        self, linear: AffineSolver, products: Tally, r: Tensor, limit: Tensor, root: Tensor | None
    ) -> Krylov:
        """What `linear` finds for (I − J) d = r. `products` has J; with a `root` it has J − I."""
        budget = self.limit - 1
        if root is None:
            return linear.solve(products, r, limit=limit, budget=budget, check=False)
        plain = products.f
        products.f = lambda v: v + root * plain(root * v)
        found = linear.solve(products, root * r, limit=root[:, 0] * limit, budget=budget, check=False)
        return found._replace(u=root * found.u)

    def _vjp(self, w: Tensor) -> Tensor:
        if not self.image.requires_grad:
            return torch.zeros_like(w)
        (product,) = torch.autograd.grad(self.image, self.at, w, create_graph=True, materialize_grads=True)
        return product

    def _difference(self, v: Tensor) -> Tensor:
        """(f(z + h v) − f(z)) / h, with h v of the size of √ε z; ε that of the narrowest dtype in f."""
        size = per_sample(v)
        h = self.resolution(v) ** 0.5 * (per_sample(self.at) + 1) / size.masked_fill(size == 0, 1.0)
        return (self.f(self.at + h[:, None] * v) - self.image) / h[:, None]
