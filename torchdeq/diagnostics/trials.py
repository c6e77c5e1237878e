"""One gradient method at work, and what it costs: on a copy of a model, or on a map of the user's."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import optree
import torch
from torch import Tensor, nn

from torchdeq._replay import RandomState
from torchdeq._state import Tree
from torchdeq.deq import DEQ
from torchdeq.diagnostics.memory import SavedBytes
from torchdeq.diagnostics.table import Row
from torchdeq.grad import IFT, SHINE, GradMethod, Reversible, Unroll
from torchdeq.solution import Solution
from torchdeq.solver import SolverLoop


class Trial:
    """What was measured of one method. A subclass makes the step.

    Arguments:
        name: of the method.
        device: where the step runs.
        uncounted: see `Row`.

    Attributes:
        forward: solutions of the forward solves of all steps.
        adjoint: those of the adjoint solves.
        failure: why there is no more to measure; '' if nothing is wrong.
    """

    def __init__(self, name: str, device: torch.device, uncounted: bool = False):
        self.name, self.device, self.uncounted = name, device, uncounted
        self.forward: list[Solution] = []
        self.adjoint: list[Solution] = []
        self.seconds: list[float] = []
        self.failure = ""
        self.random = RandomState.capture(device)

    def step(self) -> Tensor:
        """One forward and backward pass. Returns the gradient as one vector, float64."""
        raise NotImplementedError

    def value(self) -> float:
        """The loss, without a gradient. The methods of a comparison are called with one sequence of random numbers."""
        raise NotImplementedError

    def kept(self) -> Iterable[Tensor]:
        """Tensors that exist anyway, so that saving them costs nothing."""
        raise NotImplementedError

    def measure(self, exact: Tensor) -> None:
        """Everything but time. Serves as the step that warms up."""
        try:
            with self.random.again(), SavedBytes(ignore=self.kept()) as saved:
                g = self.step().to(exact.device)
        except Exception as error:  # a method that is not for this model is a row of the table
            lines = str(error).strip().splitlines()
            self.failure = f"{type(error).__name__}: {lines[0] if lines else ''}"
            return
        self.saved_bytes = saved.peak
        self.nfe = sum(s.nfe for s in self.forward)
        self.vjps = sum(s.nfe for s in self.adjoint) if self.adjoint else None
        self.residual = max(float(s.residual.max()) for s in self.forward)
        self.converged = all(bool(s.converged.all()) for s in [*self.forward, *self.adjoint])
        self.error = float((g - exact).norm() / exact.norm())
        self.cosine = float(torch.dot(g, exact) / (g.norm() * exact.norm()))

    def time(self) -> None:
        """One more step."""
        if self.failure:
            return
        with self.random.again():
            _synchronise(self.device)
            start = time.perf_counter()
            self.step()
            _synchronise(self.device)
            self.seconds.append(time.perf_counter() - start)

    def row(self) -> Row:
        """The row of the table."""
        if self.failure:
            return Row.failed(self.name, self.failure)
        several = len(self.seconds) > 1
        low, middle, high = (
            statistics.quantiles(self.seconds, n=4, method="inclusive") if several else self.seconds * 3
        )
        return Row(
            name=self.name,
            seconds=middle,
            quartiles=(low, high),
            nfe=self.nfe,
            vjps=self.vjps,
            residual=self.residual,
            converged=self.converged,
            saved_bytes=self.saved_bytes,
            error=self.error,
            cosine=self.cosine,
            uncounted=self.uncounted,
        )


class ModelTrial(Trial):
    """A method on a copy of the model; its gradient is that of all parameters."""

    def __init__(
        self,
        name: str,
        grad: GradMethod,
        solver: SolverLoop | None,
        model: nn.Module,
        loss: Callable[..., Tensor],
        inputs: Any,
    ):
        super().__init__(name, next(model.parameters()).device, _uncounted(grad))
        self.loss, self.inputs = loss, own_leaves(inputs)
        self.model = with_method(model, grad, solver, self.forward, self.adjoint)

    def step(self) -> Tensor:
        """See `Trial.step`."""
        self.forward.clear()
        self.adjoint.clear()
        return gradient_of(self.loss(self.model, *self.inputs), self.model)

    def value(self) -> float:
        """See `Trial.value`."""
        with torch.no_grad(), self.random.again():
            return float(self.loss(self.model, *self.inputs))

    def kept(self) -> Iterable[Tensor]:
        """Parameters, buffers and inputs."""
        yield from self.model.parameters()
        yield from self.model.buffers()
        yield from (t for t in optree.tree_leaves(self.inputs) if isinstance(t, Tensor))


class MapTrial(Trial):
    """A method on the user's f itself; its gradient is that of `wanted`, and no `.grad` is touched."""

    def __init__(
        self,
        name: str,
        grad: GradMethod,
        solver: SolverLoop | None,
        deq: DEQ,
        f: Callable[[Tree], Tree],
        z0: Tree,
        loss: Callable[[Tree], Tensor],
        wanted: list[Tensor],
        exists: list[Tensor],
    ):
        super().__init__(name, wanted[0].device, _uncounted(grad))
        self.deq = like(deq, grad, solver, self.adjoint)
        self.f, self.z0, self.loss, self.wanted, self.exists = f, z0, loss, wanted, exists

    def step(self) -> Tensor:
        """See `Trial.step`."""
        self.forward.clear()
        self.adjoint.clear()
        z, solution = self.deq(self.f, self.z0)
        self.forward.append(solution.detach())
        # Retained, since f may close over what has a graph of its own.
        found = torch.autograd.grad(self.loss(z), self.wanted, retain_graph=True, allow_unused=True)
        return _one_vector(self.wanted, found)

    def value(self) -> float:
        """See `Trial.value`."""
        with torch.no_grad(), self.random.again():
            return float(self.loss(self.deq(self.f, self.z0)[0]))

    def kept(self) -> Iterable[Tensor]:
        """What the user has anyway."""
        return [*self.wanted, *self.exists, *optree.tree_leaves(self.z0)]


def like(
    old: DEQ, grad: GradMethod, solver: SolverLoop | None, adjoint: list[Solution], *, throw: bool = False
) -> DEQ:
    """A DEQ as `old` is, with another method, which notes down its adjoint solutions.

    Recorded states get the method too; `IFT` if it is `SHINE`, which knows the last state only.
    """
    several = [*[IFT()] * len(old.record), grad]
    new = DEQ(
        solver or forward_solver(old),
        several if isinstance(grad, SHINE) else grad,
        record=old.record,
        batch_dims=old.batch_dims,
        throw=throw,
        on_backward=adjoint.append,
        modules=old.stateful,
        hold_noise=old.hold_noise,
    )
    return new.train(old.training)


def with_method(
    model: nn.Module,
    grad: GradMethod,
    solver: SolverLoop | None,
    forward: list[Solution],
    adjoint: list[Solution],
    throw: bool = False,
) -> nn.Module:
    """A copy of the model in which every DEQ uses this method and notes down its solutions."""
    memo: dict[int, Any] = {}
    pairs = [
        (old, like(old, grad, solver, adjoint, throw=throw))
        for old in model.modules()
        if isinstance(old, DEQ)
    ]
    for old, new in pairs:
        new.register_forward_hook(lambda _module, _args, out: forward.append(out[1].detach()))
        memo[id(old)] = new
    # deepcopy takes what the memo holds for a copy already made, so every reference to a DEQ is replaced.
    twin = copy.deepcopy(model, memo)
    for old, new in pairs:  # the modules that hold buffers are those of the copy
        new.stateful = copy.deepcopy(old.stateful, memo)
    return twin


def forward_solver(deq: DEQ) -> SolverLoop:
    """The solver that the module uses in the mode it is in."""
    return deq.solver if deq.training or deq.eval_solver is None else deq.eval_solver


def gradient_of(loss: Tensor, model: nn.Module) -> Tensor:
    """The gradient of the loss by all parameters, in one vector, float64. No `.grad` is touched, the loss's neither."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    return _one_vector(wanted, torch.autograd.grad(loss, wanted, allow_unused=True))


def own_leaves(inputs: Any) -> Any:
    """The inputs as leaves that no graph of the user's leads to."""
    return optree.tree_map(
        lambda t: t.detach().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t, inputs
    )


def _uncounted(grad: GradMethod) -> bool:
    return isinstance(grad, Reversible | SHINE) or (isinstance(grad, Unroll) and grad.checkpoint)


def _one_vector(wanted: Iterable[Tensor], found: Iterable[Tensor | None]) -> Tensor:
    parts = [torch.zeros_like(p) if g is None else g for p, g in zip(wanted, found, strict=True)]
    real = [torch.view_as_real(p.resolve_conj()) if p.is_complex() else p for p in parts]
    return torch.cat([p.detach().double().flatten() for p in real])


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
