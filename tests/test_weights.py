"""Parametrized weights in a solve: evaluated once, with the right derivatives, and never out of date."""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from tests.problems import F64, cotangent, error, exact_gradient
from torchdeq import (
    DEQ,
    GMRES,
    IFT,
    JFB,
    SHINE,
    Broyden,
    FixedPointIteration,
    NeumannPhantom,
    PhantomGrad,
    Reversible,
    Unroll,
    apply_norm,
    get_deq,
)
from torchdeq._held import hold, release, sharing
from torchdeq._weights import is_held

TIGHT = FixedPointIteration(tol=1e-13, max_iter=300)
EXACT = GMRES(tol=1e-12, max_iter=100)


class Twice(nn.Module):
    """W = 2 w, which counts how often it is evaluated, with and without a graph."""

    def __init__(self, counts):
        super().__init__()
        self.counts = [counts]  # out of sight of what compares attributes

    def forward(self, w):
        self.counts[0].append(torch.is_grad_enabled())
        return 2 * w


class Net(nn.Module):
    """f(z) = tanh(0.4 W z + b + x), with a weight that is parametrized in one of several ways."""

    def __init__(self, kind, n=5, batch=3, count=True):
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(n, n, dtype=F64)
        self.counts = []
        if kind == "torch":
            parametrize.register_parametrization(self.layer, "weight", Twice(self.counts))
        elif kind == "torch spectral":
            nn.utils.parametrizations.spectral_norm(self.layer)
        else:
            apply_norm(self.layer, kind)
        if kind != "torch" and count:
            self.lists[0].register_forward_hook(lambda *_: self.counts.append(torch.is_grad_enabled()))
        self.x = nn.Parameter(torch.randn(batch, n, dtype=F64))

    def forward(self, z):
        return torch.tanh(0.4 * self.layer(z) + self.x)

    @property
    def z0(self):
        return torch.zeros_like(self.x, requires_grad=False)

    @property
    def lists(self):
        return self.layer.parametrizations.weight


KINDS = ["weight_norm", "spectral_norm", "torch", "torch spectral"]
METHODS = {
    "ift": (IFT(solver=EXACT), 1, 1),
    "ift order 2": (IFT(solver=EXACT, order=2), 1, 1),
    "hook": (IFT(solver=EXACT, hook=True), 1, 0),
    "phantom": (PhantomGrad(steps=60), 1, 0),
    "jfb": (JFB(), 1, 0),
    "neumann": (NeumannPhantom(terms=60), 1, 0),
    "shine": (SHINE(refine=EXACT), 1, 0),
    "unroll": (Unroll(), 1, 0),
}


def solved(net, method, solver=TIGHT):
    solver = Broyden(tol=1e-12, max_iter=100) if isinstance(method, SHINE) else solver
    return DEQ(solver, method)(net, net.z0)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_a_weight_is_evaluated_once_without_a_graph_and_once_with_it(name, kind):
    method, tracked, rebuilt = METHODS[name]
    net = Net(kind)
    net.counts.clear()
    z = solved(net, method)
    without = 0 if name == "unroll" else 1
    assert net.counts == [False] * without + [True] * tracked
    z.sum().backward()
    assert net.counts == [False] * without + [True] * (tracked + rebuilt)
    net.counts.clear()
    with torch.no_grad():
        solved(net, method)
    assert net.counts == [False]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*METHODS, "checkpoint", "reversible"])
def test_gradients_through_a_shared_weight_are_right(name, kind, training):
    extra = {"checkpoint": Unroll(checkpoint=True), "reversible": Reversible()}
    method = extra[name] if name in extra else METHODS[name][0]
    net = Net(kind).train(training)
    before = copy.deepcopy(net)
    solver = FixedPointIteration(tol=1e-3, max_iter=41) if name == "reversible" else TIGHT
    z = solved(net, method, solver)
    g = cotangent(z)
    got = torch.autograd.grad(z, list(net.parameters()), g)
    # The reference takes the vectors as they are after the one update of a call, and as constants.
    assert moved(before, net) == (training and "spectral" in kind)
    net.eval()
    exact = exact_gradient(net, net.z0, g, list(net.parameters()))
    if name == "jfb":
        fixed = z.detach()
        exact = torch.autograd.grad(net(fixed), list(net.parameters()), g)
    if name == "reversible":  # the derivative of its own steps, here with a weight that is written out
        w = net.layer.weight
        plain = DEQ(solver, method)(lambda z: torch.tanh(0.4 * (z @ w.T + net.layer.bias) + net.x), net.z0)[0]
        exact = torch.autograd.grad(plain, list(net.parameters()), g)
    assert error(got, exact) < 1e-8


def moved(before, after):
    buffers = dict(after.named_buffers())
    return any(not torch.equal(t, buffers[name]) for name, t in before.named_buffers())


@pytest.mark.parametrize("kind", ["spectral_norm", "torch spectral"])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("cached", [True, False])
def test_one_power_iteration_stays_of_a_solve_also_within_parametrize_cached(kind, grad, cached):
    net = Net(kind)
    before = copy.deepcopy(net)
    with torch.set_grad_enabled(grad):
        if cached:
            with parametrize.cached():
                DEQ(TIGHT)(net, net.z0)
        else:
            DEQ(TIGHT)(net, net.z0)
    with torch.no_grad():
        before.lists[0](before.lists.original)
    for (name, got), want in zip(net.named_buffers(), before.buffers(), strict=True):
        assert torch.allclose(got, want, atol=1e-14), name
    assert not moved(net, net)


def test_a_weight_read_within_parametrize_cached_before_the_solve_is_that_of_the_solve():
    net = Net("spectral_norm")
    before = copy.deepcopy(net)
    with parametrize.cached():
        weight = net.layer.weight
        z, solution = DEQ(TIGHT)(net, net.z0)
        f = torch.tanh(0.4 * (solution.z @ weight.T + net.layer.bias) + net.x)
    assert torch.equal(z, f)
    assert float((f - solution.z).detach().abs().max()) < 1e-12, "no other weight was solved for"
    with torch.no_grad():
        before.layer.weight  # noqa: B018 - one update
    assert torch.equal(net.layer.weight_u, before.layer.weight_u)


def test_sampled_states_are_differentiated_apart():
    net = Net("weight_norm")
    deq = DEQ(TIGHT, [PhantomGrad(steps=3), PhantomGrad(steps=2), IFT()], record=(2, 4))
    net.counts.clear()
    z, solution = deq(net, net.z0)
    assert net.counts == [False, True, True, True]
    for state in (*solution.states, z):
        state.sum().backward()
    two = get_deq(core="sliced", n_states=2, f_solver="fixed_point_iter", grad=2)
    states, _ = two(net, net.z0)
    for state in states:
        state.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_kept_from_one_solve_to_the_next_or_outside(kind):
    net = Net(kind).eval()
    deq = DEQ(TIGHT)
    for change in (
        lambda p: p.data.mul_(1.01),  # counts no version
        lambda p: torch.optim.SGD([p], 0.1).step(),
    ):
        z, _ = deq(net, net.z0)
        z.sum().backward()
        for p in net.parameters():
            change(p)
        again, _ = deq(net, net.z0)
        fresh = copy.deepcopy(net)
        assert torch.equal(again, deq(fresh, net.z0)[0])
        assert not torch.equal(again, z)
    net.counts.clear()
    net.layer.weight, net.layer.weight  # noqa: B018
    assert len(net.counts) == 2


def test_parameters_that_have_been_changed_a_thousand_times_are_parameters_too():
    net = Net("weight_norm")
    with torch.no_grad():
        for p in net.parameters():
            for _ in range(1000):
                p.mul_(1.0)
        DEQ(TIGHT)(net, net.z0)
    assert net.counts == [False]


def test_two_uses_in_one_evaluation_are_one_weight_also_in_the_backward_pass():
    net = Net("spectral_norm")
    net.layer.weight_u.copy_(nn.functional.normalize(torch.randn(5, dtype=F64), dim=0))  # far from converged
    f = lambda z: net(0.5 * net(z))  # noqa: E731
    g = cotangent(net.x)
    z, _ = DEQ(TIGHT, IFT(solver=EXACT))(f, net.z0)
    got = torch.autograd.grad(z, list(net.parameters()), g)
    net.eval()
    assert error(got, exact_gradient(f, net.z0, g, list(net.parameters()))) < 1e-9


@pytest.mark.parametrize("hook", [True, False])
def test_a_solve_inside_a_solve_has_the_weights_of_the_outer_one(hook):
    net = Net("spectral_norm")
    net.layer.weight_u.copy_(nn.functional.normalize(torch.randn(5, dtype=F64), dim=0))
    method = IFT(solver=EXACT, hook=hook)

    def nested(z):
        first = net(z)  # evaluates the weight before the inner solve begins
        y, _ = DEQ(TIGHT, method)(lambda y: 0.5 * net(y) + 0.2 * first, net.z0)
        return y

    before = copy.deepcopy(net)
    net.counts.clear()
    z, _ = DEQ(TIGHT, method)(nested, net.z0)
    assert net.counts == [False, True]
    g = cotangent(net.x)
    got = torch.autograd.grad(z, list(net.parameters()), g)
    before.layer.weight  # noqa: B018 - one update
    assert torch.equal(net.layer.weight_u, before.layer.weight_u)
    net.eval()
    # y = net(y)/2 + net(z)/5 and z = y, as one map of the pair.
    exact = exact_gradient(lambda z: 0.5 * net(z) + 0.2 * net(z), net.z0, g, list(net.parameters()))
    assert error(got, exact) < 1e-9


def test_a_solve_leaves_no_trace_on_torchs_lists():
    net = Net("torch spectral", count=False)
    shown = repr(net)
    solved(net, IFT())
    assert repr(net) == shown
    assert b"torchdeq" not in pickle.dumps(net.lists)
    for twin in (copy.deepcopy(net.lists), pickle.loads(pickle.dumps(net.lists))):
        assert type(twin) is parametrize.ParametrizationList
        assert torch.equal(twin.eval()(), net.lists.eval()())


def test_copies_of_one_layer_have_weights_of_their_own():
    """torch's own cache takes a layer and its copy for one."""
    net = Net("torch")
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.layer.parametrizations.weight.original.mul_(-0.5)
    f = lambda z: net(z) + twin(z)  # noqa: E731
    z, solution = DEQ(TIGHT)(f, net.z0)
    assert float((f(z) - z).detach().abs().max()) < 1e-12


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # in the solve they have not
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("where", ["inside", "around"])
@pytest.mark.parametrize("method", [IFT(solver=EXACT), PhantomGrad(steps=60), Unroll()], ids=repr)
def test_checkpoints_evaluate_the_same_weights_again(method, where, training, reentrant):
    net = Net("spectral_norm").train(training)
    net.layer.weight_u.copy_(nn.functional.normalize(torch.randn(5, dtype=F64), dim=0))
    before = copy.deepcopy(net)
    x = net.x
    if where == "inside":
        f = lambda z: checkpoint(net, z + 0 * x, use_reentrant=reentrant)  # noqa: E731
        z, _ = DEQ(TIGHT, method)(f, net.z0)
    else:
        z = checkpoint(lambda x: DEQ(TIGHT, method)(net, net.z0)[0] + 0 * x, x, use_reentrant=reentrant)
    g = cotangent(x)
    if where == "inside" and reentrant and isinstance(method, IFT):
        with pytest.raises(RuntimeError, match="reentrant"):  # IFT asks autograd.grad for products with Jᵀ
            (z * g).sum().backward()
        return
    (z * g).sum().backward()
    got = [p.grad for p in net.parameters()]
    if training:
        before.layer.weight  # noqa: B018 - one update
    assert torch.equal(net.layer.weight_u, before.layer.weight_u)
    net.eval()
    assert error(got, exact_gradient(net, net.z0, g, list(net.parameters()))) < 1e-8


def test_functional_call_within_f_is_not_served_another_weight():
    net = Net("weight_norm")
    other = {name: (p * 0.9).detach().requires_grad_() for name, p in net.named_parameters()}

    def f(z):
        a = torch.func.functional_call(net, other, (z,))
        return 0.5 * (a + net(z))

    net.counts.clear()
    z, _ = DEQ(TIGHT, IFT(solver=EXACT))(f, net.z0)
    wanted = [*other.values(), *net.parameters()]
    g = cotangent(net.x)
    assert error(torch.autograd.grad(z, wanted, g), exact_gradient(f, net.z0, g, wanted)) < 1e-9


@pytest.mark.parametrize("first", ["transform", "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_transform_within_f_sees_the_weight_of_the_solve(kind, first):
    net = Net(kind).eval()

    def f(z):
        before = net(z) if first == "plain" else 0
        step = 0.05 * torch.func.grad(lambda z: net.layer(z).cosh().log().sum())(z)
        return step + (before if first == "plain" else net(z))

    z, solution = DEQ(TIGHT, IFT(solver=EXACT))(f, net.z0)
    g = cotangent(net.x)
    wanted = list(net.parameters())
    assert error(torch.autograd.grad(z, wanted, g), exact_gradient(f, net.z0, g, wanted)) < 1e-9


def test_a_power_iteration_under_a_transform_within_f_is_one_too():
    """torch's parametrization makes it there, ours does not."""
    net = Net("torch spectral", count=False)
    before = copy.deepcopy(net)
    x = net.x.detach()
    with torch.no_grad():
        DEQ(TIGHT)(lambda z: 0.1 * torch.func.grad(lambda z: net.layer(z).cosh().log().sum())(z) + x, net.z0)
        before.layer.weight  # noqa: B018 - one update
    assert torch.allclose(net.lists[0]._u, before.lists[0]._u, atol=1e-14)


def test_an_f_that_differentiates_within_has_graphs_of_its_own_in_the_solve():
    """Sharing a graph between evaluations of the solver would let the first free it for the second."""
    net = Net("weight_norm")

    def f(z):
        with torch.enable_grad():
            loss = net.layer(z.detach()).square().sum()
            step = torch.autograd.grad(loss, net.layer.weight_g)[0]
        return net(z) + 0.01 * step.T

    with torch.no_grad():
        _, solution = DEQ(FixedPointIteration(tol=1e-10))(f, net.z0)
    assert solution.converged.all()


class Noisy(nn.Module):
    """DropConnect: another mask at each evaluation."""

    def forward(self, w):
        return nn.functional.dropout(w, 0.3)


def test_a_weight_that_draws_random_numbers_is_not_shared_but_held_with_the_noise():
    net = Net("torch")
    parametrize.register_parametrization(net.layer, "weight", Noisy())
    with torch.no_grad():
        _, solution = DEQ(FixedPointIteration(max_iter=30), hold_noise=True)(net, net.z0)
        assert solution.converged.all()
        with pytest.warns(UserWarning, match="draws random numbers"):
            DEQ(FixedPointIteration(max_iter=30))(net, net.z0)
    z, _ = DEQ(TIGHT, IFT(solver=EXACT), hold_noise=True)(net, net.z0)
    z.sum().backward()


class Conditioned(nn.Module):
    """A weight that depends on something f hands to it."""

    def __init__(self, buffer):
        super().__init__()
        self.register_buffer("context", torch.ones((), dtype=F64)) if buffer else setattr(
            self, "context", torch.ones((), dtype=F64)
        )

    def forward(self, w):
        return w * self.context.clone()  # it will be written to


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("how", ["attribute", "buffer", "buffer in place"])
def test_a_weight_that_f_gives_another_context_is_evaluated_again(how, training):
    layer = nn.Linear(5, 5, dtype=F64)
    parametrize.register_parametrization(layer, "weight", Conditioned(how != "attribute"))
    own = layer.train(training).parametrizations.weight[0]
    x = torch.randn(3, 5, dtype=F64)

    def f(z):
        context = torch.tanh(z).mean().detach()
        if how == "buffer in place":
            own.context.copy_(context)
        else:
            own.context = context
        return torch.tanh(0.4 * layer(z) + x)

    with torch.no_grad():
        z, _ = DEQ(TIGHT, batch_dims=0)(f, torch.zeros_like(x))
        assert float((f(z) - z).abs().max()) < 1e-12


def test_an_evaluation_out_of_sight_and_one_in_sight_leave_one_update():
    """As where the solver evaluates compiled code and a gradient method does not."""
    net = Net("spectral_norm")
    before = copy.deepcopy(net)

    def f(z):
        weight = net.layer.weight if torch.is_grad_enabled() else net.lists.evaluate()
        return torch.tanh(0.4 * nn.functional.linear(z, weight, net.layer.bias) + net.x)

    DEQ(TIGHT)(f, net.z0)
    before.layer.weight  # noqa: B018 - one update
    assert torch.allclose(net.layer.weight_u, before.layer.weight_u, atol=1e-14)


@pytest.mark.filterwarnings("ignore::torchdeq.ConvergenceWarning")
def test_under_autocast_and_in_half_precision():
    net = Net("spectral_norm").float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, _ = DEQ(FixedPointIteration(max_iter=10))(net, net.z0)
        z.sum().backward()
    assert net.layer.weight_g.grad.dtype == torch.float32
    net = Net("spectral_norm").bfloat16()
    z, _ = DEQ(FixedPointIteration(max_iter=10))(net, net.z0)
    z.sum().backward()
    assert z.dtype == net.layer.weight_g.grad.dtype == torch.bfloat16


def test_forward_mode_tangents_reach_parameters_through_a_shared_weight():
    net = Net("weight_norm")
    names = [name for name, _ in net.named_parameters()]
    values = [p.detach() for p in net.parameters()]
    tangents = [cotangent(p, i) for i, p in enumerate(values)]
    import torch.autograd.forward_ad as fwad

    with torch.no_grad(), fwad.dual_level():
        duals = {n: fwad.make_dual(v, t) for n, v, t in zip(names, values, tangents, strict=True)}
        f = lambda z: torch.func.functional_call(net, duals, (z,))  # noqa: E731
        z, _ = DEQ(TIGHT, IFT(solver=EXACT))(f, net.z0)
        tangent = fwad.unpack_dual(z).tangent
    g = cotangent(net.x, 7)
    exact = exact_gradient(net, net.z0, g, list(net.parameters()))
    want = sum((t * e).sum() for t, e in zip(tangents, exact, strict=True))
    assert abs(float((tangent * g).sum() - want)) < 1e-9


def test_second_derivatives_through_a_shared_weight():
    net = Net("weight_norm", n=3, batch=1)
    names = [name for name, _ in net.named_parameters()]
    deq = DEQ(TIGHT, IFT(solver=EXACT, order=2))

    def solve(*values):
        own = dict(zip(names, values, strict=True))
        return deq(lambda z: torch.func.functional_call(net, own, (z,)), net.z0)[0]

    values = [p.detach().clone().requires_grad_() for p in net.parameters()]
    assert torch.autograd.gradcheck(solve, values, atol=1e-6)
    assert torch.autograd.gradgradcheck(solve, values, atol=1e-5)


def test_threads_that_share_a_module_do_not_share_a_solve():
    net = Net("weight_norm").eval()
    want, _ = DEQ(TIGHT)(net, net.z0)
    results = []

    def work():
        for _ in range(5):
            results.append(DEQ(TIGHT)(net, net.z0)[0])

    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(results) == 15
    assert all(torch.equal(z, want) for z in results)


def test_a_thread_beside_a_solve_is_not_in_it():
    net = Net("weight_norm").eval()
    inside, looked = threading.Event(), threading.Event()

    def f(z):
        inside.set()
        assert looked.wait(60)
        return net(z)

    thread = threading.Thread(target=lambda: DEQ(TIGHT)(f, net.z0))
    thread.start()
    assert inside.wait(60)
    try:
        assert not is_held(net.lists)
        assert net.layer.weight is not net.layer.weight
    finally:
        looked.set()
        thread.join()


def test_an_error_in_f_leaves_no_weight_behind():
    net = Net("weight_norm")
    held = hold(net)
    with contextlib.suppress(KeyError), sharing(held):
        held(net.z0)
        raise KeyError
    release(held)
    with torch.no_grad():
        net.layer.weight_g.mul_(2)
    assert torch.equal(held(net.z0), net(net.z0))


def test_a_compiled_layer_in_a_solve():
    net = Net("spectral_norm", count=False)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(net, backend=backend, fullgraph=True)
    before = copy.deepcopy(net)
    with torch.no_grad():
        for _ in range(2):
            z, solution = DEQ(TIGHT, modules=net)(lambda z: compiled(z), net.z0)
            assert solution.converged.all()
    assert len(graphs) == 1
    with torch.no_grad():
        before.layer.weight, before.layer.weight  # noqa: B018 - one update for each solve
    assert torch.allclose(net.layer.weight_u, before.layer.weight_u, atol=1e-14)
