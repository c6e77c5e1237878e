"""The one loop that every fixed-point solver runs in.

A solver proposes; the loop disposes. It alone evaluates f, counts, measures residuals per sample, keeps
the best iterate, freezes samples that are done, sets aside samples whose f is not finite, and stops.
A solver supplies only `init` and `step`. What the loop knows of each sample lives in a `Watch`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import optree
import torch
from torch import Tensor

from torchdeq._method import Method
from torchdeq._replay import AutocastState
from torchdeq._state import FlatMap, Layout, Map, Tree, layout_of, per_sample, rough_norm
from torchdeq.solution import Reporter, Solution, Status, StopMode
from torchdeq.solver.coupling import is_random, mixes_samples
from torchdeq.solver.learned import Estimate, Learned
from torchdeq.solver.maps import AffineMap, Tally
from torchdeq.solver.together import solve_together
from torchdeq.solver.watch import Iterate, Watch, leaf_max, relative

SOLVER_REMEDY = (
    "The returned state is the best one found, not a fixed point to this tolerance. Raise max_iter or tol, try "
    "another solver, or make f more contractive (normalise its weights)."
)


class SolverLoop:
    """What a solver can do once it has `init` and `step`: everything but hold its hyperparameters.

    `Solver` adds them as the fields of a frozen dataclass, `SolverModule` as attributes of a module that may learn.
    Both are solvers to the rest of the library.

    Example:
        >>> from torchdeq import Anderson, SolverModule
        >>> isinstance(Anderson(), SolverLoop), isinstance(SolverModule(), SolverLoop)
        (True, True)
    """

    max_iter: int
    tol: float
    stop_mode: StopMode
    norm: Literal["l2", "max"]
    min_iter: int
    patience: int
    check_every: int
    compact: bool
    return_final: bool

    #: Whether residuals are measured at every evaluation (and the solve can stop early).
    monitors: ClassVar[bool] = True
    #: Whether a step combines the numbers of a sample with coefficients found for that sample alone. Such a solver
    #: needs f to treat samples apart.
    separate: ClassVar[bool] = True
    #: Whether a step is the same operations on the same shapes at every turn, once the state has `room`.
    fixed_shape: ClassVar[bool] = False
    #: How often a sample may meet a non-finite value of f and try again by `rescue`.
    recovers: ClassVar[int] = 0
    #: Whether the solver has an `estimate` of (I − J)⁻¹ when it is done.
    learns: ClassVar[bool] = False

    # What a method supplies ---------------------------------------------------------------------------

    def init(self, z: Tensor) -> Any:
        """What `step` must remember, from the start z (B, D): a NamedTuple, whose tensors all have B rows."""
        raise NotImplementedError(f"{type(self).__name__} must define init and step, or run")

    def step(self, f: Map, z: Tensor, fz: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The next iterate (B, D) and state, from the iterate z and its image fz. No host reads."""
        raise NotImplementedError(f"{type(self).__name__} must define init and step, or run")

    def room(self, state: Any, steps: int) -> Any:
        """The state in the form for a graph that serves every step: shapes fixed, no numbers that change in Python.

        Arguments:
            state: what `init` or `step` gave.
            steps: how many steps it must have room for.
        """
        return state

    def rescue(
        self, z: Tensor, fz: Tensor, state: Any, struck: Tensor, strikes: Tensor
    ) -> tuple[Tensor, Tensor, Any]:
        """Another z, fz and state for the samples `struck` (B,), whose f has not been finite `strikes` (B,) times."""
        raise NotImplementedError(
            f"{type(self).__name__} has recovers={self.recovers} and must define rescue"
        )

    def estimate(self, f: Map, z: Tensor, fz: Tensor, state: Any) -> Estimate:
        """What the solver knows of (I − J)⁻¹ after the evaluation fz of z, if it `learns`. May change the state."""
        raise NotImplementedError(f"{type(self).__name__} has learns={self.learns} and must define estimate")

    def replace(self, **options: Any) -> Self:
        """The same solver under other options."""
        raise NotImplementedError

    # What the loop does -------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        f: Callable[[Tree], Tree] | AffineMap,
        z0: Tree,
        *,
        record: Sequence[int] = (),
        batch_dims: int = 1,
        throw: bool = False,
    ) -> Solution:
        """Solve z = f(z) from z0.

        Arguments:
            f: a map from the state to the state, or an `AffineMap`.
            z0: where to start: a tensor or a pytree of tensors; its first `batch_dims` dimensions count
                samples.
            record: evaluations k ≥ 1, increasing, after which the best state so far is kept in
                `Solution.states`. A solve that ends earlier gives its final state for the rest.
            batch_dims: see `torchdeq.DEQ`.
            throw: raise a `ConvergenceError` if a sample does not converge.

        Returns:
            A `Solution` with z in the structure of z0.
        """
        layout = layout_of(z0, batch_dims)
        start = layout.ravel(z0, source="z0")
        solution = self.run(flatten_map(f, layout), start, record=record)
        if throw:
            Reporter(SOLVER_REMEDY, throw=True)(solution)
        return unravel_solution(solution, layout)

    def run(
        self,
        f: Map,
        z0: Tensor | None = None,
        *,
        record: Sequence[int] = (),
        layout: Layout | None = None,
        together: bool = True,
    ) -> Solution:
        """The loop, on a flat state (B, D).

        Arguments:
            f: the map, (B, D) -> (B, D).
            z0: the start. None is for an `AffineMap` and starts at f(0), which is known without an evaluation.
            record: see `__call__`.
            layout: which leaves the D numbers belong to, for `norm='max'`, and in which dtypes f sees them. None:
                that of f, if it is a `FlatMap`.
            together: solve again with the batch as one sample if the solve fell short and f turns out to couple the
                samples.
        """
        return self._run(f, z0, record, layout, together, None)

    @torch.no_grad()
    def solve_and_learn(self, f: Map, z0: Tensor, *, record: Sequence[int] = ()) -> tuple[Solution, Learned]:
        """`run`, and what the solve has learned of (I − J)⁻¹. That is as large as the history of the solver.

        Raises:
            TypeError: this solver learns nothing of the kind.
        """
        if not self.learns:
            raise TypeError(
                f"an estimate of (I − J)⁻¹ was asked of {self!r}, which makes none. Solvers that do are Broyden(), "
                f"Multisecant(), Anderson(), and a Fallback that begins with one of these."
            )
        learned = Learned()
        return self._run(f, z0, record, None, True, learned), learned

    def _run(
        self,
        f: Map,
        z0: Tensor | None,
        record: Sequence[int],
        layout: Layout | None,
        together: bool,
        learned: Learned | None,
        loop: Callable[[Tally, Tensor | None, Sequence[int]], Solution] | None = None,
    ) -> Solution:
        record = checked_record(record, self.max_iter)
        if self.compact and isinstance(f, AffineMap):
            raise ValueError(
                f"{self!r}: compact=True leaves samples out of the batch, which an affine map, such as that of an "
                f"adjoint system, does not allow. Use compact=False."
            )
        start = start_of(f) if z0 is None else z0
        tally = Tally(f, AutocastState.capture(start.device), self.max_iter, layout or layout_of_map(f))
        tally.learned = learned
        with tally.amp.off():
            solution = (loop or self._loop)(tally, z0, record)
            if together and self.separate and self._suspects(solution):
                # A sample at rest that moved has been pushed, unless f is random.
                coupled = mixes_samples(tally, solution.z) or (
                    solution.coupled and not is_random(tally, solution.z)
                )
                solution = dataclasses.replace(solution, nfe=tally.calls)
                if coupled:
                    solution = solve_together(self, tally, solution)
        if z0 is None or all(z is not z0 for z in (solution.z, *solution.states)):
            return solution
        # The start is the caller's memory; what is returned is not.
        own = z0.clone()
        return dataclasses.replace(
            solution,
            z=own if solution.z is z0 else solution.z,
            states=[own if z is z0 else z for z in solution.states],
        )

    def _suspects(self, solution: Solution) -> bool:
        """Whether a solve fell so far short that f may be coupling the samples.

        To know costs three to five evaluations. So it is asked only of a solve that made fifty; or that made ten, or
        gave up, and brought some sample's residual down by less than a factor of ten; or that saw a sample at rest
        move, which proves it unless f is random.
        """
        if solution.status.numel() < 2 or bool(solution.converged.all()):
            return False
        if bool((solution.status == Status.NON_FINITE).any()):  # the whole batch would be, as one sample
            return False
        if solution.coupled or solution.nfe >= 50:
            return True
        poor = ~solution.converged & (solution.residual > 0.1 * solution.trace[0])
        gave_up = bool((solution.status == Status.STALLED).any())
        return (gave_up or solution.nfe >= 10) and bool(poor.any())

    def _loop(self, f: Tally, z0: Tensor | None, record: Sequence[int]) -> Solution:
        z = start_of(f.f) if z0 is None else z0
        return self._iterate(f, z, self.init(z), record)

    def _iterate(
        self, f: Tally, z: Tensor, state: Any, record: Sequence[int], watch: Watch | None = None
    ) -> Solution:
        watch = watch or Watch(self, self._unknown(z, f), f.resolution(z))
        before, sizes = f.calls, list[tuple[Tensor, Tensor]]()
        states: dict[int, Tensor] = {}
        wanted = [r for r in record if r > before]

        rough = self._may_be_rough(z, f)
        while f.calls < f.limit:
            fz = f(z)
            k = f.calls
            if not self.monitors and k < f.limit:
                if k in wanted:
                    states[k] = z
                z, state = self.step(f, z, fz, state)
                continue
            if self.monitors:  # an evaluation that a step made elsewhere repeats the residual before it
                sizes += sizes[-1:] * (k - before - 1 - len(sizes))
            again = functools.partial(self._measured, z, fz, f) if rough else None
            watch.see(self._measured(z, fz, f, rough=rough), k, again)
            now = watch.now
            sizes.append((now.size, now.scale))
            if wanted:
                states |= {r: watch.best.z for r in wanted if r <= k and r not in states}
            over = watch.done or k >= f.limit
            if f.learned is not None:
                f.learned.look(self, f, z, fz, state, watch, over)
            if over:
                break
            if watch.struck is not None:
                z, fz, state = self.rescue(z, fz, state, watch.struck, watch.samples.strikes)
            if self.compact and 2 * watch.count <= len(z) and k + 2 <= f.limit:
                rows = watch.active.nonzero()[:, 0]
                if not len(rows):
                    break
                if watch.struck is None or not bool(watch.struck.any()):  # else fz is not what f gave
                    return self._without_the_rest(f, rows, z, fz, state, watch, wanted, states, sizes)
            f.note(
                None if now.size.dim() == 2 else now.size,
                reads=not watch.flag.late and self.check_every == 1,
                closer=watch.clean and self.stop_mode == "abs",
                watch=watch,
            )
            z_next, state = self.step(f, z, fz, state)
            z = watch.hold(z_next, z)
            f.forget()
            del fz, z_next

        final = self._final(f, watch, f.calls)
        return self._watched(final, watch, f.calls, sizes, [states.get(r) for r in wanted])

    def _may_be_rough(self, z: Tensor, f: Tally) -> bool:
        """Whether norms are summed in float32, and summed again where that was not safe, which takes a look."""
        cheap = z.dtype == torch.float32 and z.device.type == "cpu"
        return cheap and self.check_every == 1 and not self._by_leaf(f)

    def _unknown(self, z: Tensor, f: Tally) -> Iterate:
        worst = z.new_full((z.shape[0],), math.inf)
        size = worst[:, None].expand(-1, len(f.sizes)) if self._by_leaf(f) else worst
        return Iterate(z, size, torch.ones_like(size), worst)

    def _by_leaf(self, f: Tally) -> bool:
        return self.norm == "max" and len(f.sizes) > 1

    def _measured(self, z: Tensor, fz: Tensor, f: Tally, *, rough: bool = False) -> Iterate:
        """z, in the precision in which f has seen it, with its residual, from fz = f(z).

        Arguments:
            z, fz: (B, D).
            f: the map.
            rough: sum squares in the dtype of z, see `rough_norm`.
        """
        if torch.is_grad_enabled():  # norms only decide; an unrolled solve would keep a graph of each
            with torch.no_grad():
                return self._measured(z, fz, f, rough=rough)
        z = f.rounded(z)
        r = f.residual(z, fz)
        if rough:
            size, scale = rough_norm(r), rough_norm(fz)
            return Iterate(z, size, scale, size / scale if self.stop_mode == "rel" else size)
        if self._by_leaf(f):
            # (B, leaves)
            size = torch.stack([per_sample(leaf) for leaf in r.split(f.sizes, dim=1)], dim=1)
            scale = torch.stack([per_sample(leaf) for leaf in fz.split(f.sizes, dim=1)], dim=1)
        else:
            size, scale = per_sample(r), per_sample(fz)
        measure = leaf_max(relative(size, scale) if self.stop_mode == "rel" else size)
        return Iterate(z, size, scale, measure)

    def _final(self, f: Tally, watch: Watch, k: int) -> Iterate:
        """What is returned: the last iterate, the best, or where samples have their best at different evaluations a
        mixture, if it holds when f sees it as a whole."""
        known = watch.samples
        now, best = known.now, known.best
        if not watch.done:
            every = watch.clean and watch.all_active
            nstep = torch.full_like(known.nstep, k) if every else torch.where(known.active, k, known.nstep)
            watch.samples = known = known._replace(nstep=nstep)
        if watch.clean:
            return now
        finite = now.measure.isfinite()
        failed = known.failed | (known.active & ~finite)
        watch.samples = known._replace(failed=failed)
        if self.return_final:
            return now.where(~failed, best)
        # Where f couples samples, those that have arrived together are not to be mixed with better ones from before.
        arrived = (now.measure <= self.tol) & ~failed & known.coupled
        current = finite & ((now.measure <= best.measure) | arrived)
        if bool(current.all()):
            return now
        final = now.where(current, best)
        if len(final.z) == 1:
            return final
        single = known.single.where(~failed, best)
        if bool((single.measure <= final.measure).all()):  # one evaluation was best for all
            return single
        return self._measured_together(f, final, single, failed)

    def _measured_together(self, f: Tally, mixed: Iterate, single: Iterate, failed: Tensor) -> Iterate:
        """`mixed` if its residuals hold when f sees those states at once, otherwise `single`."""
        now = self._measured(mixed.z, f(mixed.z), f)
        # At the level of rounding the residual is noise; 1.5 tells noise from coupling.
        scale = leaf_max(now.scale) if self.stop_mode == "abs" else 1.0
        noise = 64 * torch.finfo(now.size.dtype).eps * scale
        holds = (now.measure <= 1.5 * mixed.measure + noise) | failed
        return now.where(~failed, mixed) if bool(holds.all()) else single

    def _without_the_rest(
        self,
        f: Tally,
        rows: Tensor,
        z: Tensor,
        fz: Tensor,
        state: Any,
        watch: Watch,
        wanted: Sequence[int],
        states: dict[int, Tensor],
        sizes: list[tuple[Tensor, Tensor]],
    ) -> Solution:
        """Go on with the samples `rows`, which still take part, and put the batch together again afterwards."""
        few = f.select(rows)
        few.learned = None if f.learned is None else Learned()
        try:
            image = few(z[rows])  # does f give these samples what it gave them among the others?
        except Exception as error:
            error.add_note(
                f"{self!r} called f with {len(rows)} of {len(z)} samples, because compact=True leaves out those that "
                f"are done. An f that closes over an input of the whole batch needs a parameter `rows`, the numbers of "
                f"the samples it is asked about: def f(z, rows=None): ..."
            )
            raise
        apart, scale = per_sample(image - fz[rows]), per_sample(fz[rows])
        noise = f.resolution(z)
        matters = 0.1 * self.tol * (scale if self.stop_mode == "rel" else torch.ones_like(scale))
        allowed = torch.minimum(math.sqrt(noise) * scale, matters).maximum(64 * noise * scale)
        if bool((apart > allowed).any()):
            raise ValueError(
                f"{self!r}: f gives samples other values when the finished ones are left out, so it does not treat "
                f"samples separately. Use compact=False; for a state that is one system, batch_dims=0."
            )
        state = optree.tree_map(
            lambda t: t[rows] if isinstance(t, Tensor) else t, state, namespace="torchdeq"
        )
        z_next, state = self.step(few, z[rows], fz[rows], state)
        states |= {r: watch.best.z for r in wanted if r <= few.calls and r not in states}
        sizes += sizes[-1:] * (few.calls - f.calls)
        f.calls = few.calls
        done = self._watched(watch.best, watch, f.calls, sizes, list(states.values()))
        if few.calls >= few.limit:
            return done
        rest = self._iterate(few, z_next, state, wanted, watch.rows(rows))
        f.calls = few.calls
        if f.learned is not None and few.learned is not None:
            f.learned.take(few.learned, rows)
        return _with_rows(done, rest, rows)

    def _watched(
        self,
        final: Iterate,
        watch: Watch,
        nfe: int,
        sizes: list[tuple[Tensor, Tensor]],
        states: list[Tensor | None],
    ) -> Solution:
        """The account of a solve that was watched."""
        known = watch.samples
        return self._solution(
            final,
            None if watch.clean and watch.all_sound else known.failed,
            known.nstep,
            nfe,
            sizes,
            states,
            stalled=None if watch.all_sound else known.stalled,
            coupled=watch.coupled if watch.knows and not watch.flag.late else bool(known.coupled),
        )

    def _solution(
        self,
        final: Iterate,
        failed: Tensor | None,
        nstep: Tensor,
        nfe: int,
        sizes: list[tuple[Tensor, Tensor]],
        states: list[Tensor | None],
        short_of: Status = Status.MAX_ITER,
        *,
        stalled: Tensor | None = None,
        coupled: bool = False,
    ) -> Solution:
        """The account of a solve, from its final iterate and the norms (residual, scale) along the way.

        `short_of` is the status of samples that are finite, above the tolerance and not `stalled`. Nobody has `failed`
        where that is None.
        """
        status = torch.full_like(nstep, short_of)
        if stalled is not None:
            status = status.masked_fill(stalled, Status.STALLED)
        status = status.masked_fill(final.measure <= self.tol, Status.CONVERGED)
        if failed is not None:
            status = status.masked_fill(failed, Status.NON_FINITE)
        size = torch.stack([size for size, _ in sizes])  # (N, B), or (N, B, leaves)
        scale = torch.stack([scale for _, scale in sizes])
        rel_size = relative(size, scale)
        if size.dim() == 3:
            size, rel_size = size.amax(dim=2), rel_size.amax(dim=2)
        traces = _no_nan(torch.stack((size, rel_size)))
        if final.size is sizes[-1][0]:
            residuals = traces[:, -1].clone()
        else:
            rel_final = relative(final.size, final.scale)
            residuals = _no_nan(torch.stack((leaf_max(final.size), leaf_max(rel_final))))
        return Solution(
            z=final.z,
            abs_residual=residuals[0],
            rel_residual=residuals[1],
            stop_mode=self.stop_mode,
            tol=self.tol,
            status=status,
            nstep=nstep,
            nfe=nfe,
            abs_trace=traces[0],
            rel_trace=traces[1],
            states=[final.z if s is None else s for s in states],
            coupled=coupled,
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class Solver(Method, SolverLoop):
    """A method for z = f(z). Its fields are its hyperparameters; it prints as the call that made it.

    Calling a solver runs it: `Anderson(tol=1e-6)(f, z0)` returns a `Solution`. The call builds no
    autograd graph; for derivatives use `torchdeq.DEQ`.

    Arguments:
        max_iter: the largest number of evaluations of f, at least 1, counted alike for every solver. Only a solve
            that did not converge makes more: one, if the samples' best iterates come from different
            evaluations, to measure them together, because an f that couples samples would make such a mixture
            worthless (the best single iterate is returned then); and three to five, if there were fifty, or ten that
            achieved little, to see whether f couples samples. If it does, the batch is solved again as one sample.
        tol: a sample has converged when its residual is at most `tol`. 0 asks for all evaluations.
        stop_mode: the residual is ‖f(z) − z‖ for 'abs', ‖f(z) − z‖ / ‖f(z)‖ for 'rel'. Euclidean norms
            over everything that belongs to one sample.
        norm: 'l2': one residual for all that belongs to a sample. 'max': one for each leaf of a nested state, and
            the largest counts, so that a small leaf cannot hide in a big one.
        min_iter: no sample stops before so many evaluations, though it has converged.
        patience: a sample is `STALLED` when it has not come closer in so many evaluations and its residual is small
            enough to be rounding: within 100 ε of ‖f(z)‖, ε that of the narrowest dtype that f is seen to compute in,
            and 1/16 at most. A half-precision f always ends so. 0: never.
        check_every: ask the device whether to stop every so many evaluations only. An evaluation that is not asked
            about costs no wait. On a CUDA device the answer is read one evaluation late, without waiting for it.
        compact: leave samples that are done out of the batch when they are half of it or more. f must treat samples
            separately, which is checked, and must accept fewer of them: it is called as `f(z, rows=index)` with
            their numbers if it has a parameter of that name.
        return_final: make all `max_iter` evaluations and return the last iterate rather than the best.

    Raises:
        ValueError: a hyperparameter is out of its range.

    Example:
        A method is a frozen dataclass with `init` and `step`; the loop does the rest.

        >>> from dataclasses import dataclass
        >>> import torch
        >>> @dataclass(frozen=True, kw_only=True, repr=False)
        ... class Halfway(Solver):
        ...     def init(self, z):
        ...         return None
        ...     def step(self, f, z, fz, state):
        ...         return (z + fz) / 2, state
        >>> sol = Halfway(tol=1e-4, max_iter=60)(torch.cos, torch.zeros(2, 3))
        >>> sol.converged.tolist(), Halfway(tol=1e-4)
        ([True, True], Halfway(tol=0.0001))
    """

    max_iter: int = 50
    tol: float = 1e-3
    stop_mode: StopMode = "abs"
    norm: Literal["l2", "max"] = "l2"
    min_iter: int = 1
    patience: int = 10
    check_every: int = 1
    compact: bool = False
    return_final: bool = False

    def __post_init__(self) -> None:
        self.require(
            isinstance(self.max_iter, int) and self.max_iter >= 1,
            f"max_iter counts evaluations of f and must be an integer of at least 1, got {self.max_iter!r}",
        )
        self.require(
            isinstance(self.tol, int | float) and self.tol >= 0,
            f"tol must be a number of at least 0, got {self.tol!r}",
        )
        self.require(
            self.stop_mode in ("abs", "rel"),
            f"stop_mode must be 'abs' or 'rel', got {self.stop_mode!r}",
        )
        self.require(self.norm in ("l2", "max"), f"norm must be 'l2' or 'max', got {self.norm!r}")
        for name, least in (("min_iter", 1), ("patience", 0), ("check_every", 1)):
            value = getattr(self, name)
            self.require(
                isinstance(value, int) and value >= least,
                f"{name} counts evaluations and must be an integer of at least {least}, got {value!r}",
            )
        self.require(
            self.min_iter <= self.max_iter,
            f"min_iter must be at most max_iter={self.max_iter}, got {self.min_iter!r}",
        )


def start_of(f: Map) -> Tensor:
    """f(0) of an affine map, free of charge."""
    if not isinstance(f, AffineMap):
        raise TypeError(f"a solve without z0 needs an AffineMap, whose f(0) is known; got {f!r}.")
    shift: Tensor = f.shift
    return shift


def flatten_map(f: Callable[[Tree], Tree] | AffineMap, layout: Layout) -> Map:
    """f on pytrees as a map (B, D) -> (B, D); an affine map stays one."""
    if isinstance(f, AffineMap):
        precondition = None if f.preconditioner is None else FlatMap(f.preconditioner, layout)
        return AffineMap(
            FlatMap(f.linear, layout), layout.ravel(f.shift, source="AffineMap.shift"), precondition
        )
    return FlatMap(f, layout)


def layout_of_map(f: Map) -> Layout | None:
    """The layout of the state that f maps, where it is known."""
    inner = f.linear if isinstance(f, AffineMap) else f
    return inner.layout if isinstance(inner, FlatMap) else None


def unravel_solution(solution: Solution, layout: Layout) -> Solution:
    """The solution with z and states in the structure of the layout."""
    if layout.plain == solution.z.shape and not solution.states:
        return solution
    return dataclasses.replace(
        solution,
        z=layout.unravel(solution.z),
        states=[layout.unravel(s) for s in solution.states],
    )


def checked_record(record: Sequence[int], max_iter: int) -> tuple[int, ...]:
    """`record` as a tuple of increasing evaluation counts within 1 … max_iter."""
    steps = tuple(int(r) for r in record)
    if any(b <= a for a, b in itertools.pairwise(steps)) or any(not 1 <= s <= max_iter for s in steps):
        raise ValueError(
            f"the evaluations to sample must increase and lie within 1 … max_iter={max_iter}, got "
            f"{list(steps)}."
        )
    return steps


def _with_rows(whole: Solution, part: Solution, rows: Tensor) -> Solution:
    """The solution of a batch in which the samples `rows` were solved further, apart from the others."""

    def put(a: Tensor, b: Tensor) -> Tensor:
        return a.index_copy(0, rows, b)

    def trace(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a, a[-1:].repeat(len(b), 1).index_copy(1, rows, b)])

    return dataclasses.replace(
        whole,
        z=put(whole.z, part.z),
        abs_residual=put(whole.abs_residual, part.abs_residual),
        rel_residual=put(whole.rel_residual, part.rel_residual),
        status=put(whole.status, part.status),
        nstep=put(whole.nstep, part.nstep),
        nfe=part.nfe,
        abs_trace=trace(whole.abs_trace, part.abs_trace),
        rel_trace=trace(whole.rel_trace, part.rel_trace),
        states=[*whole.states, *(put(whole.z, z) for z in part.states)],
    )


def _no_nan(size: Tensor) -> Tensor:
    return size.nan_to_num(nan=math.inf, posinf=math.inf)
