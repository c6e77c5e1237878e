"""DEQ inside what PyTorch has: each row asserts numbers, against dense algebra or a closed form."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from tests.problems import F64, cotangent, error, exact_adjoint, exact_gradient, random_matrix, solve_exactly
from torchdeq import (
    DEQ,
    GMRES,
    GRADS,
    IFT,
    SOLVERS,
    AffineMap,
    Anderson,
    Broyden,
    ConvergenceWarning,
    FixedPointIteration,
    PhantomGrad,
    as_grad,
    as_solver,
)
from torchdeq.solver.affine import AffineSolver

TIGHT = Anderson(tol=1e-13, max_iter=200)
EXACT = GMRES(tol=1e-12, max_iter=100)
METHODS = {
    "ift": IFT(solver=EXACT),
    "hook": IFT(solver=EXACT, hook=True),
    "phantom": PhantomGrad(steps=3, tau=0.8),
}
EVERY = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
IMPLICIT = pytest.mark.parametrize("method", [METHODS["ift"], METHODS["hook"]], ids=["ift", "hook"])


class Net(nn.Module):
    """f(z) = tanh(z Wᵀ + b + x), W with spectral radius about `gain`."""

    def __init__(self, n: int = 6, batch: int = 4, gain: float = 0.6, dtype: torch.dtype = F64):
        super().__init__()
        self.layer = nn.Linear(n, n, dtype=dtype)
        with torch.no_grad():
            self.layer.weight.copy_(random_matrix(n, gain))
            self.layer.bias.copy_(torch.linspace(-0.2, 0.3, n))
        generator = torch.Generator().manual_seed(1)
        self.x = nn.Parameter(torch.randn(batch, n, dtype=F64, generator=generator).to(dtype))

    def forward(self, z):
        return torch.tanh(self.layer(z) + self.x)

    @property
    def z0(self):
        return torch.zeros_like(self.x, requires_grad=False)

    @property
    def wanted(self):
        return list(self.parameters())


def exact(method, f, z0, g, wanted):
    """The gradient that `method` stands for, from dense algebra."""
    if isinstance(method, IFT):
        return exact_gradient(f, z0, g, wanted)
    z = solve_exactly(f, z0)  # Bᵀ (I − M^k) u with M = (1 − τ) I + τ Jᵀ
    u = exact_adjoint(f, z, g)
    jacobian = torch.autograd.functional.jacobian(f, z).reshape(z.numel(), z.numel())
    m = (1 - method.tau) * torch.eye(z.numel(), dtype=z.dtype) + method.tau * jacobian.T
    bias = (torch.linalg.matrix_power(m, method.steps) @ u.reshape(-1)).reshape(z.shape)
    return torch.autograd.grad(f(z), wanted, u - bias)


def grads(module):
    return [p.grad for p in module.parameters()]


# Both solves stop at 1e-13 and 1e-12, and the condition of I − J is below 100.
CLOSE = 1e-9


# Autocast -----------------------------------------------------------------------------------------------


class OutsideF(TorchFunctionMode):
    """Notes the dtypes of what is computed while f is not at work."""

    def __init__(self):
        super().__init__()
        self.inside = False
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not self.inside and isinstance(out, torch.Tensor) and out.is_floating_point():
            self.seen.append(out.dtype)
        return out


@pytest.mark.parametrize("name", SOLVERS)
def test_under_autocast_f_runs_in_bfloat16_and_the_solver_in_float32(name):
    f = Net(dtype=torch.float32)
    solver = as_solver(name, tol=2e-2)
    watch, inside = OutsideF(), []

    def linear(z):
        watch.inside = True
        h = 0.5 * (z @ SYMMETRIC)
        inside.append(h.dtype)
        watch.inside = False
        return h.float()

    g = (
        AffineMap(linear, f.x.detach())
        if isinstance(solver, AffineSolver)
        else lambda z: linear(z) + f.x.detach()
    )
    with torch.autocast("cpu", dtype=torch.bfloat16), watch:
        solution = solver(g, f.z0)
    assert solution.converged.all()
    assert set(inside) == {torch.bfloat16}
    assert len(watch.seen) > 5
    assert torch.bfloat16 not in watch.seen


SYMMETRIC = (lambda a: (a + a.T) / 4)(random_matrix(6, 0.6).float())


@EVERY
@pytest.mark.parametrize("backward_inside", [False, True], ids=["forward only", "backward too"])
def test_under_autocast_the_gradient_is_that_of_float32_to_the_precision_of_bfloat16(method, backward_inside):
    f = Net(dtype=torch.float32, gain=0.5)
    dtypes = []

    def noted(z):
        h = f.layer(z)
        dtypes.append(h.dtype)
        return torch.tanh(h + f.x)

    g = cotangent(f.x)
    if isinstance(method, IFT):
        method = method.replace(solver=GMRES(tol=1e-2))
    double = copy.deepcopy(f).double()
    want = exact(method, double, double.z0, g.double(), double.wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, _ = DEQ(Anderson(tol=2e-2), method)(noted, f.z0)
        assert z.dtype == torch.float32
        if backward_inside:
            z.backward(g)
    if not backward_inside:
        z.backward(g)
    assert set(dtypes) == {torch.bfloat16}, "f is evaluated again as it was in the forward pass"
    got = grads(f)
    assert all(t.dtype == torch.float32 for t in got)
    # The state is within tol + ε ≈ .03 of the fixed point, times the condition ‖(I − J)⁻¹‖ ≤ 2; so is the gradient.
    assert error([t.double() for t in got], want) < 0.06


# Dtypes of cotangents -----------------------------------------------------------------------------------


@EVERY
def test_a_float32_loss_on_a_bfloat16_module(method):
    f = Net(dtype=torch.bfloat16, gain=0.5)
    if isinstance(method, IFT):
        method = method.replace(solver=GMRES(tol=5e-3))
    double = copy.deepcopy(f).double()
    z, _ = DEQ(Anderson(tol=3e-2), method)(f, f.z0)
    assert z.dtype == torch.bfloat16
    g = cotangent(f.x.float())
    (z.float() * g).sum().backward()
    got = grads(f)
    assert all(t.dtype == torch.bfloat16 for t in got)
    want = exact(method, double, double.z0, g.double(), double.wanted)
    assert error([t.double() for t in got], want) < 0.08  # as above, with weights of eight bits


@EVERY
def test_a_state_of_several_dtypes(method):
    f = Net(n=6)
    g = cotangent(f.x)
    a, b = slice(0, 2), slice(2, 6)

    def nested(state):
        out = f(torch.cat([state["half"].double(), state["own"]], 1))
        return {"half": out[:, a].to(torch.float32), "own": out[:, b]}

    if isinstance(method, IFT):
        method = method.replace(solver=GMRES(tol=1e-6))
    z, _ = DEQ(TIGHT.replace(tol=1e-6), method)(nested, {"half": f.z0[:, a].float(), "own": f.z0[:, b]})
    assert (z["half"].dtype, z["own"].dtype) == (torch.float32, F64)
    loss = (z["half"].double() * g[:, a]).sum() + (z["own"] * g[:, b]).sum()
    got = torch.autograd.grad(loss, f.wanted)
    assert error(got, exact(method, f, f.z0, g, f.wanted)) < 1e-5  # that of float32, times the condition


# Loss scaling -------------------------------------------------------------------------------------------


@EVERY
def test_the_grad_scaler_steps_as_without_it_and_leaves_out_an_infinite_gradient(method):
    f, plain = Net(), Net()
    g = cotangent(f.x)
    optimisers = [torch.optim.SGD(m.parameters(), 0.1) for m in (f, plain)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    deq = DEQ(TIGHT, method)
    loss = (deq(f, f.z0)[0] * g).sum()
    scaler.scale(loss).backward()
    scaler.unscale_(optimisers[0])
    want = exact(method, plain, plain.z0, g, plain.wanted)
    assert error(grads(f), want) < CLOSE
    scaler.step(optimisers[0])
    scaler.update()
    for p, t in zip(plain.parameters(), want, strict=True):
        p.grad = t
    optimisers[1].step()
    assert error([p.detach() for p in f.wanted], [p.detach() for p in plain.wanted]) < CLOSE
    before = [p.detach().clone() for p in f.parameters()]
    optimisers[0].zero_grad()
    with pytest.warns(ConvergenceWarning) if isinstance(method, IFT) else contextlib.nullcontext():
        scaler.scale((deq(f, f.z0)[0] * g).sum() * float("inf")).backward()
    scaler.step(optimisers[0])
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(before, f.parameters(), strict=True))
    assert scaler.get_scale() == 2.0**15


# Checkpoints --------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_the_solve(method, reentrant):
    f = Net()
    g = cotangent(f.x)
    deq = DEQ(TIGHT, method)
    # The input goes through the checkpoint, as one that is reentrant requires.
    run = lambda x: deq(lambda z: torch.tanh(f.layer(z) + x), f.z0)[0]  # noqa: E731
    z = checkpoint(run, f.x, use_reentrant=reentrant)
    z.backward(g)
    assert error([f.x.grad, *[p.grad for p in f.layer.parameters()]],
                 exact(method, f, f.z0, g, [f.x, *f.layer.parameters()])) < CLOSE  # fmt: skip


@EVERY
def test_a_checkpoint_inside_f(method):
    f = Net()
    g = cotangent(f.x)
    z, _ = DEQ(TIGHT, method)(lambda z: checkpoint(f, z, use_reentrant=False), f.z0)
    z.backward(g)
    assert error(grads(f), exact(method, f, f.z0, g, f.wanted)) < CLOSE


@IMPLICIT
def test_a_reentrant_checkpoint_inside_f_cannot_be_differentiated_and_torch_says_what_to_do(method):
    f = Net()
    inside = lambda z: checkpoint(f.layer, z, use_reentrant=True)  # noqa: E731
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        z, _ = DEQ(TIGHT, method)(lambda z: torch.tanh(inside(z) + f.x), f.z0)
    with pytest.raises(RuntimeError, match="set use_reentrant=False"):
        z.sum().backward()


@IMPLICIT
def test_a_checkpoint_inside_f_repeats_its_random_numbers(method):
    """Noise that f draws anew at each evaluation: the gradient is that of the tracked one."""
    f = Net()
    g = cotangent(f.x)
    torch.manual_seed(0)
    factors = []

    def noisy(z):
        factor = 1 + 1e-3 * torch.rand((), dtype=F64)
        if torch.is_grad_enabled():
            factors.append(factor)
        return factor * f(z)

    with pytest.warns(ConvergenceWarning):
        z, solution = DEQ(TIGHT, method)(lambda z: checkpoint(noisy, z, use_reentrant=False), f.z0)
    got = torch.autograd.grad(z, f.wanted, g)
    assert len(factors) > 1
    assert set(map(float, factors)) == {float(factors[0])}
    one = lambda z: factors[0] * f(z)  # noqa: E731
    at = solution.z
    assert error(got, torch.autograd.grad(one(at), f.wanted, exact_adjoint(one, at, g))) < CLOSE


# Modes --------------------------------------------------------------------------------------------------


@EVERY
def test_without_grad_mode_nothing_is_kept_and_a_state_from_there_serves_as_a_start(method):
    f = Net()
    g = cotangent(f.x)
    deq = DEQ(TIGHT, method)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            start, solution = deq(f, f.z0)
        assert not start.requires_grad
        assert torch.allclose(start, solve_exactly(f, f.z0), atol=1e-12)
        z, solution = deq(f, start)
        assert solution.nfe == 1
        assert error(torch.autograd.grad(z, f.wanted, g), exact(method, f, f.z0, g, f.wanted)) < CLOSE


@EVERY
def test_an_input_from_inference_mode_is_right_or_torchs_own_error(method):
    f = Net()
    g = cotangent(f.x)
    with torch.inference_mode():
        x = f.x.detach().clone()
    wanted = list(f.layer.parameters())
    deq = DEQ(TIGHT, method)
    z, _ = deq(lambda z: torch.tanh(f.layer(z) + x), f.z0)  # a sum keeps nothing of x
    assert error(torch.autograd.grad(z, wanted, g), exact(method, f, f.z0, g, wanted)) < CLOSE
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        deq(lambda z: torch.tanh(f.layer(z) * x), f.z0)


@EVERY
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_backward_pass_without_grad_mode(method, context):
    f = Net()
    g = cotangent(f.x)
    z, _ = DEQ(TIGHT, method)(f, f.z0)
    with context():
        z.backward(g)
    assert error([t.clone() for t in grads(f)], exact(method, f, f.z0, g, f.wanted)) < CLOSE


@EVERY
def test_a_part_of_f_without_grad_is_a_constant_of_its_jacobian(method):
    """As everywhere in torch: what is detached inside f does not take part in derivatives."""
    f = Net(gain=0.4)
    g = cotangent(f.x)

    def partly(z):
        with torch.set_grad_enabled(False):
            h = f.layer(z)
        return torch.tanh(h + 0.5 * f.layer(z) + f.x)

    z, _ = DEQ(TIGHT, method)(partly, f.z0)
    at = z.detach()
    constant = f.layer(at).detach()  # the Jacobian and the gradient are those of this map
    rest = lambda z: torch.tanh(constant + 0.5 * f.layer(z) + f.x)  # noqa: E731
    assert error(torch.autograd.grad(z, f.wanted, g), exact(method, rest, at, g, f.wanted)) < CLOSE


@IMPLICIT
def test_an_f_wholly_without_grad_has_no_derivative_and_torch_says_so(method):
    f = Net()
    z, _ = DEQ(TIGHT, method)(torch.no_grad()(f), f.z0)
    assert not z.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        z.sum().backward()


# What wants a gradient ----------------------------------------------------------------------------------


@EVERY
def test_frozen_parameters_get_no_gradient_and_inputs_alone_do(method):
    f = Net()
    g = cotangent(f.x)
    want = dict(zip(f.wanted, exact(method, f, f.z0, g, f.wanted), strict=True))
    f.layer.requires_grad_(False)
    z, _ = DEQ(TIGHT, method)(f, f.z0)
    z.backward(g)
    assert f.layer.weight.grad is None
    assert f.layer.bias.grad is None
    assert error([f.x.grad], [want[f.x]]) < CLOSE
    f.layer.weight.requires_grad_(True)
    f.x.requires_grad_(False)
    f.x.grad = None
    z, _ = DEQ(TIGHT, method)(f, f.z0)
    z.backward(g)
    assert f.x.grad is None
    assert f.layer.bias.grad is None
    assert error([f.layer.weight.grad], [want[f.layer.weight]]) < CLOSE
    f.layer.requires_grad_(False)
    z, _ = DEQ(TIGHT, method)(f, f.z0)
    if z.requires_grad:  # the hook form tracks its private z; nothing of the caller's is reached
        z.sum().backward()
    assert all(p.grad is None for p in (f.x, f.layer.bias))


@IMPLICIT
def test_complex_parameters_and_a_real_loss_against_a_closed_form(method):
    """z = a z + b, so z* = b / (1 − a). For L = Re(w̄ z*) torch's gradient of b is w conj(1 / (1 − a)), for example."""
    generator = torch.Generator().manual_seed(0)
    c128 = torch.complex128
    a = (0.3 * torch.randn(5, dtype=c128, generator=generator)).requires_grad_()
    b = torch.randn(3, 5, dtype=c128, generator=generator).requires_grad_()
    w = torch.randn(3, 5, dtype=c128, generator=generator)
    z, _ = DEQ(TIGHT, method)(lambda z: a * z + b, torch.zeros_like(b))
    assert torch.allclose(z, b / (1 - a), atol=1e-11)
    (w.conj() * z).real.sum().backward()
    with torch.no_grad():
        want = [(w * (b / (1 - a) ** 2).conj()).sum(0), w * (1 / (1 - a)).conj()]
    assert error([a.grad, b.grad], want) < CLOSE


# Hooks and graphs ---------------------------------------------------------------------------------------


@EVERY
def test_hooks_on_parameters_fire_once_with_the_whole_gradient(method):
    f = Net()
    g = cotangent(f.x)
    want = exact(method, f, f.z0, g, [f.layer.weight])
    seen, accumulated = [], []
    f.layer.weight.register_hook(lambda t: seen.append(t.clone()))
    f.layer.weight.register_post_accumulate_grad_hook(lambda p: accumulated.append(p.grad.clone()))
    z, _ = DEQ(TIGHT, method)(f, f.z0)
    z.backward(g)
    assert len(seen) == len(accumulated) == 1
    assert error(accumulated, want) < CLOSE
    assert error(seen, want) < CLOSE


@IMPLICIT
@pytest.mark.filterwarnings(
    "ignore:Full backward hook is firing:UserWarning"
)  # the tracked call is at a z without
def test_a_backward_hook_on_a_module_inside_f_sees_each_product_and_last_the_gradient(method):
    """So it does not fire once: a solve goes back through f as often as it makes products with Jᵀ."""
    f = Net()
    g = cotangent(f.x)
    want = exact_gradient(f, f.z0, g, f.wanted)
    at = solve_exactly(f, f.z0)
    last = exact_adjoint(f, at, g) * (1 - f(at).detach() ** 2)
    seen, reports = [], []
    f.layer.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0].clone()))
    z, _ = DEQ(TIGHT, method, on_backward=reports.append)(f, f.z0)
    z.backward(g)
    assert len(seen) == reports[0].nfe + 1
    assert error([seen[-1]], [last]) < CLOSE
    assert error(grads(f), want) < CLOSE


@EVERY
def test_hooks_on_the_output_see_and_change_the_incoming_cotangent(method):
    f = Net()
    g = cotangent(f.x)
    z, _ = DEQ(TIGHT, method)(f, f.z0)
    z.retain_grad()
    seen = []
    z.register_hook(lambda t: seen.append(t.clone()))
    z.register_hook(lambda t: 3 * t)
    z.backward(g)
    assert torch.equal(seen[0], g), "not the solution of the adjoint system"
    assert torch.equal(z.grad, 3 * g)
    assert error(grads(f), [3 * t for t in exact(method, f, f.z0, g, f.wanted)]) < CLOSE


@IMPLICIT
def test_a_jacobian_row_by_row(method):
    """(I − J)⁻¹ ∂f/∂x. Rows at once, by is_grads_batched, cannot be solved for: that is torch's error."""
    f = Net(n=3, batch=2)
    x = f.x.detach()
    deq = DEQ(TIGHT, method)
    run = lambda x: deq(lambda z: torch.tanh(f.layer(z) + x), f.z0)[0]  # noqa: E731
    got = torch.autograd.functional.jacobian(run, x).reshape(6, 6)
    z = solve_exactly(f, f.z0)
    j = torch.autograd.functional.jacobian(f, z).reshape(6, 6)
    slope = torch.diag(1 - f(z).detach().reshape(-1) ** 2)
    assert error([got], [torch.linalg.solve(torch.eye(6, dtype=F64) - j, slope)]) < CLOSE
    out = run(f.x)
    with pytest.raises(RuntimeError, match="[Bb]atch"):
        torch.autograd.grad(out, f.x, torch.stack([out.detach()] * 2), is_grads_batched=True)


@EVERY
@pytest.mark.parametrize("kind", ["save_on_cpu", "custom"])
def test_saved_tensor_hooks_around_the_forward_pass(method, kind):
    f = Net()
    g = cotangent(f.x)
    packed, unpacked = [], []
    context = (
        torch.autograd.graph.save_on_cpu()
        if kind == "save_on_cpu"
        else torch.autograd.graph.saved_tensors_hooks(
            lambda t: packed.append(1) or t.detach().numpy().copy(),
            lambda a: unpacked.append(1) or torch.from_numpy(a),
        )
    )
    with context:
        z, _ = DEQ(TIGHT, method)(f, f.z0)
    z.backward(g)
    assert error(grads(f), exact(method, f, f.z0, g, f.wanted)) < CLOSE
    assert kind == "save_on_cpu" or (packed and unpacked)


@EVERY
def test_anomaly_mode_changes_no_number_and_names_a_nan(method):
    f = Net()
    g = cotangent(f.x)
    with pytest.warns(UserWarning, match="Anomaly Detection"):
        anomaly = torch.autograd.detect_anomaly()
    with anomaly:
        z, _ = DEQ(TIGHT, method)(f, f.z0)
        z.backward(g)
    assert error(grads(f), exact(method, f, f.z0, g, f.wanted)) < CLOSE
    with anomaly:
        z, _ = DEQ(TIGHT, method)(f, f.z0)
        nan = torch.where(z > -torch.inf, z.sign() * torch.sqrt(z * 0), 0.0)  # 0 · ∞ in its derivative
        with pytest.raises(RuntimeError, match="returned nan values"):
            nan.sum().backward()


def saved_in_numpy(run, x):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().numpy().copy(), torch.from_numpy):
        return run(x)


def saved_on_cpu(run, x):
    with torch.autograd.graph.save_on_cpu():
        return run(x)


def watched(run, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        anomaly = torch.autograd.detect_anomaly()
    with anomaly:
        return run(x)


AROUND = {
    "checkpoint": functools.partial(checkpoint, use_reentrant=False),
    "reentrant checkpoint": functools.partial(checkpoint, use_reentrant=True),
    "save_on_cpu": saved_on_cpu,
    "saved_tensors_hooks": saved_in_numpy,
    "anomaly": watched,
}


@pytest.mark.parametrize("name", GRADS)
def test_every_registered_gradient_method_gives_the_same_gradient_in_each_context(name):
    """The same as without it, so that what is registered tomorrow is tested too."""
    solver = {"shine": Broyden(tol=1e-8)}.get(name, FixedPointIteration(tol=1e-4, max_iter=40))
    deq = DEQ(solver, as_grad(name))
    f = Net(gain=0.4)
    g = cotangent(f.x)
    run = lambda x: deq(lambda z: torch.tanh(f.layer(z) + x), f.z0)[0]  # noqa: E731
    run(f.x).backward(g)
    want = grads(f)
    for context, around in AROUND.items():
        f.zero_grad()
        around(run, f.x).backward(g)
        assert error(grads(f), want) < 1e-14, context
    f.zero_grad()
    z = run(f.x)
    with torch.no_grad():
        z.backward(g)
    assert error(grads(f), want) < 1e-14


@EVERY
def test_two_micro_batches_add_up(method):
    f = Net(batch=4)
    g = cotangent(f.x)
    deq = DEQ(TIGHT, method)
    wanted = list(f.layer.parameters())
    for rows in (slice(0, 1), slice(1, 4)):
        part = lambda z, rows=rows: torch.tanh(f.layer(z) + f.x[rows])  # noqa: E731
        deq(part, f.z0[rows])[0].backward(g[rows])
    assert error([p.grad for p in wanted], exact(method, f, f.z0, g, wanted)) < CLOSE


@EVERY
def test_backward_twice_over_a_retained_graph(method):
    f = Net()
    g = cotangent(f.x)
    z, _ = DEQ(TIGHT, method)(f, f.z0)
    z.backward(g, retain_graph=True)
    z.backward(g)
    assert error(grads(f), [2 * t for t in exact(method, f, f.z0, g, f.wanted)]) < CLOSE
    with pytest.raises(RuntimeError, match="second time"):
        z.backward(g)


@EVERY
def test_copies_and_pickles_compute_the_same(method):
    model = nn.ModuleDict({"net": Net(), "deq": DEQ(TIGHT, method)})
    g = cotangent(model["net"].x)
    z, _ = model["deq"](model["net"], model["net"].z0)
    z.backward(g)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.zero_grad()
        again, _ = other["deq"](other["net"], other["net"].z0)
        again.backward(g)
        assert torch.equal(again, z)
        assert all(torch.equal(a, b) for a, b in zip(grads(other), grads(model), strict=True))


# Parametrised modules -----------------------------------------------------------------------------------


class Symmetric(nn.Module):
    def forward(self, w):
        return (w + w.T) / 2


@EVERY
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("kind", ["parametrize", "weight_norm"])
def test_parametrised_weights_inside_f(method, kind, cached):
    f = Net(gain=0.4)
    weight = f.layer.weight.detach().clone()
    if kind == "parametrize":
        nn.utils.parametrize.register_parametrization(f.layer, "weight", Symmetric())
        own = [f.layer.parametrizations.weight.original]
        by_hand = lambda w: (w + w.T) / 2  # noqa: E731
    else:
        nn.utils.parametrizations.weight_norm(f.layer)
        own = [f.layer.parametrizations.weight.original0, f.layer.parametrizations.weight.original1]
        by_hand = lambda size, v: size * v / v.norm(dim=1, keepdim=True)  # noqa: E731
        assert torch.allclose(f.layer.weight, weight)
    g = cotangent(f.x)
    want = exact(method, lambda z: torch.tanh(z @ by_hand(*own).T + f.layer.bias + f.x), f.z0, g, own)
    if cached:
        with nn.utils.parametrize.cached():
            z, _ = DEQ(TIGHT, method)(f, f.z0)
            got = torch.autograd.grad(z, own, g)
    else:
        z, _ = DEQ(TIGHT, method)(f, f.z0)
        got = torch.autograd.grad(z, own, g)
    assert error(got, want) < CLOSE


@EVERY
def test_a_functional_call_with_parameters_from_elsewhere(method):
    """A hyper-network: the weights of f are themselves computed."""
    f = Net(gain=0.4)
    s = torch.tensor(0.7, dtype=F64, requires_grad=True)
    g = cotangent(f.x)
    theta = lambda: {"layer.weight": s * f.layer.weight, "layer.bias": f.layer.bias, "x": f.x}  # noqa: E731
    given = theta()
    z, _ = DEQ(TIGHT, method)(lambda z: torch.func.functional_call(f, given, (z,)), f.z0)
    got = torch.autograd.grad(z, [s, f.layer.weight], g)
    by_hand = lambda z: torch.tanh(s * z @ f.layer.weight.T + f.layer.bias + f.x)  # noqa: E731
    assert error(got, exact(method, by_hand, f.z0, g, [s, f.layer.weight])) < CLOSE


@IMPLICIT
def test_distributed_data_parallel_in_one_process(method, tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.deq = Net(), DEQ(TIGHT, method)

        def forward(self, z0):
            return self.deq(self.net, z0)[0]

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(Model())
        net = model.module.net
        g = cotangent(net.x)
        want = exact(method, net, net.z0, g, net.wanted)
        for _ in range(2):  # the second step uses the buckets as rebuilt after the first
            model.zero_grad()
            model(net.z0).backward(g)
            assert error(grads(net), want) < CLOSE
    finally:
        torch.distributed.destroy_process_group()


# Memory -------------------------------------------------------------------------------------------------


@IMPLICIT
def test_no_tensor_is_left_after_a_hundred_steps_without_the_garbage_collector(method):
    """Also with hidden state: what holds it is freed with the graph."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6, dtype=F64), nn.Dropout(0.2), nn.BatchNorm1d(6, dtype=F64))
    x = torch.randn(4, 6, dtype=F64, generator=torch.Generator().manual_seed(0))
    deq = DEQ(Anderson(tol=1e-6), method, batch_dims=0, hold_noise=True)

    def step():
        net.zero_grad()
        z, _ = deq(lambda z: torch.tanh(0.1 * net(z) + x), torch.zeros_like(x))
        z.square().sum().backward()
        return weakref.ref(z)

    def tensors():
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    step()
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        refs = [step() for _ in range(100)]
        assert all(ref() is None for ref in refs)
        assert tensors() == before
    finally:
        gc.enable()
