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
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from torchdeq._state import Map, per_sample
from torchdeq.solver.base import Solver


class SecantState(NamedTuple):
    """What a secant method remembers. Of the histories n rows are in use; where c are, the oldest is overwritten."""

    z: Tensor  # (B, D), the last iterate
    r: Tensor  # (B, D), its residual
    size: Tensor  # (B,), the norm of r
    y: Tensor  # (B, capacity, D), and zeros for alignment
    u: Tensor  # likewise, s + τ y
    k: Tensor  # (B, matrices, capacity, capacity)
    more: Any  # what a method remembers besides
    pairs: int  # differences so far; −1 before the first evaluation
    valid: Tensor | None  # (B, capacity), which rows count, the others get γ = 0; None: all of them
    skip: Tensor | None  # (B,), how many differences to come say nothing; None: none


class Products(NamedTuple):
    """Inner products of the histories with the newest s and y, and with r; each (B, n)."""

    yy: Tensor  # Y y
    yr: Tensor  # Y r
    ys: Tensor  # Y s
    sy: Tensor  # S y
    sr: Tensor  # S r
    us: Tensor  # U s


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

    A method supplies `depth` (c), `entries` (the row and the column of K for a new pair) and `model` (K and V).

    A sample whose f is not finite goes back to the iterate before and makes a Picard step of half the length from
    there, with an empty history; three times at most in a solve.
    """

    recovers: ClassVar[int] = 3
    learns: ClassVar[bool] = True
    #: How many matrices K a method keeps.
    matrices: ClassVar[int] = 1
    #: Whether K or V needs s.
    needs_s: ClassVar[bool] = True
    #: A residual that grows by more than this factor empties the sample's history, and its step is half of Picard's.
    growth: ClassVar[float] = math.inf
    #: τ, which `Anderson` makes a field.
    tau: ClassVar[float] = 1.0

    @property
    def depth(self) -> int:
        """c, the largest number of differences in use."""
        raise NotImplementedError

    def entries(self, products: Products) -> tuple[Tensor, Tensor]:
        """K's row and column for the newest pair, (B, matrices, n) each. Where they meet the column counts."""
        raise NotImplementedError

    def model(self, k: Tensor, more: Any) -> tuple[Tensor, Tensor | bool]:
        """K (B, n, n) of this step, and whether V is Y, the same for all or per sample (B,). Otherwise it is S.

        Arguments:
            k: all matrices, (B, matrices, n, n).
            more: what the method remembers besides.
        """
        raise NotImplementedError

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
        k = z.new_zeros(batch, self.matrices, 0, 0)
        valid = torch.zeros(batch, 0, dtype=torch.bool, device=z.device) if self.growth < math.inf else None
        return SecantState(z, z, row, none, none, k, self.begin(z), -1, valid, None)

    def step(self, f: Map, z: Tensor, fz: Tensor, state: SecantState) -> tuple[Tensor, SecantState]:
        """The quasi-Newton step; the first one is Picard's."""
        r = fz - z
        size = per_sample(r)
        step = torch.add(z, r, alpha=self.tau)
        if state.pairs < 0:
            return step, state._replace(z=z, r=r, size=size, pairs=0)
        d = z.shape[1]
        depth = min(self.depth, max(1, 3 * d))  # more differences than that say nothing new about d unknowns
        n, slot = min(state.pairs + 1, depth), state.pairs % depth
        state = _with_room(state, n, depth)

        s, y = z - state.z, r - state.r
        length = per_sample(y)
        # A difference that is nothing but rounding, or that a rescue has spoilt, says nothing.
        info = torch.finfo(z.dtype)
        void = length <= (info.eps * size).clamp_min(info.tiny)
        if state.skip is not None:
            void = void | (state.skip > 0)
            state = state._replace(skip=(state.skip - 1).clamp_min(0))
        weight = length.masked_fill(void, math.inf).reciprocal()[:, None]
        s, y = s * weight, y * weight
        state.y[:, slot, :d] = y
        torch.add(s, y, alpha=self.tau, out=state.u[:, slot, :d])

        products = self._products(state.y[:, :n], state.u[:, :n], s, y, r)
        row, column = self.entries(products)  # (B, matrices, n)
        corner = column[:, :, slot].masked_fill(
            void[:, None], 1.0
        )  # a void pair's row and column are 0 elsewhere
        state.k[:, :, slot, :n] = row
        state.k[:, :, :n, slot] = column
        state.k[:, :, slot, slot] = corner
        more = self.notice(size, state.size, state.more)
        k, of_y = self.model(state.k[:, :, :n, :n], more)
        if isinstance(of_y, Tensor):
            b = torch.where(of_y[:, None], products.yr, products.sr)
        else:
            b = products.yr if of_y else products.sr
        if state.valid is not None:
            state.valid[:, slot] = True
            if self.growth < math.inf:
                grew = (size > self.growth * state.size)[:, None]
                state.valid.masked_fill_(grew, False)
                step = torch.where(grew, torch.add(z, r, alpha=self.tau / 2), step)
            valid = state.valid[:, :n]
            k, b = _of_valid(k, valid), torch.where(valid, b, 0.0)
        gamma = solve_small(k, b)
        z_next = step - torch.bmm(gamma[:, None], state.u[:, :n])[:, 0, :d]
        return z_next, state._replace(z=z, r=r, size=size, more=more, pairs=state.pairs + 1)

    def estimate(self, f: Map, z: Tensor, fz: Tensor, state: SecantState) -> SecantEstimate:
        """See `SolverLoop.estimate`. The last difference counts too, as if another step were made."""
        finite = fz.isfinite().all(dim=1)
        here = finite[:, None]
        none = torch.zeros_like(finite, dtype=torch.int64)
        skip = (none if state.skip is None else state.skip).maximum((~finite).to(torch.int64))
        z, fz = torch.where(here, z, state.z), torch.where(here, fz, state.z + state.r)
        _, state = SecantSolver.step(self, f, z, fz, state._replace(skip=skip))
        n = min(state.pairs, state.k.shape[2])
        k, of_y = self.model(state.k[:, :, :n, :n], state.more)
        one = z.new_ones(len(z))
        use = z.new_ones(len(z), n)
        if state.valid is not None:
            k, use = _of_valid(k, state.valid[:, :n]), use * state.valid[:, :n]
        return SecantEstimate(state.y[:, :n], state.u[:, :n], k, use, one * of_y, one * self.tau)

    def _products(self, ys: Tensor, us: Tensor, s: Tensor, y: Tensor, r: Tensor) -> Products:
        new = torch.stack((y, r, s) if self.needs_s else (y, r), dim=1)
        if extra := padding(y.shape[1], y):
            new = torch.nn.functional.pad(new, (0, extra))
        # The transpose of a stack, not a stack of columns, which is four times slower.
        yy, yr, *more = torch.bmm(ys, new.mT).unbind(2)
        if not self.needs_s:
            return Products(yy, yr, yy, yy, yr, yy)
        uy, ur, us_ = torch.bmm(us, new.mT).unbind(2)
        # S = U − τ Y
        return Products(
            yy, yr, more[0], torch.sub(uy, yy, alpha=self.tau), torch.sub(ur, yr, alpha=self.tau), us_
        )

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


def _of_valid(k: Tensor, valid: Tensor) -> Tensor:
    """K (B, n, n), in which the differences that do not count (B, n) are apart from the others."""
    eye = torch.eye(k.shape[2], dtype=k.dtype, device=k.device)
    return torch.where(valid[:, :, None] & valid[:, None], k, eye)


def solve_small(k: Tensor, b: Tensor) -> Tensor:
    """γ with K γ = b, (B, n), for K (B, n, n) and b (B, n); 0 for a sample whose K is singular: a Picard step.

    In float64, where the device has it: K is ill-conditioned after some tens of steps, and costs next to nothing.
    """
    n, dtype = b.shape[1], b.dtype
    if b.device.type in ("cpu", "cuda"):
        k, b = k.double(), b.double()
    if extra := padding(n, b):
        k = torch.nn.functional.pad(k, (0, extra, 0, extra))
        k.diagonal(dim1=1, dim2=2)[:, n:] = 1
        b = torch.nn.functional.pad(b, (0, extra))
    gamma, _ = torch.linalg.solve_ex(k, b)  # does not raise on a singular sample, which gets inf or NaN
    broken = (gamma * 0).sum(dim=1, keepdim=True) != 0
    return gamma.masked_fill(broken, 0.0)[:, :n].to(dtype)


def padding(size: int, like: Tensor) -> int:
    """Columns to add so that each sample's numbers begin at a multiple of 64 bytes; in float64 on the CPU, else 0.

    Where they do not, products and solves on the CPU round differently, and a sample's last bits would depend on where
    in the batch it stands.
    """
    return -size % 8 if like.dtype == torch.float64 and like.device.type == "cpu" else 0


def _with_room(state: SecantState, n: int, depth: int) -> SecantState:
    """The state with room for n pairs, and for seven more at most: memory follows use."""
    batch, capacity, size = state.y.shape
    if n <= capacity:
        return state
    more = min(4 if capacity < 8 else 8, depth - capacity)
    none = state.y.new_zeros(batch, more, size)
    return state._replace(
        y=torch.cat([state.y, none], dim=1),
        u=torch.cat([state.u, none], dim=1),
        k=torch.nn.functional.pad(state.k, (0, more, 0, more)),
        valid=None if state.valid is None else torch.nn.functional.pad(state.valid, (0, more)),
    )
