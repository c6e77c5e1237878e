"""Implicit MAML: meta-parameters whose adaptation to a task is a minimum, differentiated as one.

    φ*(θ) = argmin_φ  L(φ; support) + λ/2 ‖φ − θ‖²,      dφ*/dθ = (I + ∇²L(φ*) / λ)⁻¹.

The meta-gradient is (I + ∇²L/λ)⁻¹ ∇L(φ*; query). It needs φ* and not the way there, so the inner solver may be any, and
memory does not grow with its steps. The linear system is symmetric, and positive definite at a minimum: conjugate
gradients on products with the Hessian. One step of gradient descent, f(φ) = φ − α ∇(L + λ/2 ‖φ − θ‖²), is the map whose
fixed point φ* is; so every gradient method of the library will do in the place of CG, with `deq=...`.

Source: Rajeswaran, Finn, Kakade and Levine (2019), arXiv 1909.04630, equations 4, 6 and 7. Departure: CG starts
at 0 and ends where it meets a direction in which the regularised loss curves down. There λ is too small for the paper's
assumptions; in the first step such a task has a meta-gradient of zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from torchdeq import CG, DEQ, Solution, implicit_minimum

Parameters = dict[str, Tensor]  # by name; with one more dimension in front, those of T tasks
FIVE_STEPS = CG(max_iter=6, min_iter=6, tol=math.inf)  # the sixth evaluation measures the residual


class IMAML(nn.Module):
    """A network that adapts to tasks, and meta-parameters θ that learn from how well it does.

    Arguments:
        network: what adapts, x (K, ...) -> predictions (K, ...). Its parameters are θ. It is called under `vmap`, for
            all tasks at once: no batch norm in training mode.
        loss: L of one task, (predictions, targets) -> (), a mean over its samples.
        penalty: λ > 0, how strongly φ is held to θ; it must exceed the most negative curvature of L. The paper has 2
            for Omniglot and 0.5 for Mini-ImageNet.
        rate: α > 0, the step of the inner gradient descent, below 2 over the largest curvature.
        steps: N ≥ 1, how many of them. 16 is the paper's for 5-way Omniglot.
        adjoint: solves for the meta-gradient. The paper's five steps of CG leave the system unsolved, which tol=inf
            says is meant; a `ConvergenceWarning` of the backward pass says where CG broke down.
        solver: finds φ* in the place of gradient descent: what `implicit_minimum` takes, such as
            `NewtonCG(tol=1e-4)`. None: N steps of gradient descent.
        deq: solves and differentiates φ = f(φ), in the place of `implicit_minimum`, `solver` and `adjoint`.

    Attributes:
        solution: of the last call, the `Solution` of the inner problem; its absolute residual is the slope there.
        linear: of the last backward pass, that of the system for the meta-gradient; None with `deq`.

    Raises:
        ValueError: a value is out of range, or `solver` and `deq` are both given.

    Example:
        Tasks y = w x + noise. What is learned is where to start: near the mean of their w.

        >>> import torch
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch._C.Generator object at 0x...>
        >>> model = IMAML(nn.Linear(1, 1), nn.functional.mse_loss, rate=0.2, steps=30)
        >>> w, x = torch.tensor([2.0, 3.0, 4.0]).reshape(3, 1, 1), torch.randn(3, 20, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> for _ in range(10):
        ...     loss = (model(x[:, :10], w * x[:, :10], x[:, 10:]) - w * x[:, 10:]).square().mean()
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        >>> 2.5 < model.network.weight.item() < 3.5
        True
    """

    solution: Solution | None = None
    linear: Solution | None = None

    def __init__(
        self,
        network: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        penalty: float = 2.0,
        rate: float = 0.1,
        steps: int = 16,
        adjoint: Any = FIVE_STEPS,
        solver: Any = None,
        deq: DEQ | None = None,
    ):
        super().__init__()
        for name, value in (("penalty", penalty), ("rate", rate), ("steps", steps)):
            if not value > 0:
                raise ValueError(f"IMAML({name}={value!r}): expected a number above 0.")
        if solver is not None and deq is not None:
            raise ValueError(
                "IMAML(solver=..., deq=...): a DEQ has a solver of its own. Give one of them, or DEQ(solver, grad)."
            )
        self.network, self.loss = network, loss
        self.penalty, self.rate, self.steps = penalty, rate, steps
        self.solver, self.adjoint, self.deq = solver, adjoint, deq

    def forward(self, x: Tensor, y: Tensor, query: Tensor) -> Tensor:
        """Predictions (T, Q, ...) for `query` (T, Q, ...), after adapting to x (T, K, ...) and y (T, K, ...)."""
        return self.predictions(self.adapted(x, y), query)

    def adapted(self, x: Tensor, y: Tensor) -> Parameters:
        """φ* of T tasks, each (T, ...), from their x (T, K, ...) and y (T, K, ...); a function of θ."""
        theta = {name: p.expand(len(x), *p.shape) for name, p in self.network.named_parameters()}
        start = {name: p.detach().clone() for name, p in theta.items()}
        if self.deq is not None:
            phi, self.solution = self.deq(lambda phi: self._step(phi, theta, x, y), start)
            return phi
        # A truncated descent is meant; the other solvers have a tolerance of their own.
        own = {"solver": self._descend, "tol": torch.inf} if self.solver is None else {"solver": self.solver}
        phi, self.solution = implicit_minimum(
            self.objective,
            start,
            theta,
            x,
            y,
            adjoint=self.adjoint,
            batch_dims=1,
            probes=0,
            return_solution=True,
            on_backward=lambda linear: setattr(self, "linear", linear),
            **own,
        )
        return phi

    def predictions(self, phi: Parameters, x: Tensor) -> Tensor:
        """(T, Q, ...) of networks with parameters phi for x (T, Q, ...)."""
        return vmap(lambda p, x: functional_call(self.network, p, (x,)))(phi, x)

    def objective(self, phi: Parameters, theta: Parameters, x: Tensor, y: Tensor) -> Tensor:
        """L(φ) + λ/2 ‖φ − θ‖², summed over the tasks, ()."""
        fit = vmap(self.loss)(self.predictions(phi, x), y).sum()
        return fit + self.penalty / 2 * torch.stack([(phi[n] - theta[n]).square().sum() for n in phi]).sum()

    def _step(self, phi: Parameters, theta: Parameters, x: Tensor, y: Tensor) -> Parameters:
        slope = grad(self.objective)(phi, theta, x, y)
        return {name: p - self.rate * slope[name] for name, p in phi.items()}

    def _descend(self, objective: Any, start: Parameters, *data: Any) -> Parameters:
        """`steps` of `_step`, by autograd, which costs less than torch.func where no derivative is wanted of them."""
        phi = start
        for _ in range(self.steps):
            phi = {name: p.detach().requires_grad_() for name, p in phi.items()}
            with torch.enable_grad():
                slope = torch.autograd.grad(objective(phi, *data), list(phi.values()))
            phi = {name: p - self.rate * g for (name, p), g in zip(phi.items(), slope, strict=True)}
        return {name: p.detach() for name, p in phi.items()}
