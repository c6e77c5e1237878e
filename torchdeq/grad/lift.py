"""A lift: it gives a solved state one more derivative.

    A₀ = z*,   A_{i+1} = A_i + S (f(A_i) − A_i),   S = (I − J)⁻¹ frozen at z*.

Each A_i has the value z*, and is exact to its i-th derivative. For where θ moves by δ, the error of A_{i+1} is that of
A_i, of order δ^{i+1}, times I − S (I − J(δ)), of order δ. The derivative of S never appears, because S multiplies
f(A_i) − A_i, which is zero.

In the backward pass a lift gets the cotangent w of A_{i+1}, and hands u = Sᵀ w to f(A_i), w − u to A_i. From f(A_i)
comes Jᵀ u to A_i as well, and these add up to nothing: a first derivative costs one solve, however many lifts there
are. Only the derivative of this nothing counts, when it is differentiated again. So a lift has two outputs of the same
value, one for f and one for the next lift. Where their cotangents cancel to rounding, w is quiet: it is not solved for.

A tangent v = J v + t, in forward mode, is a fixed point too, with the same S, and is lifted in the same way.

The derivative after the last exact one would be a number like any other, so there must be an error instead. What counts
the derivatives is a `_Gate`: a zero in the graph that is differentiated with the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchdeq._modes import in_dual_level, join_dual, one_cotangent, split_dual
from torchdeq.grad.inverse import Inverse, applied, is_number


@dataclass(frozen=True, eq=False, kw_only=True)
class Lift:
    """One lift, and its backward pass.

    Arguments:
        inverse: S.
        order: how often the last lift's output may be differentiated in reverse mode.
        value: what the outputs hold, (B, D).
        last: whether this lift is the last. It has a single output then.
        tangent: whether it is a tangent that is lifted.
    """

    inverse: Inverse
    order: int
    value: Tensor
    last: bool = False
    tangent: bool = False

    def __call__(self, fa: Tensor, a: Tensor | None, z: Tensor, fz: Tensor) -> Any:
        """A_{i+1} from fa = f(A_i) and a = A_i, None for A₀: the pair of outputs, or the last one.

        Arguments:
            fa, a: (B, D).
            z, fz: the solved state and f of it, (B, D), where S is.
        """
        return _Lifted.apply(fa, a, z, fz, self)

    def pull(
        self, w: Tensor, w_o: Tensor | None, fa: Tensor, z: Tensor, fz: Tensor, *, first: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Cotangents of f(A_i) and of A_i from those of A_{i+1}: w of them all, and w_o of them by the next lift.

        The first lift has an A₀ that wants none.
        """
        (primal, tangent), (part, part_t) = split_dual(w), (None, None) if w_o is None else split_dual(w_o)
        if self.inverse.clip is not None:  # nothing is lifted then
            if tangent is not None:
                raise RuntimeError(clipped_once())
            with torch.no_grad():
                u, _ = self.inverse(primal, z, fz, transposed=True)
            return first_order_only(u, primal, fa, clipped_once()), None
        quiet = _is_rounding(primal, part)
        if not torch.is_grad_enabled() and not in_dual_level():
            if quiet:
                return None, None
            u, ju = self.inverse(w, z, fz, transposed=True, image=not first)
            return u, None if ju is None else -ju
        u, o = applied(primal, z, fz, self.inverse, transposed=True, quiet=quiet)
        if tangent is not None and not is_number(tangent):
            u, o = join_dual(u, tangent), join_dual(o, tangent)
        elif tangent is not None:
            still = _is_rounding(tangent, part_t)
            u_t, o_t = applied(tangent, z, fz, self.inverse, transposed=True, quiet=still)
            u, o = join_dual(u, u_t), join_dual(o, o_t)
        if self.last:
            u = u + _gate(w.sum(dim=1, keepdim=True), fa, self.order - 1, self)
        return u, None if first else o


class _Lifted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fa: Tensor, a: Tensor | None, z: Tensor, fz: Tensor, lift: Lift) -> Any:
        ctx.save_for_backward(fa, z, fz)
        ctx.set_materialize_grads(False)
        ctx.lift, ctx.first = lift, a is None
        return lift.value.clone() if lift.last else (lift.value.clone(), lift.value.clone())

    @staticmethod
    def backward(ctx: Any, w: Tensor | None, w_o: Tensor | None = None) -> Any:
        if w is None and w_o is None:
            return (None,) * 5
        both = w if w_o is None else w_o if w is None else w + w_o
        with one_cotangent():
            return *ctx.lift.pull(both, w_o, *ctx.saved_tensors, first=ctx.first), None, None, None


class _Gate(torch.autograd.Function):
    """G_k(f(A)) = 0, a zero per sample whose derivatives are zeros too: G_k' = G_{k−1}. That of G_0 is an error.

    It is a factor of a term in the graph. So autograd itself sees to it that just the derivatives of order above k meet
    the derivative of G_0, by whatever path.
    """

    @staticmethod
    def forward(ctx: Any, fa: Tensor, k: int, lift: Lift) -> Tensor:
        ctx.save_for_backward(fa)
        ctx.k, ctx.lift = k, lift
        return fa.new_zeros(fa.shape[0], 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if ctx.k == 0:
            raise RuntimeError(too_often(ctx.lift.order))
        (fa,) = ctx.saved_tensors
        return _gate(grads[0], fa, ctx.k - 1, ctx.lift).expand(fa.shape), None, None


def _gate(factor: Tensor, fa: Tensor, k: int, lift: Lift) -> Tensor:
    """factor · G_k(f(A)), (B, 1)."""
    zero: Tensor = factor * _Gate.apply(split_dual(fa)[0], k, lift)
    if k == 0 and lift.tangent and in_dual_level():
        # The tangent of what this becomes is one derivative of the tangent too many. Nobody may want it.
        zero = join_dual(split_dual(zero)[0], torch.full_like(zero, torch.nan))
    return zero


def _is_rounding(w: Tensor, part: Tensor | None) -> bool:
    """Whether w, a sum of which `part` is one, is what rounding has left of it, in every sample."""
    if part is None:
        return False
    if w.numel() == 0:
        return True
    # The sum of a few hundred terms rounds to some ε of its largest; a maximum neither overflows nor vanishes.
    limit = 64 * torch.finfo(w.dtype).eps * part.detach().abs().amax(dim=1)
    return bool((w.detach().abs().amax(dim=1) <= limit).all())


def too_often(order: int) -> str:
    """What to do about a derivative of higher order than was prepared for."""
    gives = "first derivatives" if order == 1 else f"derivatives up to order {order}"
    return (
        f"{'second' if order == 1 else 'higher'} derivatives were asked of IFT(order={order}), which gives {gives} "
        f"only. Use IFT(order={order + 1}), or torchdeq.fixed_point, whose derivatives are exact to any order; or drop "
        f"create_graph=True, if it was not meant."
    )


def clipped_once() -> str:
    """What to do about a derivative of a gradient that is clipped."""
    return (
        "a tangent or a second derivative was asked of IFT(clip=...), which clips first derivatives in reverse mode "
        "and gives no others. Use IFT(clip=None), or order=2 without clip; or drop create_graph=True, if not meant."
    )


def first_order_only(u: Tensor, g: Tensor, fz: Tensor, message: str = "") -> Tensor:
    """u, tied to what it depends on, so that differentiating it is an error rather than a wrong number."""
    if not torch.is_grad_enabled():
        return u
    tied: Tensor = _FirstOrderOnly.apply(u, g, fz, message or too_often(1))
    return tied


class _FirstOrderOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, g: Tensor, fz: Tensor, message: str) -> Tensor:
        ctx.message = message
        return u.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(ctx.message)
