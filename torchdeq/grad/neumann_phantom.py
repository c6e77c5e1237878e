"""Phantom gradient, Neumann form: the adjoint solution as the first k terms of its series, on one graph of f.

    û = τ Σ_{i<k} Mⁱ g,   M = (1 − τ) I + τ Jᵀ,   dL/dθ ≈ Bᵀ û,   J = ∂f/∂z, B = ∂f/∂θ at z*.

û = (I − M^k) u with u the exact adjoint, so ‖û − u‖ ≤ ‖M‖^k ‖u‖. Its residual is g − (I − Jᵀ) û = M^k g.
Source: Geng, Zhang, Bai, Wang and Lin (2021), arXiv 2111.05177 (the Neumann form, NPG). Departure: the series is
summed for the cotangent scaled to unit norm per sample, so that small ones keep their digits in a half-precision f.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchdeq._modes import join_dual, refuse_transforms, split_dual
from torchdeq._state import Layout, Map
from torchdeq.grad.adjoint import solve_adjoint
from torchdeq.grad.base import GradMethod, OnBackward
from torchdeq.grad.ift import ADJOINT_REMEDY
from torchdeq.grad.inverse import vjp_of
from torchdeq.grad.lift import first_order_only
from torchdeq.solution import Reporter
from torchdeq.solver.base import layout_of_map
from torchdeq.solver.fp_iter import SimpleFixedPointIteration


@dataclass(frozen=True, kw_only=True, repr=False)
class NeumannPhantom(GradMethod):
    """k terms of the damped Neumann series at the solved state. First derivatives only.

    At a fixed point it is the gradient of `PhantomGrad(steps=k, tau=τ)`: exact but for a bias, ‖û − u‖ ≤ ‖M‖^k ‖u‖.
    Memory: one graph of f, where the unrolled form has k. Cost: one tracked call of f; in a backward pass k products
    with Jᵀ and one with Bᵀ. The last of the k goes to the residual ‖g − (I − Jᵀ) û‖ / ‖g‖, which `on_backward` gets.
    No tolerance is asked of it: `Solution.tol` is inf, and only a sample that is not finite counts as not converged.

    Arguments:
        terms: k, at least 1; 1 with τ = 1 is JFB.
        tau: the damping τ in (0, 2). On a strong contraction 1 is best; 0.5 to 0.7 helps where the spectrum
            of J reaches below −1.

    Raises:
        ValueError: a value is out of range.
        RuntimeError: when it is differentiated twice, in forward mode, or by a transform of torch.func.

    Example:
        >>> import torch
        >>> a = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        >>> z, = NeumannPhantom(terms=3).attach(lambda z: a * z + 1, torch.full((1, 1), 2.0, dtype=torch.float64))
        >>> z.sum().backward()
        >>> a.grad.item()  # B û with B = z* = 2 and û = 1 + 1/2 + 1/4; the exact one is 4
        3.5
    """

    terms: int = 5
    tau: float = 1.0

    def __post_init__(self) -> None:
        self.require(
            isinstance(self.terms, int) and not isinstance(self.terms, bool) and self.terms >= 1,
            f"terms counts those of the series and must be an integer of at least 1, got {self.terms!r}",
        )
        self.require(0 < self.tau < 2, f"the damping tau must lie in (0, 2), got {self.tau!r}")

    def attach(self, f: Map, z: Tensor, *, on_backward: OnBackward | None = None) -> list[Tensor]:
        """See `GradMethod.attach`. Returns [f(z)]."""
        refuse_transforms(lambda: repr(self))
        if not torch.is_grad_enabled():
            return [f(z)]
        report = on_backward or Reporter(ADJOINT_REMEDY)
        z = z.detach().requires_grad_()
        fz = f(z)
        if not fz.requires_grad:
            return [fz]
        layout = layout_of_map(f)
        # The last pass through the graph leaves Jᵀû on our private z, which nobody wants.
        z.register_post_accumulate_grad_hook(_drop_grad)

        def series(g: Tensor) -> Tensor:
            primal, tangent = split_dual(g)
            u = self._series(primal, fz, z, layout, report)
            if tangent is not None:  # the series is linear in g
                u = join_dual(u, self._series(tangent, fz, z, layout, None))
            return first_order_only(u, g, fz, self._too_often())

        out: Tensor = _Series.apply(fz, series)
        return [out]

    def _series(
        self, g: Tensor, fz: Tensor, z: Tensor, layout: Layout | None, report: OnBackward | None
    ) -> Tensor:
        """û (B, D), from the graph of fz = f(z): k − 1 steps of u ← M u + τ g from τ g, the first term."""
        product, tau = vjp_of(fz, z), self.tau

        def damped(u: Tensor) -> Tensor:
            return product(u) if tau == 1 else u.lerp(product(u), tau)

        counted = SimpleFixedPointIteration(max_iter=self.terms, tol=math.inf, return_final=True)
        with torch.no_grad():
            u, solution = solve_adjoint(damped, tau * g, counted, layout)
        if report is not None:
            # That was (I − M) u = τ g, τ times the adjoint system; relative to its right-hand side, the residual is
            # the same, and the solution for the unit cotangent is τ times as large.
            report(dataclasses.replace(solution, z=tau * solution.z))
        return u

    def _too_often(self) -> str:
        return (
            f"second derivatives were asked of {self!r}, which gives first derivatives only: its series is not "
            f"differentiable. Use IFT(order=2), which is exact, or PhantomGrad(steps={self.terms}, tau={self.tau}), "
            f"whose steps can be differentiated again; or drop create_graph=True, if it was not meant."
        )


class _Series(torch.autograd.Function):
    """The identity on f(z*), whose backward pass turns the cotangent g into û. Each call has its own."""

    @staticmethod
    def forward(ctx: Any, fz: Tensor, series: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.series = series
        return fz.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.series(grads[0]), None


def _drop_grad(z: Tensor) -> None:
    z.grad = None
