"""Reversible iteration: back-propagation through every step, which rebuilds the states instead of keeping them.

    y_{n+1} = (1 − β) y_n + β f(z_n),       z_{n+1} = (1 − β) z_n + β f(y_{n+1}),       y_0 = z_0;

    z_n = (z_{n+1} − β f(y_{n+1})) / (1 − β),       y_n = (y_{n+1} − β f(z_n)) / (1 − β).

Source: McCallum, Arora and Foster (2025), arXiv 2509.12917. Departures: samples stop apart; what is returned is f(z_N),
from the evaluation that has measured z_N, rather than z_N; the start is compared with what is rebuilt of it.

f closes over parameters and inputs that nobody lists. So the steps are in the user's graph, each evaluation of f as a
checkpoint of `torch.utils.checkpoint` (the form that is not reentrant), which drops what autograd saves and calls again
when a backward pass asks for it. What is special here: the checkpoints keep no state. A `Tape` runs the iteration
backwards, in the order in which a backward pass asks, and the very call that rebuilds a state is the one that is
differentiated. Hooks, DDP, `torch.autograd.grad` and inputs that are not leaves see an ordinary graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from torchdeq._modes import refuse_transforms
from torchdeq._replay import AutocastState, RandomState
from torchdeq._state import Map, per_sample
from torchdeq.grad.base import GradMethod, OnBackward
from torchdeq.grad.fingerprint import Fingerprint
from torchdeq.solution import Solution
from torchdeq.solver.base import SolverLoop, layout_of_map
from torchdeq.solver.fp_iter import FixedPointIteration
from torchdeq.solver.maps import Tally
from torchdeq.solver.watch import Iterate, Watch

_LIMIT = 1e-3  # how far a rebuilt state may be off, relative to the state


@dataclass(frozen=True, kw_only=True, repr=False)
class Reversible(GradMethod):
    """Exact derivatives of a finite iteration, to any order, at a memory that does not grow with it.

    Works with `FixedPointIteration`, of which it takes `max_iter`, `tol` and the other stopping rules; the steps are
    its own. It makes an odd number of evaluations, two a step and one that measures z_N, and returns f(z_N); an even
    `max_iter` leaves one unused. A sample that has converged rests, and is rebuilt with the steps that it made.
    Without grad mode the steps and what is returned are the same, and as many as the solver allows, since none is to be
    undone; another solver, such as an `eval_solver`, then runs as it is.

    Memory: five states, the graph of one evaluation of f, and the graph's nodes of the others without their tensors
    (and a few booleans per sample and step, once some samples rest). Cost of a backward pass: one call of f and one
    vector–Jacobian product for each evaluation of the forward pass, no more. (An f that itself differentiates is called
    once more for each in the forward pass, by its own derivative.)

    The derivative is that of the iteration, not of its fixed point. Where f is affine with ‖J‖ ≤ γ < 1, and β < 1, the
    gradient of z_N is Bᵀ û with ‖û − u‖ ≤ q^N ‖u‖, q = 1 − β (1 − γ), B = ∂f/∂θ and u the exact adjoint; in general
    the bound is a multiple of N q^N. `IFT` at an equal number of evaluations is nearer to that of the fixed point.

    Rounding, ε, grows as the states are rebuilt: by at most 1/(1 − β) for each evaluation, if β < 1 and ‖J‖ ≤ 1. An
    iteration for which this exceeds 1e-3 is refused. At β = 0.5 that allows 13 evaluations in float32 and 43 in
    float64, at β = 0.8 it allows 5 and 19.

    Arguments:
        beta: β in (0, 2) but not 1. Smaller values can be undone for longer, and converge more slowly where f
            contracts strongly.
        dtype: the precision of the states y and z, at least that of the state; f sees its own. None: that of the
            state. torch.float64 is the choice for an f in float32, with β = 0.5: halving is exact, and a float64
            number has room for some thirty halvings of a float32 one, so that states are rebuilt to the last bit. At
            another β a rebuilt state may round to another float32 number than before, of which f makes another value;
            then errors of 1e-7 grow in the steps that are left.

    Raises:
        ValueError: a value is out of range; or a step would be made that cannot be undone.
        TypeError: the solver is another one, whose steps would be ignored.
        RuntimeError: in a backward pass, when f gives another value at z_N than before: it has changed; or when what
            is rebuilt of the start is not the start, to 1e-3: rounding has grown too much. Under a transform of
            torch.func.

    Example:
        >>> import torch, torchdeq
        >>> a = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        >>> deq = torchdeq.DEQ(torchdeq.FixedPointIteration(tol=1e-3), Reversible())
        >>> z, solution = deq(lambda z: a * z + 1, torch.zeros(1, 1, dtype=torch.float64))
        >>> z.sum().backward()
        >>> round(a.grad.item(), 2), solution.nfe  # z* = 1 / (1 − a), dz*/da = 4
        (3.99, 43)
    """

    needs_solve: ClassVar[bool] = True

    beta: float = 0.5
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        self.require(
            0 < self.beta < 2 and self.beta != 1,
            f"beta must lie in (0, 2) and not be 1, which forgets the state before, got {self.beta!r}",
        )
        self.require(
            self.dtype is None or (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point),
            f"dtype must be a real floating-point dtype such as torch.float64, or None, got {self.dtype!r}",
        )

    def attach(self, f: Map, z: Tensor, *, on_backward: OnBackward | None = None) -> list[Tensor]:
        """Not for a solved state, which has no steps to undo."""
        raise TypeError(
            f"{self!r} differentiates the steps of its own iteration and got a state that is already solved. Use "
            f"DEQ(FixedPointIteration(), {self!r}) without record; for a solved state IFT() or PhantomGrad()."
        )

    def __call__(
        self,
        f: Map,
        z0: Tensor,
        solver: SolverLoop,
        *,
        record: Sequence[int] = (),
        on_backward: OnBackward | None = None,
    ) -> tuple[list[Tensor], Solution]:
        """Iterate from z0 (B, D). There is no adjoint system, so `on_backward` is not called."""
        refuse_transforms(lambda: repr(self))
        self._no_record(record)
        solver = self._checked(solver, z0)
        # A copy: z0 is the caller's, who may write to it, or have made it in inference mode.
        tape = Tape(f, z0.detach().clone(), self.beta, self.dtype or z0.dtype)
        with tape.tally.amp.off(), set_checkpoint_early_stop(False):
            return _iterate(self, tape, solver)

    def without_grad(
        self, f: Map, z0: Tensor, solver: SolverLoop, *, record: Sequence[int] = ()
    ) -> tuple[Tensor, Solution]:
        """f(z_N) of the same steps, which are not kept; what another solver makes of it, if it is another."""
        if not isinstance(solver, FixedPointIteration):
            return super().without_grad(f, z0, solver, record=record)
        self._no_record(record)
        tape = Tape(f, z0, self.beta, self.dtype or z0.dtype, kept=False)
        with tape.tally.amp.off():
            (z,), solution = _iterate(self, tape, self._checked(solver, z0))
        return z, solution

    def growth(self, evaluations: int) -> float:
        """How much rounding grows, at most, as that many evaluations are undone, if ‖J‖ ≤ 1.

        One step back takes errors (δy, δz) to at most (a δy + b δz', a δz + b δy), a = 1/|1−β|, b = β/|1−β|, δz' being
        the new one: a matrix of determinant a² and trace 2a + b². For β < 1 its larger eigenvalue is a².
        """
        a = 1 / abs(1 - self.beta)
        trace = 2 * a + (a * self.beta) ** 2
        rate = (trace + math.sqrt(max(trace**2 - 4 * a**2, 0.0))) / 2
        power = evaluations / 2 * math.log(rate)
        return math.exp(power) if power < 700 else math.inf

    def _no_record(self, record: Sequence[int]) -> None:
        if len(record):
            raise ValueError(
                f"{self!r} keeps no states on its way, got record={list(record)}. Use record=()."
            )

    def _checked(self, solver: SolverLoop, z0: Tensor) -> FixedPointIteration:
        if not isinstance(solver, FixedPointIteration):
            raise TypeError(
                f"{self!r} makes steps of its own, and of the solver takes the stopping rules; the steps of {solver!r} "
                f"would be ignored. Use DEQ(FixedPointIteration(max_iter=…, tol=…), {self!r})."
            )
        for name, neutral in (("tau", 1.0), ("compact", False), ("check_every", 1)):
            value = getattr(solver, name)
            if value != neutral:
                raise ValueError(
                    f"{self!r} has no use for {name}={value!r} of {solver!r}: its damping is beta, it looks after each "
                    f"step and keeps the batch together. Leave it at {neutral!r}."
                )
        if self.dtype is not None and torch.finfo(self.dtype).eps > torch.finfo(z0.dtype).eps:
            raise ValueError(
                f"{self!r}: the state is carried in {z0.dtype}, and dtype must not be narrower. Use dtype=None."
            )
        return solver

    def _allows(self, evaluations: int, dtype: torch.dtype) -> bool:
        """Whether that many evaluations can be undone in this precision, to 1e-3."""
        return torch.finfo(dtype).eps * self.growth(evaluations) <= _LIMIT


class Tape:
    """The iteration: forwards with its graph, backwards from its end.

    Half step e evaluates f at z (e even) or y (e odd) and moves the other one. So the argument of half step e is there
    before and after it.

    Arguments:
        f: the map, (B, D) -> (B, D).
        start: y_0 = z_0, (B, D).
        beta: β.
        dtype: of the states.
        kept: whether there will be a way back. False: the evaluations have no graph.
    """

    def __init__(self, f: Map, start: Tensor, beta: float, dtype: torch.dtype, *, kept: bool = True):
        self.f = f
        self.tally = Tally(f, AutocastState.capture(start.device), 0, layout_of_map(f))
        self.start = start
        self.beta = beta
        self.dtype = dtype
        self.kept = kept
        self.image: Fingerprint | None = None  # of the last evaluation, once the forward pass is over
        self.masks: list[Tensor | None] = []  # who takes part in step n, (B,); None: all
        self.random: list[RandomState | None] = []  # for each half step, if it drew random numbers
        self.wants: list[bool] = []  # whether its argument had a graph
        self.failed: Tensor | None = None  # (B,), or None: nobody
        self.end: tuple[Tensor, Tensor] | None = None  # y_N and z_N, once the forward pass is over
        self.pair: list[Tensor] = []  # y and z after `at` half steps, in a backward pass
        self.at = -1

    # Forwards -----------------------------------------------------------------------------------------

    def evaluate(self, z: Tensor) -> Tensor:
        """f(z), (B, D), in the graph, as a checkpoint that keeps no state."""
        now = [z.to(self.start.dtype)]
        if not self.kept:
            self.tally.calls += 1
            return self._call(now[0])
        self.wants.append(z.requires_grad)
        half, device = len(self.random), z.device
        random = RandomState.capture(device)
        self.tally.calls += 1

        def call(half: int) -> Tensor:
            return self._call(now[0]) if now else self._again(half)

        fz: Tensor = checkpoint(call, half, use_reentrant=False, preserve_rng_state=False)
        now.clear()  # the checkpoint keeps this list. An f that differentiates is called again before it is done
        self.random.append(random if _drew(random) else None)
        return fz

    def moved(self, a: Tensor, fz: Tensor, mask: Tensor | None) -> Tensor:
        """(1 − β) a + β f for the samples of the mask (B,), a for the others."""
        # As a difference: autograd keeps a tensor of one number for each product with a number, and none for this.
        new = torch.sub(a, a - fz.to(self.dtype), alpha=self.beta)
        return new if mask is None else torch.where(mask[:, None], new, a)

    def _call(self, z: Tensor) -> Tensor:
        with self.tally.amp.on():
            return self.f(z)

    # Backwards ----------------------------------------------------------------------------------------

    def _again(self, half: int) -> Tensor:
        """f at the argument of a half step, with a graph, and on the way the state before it."""
        # A backward pass may be called in inference mode, whose tensors would save nothing.
        with torch.inference_mode(False), torch.enable_grad():
            if not half <= self.at <= half + 1:
                self._go_to(half + 1)
            fz = self._replayed(half)
            if half == 2 * len(
                self.masks
            ):  # the state is there as it was, and nothing else compares this value
                assert self.image is not None
                self.image.check(fz, _name(self))
            self._undo(half, fz.detach())
        return fz

    def _replayed(self, half: int) -> Tensor:
        # The start is there as it was: rebuilt, it might lie on the other side of a kink of f.
        z = (self.start if half == 0 else self.pair[1 - half % 2].to(self.start.dtype)).detach()
        z.requires_grad_(self.wants[half])  # else f would not save the same tensors
        random = self.random[half]
        if random is None:
            return self._call(z)
        with random.again():
            return self._call(z)

    def _go_to(self, half: int) -> None:
        """The state after `half` half steps, from what there is or from the end. A backward pass rarely needs it."""
        assert self.end is not None
        half = min(half, 2 * len(self.masks))
        if self.at < half:
            self.pair, self.at = list(self.end), 2 * len(self.masks)
        while self.at > half:
            with torch.no_grad():
                fz = self._replayed(self.at - 1)
            self._undo(self.at - 1, fz)

    @torch.no_grad()
    def _undo(self, half: int, fz: Tensor) -> None:
        if self.at != half + 1:  # undone already, or the last evaluation, which moved nothing
            return
        which, mask = half % 2, self.masks[half // 2]
        after = self.pair[which]
        before = (after - self.beta * fz.to(self.dtype)) / (1 - self.beta)
        if self.failed is not None:
            mask = ~self.failed if mask is None else mask & ~self.failed
        self.pair[which] = before if mask is None else torch.where(mask[:, None], before, after)
        self.at = half
        if half == 0:
            self._check_start()

    def _check_start(self) -> None:
        (y, z), self.pair, self.at = self.pair, [], -1
        assert self.end is not None
        start = self.start.to(self.dtype)
        off = torch.maximum(per_sample(y - start), per_sample(z - start))
        size = torch.maximum(per_sample(start), per_sample(self.end[1]))
        bad = ~(off <= _LIMIT * size)
        if bool(bad.any()):
            worst = int((off / size).nan_to_num(nan=math.inf).argmax())
            raise RuntimeError(
                f"{_name(self)}: in the backward pass the start of sample {worst} was rebuilt with a relative error of "
                f"{float(off[worst] / size[worst]):.1e}, above {_LIMIT:.0e}, so the gradient would be that of other "
                f"states. Either rounding has grown too much in {2 * len(self.masks)} half steps (use fewer, with a "
                f"smaller max_iter or a larger tol; a smaller beta; an f in float64), or f gave other values than in "
                f"the forward pass: something that it closes over has changed (weights updated in place: call "
                f"backward first), or it is random in a way that its generator's state does not repeat."
            )


def _drew(random: RandomState) -> bool:
    now = RandomState.capture(random.device)
    pairs = ((random.cpu, now.cpu), (random.own, now.own))
    return any(a is not None and b is not None and not torch.equal(a, b) for a, b in pairs)


def _name(tape: Tape) -> str:
    return repr(Reversible(beta=tape.beta, dtype=None if tape.dtype == tape.start.dtype else tape.dtype))


def _iterate(method: Reversible, tape: Tape, solver: FixedPointIteration) -> tuple[list[Tensor], Solution]:
    """The loop: evaluate z, measure, stop or step."""
    tally, start = tape.tally, tape.start
    y = z = start.to(tape.dtype)
    watch = Watch(solver, solver._unknown(start, tally), tally.resolution(start))
    sizes: list[tuple[Tensor, Tensor]] = []
    looks = solver.monitors

    def measured(z: Tensor, fz: Tensor) -> Iterate:
        return solver._measured(z.detach().to(start.dtype), fz.detach(), tally)

    while True:
        fz = tape.evaluate(z)
        last = tally.calls + 2 > solver.max_iter
        if looks or last:
            now = measured(z, fz)
            sizes.append((now.size, now.scale))
            watch.see(now, tally.calls)
        if last or watch.done:
            break
        if tape.kept and not method._allows(tally.calls + 1, tape.dtype):
            raise ValueError(_too_far(method, tally.calls, tape.dtype))
        mask = None if watch.all_active else watch.active
        if mask is not None:  # a sample that has failed goes back to the start, which harms nobody
            y, z = (torch.where(watch.failed[:, None], start.to(s.dtype), s) for s in (y, z))
        if tape.kept:
            tape.masks.append(mask)
        y = tape.moved(y, fz, mask)
        fz = tape.evaluate(y)
        if looks:
            half = measured(y, fz)
            half = half if mask is None else half.where(mask, now)
            sizes.append((half.size, half.scale))
        z = tape.moved(z, fz, mask)

    failed = watch.failed | ~now.measure.isfinite()
    with torch.no_grad():
        if bool(failed.any()):
            tape.failed = failed
            y, z = (torch.where(failed[:, None], start.to(s.dtype), s) for s in (y, z))
        tape.end = (y.detach(), z.detach())
        with tally.amp.on():
            compared = torch.where(failed[:, None], torch.nan, fz.detach())
            tape.image = Fingerprint.of(compared, tally.layout)
    if tape.failed is not None:
        fz = torch.where(failed[:, None], start, fz)
    final = now._replace(z=tape.end[1].to(start.dtype))
    known = watch.samples
    nstep = torch.where(watch.active, tally.calls, known.nstep)
    solution = solver._solution(
        final, failed, nstep, tally.calls, sizes, [], stalled=known.stalled, coupled=bool(known.coupled)
    )
    return [fz], solution


def _too_far(method: Reversible, evaluations: int, dtype: torch.dtype) -> str:
    size = torch.finfo(dtype).eps * method.growth(evaluations + 1)
    wider = "" if dtype == torch.float64 else " dtype=torch.float64, which carries the states in it;"
    return (
        f"{method!r}: after {evaluations} evaluations another step could not be undone in {dtype}: rounding would grow "
        f"to {size:.1e} as the states are rebuilt, above {_LIMIT:.0e}. Use{wider} a smaller beta; a larger tol; or "
        f"max_iter={evaluations}, and take what there is. IFT() has no such limit."
    )
