"""A pure map with all that its solves need, and those solves on plain tensors, below all transforms of torch.func.

Under vmap the solvers stay outside: the mapped dimension is folded into the batch of the solver, and only f is mapped.
So each mapped instance has its own coefficients and its own stop test. `torchdeq.grad.pure` differentiates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchdeq._modes import is_tracked, map_levels
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
        known = set().union(*(map_levels(t) for t in (z, *theta)))
        with torch.set_grad_enabled(self.guards), self.amp.on(), self.noise.state.again():
            fz = self.image(z.detach().clone(), *(t.detach() for t in theta))
        if is_tracked(fz) or not map_levels(fz) <= known:
            raise RuntimeError(_CLOSES_OVER)
        return dataclasses.replace(self, looks=1)


_SCALE_FREE = (GMRES, BiCGSTAB, CG)  # what they find for (sA) x = s b does not depend on s

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
            if is_tracked(fz):
                raise RuntimeError(_CLOSES_OVER)
        system.noise.watch()
        if not z.requires_grad:
            return fz
        self.looks = 1
        return None
