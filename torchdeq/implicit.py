"""Roots and minima of pure functions, as the fixed points that they are.

    F(y*, θ) = 0            is   y* = f(y*, θ)   with   f = y − F(y, θ),         I − J = ∂F/∂y
    ∇φ(y*, θ) = 0           is   y* = f(y*, θ)   with   f = y − ∇φ(y, θ),        I − J = ∂²φ/∂y²

so both are solved and differentiated as `torchdeq.functional` does it. But where F is small beside y, y − F(y) has lost
it. So F, and products with A = ∂F/∂y, are taken by themselves, and the usual stop test does not know F's scale:

    ‖F(y)‖ ≤ tol max(‖a ∘ y‖, ‖a ∘ (y − y0)‖),    a = Aᵀv with a generic v, of the size of the columns of A at y,

which is tol times what F would be for a y that is all wrong: in short, tol ‖A‖ max(‖y‖, ‖y − y0‖).

Sources: Blondel et al. (2022), arXiv
2105.15183; Pedregosa (2016), arXiv 1602.02355, and Rajeswaran et al. (2019), arXiv 1909.04630, for CG on the Hessian.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchdeq._state import Layout, Map, Tree, per_sample
from torchdeq.functional import as_loop, checked_layout, default_tol, solve_map, without_aux
from torchdeq.grad.base import OnBackward
from torchdeq.grad.inverse import vjp_of
from torchdeq.grad.system import Bound
from torchdeq.solution import Solution, Status
from torchdeq.solver.affine import dot
from torchdeq.solver.base import SolverLoop
from torchdeq.solver.cg import CG
from torchdeq.solver.coupling import couples_samples
from torchdeq.solver.gmres import GMRES
from torchdeq.solver.maps import Tally, generic
from torchdeq.solver.newton_cg import NewtonCG
from torchdeq.solver.newton_krylov import Linearised, NewtonKrylov, NewtonState
from torchdeq.solver.registry import FunctionSolver
from torchdeq.solver.together import Whole
from torchdeq.solver.watch import Iterate, leaf_max, relative

Maps = tuple[tuple[int, tuple[int | None, ...]], ...]  # as in `System`

ROOT_REMEDY = (
    "The absolute residual is ‖F(y)‖; what is returned is the best y found, no root to this tolerance. Raise max_iter "
    "or tol, or start nearer."
)
MINIMUM_REMEDY = (
    "The absolute residual is the norm of the objective's gradient. If it is small and the sample stalled "
    "nevertheless, the objective curves down along some direction there: the point is a saddle or a maximum and no "
    "minimum; start elsewhere. Otherwise raise max_iter or tol. What a function given as solver=... returns is "
    "measured as it is."
)
LINEAR_REMEDY = (
    "This was a linear solve for a derivative: its relative error is about this residual times the condition of ∂F/∂y. "
    "Raise max_iter or tol of adjoint=... If ∂F/∂y is singular, as where F conserves a quantity, no solver can do it: "
    "replace one of the equations by what is conserved."
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
        solver: an object or a name; it sees f(y) = y − F(y), with its own tolerance for ‖F(y)‖, or relative to ‖f(y)‖.
            None: Newton–Krylov with at most 1000 evaluations and products. It stops where ‖F(y)‖ is at most
            ε^⅔ ‖∂F/∂y‖ max(‖y‖, ‖y − y0‖), that is where one expects y to be right to 2.4e-5 in float32 and 3.7e-11
            in float64, times the condition of ∂F/∂y. Neither that test nor its steps depend on the scale of F, where
            those of an iteration y − F(y) do.
        adjoint: solves (∂F/∂y)ᵀ u = g. None: `GMRES`, as in `fixed_point`. What is no Krylov solver sees ∂F/∂y at
            the scale of 1, as u = (I − s ∂F/∂yᵀ) u + s g.
        batch_dims, has_aux, return_solution, throw, on_backward: see `fixed_point`.

    Returns:
        y*, and aux and the `Solution` if they are asked for. Its absolute residual is ‖F(y*)‖, measured at y*; with
        `solver=None` the relative one is ‖F(y*)‖ / (‖∂F/∂y‖ max(‖y*‖, ‖y* − y0‖)), and is the one of the test.

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
            return -layout.ravel(value, source="F")
        except ValueError as error:
            error.add_note("implicit_root: F(y) = 0 needs as many equations as there are unknowns.")
            raise

    tol = default_tol(layout, y0)
    loop = as_loop("solver", solver, NewtonRoot(tol=tol, stop_mode="rel", max_iter=1000))
    return solve_map(
        image,
        layout,
        y0,
        theta,
        solver=Measured(loop, scaled=solver is None),
        adjoint=as_loop("adjoint", adjoint, GMRES(tol=tol, max_iter=200)),
        aux=F if has_aux else None,
        return_solution=return_solution,
        throw=throw,
        on_backward=on_backward,
        remedies=(ROOT_REMEDY, LINEAR_REMEDY),
        apart=True,
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
        solver: finds y*. None: `NewtonCG` with at most 1000 gradients and products. It has no step length to set, and
            stops where ‖∇φ(y)‖ is at most ε^⅔ ‖H‖ max(‖y‖, ‖y − y0‖), whatever the scale of the objective: where one
            expects y to be right to 2.4e-5 in float32 and 3.7e-11 in float64, times the condition of H. It looks at
            slopes and not at φ, so it may step over a rise to another minimum, or out of the domain of φ. A solver
            object or name sees f(y) = y − ∇φ(y), with its own tolerance for ‖∇φ‖, or relative to ‖f(y)‖. Anything else
            that can be called is called as solver(objective, y0, *theta), without transforms, once for each mapped
            instance, and returns y; two more gradients and a product measure it.
        adjoint: solves H u = g. None: `CG` with a relative tolerance of ε^⅔ and at most 200 products, which ends as
            `STALLED` where it meets a direction in which the objective curves down. What is no Krylov solver sees H at
            the scale of 1, as u = (I − s H) u + s g.
        batch_dims, has_aux, return_solution, throw, on_backward: see `fixed_point`.
        tol: for a callable `solver` only: the largest ‖∇φ‖ that counts as solved. None: 1e-3 ‖H‖ max(‖y‖, ‖y − y0‖).
        probes: products with the Hessian, at the solution, of a look for directions in which the objective curves
            down. What has one is a saddle or a maximum, and counts as not converged. So many Lanczos steps see a
            negative eigenvalue beyond some 32 ε ‖H‖ if there are no more unknowns than that, and otherwise those that
            stand out. 0: no look.

    Returns:
        y*, and aux and the `Solution` if they are asked for. Its absolute residual is ‖∇φ(y*)‖, measured at y*; with
        `solver=None` the relative one is ‖∇φ(y*)‖ / (‖H‖ max(‖y*‖, ‖y* − y0‖)), and is the one of the test. nfe counts
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
    if outside is not None and (isinstance(outside, type) or not callable(outside)):
        raise TypeError(
            f"implicit_minimum(solver={solver!r}): expected a Solver such as NewtonCG(tol=1e-6), a registered name, or "
            f"a function (objective, y0, *theta) -> y."
        )

    def image(y: Tensor, *theta: Tree) -> Tensor:
        def value(y: Tensor) -> Tensor:
            return _scalar(without_aux(objective, objective(layout.unravel(y), *theta), has_aux))

        return -torch.func.grad(value)(y)

    def search(y: Tensor, *theta: Tree) -> Tensor:
        assert outside is not None
        return layout.ravel(outside(objective, layout.unravel(y), *theta), source="solver")

    if outside is None:
        finds = as_loop("solver", solver, NewtonMinimum(tol=usual, stop_mode="rel", max_iter=1000))
    else:
        finds = Outside(1e-3 if tol is None else tol)
    scaled = tol is None and (solver is None or outside is not None)
    return solve_map(
        image,
        layout,
        y0,
        theta,
        solver=Measured(finds, scaled=scaled, probes=probes),
        adjoint=as_loop("adjoint", adjoint, CG(tol=usual, max_iter=200)),
        aux=objective if has_aux else None,
        return_solution=return_solution,
        throw=throw,
        on_backward=on_backward,
        remedies=(MINIMUM_REMEDY, HESSIAN_REMEDY),
        search=None if outside is None else search,
        apart=True,
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

    With stop_mode='rel' the residual is relative to ‖∂F/∂y‖ max(‖y‖, ‖y − y0‖).

    Example:
        >>> import torch
        >>> sol = NewtonRoot(tol=1e-6)(lambda y: y - 1e4 * (y**2 - 2), torch.ones(1, 1, dtype=torch.float64))
        >>> round(sol.z.item(), 6)
        1.414214
    """

    def init(self, z: Tensor) -> NewtonState:
        """As if the first step had been made."""
        return super().init(z)._replace(begun=True)

    def _measured(self, z: Tensor, fz: Tensor, f: Tally, *, rough: bool = False) -> Iterate:
        return against_steps(super()._measured(z, fz, f, rough=rough), self, f)


@dataclass(frozen=True, kw_only=True, repr=False)
class NewtonMinimum(NewtonCG):
    """`NewtonCG` whose relative residual is ‖∇φ‖ / (‖H‖ max(‖y‖, ‖y − y0‖)), for stop_mode='rel'.

    Example:
        >>> import torch
        >>> tiny = lambda y: y - 1e-9 * (y - 0.25)
        >>> sol = NewtonMinimum(tol=1e-6, stop_mode="rel")(tiny, torch.zeros(1, 1, dtype=torch.float64))
        >>> bool(sol.converged), round(sol.z.item(), 5)
        (True, 0.25)
    """

    def _measured(self, z: Tensor, fz: Tensor, f: Tally, *, rough: bool = False) -> Iterate:
        return against_steps(super()._measured(z, fz, f, rough=rough), self, f)


def against_steps(now: Iterate, solver: SolverLoop, f: Tally) -> Iterate:
    """The same measurement, relative to what F would be at a distance like that of y from 0, or from the start."""
    if solver.stop_mode != "rel" or not isinstance(f, Linearised) or f.start is None:
        return now
    scale = step_scale(f.columns(), now.z, f.start)
    return now._replace(scale=scale, measure=relative(now.size, scale))


def step_scale(columns: Tensor, z: Tensor, start: Tensor) -> Tensor:
    """max(‖a ∘ z‖, ‖a ∘ (z − start)‖), (B,), with a = `columns` (B, D).

    Not ‖A‖ ‖z‖: where one unknown runs away to where F does not feel it, that would excuse what another does to F.
    """
    return torch.maximum(per_sample(columns * z), per_sample(columns * (z - start)))


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
        measured = FunctionSolver(function=lambda f, z0, **_: (z.reshape(z0.shape), [], {}), tol=self.tol)
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


class Measured(SolverLoop):
    """A solver of F(y) = 0, and a look at where it ends: F itself, to which no y is added, and its derivative.

    Arguments:
        solver: finds a y.
        scaled: whether the tolerance is for ‖F‖ / (‖A‖ max(‖y‖, ‖y − y0‖)); else for what `solver` measures.
        probes: products with A, a Hessian, to see whether it curves down: what does is no minimum.
    """

    def __init__(self, solver: SolverLoop, *, scaled: bool, probes: int = 0):
        self.solver = solver
        self.scaled = scaled
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
        """See `SolverLoop.run`. A sample that is not what its solver took it for becomes `STALLED`."""
        assert isinstance(f, Bound)
        assert z0 is not None
        found = self.solver.run(f, z0, record=record, layout=layout, together=together)
        with torch.enable_grad():
            z = found.z.detach().clone().requires_grad_()
            r = f.image(z)
        product = vjp_of(r, z)
        solution = self._measured_again(found, z.detach(), r.detach(), z0, product, layout)
        if not self.probes:
            return solution
        down, products = self._curves_down(lambda v: -product(v), z, layout, found.coupled)
        status = solution.status.masked_fill(down & solution.converged, Status.STALLED)
        return dataclasses.replace(solution, status=status, nfe=solution.nfe + products)

    def _curves_down(
        self, hessian: Map, z: Tensor, layout: Layout | None, coupled: bool
    ) -> tuple[Tensor, int]:
        """`curves_down`, of the whole batch where H couples its samples: a sample alone then has no H of its own."""
        down, products = curves_down(hessian, z, self.probes)
        if len(z) == 1 or not (coupled or bool(down.any())):
            return down, products
        if not coupled:
            coupled, products = couples_samples(hessian, generic(z)), products + 2
        if not coupled:
            return down, products
        one = Whole(z.shape, layout)
        down, more = curves_down(one.seen(hessian), one.joined(z), self.probes)
        return down.expand(len(z)), products + more

    def _measured_again(
        self, found: Solution, z: Tensor, r: Tensor, z0: Tensor, product: Map, layout: Layout | None
    ) -> Solution:
        """The account of a solve with the residual r (B, D) in it."""
        leaves = [z.shape[1]]
        if layout is not None and getattr(self.solver, "norm", "l2") == "max":
            leaves = list(layout.sizes)

        def sizes(t: Tensor) -> Tensor:
            return torch.stack([per_sample(leaf) for leaf in t.split(leaves, dim=1)], dim=1)

        scale = step_scale(product(generic(z)), z, z0)[:, None] if self.scaled else sizes(z + r)
        solution = dataclasses.replace(
            found,
            abs_residual=leaf_max(sizes(r)).nan_to_num(nan=torch.inf),
            rel_residual=leaf_max(relative(sizes(r), scale)).nan_to_num(nan=torch.inf),
            stop_mode="rel" if self.scaled else found.stop_mode,
            nfe=found.nfe + 1 + self.scaled,
        )
        met = solution.residual <= solution.tol
        status = found.status.masked_fill(found.converged & ~met, Status.STALLED)
        status = status.masked_fill(met & (status != Status.NON_FINITE), Status.CONVERGED)
        return dataclasses.replace(solution, status=status)

    def __repr__(self) -> str:
        return repr(self.solver)


def curves_down(hessian: Map, z: Tensor, most: int) -> tuple[Tensor, int]:
    """Which samples have a direction p with ⟨p, H p⟩ < 0, (B,), as far as CG meets one; and the products made.

    CG meets one within k steps if and only if k Lanczos steps from the same start show a negative eigenvalue.

    Arguments:
        hessian: H, symmetric, (B, D) -> (B, D).
        z: of the shape of what H takes, (B, D).
        most: how many products at most.

    Example:
        >>> curves_down(lambda v: torch.tensor([[0.5, -0.5], [0.5, 0.3]]) * v, torch.zeros(2, 2), 5)
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
        ap = hessian(p)
        state, _ = cg.advance(ap, state._replace(probe=p))
        # Beyond the rounding of H p: a curvature of zero is no saddle.
        down = down | (dot(p, ap) < -32 * eps * state.norm * dot(p, p))
    return down, most
