"""The largest Ritz value is the eigenvalue of largest modulus, and its error estimate is honest."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.problems import F64
from torchdeq._ritz import leading_ritz


class Case(NamedTuple):
    """A matrix whose spectral radius is known by its making."""

    a: Tensor
    radius: float


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def basis(n: int, generator: torch.Generator) -> Tensor:
    q: Tensor = torch.linalg.qr(torch.randn(n, n, dtype=F64, generator=generator)).Q
    return q


def pair(modulus: float, angle: float) -> Tensor:
    c, s = modulus * math.cos(angle), modulus * math.sin(angle)
    return torch.tensor([[c, -s], [s, c]], dtype=F64)


def nonnormal(n: int, norm: float, radius: float = 0.8) -> Case:
    """Complex pairs of moduli up to `radius` on the diagonal, and above it what makes ‖A‖₂ = norm."""
    generator = seeded(n)
    moduli = radius * torch.rand(n // 2, dtype=F64, generator=generator).sqrt()
    moduli[0] = radius
    angles = math.pi * torch.rand(n // 2, dtype=F64, generator=generator)
    diagonal = torch.block_diag(*(pair(float(m), float(t)) for m, t in zip(moduli, angles, strict=True)))
    upper = torch.triu(torch.randn(n, n, dtype=F64, generator=generator), 2)
    upper[::2] = upper[::2] * (torch.arange(n) > torch.arange(0, n, 2)[:, None] + 1)  # not inside a pair
    low, high = 0.0, 10.0
    for _ in range(50):
        middle = (low + high) / 2
        size = torch.linalg.matrix_norm(diagonal + middle * upper, 2)
        low, high = (low, middle) if size > norm else (middle, high)
    q = basis(n, generator)
    return Case(q @ (diagonal + low * upper) @ q.T, radius)


def cluster(n: int) -> Case:
    """A quarter of the eigenvalues within a thousandth of each other."""
    generator = seeded(n)
    values = torch.cat([torch.linspace(0.9, 0.901, n // 4, dtype=F64), torch.linspace(-0.5, 0.5, n - n // 4)])
    q = basis(n, generator)
    return Case(q @ torch.diag(values) @ q.T, 0.901)


def apply(a: Tensor, products: int = 100, batch: int = 8, m: int = 64):
    start = torch.randn(batch, a.shape[-1], generator=seeded(7), dtype=F64).to(a.dtype)
    return leading_ritz(lambda v: v @ a.T, start, products, m)


CASES = {
    "a complex pair": Case(torch.block_diag(pair(0.9, math.pi / 3), 0.3 * torch.eye(30, dtype=F64)), 0.9),
    "opposite signs": Case(torch.diag(torch.linspace(-0.95, 0.95, 200, dtype=F64)), 0.95),
    "nonnormal": nonnormal(60, norm=5.0),
    "a cluster": cluster(200),
    "rank one": Case(torch.ones(300, 300, dtype=F64) / 400, 0.75),
    "one number": Case(torch.full((1, 1), -0.5, dtype=F64), 0.5),
}


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_spectral_radius(name: str, dtype: torch.dtype) -> None:
    a, radius = CASES[name]
    found = apply(a.to(dtype))
    # In float32 rounding, times how far a nonnormal matrix's eigenvalues move. In the cluster 100 products resolve
    # what is a thousandth apart to a tenth of that.
    tolerance = 1e-4 if name == "a cluster" else {F64: 1e-7, torch.float32: 1e-3}[dtype]
    assert torch.allclose(found.value.abs().double(), torch.full((8,), radius, dtype=F64), rtol=tolerance)
    assert found.value.dtype == (torch.complex128 if dtype == F64 else torch.complex64)


def test_a_random_matrix_against_its_eigenvalues() -> None:
    a = torch.randn(200, 200, dtype=F64, generator=seeded(3)) / math.sqrt(200)
    found = apply(a)
    exact = torch.linalg.eigvals(a)
    assert torch.allclose(found.value.abs(), exact.abs().max().expand(8), rtol=1e-4)
    distance = (found.value[:, None] - exact).abs().amin(dim=1)
    assert (distance <= found.error).all()


@pytest.mark.parametrize("norm", [1.5, 5.0, 20.0])
@pytest.mark.parametrize("products", [20, 60, 100])
def test_the_error_is_not_claimed_to_be_smaller_than_it_is(norm: float, products: int) -> None:
    """However far from normal. Before it has converged the sensitivity is that of another matrix, and the error may
    be several times what is said; but then it is not said to be small."""
    a, _ = nonnormal(100, norm)
    found = apply(a, products)
    distance = (found.value[:, None] - torch.linalg.eigvals(a)).abs().amin(dim=1)
    sure = found.error < 0.01 * found.value.abs()
    assert (distance[sure] <= found.error[sure]).all()
    assert (distance <= 10 * found.error).all()
    assert sure.all() or (norm, products) in [(1.5, 20), (5.0, 20), (20.0, 20), (20.0, 60), (20.0, 100)]


@pytest.mark.parametrize("size", [2, 3, 5])
def test_a_jordan_block_is_as_uncertain_as_rounding_makes_it(size: int) -> None:
    """The eigenvalues of a block of n move by about ε^(1/n); the estimate says that much or more."""
    block = 0.8 * torch.eye(size, dtype=F64) + 0.5 * torch.diag(torch.ones(size - 1, dtype=F64), 1)
    a = torch.block_diag(block, 0.3 * torch.eye(20, dtype=F64))
    found = apply(a)
    distance = (found.value.abs() - 0.8).abs()
    scale = torch.finfo(F64).eps ** (1 / size)
    assert (distance < 3 * scale).all()
    assert (found.error > scale).all()


def test_zero_gives_zero_and_the_start() -> None:
    found = apply(torch.zeros(5, 5, dtype=F64))
    assert torch.equal(found.value, torch.zeros(8, dtype=torch.complex128))
    assert torch.equal(found.error, torch.zeros(8, dtype=F64))
    assert torch.allclose(found.vector.norm(dim=1), torch.ones(8, dtype=F64))


def test_a_nilpotent_matrix_has_radius_zero_to_rounding() -> None:
    found = apply(torch.diag(torch.ones(3, dtype=F64), 1))
    assert (found.value.abs() <= found.error).all()
    assert (found.value.abs() < 3 * torch.finfo(F64).eps ** (1 / 4)).all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_vector_of_a_real_eigenvalue_is_its_eigenvector(sign: float) -> None:
    q = basis(90, seeded())
    a = q @ torch.diag(sign * torch.linspace(0.1, 0.9, 90, dtype=F64)) @ torch.linalg.inv(q)
    found = apply(a)
    assert torch.allclose((found.vector * q[:, -1]).sum(dim=1).abs(), torch.ones(8, dtype=F64))


def test_the_vector_of_a_pair_lies_in_its_plane() -> None:
    q = basis(80, seeded())
    a = q @ torch.block_diag(pair(0.9, 1.0), 0.4 * torch.eye(78, dtype=F64)) @ q.T
    vector = apply(a).vector
    inside = vector @ q[:, :2] @ q[:, :2].T
    assert torch.allclose(inside, vector, atol=1e-12)
    assert torch.allclose(vector.norm(dim=1), torch.ones(8, dtype=F64))


@pytest.mark.parametrize("m", [8, 11, 20, 64])
def test_restarts_keep_what_was_found(m: int) -> None:
    """With room for a few vectors only; pairs, one of which a restart may cut, included."""
    turns = [pair(0.95 - 0.05 * i, 0.3 + 0.5 * i) for i in range(5)]
    q = basis(100, seeded(1))
    a = q @ torch.block_diag(*turns, 0.3 * torch.eye(90, dtype=F64)) @ q.T
    found = apply(a, products=100, m=m)
    assert torch.allclose(found.value.abs(), torch.full((8,), 0.95, dtype=F64), rtol=1e-3 if m < 20 else 1e-9)
    assert ((found.value.abs() - 0.95).abs() <= found.error).all()


def test_samples_do_not_know_of_each_other() -> None:
    """Each has its own matrix; one is not finite, one is zero."""
    matrices = torch.stack([CASES["nonnormal"].a, nonnormal(60, 2.0, 0.5).a, torch.zeros(60, 60, dtype=F64)])
    broken = torch.cat([matrices, matrices[:1] * torch.nan])
    start = torch.randn(4, 60, dtype=F64, generator=seeded())
    found = leading_ritz(lambda v: torch.einsum("bij,bj->bi", broken, v), start, 70, 30)
    alone = [leading_ritz(lambda v, a=a: v @ a.T, start[i : i + 1], 70, 30) for i, a in enumerate(matrices)]
    assert torch.allclose(found.value[:3], torch.cat([one.value for one in alone]), atol=1e-10)
    assert found.value[3].isnan()
    assert found.error[3].isnan()


def test_products_are_counted_and_none_is_wasted_on_what_is_resolved() -> None:
    calls = []

    def linear(v: Tensor) -> Tensor:
        calls.append(v)
        return 0.5 * v

    found = leading_ritz(linear, torch.randn(2, 6, dtype=F64, generator=seeded()), 50, 20)
    assert found.products == len(calls) == 6  # as many as there are numbers: nothing is left to learn
    found = leading_ritz(linear, torch.randn(2, 60, dtype=F64, generator=seeded()), 50, 20)
    assert found.products == 20  # where the space is full it is seen to be enough


def triangular(n: int) -> Case:
    """Nonnormal, its eigenvalues on the diagonal and ill-conditioned."""
    generator = seeded()
    a = torch.triu(torch.randn(n, n, dtype=F64, generator=generator), 1) / math.sqrt(n)
    a += torch.diag(0.5 * torch.rand(n, dtype=F64, generator=generator))
    return Case(a, float(a.diag().max()))


@pytest.mark.parametrize("products", [300, 600])
def test_what_is_settled_is_not_lost_to_more_products(products: int) -> None:
    """A later space, or the last one, filled in part only, may know less: 2e-2 off once, after 7e-11."""
    a, radius = triangular(100)
    found = apply(a, products, m=20)
    assert ((found.value.abs() - radius).abs() < 1e-9).all()
    assert (found.error < 1e-8).all()


def test_a_sample_keeps_its_answer_while_its_neighbours_go_on() -> None:
    quick = torch.diag(torch.cat([torch.tensor([0.9], dtype=F64), torch.linspace(-0.1, 0.1, 99, dtype=F64)]))
    both = torch.stack([quick, torch.diag(torch.linspace(-0.9, 0.91, 100, dtype=F64))])
    start = torch.randn(2, 100, dtype=F64, generator=seeded())
    found = leading_ritz(lambda v: torch.einsum("bij,bj->bi", both, v), start, 150, 20)
    alone = leading_ritz(lambda v: v @ quick, start[:1], 150, 20)
    assert alone.products < found.products
    assert torch.allclose(found.value[:1], alone.value, rtol=1e-14)
    assert torch.allclose(found.error[:1], alone.error, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e160, 1e300])
@pytest.mark.parametrize("m", [8, 64])
def test_the_size_of_the_numbers_does_not_matter(scale: float, m: int) -> None:
    """Squares of them are beyond what float64 can hold; samples of another size stand beside them."""
    a = nonnormal(30, 2.0).a
    sizes = torch.tensor([1.0, scale], dtype=F64)[:, None]
    start = torch.randn(1, 30, dtype=F64, generator=seeded()).repeat(2, 1)
    found = leading_ritz(lambda v: sizes * (v @ a.T), start, 60, m)
    assert torch.allclose(found.value[1] / scale, found.value[0], rtol=1e-6 if m == 8 else 1e-12)
    assert torch.allclose(found.error[1] / scale, found.error[0], rtol=1e-2)
