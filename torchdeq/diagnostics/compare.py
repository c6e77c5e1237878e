"""What each gradient method costs, and how far its gradient is from the exact one, on one model or one map."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import optree
import torch
from torch import Tensor, nn

from torchdeq._replay import RandomState
from torchdeq._state import Tree, layout_of
from torchdeq.deq import DEQ
from torchdeq.diagnostics.inside import Inside
from torchdeq.diagnostics.leaves import leaves_of
from torchdeq.diagnostics.table import Comparison
from torchdeq.diagnostics.trials import (
    MapTrial,
    ModelTrial,
    Trial,
    forward_solver,
    gradient_of,
    own_leaves,
    with_method,
)
from torchdeq.grad import (
    IFT,
    JFB,
    SHINE,
    GradMethod,
    NeumannPhantom,
    PhantomGrad,
    Reversible,
    TruncatedCycle,
    Unroll,
)
from torchdeq.solution import ConvergenceError, ConvergenceWarning, CouplingWarning, Solution
from torchdeq.solver import (
    GMRES,
    Broyden,
    FixedPointIteration,
    Multisecant,
    SimpleFixedPointIteration,
    SolverLoop,
)

_REVERSIBLE = 43  # evaluations that Reversible(beta=0.5) can undo in float64


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
    """The methods that `compare_gradients` compares unless told otherwise: all there are.

    Arguments:
        solver: the model's forward solver. Methods that differentiate steps run plain iteration to its tolerance
            instead: in at most 200 evaluations; 43 for `Reversible`, which cannot undo more; exactly its `max_iter` for
            `TruncatedCycle`. `SHINE` runs `Broyden` where `solver` learns nothing of the inverse.
        adjoint: the solver of the adjoint system; None for that of `IFT`.

    Example:
        >>> [c.name for c in default_candidates(Multisecant())][:4]
        ['IFT', 'IFT, hook', 'IFT, order 2', 'JFB']
    """
    adjoint = adjoint or IFT().solver
    stop: dict[str, Any] = {"tol": solver.tol, "stop_mode": solver.stop_mode}
    learner = None if solver.learns else Broyden(max_iter=solver.max_iter, **stop)
    picard = FixedPointIteration(max_iter=max(200, solver.max_iter), **stop)
    return [
        Candidate(name="IFT", grad=IFT(solver=adjoint)),
        Candidate(name="IFT, hook", grad=IFT(solver=adjoint, hook=True)),
        Candidate(name="IFT, order 2", grad=IFT(solver=adjoint, order=2)),
        Candidate(name="JFB", grad=JFB()),
        Candidate(name="phantom, 5 steps", grad=PhantomGrad(steps=5)),
        Candidate(name="phantom, 5 terms", grad=NeumannPhantom(terms=5)),
        Candidate(name="SHINE", grad=SHINE(), solver=learner),
        Candidate(name="SHINE, refined", grad=SHINE(refine=GMRES(tol=adjoint.tol)), solver=learner),
        Candidate(name="unrolled", grad=Unroll(), solver=picard),
        Candidate(name="unrolled, last 5", grad=Unroll(last=5), solver=picard),
        Candidate(
            name="reversible",
            grad=Reversible(dtype=torch.float64),
            solver=FixedPointIteration(max_iter=_REVERSIBLE, **stop),
        ),
        Candidate(
            name="truncated cycle",
            grad=TruncatedCycle(),
            solver=SimpleFixedPointIteration(max_iter=solver.max_iter, **stop),
        ),
    ]


@overload
def compare_gradients(
    model: nn.Module,
    loss: Callable[..., Tensor],
    *inputs: Any,
    candidates: Sequence[Candidate] | None = None,
    repeats: int = 7,
    exact_tol: float = 1e-10,
) -> Comparison: ...


@overload
def compare_gradients(
    model: DEQ,
    loss: Callable[[Tree], Tree],
    z0: Tree,
    loss_of_z: Callable[[Tree], Tensor],
    /,
    *,
    candidates: Sequence[Candidate] | None = None,
    repeats: int = 7,
    exact_tol: float = 1e-10,
) -> Comparison: ...


def compare_gradients(
    model: nn.Module,
    loss: Callable[..., Any],
    *inputs: Any,
    candidates: Sequence[Candidate] | None = None,
    repeats: int = 7,
    exact_tol: float = 1e-10,
) -> Comparison:
    """Run one training step with each gradient method, and compare cost and gradient.

    There are two forms.

    * `compare_gradients(model, loss, *inputs)`: a model that contains at least one `DEQ`. It is not changed: each
      method works on a copy of it, in which every `DEQ` is replaced by one with this method. The gradient is that of
      all parameters. The exact one comes from a copy in float64, solved forward and backward to `exact_tol`. Neither
      the `.grad` of inputs nor torch's random state is changed.
    * `compare_gradients(deq, f, z0, loss)`: a `DEQ` by itself, and what it would be called with. The gradient is that
      of the leaf tensors that f depends on, and no `.grad` is touched. f cannot be cast, so the exact gradient is
      computed in the precision of z0, to `exact_tol` or as near as rounding lets it come, which the last line of the
      table says. Random state, and buffers and tensors that f is seen to hold, are put back.

    A method that fails on this model has a row that says so, and why below the table.

    Arguments:
        model: see above.
        loss: `loss(model, *inputs)` makes the scalar loss. It must get its tensors from these arguments, so
            that it can be called in float64 too, and must give the same number each time. All steps draw the same
            random numbers of torch, which is enough for dropout on a CPU; elsewhere put it in eval mode. In the second
            form, f.
        *inputs: tensors, or pytrees of them; floating-point ones are cast for the float64 run. In the second form, the
            start z0, and `loss(z)`, which makes the scalar loss from the solution.
        candidates: the methods to compare; None for `default_candidates`.
        repeats: how many steps are timed, after one that is not; the methods take turns.
        exact_tol: relative residual of the reference, forward and adjoint.

    Returns:
        A `Comparison`. Seconds are of forward and backward together, without an optimiser. Saved bytes are
        those of the distinct storages autograd holds to differentiate, at their peak in forward and backward,
        without parameters, buffers and inputs; neither the work space of solvers is among them, nor what a method
        evaluates again in the backward pass, or `SHINE` keeps of the solve (marked °).

    Raises:
        ValueError: the model has no DEQ or calls none, nothing wants a gradient, the exact gradient is zero, the loss
            is not the same each time, or `repeats` is below 1.
        TypeError: the second form with something else than a `torchdeq.DEQ`.
        ConvergenceError: the reference did not converge, so that there is nothing to compare with.

    Example:
        >>> class Model(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer, self.deq = nn.Linear(6, 6), DEQ(Multisecant(tol=1e-5))
        ...     def forward(self, x):
        ...         return self.deq(lambda z: torch.tanh(0.5 * self.layer(z) + x), torch.zeros_like(x))[0]
        >>> _ = torch.manual_seed(0)
        >>> table = compare_gradients(Model(), lambda m, x: m(x).square().mean(), torch.randn(4, 6), repeats=1)
        >>> error = {row.name: row.error for row in table.rows}
        >>> error["IFT"] < 1e-4 < error["JFB"]
        True

        The same map, without a model around it:

        >>> layer, x = nn.Linear(6, 6), torch.randn(4, 6)
        >>> f = lambda z: torch.tanh(0.5 * layer(z) + x)
        >>> table = compare_gradients(DEQ(Multisecant(tol=1e-5)), f, torch.zeros(4, 6), lambda z: z.square().mean())
        >>> {row.name: row.cosine > 0.999 for row in table.rows}["IFT"]
        True
    """
    if repeats < 1:
        raise ValueError(f"compare_gradients(repeats={repeats!r}): expected at least 1 timed step.")
    if len(inputs) == 2 and callable(inputs[1]) and callable(loss):
        if isinstance(model, DEQ):
            return _compare_on_map(model, loss, *inputs, candidates, repeats, exact_tol)
        if not any(isinstance(m, DEQ) for m in model.modules()):
            raise TypeError(
                f"compare_gradients(deq, f, z0, loss) exchanges the gradient method of a torchdeq.DEQ, and got a "
                f"{type(model).__name__}. Give a DEQ with the solver you use, such as DEQ(Anderson(tol=1e-4))."
            )
    return _compare_on_model(model, loss, inputs, candidates, repeats, exact_tol)


def _compare_on_model(
    model: nn.Module,
    loss: Callable[..., Tensor],
    inputs: Any,
    candidates: Sequence[Candidate] | None,
    repeats: int,
    exact_tol: float,
) -> Comparison:
    deqs = [m for m in model.modules() if isinstance(m, DEQ)]
    if not deqs:
        raise ValueError(
            f"compare_gradients: {type(model).__name__} contains no torchdeq.DEQ whose gradient method could be "
            f"changed. Make the DEQ an attribute of the model."
        )
    if not any(p.requires_grad for p in model.parameters()):
        hint = (
            " For a DEQ by itself say what it is called with: compare_gradients(deq, f, z0, loss)."
            if isinstance(model, DEQ)
            else ""
        )
        raise ValueError(f"compare_gradients: no parameter of the model has requires_grad=True.{hint}")
    parameter = next(model.parameters())
    # Outside the steps, which begin with these numbers each, only what the loss does to the generators is to undo.
    with RandomState.capture(parameter.device).again():
        exact = _exact_on_model(model, loss, inputs, exact_tol)

        def trial(c: Candidate) -> ModelTrial:
            return ModelTrial(c.name, c.grad, c.solver, model, loss, inputs)

        trials = [trial(c) for c in candidates or _candidates_for(deqs[0])]
        return _compare(trial, trials, exact, repeats, parameter, f"float64 to {exact_tol:.0e}")


def _compare_on_map(
    deq: DEQ,
    f: Callable[[Tree], Tree],
    z0: Tree,
    loss: Callable[[Tree], Tensor],
    candidates: Sequence[Candidate] | None,
    repeats: int,
    exact_tol: float,
) -> Comparison:
    first = optree.tree_leaves(z0)[0] if optree.tree_leaves(z0) else None
    layout = layout_of(z0, deq.batch_dims)  # what is wrong with z0 is said here
    assert isinstance(first, Tensor)
    inside = Inside((f, loss))
    with inside.untouched(first.device):
        wanted = _leaves_of_map(f, z0)
        exists = [*inside.tensors.values(), *(b for m in inside.modules.values() for b in m.buffers())]

        def trial(c: Candidate) -> MapTrial:
            return MapTrial(c.name, c.grad, c.solver, deq, f, z0, loss, wanted, exists)

        exact, precision = _exact_on_map(
            trial, max(torch.finfo(dtype).eps for dtype in layout.dtypes), exact_tol, first.dtype
        )
        trials = [trial(c) for c in candidates or _candidates_for(deq)]
        return _compare(trial, trials, exact, repeats, first, precision)


def _compare(
    make: Callable[[Candidate], Trial],
    trials: Sequence[Trial],
    exact: Tensor,
    repeats: int,
    sample: Tensor,
    precision: str,
) -> Comparison:
    if not bool(exact.any()):
        raise ValueError(
            "compare_gradients: the exact gradient is zero, so there is no relative error to give. Look for detach() "
            "in the loss or for parameters that it does not reach; or take other inputs, if this is its minimum."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a column of the table says it
        warnings.simplefilter("ignore", CouplingWarning)
        _check_repeatable(make, sample.dtype)
        for trial in trials:
            trial.measure(exact)
        for _ in range(repeats):
            for trial in trials:
                trial.time()
    setting = (
        f"{_short(sample.dtype)} on {sample.device}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"time: median and quartiles of {repeats}; exact: {precision}."
    )
    return Comparison(rows=tuple(trial.row() for trial in trials), setting=setting)


def _check_repeatable(make: Callable[[Candidate], Trial], dtype: torch.dtype) -> None:
    """That one method, begun anew, gives one loss: what differs by more than that is the method's doing."""
    candidate = Candidate(name="twice", grad=IFT())
    once, twice = make(candidate).value(), make(candidate).value()
    if abs(once - twice) > torch.finfo(dtype).eps ** 0.5 * max(abs(once), abs(twice)):
        raise ValueError(
            f"compare_gradients: the loss was {once:.6g} and then {twice:.6g}, with the same method, weights and "
            f"random numbers of torch, so gradients cannot be compared. Look for what each call changes, such as a "
            f"torch.Generator, random numbers of NumPy or Python, or a counter, and hold it fixed."
        )


def _candidates_for(deq: DEQ) -> list[Candidate]:
    last = deq.grad if isinstance(deq.grad, GradMethod) else deq.grad[-1]
    return default_candidates(forward_solver(deq), last.solver if isinstance(last, IFT) else None)


def _exact_on_model(model: nn.Module, loss: Callable[..., Tensor], inputs: Any, tol: float) -> Tensor:
    """The gradient of all parameters in one vector, float64."""
    solver = Multisecant(tol=tol, stop_mode="rel", max_iter=1000)
    method = IFT(solver=GMRES(tol=tol, max_iter=300))
    called: list[Solution] = []
    exact = with_method(model, method, solver, called, [], throw=True).double()
    cast: Any = optree.tree_map(
        lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, own_leaves(inputs)
    )
    try:
        with RandomState.capture(next(model.parameters()).device).again():
            found = gradient_of(loss(exact, *cast), exact)
    except ConvergenceError as error:
        raise ConvergenceError(
            f"compare_gradients: the float64 reference did not reach exact_tol={tol:.0e}, so there is no exact "
            f"gradient to compare with. {error}"
        ) from error
    if not called:
        raise ValueError(
            f"compare_gradients: loss(model, *inputs) called no torchdeq.DEQ of the copy of {type(model).__name__} it "
            f"was given, so there is no gradient method to compare. It must call the model of its first argument, and "
            f"that the DEQ."
        )
    return found


def _exact_on_map(
    trial: Callable[[Candidate], MapTrial], eps: float, tol: float, dtype: torch.dtype
) -> tuple[Tensor, str]:
    """The gradient as near as the precision of f lets it come, and how near that is, in words."""
    candidate = Candidate(
        name="exact",
        grad=IFT(solver=GMRES(tol=tol, max_iter=300)),
        solver=Multisecant(tol=tol, stop_mode="rel", max_iter=1000),
    )
    reference = trial(candidate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", CouplingWarning)
        with reference.random.again():
            exact = reference.step()
    forward = max(float(s.residual.max()) for s in reference.forward)
    adjoint = max((float(s.residual.max()) for s in reference.adjoint), default=0.0)
    allowed = max(tol, min(1e3 * eps, 0.1))
    if not (forward <= allowed and adjoint <= allowed and bool(exact.isfinite().all())):
        raise ConvergenceError(
            f"compare_gradients: the reference in {_short(dtype)} stopped at the relative residuals {forward:.0e} "
            f"(forward) and {adjoint:.0e} (adjoint), above {allowed:.0e}, so there is no exact gradient to compare "
            f"with. Look at check_fixed_point(f, z0); give exact_tol={max(forward, adjoint):.0e} if that will do."
        )
    if max(forward, adjoint) <= tol:
        return exact, f"{_short(dtype)} to {tol:.0e}"
    return exact, f"{_short(dtype)}, residuals {forward:.0e} forward and {adjoint:.0e} adjoint"


def _leaves_of_map(f: Callable[[Tree], Tree], z0: Tree) -> list[Tensor]:
    """What the gradient is to be taken of: the leaves that f depends on, and its parameters if it is a module."""
    with torch.enable_grad():
        image = f(optree.tree_map(lambda t: t.detach().clone(), z0))
    found = leaves_of([leaf for leaf in optree.tree_leaves(image) if isinstance(leaf, Tensor)])
    if isinstance(f, nn.Module):
        seen = {id(t) for t in found}
        found += [p for p in f.parameters() if p.requires_grad and id(p) not in seen]
    if not found:
        raise ValueError(
            "compare_gradients(deq, f, z0, loss): f(z0) depends on no tensor that requires a gradient, so there is no "
            "gradient to compare. Call requires_grad_() on parameters or inputs."
        )
    return found


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
