"""Anderson against what the literature says it is."""

from __future__ import annotations

import pytest
import torch

from benchmarks.problems import attention, tanh
from tests.problems import F64, TanhMap, random_matrix
from torchdeq import GMRES, AffineMap, Anderson, FixedPointIteration


@pytest.mark.parametrize("steps", [2, 5, 15])
def test_full_memory_is_gmres_followed_by_one_application_of_the_map(steps):
    """AA_{k+1} = G(GMRES_k) on an affine map (Walker and Ni, 2011), to rounding of the normal equations."""
    n = 24
    a = random_matrix(n, 0.9)
    b = torch.randn(3, n, dtype=F64, generator=torch.Generator().manual_seed(1))
    f = AffineMap(lambda u: u @ a.T, b)
    krylov = GMRES(tol=0.0, max_iter=steps + 1).run(f).z
    # GMRES starts at 0, and so does Anderson here; its (k + 1)-th iterate is evaluated as the (k + 2)-th.
    accelerated = Anderson(m=20, lam=0.0, tol=0.0, max_iter=steps + 2, return_final=True)(
        f, torch.zeros_like(b)
    )
    assert (accelerated.z - f(krylov)).norm() / b.norm() < 1e-10


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_is_equivariant_to_the_scale_of_f(scale):
    """0.1.0 adds lam to the Gram matrix as it is, and takes 259 evaluations where 24 suffice."""
    f = TanhMap.make(gain=0.9)
    plain = Anderson(tol=1e-9, stop_mode="rel", max_iter=100)(f, f.z0)
    scaled = Anderson(tol=1e-9, stop_mode="rel", max_iter=100)(lambda z: scale * f(z / scale), f.z0)
    assert torch.equal(scaled.nstep, plain.nstep)
    assert torch.allclose(scaled.z / scale, plain.z, rtol=0, atol=1e-8)


def test_needs_fewer_evaluations_than_picard_on_slow_modes():
    rates = torch.tensor([0.99, 0.95, 0.9, -0.9, 0.1, 0.0], dtype=F64)
    f = lambda z: rates * z + 1  # noqa: E731
    z0 = torch.zeros(1, 6, dtype=F64)
    fast = Anderson(tol=1e-8, max_iter=3000)(f, z0)
    slow = FixedPointIteration(tol=1e-8, max_iter=3000)(f, z0)
    assert fast.converged.all()
    assert slow.converged.all()
    assert 20 * fast.nfe < slow.nfe


@pytest.mark.parametrize("lam", [None, 0.0, 1e-4])
def test_a_singular_history_does_not_raise(lam):
    """f constant in most directions: differences are parallel or zero, the Gram matrix is singular."""
    f = lambda z: 0.5 * z.mean(dim=1, keepdim=True).expand_as(z) + 1  # noqa: E731
    solution = Anderson(tol=1e-10, lam=lam)(f, torch.zeros(2, 5, dtype=F64))
    assert solution.converged.all()
    assert torch.allclose(solution.z, torch.full((2, 5), 2.0, dtype=F64), atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_states_are_solved_in_float32_sums(dtype):
    """0.1.0 raises: there is no half-precision linear solve. f sees its own dtype throughout."""
    seen = set()

    def f(z):
        seen.add(z.dtype)
        return 0.5 * torch.cos(z) + 0.25

    solution = Anderson(tol=2e-2, stop_mode="rel")(f, torch.zeros(2, 3, dtype=dtype))
    assert seen == {dtype}
    assert solution.z.dtype == dtype
    assert solution.residual.dtype == torch.float32
    assert solution.converged.all()


def test_m_of_one_works_and_zero_teaches():
    f = TanhMap.make(gain=0.5)
    assert Anderson(m=1, tol=1e-8)(f, f.z0).converged.all()
    with pytest.raises(ValueError, match=r"Anderson\(m=0\).*at least 1.*FixedPointIteration"):
        Anderson(m=0)


def test_a_singular_system_at_lam_zero_falls_back_to_a_plain_step():
    f = lambda z: torch.ones_like(z)  # noqa: E731 - differences of residuals vanish after one step
    solution = Anderson(lam=0.0, tol=0.0, max_iter=6)(f, torch.zeros(1, 3, dtype=F64))
    assert torch.equal(solution.z, torch.ones(1, 3, dtype=F64))


@pytest.mark.parametrize("scale", [0.3, 0.5])
def test_an_attention_block_in_float32_within_22_evaluations(scale):
    """0.1.0 does not reach a relative residual of 1e-5 in 60: its regularisation is absolute."""
    p = attention(scale)
    solution = Anderson(tol=1e-5, stop_mode="rel")(p.f, p.z0)
    assert solution.converged.all()
    assert solution.nfe <= 22


def test_type_one_reaches_where_type_two_does_not():
    p = tanh(2.0, batch=4)
    options = {"m": 10, "tol": 1e-3, "stop_mode": "rel", "max_iter": 250}
    assert Anderson(type=1, **options)(p.f, p.z0).converged.all()
    assert not Anderson(type=2, **options)(p.f, p.z0).converged.all()


def test_complex_states_by_the_real_part_of_the_hermitian_product():
    """A complex matrix, and one with a conjugation, which is not linear over the complex numbers."""
    gen = torch.Generator().manual_seed(0)
    a = torch.randn(6, 6, dtype=torch.complex128, generator=gen) * 0.3
    b = torch.randn(2, 6, dtype=torch.complex128, generator=gen)
    for f in (lambda z: z @ a.T + b, lambda z: z.conj() @ a.T + b):
        solution = Anderson(m=12, tol=1e-11, max_iter=100)(f, torch.zeros_like(b))
        assert solution.converged.all()
        assert solution.z.dtype == torch.complex128
        assert (f(solution.z) - solution.z).abs().max() < 1e-11


def test_a_wrong_type_teaches():
    with pytest.raises(ValueError, match="type must be 1 or 2"):
        Anderson(type=3)
