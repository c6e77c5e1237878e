"""The derivatives of a fixed point of a pure map, of any order and under every transform of torch.func.

    z* = f(z*, θ),   J = ∂f/∂z and B = ∂f/∂θ at (z*, θ)

    solve      z* = fix(θ)                 jvp  ż = tangent(B θ̇)         vjp  Bᵀ u,  u = adjoint(g)
    adjoint    u = Jᵀ u + g                jvp  adjoint(ġ + dJᵀ u)        vjp  v = tangent(w),  and ∇⟨u, J v⟩
    tangent    v = J v + t                 jvp  tangent(ṫ + dJ v)         vjp  u = adjoint(w),  and ∇⟨u, J v⟩

Each of the three is an autograd Function, and the derivatives of each are the other two. Their products with f's
derivatives are made by differentiating f, so there is no end to the order. What is saved for a derivative is the
output: in a double backward it comes back attached to its own graph.

Under vmap the solvers stay outside: the mapped dimension is folded into the batch of the solver, and only f is mapped.
So each mapped instance has its own coefficients and its own stop test.

Sources: Christianson (1994), doi 10.1080/10556789408805572, for the adjoint fixed point; Blondel et al. (2022), arXiv
2105.15183, for implicit differentiation that composes with transforms.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import (
    retrieve_current_functorch_interpreter,
    temporarily_pop_interpreter_stack,
)
from torch.autograd import forward_ad

from torchdeq._modes import in_dual_level, in_transform
from torchdeq._replay import AutocastState, RandomState
from torchdeq._state import Layout, Map
from torchdeq.grad.adjoint import solve_adjoint
from torchdeq.grad.base import OnBackward
from torchdeq.grad.inverse import jvp_of, vjp_of
from torchdeq.solution import Reporter, Solution
from torchdeq.solver.base import SolverLoop
from torchdeq.solver.bicgstab import BiCGSTAB
from torchdeq.solver.cg import CG
from torchdeq.solver.gmres import GMRES
from torchdeq.solver.maps import root_of_scale, size_of

Image = Callable[..., Tensor]  # (z (B, D), *θ) -> (B, D)
Grads = tuple[Tensor | None, ...]


@dataclass(eq=False)
class Noise:
    """The random numbers of f: those of its first evaluation, in each.

    Arguments:
        state: that of the generators before it.
    """

    state: RandomState
    drawn: bool = False

    def watch(self) -> None:
        """Called after the first evaluation."""
        self.drawn = not self.state.is_now()

    def __call__(self) -> AbstractContextManager[None]:
        """A context with these numbers; nothing if f draws none."""
        return self.state.again() if self.drawn else nullcontext()


@dataclass(frozen=True, eq=False)
class System:
    """f with all that its solves need: what the three Functions hand from one to the other.

    Arguments:
        image: (z (B, D), *θ) -> (B, D), θ tensors.
        layout: of the state.
        solver, adjoint: of z = f(z), and of linear systems.
        amp, noise: the states f is evaluated under.
        reports: of forward and of linear solves.
        on_backward: see `fixed_point`.
        account: where the forward Solution is left; None if nobody wants it.
        guards: whether a derivative may be wanted of what f closes over.
        maps: per vmap around it, innermost first: the number of instances and the mapped dimension of each θ.
        looks: evaluations of f that were made to see what it closes over.
        search: (z0 (B, D), *θ) -> (B, D), one instance, for a solver that does without `image`.
        apart: whether `image` is f(z) − z. All derivatives but J = I + ∂(f − z)/∂z are the same.
    """

    image: Image
    layout: Layout
    solver: SolverLoop
    adjoint: SolverLoop
    amp: AutocastState
    noise: Noise
    reports: tuple[Reporter, Reporter]
    on_backward: OnBackward | None
    account: list[Solution] | None
    guards: bool
    maps: tuple[tuple[int, tuple[int | None, ...]], ...] = ()
    looks: int = 0
    search: Image | None = None
    apart: bool = False

    def __call__(self, z: Tensor, *theta: Tensor) -> Tensor:
        """f(z, θ), or f(z, θ) − z if `apart`, (B, D), under the states of the forward pass.

        Can be differentiated and mapped.
        """
        with self.amp.on(), self.noise():
            return self.image(z, *theta)

    def mapped(self, count: int, dims: tuple[int | None, ...], randomness: str) -> System:
        """`count` instances as samples of one system; θ varies along `dims`."""
        inner, layout = self.image, self.layout
        mapped = torch.vmap(inner, in_dims=(0, *dims), randomness=randomness)

        def image(z: Tensor, *theta: Tensor) -> Tensor:
            return mapped(z.unflatten(0, (count, layout.batch)), *theta).flatten(0, 1)

        return dataclasses.replace(
            self,
            image=image,
            layout=dataclasses.replace(layout, batch=count * layout.batch),
            maps=(*self.maps, (count, dims)),
        )

    # The three solves, on plain tensors ---------------------------------------------------------------

    def solve(self, z0: Tensor, theta: Sequence[Tensor]) -> Solution:
        """z = f(z), from z0 (B, D)."""
        bound = Bound(self, [t.detach() for t in theta])
        # One system per row is a fact, not a guess that might need another look.
        together = self.layout.depth > 0
        with torch.no_grad():
            solution = self.solver.run(bound, z0, layout=self.layout, together=together)
        solution = dataclasses.replace(solution, nfe=solution.nfe + bound.looks + self.looks)
        self.reports[0](solution)
        if self.account is not None:
            self.account.append(solution)
        return solution

    def solve_linear(self, b: Tensor, z: Tensor, theta: Sequence[Tensor], *, transposed: bool) -> Tensor:
        """x = J x + b, or x = Jᵀ x + b, all (B, D)."""
        with AutocastState.capture(z.device).off():
            with torch.enable_grad():
                z = z.detach().requires_grad_()
                fz = self(z, *(t.detach() for t in theta))
            return self.solve_traced(b, z, fz, transposed=transposed)

    def solve_traced(self, b: Tensor, z: Tensor, fz: Tensor, *, transposed: bool) -> Tensor:
        """The same, from the graph of fz = f(z), or of f(z) − z."""
        product: Map = vjp_of(fz, z) if transposed else jvp_of(fz, z)
        with torch.no_grad():
            solve = self._solve_apart if self.apart else solve_adjoint
            x, solution = solve(product, b, self.adjoint, self.layout)
        if self.on_backward is not None:
            self.on_backward(solution)
        self.reports[1](solution)
        return x

    @staticmethod
    def _solve_apart(
        product: Map, b: Tensor, solver: SolverLoop, layout: Layout | None
    ) -> tuple[Tensor, Solution]:
        """x with −K x = b, from products with K = J − I or its transpose, whatever their scale.

        ρ(−K)ρ stands for the matrix, large beside the identity that a solver of x = Jx + b adds and takes off again: as
        large as keeps all digits for methods that do not mind, and of size 1 for others.
        """
        target = torch.finfo(b.dtype).eps ** -0.5 if isinstance(solver, _SCALE_FREE) else 1.0
        root = root_of_scale(size_of(product, b), target)
        x, solution = solve_adjoint(lambda v: v + root * product(root * v), root * b, solver, layout)
        return root * x, dataclasses.replace(solution, nfe=solution.nfe + 1)

    def looked_through(self, z: Tensor, theta: Sequence[Tensor]) -> System:
        """The system, after a look at whether f closes over something that a transform of torch.func has hold of.

        The Functions are called below all transforms, where that is invisible. One evaluation of f.
        """
        known = set().union(*(_map_levels(t) for t in (z, *theta)))
        with torch.set_grad_enabled(self.guards), self.amp.on(), self.noise.state.again():
            fz = self.image(z.detach().clone(), *(t.detach() for t in theta))
        if _is_tracked(fz) or not _map_levels(fz) <= known:
            raise RuntimeError(_CLOSES_OVER)
        return dataclasses.replace(self, looks=1)

    def apply(self, z0: Tensor, theta: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """z*, (B, D), with its derivatives; and the figures of its Solution, mapped as z* is, if they are wanted."""
        out = _Solve.apply(self, z0, *theta)
        return (out[0], dict(zip(_FIGURES, out[1:], strict=True))) if isinstance(out, tuple) else (out, {})


_SCALE_FREE = (GMRES, BiCGSTAB, CG)  # what they find for (sA) x = s b does not depend on s

_PER_SAMPLE = ("abs_residual", "rel_residual", "status", "nstep")
_TRACES = ("abs_trace", "rel_trace")
_FIGURES = (*_PER_SAMPLE, *_TRACES)

_CLOSES_OVER = (
    "f closes over a tensor that is being differentiated or mapped. Only what f takes as an argument is seen here, so "
    "that derivative would be lost without a word. Pass the tensor in theta: fixed_point(lambda z, w: ..., z0, w). For "
    "the parameters of a module: fixed_point(lambda z, p: torch.func.functional_call(module, p, (z,)), z0, "
    "dict(module.named_parameters())). If it is a constant, detach() it; if f differentiates within, let it use "
    "torch.func.grad. DEQ takes an f that closes over what it needs."
)


class Bound:
    """f at fixed θ, as a forward solver sees it: (B, D) -> (B, D).

    Arguments:
        system: f.
        theta: detached, and below all transforms.
    """

    def __init__(self, system: System, theta: list[Tensor]):
        self.system = system
        self.theta = theta
        self.fresh = True
        self.looks = 0  # evaluations that the solver does not know of
        #: z -> f(z) − z, if f is known by it
        self.displacement: Map | None = self.image if system.apart else None

    def __call__(self, z: Tensor) -> Tensor:
        image = self.image(z)
        return z + image if self.system.apart else image

    def image(self, z: Tensor) -> Tensor:
        """What the system calls its image."""
        inputs = [t for t in (z, *self.theta) if not t.is_inference()]
        before = [t._version for t in inputs]
        first = self._first(z) if self.fresh else None
        fz = self.system(z, *self.theta) if first is None else first
        if before != [t._version for t in inputs]:
            raise RuntimeError(
                "f changed its argument in place (an operation such as z.add_, z += … or z[…] = …). A solver keeps "
                "its iterates and evaluates f at the same theta again and again, so f must make new tensors: write "
                "z = z + … instead."
            )
        return fz

    def _first(self, z: Tensor) -> Tensor | None:
        """f(z), after a look at what f closes over. None if the solver has to evaluate f itself: it traces z."""
        self.fresh = False
        system = self.system
        with torch.set_grad_enabled(system.guards), forward_ad._set_fwd_grad_enabled(True):
            fz = system(z.detach(), *self.theta)
            if _is_tracked(fz):
                raise RuntimeError(_CLOSES_OVER)
        system.noise.watch()
        if not z.requires_grad:
            return fz
        self.looks = 1
        return None


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


# What f closes over -------------------------------------------------------------------------------------


def refuse_old_vmap() -> None:
    """Raise under the vmap inside torch.autograd, which no custom Function can follow."""
    level = torch._C._vmapmode_increment_nesting()
    torch._C._vmapmode_decrement_nesting()
    if level > 1:
        raise RuntimeError(
            "is_grads_batched=True of torch.autograd.grad and vectorize=True of torch.autograd.functional map over a "
            "fixed-point solve with an old vmap that cannot see into it. Use torch.func.jacrev, jacfwd, hessian, vmap."
        )


def _map_levels(t: Any) -> set[int]:
    """The levels of the vmaps over t."""
    functorch, levels = torch._C._functorch, set()
    while functorch.is_functorch_wrapped_tensor(t):
        if functorch.is_batchedtensor(t):
            levels.add(functorch.maybe_get_level(t))
        t = functorch.get_unwrapped(t)
    return levels


def _is_tracked(t: Tensor) -> bool:
    """Whether t has a graph or a tangent, for autograd or for any transform of torch.func around."""
    functorch = torch._C._functorch
    mapped = functorch.is_batchedtensor(t)
    if not mapped and (
        t.requires_grad or (in_dual_level() and forward_ad.unpack_dual(t).tangent is not None)
    ):
        return True
    if not in_transform():
        return False
    # Each level answers for itself only, and only while it is the innermost.
    top = retrieve_current_functorch_interpreter().level()
    own = functorch.is_functorch_wrapped_tensor(t) and functorch.maybe_get_level(t) == top
    with temporarily_pop_interpreter_stack():
        return _is_tracked(functorch.get_unwrapped(t) if own else t)
