"""The Hopfield memory and its gradient methods against dense systems, and the study of recurrent back-propagation."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import torchdeq
from torchdeq.zoo.rbp import HopfieldMemory, RandomStart, methods

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
F64 = torch.float64
SETTLED = torchdeq.SimpleFixedPointIteration(max_iter=400)


def memory_and_images() -> tuple[HopfieldMemory, Tensor]:
    """In float64; the spectral radius of J is about 0.4."""
    torch.manual_seed(0)
    memory = HopfieldMemory(pixels=6, hidden=10, scale=0.4).double()
    return memory, (torch.rand(4, 6, dtype=F64) > 0.5).double()


def settled(memory: HopfieldMemory, x: Tensor) -> Tensor:
    f, z = memory.dynamics(x)
    with torch.no_grad():
        for _ in range(400):
            z = f(z)
    return z


def dense(memory: HopfieldMemory, z: Tensor) -> Tensor:
    """J of each sample from its formula, (B, D, D)."""
    weight = (memory.v + memory.v.T).detach()
    weight = (weight - weight.diag().diag())[memory.pixels :, memory.pixels :]
    s = torch.sigmoid(memory.gain * z)
    return weight * (memory.gain * s * (1 - s))[:, None]


def gradient(memory: HopfieldMemory, x: Tensor, method: torchdeq.GradMethod) -> Tensor:
    memory.deq = torchdeq.DEQ(SETTLED, method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torchdeq.ConvergenceWarning)
        (g,) = torch.autograd.grad((memory(x)[0] - x).abs().sum(), [memory.v])
    return g


def with_adjoint(memory: HopfieldMemory, x: Tensor, u: Tensor) -> Tensor:
    """(∂f/∂V)ᵀ u at the fixed point."""
    f, _ = memory.dynamics(x)
    (g,) = torch.autograd.grad(f(settled(memory, x)), [memory.v], u)
    return g


def cotangent(memory: HopfieldMemory, x: Tensor) -> Tensor:
    z = settled(memory, x)
    g = torch.zeros_like(z)
    g[:, -memory.pixels :] = (z[:, -memory.pixels :] - x).sign()
    return g


def test_the_jacobian_is_that_of_the_formula_and_has_real_eigenvalues() -> None:
    memory, x = memory_and_images()
    z = settled(memory, x)
    f, _ = memory.dynamics(x[:1])
    ours = torch.func.jacrev(f)(z[:1])[0, :, 0]
    torch.testing.assert_close(ours, dense(memory, z)[0])
    eigenvalues = torch.linalg.eigvals(dense(memory, z))
    assert eigenvalues.imag.abs().max() < 1e-12
    assert 0.2 < eigenvalues.abs().max() < 0.9  # a contraction, and none that makes all methods alike


def test_units_have_no_loop_and_clamped_ones_do_not_move() -> None:
    memory, x = memory_and_images()
    z = settled(memory, x)
    assert dense(memory, z).diagonal(dim1=1, dim2=2).abs().max() == 0
    _, start = memory.dynamics(x)
    assert start.shape == (4, 16)  # the free ones alone


@pytest.mark.parametrize("terms", [1, 3, 8])
def test_neumann_rbp_and_tbptt_are_the_truncated_series(terms: int) -> None:
    memory, x = memory_and_images()
    jt, g = dense(memory, settled(memory, x)).mT, cotangent(memory, x)
    u = term = g
    for _ in range(terms - 1):
        term = (jt @ term[..., None])[..., 0]
        u = u + term
    series = with_adjoint(memory, x, u)
    for name in ("Neumann-RBP", "TBPTT"):
        ours = gradient(memory, x, methods(terms)[name])
        # TBPTT has terms of ∂f/∂V at states that still move by rounding.
        torch.testing.assert_close(ours, series, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["BPTT", "TBPTT", "RBP", "CG-RBP", "Neumann-RBP"])
def test_with_many_steps_every_method_is_exact(name: str) -> None:
    memory, x = memory_and_images()
    j = dense(memory, settled(memory, x))
    u = torch.linalg.solve(torch.eye(16, dtype=F64) - j.mT, cotangent(memory, x))
    ours, exact = gradient(memory, x, methods(60)[name]), with_adjoint(memory, x, u)
    # CG-RBP ends at a residual of 1e-4.
    assert (ours - exact).norm() < (1e-3 if name == "CG-RBP" else 1e-10) * exact.norm()


def test_cg_rbp_solves_the_regularised_normal_equations() -> None:
    memory, x = memory_and_images()
    eta, eye = 0.3, torch.eye(16, dtype=F64)
    j, g = dense(memory, settled(memory, x)), cotangent(memory, x)
    a = (eye - j) @ (eye - j.mT) + eta * eye
    u = torch.linalg.solve(a, ((eye - j) @ g[..., None])[..., 0])
    ours = gradient(memory, x, methods(60, eta=eta)["CG-RBP"])
    torch.testing.assert_close(ours, with_adjoint(memory, x, u), rtol=1e-6, atol=1e-8)


def test_the_error_of_rbp_is_that_of_its_random_start() -> None:
    linear = torch.diag(torch.tensor([0.5, -0.8], dtype=F64))
    shift = torch.ones(1, 2, dtype=F64)
    solver = RandomStart(max_iter=7, tol=float("inf"), return_final=True, spread=100.0)
    torch.manual_seed(3)
    start = 100 * torch.rand(1, 2, dtype=F64)
    torch.manual_seed(3)
    u = solver.run(torchdeq.AffineMap(lambda u: u @ linear, shift)).z
    exact = shift @ torch.linalg.inv(torch.eye(2, dtype=F64) - linear)
    torch.testing.assert_close(u - exact, (start - exact) @ torch.linalg.matrix_power(linear, 6))


def test_recall_is_black_and_white_and_without_a_graph() -> None:
    memory, x = memory_and_images()
    shown = memory.recall(x)
    assert set(shown.unique().tolist()) <= {0.0, 1.0}
    assert not shown.requires_grad


@pytest.mark.parametrize("options", [{"pixels": 0}, {"hidden": -1}, {"gain": 0.0}])
def test_sizes_that_are_not_positive_are_errors(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected a positive number"):
        HopfieldMemory(**options)  # type: ignore[arg-type]


def test_images_that_are_not_flat_are_errors() -> None:
    with pytest.raises(ValueError, match=r"expected images \(B, 64\), got \(2, 8, 8\)"):
        HopfieldMemory()(torch.rand(2, 8, 8))


def test_half_of_the_black_pixels_of_each_image_are_taken_away(study: ModuleType) -> None:
    x = (torch.rand(20, 64, generator=torch.Generator().manual_seed(0)) > 0.6).float()
    damaged = study.halved(x, torch.Generator().manual_seed(1))
    taken = (x - damaged).sum(dim=1)
    assert torch.equal(taken, (x.sum(dim=1) / 2).floor())
    assert (damaged <= x).all()


def test_the_study_runs_and_says_what_is_true_of_the_methods(study: ModuleType, tmp_path: Path) -> None:
    assert study.main(["--quick", "--out", str(tmp_path)]) == 0
    (found,) = json.loads((tmp_path / "rbp.json").read_text())["measured"]
    assert found["radius random"] == pytest.approx(study.WANTED, abs=0.05)
    for name in study.RADII:
        assert found[f"Neumann-RBP from TBPTT {name}"] < 1e-9
    errors = found["Neumann-RBP error random curve"]
    assert errors == sorted(errors, reverse=True)
    assert len(set(found["Neumann-RBP KiB curve"])) == 1
    assert found["TBPTT KiB curve"] == sorted(set(found["TBPTT KiB curve"]))
    assert found["BPTT error trained"] < 1e-9  # the series of 500 steps
    assert (tmp_path / "rbp.png").stat().st_size > 10_000
