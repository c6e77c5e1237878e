"""Is f fit for a fixed-point solve and for its derivatives? One question after another, each with its answer."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable
from typing import Any, Literal

import optree
import torch
from torch import Tensor, nn

from torchdeq._held import hold, modules_of
from torchdeq._replay import AutocastState, RandomState
from torchdeq._state import FlatMap, Layout, Tree, layout_of, per_sample
from torchdeq.diagnostics import derivatives
from torchdeq.diagnostics.inside import Held, Inside, same
from torchdeq.diagnostics.probe import Probe, Subject, Unfit, told
from torchdeq.diagnostics.report import Finding, FixedPointReport, Verdict
from torchdeq.solver.coupling import mixes_samples
from torchdeq.solver.multisecant import Multisecant

_NEAR = 1e-4  # a relative residual that passes for a solution

#: The questions, in the order in which they are asked.
QUESTIONS = (
    "runs",
    "argument",
    "shape",
    "function",
    "buffers",
    "samples",
    "solve",
    "gradient",
    "contraction",
    "second",
    "forward",
    "learns",
)


def check_fixed_point(
    f: Callable[[Tree], Tree],
    z0: Tree,
    *,
    batch_dims: int = 1,
    max_iter: int = 100,
    steps: int = 40,
) -> FixedPointReport:
    """Examine f before training with it: everything that would make a solve or a gradient fail, or wrong.

    Questions, by name:

    * `runs`: f(z0) raises nothing and is finite.
    * `argument`: f does not change its argument in place.
    * `shape`: f keeps structure, shape and dtype of the state.
    * `function`: f gives one value at one state, at two calls in a row and at the end of the examination.
    * `buffers`: a call changes nothing in the modules and tensors that f is seen to hold, as batch normalisation does;
      or nothing but what DEQ holds during a solve.
    * `samples`: f treats samples apart, as `batch_dims` says.
    * `solve`: a solve from z0 converges, in `max_iter` evaluations.
    * `gradient`: f is differentiable there; its products with Jᵀ are finite and agree with difference quotients.
      `detach()`, `no_grad()` and a custom backward that is wrong do not.
    * `contraction`: ‖J‖₂ and the spectral radius there, per sample; both from Krylov spaces, so lower estimates, exact
      once `steps` reaches the number of unknowns.
    * `second`: a product with Jᵀ can be differentiated again, and that agrees with difference quotients. `IFT(order=2)`
      and `CGNR` need it.
    * `forward`: forward-mode differentiation works.
    * `learns`: f depends on tensors that require a gradient.

    A fault in f is reported and not raised. Nothing is changed: z0, torch's random state, and the buffers, tensors,
    attributes and `.grad` of what f is seen to hold are put back. Only a parameter that f itself writes to is named and
    not restored. Hooks of modules run. f is evaluated some tens of times; the first examination in a process may wait
    some seconds for parts of torch to load. In half precision only gross errors of a derivative can be seen.

    Arguments:
        f: the map, as for `torchdeq.DEQ`, in the mode (train or eval) in which it will be used.
        z0: the start, as for `torchdeq.DEQ`. Two samples at least, or it cannot be seen whether f couples them.
        batch_dims: as for `torchdeq.DEQ`.
        max_iter: evaluations of f that the solve may take.
        steps: products with J and Jᵀ for each of the two estimates of contraction.

    Returns:
        A `FixedPointReport`: print it.

    Raises:
        TypeError, ValueError: z0 cannot be a state, or an option is out of its range.

    Example:
        >>> layer = nn.Linear(4, 4)
        >>> report = check_fixed_point(lambda z: torch.tanh(0.5 * layer(z).detach()), torch.zeros(2, 4))
        >>> print(report["gradient"])
        FAULT    gradient    f(z) depends on z, but autograd does not know it: there is no path from the one to the
                             other.
                             → Look for detach(), .data, torch.no_grad(), .item() or NumPy between z and f(z).
    """
    if steps < 1 or max_iter < 1:
        raise ValueError(f"check_fixed_point(max_iter={max_iter}, steps={steps}): both must be at least 1.")
    if not callable(f):
        raise TypeError(
            f"check_fixed_point: f must be a callable that maps the state to the state, got {type(f).__name__}."
        )
    with torch.inference_mode(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        z0 = optree.tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, z0)
        layout = layout_of(z0, batch_dims)
        start = layout.ravel(z0, source="z0")
        amp = AutocastState.capture(start.device)
        inside = Inside(f)
        with inside.untouched(start.device) as held, amp.off(), torch.no_grad():
            examination = _Examination(f, layout, start, amp, held, max_iter=max_iter, steps=steps)
            examination.run()
            return examination.report()


class _Examination:
    """The questions about one f. Each method is one of them; `Unfit` ends the examination."""

    def __init__(
        self,
        f: Callable[[Tree], Tree],
        layout: Layout,
        start: Tensor,
        amp: AutocastState,
        held: Held,
        *,
        max_iter: int,
        steps: int,
    ):
        self.subject, self.layout, self.z, self.held = Subject(f, amp), layout, start, held
        self.max_iter, self.steps = max_iter, steps
        self.name = _name_of(f)
        self.batch_dims = layout.depth
        self.eps = max(torch.finfo(dtype).eps for dtype in layout.dtypes)
        if amp.enabled:
            self.eps = max(self.eps, torch.finfo(amp.dtype).eps)
        self.findings: dict[str, Finding] = {}
        self.at: Literal["solution", "z0"] = "z0"
        self.contraction: derivatives.Contraction | None = None
        self.hold_buffers = self.name_modules = self.hold_noise = False
        self.early: tuple[Probe, Tensor, Tensor] | None = None  # where f was asked early on, and what it said

    def run(self) -> None:
        try:
            self.runs()
            for question in (self.function, self.samples, self.solve, self.derivatives):
                self.ask(question)
        except Unfit as reason:
            for name in QUESTIONS:
                if name not in self.findings:
                    self.add(name, "unknown", f"not examined, as {reason}.")
        with contextlib.suppress(Unfit):
            self.ask(self.lasts)

    def ask(self, question: Callable[[], None]) -> None:
        try:
            question()
        except Unfit:
            raise
        except Exception as error:
            self.add(
                "runs",
                "fault",
                f"f(z0) runs, but a later call raised {told(error)}",
                "f must accept any state of the shapes of z0, and be called as often as a solver likes.",
            )
            raise Unfit("f does not always run") from error

    def add(self, name: str, verdict: Verdict, text: str, advice: str = "") -> None:
        self.put(Finding(name=name, verdict=verdict, text=text, advice=advice))

    # The value -----------------------------------------------------------------------------------------

    def runs(self) -> None:
        """`runs`, `argument` and `shape`, from one call."""
        tree = self.layout.unravel(self.z.clone())
        leaves = optree.tree_leaves(tree)
        before = [(leaf, leaf._version, leaf.clone()) for leaf in leaves]
        try:
            image = self.subject(tree)
        except Exception as error:
            self.add(
                "runs",
                "fault",
                f"f(z0) raised {told(error)}",
                "Make f(z0) work by itself; check the shape of z0 and that f closes over its inputs.",
            )
            raise Unfit("f(z0) does not run") from error
        self.subject.copies = any(
            leaf._version != version or not same(leaf, value) for leaf, version, value in before
        )
        if self.subject.copies:
            self.add(
                "argument",
                "fault",
                "f writes into its argument in place. A solver keeps its iterates; DEQ raises an error.",
                "Return a new tensor: z = z + … instead of z += …, z.add_(…) or z[…] = …; or begin f with z.clone().",
            )
        else:
            self.add("argument", "ok", "f leaves its argument alone.")
        try:
            flat = self.layout.ravel(image)
        except (TypeError, ValueError) as error:
            self.add("runs", "ok", "f(z0) runs.")
            self.add("shape", "fault", str(error), "f must return what it is given, in another value.")
            raise Unfit("f does not return a state") from error
        got = {leaf.dtype for leaf in optree.tree_leaves(image)} - set(self.layout.dtypes)
        self.eps = max([self.eps, *(torch.finfo(dtype).eps for dtype in got)])
        self.add(
            "shape",
            "ok",
            "f keeps structure, shape and dtype."
            if not got
            else f"f keeps structure and shape, and returns {', '.join(map(str, got))}, which the state's dtype holds.",
        )
        if not bool(flat.isfinite().all()):
            count = int((~flat.isfinite()).any(dim=1).sum())
            self.add(
                "runs",
                "fault",
                f"f(z0) is not finite in {count} of {len(flat)} samples.",
                "Look for a division by 0, a logarithm or root of what is not positive. Or start elsewhere.",
            )
            raise Unfit("f(z0) is not finite")
        self.add("runs", "ok", "f(z0) runs and is finite.")

    def function(self) -> None:
        """`function` and `buffers`, from calls at one state."""
        random = RandomState.capture(self.z.device)
        probe = self.probe()
        z = probe.beside()
        differ = self.apart(probe.value(z), probe.value(z))
        moved = self.buffers()
        if differ and self.hold_buffers:
            differ = self.apart(probe.value(z), probe.value(z))
        if not differ:
            self.early = probe, z, probe.value(z)
            with_them = ", once its buffers are held" if self.hold_buffers else ""
            self.add("function", "ok", f"two calls at one state agree{with_them}.")
            return
        self.subject.random = random
        if self.apart(probe.value(z), probe.value(z)):
            self.add(
                "function",
                "fault",
                "two calls of f at one state differ, with the same random numbers too: f depends on something that its "
                "calls change" + (f", such as {_some(moved)}." if moved else "."),
                "Make f a function of z alone for the time of a solve: take what changes out of f, or give DEQ the "
                "modules= whose buffers change.",
            )
            raise Unfit("f is not a function")
        self.hold_noise = True
        self.early = probe, z, probe.value(z)
        droppers = self.training(nn.modules.dropout._DropoutNd)
        where = f" Dropout in training mode: {_some(droppers)}." if droppers else ""
        self.add(
            "function",
            "fault",
            f"f draws random numbers at every call, so it has no fixed point.{where} What follows is about f with the "
            f"numbers of one call.",
            "DEQ(…, hold_noise=True) draws them once for a solve. torchdeq.VariationalDropout and its kin hold a mask "
            "until reset_dropout().",
        )

    def lasts(self) -> None:
        """`function` once more, after all calls."""
        if self.early is None:
            return
        probe, z, value = self.early
        if not self.apart(value, probe.value(z)):
            return
        self.hold_noise = False  # it would not help
        self.add(
            "function",
            "fault",
            "two calls of f in a row agree, but a call at the same state at the end of the examination differs: f "
            "depends on something that changes with its calls or with time.",
            "Make f a function of z alone for the time of a solve: look for counters, caches, schedules and tensors "
            "that are written to now and then.",
        )

    def buffers(self) -> list[str]:
        """What the calls so far have changed. Buffers that DEQ can hold are held from now on."""
        moved = self.held.moved()
        if not moved:
            self.add("buffers", "ok", "a call changes nothing that f is seen to hold.")
            return moved
        owners = {name: self.held.owner(name) for name in moved}
        named = _some([f"{n} ({type(m).__name__})" if m is not None else n for n, m in owners.items()])
        if any(
            m is None or not m.training or n.rpartition(".")[2] not in m._buffers for n, m in owners.items()
        ):
            self.add(
                "buffers",
                "fault",
                f"a call of f changes {named}, which DEQ does not hold: a solve calls f many times.",
                "Take what changes out of f, or make it a part of the state. DEQ holds buffers of modules in training "
                "mode, and nothing else.",
            )
            return moved
        self.hold_buffers = True
        inner = self.subject.f
        seen = {id(m) for module in modules_of(inner) for m in module.modules()}
        told = f"a call of f changes {named}."
        self.subject.f = hold(inner, self.held.inside.modules.values())
        if all(id(owner) in seen for owner in owners.values()):
            self.add(
                "buffers",
                "note",
                f"{told} DEQ holds buffers during a solve, so that they change once per solve.",
                "A solver that is called without DEQ changes them at every evaluation.",
            )
        else:
            self.name_modules = True
            self.add(
                "buffers",
                "fault",
                f"{told} DEQ does not see from f that it has these modules, so they would change at every evaluation.",
                "Name them: DEQ(…, modules=[…]). Then they change once per solve.",
            )
        return moved

    def training(self, kind: type[nn.Module]) -> list[str]:
        """Names of the modules of a kind that f is seen to hold in training mode."""
        modules = self.held.inside.modules.items()
        return [name or type(m).__name__ for name, m in modules if m.training and isinstance(m, kind)]

    def samples(self) -> None:
        count, depth = len(self.z), self.layout.depth
        if depth == 0:
            self.add("samples", "ok", "the state is one system (batch_dims=0).")
            return
        if count < 2:
            self.add(
                "samples",
                "unknown",
                "there is one sample, so it cannot be seen whether f couples samples.",
                "Give a z0 with two.",
            )
            return
        mixed = mixes_samples(self.probe().value, self.z)
        if mixed is None:
            self.add(
                "samples",
                "unknown",
                "beside z0 f raised an error or was not finite, so it cannot be seen whether it couples samples.",
                "Give a z0 around which f can be evaluated.",
            )
            return
        if not mixed:
            # mixes_samples takes changes below √ε (‖a‖ + ‖b‖) for rounding.
            level = 2 * math.sqrt(torch.finfo(self.z.dtype).eps)
            self.add("samples", "ok", f"f treats the {count} samples apart, to relative {level:.0e}.")
            return
        # From here on samples are what f takes for samples.
        tree = self.layout.unravel(self.z)
        for lower in reversed(range(depth)):
            self.layout = layout_of(tree, lower)
            self.z = self.layout.ravel(tree)
            if lower and mixes_samples(self.probe().value, self.z) is False:
                break
        norms = self.training(nn.modules.batchnorm._BatchNorm)
        instead = f" Or replace {_some(norms)}: batch normalisation in training mode couples all samples."
        self.add(
            "samples",
            "note",
            f"f(z) of some samples changes with others, which batch_dims={depth} denies. Solves and adjoints that fall "
            f"short for it are done again with the batch as one system, and a CouplingWarning.",
            f"Say batch_dims={self.layout.depth}." + (instead if norms else ""),
        )

    def solve(self) -> None:
        tol = math.sqrt(self.eps)
        solver = Multisecant(tol=tol, stop_mode="rel", max_iter=self.max_iter)
        try:
            solution = solver.run(FlatMap(self.subject, self.layout), self.z)
        except Exception as error:
            self.add("solve", "fault", f"f works at z0, but during a solve it raised {told(error)}")
            return
        problem, worst = solution.problem(), float(solution.residual.max()) if len(self.z) else 0.0
        if problem and worst <= _NEAR:
            self.z, self.at = solution.z, "solution"
            self.add(
                "solve",
                "note",
                f"Multisecant comes to relative {worst:.0e} in {solution.nfe} evaluations, and not to {tol:.0e}.",
                "Near enough for most training, but slow. See `contraction`.",
            )
            return
        if problem:
            self.add(
                "solve",
                "fault",
                f"{problem} The solver was Multisecant.",
                "See `contraction`. Make f more contractive: normalise its weights, damp it (z + 0.5 (f(z) − z)), add "
                "torchdeq.loss.jac_reg to the loss. Or allow more evaluations, or start nearer.",
            )
            return
        self.z, self.at = solution.z, "solution"
        self.add(
            "solve",
            "ok",
            f"Multisecant finds a fixed point to relative {tol:.0e} in {solution.nfe} evaluations.",
        )

    def derivatives(self) -> None:
        """`gradient` and all that follows it, at the state that the solve has left."""
        probe, where = self.probe(), "the solution" if self.at == "solution" else "z0"
        graph = derivatives.tracked(probe)
        self.put(derivatives.learns(probe) if graph is None else graph)
        if graph is not None:
            raise Unfit("f does not run under grad mode")
        finding_of_gradient, reason = derivatives.gradient(probe, where)
        self.put(finding_of_gradient)
        if reason:
            raise Unfit(reason)
        finding, self.contraction = derivatives.contraction(probe, where, self.steps)
        self.put(finding)
        self.put(derivatives.second(probe, checked=finding_of_gradient.verdict == "ok"))
        self.put(derivatives.forward(probe))

    def put(self, finding: Finding) -> None:
        self.findings[finding.name] = finding

    def probe(self) -> Probe:
        return Probe(self.subject, self.layout, self.z, self.eps)

    def apart(self, a: Tensor, b: Tensor) -> bool:
        """Whether they differ by more than rounding. Values that are not finite are alike."""
        return bool((per_sample((a - b).nan_to_num()) > 64 * self.eps * per_sample(a.nan_to_num())).any())

    # The conclusion ------------------------------------------------------------------------------------

    def report(self) -> FixedPointReport:
        shapes = ", ".join(str(tuple(shape)) for shape in self.layout.shapes)
        dtypes = ", ".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in self.layout.dtypes))
        use, why = self.conclusion()
        return FixedPointReport(
            subject=f"{self.name} on a state of shape {shapes}, {dtypes}, batch_dims={self.batch_dims}",
            findings=tuple(self.findings[name] for name in QUESTIONS),
            at=self.at,
            norm=None if self.contraction is None else self.contraction.norm,
            radius=None if self.contraction is None else self.contraction.radius,
            use=use,
            why=why,
        )

    def conclusion(self) -> tuple[str, str]:
        faults = [name for name in QUESTIONS if self.findings[name].verdict == "fault"]
        options = [] if self.layout.depth == 1 else [f"batch_dims={self.layout.depth}"]
        # What DEQ can be told to mend is no obstacle.
        if self.name_modules:
            faults.remove("buffers")
            options.append("modules=[…]")
        if self.hold_noise:
            faults.remove("function")
            options.append("hold_noise=True")
        if faults:
            return "", f"Mend first what is at fault: {', '.join(faults)}."
        if self.contraction is None:
            return "", "Without a derivative there is nothing to choose by."
        if self.findings["gradient"].verdict == "note":
            options = ["Multisecant()", "IFT()", *options]
            return (
                f"DEQ({', '.join(options)})",
                "The defaults, as J at a kink says little about what is around it.",
            )
        radius, norm = float(self.contraction.radius.max()), float(self.contraction.norm.max())
        solver, why = "Multisecant()", f"with a spectral radius of {radius:.2g} acceleration pays"
        if radius < 0.2:
            solver, why = "FixedPointIteration()", f"each plain step leaves {radius:.2g} of the error"
        grad, reason = "IFT()", "the adjoint solver of IFT, GMRES, needs the fewest products with Jᵀ"
        if self.contraction.symmetric and radius < 1:
            grad, reason = (
                "IFT(solver=CG(tol=1e-5))",
                "J is symmetric, so CG does with little memory what GMRES does",
            )
        elif norm < 0.3:
            k = max(1, math.ceil(math.log(1e-2) / math.log(max(norm, 1e-3))))
            grad, reason = (
                f"PhantomGrad(steps={k})",
                f"its bias is at most ‖J‖^{k} = {norm**k:.0e}; IFT() is exact",
            )
        return f"DEQ({', '.join([solver, grad, *options])})", f"{why[0].upper()}{why[1:]}; {reason}."


def _name_of(f: Any) -> str:
    name = getattr(f, "__qualname__", type(f).__name__)
    return str(name).rpartition("<locals>.")[2].replace("<lambda>", "a lambda")


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
