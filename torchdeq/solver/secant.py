"""What Anderson's and Broyden's methods share: a model of the Jacobian from the last differences.

With residuals r = f(z) − z, and the differences s_i of z and y_i of r over the last c steps as rows of S and Y,

    z_{k+1} = z_k + τ r_k − (S + τ Y)ᵀ γ,      K γ = V r_k.

    V    K                                                  the method
    Y    Y Yᵀ                                               Anderson, type II: ‖r_k − Yᵀγ‖ is smallest
    S    S Yᵀ                                               Anderson, type I: all secant equations hold
    S    S Yᵀ + strictly lower part of S Sᵀ                 Broyden's good method, c updates of H = −I (τ = 1)
    Y    upper part of Y Yᵀ                                 Broyden's bad method, likewise

Rows run from the oldest to the newest. Sources: Fang and Saad (2009), doi 10.1002/nla.617, for the family; Byrd,
Nocedal and Schnabel (1994), doi 10.1007/BF01582063, for sequential updates in compact form. There the oldest
difference is dropped by leaving out its row and column. In a product of updates each factor depends on those before
it, so that nothing can be dropped but all.

Each pair (s, y) is divided by ‖y‖. That changes no iterate, and makes the diagonal of Y Yᵀ one: numbers of any scale
are safe, and a regularisation is relative.

Kept are V and U = S + τ Y; what else is needed of S and Y follows from them. Products with the histories are all that
costs, so that each method makes those that it needs and no others. Beyond the rows in use K is the identity. In
a graph, where all rows are in use from the start, they are zero and get γ = 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from torchdeq._state import Map, per_sample, rough_norm
from torchdeq.solver.base import Solver
from torchdeq.solver.bordered import bordered_step
from torchdeq.solver.maps import Tally, residual_of
from torchdeq.solver.watch import TOO_LARGE, TOO_SMALL

#: In a graph on a CPU inner products of so many numbers are sums in the loop that has made the vectors.
_FUSED = 1024
#: Batched products of fewer multiplications than that are slow on a CPU: torch makes them without BLAS.
SMALL = 400


class SecantState(NamedTuple):
    """What a secant method remembers. Of the histories n rows are in use; where c are, the oldest is overwritten.

    In a graph that serves every step (`SolverLoop.room`) `pairs` is a tensor, and all rows are in use from the start.
    """

    z: Tensor  # (B, D), the last iterate
    r: Tensor  # (B, D), its residual
    size: Tensor  # (B,), the norm of r
    v: Tensor  # (B, capacity, D), V, and zeros for alignment
    u: Tensor  # likewise, S + τ Y
    k: Tensor  # (B, matrices, N, N), N at least the capacity; in float64, and the identity beyond what is in use
    more: Any  # what a method remembers besides
    pairs: int | Tensor  # differences so far; −1 before the first evaluation; as a tensor (1,)
    valid: Tensor | None  # (B, capacity), which rows count, the others get γ = 0; None: all of them
    skip: Tensor | None  # (B,), how many differences to come say nothing; None: none
    quick: Any = None  # what a method keeps for its quick steps


class Entries(NamedTuple):
    """What a new pair adds to the small system."""

    row: Tensor  # (B, matrices, n), of K, for the newest pair
    column: Tensor  # (B, matrices, n)
    corner: float | None  # where they meet; None: what stands in the column
    b: Any  # V r, (B, n); or what `model` makes it from


class SecantEstimate(NamedTuple):
    """H = I − (S + Y)ᵀ K⁻¹ V of some samples, n differences each: the matrix of the steps z + H r.

    The damping τ is not in it. It belongs to the steps, and not to what they have taught.
    """

    y: Tensor  # (B, n, D), Y, and zeros for alignment
    u: Tensor  # (B, n, D), likewise S + τ Y
    k: Tensor  # (B, n, n), K
    use: Tensor  # (B, n), 1 for the differences that count and 0 for the others
    of_y: Tensor  # (B,), 1 where V is Y, and 0 where it is S
    tau: Tensor  # (B,)

    def times(self, r: Tensor, *, transposed: bool) -> Tensor:
        """H r, or Hᵀ r = r − Vᵀ K⁻ᵀ (S + Y) r, (B, D)."""
        size, one = r.shape[1], torch.ones_like(self.tau)
        wide = torch.nn.functional.pad(r, (0, self.y.shape[2] - size))[:, None]
        ur, yr = torch.bmm(wide, self.u.mT)[:, 0], torch.bmm(wide, self.y.mT)[:, 0]  # (B, n)
        # Both in parts of U and of Y, S being U − τ Y.
        v = (one - self.of_y)[:, None], (self.of_y - self.tau * (1 - self.of_y))[:, None]
        sum_ = one[:, None], (one - self.tau)[:, None]
        right, left = (sum_, v) if transposed else (v, sum_)
        b = (right[0] * ur + right[1] * yr) * self.use
        gamma = solve_small(self.k.mT if transposed else self.k, b) * self.use
        u_part, y_part = (left[0] * gamma)[:, None], (left[1] * gamma)[:, None]
        return r - (torch.bmm(u_part, self.u) + torch.bmm(y_part, self.y))[:, 0, :size]

    def select(self, rows: Tensor) -> SecantEstimate:
        """That of some of the samples."""
        return SecantEstimate(*(t[rows] for t in self))


@dataclass(frozen=True, kw_only=True, repr=False)
class SecantSolver(Solver):
    """The histories, their order, the small system, and the safeguards.

    A method supplies `depth` (c), `keeps_y` (V) and `entries` (K's row and column for a new pair, and V r); and
    `model`, if K and V change from step to step.

    A sample whose f is not finite goes back to the iterate before and makes a Picard step of half the length from
    there, with an empty history; three times at most in a solve.
    """

    recovers: ClassVar[int] = 3
    learns: ClassVar[bool] = True
    fixed_shape: ClassVar[bool] = True
    #: How many matrices K a method keeps.
    matrices: ClassVar[int] = 1
    #: Whether V is Y; otherwise it is S.
    keeps_y: ClassVar[bool] = True
    #: Whether `entries` needs s.
    needs_s: ClassVar[bool] = True
    #: Whether K is symmetric and positive definite, but for rounding.
    positive: ClassVar[bool] = False
    #: A residual that grows by more than this factor empties the sample's history, and its step is half of Picard's.
    growth: ClassVar[float] = math.inf
    #: τ, which `Anderson` makes a field.
    tau: ClassVar[float] = 1.0

    @property
    def depth(self) -> int:
        """c, the largest number of differences in use."""
        raise NotImplementedError

    def entries(self, v: Tensor, u: Tensor, s: Tensor, y: Tensor, r: Tensor) -> Entries:
        """The small system's new row and column, and its right-hand side.

        Arguments:
            v, u: the histories, (B, n, D), with the new pair in them.
            s, y: the new pair, (B, D). Products with the histories are made by `against`.
            r: the residual, (B, D).
        """
        raise NotImplementedError

    def model(self, k: Tensor, b: Any, more: Any) -> tuple[Tensor, Tensor]:
        """K (B, n, n) of this step, and V r (B, n).

        Arguments:
            k: all matrices, (B, matrices, n, n).
            b: what `entries` gave.
            more: what the method remembers besides.
        """
        return k[:, 0], b

    def of_y(self, more: Any) -> Tensor | bool:
        """Whether V is Y in this step, the same for all samples or per sample (B,). Otherwise it is S."""
        return self.keeps_y

    def ridge(self, dtype: torch.dtype) -> tuple[float, ...]:
        """What `model` adds to the diagonal of each matrix."""
        return (0.0,) * self.matrices

    def notice(self, size: Tensor, before: Tensor, more: Any) -> Any:
        """What the method remembers besides, after the norm of the residual has gone from `before` to `size` (B,)."""
        return more

    def begin(self, z: Tensor) -> Any:
        """What the method remembers besides."""
        return None

    def init(self, z: Tensor) -> SecantState:
        """An empty history; memory grows as it is used."""
        batch, size = z.shape
        row, none = z.new_zeros(batch), z.new_zeros(batch, 0, size + padding(size, z))
        k = none.new_zeros((batch, self.matrices, 0, 0), dtype=precise(z))
        return SecantState(z, z, row, none, torch.empty_like(none), k, self.begin(z), -1, None, None)

    def room(self, state: SecantState, steps: int) -> SecantState:
        """See `SolverLoop.room`."""
        batch, size = state.z.shape
        depth = self._depth(size)
        if isinstance(state.pairs, int):
            device = state.z.device
            state = state._replace(
                pairs=torch.full((1,), state.pairs, device=device),
                valid=torch.zeros(batch, 0, dtype=torch.bool, device=device),
                skip=torch.zeros(batch, dtype=torch.int64, device=device),
            )
        capacity = state.v.shape[1]
        wanted = min(depth, capacity + steps)
        return state if wanted <= capacity else _widened(state, wanted)

    def step(self, f: Map, z: Tensor, fz: Tensor, state: SecantState) -> tuple[Tensor, SecantState]:
        """The quasi-Newton step; the first one is Picard's."""
        if isinstance(state.pairs, Tensor):
            return bordered_step(self, f, z, fz, state)
        r, size = residual_of(f, z, fz)
        step = torch.add(z, r, alpha=self.tau)
        depth = self._depth(z.shape[1])
        if state.pairs < 0:
            return step, state._replace(z=z, r=r, size=size, pairs=0)
        n, slot = min(state.pairs + 1, depth), state.pairs % depth
        state = with_room(state, n, depth)
        s, y, void, state = self._pair(f, z, r, size, state, slot)
        v, u = (state.v, state.u) if n == state.v.shape[1] else (state.v[:, :n], state.u[:, :n])
        entries = self.entries(v, u, s, y, r)
        _put_entries(state.k, slot, n, entries, void)
        more = self.notice(size, state.size, state.more)
        used = n + padding(n, state.k)
        k = state.k if used == state.k.shape[3] else state.k[:, :, :used, :used]
        k, b = self.model(k, entries.b, more)
        valid = self._valid(f, state, slot, n, size)
        if valid is not None:
            if self.growth < math.inf:
                grew = size > self.growth * state.size
                step = torch.where(grew[:, None], torch.add(z, r, alpha=self.tau / 2), step)
            k, b = _of_valid(k, valid[:, :n]), torch.where(valid[:, :n], b, 0.0)
        gamma = solve_small(k, b, reads=reads(f), positive=self.positive)
        z_next = minus(step, gamma, u)
        return z_next, state._replace(z=z, r=r, size=size, more=more, pairs=state.pairs + 1, valid=valid)

    def _pair(
        self, f: Map, z: Tensor, r: Tensor, size: Tensor, state: SecantState, slot: int
    ) -> tuple[Tensor, Tensor, Tensor | None, SecantState]:
        """The newest differences s and y, both divided by ‖y‖ and in the histories; and for whom they are void."""
        if isinstance(f, Tally) and f.changed and self.is_usual(z, state):  # nobody; the same with less work
            own = state.v[:, slot]
            s = torch.sub(z, state.z, out=None if self.keeps_y else own)
            y = torch.sub(r, state.r, out=own if self.keeps_y else None)
            weight, void = weight_of(f, y, size)
            torch.add(s, y, alpha=self.tau, out=state.u[:, slot]).mul_(weight)
            return s.mul_(weight) if self.needs_s else s, y.mul_(weight), void, state
        s, y = z - state.z, r - state.r
        length = per_sample(y)
        if reads(f):  # as in a quick step, where that is safe
            rough = rough_norm(y)
            length = torch.where((rough > TOO_SMALL) & (rough < TOO_LARGE), rough, length)
        # A difference that is nothing but rounding, or that a rescue has spoilt, says nothing.
        void = length <= _nothing_beside(size)
        if state.skip is not None:
            void = void | (state.skip > 0)
            state = state._replace(skip=(state.skip - 1).clamp_min(0))
        weight = length.reciprocal().masked_fill_(void, 0.0)[:, None]
        u = torch.add(s, y, alpha=self.tau) * weight
        s, y = s * weight, y * weight
        d = z.shape[1]
        state.v[:, slot, :d] = y if self.keeps_y else s
        state.u[:, slot, :d] = u
        return s, y, void, state

    def is_usual(self, z: Tensor, state: SecantState) -> bool:
        """Whether all differences so far are in use, and nothing is recorded: then quicker ways may do."""
        return (
            isinstance(state.pairs, int)
            and state.pairs >= 0
            and state.valid is None
            and state.skip is None
            and state.v.shape[2] == z.shape[1]
            and not torch.is_grad_enabled()
        )

    def _depth(self, d: int) -> int:
        """More differences than that say nothing new about d unknowns."""
        return min(self.depth, max(1, 3 * d))

    def _valid(self, f: Map, state: SecantState, slot: int, n: int, size: Tensor) -> Tensor | None:
        """Which rows count from now on; None if all do, where the host may know."""
        valid = state.valid
        if valid is None:
            if self.growth == math.inf or (isinstance(f, Tally) and f.closer):
                return None
            grew = size > self.growth * state.size
            if reads(f) and not bool(grew.any()):
                return None
            valid = torch.zeros(state.v.shape[:2], dtype=torch.bool, device=size.device)
            valid[:, :n] = ~grew[:, None]
            return valid
        valid = valid.clone()
        valid[:, slot] = True
        return valid & ~(size > self.growth * state.size)[:, None] if self.growth < math.inf else valid

    def estimate(self, f: Map, z: Tensor, fz: Tensor, state: SecantState) -> SecantEstimate:
        """See `SolverLoop.estimate`. The last difference counts too, as if another step were made."""
        finite = fz.isfinite().all(dim=1)
        here = finite[:, None]
        none = torch.zeros_like(finite, dtype=torch.int64)
        skip = (none if state.skip is None else state.skip).maximum((~finite).to(torch.int64))
        z, fz = torch.where(here, z, state.z), torch.where(here, fz, state.z + state.r)
        _, state = SecantSolver.step(self, f, z, fz, state._replace(skip=skip))
        assert isinstance(state.pairs, int)
        n = min(state.pairs, state.v.shape[1])
        v, u = state.v[:, :n], state.u[:, :n]
        k, _ = self.model(state.k[:, :, :n, :n], (z.new_zeros(len(z), n),) * 2, state.more)
        k = k.to(z.dtype)
        one = z.new_ones(len(z))
        use = z.new_ones(len(z), n)
        if state.valid is not None:
            k, use = _of_valid(k, state.valid[:, :n]), use * state.valid[:, :n]
        y = v if self.keeps_y else (u - v) / self.tau
        return SecantEstimate(y, u, k, use, one * self.of_y(state.more), one * self.tau)

    def rescue(
        self, z: Tensor, fz: Tensor, state: SecantState, struck: Tensor, strikes: Tensor
    ) -> tuple[Tensor, Tensor, SecantState]:
        """See `SolverLoop.rescue`: the iterate before, with half its residual, and no history."""
        back = struck[:, None]
        halved = torch.add(state.z, state.r, alpha=0.5)
        valid = state.valid
        if valid is None:
            valid = back.expand(-1, state.k.shape[2]) | True
        # Neither this step's difference nor the next one's is that of two iterates.
        spoilt = 2 * struck.to(torch.int64)
        skip = spoilt if state.skip is None else torch.maximum(state.skip, spoilt)
        state = state._replace(valid=valid & ~back, skip=skip)
        return torch.where(back, state.z, z), torch.where(back, halved, fz), state


def weight_of(f: Tally, y: Tensor, size: Tensor) -> tuple[Tensor, Tensor | None]:
    """1 / ‖y‖, (B, 1), where the loop has seen that y is no rounding. Samples at rest get 0 if it is.

    Arguments:
        f: knows whether there are any.
        y: the difference of residuals, (B, D).
        size: the norm of the residual, (B,).

    Returns:
        The weights, and for whom they are 0, (B,); None: for nobody.
    """
    length = torch.linalg.vector_norm(y, dim=1, keepdim=True)
    if not f.rest:
        return length.reciprocal_(), None
    void = length[:, 0] <= _nothing_beside(size)
    return length.reciprocal_().masked_fill_(void[:, None], 0.0), void


def _nothing_beside(size: Tensor) -> Tensor:
    """The norm up to which a difference is rounding, for residuals of this norm."""
    info = torch.finfo(size.dtype)
    return (info.eps * size).clamp_min_(info.tiny)


def _of_valid(k: Tensor, valid: Tensor) -> Tensor:
    """K (B, N, N), in which the differences that do not count (B, n) are apart from the others."""
    if extra := k.shape[2] - valid.shape[1]:
        valid = torch.nn.functional.pad(valid, (0, extra))
    eye = torch.eye(k.shape[2], dtype=k.dtype, device=k.device)
    return torch.where(valid[:, :, None] & valid[:, None], k, eye)


def solve_small(k: Tensor, b: Tensor, *, reads: bool = False, positive: bool = False) -> Tensor:
    """γ with K γ = b, (B, n); 0 for a sample whose K is singular: a Picard step.

    In float64, where the device has it: K is ill-conditioned after some tens of steps, and costs next to nothing.

    Arguments:
        k: K, (B, N, N), the identity beyond n.
        b: (B, n).
        reads: whether the host may look if any sample is singular, rather than do what is then to be done in any case.
        positive: whether K is symmetric and positive definite, but for rounding. On a CPU Cholesky's method takes less
            than half the time.
    """
    n, dtype = b.shape[1], b.dtype
    k = k.to(precise(b))
    if extra := padding(k.shape[1], k):
        k = torch.nn.functional.pad(k, (0, extra, 0, extra))
        k.diagonal(dim1=1, dim2=2)[:, -extra:] = 1
    if n < k.shape[1]:
        padded = k.new_zeros(k.shape[:2])
        padded[:, :n] = b
        b = padded
    else:
        b = b.to(k.dtype)
    done: Tensor | bool = False
    if positive and k.device.type == "cpu":
        factor, info = torch.linalg.cholesky_ex(k)
        first = torch.cholesky_solve(b[:, :, None], factor)[:, :, 0]
        done = True if reads and not any(info.tolist()) else info == 0
    if done is not True:
        gamma, _ = torch.linalg.solve_ex(k, b)  # does not raise on a singular sample, which gets inf or NaN
    if done is not False:
        gamma = first if done is True else torch.where(done[:, None], first, gamma)
    if not (reads and math.isfinite(float(gamma.sum()))):
        broken = (gamma * 0).sum(dim=1, keepdim=True) != 0
        gamma = gamma.masked_fill(broken, 0.0)
    # LAPACK's columns come out transposed; a batched product with such a γ is ten times slower.
    return gamma[:, :n].to(dtype, copy=True, memory_format=torch.contiguous_format)


def precise(like: Tensor) -> torch.dtype:
    """float64, where the device of a tensor has it; otherwise its own dtype."""
    return torch.float64 if like.device.type in ("cpu", "cuda") else like.dtype


def against(history: Tensor, *vectors: Tensor) -> tuple[Tensor, ...]:
    """The inner products of the rows of a history (B, n, D) with vectors (B, D), (B, 1, n) each."""
    # The vectors in front: as columns behind they take up to three times as long on a CPU. Not .mT, which a loop of a
    # graph cannot have. One pass for all, but on a CPU, where to put them into one tensor takes longer.
    across = history.transpose(1, 2)
    rows = [padded(vector, history)[:, None] for vector in vectors]
    if torch.compiler.is_compiling() and history.device.type == "cpu" and history.shape[2] <= _FUSED:
        return tuple([(history * row).sum(dim=2)[:, None] for row in rows])
    if history.device.type == "cpu" and not torch.compiler.is_compiling():
        return tuple([torch.bmm(row, across) for row in rows])
    return torch.bmm(torch.cat(rows, dim=1), across).split(1, dim=1)


def padded(vector: Tensor, history: Tensor) -> Tensor:
    """The vector (B, D) as wide as a row of the history."""
    extra = history.shape[2] - vector.shape[1]
    return torch.nn.functional.pad(vector, (0, extra)) if extra else vector


def minus(step: Tensor, gamma: Tensor, u: Tensor) -> Tensor:
    """step − Uᵀγ, (B, D), perhaps in the memory of step."""
    d = step.shape[1]
    if is_small(u):  # two rows, of which one is zero, for the sake of BLAS
        return step - torch.bmm(torch.nn.functional.pad(gamma[:, None], (0, 0, 0, 1)), u)[:, 0, :d]
    if u.shape[2] == d:
        step[:, None].baddbmm_(gamma[:, None], u, alpha=-1)
        return step
    return step - torch.bmm(gamma[:, None], u)[:, 0, :d]


def is_small(u: Tensor) -> bool:
    """Whether a product of one row with a history (B, n, D) is made without BLAS, and of two rows with it."""
    n, d = u.shape[1:]
    return u.device.type == "cpu" and n * d < SMALL <= 2 * n * d


def reads(f: Map) -> bool:
    """Whether the loop lets the host look at values on the way."""
    return isinstance(f, Tally) and f.reads


def _put_entries(k: Tensor, slot: int, n: int, entries: Entries, void: Tensor | None) -> None:
    """Write a row and a column into K (B, matrices, N, N). A void pair's are 0, and 1 where they meet."""
    row, column, corner, _ = entries
    if corner is None and void is not None:
        column = column.clone()
        column[:, :, slot].masked_fill_(void[:, None], 1.0)
    k[:, :, slot, :n] = row
    k[:, :, :n, slot] = column
    if corner is not None:
        k[:, :, slot, slot] = corner


def padding(size: int, like: Tensor) -> int:
    """Columns to add so that each sample's numbers begin at a multiple of 64 bytes; in float64 on the CPU, else 0.

    Where they do not, products and solves on the CPU round differently, and a sample's last bits would depend on where
    in the batch it stands.
    """
    return -size % 8 if like.dtype == torch.float64 and like.device.type == "cpu" else 0


def with_room(state: SecantState, n: int, depth: int) -> SecantState:
    """The state with room for n pairs, and for seven more at most: memory follows use."""
    capacity = state.v.shape[1]
    if n > capacity:
        capacity += min(4 if capacity < 8 else 8, depth - capacity)
    elif n <= state.k.shape[2] and (state.valid is None or n <= state.valid.shape[1]):
        return state  # otherwise another step from this very state has made the histories longer already
    return _widened(state, capacity)


def _widened(state: SecantState, wanted: int) -> SecantState:
    """The state with room for so many pairs."""
    before = state.k.shape[2]
    k = state.k
    if wanted > before:
        grows = wanted + padding(wanted, k) - before
        k = torch.nn.functional.pad(k, (0, grows, 0, grows))
        if torch.compiler.is_compiling():
            new = torch.arange(k.shape[2], device=k.device) >= before
            k = k + torch.eye(k.shape[2], dtype=k.dtype, device=k.device) * new
        else:
            k.diagonal(dim1=2, dim2=3)[:, :, before:].fill_(1)
    # In a graph all rows are in use from the start.
    clear = isinstance(state.pairs, Tensor) or state.v.shape[2] != state.z.shape[1]
    return state._replace(
        v=longer(state.v, wanted, clear=clear),
        u=longer(state.u, wanted, clear=clear),
        k=k,
        valid=None
        if state.valid is None
        else torch.nn.functional.pad(state.valid, (0, wanted - state.valid.shape[1])),
        quick=None,
    )


def longer(history: Tensor, wanted: int, *, clear: bool = True) -> Tensor:
    """The history (B, n, D) with room for so many rows, and if they are to be `clear` zeros in them.

    It is the same tensor over other memory. So the old memory is free at once, though the loop still has the state
    before, and of several histories only one at a time takes it twice. Not in a graph, where memory is its business.

    Example:
        >>> history = torch.ones(1, 1, 2)
        >>> longer(history, 2) is history, history
        (True, tensor([[[1., 1.],
                 [0., 0.]]]))
    """
    if history.shape[1] == wanted:
        return history
    shape = history.shape[0], wanted, history.shape[2]
    wider = history.new_zeros(shape) if clear else history.new_empty(shape)
    wider[:, : history.shape[1]] = history
    return wider if torch.compiler.is_compiling() else history.set_(wider)  # type: ignore[call-overload]
