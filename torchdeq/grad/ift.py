"""Implicit differentiation: the exact gradient of a fixed point, at the cost of one linear solve.

    z* = f(z*, θ)   ⇒   dL/dθ = (∂f/∂θ)ᵀ u   with   (I − Jᵀ) u = ∂L/∂z*,   J = ∂f/∂z at z*,
                         dz* = v              with   (I − J) v  = (∂f/∂θ) dθ.

Sources: Liao et al. (2018), arXiv 1803.06396 (recurrent back-propagation); Bai, Kolter and Koltun (2019),
arXiv 1909.01377, theorem 1; Rajeswaran et al. (2019), arXiv 1909.04630.

One tracked call f(z*) carries u on to parameters and inputs, whatever they are. Its graph is all that is kept for the
backward pass, and not even that is if f is checkpointed, by `torch.utils.checkpoint`. The error of the gradient is of
first order in the forward residual; that of u is at most ‖g − (I − Jᵀ) u‖ / (1 − ‖J‖). Derivatives up to order k take k
tracked calls, at states that are lifted; see `torchdeq.grad.lift`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchdeq._modes import join_dual, one_cotangent, refuse_transforms, split_dual
from torchdeq._replay import AutocastState, RandomState
from torchdeq._state import Map, with_tangents
from torchdeq.grad.adjoint import solve_adjoint
from torchdeq.grad.base import GradMethod, OnBackward
from torchdeq.grad.inverse import Inverse, vjp_of
from torchdeq.grad.lift import Lift, clipped_once, first_order_only
from torchdeq.solution import Reporter, Solution
from torchdeq.solver.base import SolverLoop, layout_of_map
from torchdeq.solver.gmres import GMRES
from torchdeq.solver.split_system import SplitSystems
from torchdeq.solver.splitting import Splitting, splits

ADJOINT_REMEDY = (
    "This was the adjoint solve of a backward pass, or that of a tangent. The residual is relative to the right-hand "
    "side, and the gradient's relative error is about this residual times the condition of I − J. Raise the adjoint "
    "solver's max_iter (b_max_iter) or its tol (b_tol), use GMRES(), or keep ‖J‖ below 1 (normalise the weights, "
    "regularise the Jacobian). An f in half precision allows no more than about 1e-2: IFT(solver=GMRES(tol=1e-2))."
)


@dataclass(frozen=True, kw_only=True, repr=False)
class IFT(GradMethod):
    """Implicit differentiation: the exact gradient, and exact derivatives of higher order where they are wanted.

    The cost of a first derivative is one adjoint solve whatever the order. Each order more adds one tracked call of f
    to the forward pass, with its graph. Forward-mode tangents are exact too, and so are their derivatives.

    Arguments:
        solver: solves the linear systems, of cotangents and of tangents. Its `tol` is relative to the norm of the
            right-hand side, per sample. Krylov solvers need the fewest products with Jᵀ; any solver works, for a
            `MonotoneMap` also `PeacemanRachford`, which uses the inverse of its forward solve again. In float32 a
            sample whose cotangent is below 1e-19 of the largest one in its batch counts as one without.
        hook: False: the backward pass evaluates f once more at z* and solves on that graph, in an
            autograd Function. True: it solves on the graph of the forward's tracked call, in a tensor
            hook: one evaluation less, while that graph is kept alive between forward and backward. Not within a
            non-reentrant checkpoint, which would make that graph, and the solve before it, again for each product.
        order: k ≥ 1, how many times the result may be differentiated in reverse mode; once more raises an error. A
            forward-mode tangent does not count: a Hessian–vector product by a tangent of a gradient, or by the
            gradient of a tangent, is right with order=1. The tangent of the gradient of a tangent needs one order more,
            and is NaN without. More than 1 is for hook=False.
        clip: c ≥ 1: per sample, u is shortened to ‖u‖ = c ‖g‖ where it is longer. This bounds how much the backward
            solve may amplify a cotangent, which for a contraction is by 1/(1 − ‖J‖) at most, so that a sample whose
            I − J is nearly singular does not drown the others of its batch. A gradient that is clipped is biased: its
            direction in u is right, its length is not. It is proportional to the loss's scale like one that is not.
            `Solution.clipped` says which samples were. First derivatives in reverse mode only. With `batch_dims=0`
            the state is one sample, and so it is where f is found to couple the samples. None: no bound.

    Raises:
        ValueError: an argument is out of its range.
        RuntimeError: when a derivative of higher order is taken; and under a transform of torch.func, for which there
            is `torchdeq.fixed_point`.

    Example:
        >>> import torch
        >>> a = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        >>> z, = IFT(order=2).attach(lambda z: a * z + 1, torch.full((1, 1), 2.0, dtype=torch.float64))
        >>> g, = torch.autograd.grad(z.sum(), a, create_graph=True)
        >>> h, = torch.autograd.grad(g, a)
        >>> round(g.item(), 6), round(h.item(), 6)  # z* = 1 / (1 − a), and so 1 / (1 − a)² and 2 / (1 − a)³
        (4.0, 16.0)
    """

    solver: SolverLoop = GMRES(tol=1e-5)  # noqa: RUF009 - frozen
    hook: bool = False
    order: int = 1
    clip: float | None = None

    def __post_init__(self) -> None:
        self.require(
            isinstance(self.solver, SolverLoop),
            f"solver must be a Solver such as GMRES(tol=1e-6), got {self.solver!r}; "
            f"as_solver makes one from a name",
        )
        self.require(
            isinstance(self.solver, Splitting) or not splits(self.solver),
            f"solver={self.solver!r} has a splitting in a chain. A splitting solves the linear systems of a monotone "
            f"map if it is given by itself: solver=PeacemanRachford(). A chain may hold solvers of any affine map, "
            f"such as GMRES()",
        )
        self.require(
            isinstance(self.order, int) and not isinstance(self.order, bool) and self.order >= 1,
            f"order is how often the result may be differentiated, an integer of at least 1, got {self.order!r}",
        )
        self.require(
            self.order == 1 or not self.hook,
            "a tensor hook gives first derivatives only. Use hook=False with order > 1",
        )
        self.require(
            self.clip is None
            or (isinstance(self.clip, int | float) and not isinstance(self.clip, bool) and self.clip >= 1),
            f"clip bounds ‖u‖ / ‖g‖, by how much the backward solve may amplify a cotangent, and must be a number of "
            f"at least 1, or None, got {self.clip!r}. To bound the gradient itself use torch.nn.utils.clip_grad_norm_",
        )
        self.require(
            self.clip is None or self.order == 1,
            "a gradient that is clipped is not differentiated further. Use order=1, or clip=None",
        )

    def attach(self, f: Map, z: Tensor, *, on_backward: OnBackward | None = None) -> list[Tensor]:
        """See `GradMethod.attach`. Returns [f(z)]."""
        refuse_transforms(lambda: repr(self))
        report = on_backward or Reporter(ADJOINT_REMEDY)
        z = z.detach()
        if self.hook and torch.is_grad_enabled():
            return [self._hooked(f, z.requires_grad_(), report)]
        device = z.device
        inverse = Inverse(
            with_tangents(f),
            self._linear(f),
            layout_of_map(f),
            report,
            AutocastState.capture(device),
            RandomState.capture(device),
            self.clip,
        )
        return [self._lifted(inverse, z)]

    def __call__(
        self,
        f: Map,
        z0: Tensor,
        solver: SolverLoop,
        *,
        record: Sequence[int] = (),
        on_backward: OnBackward | None = None,
    ) -> tuple[list[Tensor], Solution]:
        """See `GradMethod.__call__`."""
        refuse_transforms(lambda: repr(self))  # before the solve, which could say less about it
        return super().__call__(f, z0, solver, record=record, on_backward=on_backward)

    def _lifted(self, inverse: Inverse, z: Tensor) -> Tensor:
        """f(z) with derivatives: a chain of lifts of z, and beside it one of its tangent where f has one."""
        fz, t = split_dual(inverse.f(z))
        if t is not None and self.clip is not None:
            raise RuntimeError(clipped_once())
        v = None if t is None else inverse(t, z, fz, transposed=False)[0]
        if not torch.is_grad_enabled() or not (fz.requires_grad or (t is not None and t.requires_grad)):
            return join_dual(fz, v)
        point = fz.detach()  # what f gave here, to tell if it gives the same when it is evaluated again
        lift = functools.partial(Lift, inverse=inverse, order=self.order)
        fa, a_o, v_o = fz, None, None
        for _ in range(self.order - (v is None)):  # a tangent is a derivative more
            a_f, a_o = lift(value=z)(fa, a_o, z, point)
            v_f = None
            if v is not None and t is not None:
                v_f, v_o = lift(value=v, tangent=True)(t, v_o, z, point)
            with inverse.random.again():
                fa, t = split_dual(inverse.f(join_dual(a_f, v_f)))
        out = lift(value=point, last=True)(fa, a_o, z, point)
        if v is not None and t is not None:
            v = lift(value=v, tangent=True, last=True)(t, v_o, z, point)
        return join_dual(out, v)

    def _linear(self, f: Map) -> SolverLoop | SplitSystems:
        """The solver of the linear systems at states of f."""
        if not isinstance(self.solver, Splitting):
            return self.solver
        return SplitSystems(self.solver, self.solver.taken_apart(f), layout_of_map(f))

    def _hooked(self, f: Map, z: Tensor, report: OnBackward) -> Tensor:
        fz = f(z)
        if not fz.requires_grad:
            return fz
        layout, solver = layout_of_map(f), self._linear(f)
        if isinstance(solver, SplitSystems):
            solver = solver.at(z.detach(), transposed=True)
        # The last pass through the graph leaves Jᵀu on our private z; nobody wants it.
        z.register_post_accumulate_grad_hook(_drop_grad)

        def solve(g: Tensor | None) -> Tensor | None:
            if g is None:  # an undefined gradient stands for zero
                return None
            with torch.no_grad(), one_cotangent():
                u, solution = solve_adjoint(vjp_of(fz, z), g, solver, layout, clip=self.clip)
            report(solution)
            return first_order_only(u, g, fz, "" if self.clip is None else clipped_once())

        # The hook sits on a copy that the solve does not pass through, so it is never re-entered and needs
        # no removal: every backward pass solves, each call of the module its own system.
        out = fz.clone()  # not a view: an in-place operation on one would go past the hook
        out.register_hook(solve)
        return out.view_as(out)  # on which the caller's hooks see the cotangent as it comes


def _drop_grad(z: Tensor) -> None:
    z.grad = None
