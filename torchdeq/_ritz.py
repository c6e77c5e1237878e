"""The eigenvalue of largest modulus of a linear map, and its vector, from products with the map alone.

    A V = V H + r bᵀ,   H y = θ y   →   A (V y) ≈ θ (V y),   with ‖A V y − θ V y‖ = |bᵀy| ‖r‖

Arnoldi's process spans a Krylov space V of a random start, one for each sample of a batch. Where V is full, the part
of it that belongs to the largest Ritz values θ is kept, and the process goes on from there with the same r ("thick
restart"). Complex pairs need no complex arithmetic: the real and the imaginary part of their vector are kept.

Sources: Arnoldi (1951), doi 10.1090/qam/42792; Stewart (2001), doi 10.1137/S0895479800371529, for the restart.
Departure: what is kept is made orthonormal from eigenvectors, since torch has no Schur form.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchdeq._state import Map, per_sample


class Ritz(NamedTuple):
    """What stands for the eigenvalue of largest modulus, per sample."""

    value: Tensor  # (B,), complex
    vector: Tensor  # (B, D), the real part of the Ritz vector, of unit norm
    error: Tensor  # (B,), to first order, how far the value may be from an eigenvalue
    products: int  # that were made


def leading_ritz(linear: Map, start: Tensor, products: int, m: int) -> Ritz:
    """The Ritz value of largest modulus of a linear map, with its vector.

    Arguments:
        linear: A, (B, D) -> (B, D), each sample for itself.
        start: (B, D), real; zero in no sample, D at least 1.
        products: how many products to make at most, at least 1. Fewer are made where a full space shows that more
            would change nothing: m, or as many as there are numbers.
        m: vectors of the size of the start to hold at most, at least 8.

    A sample whose products are not finite gets NaN for all. The error may be far too small for an A that is defective
    or far from normal and has more numbers than m: see `_Krylov.pairs`.
    """
    space = _Krylov(start / per_sample(start)[:, None], min(m, products, start.shape[1]))
    scale, best = torch.ones_like(start[:, 0]), None
    for count in range(1, products + 1):
        product = linear(space.basis[:, space.used])
        if count == 1:
            scale = _power_of_two(product)
        space.extend(product / scale[:, None])  # the square of a number that is not near 1 may be none
        if space.used < space.room and count < products:
            continue
        pairs = space.pairs()
        best = _better(best, pairs, space)
        if count == products or bool(best.done.all()):
            break
        space.restart(pairs.value, pairs.y)
    assert best is not None  # products is at least 1
    vector = best.vector / per_sample(best.vector)[:, None]
    complex_dtype = torch.promote_types(start.dtype, torch.complex64)
    wide = scale.to("cpu", torch.float64)
    value, error = best.value * wide, best.error * wide
    return Ritz(value.to(complex_dtype).to(start.device), vector, error.to(start), count)


class _Best(NamedTuple):
    """The leading pair that each sample is left with so far."""

    value: Tensor  # (B,)
    error: Tensor  # (B,)
    vector: Tensor  # (B, D)
    settled: Tensor  # (B,), see `_Pairs`
    done: Tensor  # (B,), see `_Pairs`


def _better(best: _Best | None, pairs: _Pairs, space: _Krylov) -> _Best:
    """What each sample is left with once a space has been filled: the leading pair of it, or what there was before.

    A new space knows more, but not if it was filled in part only; and for an A far from normal it may have lost what
    was settled. Then the smaller error decides, and an eigenvalue is let go for another that is larger beyond doubt.
    Before, the error is too coarse for that: the smallest of many would often be one that is too small.
    """
    value, error = pairs.value[:, 0], pairs.error
    vector = torch.bmm(pairs.y[:, :1].real.to(space.basis), space.basis[:, : space.used])[:, 0]
    if best is None:
        return _Best(value, error, vector, pairs.settled, pairs.done)
    larger = value.abs() - error > best.value.abs() + best.error
    newer = ~best.settled if space.used == space.room else torch.zeros_like(best.settled)
    take = ~best.done & (newer | (error <= best.error) | larger | error.isnan())
    return _Best(
        torch.where(take, value, best.value),
        torch.where(take, error, best.error),
        torch.where(take[:, None].to(vector.device), vector, best.vector),
        torch.where(take, pairs.settled, best.settled),
        best.done | (take & pairs.done),
    )


def _power_of_two(product: Tensor) -> Tensor:
    """About the size of each sample's product (B, D), to divide it by without rounding, (B,); 1 where it has none."""
    size = product.abs().amax(dim=1)
    size = torch.where((size > 0) & size.isfinite(), size, 1.0)
    return size / (2 * torch.frexp(size).mantissa)


class _Pairs(NamedTuple):
    """All Ritz pairs of a space, the largest modulus first."""

    value: Tensor  # (B, j)
    y: Tensor  # (B, j, j), the coordinates of their vectors in the space, as rows of unit norm
    error: Tensor  # (B,), of the first
    settled: Tensor  # (B,), whether the error is small, half of the digits at most
    done: Tensor  # (B,), whether more products would only turn over what rounding has left


class _Krylov:
    """A V = V H + r bᵀ per sample; (H; ‖r‖ bᵀ) is kept as one matrix, and r / ‖r‖ as the next vector.

    Arguments:
        start: (B, D), of unit norm.
        room: vectors that V has room for.
    """

    def __init__(self, start: Tensor, room: int):
        batch, size = start.shape
        self.room = room
        self.used = 0
        self.basis = start.new_zeros(batch, room + 1, size)  # what lies beyond an invariant space stays zero
        self.basis[:, 0] = start
        self.h = start.new_zeros(batch, room + 1, room)
        self.lost = torch.zeros(batch, dtype=torch.float64)  # of the equation above, to rounding in restarts

    def extend(self, product: Tensor) -> None:
        """Take in A v for the next vector v."""
        j = self.used
        v, w = self.basis[:, : j + 1], product[:, None]
        h = torch.bmm(w, v.mT)  # (B, 1, j + 1)
        w = torch.baddbmm(w, h, v, alpha=-1)
        again = torch.bmm(w, v.mT)  # "twice is enough"
        w = torch.baddbmm(w, again, v, alpha=-1)[:, 0]
        self.h[:, : j + 1, j] = (h + again)[:, 0]
        rest, eps = per_sample(w), torch.finfo(w.dtype).eps
        level = torch.maximum(per_sample(product), self.h.abs().amax(dim=(1, 2)))
        rest = torch.where(rest <= 10 * eps * level, 0.0, rest)  # rounding is no new direction
        self.h[:, j + 1, j] = rest
        self.basis[:, j + 1] = torch.where(rest[:, None] == 0, 0.0, w / rest[:, None])
        self.used = j + 1

    def small(self) -> tuple[Tensor, Tensor, Tensor]:
        """H (B, j, j) and bᵀ (B, 1, j), in float64 on the CPU, where LAPACK is; which samples are finite, (B,)."""
        h = self.h[:, : self.used + 1, : self.used].to("cpu", torch.float64)
        finite = h.isfinite().flatten(1).all(dim=1)
        h = torch.where(finite[:, None, None], h, 0.0)  # LAPACK would refuse the whole batch
        return h[:, :-1], h[:, -1:], finite

    def pairs(self) -> _Pairs:
        """All Ritz pairs.

        The error of θ is its residual times its condition as an eigenvalue of H. Once the space has been restarted, H
        has forgotten much of A, and an A far from normal, or defective, may be far worse conditioned than H.
        """
        h, b, finite = self.small()
        value, y = torch.linalg.eig(h)
        # θ moves by |xᵀ δA y| / |xᵀ y| when A does by δA, to first order; the left vectors x are the rows of Y⁻¹.
        left, singular = torch.linalg.inv_ex(y)
        y = y.mT
        empty = (self.basis[:, : self.used] == 0).all(dim=2).cpu()
        beyond = (y.abs().square() * empty[:, None]).sum(dim=2) > 0.5  # what lies beyond an invariant space
        order = torch.where(beyond, -1.0, value.abs()).sort(dim=1, descending=True, stable=True).indices
        value, rows = value.gather(1, order), order[:, :, None].expand_as(y)
        y, left = y.gather(1, rows), left.gather(1, rows)
        sensitivity = torch.linalg.vector_norm(left[:, 0], dim=1)
        sensitivity = torch.where((singular == 0) & sensitivity.isfinite(), sensitivity, torch.inf)
        eps, level = torch.finfo(self.basis.dtype).eps, torch.linalg.matrix_norm(h)
        rounding = 10 * eps * level
        residual = (b.to(y.dtype) @ y[:, 0, :, None]).abs().flatten() + self.lost
        error = torch.where(residual + rounding > 0, (residual + rounding) * sensitivity, 0.0)
        settled = error <= eps**0.5 * level
        # With a small residual alone θ may be far from any eigenvalue, and another space nearer to one.
        whole = (b == 0).all(dim=2).flatten()  # an invariant space, beyond which there is nothing to be had
        done = (residual <= rounding) & (settled | whole)
        return _Pairs(
            torch.where(finite[:, None], value, torch.nan),
            y,
            torch.where(finite, error, torch.nan),
            settled,
            done | ~finite,
        )

    def restart(self, value: Tensor, y: Tensor) -> None:
        """Keep the part of the space that belongs to the largest Ritz values, and go on from there.

        Arguments:
            value, y: as `pairs` returns them.
        """
        h, b, _ = self.small()
        keep = max(4, 3 * self.room // 10)
        value, y = value[:, :keep].nan_to_num(), y[:, :keep]
        columns = torch.where(value.imag[:, :, None] >= 0, y.real, y.imag)  # of a pair, both
        # A pair that the limit would cut in two is left out: half of it spans nothing invariant.
        cut = value.imag.sign().sum(dim=1) != 0
        columns[cut, -1] = 0.0
        q = torch.linalg.qr(columns.mT).Q  # (B, j, keep)
        q[cut, :, -1] = 0.0
        kept = q.mT @ h @ q
        self.lost += torch.linalg.matrix_norm(h @ q - q @ kept)
        basis = torch.bmm(q.mT.to(self.basis), self.basis[:, : self.used])
        following = self.basis[:, self.used].clone()
        self.basis.zero_()
        self.basis[:, :keep], self.basis[:, keep] = basis, following
        self.h.zero_()
        self.h[:, :keep, :keep] = kept.to(self.h)
        self.h[:, keep, :keep] = (b @ q)[:, 0].to(self.h)
        self.used = keep
