"""Roots and minima of pure functions, as the fixed points that they are.

    F(y*, θ) = 0            is   y* = f(y*, θ)   with   f = y − F(y, θ),         I − J = ∂F/∂y
    ∇φ(y*, θ) = 0           is   y* = f(y*, θ)   with   f = y − ∇φ(y, θ),        I − J = ∂²φ/∂y²

so both are solved and differentiated as `torchdeq.functional` does it. Sources: Blondel et al. (2022), arXiv
2105.15183; Pedregosa (2016), arXiv 1602.02355, and Rajeswaran et al. (2019), arXiv 1909.04630, for CG on the Hessian.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchdeq._state import Layout, Map, Tree
from torchdeq.functional import as_loop, checked_layout, default_tol, solve_map, without_aux
from torchdeq.grad.base import OnBackward
from torchdeq.grad.inverse import vjp_of
from torchdeq.grad.pure import Bound
from torchdeq.solution import Solution, Status
from torchdeq.solver.affine import dot
from torchdeq.solver.base import SolverLoop
from torchdeq.solver.cg import CG
from torchdeq.solver.gmres import GMRES
from torchdeq.solver.newton_cg import NewtonCG
from torchdeq.solver.newton_krylov import NewtonKrylov, NewtonState
from torchdeq.solver.registry import FunctionSolver

Maps = tuple[tuple[int, tuple[int | None, ...]], ...]  # as in `System`

ROOT_REMEDY = (
    "The residual is ‖F(y)‖; what is returned is the best y found, no root to this tolerance. Raise max_iter or tol, "
    "start nearer, or scale F: the tolerance is absolute."
)
MINIMUM_REMEDY = (
    "The residual is the norm of the objective's gradient. If it is small and the sample stalled nevertheless, the "
    "objective curves down along some direction there: the point is a saddle or a maximum and no minimum; start "
    "elsewhere. Otherwise raise max_iter or tol, which is absolute, or scale the objective."
)
LINEAR_REMEDY = (
    "This was a linear solve for a derivative: its relative error is about this residual times the condition of ∂F/∂y. "
    "Raise max_iter or tol of adjoint=..."
)
HESSIAN_REMEDY = (
    "This was a linear solve with the objective's Hessian for a derivative: its relative error is about this residual "
    "times the Hessian's condition. If it stalled, the Hessian is singular or curves down: what was found is no strict "
    "minimum. Raise max_iter or tol of adjoint=..., add a quadratic term to the objective, or use adjoint='gmres', "
    "which differentiates a saddle too."
)


def implicit_root(
    F: Callable[..., Any],
    y0: Tree,
    *theta: Tree,
    solver: str | SolverLoop | None = None,
    adjoint: str | SolverLoop | None = None,
    batch_dims: int = 0,
    has_aux: bool = False,
    return_solution: bool = False,
    throw: bool = False,
    on_backward: OnBackward | None = None,
) -> Any:
    """y* with F(y*, *theta) = 0, as a function of theta that can be differentiated and mapped like any other.

    The derivative is −(∂F/∂y)⁻¹ ∂F/∂θ. It is that of `fixed_point` for y − F(y), with all that this allows: any order,
    either mode, every transform of torch.func.

    Arguments:
        F: a pure function (y, *theta) -> residual of the structure, shapes and dtypes of y.
        y0: where to start, a tensor or a pytree of tensors. It gets no derivative.
        *theta: see `fixed_point`.
        solver: an object or a name; it sees f(y) = y − F(y). None: `NewtonRoot` with an absolute tolerance for ‖F(y)‖
            of ε^⅔, that is 2.4e-5 in float32 and 3.7e-11 in float64, and at most 1000 evaluations and products.
            Newton's steps do not depend on the scale of F, where those of an iteration y − F(y) do. The tolerance
            does: scale F so that 1 is a large value.
        adjoint: solves (∂F/∂y)ᵀ u = g. None: `GMRES`, as in `fixed_point`.
        batch_dims, has_aux, return_solution, throw, on_backward: see `fixed_point`.

    Returns:
        y*, and aux and the `Solution` if they are asked for. The residual of the Solution is ‖F(y*)‖.

    Raises:
        ValueError, TypeError: F returns another shape, structure or dtype than that of y.
        RuntimeError: F closes over a tensor that wants a derivative or is mapped.

    Source: Blondel et al. (2022), arXiv 2105.15183.

    Example:
        >>> import torch
        >>> root = lambda a: implicit_root(lambda y, a: y**3 - a, torch.ones_like(a), a)
        >>> a = torch.tensor(8.0, dtype=torch.float64)
        >>> round(root(a).item(), 6), round(torch.func.grad(root)(a).item(), 6)  # 8^(1/3), and 1/12
        (2.0, 0.083333)
    """
    layout = checked_layout("implicit_root", F, y0, batch_dims)

    def image(y: Tensor, *theta: Tree) -> Tensor:
        value = without_aux(F, F(layout.unravel(y), *theta), has_aux)
        try:
            return y - layout.ravel(value, source="F")
        except ValueError as error:
            error.add_note("implicit_root: F(y) = 0 needs as many equations as there are unknowns.")
            raise

    tol = default_tol(layout, y0)
    return solve_map(
        image,
        layout,
        y0,
        theta,
        solver=as_loop("solver", solver, NewtonRoot(tol=tol, max_iter=1000)),
        adjoint=as_loop("adjoint", adjoint, GMRES(tol=tol, max_iter=200)),
        aux=F if has_aux else None,
        return_solution=return_solution,
        throw=throw,
        on_backward=on_backward,
        remedies=(ROOT_REMEDY, LINEAR_REMEDY),
    )


def implicit_minimum(
    objective: Callable[..., Any],
    y0: Tree,
    *theta: Tree,
    solver: str | SolverLoop | Callable[..., Tree] | None = None,
    adjoint: str | SolverLoop | None = None,
    batch_dims: int = 0,
    has_aux: bool = False,
    return_solution: bool = False,
    throw: bool = False,
    on_backward: OnBackward | None = None,
    tol: float | None = None,
    probes: int = 10,
) -> Any:
    """y* = argmin objective(y, *theta), as a function of theta that can be differentiated and mapped like any other.

    For bilevel problems, meta-learning and layers that optimise. The derivative is −H⁻¹ ∂(∇φ)/∂θ with the Hessian H,
    solved by CG; it is that of `fixed_point` for y − ∇φ(y), with all that this allows. How y* was found does not matter
    to it.

    Arguments:
        objective: a pure, twice differentiable function (y, *theta) -> (), a real scalar; with `batch_dims=1` the sum
            of what its samples contribute.
        y0: where to start, a tensor or a pytree of tensors. It gets no derivative.
        *theta: see `fixed_point`.
        solver: finds y*. None: `NewtonCG` with an absolute tolerance for ‖∇φ‖ of ε^⅔, that is 2.4e-5 in float32 and
            3.7e-11 in float64, and at most 1000 gradients and products: it is as accurate as a derivative wants, has
            no step length to set, and goes downhill only. A solver object or name sees f(y) = y − ∇φ(y). Anything else
            that can be called is called as solver(objective, y0, *theta), without transforms, once for each mapped
            instance, and returns y; one more gradient measures it.
        adjoint: solves H u = g. None: `CG` with a relative tolerance of ε^⅔ and at most 200 products, which ends as
            `STALLED` where it meets a direction in which the objective curves down.
        batch_dims, has_aux, return_solution, throw, on_backward: see `fixed_point`.
        tol: for a callable `solver` only: the largest ‖∇φ‖ that counts as solved, 1e-3 by default.
        probes: products with the Hessian, at the solution, of a look for directions in which the objective curves
            down. What has one is a saddle or a maximum, and counts as not converged. So many Lanczos steps see every
            negative eigenvalue if there are no more unknowns than that, and otherwise those that stand out. 0: no look.

    Returns:
        y*, and aux and the `Solution` if they are asked for. The residual of the Solution is ‖∇φ(y*)‖; nfe counts
        gradients and products, not what a callable `solver` does.

    Raises:
        ValueError, TypeError: the objective is no real scalar, or a callable `solver` returns another structure.
        RuntimeError: the objective closes over a tensor that wants a derivative or is mapped.

    Sources: Pedregosa (2016), arXiv 1602.02355; Rajeswaran et al. (2019), arXiv 1909.04630; Blondel et al. (2022),
    arXiv 2105.15183.

    Example:
        Ridge regression, and the derivative of its weights by the penalty.

        >>> import torch
        >>> x, t = torch.eye(2, dtype=torch.float64), torch.tensor([2.0, 4.0], dtype=torch.float64)
        >>> objective = lambda y, c: (x @ y - t).square().sum() + c * y.square().sum()
        >>> weights = lambda c: implicit_minimum(objective, torch.zeros_like(t), c)
        >>> c = torch.tensor(1.0, dtype=torch.float64)
        >>> weights(c).tolist(), torch.func.jacrev(weights)(c).tolist()  # t / (1 + c), and −t / (1 + c)²
        ([1.0, 2.0], [-0.5, -1.0])
    """
    layout = checked_layout("implicit_minimum", objective, y0, batch_dims)
    if not (isinstance(probes, int) and probes >= 0):
        raise ValueError(f"implicit_minimum(probes={probes!r}): expected a number of products of at least 0.")
    usual = default_tol(layout, y0)
    outside = None if solver is None or isinstance(solver, str | SolverLoop) else solver
    if outside is None and tol is not None:
        raise ValueError(
            f"implicit_minimum(tol={tol!r}): tol is for a solver that is a function; others have theirs."
        )
    if outside is not None and not callable(outside):
        raise TypeError(
            f"implicit_minimum(solver={solver!r}): expected a Solver such as NewtonCG(tol=1e-6), a registered name, or "
            f"a function (objective, y0, *theta) -> y."
        )

    def image(y: Tensor, *theta: Tree) -> Tensor:
        def value(y: Tensor) -> Tensor:
            return _scalar(without_aux(objective, objective(layout.unravel(y), *theta), has_aux))

        return y - torch.func.grad(value)(y)

    def search(y: Tensor, *theta: Tree) -> Tensor:
        assert outside is not None
        return layout.ravel(outside(objective, layout.unravel(y), *theta), source="solver")

    if outside is None:
        finds = as_loop("solver", solver, NewtonCG(tol=usual, max_iter=1000))
    else:
        finds = Outside(1e-3 if tol is None else tol)
    return solve_map(
        image,
        layout,
        y0,
        theta,
        solver=Downward(finds, probes),
        adjoint=as_loop("adjoint", adjoint, CG(tol=usual, max_iter=200)),
        aux=objective if has_aux else None,
        return_solution=return_solution,
        throw=throw,
        on_backward=on_backward,
        remedies=(MINIMUM_REMEDY, HESSIAN_REMEDY),
        search=None if outside is None else search,
    )


def _scalar(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.is_complex() or value.dim() > 0:
        got = (
            f"{value.dtype} of shape {tuple(value.shape)}"
            if isinstance(value, Tensor)
            else type(value).__name__
        )
        raise TypeError(
            f"the objective returned {got}; expected a real scalar tensor of shape (). Sum over what it returns, also "
            f"over samples; if it returns (value, aux), say has_aux=True."
        )
    return value


# Solvers ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, repr=False)
class NewtonRoot(NewtonKrylov):
    """`NewtonKrylov` whose first step is Newton's too: that of Picard, y − F(y), is at the mercy of F's scale.

    Example:
        >>> import torch
        >>> sol = NewtonRoot(tol=1e-6)(lambda y: y - 1e4 * (y**2 - 2), torch.ones(1, 1, dtype=torch.float64))
        >>> round(sol.z.item(), 6)
        1.414214
    """

    def init(self, z: Tensor) -> NewtonState:
        """As if the first step had been made."""
        return super().init(z)._replace(begun=True)


class Outside(SolverLoop):
    """A function of the user's that finds the state, called for one instance at a time; its result is measured.

    Arguments:
        tol: the largest residual that counts as solved.
    """

    compact = False

    def __init__(self, tol: float):
        self.tol = tol

    def run(
        self,
        f: Map,
        z0: Tensor | None = None,
        *,
        record: Sequence[int] = (),
        layout: Layout | None = None,
        together: bool = True,
    ) -> Solution:
        """See `SolverLoop.run`; f is a `Bound` that has a `search`."""
        assert isinstance(f, Bound)
        assert z0 is not None
        search = f.system.search
        assert search is not None
        instances = list(_instances(f.system.maps, f.theta))
        with torch.enable_grad():
            found = [search(z, *theta) for z, theta in zip(z0.chunk(len(instances)), instances, strict=True)]
        z = torch.cat([z.detach() for z in found])
        measured = FunctionSolver(function=lambda f, z0, **_: (z, [], {}), tol=self.tol)
        return measured.run(f, z0, layout=layout, together=False)


def _instances(maps: Maps, theta: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """θ of each mapped instance, in the order of the batch: the outermost map, which is the last, is the slowest."""
    if not maps:
        yield list(theta)
        return
    *inner, (count, dims) = maps
    for i in range(count):
        chosen = [t if dim is None else t.select(dim, i) for t, dim in zip(theta, dims, strict=True)]
        yield from _instances(tuple(inner), chosen)


class Downward(SolverLoop):
    """A solver for minima, and a look at the Hessian where it ends: what curves down there is no minimum.

    Arguments:
        solver: finds a stationary point.
        probes: products with the Hessian for the look.
    """

    def __init__(self, solver: SolverLoop, probes: int):
        self.solver = solver
        self.probes = probes
        self.compact = solver.compact

    def run(
        self,
        f: Map,
        z0: Tensor | None = None,
        *,
        record: Sequence[int] = (),
        layout: Layout | None = None,
        together: bool = True,
    ) -> Solution:
        """See `SolverLoop.run`. A converged sample that is no minimum becomes `STALLED`."""
        solution = self.solver.run(f, z0, record=record, layout=layout, together=together)
        if not self.probes:
            return solution
        with torch.enable_grad():
            z = solution.z.detach().clone().requires_grad_()
            fz = f(z)
        down, products = curves_down(vjp_of(fz, z), z, self.probes)
        status = solution.status.masked_fill(down & solution.converged, Status.STALLED)
        return dataclasses.replace(solution, status=status, nfe=solution.nfe + 1 + products)

    def __repr__(self) -> str:
        return repr(self.solver)


def curves_down(linear: Map, z: Tensor, most: int) -> tuple[Tensor, int]:
    """Which samples have a direction p with ⟨p, (I − L) p⟩ < 0, (B,), as far as CG meets one; and the products made.

    CG meets one within k steps if and only if k Lanczos steps from the same start show a negative eigenvalue.

    Arguments:
        linear: L, symmetric, (B, D) -> (B, D).
        z: of the shape of what L takes, (B, D).
        most: how many products at most.

    Example:
        >>> curves_down(lambda v: torch.tensor([[0.5, 1.5], [0.5, 0.7]]) * v, torch.zeros(2, 2), 5)
        (tensor([ True, False]), 2)
    """
    generator = torch.Generator().manual_seed(
        0
    )  # the same for all samples, as they do not depend on each other
    start = torch.randn(z.shape[1], generator=generator, dtype=torch.float64).to(z).expand_as(z)
    cg, eps = CG(), torch.finfo(z.dtype).eps
    state = cg.first(start)
    down = torch.zeros(z.shape[0], dtype=torch.bool, device=z.device)
    for k in range(most):
        p = torch.where((state.rho > eps * dot(start, start))[:, None], state.probe, 0.0)
        if not bool(p.any()):
            return down, k
        ap = p - linear(p)
        state, _ = cg.advance(ap, state._replace(probe=p))
        # Beyond rounding: a curvature of zero is no saddle.
        down = down | (dot(p, ap) < -(eps**0.5) * state.norm * dot(p, p))
    return down, most
