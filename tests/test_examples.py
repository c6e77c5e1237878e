"""The examples run, and their numbers are right: forces through an equilibrium, and what is learned from them."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, vmap

ROOT = Path(__file__).parent.parent
# The states of the example are solved to 1e-12 and I − J has a condition below 3, so that differences of numbers that
# should be equal are a few times this, relative to their size.
CLOSE = 2e-11


@pytest.fixture(scope="module")
def forces() -> Iterator[ModuleType]:
    """examples/forces.py as a module."""
    pytest.importorskip("tqdm")
    yield from imported("forces")


@pytest.fixture(scope="module")
def peer(forces: ModuleType) -> Iterator[ModuleType]:
    """benchmarks/forces_peer.py as a module, which finds the example and its neighbours as it does when it is run."""
    yield from imported("forces_peer", "peers", "problems", "record", "report")


def imported(name: str, *neighbours: str) -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        patch.syspath_prepend(str(ROOT / "examples"))
        for module in (name, *neighbours):
            patch.delitem(sys.modules, module, raising=False)
        yield importlib.import_module(name)
        for module in (name, *neighbours):
            sys.modules.pop(module, None)


@pytest.fixture(scope="module")
def case(peer: ModuleType):
    """Two geometries, the forces of the true model there, and parameters that do not give them."""
    return peer.Case.make(2)


def close(a: Tensor, b: Tensor, tol: float = CLOSE) -> bool:
    return bool((a - b).norm() <= tol * b.norm())


def assert_is_derivative(found: Tensor, fun: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> None:
    """`found` is the derivative of fun at x along v, by extrapolated central differences R(h) = (4 D(h) − D(2h)) / 3.

    Their error is of order h⁴, so that |R(h) − R(2h)| is 15 times it or so. Values of fun carry an error of a few times
    1e-12 of their size, which R(h) multiplies by 3/(2h) at most.
    """

    def central(h: float) -> Tensor:
        return (fun(x + h * v) - fun(x - h * v)) / (2 * h)

    def extrapolated(h: float) -> Tensor:
        return (4 * central(h) - central(2 * h)) / 3

    h = 2e-3
    expected = extrapolated(h)
    tol = (expected - extrapolated(2 * h)).abs().max() + 5e-12 * fun(x).abs().max() / h
    assert tol <= 1e-6 * expected.abs().max()  # else the test would say little
    assert (found - expected).abs().max() <= tol


def direction(x: Tensor, seed: int) -> Tensor:
    v = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(seed))
    return v / v.norm()


# The model ----------------------------------------------------------------------------------------------------


def test_without_saturation_the_dipoles_solve_a_linear_system(forces: ModuleType):
    x = forces.shaken(1, torch.Generator().manual_seed(1))[0]
    ions = forces.Ions.make(1.0, (0.3, 2.0), 1e9, 0.08)
    around = forces.surroundings(x, ions)
    t = around.tensor.permute(0, 2, 1, 3).reshape(24, 24)
    stiff = torch.diag(1 / ions.log_alpha.exp()[forces.KIND].repeat_interleave(3))
    mu = torch.linalg.solve(stiff - t, around.field.reshape(24))
    assert close(forces.dipoles(x, ions).reshape(24), mu)
    energy = forces.pairwise(around, ions) - mu @ around.field.reshape(24) / 2
    assert close(forces.energy(x, ions), energy)


def test_dipoles_make_the_functional_stationary_and_its_value_is_the_energy(forces: ModuleType, case):
    for x in case.x:
        mu = forces.dipoles(x, case.ions)
        value, slope = forces.functional(mu, x, case.ions), grad(forces.functional)(mu, x, case.ions)
        assert close(value, forces.energy(x, case.ions))
        assert slope.norm() <= CLOSE * forces.local_field(mu, forces.surroundings(x, case.ions)).norm()


def test_forces_are_those_of_hellmann_and_feynman(forces: ModuleType, case):
    # The functional is stationary, so its forces need no derivative of the dipoles. The energy is not.
    mu = vmap(forces.dipoles, in_dims=(0, None))(case.x, case.ions)
    expected = -vmap(grad(forces.functional, argnums=1), in_dims=(0, 0, None))(mu, case.x, case.ions)
    for found in (forces.Cluster(case.ions).forces(case.x)[0], forces.forces(case.x, case.ions)):
        assert close(found, expected)
    around = forces.surroundings(case.x[0], case.ions)
    slope = grad(forces.energy_at)(mu[0], around, case.ions)
    assert slope.norm() > 0.1 * around.field.norm() * case.ions.log_alpha.exp().min()  # the test could fail


# Derivatives --------------------------------------------------------------------------------------------------


def test_forces_against_finite_differences(forces: ModuleType, case):
    model = forces.Cluster(case.ions)
    found = (model.forces(case.x)[0].detach(), forces.forces(case.x, case.ions))
    pure = vmap(forces.energy, in_dims=(0, None))
    for seed in range(3):
        v = direction(case.x, seed)
        assert_is_derivative(-(found[0] * v).sum(), lambda x: model(x)[0].sum().detach(), case.x, v)
        assert_is_derivative(-(found[1] * v).sum(), lambda x: pure(x, case.ions).sum(), case.x, v)


def parameters(forces: ModuleType, flat: Tensor):
    """θ from its five numbers."""
    return forces.Ions(flat[0], flat[1:3], flat[3], flat[4])


def flat(theta) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in theta])


def test_the_gradient_of_a_force_loss_against_finite_differences(forces: ModuleType, case):
    def loss(numbers: Tensor) -> Tensor:
        return (forces.forces(case.x, parameters(forces, numbers)) - case.wanted).square().mean()

    def loss_of_module(numbers: Tensor) -> Tensor:
        model = forces.Cluster(parameters(forces, numbers))
        return (model.forces(case.x)[0] - case.wanted).square().mean().detach()

    numbers = flat(case.ions)
    model = forces.Cluster(case.ions)
    (model.forces(case.x)[0] - case.wanted).square().mean().backward()
    by_module, by_function = flat([p.grad for p in model.theta.values()]), grad(loss)(numbers)
    assert close(by_module, by_function)
    v = direction(numbers, 0)
    assert_is_derivative(by_module @ v, loss_of_module, numbers, v)
    for v in torch.eye(5, dtype=numbers.dtype):
        assert_is_derivative(by_function @ v, loss, numbers, v)


def test_forces_and_energies_pass_gradcheck(forces: ModuleType, peer: ModuleType, case):
    inputs = [t.clone().requires_grad_() for t in (case.x[:1], *case.ions)]

    def by_module(x: Tensor, *theta: Tensor) -> Tensor:
        return peer.deq_energies(x, forces.Ions(*theta))

    def by_function(x: Tensor, *theta: Tensor) -> Tensor:
        return vmap(forces.energy, in_dims=(0, None))(x, forces.Ions(*theta))

    def forces_of_module(x: Tensor, *theta: Tensor) -> Tensor:
        return torch.autograd.grad(by_module(x, *theta).sum(), x, create_graph=True)[0]

    assert gradcheck(forces_of_module, inputs, fast_mode=True)
    for energies in (by_module, by_function):
        assert gradcheck(energies, inputs, fast_mode=True)
        assert gradgradcheck(energies, inputs, fast_mode=True)


def test_the_hessian_is_the_same_in_every_mode_and_symmetric(forces: ModuleType, case):
    x, n = case.x[0], case.x[0].numel()
    h = hessian(forces.energy)(x, case.ions).reshape(n, n)
    assert close(h, h.T)
    assert close(jacrev(jacrev(forces.energy))(x, case.ions).reshape(n, n), h)
    assert close(-jacfwd(lambda x: forces.forces(x[None], case.ions))(x).reshape(n, n), h)
    batched = vmap(hessian(forces.energy), in_dims=(0, None))(case.x, case.ions)
    assert close(batched[0].reshape(n, n), h)
    model, leaf = forces.Cluster(case.ions), x[None].clone().requires_grad_()
    (du,) = torch.autograd.grad(model(leaf)[0].sum(), leaf, create_graph=True)
    rows = [torch.autograd.grad(g, leaf, retain_graph=True)[0].reshape(-1) for g in du.reshape(-1)]
    assert close(torch.stack(rows), h)
    for seed in range(2):
        v = direction(x, seed)
        assert_is_derivative(
            -h @ v.reshape(-1), lambda x: forces.forces(x[None], case.ions).reshape(-1), x, v
        )


def test_forces_neither_push_nor_turn_the_whole(forces: ModuleType, case):
    found = forces.forces(case.x, case.ions)
    largest = found.abs().max()
    assert found.sum(dim=1).abs().max() <= CLOSE * largest
    assert torch.linalg.cross(case.x, found).sum(dim=1).abs().max() <= CLOSE * largest * case.x.abs().max()


def test_a_relaxed_cluster_has_six_rigid_motions_and_vibrates_otherwise(forces: ModuleType):
    x = forces.relax(forces.R0 * forces.CORNERS, forces.TRUE)
    assert forces.forces(x[None], forces.TRUE).abs().max() < 1e-10
    values = torch.linalg.eigvalsh(hessian(forces.energy)(x, forces.TRUE).reshape(24, 24))
    assert values[:6].abs().max() < CLOSE * values[-1]
    assert values[6] > 1e-3 * values[-1]


# The program --------------------------------------------------------------------------------------------------


def test_forces_alone_lead_to_the_model_that_made_them(forces: ModuleType):
    x = forces.shaken(2, torch.Generator().manual_seed(0))
    model = forces.Cluster(forces.START)
    history = forces.fit(model, x, forces.forces(x, forces.TRUE), 80)
    assert history[-1] < 1e-10 * history[0]
    assert close(flat(model.ions), flat(forces.TRUE), 1e-9)


def test_the_program_prints_what_it_learned_and_writes_nothing(
    forces: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    history = forces.main(["--steps", "2", "--configurations", "1", "--seed", "3"])
    x = forces.shaken(1, torch.Generator().manual_seed(3))
    model = forces.Cluster(forces.START)
    assert history == forces.fit(model, x, forces.forces(x, forces.TRUE), 2)
    shown = capsys.readouterr().out
    for name, value in zip(forces.NAMES, model.ions.values(), strict=True):
        (line,) = (line for line in shown.splitlines() if line.startswith(name))
        assert float(line.split()[-1]) == pytest.approx(value, abs=1e-4)
    assert "artificial" in shown
    assert not list(tmp_path.iterdir())


def test_the_comparison_with_other_libraries_runs(peer: ModuleType, tmp_path: Path):
    peer.main(["--quick", "--out", str(tmp_path)])
    text = (tmp_path / "forces.md").read_text(encoding="utf-8")
    rows = [line.split("|")[3:-1] for line in text.splitlines() if line.startswith("|") and ", ours " in line]
    assert len(rows) == len(peer.ours())
    assert all(float(cell) <= CLOSE for row in rows for cell in row)
    assert "missing: all: --quick" in text


@pytest.mark.parametrize("library", ["jaxopt", "xitorch"])
def test_other_libraries_agree(peer: ModuleType, library: str, case):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jaxopt's, that it is no longer maintained
        pytest.importorskip(library)
        method = next(m for m in getattr(peer, f"{library}_methods")() if m.group == "tuned")
        compared = ("energy", "forces", "gradient")
        theirs = method.run(case, compared)
    for ours in (m.run(case, compared) for m in peer.ours()):
        for name in compared:
            assert close(getattr(theirs, name), getattr(ours, name), 1e-10), name
