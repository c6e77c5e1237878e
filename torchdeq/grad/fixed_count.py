"""A solve of a fixed number of evaluations: plain operations, and nothing that the host would have to read.

    z_{k+1} = step(z_k, f(z_k)),  k = 0 … N − 2;   z* = f(z_{N−1}),  which is differentiated
    u_{k+1} = step(u_k, Jᵀu_k + g),  k = 0 … M − 1;   dL/dθ = (∂f/∂θ)ᵀ u_M

with N and M the solvers' `max_iter`. There is no stop, no best iterate and no second try. So a function that holds such
a solve, a whole training step, is one graph for `torch.compile(fullgraph=True)`; and one CUDA graph.

Coefficients are those of each sample alone. Where f couples samples, which nobody looks for here, the state is to be
one sample: `batch_dims=0`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor

from torchdeq._held import modules_of
from torchdeq._replay import AutocastState
from torchdeq._state import Layout, Tree, layout_of, per_sample
from torchdeq.grad.adjoint import scales_of
from torchdeq.grad.base import GradMethod
from torchdeq.grad.fingerprint import Fingerprint
from torchdeq.grad.ift import IFT
from torchdeq.grad.jfb import JFB
from torchdeq.grad.phantom import PhantomGrad
from torchdeq.solution import Solution, Status
from torchdeq.solver.affine import AffineSolver
from torchdeq.solver.base import SolverLoop, unravel_solution
from torchdeq.solver.gmres import GMRES
from torchdeq.solver.programs import Bound, Seen, Shifted
from torchdeq.solver.watch import leaf_max, relative


def solve_fixed(
    f: Callable[[Tree], Tree], z0: Tree, solver: SolverLoop, method: GradMethod, *, batch_dims: int = 1
) -> tuple[Tree, Solution]:
    """Make `solver.max_iter` evaluations of f, and give the last its derivative.

    Arguments:
        f, z0, batch_dims: see `DEQ`.
        solver, method: those that `check_fixed` lets through.

    Returns:
        f(z) of the last state z, in the structure of z0; and the `Solution`, with the residual of z, which costs no
        evaluation. Its traces have that one row.

    Raises:
        RuntimeError: f changes its argument or its buffers in place; or gives another value in the backward pass. Seen
            where no graph is being made, and so are the errors of `FlatMap`.
    """
    layout = layout_of(z0, batch_dims)
    start = layout.ravel(z0, source="z0").detach().clone()  # the state that is returned may be this one
    amp = AutocastState.capture(start.device)
    seen = Seen(layout, amp)
    graph = _in_graph(start.device)
    map_: Any = Bound(seen, f if graph else _watched(f, layout))
    with amp.off():
        with torch.no_grad():
            z = _iterated(solver, map_, start, solver.max_iter - 1)
        fz = map_(z)
        solution = _told(solver, z, fz.detach(), map_)
        if isinstance(method, IFT):
            with amp.on():
                mark = None if graph else Fingerprint.of(fz.detach(), layout)
            out = _Implicit.apply(fz, z, lambda z, g: _adjoint(method.solver, seen, f, z, g, mark))
        else:
            (out,) = method.attach(lambda u: fz if u is z else map_(u), z)
    return layout.unravel(out), unravel_solution(solution, layout)


def _in_graph(device: torch.device) -> bool:
    """Whether a graph is being made, of torch.compile or of CUDA, in which the host can look at nothing."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return capturing or torch.compiler.is_compiling()


def _watched(f: Callable[[Tree], Tree], layout: Layout) -> Callable[[Tree], Tree]:
    """f, with a look at what its first call has changed, and at what it has returned."""
    buffers = [buffer for module in modules_of(f) for buffer in module.buffers()]
    first = True

    def call(tree: Tree) -> Tree:
        nonlocal first
        if not first:
            return f(tree)
        parts = [t for t in [*optree.tree_leaves(tree), *buffers] if not t.is_inference()]
        before = [t._version for t in parts]
        image, first = f(tree), False
        if before != [t._version for t in parts]:
            raise RuntimeError(
                "f changed its argument or a buffer in place, and a solve of a fixed count would do so at each "
                "evaluation. Return a new tensor; call eval() on modules with running statistics; or use "
                "DEQ(compile=False), which changes buffers once for a solve."
            )
        layout.ravel(image)
        return image

    return call


def check_fixed(solver: SolverLoop, method: GradMethod) -> None:
    """Raise a TypeError unless a solver and a gradient method make the same operations whatever the numbers are."""
    if not solver.fixed_shape or solver.compact:
        raise TypeError(
            f"{solver!r} does not make the same operations at every step, so it has no fixed count. "
            f"FixedPointIteration, Anderson, Broyden and Multisecant do. Or use compile=True, or False."
        )
    if isinstance(method, IFT):
        inner = method.solver
        plain = method.order == 1 and method.clip is None
        if plain and (isinstance(inner, GMRES) or inner.fixed_shape):
            return
    elif isinstance(method, JFB) or (
        isinstance(method, PhantomGrad) and method.sup_gap == -1 and not method.sup_loc
    ):
        return
    raise TypeError(
        f"{method!r} has no fixed count. IFT with order=1, without clip, by GMRES, FixedPointIteration, Anderson, "
        f"Broyden or Multisecant has one, max_iter being the number of products; and so have JFB() and PhantomGrad()."
    )


class _Implicit(torch.autograd.Function):
    """The identity in f(z); its derivative is that of the fixed point."""

    @staticmethod
    def forward(ctx: Any, fz: Tensor, z: Tensor, adjoint: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        ctx.adjoint = adjoint
        ctx.save_for_backward(z)
        return fz.view_as(fz)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (z,) = ctx.saved_tensors
        return ctx.adjoint(z, g), None, None


def _iterated(solver: SolverLoop, f: Any, z: Tensor, steps: int) -> Tensor:
    """The state after so many steps, each with its evaluation."""
    state = solver.room(solver.init(z), steps + 1)
    for _ in range(steps):
        fz = f(z)
        z, state = solver.step(f, z, fz, state)
    return z


def _adjoint(
    solver: SolverLoop,
    seen: Seen,
    f: Callable[[Tree], Tree],
    z: Tensor,
    g: Tensor,
    mark: Fingerprint | None,
) -> Tensor:
    """u with u = Jᵀ u + g, after `max_iter` products, (B, D). It is NaN for a sample whose g is not finite.

    Arguments:
        mark: of f(z) as it was.
    """
    size, weight, known = scales_of(per_sample(g))
    map_ = Shifted(seen, f, (z, weight, g / size))
    if mark is not None:
        mark.check(map_.fz, "DEQ(compile='fixed')")
    if isinstance(solver, AffineSolver):
        u = _searched(solver, map_, map_.b, solver.max_iter)
    else:
        u = _iterated(solver, map_, map_.b, solver.max_iter)
    return torch.where(known[:, None], u * size, torch.nan)


def _searched(solver: AffineSolver, map_: Shifted, b: Tensor, products: int) -> Tensor:
    """The best u of a Krylov space of so many products, begun at 0; cycles of a restarted method one by one."""
    u, r = torch.zeros_like(b), b
    while products > 0:
        size = per_sample(r)
        active = (size > 0) & size.isfinite()
        count = min(products, solver.cycle or products)
        state = solver.room(solver.first(torch.where(active[:, None], r / size[:, None], 0.0)), count)
        steps = torch.zeros_like(active, dtype=torch.int64)
        for _ in range(count):
            state = state._replace(probe=torch.where(active[:, None], state.probe, 0.0))
            state, estimate = solver.advance(state.probe - map_.product(state.probe), state)
            active = active & estimate.isfinite()
            steps = steps + active
            active = active & solver.alive(state)
        found = solver.correction(state, steps) * size[:, None]
        u = u + torch.where((steps > 0)[:, None], found, 0.0)
        products -= count
        if products < 2:  # another cycle begins at the residual, which takes one
            break
        r, products = map_(u) - u, products - 1
    return u


def _told(solver: SolverLoop, z: Tensor, fz: Tensor, f: Any) -> Solution:
    """The account, from the last evaluation."""
    _, size, scale, measure = solver._measured(z, fz, f)
    size, ratio = leaf_max(size), leaf_max(relative(size, scale))
    status = torch.full_like(measure, Status.MAX_ITER, dtype=torch.int64)
    status = status.masked_fill(measure <= solver.tol, Status.CONVERGED)
    status = status.masked_fill(~measure.isfinite(), Status.NON_FINITE)
    return Solution(
        z=z,
        abs_residual=size,
        rel_residual=ratio,
        stop_mode=solver.stop_mode,
        tol=solver.tol,
        status=status,
        nstep=torch.full_like(status, solver.max_iter),
        nfe=solver.max_iter,
        abs_trace=size[None],
        rel_trace=ratio[None],
    )
