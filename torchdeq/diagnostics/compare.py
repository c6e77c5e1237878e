"""What each gradient method costs, and how far its gradient is from the exact one, on one model."""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor, nn

from torchdeq.deq import DEQ
from torchdeq.diagnostics.memory import SavedBytes
from torchdeq.diagnostics.table import Comparison, Row
from torchdeq.grad import IFT, GradMethod, PhantomGrad, Unroll
from torchdeq.solution import ConvergenceError, ConvergenceWarning, Solution
from torchdeq.solver import GMRES, Anderson, FixedPointIteration, SolverLoop

Loss = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One row to be: a gradient method under a name, and the forward solver it needs, if it needs its own.

    Example:
        >>> Candidate(name="JFB", grad=PhantomGrad())
        Candidate(name='JFB', grad=PhantomGrad(), solver=None)
    """

    name: str
    grad: GradMethod
    solver: SolverLoop | None = None


def default_candidates(solver: SolverLoop, adjoint: SolverLoop | None = None) -> list[Candidate]:
    """The methods that `compare_gradients` compares unless told otherwise.

    Arguments:
        solver: the model's forward solver; unrolling runs Picard iteration to its tolerance.
        adjoint: the solver of the adjoint system; None for that of `IFT`.

    Example:
        >>> [c.name for c in default_candidates(Anderson())]
        ['IFT', 'IFT, hook', 'phantom, 1 step', 'phantom, 5 steps', 'unrolled']
    """
    adjoint = adjoint or IFT().solver
    picard = FixedPointIteration(
        tol=solver.tol, stop_mode=solver.stop_mode, max_iter=max(200, solver.max_iter)
    )
    return [
        Candidate(name="IFT", grad=IFT(solver=adjoint)),
        Candidate(name="IFT, hook", grad=IFT(solver=adjoint, hook=True)),
        Candidate(name="phantom, 1 step", grad=PhantomGrad(steps=1)),
        Candidate(name="phantom, 5 steps", grad=PhantomGrad(steps=5)),
        Candidate(name="unrolled", grad=Unroll(), solver=picard),
    ]


def compare_gradients(
    model: nn.Module,
    loss: Loss,
    *inputs: Any,
    candidates: Sequence[Candidate] | None = None,
    repeats: int = 7,
    exact_tol: float = 1e-10,
) -> Comparison:
    """Run one training step of the model with each gradient method, and compare cost and gradient.

    The model is not changed: each method works on a copy of it, in which every `DEQ` is replaced by one with
    this method. The exact gradient comes from a copy in float64, solved forward and backward to `exact_tol`.

    Arguments:
        model: a module that contains at least one `DEQ`.
        loss: `loss(model, *inputs)` makes the scalar loss. It must get its tensors from these arguments, so
            that it can be called in float64 too, and must give the same number each time: put dropout in
            eval mode.
        *inputs: tensors, or pytrees of them; floating-point ones are cast for the float64 run.
        candidates: the methods to compare; None for `default_candidates`.
        repeats: how many steps are timed, after one that is not; the methods take turns.
        exact_tol: relative residual of the reference, forward and adjoint.

    Returns:
        A `Comparison`. Seconds are of forward and backward together, without an optimiser. Saved bytes are
        those of the distinct storages autograd holds to differentiate, at their peak in forward and backward,
        without parameters, buffers and inputs; the work space of solvers is not among them.

    Raises:
        ValueError: the model has no DEQ, no parameter wants a gradient, or `repeats` is below 1.
        ConvergenceError: the reference did not converge, so that there is nothing to compare with.

    Example:
        >>> class Model(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer, self.deq = nn.Linear(6, 6), DEQ(Anderson(tol=1e-5))
        ...     def forward(self, x):
        ...         return self.deq(lambda z: torch.tanh(0.5 * self.layer(z) + x), torch.zeros_like(x))[0]
        >>> _ = torch.manual_seed(0)
        >>> table = compare_gradients(Model(), lambda m, x: m(x).square().mean(), torch.randn(4, 6), repeats=1)
        >>> error = {row.name: row.error for row in table.rows}
        >>> error["IFT"] < 1e-4 < error["phantom, 1 step"]
        True
    """
    if repeats < 1:
        raise ValueError(f"compare_gradients(repeats={repeats!r}): expected at least 1 timed step.")
    deqs = [m for m in model.modules() if isinstance(m, DEQ)]
    if not deqs:
        raise ValueError(
            f"compare_gradients: {type(model).__name__} contains no torchdeq.DEQ whose gradient method could be "
            f"changed. Make the DEQ an attribute of the model."
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("compare_gradients: no parameter of the model has requires_grad=True.")
    if candidates is None:
        last = deqs[0].grad if isinstance(deqs[0].grad, GradMethod) else deqs[0].grad[-1]
        candidates = default_candidates(
            _forward_solver(deqs[0]), last.solver if isinstance(last, IFT) else None
        )

    exact = _exact_gradient(model, loss, inputs, exact_tol)
    trials = [_Trial(model, loss, inputs, candidate) for candidate in candidates]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a column of the table says it
        for trial in trials:
            trial.measure(exact)
        for _ in range(repeats):
            for trial in trials:
                trial.time()
    parameter = next(model.parameters())
    setting = (
        f"{parameter.dtype} on {parameter.device}, {torch.get_num_threads()} threads, torch {torch.__version__}; time: "
        f"median and quartiles of {repeats}; exact: float64 to {exact_tol:.0e}.".replace("torch.", "", 1)
    )
    return Comparison(rows=tuple(trial.row() for trial in trials), setting=setting)


class _Trial:
    """A copy of the model with one gradient method, and what was measured on it."""

    def __init__(self, model: nn.Module, loss: Loss, inputs: Any, candidate: Candidate):
        self.forward: list[Solution] = []
        self.adjoint: list[Solution] = []
        self.candidate, self.loss, self.inputs = candidate, loss, inputs
        self.model = _with_method(model, candidate.grad, candidate.solver, self.forward, self.adjoint)
        self.seconds: list[float] = []

    def step(self) -> None:
        self.forward.clear()
        self.adjoint.clear()
        self.model.zero_grad(set_to_none=True)
        self.loss(self.model, *self.inputs).backward()

    def measure(self, exact: Tensor) -> None:
        """Everything but time. Serves as the step that warms up."""
        leaves: list[Any] = optree.tree_leaves(self.inputs)
        apart = [t for t in leaves if isinstance(t, Tensor)]
        with SavedBytes(ignore=[*self.model.parameters(), *self.model.buffers(), *apart]) as saved:
            self.step()
        self.saved_bytes = saved.peak
        self.nfe = sum(s.nfe for s in self.forward)
        self.vjps = sum(s.nfe for s in self.adjoint) if self.adjoint else None
        self.residual = max(float(s.residual.max()) for s in self.forward)
        self.converged = all(bool(s.converged.all()) for s in [*self.forward, *self.adjoint])
        g = _gradient(self.model).to(exact.device)
        self.error = float((g - exact).norm() / exact.norm())
        self.cosine = float(torch.dot(g, exact) / (g.norm() * exact.norm()))

    def time(self) -> None:
        _synchronise(self.model)
        start = time.perf_counter()
        self.step()
        _synchronise(self.model)
        self.seconds.append(time.perf_counter() - start)

    def row(self) -> Row:
        several = len(self.seconds) > 1
        low, middle, high = (
            statistics.quantiles(self.seconds, n=4, method="inclusive") if several else self.seconds * 3
        )
        return Row(
            name=self.candidate.name,
            seconds=middle,
            quartiles=(low, high),
            nfe=self.nfe,
            vjps=self.vjps,
            residual=self.residual,
            converged=self.converged,
            saved_bytes=self.saved_bytes,
            error=self.error,
            cosine=self.cosine,
        )


def _exact_gradient(model: nn.Module, loss: Loss, inputs: Any, tol: float) -> Tensor:
    """The gradient of all parameters in one vector, float64."""
    solver = Anderson(tol=tol, stop_mode="rel", max_iter=1000)
    method = IFT(solver=GMRES(tol=tol, max_iter=300))
    exact = _with_method(model, method, solver, [], [], throw=True).double()
    cast: Any = optree.tree_map(
        lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, inputs
    )
    try:
        loss(exact, *cast).backward()
    except ConvergenceError as error:
        raise ConvergenceError(
            f"compare_gradients: the float64 reference did not reach exact_tol={tol:.0e}, so there is no exact "
            f"gradient to compare with. {error}"
        ) from error
    return _gradient(exact)


def _with_method(
    model: nn.Module,
    grad: GradMethod,
    solver: SolverLoop | None,
    forward: list[Solution],
    adjoint: list[Solution],
    throw: bool = False,
) -> nn.Module:
    """A copy of the model in which every DEQ uses this method and notes down its solutions."""
    memo: dict[int, Any] = {}
    for old in model.modules():
        if isinstance(old, DEQ):
            new = DEQ(
                solver or _forward_solver(old),
                grad,
                record=old.record,
                batch_dims=old.batch_dims,
                throw=throw,
                on_backward=adjoint.append,
            )
            new.register_forward_hook(lambda _module, _args, out: forward.append(out[1].detach()))
            memo[id(old)] = new.train(old.training)
    # deepcopy takes what the memo holds for a copy already made, so every reference to a DEQ is replaced.
    return copy.deepcopy(model, memo)


def _forward_solver(deq: DEQ) -> SolverLoop:
    return deq.solver if deq.training or deq.eval_solver is None else deq.eval_solver


def _gradient(model: nn.Module) -> Tensor:
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad]
    return torch.cat([part.detach().double().flatten() for part in parts])


def _synchronise(model: nn.Module) -> None:
    device = next(model.parameters()).device
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
