"""Each fault of an f gets its verdict, an f without faults gets none, and looking at f leaves no trace."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdeq
from tests.problems import F64, CoupledMap, SymmetricMap, TanhMap, random_matrix, solve_exactly
from torchdeq.diagnostics import FixedPointReport, check_fixed_point
from torchdeq.diagnostics.inside import Inside
from torchdeq.diagnostics.leaves import leaves_of
from torchdeq.diagnostics.slopes import slope

N, BATCH = 6, 4
W = random_matrix(N, 0.5)
X = torch.randn(BATCH, N, dtype=F64, generator=torch.Generator().manual_seed(2))
Z0 = torch.zeros(BATCH, N, dtype=F64)


def good(z: Tensor) -> Tensor:
    return torch.tanh(z @ W.T + X)


def faults(report: FixedPointReport) -> list[str]:
    return [finding.name for finding in report.findings if finding.verdict == "fault"]


def verdicts(report: FixedPointReport, verdict: str) -> list[str]:
    return [finding.name for finding in report.findings if finding.verdict == verdict]


# An f without a fault -----------------------------------------------------------------------------------


def test_a_map_without_a_fault_gets_none() -> None:
    f = TanhMap.make(n=N, batch=BATCH, gain=0.5)
    report = check_fixed_point(f, f.z0)
    assert {finding.verdict for finding in report.findings} == {"ok"}
    assert report.ok
    assert report.at == "solution"
    assert "FAULT" not in str(report)
    assert str(report).splitlines()[0] == "TanhMap on a state of shape (4, 6), float64, batch_dims=1"


def test_norm_and_radius_are_those_of_the_dense_jacobian_at_the_solution() -> None:
    f = TanhMap.make(n=N, batch=BATCH, gain=0.9)
    report = check_fixed_point(f, f.z0)
    z = solve_exactly(f, f.z0)
    for i in range(BATCH):
        j = (1 - z[i].square())[:, None] * f.w.detach()  # tanh' = 1 − tanh²
        assert report.norm is not None
        assert report.radius is not None
        # The solve went to relative 1.5e-8, and J changes with z at a rate of order 1.
        assert report.norm[i].item() == pytest.approx(torch.linalg.matrix_norm(j, 2).item(), rel=1e-6)
        assert report.radius[i].item() == pytest.approx(torch.linalg.eigvals(j).abs().max().item(), rel=1e-6)


def test_norm_needs_no_second_derivative() -> None:
    report = check_fixed_point(lambda z: Once.apply(z) + X, Z0)
    assert report["second"].verdict == "note"
    assert report.norm is not None
    assert report.norm.tolist() == pytest.approx([0.5] * BATCH, rel=1e-6)  # by difference quotients


# One fault each -----------------------------------------------------------------------------------------


class Once(torch.autograd.Function):
    """z / 2, with a backward that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z / 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g / 2


class WrongBackward(torch.autograd.Function):
    """sin(z), with a backward that is off by a hundredth."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return 1.01 * g * z.cos()


class WrongSecond(torch.autograd.Function):
    """sin(z), whose backward can be differentiated and then takes cos(z) for a constant."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return g * z.detach().cos()


class WrongForwardMode(torch.autograd.Function):
    """z / 2, with a tangent of the wrong sign."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z / 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g / 2

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        return -t / 2


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.round()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def in_place(z: Tensor) -> Tensor:
    z *= 0.5
    return z + X


def partly_in_place(z: Tensor) -> Tensor:
    z[:, 0] = 1.0
    return good(z)


def with_numpy(z: Tensor) -> Tensor:
    return torch.from_numpy(z.detach().numpy() * 0.5) + X


def one_number_hidden(z: Tensor) -> Tensor:
    return torch.cat([good(z)[:, 1:], good(z.detach())[:, :1]], dim=1)


def broken_backward(z: Tensor) -> Tensor:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:
            return z / 2

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            raise NotImplementedError("no backward here")

    return Broken.apply(z) + X


def fails_under_grad(z: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        raise RuntimeError("inference only")
    return good(z)


FAULTY: list[tuple[str, Callable[[Tensor], Any], str, str]] = [
    ("runs", lambda z: z @ torch.zeros(3, 3, dtype=F64), "RuntimeError: ", "f(z0) work by itself"),
    ("runs", lambda z: z / z, "not finite in 4 of 4 samples", "division by 0"),
    ("argument", in_place, "in place", "z = z + …"),
    ("argument", partly_in_place, "in place", "z = z + …"),
    ("shape", lambda z: good(z)[:, :3], "returned shape (4, 3)", "another value"),
    ("shape", lambda z: (good(z), z), "returned the structure", "another value"),
    ("shape", lambda z: good(z) > 0, "returned dtype torch.bool", "another value"),
    ("shape", lambda z: None, "returned", "another value"),
    ("solve", lambda z: z + 1, "did not converge", "jac_reg"),
    ("gradient", lambda z: good(z).detach(), "no path", "detach()"),
    ("gradient", with_numpy, "no path", "NumPy"),
    ("gradient", lambda z: good(z.detach()) + 0.1 * z, "autograd's derivative along a line is", "hidden"),
    ("gradient", one_number_hidden, "autograd's derivative along a line is", "hidden"),
    ("gradient", lambda z: 0.5 * WrongBackward.apply(z) + X, "autograd's derivative", "custom backward"),
    ("gradient", lambda z: 0.3 * StraightThrough.apply(z) + X, "autograd's derivative", "straight-through"),
    ("gradient", broken_backward, "NotImplementedError: no backward here", "products with Jᵀ"),
    ("gradient", fails_under_grad, "RuntimeError: inference only", ""),
    ("gradient", lambda z: 0.5 * z + z.abs().square().sum(1, True).sqrt() * 0.1, "not finite", "a root"),
    ("second", lambda z: 0.5 * WrongSecond.apply(z) + X, "wrong without an error", "once_differentiable"),
    ("forward", lambda z: WrongForwardMode.apply(z) + X, "forward mode gives -", "custom jvp"),
]


@pytest.mark.parametrize(("question", "f", "text", "advice"), FAULTY)
def test_a_fault_is_found_and_no_other(
    question: str, f: Callable[[Tensor], Any], text: str, advice: str
) -> None:
    report = check_fixed_point(f, Z0)
    assert faults(report) == [question]
    assert not report.ok
    assert text in report[question].text
    assert advice in report[question].advice
    assert question in report.why
    assert report.use == ""
    assert f"FAULT    {question}" in str(report)


def test_a_wrong_derivative_is_found_in_single_precision_too() -> None:
    z0 = Z0.float()
    assert faults(check_fixed_point(lambda z: 0.5 * z.sin() + X.float(), z0)) == []
    hidden = check_fixed_point(lambda z: 0.3 * z.detach().sin() + 0.2 * z.sin() + X.float(), z0)
    assert faults(hidden) == ["gradient"]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_part_that_is_small_beside_the_others_is_checked_as_they_are(dtype: torch.dtype) -> None:
    w, x = W.to(dtype), X.to(dtype)
    scale = torch.tensor([1e4, 1.0, 1.0, 1.0], dtype=dtype)[:, None]

    def by_sample(z: Tensor, hide: bool) -> Tensor:
        z = torch.cat([z[:3], z[3:].detach() if hide else z[3:]])
        return scale * torch.tanh((z / scale) @ w.T + x)

    def by_leaf(z: tuple[Tensor, Tensor], hide: bool) -> tuple[Tensor, Tensor]:
        small = z[1].detach() if hide else z[1]
        return 1e3 * torch.tanh(z[0] @ w.T / 1e3 + x), torch.tanh(small @ w.T + x)

    z0 = Z0.to(dtype)
    for f, start in ((by_sample, z0), (by_leaf, (z0, z0))):
        assert faults(check_fixed_point(functools.partial(f, hide=True), start)) == ["gradient"]
        assert faults(check_fixed_point(functools.partial(f, hide=False), start)) == []


class Counted(nn.Module):
    """A map that drifts: every call counts, in a buffer."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=F64))

    def forward(self, z: Tensor) -> Tensor:
        self.calls += 1
        return good(z) + self.calls


class Normed(nn.Module):
    """Batch normalisation in an f, in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(N, dtype=F64)

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(0.1 * self.norm(z @ W.T + X) + X)


class Holder:
    """An object with a module in a long list, where DEQ does not look."""

    def __init__(self, module: nn.Module):
        self.layers = [module] * 200

    def __call__(self, z: Tensor) -> Tensor:
        return self.layers[0](z)


@pytest.mark.parametrize("wrap", ["module", "method", "closure", "global", "partial", "default"])
def test_batch_normalisation_is_seen_wherever_deq_sees_it(wrap: str) -> None:
    module = Normed()
    source: dict[str, Any] = {"module": module}
    exec("def f(z): return module(z)", source)
    f: Any = {
        "module": module,
        "method": module.forward,
        "closure": lambda z: module(z),
        "global": source["f"],
        "partial": functools.partial(lambda m, z: m(z), module),
        "default": lambda z, m=module: m(z),
    }[wrap]
    report = check_fixed_point(f, Z0)
    assert faults(report) == []
    assert report["buffers"].verdict == "note"
    assert "running_mean (BatchNorm1d)" in report["buffers"].text
    assert "change once per solve" in report["buffers"].text
    assert report["samples"].verdict == "note"
    assert "batch normalisation" in report["samples"].advice
    assert report.use.endswith("batch_dims=0)")


def test_modules_that_deq_does_not_see_are_to_be_named() -> None:
    module = Normed()
    report = check_fixed_point(Holder(module), Z0)
    assert faults(report) == ["buffers"]
    assert "DEQ(…, modules=[…])" in report["buffers"].advice
    assert report.use.endswith("batch_dims=0, modules=[…])")
    # And so it is: named, they change once for one solve, and else at every evaluation.
    deq = torchdeq.DEQ(batch_dims=0, modules=[module])
    deq(Holder(module), Z0)
    assert module.norm.num_batches_tracked.item() == 1
    torchdeq.DEQ(batch_dims=0)(Holder(module), Z0)
    assert module.norm.num_batches_tracked.item() > 2


def test_buffers_that_f_depends_on_are_held_as_deq_holds_them() -> None:
    report = check_fixed_point(Counted(), Z0)
    assert faults(report) == []
    assert "changes calls (Counted)" in report["buffers"].text
    assert "once its buffers are held" in report["function"].text


def test_a_buffer_of_a_module_in_eval_mode_is_not_held() -> None:
    report = check_fixed_point(Counted().eval(), Z0)
    assert faults(report) == ["function", "buffers"]
    assert "calls" in report["function"].text
    assert report["solve"].verdict == "unknown"
    assert "f is not a function" in report["solve"].text


def test_a_tensor_that_f_writes_to_is_named_and_put_back() -> None:
    count = torch.zeros(3)

    def f(z: Tensor) -> Tensor:
        count.add_(1)
        return good(z)

    report = check_fixed_point(f, Z0)
    assert faults(report) == ["buffers"]
    assert "changes count" in report["buffers"].text
    assert report.use == ""
    assert not bool(count.any())


def test_random_numbers_are_named_with_what_draws_them_once() -> None:
    drop = nn.Dropout(0.5)
    report = check_fixed_point(lambda z: good(drop(z)), Z0)
    assert faults(report) == ["function"]
    assert "training mode: drop." in report["function"].text
    assert report["gradient"].verdict == "ok"  # of f with one mask
    assert report.use.endswith("hold_noise=True)")
    _, solution = eval(report.use, vars(torchdeq))(lambda z: good(drop(z)), Z0)
    assert bool(solution.converged.all())
    assert faults(check_fixed_point(lambda z: good(drop.eval()(z)), Z0)) == []
    held = torchdeq.VariationalDropout(0.5)
    assert faults(check_fixed_point(lambda z: good(held(z)), Z0)) == []
    assert held.mask is None


def test_random_numbers_of_a_generator_cannot_be_held() -> None:
    generator = torch.Generator().manual_seed(0)
    report = check_fixed_point(lambda z: good(z) + torch.rand(N, generator=generator, dtype=F64), Z0)
    assert faults(report) == ["function"]
    assert "with the same random numbers too" in report["function"].text
    assert report.use == ""


# Notes --------------------------------------------------------------------------------------------------


def test_coupled_samples_are_noted_and_seen_as_one_system() -> None:
    f = CoupledMap.make(batch=BATCH, n=N)
    report = check_fixed_point(f, f.z0)
    assert faults(report) == []
    assert report["samples"].verdict == "note"
    assert report["samples"].advice == "Say batch_dims=0."
    assert "batch_dims=0" in report.use
    assert report.norm is not None
    z = solve_exactly(f, f.z0)
    jacobian = torch.autograd.functional.jacobian(f, z).reshape(z.numel(), z.numel())
    # 40 steps reach all 24 unknowns.
    assert report.norm.tolist() == pytest.approx([torch.linalg.matrix_norm(jacobian, 2).item()], rel=1e-6)


def test_one_system_and_one_sample_are_said_to_be_so() -> None:
    f = CoupledMap.make(batch=BATCH, n=N)
    assert check_fixed_point(f, f.z0, batch_dims=0)["samples"].verdict == "ok"
    assert check_fixed_point(f, f.z0, batch_dims=0).use.endswith("batch_dims=0)")
    alone = check_fixed_point(lambda z: 0.5 * z.sin() + 1, torch.zeros(1, 3, dtype=F64))
    assert alone["samples"].verdict == "unknown"


def test_tokens_that_see_their_sequence_are_told_to_count_sequences() -> None:
    x = torch.randn(3, 5, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    z0 = torch.zeros_like(x)
    apart = check_fixed_point(lambda z: torch.tanh(0.5 * z + x), z0, batch_dims=2)
    assert apart["samples"].verdict == "ok"
    assert apart.norm is not None
    assert apart.norm.shape == (15,)
    assert "batch_dims=2" in apart.use
    within = check_fixed_point(lambda z: torch.tanh(0.5 * z.mean(1, True) + x), z0, batch_dims=2)
    assert within["samples"].advice == "Say batch_dims=1."
    across = check_fixed_point(lambda z: torch.tanh(0.5 * z.mean((0, 1), True) + x), z0, batch_dims=2)
    assert across["samples"].advice == "Say batch_dims=0."


def test_a_kink_is_not_taken_for_a_wrong_gradient() -> None:
    leaky = functools.partial(torch.nn.functional.leaky_relu, negative_slope=0.2)
    report = check_fixed_point(lambda z: 0.5 * leaky(z), Z0)
    assert faults(report) == []
    assert report["gradient"].verdict == "note"
    assert "kink" in report["gradient"].text
    elsewhere = check_fixed_point(lambda z: 0.5 * leaky(z @ W.T + X), Z0)
    assert elsewhere["gradient"].verdict == "ok"


def test_an_expanding_map_is_noted() -> None:
    # f(z) = −2 z + x converges under acceleration only; J = −2.
    report = check_fixed_point(lambda z: -2 * z + X, Z0)
    assert faults(report) == []
    assert report["contraction"].verdict == "note"
    assert "moves away" in report["contraction"].text
    assert report.radius is not None
    assert report.radius.tolist() == pytest.approx([2.0] * BATCH)


def test_a_nonnormal_map_is_noted() -> None:
    a = torch.tensor([[0.5, 4.0], [0.0, 0.5]], dtype=F64)
    report = check_fixed_point(lambda z: z @ a.T + 1, torch.zeros(2, 2, dtype=F64))
    assert report["contraction"].verdict == "note"
    assert "may first move away" in report["contraction"].text
    assert report.norm is not None
    assert report.norm.tolist() == pytest.approx([torch.linalg.matrix_norm(a, 2).item()] * 2)


def test_a_constant_is_noted() -> None:
    report = check_fixed_point(lambda z: X, Z0)
    assert faults(report) == []
    assert "does not depend on z" in report["gradient"].text


def test_nothing_to_learn_is_noted() -> None:
    assert check_fixed_point(good, Z0)["learns"].verdict == "note"
    layer = nn.Linear(N, N, dtype=F64)
    report = check_fixed_point(lambda z: torch.tanh(0.3 * layer(z)), Z0)
    assert report["learns"].text == "f depends on tensors that require a gradient: 2, 42 numbers."


def test_missing_second_and_forward_derivatives_are_noted() -> None:
    report = check_fixed_point(lambda z: Once.apply(z) + X, Z0)
    assert verdicts(report, "note") == ["second", "forward", "learns"]
    assert "IFT(order=2)" in report["second"].advice


def test_without_convergence_derivatives_are_taken_at_the_start() -> None:
    report = check_fixed_point(good, Z0, max_iter=2)
    assert faults(report) == ["solve"]
    assert report.at == "z0"
    assert report.norm is not None
    z_slope = 1 - torch.tanh(X).square()
    norms = [torch.linalg.matrix_norm(s[:, None] * W, 2).item() for s in z_slope]
    assert report.norm.tolist() == pytest.approx(norms, rel=1e-9)


def test_a_solve_that_comes_near_is_noted() -> None:
    # Somewhere on the way to 1.5e-8 the residual is below 1e-4.
    near = [check_fixed_point(good, Z0, max_iter=k) for k in range(6, 12)]
    noted = [report for report in near if report["solve"].verdict == "note"]
    assert noted
    assert all(report.at == "solution" and report.ok for report in noted)


def test_an_f_that_is_not_finite_off_its_way_is_reported() -> None:
    report = check_fixed_point(lambda z: torch.where((z == 0).all(), z + 1, z / 0 * 0), Z0)
    assert "solve" in faults(report)


@pytest.mark.parametrize("last", range(1, 50, 2))
def test_an_f_that_fails_at_a_later_call_is_reported(last: int) -> None:
    calls = []

    def f(z: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > last:
            raise RuntimeError("no more")
        return good(z)

    report = check_fixed_point(f, Z0)
    assert any("RuntimeError: no more" in finding.text for finding in report.findings)


def test_a_whole_examination_takes_some_tens_of_evaluations() -> None:
    calls = []

    def f(z: Tensor) -> Tensor:
        calls.append(1)
        return good(z)

    assert check_fixed_point(f, Z0).ok
    assert len(calls) <= 60


def test_an_affine_map_is_a_map() -> None:
    report = check_fixed_point(torchdeq.AffineMap(lambda z: z @ W.T, X), Z0)
    assert faults(report) == []
    assert report.radius is not None
    assert report.radius.tolist() == pytest.approx([torch.linalg.eigvals(W).abs().max().item()] * BATCH)


def test_an_f_that_changes_later_is_no_function() -> None:
    calls: list[int] = []

    def f(z: Tensor) -> Tensor:
        calls.append(1)
        return good(z) + (0.1 if len(calls) > 10 else 0.0)

    report = check_fixed_point(f, Z0)
    assert "function" in faults(report)
    assert "at the end of the examination differs" in report["function"].text
    assert report.use == ""


def test_a_bend_sharper_than_quotients_can_see_is_no_fault_in_second_derivatives() -> None:
    w = random_matrix(8, 1.0).float()
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(4))
    # A step of ε^⅓ |z| = 50 is far beyond the bend of tanh, which is one long.
    report = check_fixed_point(lambda z: 1e4 + torch.tanh((z - 1e4) @ w.T + x), torch.zeros(4, 8))
    assert report["gradient"].verdict in ("note", "unknown")
    assert report["second"].verdict == "unknown"
    assert report.ok
    assert report.use


def test_what_passes_for_samples_apart_is_said() -> None:
    x = X.float()
    hidden = check_fixed_point(lambda z: torch.tanh(z @ W.float().T + x + 1e-5 * z.mean(0)), Z0.float())
    assert hidden["samples"].verdict == "ok"
    assert hidden["samples"].text.endswith("to relative 7e-04.")  # 2 √ε


@pytest.mark.parametrize("how", ["raises", "not finite"])
def test_samples_are_unknown_where_f_cannot_be_evaluated_beside_the_start(how: str) -> None:
    def f(z: Tensor) -> Tensor:
        if bool((z.abs() > 0.2).any()):  # never on the way, as |f| < 0.2
            if how == "raises":
                raise ValueError("out of range")
            return z / 0
        return 0.2 * torch.tanh(z @ W.T + X)

    report = check_fixed_point(f, Z0)
    assert report["samples"].verdict == "unknown"
    assert "cannot be seen whether it couples" in report["samples"].text


# States of every kind -----------------------------------------------------------------------------------


def test_nested_and_complex_states() -> None:
    z0 = {"a": Z0, "b": (torch.zeros(BATCH, 2, dtype=torch.complex128),)}

    def f(state: Any) -> Any:
        a, b = state["a"], state["b"][0]
        return {"a": good(a) + 0.1 * b.abs().square().sum(1, True), "b": (0.3j * b.conj() + a[:, :2] + 1j,)}

    report = check_fixed_point(f, z0)
    assert faults(report) == []
    assert "shape (4, 6), (4, 2), float64, complex128" in report.subject
    detached = check_fixed_point(lambda s: {"a": f(s)["a"], "b": (f(s)["b"][0].detach(),)}, z0)
    assert faults(detached) == ["gradient"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_no_false_alarm(dtype: torch.dtype) -> None:
    w, x = W.to(dtype), X.to(dtype)
    report = check_fixed_point(lambda z: torch.tanh(z @ w.T + x), Z0.to(dtype))
    assert faults(report) == []
    hidden = check_fixed_point(lambda z: torch.tanh(z @ w.T + x).detach(), Z0.to(dtype))
    assert faults(hidden) == ["gradient"]


def test_autocast_is_that_of_the_caller() -> None:
    layer = nn.Linear(N, N)
    seen = []

    def f(z: Tensor) -> Tensor:
        y = layer(z)
        seen.append(y.dtype)
        return torch.tanh(0.3 * y)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = check_fixed_point(f, Z0.float())
    assert set(seen) == {torch.bfloat16}
    assert faults(report) == []


def test_under_inference_mode_and_without_grad() -> None:
    with torch.inference_mode():
        assert faults(check_fixed_point(good, torch.zeros(BATCH, N, dtype=F64))) == []
    with torch.no_grad():
        assert check_fixed_point(good, Z0)["gradient"].verdict == "ok"


# Advice -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("f", "use"),
    [
        (TanhMap.make(n=N, batch=BATCH, gain=0.8), "DEQ(Multisecant(), IFT())"),
        (SymmetricMap.make(n=N, batch=BATCH, gain=0.8), "DEQ(Multisecant(), IFT(solver=CG(tol=1e-5)))"),
        (TanhMap.make(n=N, batch=BATCH, gain=0.1), "DEQ(FixedPointIteration(), PhantomGrad(steps=3))"),
    ],
)
def test_the_advice_is_a_call_that_works(f: TanhMap, use: str) -> None:
    report = check_fixed_point(f, f.z0)
    assert report.use == use
    deq = eval(report.use, vars(torchdeq))
    _, solution = deq(f, f.z0)
    assert bool(solution.converged.all())


# Nothing is changed -------------------------------------------------------------------------------------


class Everything(nn.Module):
    """Moves whatever a module can move."""

    hits: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(N, dtype=F64)
        self.linear = nn.Linear(N, N, dtype=F64)
        self.drop = nn.Dropout(0.2)
        self.held = torchdeq.VariationalDropout(0.2)
        self.register_buffer("hits", torch.zeros(2))
        self.calls = 0
        self.generator = torch.Generator().manual_seed(5)

    def forward(self, z: Tensor) -> Tensor:
        self.calls += 1
        self.hits = self.hits + 1  # another tensor under the name
        self.norm.eval() if self.calls % 2 else self.norm.train()
        noise = torch.rand(N, dtype=F64, generator=self.generator)
        with torch.enable_grad():
            self.linear(z.detach()).sum().backward()  # writes to .grad
        return torch.tanh(0.1 * self.drop(self.held(self.norm(self.linear(z)))) + X + noise)


def test_nothing_is_changed() -> None:
    module = Everything()
    module.linear.bias.grad = torch.ones(N, dtype=F64)
    hits, state = module.hits, copy.deepcopy(module.state_dict())
    z0 = torch.randn(BATCH, N, dtype=F64, requires_grad=True)
    kept, random, own = z0.detach().clone(), torch.get_rng_state(), module.generator.get_state()
    flags = {name: m.training for name, m in module.named_modules()}
    grad = module.linear.bias.grad
    check_fixed_point(module, z0)
    assert torch.equal(z0, kept)
    assert z0.grad is None
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(module.generator.get_state(), own)
    assert module.calls == 0
    assert module.hits is hits
    assert module.held.mask is None
    assert {name: m.training for name, m in module.named_modules()} == flags
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert module.linear.weight.grad is None
    assert module.linear.bias.grad is grad
    assert bool((grad == 1).all())


def test_an_f_in_place_does_not_reach_z0() -> None:
    z0 = torch.ones(BATCH, N, dtype=F64)
    check_fixed_point(in_place, z0)
    assert bool((z0 == 1).all())


def test_what_is_put_back_survives_an_error() -> None:
    module = Counted()

    def f(z: Tensor) -> Tensor:
        module(z)
        raise ValueError("after the count")

    assert faults(check_fixed_point(f, Z0)) == ["runs"]
    assert module.calls.item() == 0


# The parts ----------------------------------------------------------------------------------------------


def test_leaves_are_those_that_the_result_depends_on() -> None:
    a, b, c = (torch.ones(2, requires_grad=True) for _ in range(3))
    inner = (a * 2).sin()
    assert {id(t) for t in leaves_of([inner + b, c])} == {id(a), id(b), id(c)}
    assert [id(t) for t in leaves_of([inner + b], without=[b])] == [id(a)]
    assert leaves_of([torch.ones(2)]) == []


def test_what_is_inside_is_found_once_and_cycles_end() -> None:
    layer = nn.Linear(2, 2)
    box: dict[str, Any] = {"layer": layer}
    box["box"] = box
    inside = Inside(lambda z: box["layer"](z))
    assert list(inside.modules.values()) == [layer]


@pytest.mark.parametrize("noise", [2.0**-52, 2.0**-23])
def test_slopes_know_their_error(noise: float) -> None:
    def rounded(x: float) -> float:
        return round(x / noise) * noise

    found = slope(lambda t: rounded(0.3 + 0.7 * t + 0.4 * t * t), noise, 1.0)
    assert abs(found.value - 0.7) <= 8 * found.error
    assert found.confirms(0.7)
    assert not found.confirms(0.7 * (1 + 20 * noise**0.5))
    assert not found.kink


def test_an_unknown_finding_names_the_known() -> None:
    with pytest.raises(KeyError, match="there are runs, argument, shape"):
        check_fixed_point(good, Z0)["nothing"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: check_fixed_point(good, Z0, steps=0), ValueError, "steps=0"),
        (
            lambda: check_fixed_point(good, torch.zeros(2, 2, dtype=torch.int64)),
            TypeError,
            "dtype torch.int64",
        ),
        (lambda: check_fixed_point(None, Z0), TypeError, "must be a callable"),  # type: ignore[arg-type]
    ],
)
def test_a_state_that_cannot_be_one_is_an_error(
    call: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()
