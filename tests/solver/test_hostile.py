"""Every solver on maps that are meant to break it: nothing non-finite out, an honest account, bounded calls."""

from __future__ import annotations

import math
import warnings

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from torchdeq import SOLVERS, AffineMap, CouplingWarning, Fallback, Status, as_solver
from torchdeq.solver import AffineSolver

SOLVER_NAMES = [n for n in SOLVERS if not isinstance(as_solver(n), AffineSolver)]
AFFINE_NAMES = [n for n in SOLVERS if isinstance(as_solver(n), AffineSolver)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def nan_basin(z):
    """Fixed point at 2, but not a number above 1.5."""
    return torch.where(z > 1.5, torch.nan, 0.5 * z + 1)


def overflow(z):
    """Fixed points at 0 and 1; beyond 1 it explodes."""
    return z * z * z + 0.1


def rotation(z):
    """Quarter turns: |λ| = 1, fixed point 0.5, 0.5."""
    a, b = z.chunk(2, dim=-1)
    return torch.cat([1 - b, a], dim=-1)


def expansion(z):
    """ρ = 1.5, with a negative mode; fixed point 1."""
    slopes = torch.linspace(-1.5, 0.9, z.shape[-1]).to(z)
    return slopes * (z - 1) + 1


def singular(z):
    """I − J has a null space, and there is no fixed point."""
    return torch.cat([z[..., :1] + 1, 0.5 * z[..., 1:]], dim=-1)


def constant(z):
    """Solved after one step."""
    return torch.full_like(z, 0.75)


def identity(z):
    """Solved at once."""
    return z.clone()


def discontinuous(z):
    """No fixed point: it jumps over it."""
    return torch.where(z > 0.3, -1.0, 1.0).to(z.dtype)


def steep(z):
    """Chaotic."""
    return torch.sin(40 * z) + z.flip(-1)


def huge_and_tiny(z):
    """One column of size 1e15, one of 1e-15 (or what fits the dtype)."""
    big = 1e4 if z.dtype == torch.bfloat16 else 1e15
    scale = torch.tensor([big, 1 / big], dtype=z.dtype).repeat((z.shape[-1] + 1) // 2)[: z.shape[-1]]
    return 0.5 * z + scale


HOSTILE = [
    nan_basin,
    overflow,
    rotation,
    expansion,
    singular,
    constant,
    identity,
    discontinuous,
    steep,
    huge_and_tiny,
]


def solve(solver, f, z0):
    calls = []

    def counted(z):
        calls.append(1)
        return f(z)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CouplingWarning)
        solution = solver(counted, z0)
    return solution, len(calls)


def norms(z):
    """Per sample, in float64."""
    return z.double().flatten(1).norm(dim=1)


def check(solver, f, z0):
    """What must hold whatever f is."""
    solution, calls = solve(solver, f, z0)
    z, fz, f0 = solution.z, f(solution.z), f(z0)
    assert z.isfinite().all(), "nothing non-finite comes out"
    extra = 1 if solver.max_iter < 10 else 4 + solution.coupled * (solver.max_iter + 1)
    assert calls <= solver.max_iter + extra, "no more than the docstring of Solver says"
    assert set(solution.status.tolist()) <= {s.value for s in Status}
    if z.dtype == torch.bfloat16 or not solver.monitors:
        return solution  # the residual is that of the float32 state; or z0 comes back, which was not measured

    size, first = norms(fz.double() - z.double()), norms(f0.double() - z0.double())
    noise = 8 * torch.finfo(z.dtype).eps * (norms(fz) + norms(z))
    off = (solution.abs_residual.double() - size).abs()
    assert (~size.isfinite() | (off <= 1e-5 * size + noise)).all(), "the residual is that of z"
    if solver.stop_mode == "rel":
        scale, scale_0 = norms(fz).clamp_min(1e-300), norms(f0).clamp_min(1e-300)
        size, noise, first = size / scale, noise / scale, first / scale_0
    assert (size <= solver.tol * (1 + 1e-5) + noise)[solution.converged].all(), "converged means converged"
    if not solution.coupled:
        assert (size <= first * (1 + 1e-5) + noise)[first.isfinite()].all(), "never worse than the start"
    return solution


@pytest.mark.parametrize("name", SOLVER_NAMES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    f=st.sampled_from(HOSTILE),
    dtype=st.sampled_from(DTYPES),
    batch=st.integers(1, 3),
    half=st.integers(1, 3),
    seed=st.integers(0, 5),
    spread=st.sampled_from([0.0, 1.0, 30.0]),
    mode=st.sampled_from(["abs", "rel"]),
    max_iter=st.sampled_from([1, 3, 40]),
)
def test_hostile_maps(name, f, dtype, batch, half, seed, spread, mode, max_iter):
    z0 = spread * torch.randn(
        batch, 2 * half, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    z0 = z0.to(dtype)
    check(as_solver(name, stop_mode=mode, max_iter=max_iter, tol=1e-5), f, z0)


@pytest.mark.parametrize("name", SOLVER_NAMES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    exponent=st.integers(-30, 30),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    mode=st.sampled_from(["abs", "rel"]),
)
def test_scales(name, exponent, dtype, mode):
    """A tanh map blown up or shrunk: f(z) = s tanh(W z / s + x)."""
    scale = 10.0**exponent
    gen = torch.Generator().manual_seed(1)
    w = (torch.randn(4, 4, dtype=torch.float64, generator=gen) * 0.4).to(dtype)
    x = torch.randn(2, 4, dtype=torch.float64, generator=gen).to(dtype)
    solver = as_solver(name, stop_mode=mode, tol=1e-4, max_iter=60)
    solution = check(solver, lambda z: scale * torch.tanh((z / scale) @ w.T + x), torch.zeros_like(x))
    if mode == "rel":
        assert solution.converged.all()


def test_where_the_fixed_point_lies_behind_a_basin_it_is_found_or_the_sample_is_flagged():
    """The second step of Newton and Anderson from 0 leads into the basin; going back finds the way round."""

    def f(z):  # fixed point 0.739…; not a number above 1.2, where the first step from -3 leads
        return torch.where(z > 0.95, torch.nan, torch.cos(z))

    z0 = torch.tensor([[-0.2], [0.3]], dtype=torch.float64)
    for name in SOLVER_NAMES:
        solution = check(as_solver(name, tol=1e-8, max_iter=60), f, z0)
        if as_solver(name).recovers and name != "squarem":  # which comes back from extrapolations only
            assert solution.converged.all(), name
            assert torch.allclose(solution.z, torch.full_like(z0, 0.7390851332), atol=1e-7), name
        else:
            assert solution.status.tolist() == [Status.NON_FINITE, Status.NON_FINITE], name


@pytest.mark.parametrize("name", SOLVER_NAMES)
def test_a_hostile_sample_does_not_touch_its_neighbours(name):
    a = torch.tensor([[0.5, 0.3, -0.2], [0.1, -0.4, 0.2], [0.0, 0.3, 0.6]], dtype=torch.float64)

    def gentle(z):
        return torch.tanh((z[:, None] * a).sum(2) + 1)

    alone = as_solver(name, tol=1e-9, max_iter=40)(gentle, torch.zeros(2, 3, dtype=torch.float64))
    for f in HOSTILE:
        if f is rotation:
            continue  # needs an even width

        def beside(z, f=f):
            return torch.cat([gentle(z[:1]), f(z[1:2]), gentle(z[2:])])

        z0 = torch.zeros(3, 3, dtype=torch.float64)
        z0[1] = 1.4
        limit = 400 if name == "newton_krylov" else 40  # whose neighbours' products count too
        solution, _ = solve(as_solver(name, tol=1e-9, max_iter=limit), beside, z0)
        assert torch.equal(solution.z[[0, 2]], alone.z), f.__name__
        assert torch.equal(solution.status[[0, 2]], alone.status), f.__name__


@pytest.mark.parametrize("name", AFFINE_NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_hostile_affine_maps(name, dtype, scale):
    """Identity (singular), zero, negative, a rotation, a projector, and one that is not finite."""
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=dtype)
    maps = {
        "identity": lambda u: u.clone(),
        "zero": torch.zeros_like,
        "negative": lambda u: -3 * u,
        "rotation": lambda u: u @ turn,
        "projector": lambda u: u * torch.tensor([1.0, 0.5], dtype=dtype),
        "nan": lambda u: u * torch.nan,
    }
    b = scale * torch.tensor([[1.0, 2.0], [0.0, 0.0]], dtype=dtype)
    for label, linear in maps.items():
        solution = as_solver(name, stop_mode="rel", tol=1e-4).run(AffineMap(linear, b), together=False)
        assert solution.z.isfinite().all(), label
        assert solution.nfe <= 50, label
        r = (b + linear(solution.z) - solution.z).double() / scale
        if label != "nan":
            assert r[0].norm() <= math.sqrt(5) * (1 + 1e-5), label
            if solution.converged[0]:
                assert r[0].norm() <= 2e-4 * math.sqrt(5), label
        assert torch.equal(solution.z[1], torch.zeros(2, dtype=dtype)), label


def test_zero_sizes_for_a_chain():
    chain = Fallback(as_solver("anderson"), as_solver("newton_krylov"))
    for shape in ((0, 3), (2, 0)):
        assert chain(torch.cos, torch.zeros(shape)).z.shape == shape
