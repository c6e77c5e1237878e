"""Phantom gradients of the study are what the formula says, its model has the right gradient, and it runs."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from torchdeq import DEQ, GMRES, IFT, Anderson, FixedPointIteration, GradMethod, PhantomGrad, Unroll
from torchdeq.zoo.phantom import ConvDEQ

ROOT = Path(__file__).parents[2]


def model_of(
    method: GradMethod, solver: object = Anderson(tol=1e-13, stop_mode="rel", max_iter=400)
) -> ConvDEQ:
    """A small one in float64, in which the convolutions count."""
    torch.manual_seed(0)
    model = ConvDEQ(DEQ(solver, method), channels=4, groups=2, size=4).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for norm in model.norms:
            norm.weight.copy_(torch.tensor([0.5, 1.0, 1.5, 1.0]))  # type: ignore[operator, union-attr]
            norm.bias.copy_(torch.tensor([0.1, -0.3, 0.2, 0.0]))  # type: ignore[operator, union-attr]
    return model


def gradients(model: ConvDEQ, x: Tensor) -> list[Tensor]:
    logits, solution = model(x)
    assert bool(solution.converged.all())
    return list(torch.autograd.grad(logits.square().sum(), list(model.parameters())))


def test_the_exact_gradient_of_the_model_is_that_of_all_steps() -> None:
    x = torch.rand(3, 1, 4, 4, dtype=torch.float64)
    ours = gradients(model_of(IFT(solver=GMRES(tol=1e-13, max_iter=70))), x)
    steps = FixedPointIteration(tol=1e-13, stop_mode="rel", max_iter=1000, tau=0.5)
    theirs = gradients(model_of(Unroll(), steps), x)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_more_damped_steps_come_to_the_exact_gradient_of_the_model() -> None:
    x = torch.rand(3, 1, 4, 4, dtype=torch.float64)
    exact = torch.cat(
        [g.flatten() for g in gradients(model_of(IFT(solver=GMRES(tol=1e-12, max_iter=70))), x)]
    )
    errors = []
    for steps in (1, 5, 200):
        ours = torch.cat([g.flatten() for g in gradients(model_of(PhantomGrad(steps=steps, tau=0.5)), x)])
        errors.append(((ours - exact).norm() / exact.norm()).item())
    assert errors[0] > errors[1] > 1e-3  # J is not small
    assert errors[2] < 1e-6


def test_the_equilibrium_is_a_fixed_point_that_the_last_normalisation_bounds() -> None:
    model = model_of(IFT())
    x = model.inject(torch.rand(3, 1, 4, 4, dtype=torch.float64))
    with torch.no_grad():
        z, _ = model.deq(lambda z: model.block(z, x), torch.zeros_like(x))
        torch.testing.assert_close(model.block(z, x), z, rtol=0, atol=1e-10)
        last = model.norms[2]
        scaled = (z - last.bias[:, None, None]) / last.weight[:, None, None]
        far = (model.block(1e6 * torch.randn_like(z), x) - last.bias[:, None, None]) / last.weight[
            :, None, None
        ]
    for normalised in (scaled, far):  # mean 0 and mean square at most 1, in each group
        groups = normalised.reshape(3, 2, -1)
        assert groups.mean(dim=2).abs().max() < 1e-12
        assert groups.square().mean(dim=2).max() <= 1 + 1e-12


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    model = model_of(IFT())
    x = torch.rand(4, 1, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[0][1:2], model(x[1:2])[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 6}, "multiple of groups"),
        ({"channels": 0}, "multiple of groups"),
        ({"size": 3}, "positive even"),
    ],
)
def test_values_out_of_range_are_errors(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvDEQ(**options)


@pytest.mark.parametrize("kind", ["Gaussian", "symmetric"])
@pytest.mark.parametrize(("k", "tau"), [(1, 0.3), (5, 0.5), (9, 1.0)])
def test_phantom_gradients_of_random_contractions_are_those_of_the_formula(
    study: ModuleType, kind: str, k: int, tau: float
) -> None:
    """Bᵀ (I − M^k) u by dense algebra, for W and b."""
    problem = study.Contraction.draw(kind, 6, torch.Generator().manual_seed(1), batch=3)
    assert torch.linalg.matrix_norm(problem.w, ord=2).item() == pytest.approx(0.95)
    z = torch.zeros_like(problem.x)
    with torch.no_grad():
        for _ in range(1000):
            z = problem.f(z)
    slope, one = 1 - z.square(), torch.eye(6, dtype=z.dtype)  # (B, n) of tanh
    jt = slope[:, None, :] * problem.w.detach().mT  # (B, n, n), Jᵀ = Wᵀ diag(slope)
    u = torch.linalg.solve(one - jt, z - problem.y)
    m = (1 - tau) * one + tau * jt
    bias = (torch.linalg.matrix_power(m, k) @ u[..., None])[..., 0]
    for weight in (u, u - bias):
        du = slope * weight
        dense = torch.cat([(du.mT @ z).flatten(), du.sum(dim=0)])
        methods = (
            [IFT(solver=GMRES(tol=1e-13, max_iter=20))] if weight is u else list(study.forms(k, tau).values())
        )
        for method in methods:
            torch.testing.assert_close(problem.gradient(method, 1000), dense, rtol=1e-9, atol=1e-11)


def test_the_study_runs_and_its_numbers_are_what_they_are_called(study: ModuleType, tmp_path: Path) -> None:
    assert study.main(["--quick", "--out", str(tmp_path)]) == 0
    (found,) = json.loads((tmp_path / "phantom.json").read_text())["measured"]
    assert (tmp_path / "phantom.png").stat().st_size > 10_000
    for kind in study.KINDS:
        values = {n: found[study.key(kind, n, "unrolled", 9, 1.0)] for n in study.FORWARD}
        assert values[study.FORWARD[0]] < values[study.ARRIVED]  # a short forward solve costs accuracy
        assert -1 <= found["least cosine"] < values[study.ARRIVED] <= 1 + 1e-12
    for name in ("exact", "Neumann", *(study.arm(k, tau) for k, tau in study.GRID)):
        assert 0 <= found[name] <= 100
        assert 1 <= found[f"{name} evaluations"] <= study.SOLVER.max_iter + 1
    assert found["gain"] == found[study.DEFAULT] - found["exact"]
    text = (tmp_path / "phantom.md").read_text()
    assert all(claim.text in text for claim in study.CLAIMS)


def test_the_options_change_what_is_trained(study: ModuleType) -> None:
    options = study.Options(quick=True, solver="fixed_point_iter", grad="jfb")
    assert options.gradient(study.EXACT) != study.EXACT
    sizes = study.Sizes.of(options)
    data = study.Digits.load(0, options.device, few=True)
    found = [
        study.train(chosen, data, sizes, study.EXACT, rate=1e-2, epochs=1)
        for chosen in (options, study.Options(quick=True))
    ]
    assert type(found[0].model.deq.solver) is not type(found[1].model.deq.solver)
    assert found[0].evaluations != found[1].evaluations


def test_images_of_another_size_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"expected \(B, 1, 8, 8\)"):
        ConvDEQ(channels=4)(torch.zeros(2, 1, 9, 9))
