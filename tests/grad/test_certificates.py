"""Every implicit backward pass says how good its gradient is, and what it says is true.

f ends in + c, so dL/dc is the û that the gradient is made of. Its residual is computed here with a dense Jacobian.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.problems import F64, cotangent, exact_adjoint, random_matrix
from torchdeq import (
    DEQ,
    IFT,
    Anderson,
    ConvergenceError,
    ConvergenceWarning,
    CouplingWarning,
    FixedPointIteration,
    Status,
    as_solver,
    get_deq,
)

ADJOINTS = pytest.mark.parametrize(
    "name", ["gmres", "anderson", "neumann", "fixed_point_iter", "broyden", "bicgstab"]
)
FORMS = pytest.mark.parametrize("hook", [False, True], ids=["function", "hook"])


class Problem:
    """f(z) = tanh(z Wᵀ + mix(z)) + c, which counts how often a backward pass goes through it."""

    def __init__(self, gain: float = 0.8, couples: bool = False):
        generator = torch.Generator().manual_seed(1)
        self.w = random_matrix(8, gain)
        self.couples = couples
        self.c = torch.randn(4, 8, dtype=F64, generator=generator).requires_grad_()
        self.products = 0

    def __call__(self, z: Tensor) -> Tensor:
        h = z @ self.w.T
        if self.couples:
            h = h + 0.5 * z.roll(1, 0)
        out = torch.tanh(h) + self.c
        if out.requires_grad:
            out.register_hook(self._count)
        return out

    def _count(self, g: Tensor) -> None:
        self.products += 1

    @property
    def z0(self) -> Tensor:
        return torch.zeros_like(self.c, requires_grad=False)

    def residual(self, at: Tensor, g: Tensor, u: Tensor) -> Tensor:
        """‖g − (I − Jᵀ) u‖ / ‖g‖ per sample, (B,); of the whole batch if the samples are coupled."""
        jacobian = torch.autograd.functional.jacobian(self, at).reshape(at.numel(), at.numel())
        r = (g.reshape(-1) - u.reshape(-1) + jacobian.T @ u.reshape(-1)).reshape(g.shape)
        if self.couples:
            return (r.norm() / g.norm()).expand(len(g))
        return r.norm(dim=1) / g.norm(dim=1)


@dataclass
class Report:
    """One report of a backward pass, whichever door it came through."""

    residual: Tensor
    status: Tensor
    nfe: int


Run = Callable[..., tuple[Tensor, Tensor]]


def through_deq(f, name, hook, reports, **adjoint):
    # Plain iteration finds the state of coupled samples, and is slow on this problem if they are not.
    plain = FixedPointIteration(tol=1e-13, max_iter=500)
    deq = DEQ(
        plain if f.couples else Anderson(tol=1e-13, max_iter=200),
        IFT(solver=as_solver(name, **adjoint), hook=hook),
        on_backward=lambda s: reports.append(Report(s.abs_residual, s.status, s.nfe)),
    )
    z, solution = deq(f, f.z0)
    return z, solution.z


def through_get_deq(f, name, hook, reports, **adjoint):
    options = {f"b_{key}": value for key, value in adjoint.items()}
    deq = get_deq(
        f_solver="anderson", f_tol=1e-13, f_max_iter=200, b_solver=name, ift=True, hook_ift=hook,
        **{"b_tol": 1e-3, "b_max_iter": 50, **options},
    )  # fmt: skip
    states, _ = deq(
        f,
        f.z0,
        backward_writer=lambda s: reports.append(Report(s["abs_lowest"], s["status"], int(s["nfe"][0]))),
    )
    # The hook form and the other give f of the solved state; 1e-13 from there its Jacobian is the same.
    return states[-1], states[-1].detach()


DOORS = pytest.mark.parametrize("run", [through_deq, through_get_deq], ids=["DEQ", "get_deq"])


@DOORS
@FORMS
@ADJOINTS
def test_the_reported_residual_status_and_count_are_those_of_the_gradient(name, hook, run):
    f = Problem()
    g = cotangent(f.c) * torch.tensor([[1.0], [1e-6], [1e3], [1.0]], dtype=F64)
    for tol in (1e-2, 1e-6):
        reports: list[Report] = []
        z, at = run(f, name, hook, reports, tol=tol, max_iter=100)
        f.products = 0
        (u,) = torch.autograd.grad(z, f.c, g)
        products = f.products
        assert len(reports) == 1
        (report,) = reports
        assert torch.allclose(report.residual, f.residual(at, g, u), rtol=0, atol=1e-10)
        assert (report.residual <= tol).all()
        assert (report.status == Status.CONVERGED).all()
        # Each product with Jᵀ is a passage through f; the last passage takes u to the parameters.
        assert products == report.nfe + 1


@DOORS
@FORMS
@ADJOINTS
def test_a_solve_that_falls_short_says_by_how_much_and_warns_once(name, hook, run):
    f = Problem(gain=0.9)
    g = cotangent(f.c)
    reports: list[Report] = []
    z, at = run(f, name, hook, reports, tol=1e-12, max_iter=4)
    f.products = 0
    with pytest.warns(ConvergenceWarning) as caught:
        (u,) = torch.autograd.grad(z, f.c, g, retain_graph=True)
    products = f.products
    assert len(caught) == 1
    text = str(caught[0].message)
    assert "4 of 4 samples did not converge" in text
    assert "adjoint solve of a backward pass" in text
    assert "the gradient's relative error is about this residual times the condition of I − J" in text
    (report,) = reports
    # Two of them tell whether f couples the samples, which would be a reason to fall short.
    assert products == report.nfe + 1
    worst = int(report.residual.argmax())
    assert f"residual {float(report.residual[worst]):.2e}" in text
    assert torch.allclose(report.residual, f.residual(at, g, u), rtol=0, atol=1e-10)
    assert (report.residual > 1e-12).all()
    assert (report.status == Status.MAX_ITER).all()
    # The bound that the certificate gives: ‖û − u‖ ≤ ‖(I − Jᵀ)⁻¹‖ times the residual.
    jacobian = torch.autograd.functional.jacobian(f, at).reshape(at.numel(), at.numel())
    condition = torch.linalg.matrix_norm(torch.linalg.inv(torch.eye(at.numel(), dtype=F64) - jacobian), 2)
    apart = (u - exact_adjoint(f, at, g)).norm(dim=1)
    assert (apart <= condition * report.residual * g.norm(dim=1) + 1e-12).all()
    torch.autograd.grad(z, f.c, g)  # a second warning would be an error here; the report comes all the same
    assert len(reports) == 2


@FORMS
@ADJOINTS
def test_throw_raises_in_the_backward_pass_and_the_report_comes_first(name, hook):
    f = Problem(gain=0.9)
    reports: list[Report] = []
    deq = DEQ(
        Anderson(tol=1e-12, max_iter=200),
        IFT(solver=as_solver(name, tol=1e-12, max_iter=4), hook=hook),
        throw=True,
        on_backward=reports.append,
    )
    z, _ = deq(f, f.z0)
    for _ in range(2):
        with pytest.raises(
            ConvergenceError, match=r"did not converge.*adjoint solve.*Raise the adjoint solver's max_iter"
        ):
            torch.autograd.grad(z, f.c, cotangent(f.c), retain_graph=True)
    assert len(reports) == 2


@FORMS
def test_where_f_couples_samples_the_certificate_is_that_of_the_whole_batch(hook):
    f = Problem(gain=0.4, couples=True)
    g = cotangent(f.c)
    reports: list[Report] = []
    z, at = through_deq(f, "gmres", hook, reports, tol=1e-9, max_iter=40)
    f.products = 0
    with pytest.warns(CouplingWarning, match="adjoint solve"):
        (u,) = torch.autograd.grad(z, f.c, g)
    products = f.products
    (report,) = reports
    assert torch.allclose(report.residual, f.residual(at, g, u), rtol=0, atol=1e-10)
    assert (report.status == Status.CONVERGED).all()
    assert products == report.nfe + 1
