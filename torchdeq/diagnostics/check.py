"""Is f fit for a fixed-point solve and for its derivatives? One question after another, each with its answer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, Literal

import optree
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from torchdeq._held import hold, modules_of
from torchdeq._replay import AutocastState, RandomState
from torchdeq._state import FlatMap, Layout, Tree, layout_of, per_sample
from torchdeq.diagnostics.inside import Held, Inside
from torchdeq.diagnostics.leaves import leaves_of
from torchdeq.diagnostics.probe import Probe, Subject, dot
from torchdeq.diagnostics.report import Finding, FixedPointReport, Verdict
from torchdeq.diagnostics.slopes import Slope
from torchdeq.diagnostics.spectral import ritz_values, spectral_radius
from torchdeq.solver.coupling import mixes_samples
from torchdeq.solver.multisecant import Multisecant

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
    * `function`: f gives one value at one state.
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
    attributes and `.grad` of what f is seen to hold are put back. f is evaluated some tens of times. What its modules
    have for hooks runs too. In half precision only gross errors of a derivative can be seen.

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


class _Unfit(Exception):  # noqa: N818 - it ends an examination and reports no error
    """Why the examination cannot go on."""


class _Examination:
    """The questions about one f. Each method is one of them; `_Unfit` ends the examination."""

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
        self.norm: Tensor | None = None
        self.radius: Tensor | None = None
        self.symmetric = self.hold_buffers = self.name_modules = self.hold_noise = False

    def run(self) -> None:
        try:
            self.runs()
            self.function()
            self.samples()
            self.solve()
            self.gradient()
            self.contraction()
            self.second()
            self.forward()
        except _Unfit as reason:
            for question in QUESTIONS:
                if question not in self.findings:
                    self.add(question, "unknown", f"not examined, as {reason}.")

    def add(self, name: str, verdict: Verdict, text: str, advice: str = "") -> None:
        self.findings[name] = Finding(name=name, verdict=verdict, text=text, advice=advice)

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
                f"f(z0) raised {_told(error)}",
                "Make f(z0) work by itself; check the shape of z0 and that f closes over its inputs.",
            )
            raise _Unfit("f(z0) does not run") from error
        self.subject.copies = any(
            leaf._version != version or not torch.equal(leaf, value) for leaf, version, value in before
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
            raise _Unfit("f does not return a state") from error
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
            raise _Unfit("f(z0) is not finite")
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
            raise _Unfit("f is not a function")
        self.hold_noise = True
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
                f"a call of f changes {named}. So f drifts under a solver, which calls it many times.",
                "Take what changes out of f, or return it as a part of the state. DEQ holds buffers of modules in "
                "training mode, and nothing else.",
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
        if not mixes_samples(self.probe().value, self.z):
            self.add("samples", "ok", f"f treats the {count} samples apart.")
            return
        # From here on samples are what f takes for samples.
        tree = self.layout.unravel(self.z)
        for lower in reversed(range(depth)):
            self.layout = layout_of(tree, lower)
            self.z = self.layout.ravel(tree)
            if lower and not mixes_samples(self.probe().value, self.z):
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
            self.add("solve", "fault", f"f works at z0, but during a solve it raised {_told(error)}")
            return
        if problem := solution.problem():
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

    # The derivative ------------------------------------------------------------------------------------

    def gradient(self) -> None:
        """`gradient` and `learns`; leaves the graph of f(z) at z for the questions after it."""
        probe = self.probe()
        try:
            probe.track()
        except Exception as error:
            self.add("gradient", "fault", f"f runs without a graph, but with one it raised {_told(error)}")
            raise _Unfit("f does not run under grad mode") from error
        self.at_solution = probe
        self.learns(leaves_of([probe.fz], without=[probe.point]))
        directions = [probe.direction(), probe.direction()]
        images = [probe.quotient(d) for d in directions]
        still = all(probe.is_rounding(image) for image in images)
        try:
            vjps = [probe.vjp(probe.cotangent(image)) for image in images]
        except Exception as error:
            self.add(
                "gradient",
                "fault",
                f"the backward pass of f raised {_told(error)}",
                "Every gradient method needs products with Jᵀ.",
            )
            raise _Unfit("f has no product with Jᵀ") from error
        connected = any(v is not None for v in vjps)
        if not connected and still:
            self.add(
                "gradient",
                "note",
                "f does not depend on z, so its value is the fixed point.",
                "No solver is needed: call f once.",
            )
            raise _Unfit("f does not depend on z")
        if not connected:
            self.add(
                "gradient",
                "fault",
                "f(z) depends on z, but autograd does not know it: there is no path from the one to the other.",
                "Look for detach(), .data, torch.no_grad(), .item() or NumPy between z and f(z).",
            )
            raise _Unfit("autograd does not see that f depends on z")
        for v in vjps:
            if v is not None and not bool(v.isfinite().all()):
                self.add(
                    "gradient",
                    "fault",
                    f"a product with Jᵀ is not finite at {self.where()}.",
                    "Look for a root or a norm at 0, 0/0, or torch.where around one: add a small number inside.",
                )
                raise _Unfit("a product with Jᵀ is not finite")
        self.compare(probe, directions, images)

    def compare(self, probe: Probe, directions: list[Tensor], images: list[Tensor]) -> None:
        """⟨Jᵀu, d⟩ beside the slope of ⟨u, f(z + t d)⟩, with u along what f does in the direction d."""
        wrong: list[tuple[float, Slope]] = []
        kinks, blur = 0, 0.0
        for d, image in zip(directions, images, strict=True):
            u = probe.cotangent(image)
            got, found = dot(probe.vjp_or_zero(u), d), probe.slope(u, d)
            if not math.isfinite(found.error):
                self.add(
                    "gradient",
                    "unknown",
                    f"f is not finite beside {self.where()}, so there is no quotient.",
                )
                return
            kinks += found.kink
            blur = max(blur, found.tolerance / max(abs(found.value), 1e-300))
            if not found.confirms(got):
                wrong.append((got, found))
        if kinks:
            self.add(
                "gradient",
                "note",
                f"f has a kink at {self.where()}: its slopes to one side and the other differ, so that there is no J. "
                f"Autograd gives one of several; it cannot be checked there.",
                "Usual for ReLU, abs or max exactly at 0, as from a zero start with zero biases; harmless elsewhere.",
            )
        elif wrong:
            got, found = max(wrong, key=lambda pair: abs(pair[0] - pair[1].value))
            self.add(
                "gradient",
                "fault",
                f"autograd's derivative along a line is {got:.6g}, but difference quotients say {found.value:.6g} "
                f"(± {found.error:.0e}).",
                "Part of f is hidden from autograd (detach(), .data, no_grad()), or a custom backward is wrong, or one "
                "that is wrong on purpose (straight-through). Implicit gradients would be those of another map.",
            )
            raise _Unfit("autograd's J is not that of f")
        elif blur > 0.2:
            self.add(
                "gradient",
                "unknown",
                f"products with Jᵀ exist and are finite, but difference quotients are too coarse in this precision to "
                f"check them (± {100 * blur:.0f} %).",
                "Check f in float32 or float64.",
            )
        else:
            self.add("gradient", "ok", f"products with Jᵀ agree with difference quotients at {self.where()}.")

    def learns(self, leaves: list[Tensor]) -> None:
        if leaves:
            count = sum(leaf.numel() for leaf in leaves)
            self.add(
                "learns",
                "ok",
                f"f depends on tensors that require a gradient: {len(leaves)}, {count} numbers.",
            )
        else:
            self.add(
                "learns",
                "note",
                "f depends on no tensor that requires a gradient, so there is nothing to learn through it.",
                "Call requires_grad_() on parameters or inputs, if that is not meant so.",
            )

    def contraction(self) -> None:
        generator = torch.Generator(self.z.device).manual_seed(0)
        probe = self.at_solution
        jvp = probe.jvp()
        try:
            self.radius = spectral_radius(
                self.subject,
                self.layout.unravel(self.z),
                steps=self.steps,
                batch_dims=self.layout.depth,
                generator=generator,
            )
            squares = ritz_values(lambda v: probe.vjp_or_zero(jvp(v)), probe.noise(), self.steps)
        except Exception as error:
            self.add("contraction", "unknown", f"its estimate raised {_told(error)}")
            return
        self.norm = squares.real.amax(dim=1).clamp_min(0).sqrt()
        norm, radius = float(self.norm.max()), float(self.radius.max())
        what = "of the whole state" if self.layout.depth == 0 else "of the worst sample"
        told = f"‖J‖₂ ≈ {norm:.3g} and spectral radius ≈ {radius:.3g} at {self.where()}, {what}."
        mend = (
            "Normalise the weights or add torchdeq.loss.jac_reg to the loss, if training does not keep it so."
        )
        if norm < 1:
            self.add("contraction", "ok", f"{told} A contraction there.")
        elif radius < 1:
            self.add(
                "contraction",
                "note",
                f"{told} Plain iteration converges near there, but may first move away.",
                mend,
            )
        else:
            self.add(
                "contraction",
                "note",
                f"{told} Plain iteration moves away from there, and there may be several fixed points; accelerated "
                f"solvers can still converge.",
                mend,
            )
        d = probe.direction()
        jd, jtd = jvp(d), probe.vjp_or_zero(d)
        self.symmetric = float(jd.norm()) > 0 and bool((jd - jtd).norm() <= 10 * self.eps**0.5 * jd.norm())

    def second(self) -> None:
        """Whether ⟨Jᵀu, d⟩ can be differentiated in u, which gives Jd, and in z."""
        probe = self.at_solution
        d, e = probe.direction(), probe.direction()
        u = probe.cotangent(probe.quotient(d))
        advice = "IFT(order=2) and CGNR need it; IFT(), GMRES and the other adjoint solvers do not."
        try:
            with torch.enable_grad():
                z = self.z.clone().requires_grad_()
                cotangent = u.clone().requires_grad_()
                (w,) = torch.autograd.grad(probe.flat(z), z, cotangent, create_graph=True)
                product = (w * d).sum()
                if not product.requires_grad:
                    raise RuntimeError("it has no graph.")
                in_u, in_z = torch.autograd.grad(product, (cotangent, z), allow_unused=True)
                if in_u is None and bool(w.any()):
                    raise RuntimeError("it is linear in u, but has no path to u.")
        except Exception as error:
            self.add(
                "second", "note", f"a product with Jᵀ cannot be differentiated again: {_told(error)}", advice
            )
            return
        line, bend = probe.slope(u, d), probe.bend(u, d, e)
        right = line.kink or line.confirms(0.0 if in_u is None else dot(in_u, u))
        right = right and (bend.kink or bend.confirms(0.0 if in_z is None else dot(in_z, e)))
        if right:
            self.add("second", "ok", "a product with Jᵀ can be differentiated again.")
            return
        self.add(
            "second",
            "fault",
            "a product with Jᵀ can be differentiated again, but the result disagrees with difference quotients: second "
            "derivatives would be wrong without an error.",
            "A custom backward detaches or uses saved values that carry no graph; mend it, or decorate it with "
            "once_differentiable.",
        )

    def forward(self) -> None:
        probe = self.at_solution
        d = probe.direction()
        needed = "Only forward-mode differentiation (torch.func.jvp, jacfwd) needs it."
        try:
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(self.z, d)
                image = self.layout.ravel(self.subject(self.layout.unravel(dual)))
                tangent = forward_ad.unpack_dual(image).tangent
                tangent = torch.zeros_like(d) if tangent is None else tangent.detach().clone()
        except Exception as error:
            self.add("forward", "note", f"f has no forward-mode derivative: {_told(error)}", needed)
            return
        u = probe.cotangent(probe.quotient(d))
        line = probe.slope(u, d)
        if line.kink or line.confirms(dot(u, tangent)):
            self.add("forward", "ok", "forward-mode differentiation works.")
        else:
            self.add(
                "forward",
                "fault",
                f"forward mode gives {dot(u, tangent):.6g} along a line, but difference quotients say "
                f"{line.value:.6g} (± {line.error:.0e}).",
                "Look for detach() or a custom jvp that is wrong. " + needed,
            )

    def probe(self) -> Probe:
        return Probe(self.subject, self.layout, self.z, self.eps)

    def apart(self, a: Tensor, b: Tensor) -> bool:
        """Whether they differ by more than rounding. Values that are not finite are alike."""
        return bool((per_sample((a - b).nan_to_num()) > 64 * self.eps * per_sample(a.nan_to_num())).any())

    def where(self) -> str:
        return "the solution" if self.at == "solution" else "z0"

    # The conclusion ------------------------------------------------------------------------------------

    def report(self) -> FixedPointReport:
        shapes = ", ".join(str(tuple(shape)) for shape in self.layout.shapes)
        dtypes = ", ".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in self.layout.dtypes))
        use, why = self.conclusion()
        return FixedPointReport(
            subject=f"{self.name} on a state of shape {shapes}, {dtypes}, batch_dims={self.batch_dims}",
            findings=tuple(self.findings[name] for name in QUESTIONS),
            at=self.at,
            norm=self.norm,
            radius=self.radius,
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
        if self.norm is None or self.radius is None:
            return "", "Without a derivative there is nothing to choose by."
        if self.findings["gradient"].verdict == "note":
            options = ["Multisecant()", "IFT()", *options]
            return (
                f"DEQ({', '.join(options)})",
                "The defaults, as J at a kink says little about what is around it.",
            )
        radius, norm = float(self.radius.max()), float(self.norm.max())
        solver, why = "Multisecant()", f"with a spectral radius of {radius:.2g} acceleration pays"
        if radius < 0.2:
            solver, why = "FixedPointIteration()", f"each plain step leaves {radius:.2g} of the error"
        grad, reason = "IFT()", "GMRES, its default, needs the fewest products with Jᵀ"
        if self.symmetric and radius < 1:
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


def _told(error: Exception) -> str:
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0] if first else ''}"


def _name_of(f: Any) -> str:
    name = getattr(f, "__qualname__", type(f).__name__)
    return str(name).removeprefix("<locals>.").rpartition("<locals>.")[2].replace("<lambda>", "a lambda")


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
