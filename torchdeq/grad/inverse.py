"""S = (I − J)⁻¹ at a solved state, frozen: what a derivative of a fixed point applies to cotangents and tangents.

    u = Sᵀ w   solves   u = Jᵀ u + w,          v = S w   solves   v = J v + w.

S is linear, so the derivative of either is the other; the derivative of S itself is not taken. Who applies S to
something that is not zero and differentiates the result again must make up for that, as `torchdeq.grad.lift` does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchdeq._modes import join_dual, split_dual, without_tangents
from torchdeq._replay import AutocastState, RandomState
from torchdeq._state import FlatMap, Layout, Map, per_sample
from torchdeq.grad.adjoint import solve_adjoint
from torchdeq.grad.base import OnBackward
from torchdeq.solver.base import SolverLoop
from torchdeq.solver.products import Product
from torchdeq.solver.split_system import SplitSystems


@dataclass(frozen=True, eq=False)
class Inverse:
    """S at one solved state of f. Holds no graph: each solve evaluates f once more and drops what it built.

    Arguments:
        f: the map, (B, D) -> (B, D).
        solver: of the linear systems.
        layout: which leaves the D numbers belong to; None if that is not known.
        report: called with the `Solution` of each solve.
        amp, random: the states under which f was evaluated, for evaluating it again.
        clip: the largest ‖Sᵀ w‖ / ‖w‖ per sample; longer ones are shortened to it. None: no bound.
    """

    f: Map
    solver: SolverLoop | SplitSystems
    layout: Layout | None
    report: OnBackward
    amp: AutocastState
    random: RandomState
    clip: float | None = None

    def __call__(
        self,
        w: Tensor,
        z: Tensor,
        fz: Tensor,
        *,
        transposed: bool,
        image: bool = False,
        scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x = S w, or Sᵀ w, as numbers without a graph; and J x, or Jᵀ x, if `image` asks for it.

        Arguments:
            w: (B, D).
            z: the solved state, (B, D).
            fz: f(z) as it was, (B, D), to which the new evaluation is compared.
            transposed: whether to apply Sᵀ.
            image: whether the product with J or Jᵀ is wanted too, which costs one.
            scale: (B,), see `solve_adjoint`.

        Raises:
            RuntimeError: f gave another value than before.
        """
        with without_tangents():
            # A backward pass may be called for in inference mode, where nothing has a graph.
            with torch.inference_mode(False), torch.enable_grad(), self.amp.on(), self.random.again():
                at = z.detach().requires_grad_()
                again = self.f(at)
            self._check_same(fz.detach(), again.detach())
            product = vjp_of(again, at) if transposed else jvp_of(again, at)
            flat = getattr(self.f, "__self__", None)
            if transposed and isinstance(flat, FlatMap):
                product = Product(product, flat, z.detach(), self.amp)
            with torch.no_grad():
                clip = self.clip if transposed else None
                solver = self.solver
                if isinstance(solver, SplitSystems):
                    with self.amp.on():  # beside a kink, σ′ of another f would be another
                        solver = solver.at(z.detach(), transposed=transposed)
                x, solution = solve_adjoint(product, w.detach(), solver, self.layout, scale=scale, clip=clip)
                kx = product(x) if image else None
        self.report(solution)
        return x, kx

    def _check_same(self, fz: Tensor, again: Tensor) -> None:
        """Raise if f gave another value when it was rebuilt: its adjoint would be that of another map."""
        dtypes = [fz.dtype, *(() if self.layout is None else self.layout.dtypes)]
        if self.amp.enabled:
            dtypes.append(self.amp.dtype)
        # One map evaluated twice gives the same up to the order of its sums, which a GPU does not keep.
        allowed = max(1e-5, *(2 * torch.finfo(dtype).eps for dtype in dtypes)) * per_sample(fz)
        if bool((per_sample(again - fz) > allowed).any()):
            raise RuntimeError(
                "f gave another value in the backward pass than in the forward pass at the same state, so the adjoint "
                "would be that of another map. Either something f closes over has changed in between (a loop "
                "variable: bind it with a default argument; weights updated in place: call backward first), or f is "
                "random in a way that its generator's state does not repeat. IFT(hook=True) keeps the forward's "
                "graph instead of rebuilding it."
            )


def vjp_of(fz: Tensor, z: Tensor) -> Map:
    """u -> Jᵀ u, from the graph of fz = f(z). Differentiable in u, where grad mode is on."""

    def vjp(u: Tensor) -> Tensor:
        if not fz.requires_grad:  # f does not depend on z
            return torch.zeros_like(u)
        again = torch.is_grad_enabled() and u.requires_grad
        (ju,) = torch.autograd.grad(fz, z, u, retain_graph=True, create_graph=again, allow_unused=True)
        return torch.zeros_like(u) if ju is None else ju

    return vjp


def jvp_of(fz: Tensor, z: Tensor) -> Map:
    """v -> J v, from the graph of fz = f(z), by differentiating u -> Jᵀ u, which is linear.

    Raises:
        RuntimeError: when a product is made and the backward pass of f is not differentiable.
    """
    if not fz.requires_grad:
        return torch.zeros_like
    with torch.enable_grad():
        u = _probe(fz).requires_grad_()
        (ju,) = torch.autograd.grad(fz, z, u, create_graph=True, allow_unused=True)
    if ju is None:
        return torch.zeros_like

    def jvp(v: Tensor) -> Tensor:
        again, jv = torch.is_grad_enabled() and v.requires_grad, None
        try:
            if ju.requires_grad:
                (jv,) = torch.autograd.grad(
                    ju, u, v, retain_graph=True, create_graph=again, allow_unused=True
                )
        except RuntimeError as error:
            error.add_note(_NOT_TWICE)
            raise
        if jv is None:
            if bool(ju.detach().any()):  # Jᵀu is not zero and yet does not depend on u
                raise RuntimeError(_NOT_TWICE)
            return torch.zeros_like(v)
        return jv

    return jvp


def _probe(z: Tensor) -> Tensor:
    """A vector of the shape of z that no map of interest sends to zero, unless it is zero. Always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(z.shape, generator=generator, dtype=torch.float64).to(z)


_NOT_TWICE = (
    "A tangent or a second derivative of a fixed point needs products with J, which are made by differentiating "
    "products with Jᵀ. So the backward pass of f must itself be differentiable: write custom autograd functions "
    "without once_differentiable, and their backward in operations that autograd records. Of torch's own operations "
    "the fused kernels of scaled_dot_product_attention lack it: evaluate the attention in f within `with "
    "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):`."
)


class Applied(torch.autograd.Function):
    """x = S w or Sᵀ w, differentiable in w to any order; and o = w − x.

    The value of o is −J x or −Jᵀ x, which is the same up to the residual of the solve: what it must cancel elsewhere,
    to rounding, is such a product.
    """

    @staticmethod
    def forward(
        ctx: Any,
        w: Tensor,
        z: Tensor,
        fz: Tensor,
        inverse: Inverse,
        transposed: bool,
        quiet: bool,
        scale: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(z, fz)
        ctx.set_materialize_grads(False)
        ctx.inverse, ctx.transposed = inverse, transposed
        if quiet:
            return torch.zeros_like(w), torch.zeros_like(w)
        x, kx = inverse(w, z, fz, transposed=transposed, image=True, scale=scale)
        assert kx is not None
        return x, -kx

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """x = S w: h ↦ Sᵀ h, and o = w − x."""
        h_x, h_o = grads
        if h_x is None and h_o is None:
            return (None,) * 7
        z, fz = ctx.saved_tensors
        h: Any = h_x if h_o is None else -h_o if h_x is None else h_x - h_o
        # Often x and w − x go the same way on to where these two meet and all but cancel. Then S h is a small
        # correction of h_o, and need be no more exact than that.
        scale = None if h_o is None else per_sample(h_o.detach())

        def back(h: Tensor) -> Tensor:
            return applied(h, z, fz, ctx.inverse, transposed=not ctx.transposed, scale=scale)[0]

        x = on_duals(back, h)
        return (x if h_o is None else x + h_o), None, None, None, None, None, None


def applied(
    w: Tensor,
    z: Tensor,
    fz: Tensor,
    inverse: Inverse,
    *,
    transposed: bool,
    quiet: bool = False,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x and o of `Applied`.

    Arguments:
        w, z, fz, transposed, scale: see `Inverse`.
        quiet: w is known to be nothing but rounding. Then its image is zero, at no cost.
    """
    x, o = Applied.apply(w, z, fz, inverse, transposed, quiet, scale)
    return x, o


def on_duals(linear: Callable[[Tensor], Tensor], w: Tensor) -> Tensor:
    """linear(w), where w may be dual and `linear` knows nothing of duals."""
    primal, tangent = split_dual(w)
    if tangent is None:
        return linear(primal)
    return join_dual(linear(primal), linear(tangent) if is_number(tangent) else tangent)


def is_number(tangent: Tensor) -> bool:
    """Whether a tangent is known: one that is a derivative too many is NaN throughout, with nothing to solve for."""
    return not bool(tangent.detach().isnan().all())
