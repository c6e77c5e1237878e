"""Implicit differentiation: the exact gradient of a fixed point, at the cost of one linear solve.

    z* = f(z*, θ)   ⇒   dL/dθ = (∂f/∂θ)ᵀ u   with   (I − Jᵀ) u = ∂L/∂z*,   J = ∂f/∂z at z*.

Sources: Liao et al. (2018), arXiv 1803.06396 (recurrent back-propagation); Bai, Kolter and Koltun (2019),
arXiv 1909.01377, theorem 1; Rajeswaran et al. (2019), arXiv 1909.04630.

One tracked call f(z*) carries u on to parameters and inputs, whatever they are. The error of the gradient is of
first order in the forward residual; that of u is at most ‖g − (I − Jᵀ) u‖ / (1 − ‖J‖).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchdeq._replay import AutocastState, RandomState
from torchdeq._state import Layout, Map, per_sample
from torchdeq.grad.adjoint import solve_adjoint
from torchdeq.grad.base import GradMethod, OnBackward
from torchdeq.solution import Reporter
from torchdeq.solver.base import SolverLoop, layout_of_map
from torchdeq.solver.gmres import GMRES

ADJOINT_REMEDY = (
    "This was the adjoint solve of a backward pass: the gradient's relative error is about this residual "
    "times the condition of I − J. Raise the adjoint solver's max_iter (b_max_iter) or its tol (b_tol), use "
    "GMRES(), or keep ‖J‖ below 1 (normalise the weights, regularise the Jacobian)."
)


@dataclass(frozen=True, kw_only=True, repr=False)
class IFT(GradMethod):
    """Implicit differentiation. First derivatives only; differentiating twice raises an error.

    Arguments:
        solver: solves the adjoint system. Its `tol` is relative to the norm of the incoming cotangent, per
            sample. Krylov solvers need the fewest products with Jᵀ; any solver works.
        hook: False: the backward pass evaluates f once more at z* and solves on that graph, in an
            autograd Function. True: it solves on the graph of the forward's tracked call, in a tensor
            hook: one evaluation less, while that graph is kept alive between forward and backward.

    Example:
        >>> import torch
        >>> a = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        >>> z, = IFT().attach(lambda z: a * z + 1, torch.full((1, 1), 2.0, dtype=torch.float64))
        >>> z.sum().backward()
        >>> round(a.grad.item(), 6)  # z* = 1 / (1 − a), dz*/da = 1 / (1 − a)² = 4
        4.0
    """

    solver: SolverLoop = GMRES(tol=1e-5)  # noqa: RUF009 - frozen
    hook: bool = False

    def __post_init__(self) -> None:
        self.require(
            isinstance(self.solver, SolverLoop),
            f"solver must be a Solver such as GMRES(tol=1e-6), got {self.solver!r}; "
            f"as_solver makes one from a name",
        )

    def attach(self, f: Map, z: Tensor, *, on_backward: OnBackward | None = None) -> list[Tensor]:
        """See `GradMethod.attach`. Returns [f(z)]."""
        report = on_backward or Reporter(ADJOINT_REMEDY)
        z = z.detach()
        if not torch.is_grad_enabled():
            return [f(z)]
        if self.hook:
            return [self._hooked(f, z.requires_grad_(), report)]
        layout = layout_of_map(f)
        amp, random = AutocastState.capture(z.device), RandomState.capture(z.device)
        fz = f(z)
        if not fz.requires_grad:  # nothing to differentiate with respect to
            return [fz]

        def solve(z: Tensor, fz: Tensor, g: Tensor) -> Tensor:
            with torch.enable_grad(), amp.on(), random.again():
                again = z.detach().requires_grad_()
                fz_again = f(again)
            _check_same(fz, fz_again, loose=amp.enabled)
            return self._solve(again, fz_again, g, layout, report)

        out: Tensor = _Adjoint.apply(fz, z, solve)
        return [out]

    def _hooked(self, f: Map, z: Tensor, report: OnBackward) -> Tensor:
        fz = f(z)
        if not fz.requires_grad:
            return fz
        layout = layout_of_map(f)
        # The last pass through the graph leaves Jᵀu on our private z; nobody wants it.
        z.register_post_accumulate_grad_hook(_drop_grad)

        def solve(g: Tensor | None) -> Tensor | None:
            if g is None:  # an undefined gradient stands for zero
                return None
            return first_order_only(self._solve(z, fz, g, layout, report), g, fz)

        # The hook sits on a copy that the solve does not pass through, so it is never re-entered and needs
        # no removal: every backward pass solves, each call of the module its own system.
        out = fz.clone()  # not a view: an in-place operation on one would go past the hook
        out.register_hook(solve)
        return out

    def _solve(self, z: Tensor, fz: Tensor, g: Tensor, layout: Layout | None, report: OnBackward) -> Tensor:
        """u, from the graph of fz = f(z)."""

        def vjp(u: Tensor) -> Tensor:
            if not fz.requires_grad:  # f does not depend on z
                return torch.zeros_like(u)
            # A solver that needs J too, the transpose of u -> Jᵀu, gets it by differentiating this product.
            again = torch.is_grad_enabled() and u.requires_grad
            (ju,) = torch.autograd.grad(fz, z, u, retain_graph=True, create_graph=again, allow_unused=True)
            return torch.zeros_like(u) if ju is None else ju

        with torch.no_grad():
            u, solution = solve_adjoint(vjp, g, self.solver, layout)
        report(solution)
        return u


class _Adjoint(torch.autograd.Function):
    """The identity on f(z*), whose backward turns the cotangent g into u."""

    @staticmethod
    def forward(ctx: Any, fz: Tensor, z: Tensor, solve: Any) -> Tensor:
        ctx.solve = solve
        ctx.save_for_backward(fz, z)
        return fz.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        fz, z = ctx.saved_tensors
        return first_order_only(ctx.solve(z, fz, grads[0]), grads[0], fz), None, None


def first_order_only(u: Tensor, g: Tensor, fz: Tensor) -> Tensor:
    """u, tied to what it depends on, so that differentiating it is an error rather than a wrong number."""
    if not torch.is_grad_enabled():
        return u
    tied: Tensor = _FirstOrderOnly.apply(u, g, fz)
    return tied


class _FirstOrderOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, g: Tensor, fz: Tensor) -> Tensor:
        return u.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "second derivatives were asked of IFT, which gives first derivatives only: the adjoint solution "
            "of a backward pass with create_graph=True is not differentiable. Use Unroll(), which "
            "differentiates the iteration itself to any order, or drop create_graph=True."
        )


def _check_same(fz: Tensor, again: Tensor, *, loose: bool) -> None:
    """Raise if f gave another value when it was rebuilt: its adjoint would be that of another map."""
    fz, again = fz.detach(), again.detach()
    # Two evaluations of one map differ by rounding, in half precision by some 2⁻⁸.
    allowed = (5e-2 if loose else 1e-3) * per_sample(fz)
    if bool((per_sample(again - fz) > allowed).any()):
        raise RuntimeError(
            "f gave another value in the backward pass than in the forward pass at the same state, so the adjoint "
            "would be that of another map. Either something f closes over has changed in between (a loop "
            "variable: bind it with a default argument; weights updated in place: call backward first), or f is "
            "random in a way that its generator's state does not repeat. IFT(hook=True) keeps the forward's graph "
            "instead of rebuilding it."
        )


def _drop_grad(z: Tensor) -> None:
    z.grad = None
