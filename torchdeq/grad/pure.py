"""The derivatives of a fixed point of a pure map, of any order and under every transform of torch.func.

    z* = f(z*, θ),   J = ∂f/∂z and B = ∂f/∂θ at (z*, θ)

    solve      z* = fix(θ)                 jvp  ż = tangent(B θ̇)         vjp  Bᵀ u,  u = adjoint(g)
    adjoint    u = Jᵀ u + g                jvp  adjoint(ġ + dJᵀ u)        vjp  v = tangent(w),  and ∇⟨u, J v⟩
    tangent    v = J v + t                 jvp  tangent(ṫ + dJ v)         vjp  u = adjoint(w),  and ∇⟨u, J v⟩

Each of the three is an autograd Function, and the derivatives of each are the other two. Their products with f's
derivatives are made by differentiating f, so there is no end to the order. What is saved for a derivative is the
output: in a double backward it comes back attached to its own graph.

The solves themselves, and what becomes of them under vmap, are in `torchdeq.grad.system`.

Sources: Christianson (1994), doi 10.1080/10556789408805572, for the adjoint fixed point; Blondel et al. (2022), arXiv
2105.15183, for implicit differentiation that composes with transforms.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchdeq._modes import in_dual_level, in_transform, refuse_old_vmap
from torchdeq._replay import AutocastState
from torchdeq.grad.system import System

Grads = tuple[Tensor | None, ...]

_PER_SAMPLE = ("abs_residual", "rel_residual", "status", "nstep")
_TRACES = ("abs_trace", "rel_trace")
_FIGURES = (*_PER_SAMPLE, *_TRACES)


def solved(system: System, z0: Tensor, theta: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """z*, (B, D), with its derivatives; and the figures of its Solution, mapped as z* is, if they are wanted."""
    out = _Solve.apply(system, z0, *theta)
    return (out[0], dict(zip(_FIGURES, out[1:], strict=True))) if isinstance(out, tuple) else (out, {})


# The three Functions ------------------------------------------------------------------------------------


def _forward_mode(rule: Callable[..., Any]) -> Callable[..., Any]:
    """A jvp that forward-mode differentiation around it can see into.

    Torch turns forward mode off inside a jvp at every level of torch.func, not at that of the jvp alone, and so loses
    outer tangents without a word (jvp of jvp would be 0). Here it is on, and only the inner tangents are taken off.
    """

    @functools.wraps(rule)
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        with forward_ad._set_fwd_grad_enabled(True):
            return rule(ctx, tangents, [_primal(t) for t in _saved(ctx)])

    return jvp


def _primal(t: Tensor) -> Tensor:
    if not (t.is_floating_point() or t.is_complex()):
        return t
    primal: Tensor = forward_ad.unpack_dual(t).primal
    return primal


class _Solve(torch.autograd.Function):
    """z* = fix(θ), and the figures of its Solution if they are wanted."""

    @staticmethod
    def forward(system: System, z0: Tensor, *theta: Tensor) -> Any:
        solution = system.solve(z0, theta)
        if system.account is None:
            return solution.z
        return solution.z, *(getattr(solution, name).clone() for name in _FIGURES)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        system, _, *theta = inputs
        z, *figures = output if isinstance(output, tuple) else (output,)
        ctx.mark_non_differentiable(*figures)
        _remember(ctx, system, z, *theta)
        ctx.figures = len(figures)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        refuse_old_vmap()
        g, (z, *theta) = grads[0], _saved(ctx)
        if g is None:
            return (None,) * (2 + len(theta))
        wants = ctx.needs_input_grad[2:]
        if not (torch.is_grad_enabled() or in_transform() or in_dual_level()):
            return None, None, *_first_order(ctx.system, g, z, theta, wants)
        u = _Adjoint.apply(ctx.system, g, z, *theta)
        f = _Partial(ctx.system, z, theta, wants, state=False)
        return None, None, *f.spread(pull(f, f.inputs, u))

    @staticmethod
    @_forward_mode
    def jvp(ctx: Any, tangents: Sequence[Tensor | None], saved: list[Tensor]) -> Any:
        z, *theta = saved
        f = _Partial(ctx.system, z, theta, [t is not None for t in tangents[2:]], state=False)
        directions = [t for t in tangents[2:] if t is not None]
        if directions:
            v = _Tangent.apply(ctx.system, push(f, f.inputs, directions, z), z, *theta)
        else:
            v = torch.zeros_like(z)
        return (v, *[None] * ctx.figures) if ctx.figures else v

    @staticmethod
    def vmap(info: Any, in_dims: Any, system: System, z0: Tensor, *theta: Tensor) -> Any:
        system, (z0,) = _folded(info, in_dims, system, (z0,))
        out = _Solve.apply(system, z0, *theta)
        count = info.batch_size
        if not isinstance(out, tuple):
            return _unfolded(out, count), 0
        z, *figures = out
        rows, traces = figures[: len(_PER_SAMPLE)], figures[len(_PER_SAMPLE) :]
        figures = [*(_unfolded(t, count) for t in rows), *(_unfolded(t, count, dim=1) for t in traces)]
        return (_unfolded(z, count), *figures), (0, *[0] * len(rows), *[1] * len(traces))


class _Adjoint(torch.autograd.Function):
    """u = Jᵀ u + g at (z, θ)."""

    @staticmethod
    def forward(system: System, g: Tensor, z: Tensor, *theta: Tensor) -> Tensor:
        return system.solve_linear(g, z, theta, transposed=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        system, _, z, *theta = inputs
        _remember(ctx, system, output, z, *theta)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        refuse_old_vmap()
        w, (u, z, *theta) = grads[0], _saved(ctx)
        if w is None:
            return (None,) * (3 + len(theta))
        v = _Tangent.apply(ctx.system, w, z, *theta)
        return None, v, *_second_order(ctx.system, u, v, z, theta, ctx.needs_input_grad[2:])

    @staticmethod
    @_forward_mode
    def jvp(ctx: Any, tangents: Sequence[Tensor | None], saved: list[Tensor]) -> Any:
        dg, (u, z, *theta) = tangents[1], saved
        f = _Partial(ctx.system, z, theta, [t is not None for t in tangents[3:]], state=True)
        directions = [t for t in tangents[3:] if t is not None]
        if directions or tangents[2] is not None:
            directions.insert(0, torch.zeros_like(z) if tangents[2] is None else tangents[2])
            # The Hessian of ⟨u, f⟩ is symmetric, so this is the derivative of Jᵀu along the directions.
            (moved,) = pull(lambda z: pull(f, (z, *f.inputs[1:]), u), (z,), directions)
            dg = moved if dg is None else dg + moved
        return torch.zeros_like(u) if dg is None else _Adjoint.apply(ctx.system, dg, z, *theta)

    @staticmethod
    def vmap(info: Any, in_dims: Any, system: System, g: Tensor, z: Tensor, *theta: Tensor) -> Any:
        system, (g, z) = _folded(info, in_dims, system, (g, z))
        return _unfolded(_Adjoint.apply(system, g, z, *theta), info.batch_size), 0


class _Tangent(torch.autograd.Function):
    """v = J v + t at (z, θ)."""

    @staticmethod
    def forward(system: System, t: Tensor, z: Tensor, *theta: Tensor) -> Tensor:
        return system.solve_linear(t, z, theta, transposed=False)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        system, _, z, *theta = inputs
        _remember(ctx, system, output, z, *theta)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        refuse_old_vmap()
        w, (v, z, *theta) = grads[0], _saved(ctx)
        if w is None:
            return (None,) * (3 + len(theta))
        u = _Adjoint.apply(ctx.system, w, z, *theta)
        return None, u, *_second_order(ctx.system, u, v, z, theta, ctx.needs_input_grad[2:])

    @staticmethod
    @_forward_mode
    def jvp(ctx: Any, tangents: Sequence[Tensor | None], saved: list[Tensor]) -> Any:
        dt, (v, z, *theta) = tangents[1], saved
        f = _Partial(ctx.system, z, theta, [t is not None for t in tangents[3:]], state=True)
        directions = [t for t in tangents[3:] if t is not None]
        if directions or tangents[2] is not None:
            directions.insert(0, torch.zeros_like(z) if tangents[2] is None else tangents[2])

            def along(z: Tensor, *theta: Tensor) -> Tensor:
                return push(lambda z: f(z, *theta), (z,), (v,), z)

            moved = push(along, f.inputs, directions, z)
            dt = moved if dt is None else dt + moved
        return torch.zeros_like(v) if dt is None else _Tangent.apply(ctx.system, dt, z, *theta)

    @staticmethod
    def vmap(info: Any, in_dims: Any, system: System, t: Tensor, z: Tensor, *theta: Tensor) -> Any:
        system, (t, z) = _folded(info, in_dims, system, (t, z))
        return _unfolded(_Tangent.apply(system, t, z, *theta), info.batch_size), 0


def _remember(ctx: Any, system: System, *tensors: Tensor) -> None:
    ctx.system = system
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _saved(ctx: Any) -> tuple[Tensor, ...]:
    """What `_remember` saved, without the wrappers of transforms that have ended since.

    Other operations take those off; torch.func.vjp fails over them.
    """
    return tuple(_alive(t) for t in ctx.saved_tensors)


def _alive(t: Tensor) -> Tensor:
    while (inner := torch._C._functorch.unwrap_if_dead(t)) is not t:
        t = inner
    return t


def _folded(
    info: Any, in_dims: Any, system: System, states: tuple[Tensor, ...]
) -> tuple[System, tuple[Tensor, ...]]:
    """The mapped dimension of the states (B, D) as part of their batch, and the system for it."""
    count = info.batch_size
    dims = in_dims[1 : 1 + len(states)]
    rows = (
        t.expand(count, *t.shape) if dim is None else t.movedim(dim, 0)
        for t, dim in zip(states, dims, strict=True)
    )
    system = system.mapped(count, tuple(in_dims[1 + len(states) :]), info.randomness)
    return system, tuple(t.flatten(0, 1).contiguous() for t in rows)


def _unfolded(t: Tensor, count: int, dim: int = 0) -> Tensor:
    return t.unflatten(dim, (count, t.shape[dim] // count))


# Derivatives of f ---------------------------------------------------------------------------------------


class _Partial:
    """f as a function of those of its arguments that are differentiated: z if `state`, and θ where `wants` says so."""

    def __init__(
        self, system: System, z: Tensor, theta: Sequence[Tensor], wants: Sequence[bool], *, state: bool
    ):
        self.system, self.z, self.theta, self.wants, self.state = system, z, theta, wants, state
        self.inputs = (*([z] if state else []), *(t for t, want in zip(theta, wants, strict=True) if want))

    def __call__(self, *inputs: Tensor) -> Tensor:
        given = iter(inputs)
        z = next(given) if self.state else self.z
        return self.system(
            z, *(next(given) if want else t for t, want in zip(self.theta, self.wants, strict=True))
        )

    def spread(self, grads: Grads) -> Grads:
        """One gradient per argument, None where none is wanted."""
        given = iter(grads)
        return tuple(next(given) if want else None for want in self.wants)


def pull(f: Callable[..., Any], inputs: Sequence[Tensor], g: Any) -> tuple[Tensor, ...]:
    """The products of the transposed Jacobians of f with g: one per input. Differentiable in all.

    Arguments:
        f: of the inputs; returns a tensor or a tuple of some.
        g: the cotangents of what f returns, alike.
    """
    if not inputs:
        return ()
    if in_transform():
        out, vjp, *_ = torch.func.vjp(f, *inputs)
        return tuple(vjp(tuple(g) if isinstance(out, tuple) else g))
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: z may itself depend on θ, and what is wanted here are partial derivatives.
        inputs = [t.view_as(t) for t in inputs]
        inputs = [t if t.requires_grad else t.requires_grad_() for t in inputs]
        out = f(*inputs)
    pairs = zip(out, g, strict=True) if isinstance(out, tuple) else [(out, g)]
    tracked = [(o, h) for o, h in pairs if o.requires_grad]
    if not tracked:
        return tuple(torch.zeros_like(t) for t in inputs)
    return torch.autograd.grad(
        [o for o, _ in tracked],
        inputs,
        [h for _, h in tracked],
        create_graph=again,
        allow_unused=True,
        materialize_grads=True,
    )


def push(
    f: Callable[..., Tensor], inputs: Sequence[Tensor], tangents: Sequence[Tensor], like: Tensor
) -> Tensor:
    """The Jacobian of f times the tangents, by transposing its transpose: forward mode does not nest in a jvp.

    Arguments:
        like: of the shape and dtype of what f returns.
    """
    (out,) = pull(lambda w: pull(f, inputs, w), (torch.zeros_like(like),), tuple(tangents))
    return out


def _first_order(
    system: System, g: Tensor, z: Tensor, theta: Sequence[Tensor], wants: Sequence[bool]
) -> Grads:
    """Bᵀ u with u = Jᵀ u + g, from one graph of f; nothing is differentiated again."""
    with AutocastState.capture(z.device).off():
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            theta = [t.detach().requires_grad_(want) for t, want in zip(theta, wants, strict=True)]
            fz = system(z, *theta)
        u = system.solve_traced(g, z, fz, transposed=True)
        inputs = [t for t in theta if t.requires_grad]
        if not (inputs and fz.requires_grad):
            return (None,) * len(theta)
        given = iter(torch.autograd.grad(fz, inputs, u, allow_unused=True))
    return tuple(next(given) if want else None for want in wants)


def _second_order(
    system: System, u: Tensor, v: Tensor, z: Tensor, theta: Sequence[Tensor], wants: Sequence[bool]
) -> Grads:
    """The gradient of ⟨u, J(z, θ) v⟩ by z and θ, where it is wanted."""
    f = _Partial(system, z, theta, wants[1:], state=True)
    if not any(wants):
        return (None,) * len(wants)
    grad, *grads = pull(lambda *p: pull(lambda z: f(z, *p[1:]), p[:1], u), f.inputs, (v,))
    return grad, *f.spread(tuple(grads))
