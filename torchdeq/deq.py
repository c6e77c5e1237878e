"""The front door: a module that solves z = f(z) and gives the solution its derivative."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import optree
import torch
from torch import Tensor, nn

from torchdeq._held import draws_noise, hold, release, sharing
from torchdeq._method import Method
from torchdeq._modes import in_dual_level, one_batch, refuse_transforms
from torchdeq._replay import RandomState
from torchdeq._state import Tree, layout_of
from torchdeq.grad.base import GradMethod, OnBackward
from torchdeq.grad.fixed_count import check_fixed, solve_fixed
from torchdeq.grad.ift import ADJOINT_REMEDY, IFT
from torchdeq.grad.reversible import Reversible
from torchdeq.grad.unroll import Unroll
from torchdeq.solution import Reporter, Solution
from torchdeq.solver.base import SolverLoop, flatten_map, unravel_solution
from torchdeq.solver.compiled import Compiled
from torchdeq.solver.exported import solve_exported
from torchdeq.solver.fp_iter import FixedPointIteration
from torchdeq.solver.graphs import Graphs
from torchdeq.solver.maps import AffineMap
from torchdeq.solver.multisecant import Multisecant

FORWARD_REMEDY = (
    "The returned state is the best one found, not a fixed point to this tolerance. Raise max_iter or tol, try "
    "another solver, or make f more contractive (normalise its weights). This module does not repeat the "
    "warning; read Solution.converged."
)


class DEQ(nn.Module):
    """z* = f(z*), solved in the forward pass and differentiated by the method of your choice.

    Arguments:
        solver: the forward solver.
        grad: the gradient method; or one for each state of `record` and, last, one for the solution.
        eval_solver: the forward solver when the module is in eval mode; None for the same one.
        record: evaluations after which to sample the forward trajectory into `Solution.states`, each state
            with its gradient.
        batch_dims: how many leading dimensions of the state count samples. 1: the first is the batch.
            0: the state is one system, as for a graph or any f in which everything depends on everything.
            2: one sample per token.
        throw: raise a `ConvergenceError` when a sample does not converge, forward or backward, rather than
            warn once.
        on_backward: called with the `Solution` of the adjoint solve after each backward pass.
        modules: the modules, one or several, whose buffers f changes in training mode. None: those that f is seen
            to be made of: f itself, what it is a method of, what a closure or a `functools.partial` holds, the
            globals it names. Name them if f reaches them in another way.
        compile: True: solve by `torch.compile`, the forward solve and that of `IFT`, each with f as one graph; or a
            mapping of options of `torch.compile`, such as {"backend": "aot_eager"}. The same results to rounding, in
            less time where f is small; the first call takes long. For f that torch can capture, the solvers
            FixedPointIteration, Anderson, Broyden and Multisecant, and GMRES in `IFT`. See `compile`. 'fixed': make all
            `max_iter` evaluations of the forward solver, and of that in `IFT`, and read nothing on the way. Then a
            function with this module in it, a whole training step, is one graph for your own
            `torch.compile(step, fullgraph=True)`, and one CUDA graph. What is returned is the last evaluation's f(z);
            nobody is warned, nor looks whether f couples the samples, which then need `batch_dims=0`; f must not change
            buffers; IFT without `clip`, of order 1, JFB or PhantomGrad.
        hold_noise: draw the random numbers in f, such as the masks of `torch.nn.Dropout`, once for a solve. False:
            f is taken to draw none, or to keep what it drew.

    Within a solve f is one map. Each evaluation begins with the buffers that the modules had when the solve began:
    running statistics, the vectors of spectral normalisation. What the last evaluation, at the solution, makes of
    them stays: one update for one call, as of any other layer. A backward pass changes none. Buffers of modules in
    eval mode, and those that f does not change, are left alone. A module that initialises itself at its first call
    should have had that call before. With `torch.utils.checkpoint` inside f a backward pass evaluates it again out of
    sight, and changes buffers as in any checkpointed module.

    A parametrized weight (`torchdeq.apply_norm`, `torch.nn.utils.parametrize`) is evaluated once by the solver, once by
    each gradient method with a graph, and once when a backward pass evaluates f again, not at each evaluation of f. It
    is not kept from one call to the next. One that draws random numbers, or is read in compiled code or in a
    checkpoint, is evaluated as often as it is read.

    With `hold_noise=True` each evaluation begins with the same state of torch's default random generators, that of
    the CPU and that of the state's device, and so does each evaluation in a backward pass. A call of the module moves
    them on by one evaluation of f.

    Derivatives follow `torch.is_grad_enabled()`, in training and in eval mode alike. Without grad mode no graph
    is built and z is exactly the state whose residual is reported; with it z = f(that state), which is closer
    still to the fixed point of a contraction. `Reversible`, `Unroll` and `TruncatedCycle`, whose derivative is that of
    their own steps, make the same steps in both modes and give the same z, and so do recorded states.

    Example:
        >>> import torch, torchdeq
        >>> _ = torch.manual_seed(0)
        >>> layer, x = torch.nn.Linear(8, 8), torch.randn(4, 8)
        >>> deq = torchdeq.DEQ(torchdeq.Anderson(tol=1e-4), torchdeq.IFT())
        >>> z, sol = deq(lambda z: torch.tanh(0.5 * layer(z) + x), torch.zeros(4, 8))
        >>> z.square().mean().backward()
        >>> z.shape, bool(sol.converged.all()), layer.weight.grad.shape
        (torch.Size([4, 8]), True, torch.Size([8, 8]))
    """

    def __init__(
        self,
        solver: SolverLoop = Multisecant(),  # noqa: B008 - frozen
        grad: GradMethod | Sequence[GradMethod] = IFT(),  # noqa: B008 - frozen
        *,
        eval_solver: SolverLoop | None = None,
        record: Sequence[int] = (),
        batch_dims: int = 1,
        throw: bool = False,
        on_backward: OnBackward | None = None,
        modules: nn.Module | Sequence[nn.Module] | None = None,
        compile: bool | Literal["fixed"] | Mapping[str, Any] = False,
        hold_noise: bool = False,
    ):
        super().__init__()
        for name, value in (("solver", solver), ("eval_solver", eval_solver or solver)):
            if not isinstance(value, SolverLoop):
                raise TypeError(
                    f"DEQ({name}={value!r}): expected a Solver such as Anderson(tol=1e-4); as_solver makes one "
                    f"from a name."
                )
        methods_for(grad, record)  # so that a wrong value raises here, not at the first call
        if batch_dims not in (0, 1, 2):
            raise ValueError(f"DEQ(batch_dims={batch_dims!r}): expected 0, 1 or 2.")
        stateful = (modules,) if isinstance(modules, nn.Module) else modules
        if stateful is not None and not all(isinstance(module, nn.Module) for module in stateful):
            raise TypeError(
                f"DEQ(modules={modules!r}): expected the modules whose buffers f changes, one torch.nn.Module or a "
                f"sequence of them."
            )
        self.solver = solver
        self.grad = grad
        self.eval_solver = eval_solver
        self.record = tuple(record)
        self.batch_dims = batch_dims
        self.throw = throw
        self.on_backward = on_backward
        # A tuple, so that they are not registered here: they are the caller's, who has them elsewhere.
        self.stateful = None if stateful is None else tuple(stateful)
        self.hold_noise = hold_noise
        self._graphs: Graphs | None = None
        self._fixed = compile == "fixed"
        if self._fixed:
            self._check_fixed()
        elif compile is True or isinstance(compile, Mapping):
            self.compile(**({} if compile is True else compile))
        elif compile is not False:
            raise ValueError(
                f"compile is False, True, 'fixed', or a dictionary of options of torch.compile such as "
                f"{{'backend': 'aot_eager'}}, got {compile!r}"
            )
        self.last_noise: RandomState | None = None  # that the last solve held, for looking at f as it was
        # Solvers that learn are submodules, also those inside a chain or a gradient method.
        inside = [m for part in (solver, eval_solver, grad) for m in _modules_in(part)]
        outside = {id(solver), id(eval_solver)}
        inside = [m for m in dict.fromkeys(inside) if id(m) not in outside]
        if inside:
            self.inner_solvers = nn.ModuleList(inside)
        self._forward_report = Reporter(FORWARD_REMEDY, throw=throw)
        self._backward_report = Reporter(ADJOINT_REMEDY, throw=throw)

    def forward(self, f: Callable[[Tree], Tree], z0: Tree, **overrides: Any) -> tuple[Tree, Solution]:
        """Solve z = f(z) from z0.

        Arguments:
            f: maps a state to a state of the same structure, shapes and dtypes. A module, a function, a
                closure over the input.
            z0: the start: a tensor (B, …), or a tuple, list, dict or any other pytree of such tensors. It is
                not changed and gets no gradient, as a fixed point does not depend on where a solver began.
            **overrides: hyperparameters of the forward solver for this call, such as max_iter or tol.

        Returns:
            z in the structure of z0, and the `Solution` of the forward solve.
        """
        solver = self.solver if self.training or self.eval_solver is None else self.eval_solver
        if torch.compiler.is_exporting():
            return self._exported(f, z0, solver.replace(**overrides))
        if self._fixed:
            (method,) = methods_for(self.grad, ())
            return solve_fixed(f, z0, solver.replace(**overrides), method, batch_dims=self.batch_dims)
        if self.hold_noise:
            layout_of(z0, self.batch_dims)  # which checks that there is a device to ask
            self.last_noise = RandomState.capture(optree.tree_leaves(z0)[0].device)
        solver, methods = solver.replace(**overrides), methods_for(self.grad, self.record)
        if self._graphs is not None:
            solver, methods = self._graphs.kept(
                (solver, *methods), functools.partial(compiled, self._graphs, solver, methods)
            )
        states, solution = solve_and_attach(
            f,
            z0,
            solver,
            methods,
            record=self.record,
            batch_dims=self.batch_dims,
            on_backward=self._backward,
            modules=self.stateful,
            hold_noise=self.hold_noise,
        )
        self._forward_report.throw = self._backward_report.throw = self.throw
        self._forward_report(solution, None if self.hold_noise else lambda: noise_in(f, z0, self.stateful))
        return states[-1], solution if len(states) == 1 else dataclasses.replace(solution, states=states[:-1])

    def compile(self, **options: Any) -> None:
        """Compile the solves from now on; what `DEQ(compile=True)` does.

        `torch.nn.Module.compile` would try to compile `forward`, which reads numbers to know when to stop. Here each
        solve is a graph: the forward solve one loop, an adjoint solve some products at a time, which makes up to three
        more than are needed. f is captured with them. A fresh closure over other tensors of the same shapes is not
        compiled again, and another batch size once. Parametrized weights are evaluated before, once for a solve.
        Tangents, and derivatives of higher order, are solved as they are without. Copies, and modules that are read
        from a file, compile anew.

        Arguments:
            **options: of `torch.compile`: backend, mode, dynamic, options.

        Raises:
            TypeError: a solver or a gradient method cannot be compiled.
            ValueError: with `hold_noise=True`, as a graph has random numbers of its own.

        When called, the module then raises a RuntimeError if torch cannot capture f, or if f changes buffers in
        training mode.
        """
        if self.hold_noise:
            raise ValueError(
                "DEQ(hold_noise=True) cannot be compiled: a graph does not draw again what it drew. VariationalDropout "
                "keeps its mask, and needs no hold_noise."
            )
        for name in options:
            if name not in ("backend", "mode", "dynamic", "options"):
                raise TypeError(
                    f"DEQ.compile has no option {name!r}. Those of torch.compile that it takes are backend, mode, "
                    f"dynamic and options."
                )
        graphs = Graphs(options)
        for solver in (self.solver, self.eval_solver or self.solver):
            compiled(
                graphs, solver, methods_for(self.grad, self.record)
            )  # so that what cannot be raises here
        self._graphs, self._fixed = graphs, False

    def _check_fixed(self) -> None:
        """Raise if a fixed count cannot be kept to."""
        for name in ("record", "throw", "on_backward", "hold_noise"):
            if getattr(self, name):
                raise ValueError(
                    f"DEQ({name}={getattr(self, name)!r}) looks at a solve, or holds what it draws, which one of a "
                    f"fixed count does not allow. Use compile=True, or False."
                )
        if self.stateful is not None:
            raise ValueError(
                "DEQ(modules=…) names what f changes, and in a solve of a fixed count f must change nothing. Use "
                "compile=True, or False."
            )
        for solver in (self.solver, self.eval_solver or self.solver):
            check_fixed(solver, methods_for(self.grad, ())[-1])

    def _exported(self, f: Callable[[Tree], Tree], z0: Tree, solver: SolverLoop) -> tuple[Tree, Solution]:
        """`forward` as a part of the graph that `torch.export` makes: inference, see `torchdeq.export`."""
        if self.training:
            raise RuntimeError(
                f"{self!r} is in training mode; what is exported is inference. Call model.eval() first."
            )
        method = methods_for(self.grad, self.record)[-1]
        plain = isinstance(solver, FixedPointIteration)
        whole = isinstance(method, Unroll) and method.last is None  # the steps of the solver, and one
        if plain and not whole and (method.own_steps or isinstance(method, Reversible)):
            raise TypeError(
                f"{method!r} makes steps of its own, which are not exported. The fixed point is also that of another "
                f"solver: set deq.eval_solver = Anderson(tol=…)."
            )
        layout = layout_of(z0, self.batch_dims)
        start = layout.ravel(z0, source="z0")
        solution = solve_exported(f, layout, start, solver, record=self.record, modules=self.stateful)
        if self.throw:
            torch._assert_async(solution.converged.all(), f"a sample did not converge. {FORWARD_REMEDY}")
        # A derivative of the loop would be wrong; torch does not record that there is none.
        solution = unravel_solution(solution, layout).detach()
        return f(solution.z) if plain and whole else solution.z, solution

    def _backward(self, solution: Solution) -> None:
        if self.on_backward is not None:
            self.on_backward(solution)
        self._backward_report(solution)

    def __repr__(self) -> str:
        options = [
            f"{name}={getattr(self, name)!r}"
            for name, default in (
                ("eval_solver", None),
                ("record", ()),
                ("batch_dims", 1),
                ("throw", False),
                ("on_backward", None),
                ("hold_noise", False),
            )
            if getattr(self, name) != default
        ]
        if self._fixed:
            options.append("compile='fixed'")
        if self._graphs is not None:
            options.append(f"compile={self._graphs.options or True!r}")
        if self.stateful is not None:  # by their class: one of them may hold this module
            options.append(f"modules=[{', '.join(type(module).__name__ for module in self.stateful)}]")
        return f"DEQ({', '.join([repr(self.solver), repr(self.grad), *options])})"


def methods_for(grad: GradMethod | Sequence[GradMethod], record: Sequence[int]) -> list[GradMethod]:
    """One gradient method for each recorded state and, last, one for the solution."""
    methods: list[Any] = list(grad) if isinstance(grad, list | tuple) else [grad]
    if not methods or not all(isinstance(method, GradMethod) for method in methods):
        raise TypeError(
            f"DEQ(grad={grad!r}): expected a GradMethod such as IFT() or a sequence of them; as_grad makes "
            f"one from a name or a number of phantom steps."
        )
    if len(methods) not in (1, len(record) + 1):
        raise ValueError(
            f"DEQ(grad={grad!r}, record={list(record)}): expected one gradient method, or one for each of "
            f"the {len(record)} recorded states and one for the solution, got {len(methods)}."
        )
    return methods * (len(record) + 1) if len(methods) == 1 else methods


def compiled(
    graphs: Graphs, solver: SolverLoop, methods: Sequence[GradMethod]
) -> tuple[SolverLoop, list[GradMethod]]:
    """The solver and the gradient methods whose solves are compiled.

    Raises:
        TypeError: one of them cannot be.
    """
    found = []
    for method in methods:
        if isinstance(method, IFT):
            method = method.replace(solver=Compiled(method.solver, graphs))
        elif type(method).__call__ is not GradMethod.__call__:
            raise TypeError(
                f"{method!r} makes the steps of the forward solve itself, which are not compiled. Use IFT(), "
                f"PhantomGrad() or JFB(); or compile f alone: DEQ(compile=False) and torch.compile(f)."
            )
        found.append(method)
    return Compiled(solver, graphs), found


def noise_in(f: Callable[[Tree], Tree], z0: Tree, modules: Sequence[nn.Module] | None = None) -> str | None:
    """Why a solve could not converge, if it is that f draws random numbers. One call of f."""
    device = optree.tree_leaves(z0)[0].device
    if isinstance(f, AffineMap) or not draws_noise(f, z0, device, modules):
        return None
    return (
        "f draws random numbers at every call, for example in torch.nn.Dropout, so that there is no fixed point to "
        "arrive at. DEQ(hold_noise=True) draws them once for a solve, and VariationalDropout keeps its mask until it "
        "is reset."
    )


def _modules_in(part: Any) -> Iterator[nn.Module]:
    """The modules among a solver or gradient method and what it is made of."""
    if isinstance(part, nn.Module):
        yield part
    elif isinstance(part, list | tuple):
        for one in part:
            yield from _modules_in(one)
    elif isinstance(part, Method):
        for field in dataclasses.fields(part):
            yield from _modules_in(getattr(part, field.name))


def solve_and_attach(
    f: Callable[[Tree], Tree],
    z0: Tree,
    solver: SolverLoop,
    methods: Sequence[GradMethod],
    *,
    record: Sequence[int] = (),
    batch_dims: int = 1,
    on_backward: OnBackward | None = None,
    modules: Sequence[nn.Module] | None = None,
    hold_noise: bool = False,
) -> tuple[list[Tree], Solution]:
    """Solve z = f(z) and give every sampled state its derivative.

    Arguments:
        f, z0, batch_dims, on_backward, modules, hold_noise: see `DEQ`.
        solver: the forward solver.
        methods: one gradient method per entry of `record` and, last, one for the solution.
        record: evaluations to sample.

    Returns:
        The states in the structure of z0, the final one last, and the `Solution` without states.
    """
    layout = layout_of(z0, batch_dims)
    start = layout.ravel(z0, source="z0")
    map_ = f.linear if isinstance(f, AffineMap) else f
    held = hold(map_, modules, noise=start.device if hold_noise else None)
    ours = held is not map_  # else there is nothing to hold, or our caller holds it for more than one solve
    flat = flatten_map(dataclasses.replace(f, linear=held) if isinstance(f, AffineMap) else held, layout)
    with one_batch():
        if torch.is_grad_enabled() or in_dual_level():
            with sharing(held):
                last, solution = methods[-1](flat, start, solver, record=record, on_backward=on_backward)
            if ours:
                release(held)  # what stays is the update at the solution, not one at a recorded state
            states: list[Tensor] = []
            for method, z in zip(methods[:-1], solution.states, strict=True):
                with sharing(held):  # a graph of the weights for each, to be differentiated apart
                    states += method.attach(flat, z, on_backward=on_backward)
            states += last
        else:
            refuse_transforms(lambda: "DEQ")
            with sharing(held):
                z, solution = methods[-1].without_grad(flat, start, solver, record=record)
            if ours:
                release(held)
            plain = isinstance(solver, FixedPointIteration)
            with sharing(held):
                states = [
                    method.attach(flat, state)[-1] if method.own_steps and plain else state
                    for method, state in zip(methods[:-1], solution.states, strict=True)
                ]
            states.append(z)
    bare = dataclasses.replace(solution, states=[]) if solution.states else solution
    return [layout.unravel(z) for z in states], unravel_solution(bare, layout)
