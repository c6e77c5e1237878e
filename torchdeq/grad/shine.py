"""SHINE: the adjoint solution from what the forward solve has learned of the inverse.

    û = Hᵀ g,   H ≈ (I − J)⁻¹ the matrix of the last step z + H r of a quasi-Newton solver,   dL/dθ ≈ Bᵀ û.

As (I − Jᵀ) u = g, the error is û − u = −(I − Jᵀ)⁻¹ ρ with ρ = g − (I − Jᵀ) û: ‖û − u‖ ≤ ‖ρ‖ / (1 − ‖J‖). Or H
preconditions the exact adjoint system, (I − Jᵀ) Hᵀ p = g with u = Hᵀ p.

Source: Ramzi, Mannel, Bai, Starck, Ciuciu and Moreau (2022), arXiv 2106.00553; the fallback as in their code.
Departures: H is that of any method of the secant family, of each sample by itself; to refine, they go on from û by
Broyden's method, here H is a right preconditioner.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import optree
import torch
from torch import Tensor

from torchdeq._modes import refuse_transforms, split_dual, without_tangents
from torchdeq._state import Layout, Map, per_sample
from torchdeq.grad.adjoint import _norm, solve_adjoint
from torchdeq.grad.base import GradMethod, OnBackward
from torchdeq.grad.ift import ADJOINT_REMEDY
from torchdeq.grad.inverse import on_duals, vjp_of
from torchdeq.grad.lift import first_order_only
from torchdeq.solution import Reporter, Solution
from torchdeq.solver.affine import AffineSolver
from torchdeq.solver.base import SolverLoop, layout_of_map
from torchdeq.solver.fp_iter import SimpleFixedPointIteration
from torchdeq.solver.learned import Learned
from torchdeq.solver.maps import AffineMap


@dataclass(frozen=True, kw_only=True, repr=False)
class SHINE(GradMethod):
    """The inverse that the forward solve has learned, in place of an adjoint solve or to speed it up.

    Works with `Broyden`, `Multisecant`, `Anderson`, and a `Fallback` that begins with one of them. First derivatives
    only. A sample that has converged at its first evaluation has learned nothing: its û is g.

    How good û is depends on whether g lies where the solver has been. On a random g it is little better than g itself,
    the gradient of `JFB`. Read the residual that `on_backward` gets, or use `refine`: the gradient is then exact to
    the tolerance, whatever H is worth. The more products `GMRES` needs by itself, the more H saves.

    Memory, between the forward and the backward pass: one graph of f, and two states for each step of the solve, which
    the backward pass frees. Cost of a backward pass: one vector–Jacobian product with parameters, two with `certify`;
    with `refine` those of the solver, and that one.

    Arguments:
        refine: a Krylov solver that allows a preconditioner, such as GMRES(tol=1e-4): solves the adjoint system, with
            H as right preconditioner. None: û as it is.
        fallback: û of a sample whose norm is more than so many times that of g is taken to be off, and replaced by g.
            1.3 as in the paper's code. Where I − J is nearly singular the exact u is as large: there use more, math.inf
            for none, or refine, which has no use for it.
        certify: spend one product with Jᵀ on the residual ‖g − (I − Jᵀ) û‖ / ‖g‖, which `on_backward` gets. No
            tolerance is asked of it: `Solution.tol` is inf, and only a sample that is not finite counts as not
            converged. False: `on_backward` is not called. With `refine` the solver measures.

    Raises:
        ValueError: a value is out of range, or has no use beside `refine`.
        TypeError: the forward solver learns nothing of the inverse; or there was no forward solve.
        RuntimeError: when it is differentiated twice, in forward mode, or by a transform of torch.func.

    Example:
        >>> import torch, torchdeq
        >>> a = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        >>> deq = torchdeq.DEQ(torchdeq.Broyden(tol=1e-8), SHINE(fallback=3.0))
        >>> z, _ = deq(lambda z: a * z + 1, torch.zeros(1, 1, dtype=torch.float64))
        >>> z.sum().backward()
        >>> round(a.grad.item(), 6)  # for one unknown a secant is the derivative: 1 / (1 − a)² = 4
        4.0
    """

    needs_solve: ClassVar[bool] = True

    refine: AffineSolver | None = None
    fallback: float = 1.3
    certify: bool = True

    def __post_init__(self) -> None:
        self.require(
            isinstance(self.fallback, int | float) and self.fallback > 0,
            f"fallback is a ratio of norms and must be above 0, math.inf for none, got {self.fallback!r}",
        )
        if self.refine is None:
            return
        self.require(
            isinstance(self.refine, AffineSolver) and self.refine.preconditionable,
            f"refine must be a Krylov solver that allows a preconditioner, GMRES(), BiCGSTAB() or Neumann(), got "
            f"{self.refine!r}",
        )
        self.require(
            self.fallback == SHINE.fallback and self.certify,
            "fallback and certify are for û as it is, and refine solves the system and measures by itself. Leave "
            "them out",
        )

    def attach(self, f: Map, z: Tensor, *, on_backward: OnBackward | None = None) -> list[Tensor]:
        """Not for a state without its solve: the inverse is what the solve leaves behind."""
        raise TypeError(
            f"{self!r} uses what the forward solve has learned of the inverse, and got a solved state alone. Use it as "
            f"the last gradient method of a DEQ, DEQ(Broyden(), {self!r}); for recorded states give others, as in "
            f"grad=[IFT(), {self!r}]."
        )

    def __call__(
        self,
        f: Map,
        z0: Tensor,
        solver: SolverLoop,
        *,
        record: Sequence[int] = (),
        on_backward: OnBackward | None = None,
    ) -> tuple[list[Tensor], Solution]:
        """Solve from z0 (B, D) without a graph, keep what was learned, and make one tracked call of f."""
        refuse_transforms(lambda: repr(self))
        if not solver.learns:
            raise TypeError(
                f"{self!r} shares the inverse that a quasi-Newton solver learns, and {solver!r} learns none. Use "
                f"Broyden(), Multisecant(), Anderson(), or a Fallback that begins with one of them; with {solver!r} "
                f"IFT() or PhantomGrad() give gradients."
            )
        with without_tangents():
            solution, learned = solver.solve_and_learn(f, z0, record=record)
        z = solution.z.detach()
        if not torch.is_grad_enabled():
            return [f(z)], solution
        # A product with Jᵀ needs z in the graph.
        measures = self.certify or self.refine is not None
        z = z.requires_grad_(measures)
        fz = f(z)
        if not fz.requires_grad:
            return [fz], solution
        if measures:
            # The last pass through the graph leaves Jᵀû on our private z, which nobody wants.
            z.register_post_accumulate_grad_hook(_drop_grad)
        report, layout = on_backward or Reporter(ADJOINT_REMEDY), layout_of_map(f)

        def adjoint(g: Tensor, fz: Tensor, z: Tensor, learned: Learned) -> Tensor:
            primal, _ = split_dual(g)

            def linear(w: Tensor) -> Tensor:
                u, account = self._adjoint(w, fz, z, learned, layout)
                if account is not None and w is primal:
                    report(account)
                return u

            return first_order_only(on_duals(linear, g), g, fz, self._too_often())

        out: Tensor = _Shared.apply(fz, z, learned, adjoint)
        return [out], solution

    @torch.no_grad()
    def _adjoint(
        self, g: Tensor, fz: Tensor, z: Tensor, learned: Learned, layout: Layout | None
    ) -> tuple[Tensor, Solution | None]:
        """û (B, D) and its account, from the graph of fz = f(z)."""
        product = vjp_of(fz, z)
        if self.refine is not None:
            return solve_adjoint(product, g, self.refine, layout, preconditioner=learned.transposed)
        # H mixes the samples of a whole, which so need one scale.
        size = _norm(g) if learned.whole is None else _norm(g.reshape(1, -1)).expand(len(g))  # (B,)
        size = torch.where(size != 0, size, 1.0)[:, None]
        unit = g / size
        u = learned.transposed(unit)
        large, allowed = per_sample(u), self.fallback * per_sample(unit)
        if learned.whole is not None:
            large, allowed = (torch.linalg.vector_norm(norms).expand_as(norms) for norms in (large, allowed))
        if self.fallback < math.inf:
            u = torch.where((large > allowed)[:, None], unit, u)
        if not self.certify:
            return u * size, None
        once = SimpleFixedPointIteration(max_iter=1, tol=math.inf)  # one evaluation, of the residual
        account = once.run(AffineMap(product, unit), u, layout=layout, together=False)
        return u * size, account

    def _too_often(self) -> str:
        return (
            f"second derivatives were asked of {self!r}, which gives first derivatives only: what the solver has "
            f"learned is not differentiable. Use IFT(order=2); or drop create_graph=True, if it was not meant."
        )


class _Shared(torch.autograd.Function):
    """The identity on f(z*), whose backward pass turns the cotangent g into û.

    All tensors are saved as autograd saves them, so that it frees them when it frees the graph.
    """

    @staticmethod
    def forward(ctx: Any, fz: Tensor, z: Tensor, learned: Learned, adjoint: Callable[..., Tensor]) -> Tensor:
        parts: Any = learned.parts
        tensors, ctx.parts = optree.tree_flatten(parts)
        ctx.whole, ctx.adjoint = learned.whole, adjoint
        ctx.save_for_backward(fz, z, *tensors)
        return fz.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        fz, z, *tensors = ctx.saved_tensors
        parts: Any = optree.tree_unflatten(ctx.parts, tensors)
        learned = Learned(parts, ctx.whole)
        return ctx.adjoint(grads[0], fz, z, learned), None, None, None


def _drop_grad(z: Tensor) -> None:
    z.grad = None
