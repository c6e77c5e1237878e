"""Fixed points of pure functions, with derivatives of any order and under every transform of torch.func.

    z* = f(z*, θ)

How it is differentiated stands in `torchdeq.grad.pure`; here is the door.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import optree
import torch
from torch import Tensor, nn

from torchdeq._modes import in_transform, refuse_old_vmap
from torchdeq._replay import AutocastState, RandomState
from torchdeq._state import Layout, Tree, layout_of
from torchdeq.grad.base import OnBackward
from torchdeq.grad.ift import ADJOINT_REMEDY
from torchdeq.grad.pure import solved
from torchdeq.grad.system import Image, Noise, System
from torchdeq.solution import Reporter
from torchdeq.solver.base import SOLVER_REMEDY, SolverLoop
from torchdeq.solver.gmres import GMRES
from torchdeq.solver.multisecant import Multisecant
from torchdeq.solver.registry import as_solver
from torchdeq.solver.splitting import splits


def fixed_point(
    f: Callable[..., Any],
    z0: Tree,
    *theta: Tree,
    solver: str | SolverLoop | None = None,
    adjoint: str | SolverLoop | None = None,
    batch_dims: int = 0,
    has_aux: bool = False,
    return_solution: bool = False,
    throw: bool = False,
    on_backward: OnBackward | None = None,
) -> Any:
    """z* = f(z*, *theta), as a function of theta that can be differentiated and mapped like any other.

    Reverse and forward mode, to any order, in any nesting: `backward`, `torch.autograd.grad` with `create_graph`,
    `torch.autograd.forward_ad`, and torch.func's grad, vjp, jvp, jacrev, jacfwd, hessian and vmap; not linearize,
    which traces what it sees. Under vmap each instance is solved as a sample of its own.

    Arguments:
        f: a pure function (z, *theta) -> z of the structure, shapes and dtypes of z. What it should be differentiated
            by, it takes as an argument: to close over a tensor that wants a derivative is an error. It is looked for
            at z0; what f reaches only elsewhere, behind a Python `if`, is not seen.
        z0: the start, a tensor or a pytree of tensors, real or complex. It gets no derivative, as a fixed point does
            not depend on where a solver began.
        *theta: pytrees of whatever f takes. Tensors in them are differentiated if they want it; integers, flags,
            None and other objects are handed on.
        solver: the forward solver, an object; or a registered name, for that solver with the tolerance and the number
            of evaluations of the default. None: `Multisecant` with a relative tolerance of
            ε^⅔, that is 2.4e-5 in float32 and 3.7e-11 in float64, or ε in half precision, and at most 200
            evaluations. A derivative is as wrong as the state is, and a second difference of states, as in gradcheck,
            wants more digits than a model in training. ε is that of the narrowest dtype in z0 or autocast. If z* = 0
            use a solver with an absolute tolerance: no residual is small beside nothing.
        adjoint: solves the linear systems of all derivatives, an object or a name; its tolerance is relative to the
            right-hand side. None: `GMRES`, with the same tolerance and number of products.
        batch_dims: how many leading dimensions of z0 count samples. 0: the state is one system, whatever its shape,
            which is always right; 1: a batch of samples that f treats separately, each with its own coefficients and
            stop test, which takes fewer evaluations.
        has_aux: f returns (z, aux), and so does this: aux is that of one more evaluation at z*, with its derivatives.
        return_solution: return the `Solution` too, last. Under vmap its tensors are those of one instance.
        throw: raise a `ConvergenceError` where a solve, also of a derivative, does not converge, rather than warn.
        on_backward: called with the `Solution` of the linear solve of each derivative; under vmap with that of all
            instances at once.

    Returns:
        z*, in the structure of z0; with `has_aux` and `return_solution` a tuple (z*, aux, solution) of what was asked.
        z* is the state whose residual is reported.

    Raises:
        ValueError, TypeError: f changes shape, structure or dtype of the state.
        RuntimeError: f closes over a tensor that wants a derivative or is mapped; or it changes z in place.

    Random numbers that f draws are the same in each evaluation, so that f is one function. Source: Blondel et al.
    (2022), arXiv 2105.15183.

    Example:
        >>> import torch
        >>> f = lambda z, a: torch.cos(a * z)
        >>> a = torch.tensor(1.0, dtype=torch.float64)
        >>> solve = lambda a: fixed_point(f, torch.zeros_like(a), a)
        >>> z, dz, ddz = solve(a), torch.func.grad(solve)(a), torch.func.hessian(solve)(a)
        >>> [round(x.item(), 4) for x in (z, dz, ddz)]
        [0.7391, -0.2975, 0.1533]
        >>> torch.vmap(solve)(torch.tensor([0.0, 1.0])).tolist()[0]
        1.0
    """
    layout = checked_layout("fixed_point", f, z0, batch_dims)

    def image(z: Tensor, *theta: Tree) -> Tensor:
        return layout.ravel(without_aux(f, f(layout.unravel(z), *theta), has_aux))

    tol = default_tol(layout, z0)
    return solve_map(
        image,
        layout,
        z0,
        theta,
        solver=as_loop("solver", solver, Multisecant(tol=tol, stop_mode="rel", max_iter=200)),
        adjoint=as_loop("adjoint", adjoint, GMRES(tol=tol, max_iter=200)),
        aux=f if has_aux else None,
        return_solution=return_solution,
        throw=throw,
        on_backward=on_backward,
    )


def solve_map(
    image: Image,
    layout: Layout,
    z0: Tree,
    theta: tuple[Tree, ...],
    *,
    solver: SolverLoop,
    adjoint: SolverLoop,
    aux: Callable[..., Any] | None,
    return_solution: bool,
    throw: bool,
    on_backward: OnBackward | None,
    remedies: tuple[str, str] = (SOLVER_REMEDY, ADJOINT_REMEDY),
    search: Image | None = None,
    apart: bool = False,
) -> Any:
    """The fixed point of a map on flat states, and what else `fixed_point` returns.

    Arguments:
        image: (z (B, D), *theta) -> (B, D).
        layout, z0: of the state.
        theta: what `image` takes besides z.
        solver, adjoint, return_solution, throw, on_backward: see `fixed_point`.
        aux: a function (z, *theta) -> (value, aux), if aux is wanted.
        remedies: what to say of a forward and of a linear solve that did not converge.
        search: (z0 (B, D), *theta) -> (B, D), for a solver that needs to see theta.
        apart: whether `image` is f(z) − z.
    """
    refuse_old_vmap()
    if solver.compact:
        raise ValueError(
            f"solver={solver!r}: compact=True leaves samples out of the batch, but theta would still be that of all. "
            f"Use compact=False; DEQ allows it."
        )
    start = layout.ravel(z0, source="z0").detach()
    leaves: list[Any]
    leaves, spec = optree.tree_flatten(theta)  # type: ignore[arg-type]
    wanted = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    tensors = [leaves[i] for i in wanted]
    if torch.is_grad_enabled() and any(_wants_gradients(leaf) for leaf in leaves):
        raise TypeError(
            "theta holds a module, whose parameters are not seen in it and would get no derivative. Give them instead, "
            "fixed_point(lambda z, p: torch.func.functional_call(module, p, (z,)), z0, "
            "dict(module.named_parameters())); or use DEQ, which takes any f."
        )
    others = [
        None if isinstance(leaf, Tensor) else leaf for leaf in leaves
    ]  # keeps no tensor of a transform alive

    def of_tensors(g: Callable[..., Any]) -> Callable[..., Any]:
        def called(z: Tensor, *tensors: Tensor) -> Any:
            full = list(others)
            for i, t in zip(wanted, tensors, strict=True):
                full[i] = t
            return g(z, *optree.tree_unflatten(spec, full))

        return called

    forward, linear = (Reporter(remedy, throw=throw) for remedy in remedies)
    system = System(
        image=of_tensors(image),
        layout=layout,
        solver=solver,
        adjoint=adjoint,
        amp=AutocastState.capture(start.device),
        noise=Noise(RandomState.capture(start.device)),
        reports=(forward, linear),
        on_backward=on_backward,
        account=[] if return_solution else None,
        guards=torch.is_grad_enabled() and not torch.is_inference_mode_enabled(),
        search=None if search is None else of_tensors(search),
        apart=apart,
    )
    with _no_inference():  # solvers that differentiate f cannot save inference tensors
        start, *tensors = (t.clone() if t.is_inference() else t for t in (start, *tensors))
        if in_transform():
            system = system.looked_through(start, tensors)
        z, figures = solved(system, start, tensors)
        state = layout.unravel(z)
    returned = [state]
    if aux is not None:
        with system.noise():
            returned.append(aux(state, *theta)[1])
    if system.account is not None:
        bare: dict[str, Any] = {**figures, "z": optree.tree_map(torch.Tensor.detach, state)}
        returned.append(dataclasses.replace(system.account[0], **bare))
    return tuple(returned) if len(returned) > 1 else state


def _wants_gradients(leaf: Any) -> bool:
    return isinstance(leaf, nn.Module) and any(p.requires_grad for p in leaf.parameters())


@contextmanager
def _no_inference() -> Iterator[None]:
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def default_tol(layout: Layout, z0: Tree) -> float:
    """ε^⅔, to two digits, of the narrowest dtype that f computes in; of a half-precision one ε."""
    amp = AutocastState.capture(optree.tree_leaves(z0)[0].device)
    dtypes = [*layout.dtypes, *([amp.dtype] if amp.enabled else [])]
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    return float(f"{eps if eps > 1e-4 else eps ** (2 / 3):.1e}")


def as_loop(name: str, solver: Any, default: SolverLoop) -> SolverLoop:
    """The solver that was given as the argument `name`, or the default. One that is named has the default's limits."""
    if solver is None:
        return default
    if isinstance(solver, str):
        return as_solver(solver, tol=default.tol, stop_mode=default.stop_mode, max_iter=default.max_iter)
    if not isinstance(solver, SolverLoop):
        raise TypeError(f"{name}={solver!r}: expected a Solver such as {default!r}, or a registered name.")
    if name == "adjoint" and splits(solver):
        raise TypeError(
            f"adjoint={solver!r}: a splitting takes a MonotoneMap apart, which it does not find in a pure function's "
            f"linear systems. Use adjoint={default!r}, or DEQ(grad=IFT(solver=PeacemanRachford()))."
        )
    return solver


def without_aux(f: Any, out: Any, has_aux: bool) -> Any:
    """The first of the pair that f returned, if it has to return one."""
    if not has_aux:
        return out
    if not (isinstance(out, tuple) and len(out) == 2):
        raise TypeError(f"has_aux=True: {f!r} must return a tuple (value, aux), got {type(out).__name__}.")
    return out[0]


def checked_layout(name: str, f: Any, z0: Tree, batch_dims: int) -> Layout:
    """The layout of z0, for the function called `name`."""
    if not callable(f):
        raise TypeError(f"{name} takes a callable f(z, *theta) first, got {type(f).__name__}.")
    if batch_dims not in (0, 1, 2):
        raise ValueError(f"{name}(batch_dims={batch_dims!r}): expected 0, 1 or 2.")
    return layout_of(z0, batch_dims)
