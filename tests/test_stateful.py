"""An f with hidden state: within a solve it is one map, afterwards its state has moved on by one evaluation."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.problems import F64, cotangent, error, exact_gradient, random_matrix
from torchdeq import (
    DEQ,
    GMRES,
    GRADS,
    IFT,
    AffineMap,
    Anderson,
    Broyden,
    ConvergenceWarning,
    FixedPointIteration,
    PhantomGrad,
    Unroll,
    as_grad,
    get_deq,
)
from torchdeq._held import Held, hold, modules_of

TIGHT = FixedPointIteration(tol=1e-13, max_iter=300)
EXACT = GMRES(tol=1e-12, max_iter=100)
# Batch normalisation couples the samples, so the batch is one system here.
ONE = {"batch_dims": 0}
FORMS = pytest.mark.parametrize("hook", [False, True], ids=["function", "hook"])


class Block(nn.Module):
    """f(z) = tanh(norm(z) Wᵀ + x) with batch normalisation, scaled so that it contracts."""

    def __init__(self, n: int = 4, batch: int = 6, momentum: float | None = 0.1):
        super().__init__()
        self.w = nn.Parameter(random_matrix(n, 0.2))
        self.norm = nn.BatchNorm1d(n, momentum=momentum, dtype=F64)
        self.register_buffer("constant", torch.ones(n, dtype=F64))
        self.x = nn.Parameter(torch.randn(batch, n, dtype=F64, generator=torch.Generator().manual_seed(1)))
        self.seen: list[torch.Tensor] = []

    def forward(self, z):
        self.seen.append(self.norm.running_mean.clone())
        return torch.tanh(self.norm(z) @ self.w.T + self.x) * self.constant

    @property
    def z0(self):
        return torch.zeros_like(self.x, requires_grad=False)


def after_one_call(block, z):
    """The buffers after one plain call at z, of a copy."""
    other = copy.deepcopy(block)
    with torch.no_grad():
        other(z)
    return dict(other.named_buffers())


def same(got, want):
    return all(torch.equal(got[name], want[name]) for name in want)


def step(block, z):
    return block(z)


class Runner:
    def __init__(self, block):
        self.block = block

    def __call__(self, z):
        return self.block(z)

    def method(self, z):
        return self.block(z)


block_of_this_file = Block()

WAYS = {
    "module": lambda block: block,
    "bound method": lambda block: block.forward,
    "partial": lambda block: functools.partial(step, block),
    "partial of a method": lambda block: functools.partial(block.forward),
    "closure": lambda block: lambda z: block(z),
    "default": lambda block: lambda z, block=block: block(z),
    "keyword default": lambda block: lambda z, *, block=block: block(z),
    "closure over a closure": lambda block: (lambda inner: lambda z: inner(z))(lambda z: step(block, z)),
    "object": Runner,
    "method of an object": lambda block: Runner(block).method,
}


@pytest.mark.parametrize("way", WAYS)
def test_running_statistics_are_updated_once_per_solve_and_by_no_backward(way):
    block = Block()
    before = copy.deepcopy(block)
    z, solution = DEQ(TIGHT, **ONE)(WAYS[way](block), block.z0)
    assert solution.nfe > 5
    want = after_one_call(before, solution.z)
    assert int(want["norm.num_batches_tracked"]) == 1
    assert same(dict(block.named_buffers()), want)
    z.sum().backward()
    assert same(dict(block.named_buffers()), want)
    assert all(torch.equal(seen, block.seen[0]) for seen in block.seen), "each evaluation begins alike"


def test_modules_that_an_f_names_as_globals_are_found():
    assert modules_of(lambda z: block_of_this_file(z)) == [block_of_this_file]
    assert modules_of(torch.tanh) == []


@pytest.mark.parametrize("way", ["given", "given as one"])
def test_modules_that_cannot_be_seen_are_named(way):
    block = Block()
    before = copy.deepcopy(block)
    hidden = {"block": block}
    f = lambda z: hidden["block"](z)  # noqa: E731
    deq = DEQ(TIGHT, modules=[block] if way == "given" else block, **ONE)
    _, solution = deq(f, block.z0)
    assert same(dict(block.named_buffers()), after_one_call(before, solution.z))
    # And what is said is what is done: with modules=[] nothing is held.
    DEQ(TIGHT, modules=[], **ONE)(block, block.z0)
    assert int(block.norm.num_batches_tracked) > 5


@pytest.mark.parametrize(
    "method",
    [IFT(), IFT(hook=True), PhantomGrad(), PhantomGrad(steps=4, tau=0.7), Unroll()],
    ids=["ift", "hook", "jfb", "phantom", "unroll"],
)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_every_gradient_method_updates_once(method, momentum):
    block = Block(momentum=momentum)
    before = copy.deepcopy(block)
    z, _ = DEQ(TIGHT, method, **ONE)(block, block.z0)
    z.sum().backward()
    # The phantom steps go on from z*; they all stand within 1e-12 of it.
    want = after_one_call(before, z.detach())
    for name, buffer in block.named_buffers():
        assert torch.allclose(buffer, want[name], rtol=0, atol=1e-11), name


@pytest.mark.parametrize("name", GRADS)
def test_every_registered_gradient_method_leaves_one_update_and_one_mask(name):
    # Reversible iteration is damped and cannot go on for long.
    own = {"shine": Broyden(tol=1e-6), "reversible": FixedPointIteration(tol=1e-3, max_iter=40)}
    solver = own.get(name, TIGHT)
    deq = DEQ(solver, as_grad(name), hold_noise=True, **ONE)
    block = Block()
    before = copy.deepcopy(block)
    drop, masks = nn.Dropout(0.3), []

    def f(z):
        masks.append(drop(torch.ones_like(z)))
        return block(masks[-1] * z)

    torch.manual_seed(0)
    z, _ = deq(f, block.z0)
    z.sum().backward()
    assert len(masks) > 5
    assert all_equal(masks)
    want = after_one_call(before, masks[0] * z.detach())
    for which, buffer in block.named_buffers():  # the last evaluation stands about `tol` from z
        assert torch.allclose(buffer, want[which], rtol=0, atol=max(1e-11, solver.tol)), which


@FORMS
def test_a_solve_inside_a_solve_counts_as_one_evaluation(hook):
    block = Block()
    before = copy.deepcopy(block)
    method = IFT(solver=EXACT, hook=hook)
    inner, outer = DEQ(TIGHT, method, **ONE), DEQ(TIGHT, method, **ONE)

    def nested(z):
        y, _ = inner(lambda y: block(y) + 0.2 * z, torch.zeros_like(z))
        states.append(y.detach())
        return y

    states: list[torch.Tensor] = []
    z, _ = outer(nested, block.z0)
    assert int(block.norm.num_batches_tracked) == 1
    # The inner solve of the tracked call ends at its own y = block(y) + 0.2 z.
    want = after_one_call(before, states[-1])
    for name, buffer in block.named_buffers():
        assert torch.allclose(buffer, want[name], rtol=0, atol=1e-11), name
    g = cotangent(z)
    wanted = list(block.parameters())
    # y = z there, so the pair is the one fixed point z = block(z) + 0.2 z.
    exact = exact_gradient(lambda z: before(z) + 0.2 * z, before.z0, g, list(before.parameters()))
    assert error(torch.autograd.grad(z, wanted, g), exact) < 1e-9
    assert int(block.norm.num_batches_tracked) == 1


def test_a_recorded_state_does_not_count_as_the_solution():
    block = Block()
    before = copy.deepcopy(block)
    deq = DEQ(TIGHT, [PhantomGrad(), PhantomGrad(steps=2), IFT()], record=(1, 2), **ONE)
    _, solution = deq(block, block.z0)
    assert same(dict(block.named_buffers()), after_one_call(before, solution.z))


@pytest.mark.filterwarnings("ignore::torchdeq.CouplingWarning")  # 0.1.0's surface has no batch_dims
@pytest.mark.parametrize("core", ["indexing", "sliced"])
@pytest.mark.parametrize(
    "how", [{"ift": True}, {"hook_ift": True}, {"grad": 2}, {"ift": True, "n_states": 3}]
)
def test_get_deq_updates_once_also_over_slices(core, how):
    block = Block()
    before = copy.deepcopy(block)
    deq = get_deq(core=core, f_solver="fixed_point_iter", f_max_iter=60, f_tol=1e-13, b_tol=1e-10, **how)
    states, _ = deq(block, block.z0)
    want = after_one_call(before, states[-1].detach())
    for name, buffer in block.named_buffers():
        assert torch.allclose(buffer, want[name], rtol=0, atol=1e-11), name
    two = get_deq(core=core, f_solver="anderson", f_max_iter=60)
    two(lambda a, b: (block(a), 0.5 * b), (block.z0, torch.zeros(6, 1, dtype=F64)))
    assert int(block.norm.num_batches_tracked) == 2, "a closure of two states"
    deq.eval()
    deq(block, block.z0, sradius_mode=True)
    assert int(block.norm.num_batches_tracked) == 3, "the training flag that counts is the block's own"


@FORMS
def test_two_solves_then_one_backward_in_either_order_of_their_graphs(hook):
    """The second solve changes the buffers between the first's forward and its backward."""
    block = Block()
    g = cotangent(block.x)
    deq = DEQ(TIGHT, IFT(solver=EXACT, hook=hook), **ONE)
    plain = copy.deepcopy(block)
    wanted = list(plain.parameters())
    exact = exact_gradient(plain, plain.z0, g, wanted)
    losses = [(deq(block, block.z0)[0] * g).sum() for _ in range(2)]
    assert int(block.norm.num_batches_tracked) == 2
    got = torch.autograd.grad(losses[0] + 3 * losses[1], list(block.parameters()))
    assert error(got, [4 * t for t in exact]) < 1e-9
    assert int(block.norm.num_batches_tracked) == 2


def test_a_call_before_the_solve_keeps_its_graph():
    """Batch normalisation saves its running statistics; writing the new ones must not spoil that."""
    block = Block()
    first = block(block.x)
    z, _ = DEQ(TIGHT, IFT(solver=EXACT), **ONE)(block, block.z0)
    (first.sum() + z.sum()).backward()
    assert int(block.norm.num_batches_tracked) == 2


def test_without_grad_mode_statistics_are_updated_once_too():
    """As torch.optim.swa_utils.update_bn does it."""
    block = Block()
    for context in (torch.no_grad(), torch.inference_mode()):
        before = copy.deepcopy(block)
        with context:
            _, solution = DEQ(TIGHT, **ONE)(block, block.z0)
        # The last evaluation is that of the best state, which is returned.
        assert same(dict(block.named_buffers()), after_one_call(before, solution.z.clone()))
    assert not any(buffer.is_inference() for buffer in block.buffers())


def test_the_buffers_stay_the_tensors_they_were():
    block = Block()
    before = {name: (id(buffer), buffer.data_ptr()) for name, buffer in block.named_buffers()}
    z, _ = DEQ(TIGHT, **ONE)(block, block.z0)
    z.sum().backward()
    assert before == {name: (id(buffer), buffer.data_ptr()) for name, buffer in block.named_buffers()}


@pytest.mark.parametrize("whole", [False, True], ids=["frozen norm", "eval"])
def test_in_eval_mode_nothing_is_touched(whole):
    block = Block()
    (block if whole else block.norm).eval()
    versions = [buffer._version for buffer in block.buffers()]
    z, _ = DEQ(TIGHT, IFT(solver=EXACT), **ONE)(block, block.z0)
    g = cotangent(block.x)
    got = torch.autograd.grad(z, list(block.parameters()), g)
    assert error(got, exact_gradient(block, block.z0, g, list(block.parameters()))) < 1e-9
    assert versions == [buffer._version for buffer in block.buffers()]
    assert int(block.norm.num_batches_tracked) == 0


def test_an_f_without_such_buffers_is_passed_on_as_it_is_and_constants_are_let_go():
    layer = nn.Linear(2, 2)
    assert hold(layer) is layer
    block = Block()
    held = hold(block)
    assert isinstance(held, Held)
    assert len(held.buffers) == 4
    held(block.z0)
    assert sorted(name for b in held.buffers for _, name in b.places) == [
        "num_batches_tracked",
        "running_mean",
        "running_var",
    ]
    assert hold(block.eval()) is block


def test_an_error_in_f_leaves_the_buffers_as_they_were():
    block = Block()
    before = {name: (buffer, buffer.clone()) for name, buffer in block.named_buffers()}

    def f(z):
        if len(block.seen) == 3:
            raise KeyError("here")
        return block(z)

    with pytest.raises(KeyError, match="here"):
        DEQ(TIGHT, **ONE)(f, block.z0)
    now = dict(block.named_buffers())
    assert all(now[name] is tensor and torch.equal(tensor, value) for name, (tensor, value) in before.items())


class Scaled(nn.Module):
    """f(z) = tanh(z Wᵀ / s + x), s a running scale that each call updates before it is used."""

    def __init__(self, in_place: bool):
        super().__init__()
        self.in_place = in_place
        self.w = nn.Parameter(random_matrix(4, 0.4))
        self.x = nn.Parameter(torch.randn(3, 4, dtype=F64, generator=torch.Generator().manual_seed(1)))
        self.register_buffer("s", torch.ones((), dtype=F64))
        self.alias = nn.Module()
        self.alias.register_buffer("s", self.s)

    def forward(self, z):
        if self.in_place:
            self.s.mul_(0.9).add_(0.2)
        else:
            self.s = 0.9 * self.s + 0.2
            self.alias.s = self.s
        return torch.tanh(z @ self.w.T / self.s + self.x)

    z0 = Block.z0


@FORMS
@pytest.mark.parametrize("in_place", [True, False])
def test_a_running_scale_that_f_depends_on_is_the_same_at_each_evaluation(in_place, hook):
    f = Scaled(in_place)
    g = cotangent(f.x)
    exact = [
        exact_gradient(lambda z, s=s: torch.tanh(z @ f.w.T / s + f.x), f.z0, g, [f.w, f.x])
        for s in (1.1, 0.9 * 1.1 + 0.2)
    ]
    deq = DEQ(TIGHT, IFT(solver=EXACT, hook=hook), **ONE)
    states = [deq(f, f.z0)[0] for _ in exact]
    for z, want in zip(reversed(states), reversed(exact), strict=True):  # the first backward comes last
        assert error(torch.autograd.grad(z, [f.w, f.x], g), want) < 1e-9
    assert torch.allclose(f.s, torch.tensor(0.9 * (0.9 * 1.1 + 0.2) + 0.2, dtype=F64)) is False
    assert torch.allclose(f.s, torch.tensor(0.9 * 1.1 + 0.2, dtype=F64))
    assert f.alias.s is f.s, "a buffer that two modules share stays shared"


@pytest.mark.parametrize("new", [True, False], ids=["parametrization", "hook"])
@FORMS
@pytest.mark.filterwarnings("ignore:.*weight_norm|.*spectral_norm:FutureWarning")
def test_spectral_norm_makes_one_power_iteration_per_solve(new, hook):
    torch.manual_seed(0)
    layer = nn.Linear(4, 4, bias=False, dtype=F64)
    wrap = nn.utils.parametrizations.spectral_norm if new else nn.utils.spectral_norm
    layer = wrap(layer)
    x = torch.randn(3, 4, dtype=F64)
    weight = layer.parametrizations.weight.original if new else layer.weight_orig
    u, v = (
        (layer.parametrizations.weight[0]._u, layer.parametrizations.weight[0]._v)
        if new
        else (layer.weight_u, layer.weight_v)
    )
    # One power iteration by hand, from the vectors of before; the derivative takes u and v for constants.
    normalised = functools.partial(nn.functional.normalize, dim=0, eps=1e-12)
    w = weight.detach()
    if new:  # this one begins with u, the other with v
        want_u = normalised(w @ v)
        want_v = normalised(w.T @ want_u)
    else:
        want_v = normalised(w.T @ u)
        want_u = normalised(w @ want_v)
    exact = exact_gradient(
        lambda z: torch.tanh(0.5 * z @ (weight / (want_u @ weight @ want_v)).T + x),
        torch.zeros_like(x), cotangent(x), [weight],
    )  # fmt: skip
    z, _ = DEQ(TIGHT, IFT(solver=EXACT, hook=hook), **ONE)(
        lambda z: torch.tanh(0.5 * layer(z) + x), torch.zeros_like(x)
    )
    got = torch.autograd.grad(z, [weight], cotangent(x))
    assert error(got, exact) < 1e-9
    assert torch.allclose(u, want_u, atol=1e-14)
    assert torch.allclose(v, want_v, atol=1e-14)


def test_an_affine_map_and_a_solve_of_fewer_samples_hold_their_buffers_too():
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4, bias=False, dtype=F64))
    x = torch.randn(6, 4, dtype=F64) * torch.logspace(0, -9, 6, dtype=F64)[:, None]
    power = layer.parametrizations.weight[0]
    weights = []

    def linear(u):
        weights.append(layer.weight)
        return 0.5 * u @ weights[-1].T

    DEQ(GMRES(tol=1e-10))(AffineMap(linear, x), torch.zeros_like(x))
    rows_seen = []

    def f(z, rows=None):
        rows_seen.append(len(z))
        return linear(z) + (x if rows is None else x[rows])

    before = copy.deepcopy(power)
    count = len(weights)
    DEQ(FixedPointIteration(tol=1e-11, compact=True, max_iter=60))(f, torch.zeros_like(x))
    assert min(rows_seen) < 6
    assert all_equal(weights[:count])
    assert all_equal(weights[count:])
    with torch.no_grad():
        before(layer.parametrizations.weight.original)
    assert same(dict(power.named_buffers()), dict(before.named_buffers()))


def test_the_callers_modules_are_not_registered_and_are_copied_with_their_owner():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()
            self.deq = DEQ(TIGHT, modules=[self])

    model = Model()
    assert list(model.deq.modules()) == [model.deq]
    assert not model.deq.state_dict()
    assert repr(model.deq) == f"DEQ({TIGHT!r}, IFT(), modules=[Model])"
    assert "Block" in repr(model)
    other = copy.deepcopy(model)
    assert other.deq.stateful == (other,)
    with pytest.raises(TypeError, match="the modules whose buffers f changes"):
        DEQ(modules=[lambda z: z])


def test_a_compiled_block_is_not_compiled_again_for_each_evaluation():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    block = nn.Sequential(nn.BatchNorm1d(4, dtype=F64), nn.Tanh())
    x = torch.randn(6, 4, dtype=F64)
    compiled = torch.compile(block, backend=backend)
    with torch.no_grad():
        for _ in range(2):
            DEQ(TIGHT, **ONE)(lambda z: 0.1 * compiled(z) + x, torch.zeros_like(x))
    assert len(graphs) == 1
    assert int(block[0].num_batches_tracked) == 2


# Noise --------------------------------------------------------------------------------------------------


class Noisy:
    """f(z) = tanh(drop(z) Wᵀ + x) with `torch.nn.Dropout`, whose masks are noted."""

    def __init__(self):
        self.w = random_matrix(8, 0.4).requires_grad_()
        self.x = torch.randn(3, 8, dtype=F64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        self.drop = nn.Dropout(0.5)
        self.masks = []

    def __call__(self, z):
        mask = self.drop(torch.ones_like(z))
        self.masks.append(mask)
        return torch.tanh(mask * z @ self.w.T + self.x)

    @property
    def z0(self):
        return torch.zeros_like(self.x, requires_grad=False)

    def exact(self, mask, g):
        f = lambda z: torch.tanh(mask * z @ self.w.T + self.x)  # noqa: E731
        return exact_gradient(f, self.z0, g, [self.w, self.x])


def all_equal(tensors):
    return all(torch.equal(tensors[0], t) for t in tensors)


@FORMS
def test_with_held_noise_a_solve_has_one_mask_and_the_next_another(hook):
    f = Noisy()
    g = cotangent(f.x)
    deq = DEQ(TIGHT, IFT(solver=EXACT, hook=hook), hold_noise=True)
    assert repr(deq).endswith("hold_noise=True)")
    torch.manual_seed(0)
    f(f.z0)
    f(f.z0)
    after_two_calls = torch.get_rng_state()
    first, second = f.masks
    f.masks.clear()
    torch.manual_seed(0)
    z1, solution = deq(f, f.z0)
    assert solution.converged.all()
    assert all_equal([first, *f.masks])
    f.masks.clear()
    z2, _ = deq(f, f.z0)
    assert all_equal([second, *f.masks])
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), after_two_calls), "one call of f for each solve"
    for z, mask in ((z2, second), (z1, first)):
        f.masks.clear()
        assert error(torch.autograd.grad(z, [f.w, f.x], g), f.exact(mask, g)) < 1e-9
        assert all_equal([mask, *f.masks])
        assert len(f.masks) == (0 if hook else 1)
    assert torch.equal(torch.get_rng_state(), after_two_calls)


def test_without_it_f_is_random_and_says_so_by_not_converging():
    f = Noisy()
    torch.manual_seed(0)
    with torch.no_grad():
        solution = Anderson()(f, f.z0)
    assert not solution.converged.any()
    assert not all_equal(f.masks)


@pytest.mark.parametrize("method", [PhantomGrad(steps=3), Unroll()])
def test_held_noise_reaches_every_gradient_method(method):
    f = Noisy()
    DEQ(TIGHT, method, hold_noise=True)(f, f.z0)[0].sum().backward()
    assert all_equal(f.masks)


@pytest.mark.parametrize("reentrant", [False, True])
@FORMS
def test_held_noise_under_a_checkpointed_solve(reentrant, hook):
    f = Noisy()
    g = cotangent(f.x)
    deq = DEQ(TIGHT, IFT(solver=EXACT, hook=hook), hold_noise=True)
    torch.manual_seed(3)
    z = checkpoint(lambda x: deq(f, f.z0)[0], f.x, use_reentrant=reentrant)
    (z * g).sum().backward()
    assert all_equal(f.masks)
    assert error([f.w.grad, f.x.grad], f.exact(f.masks[0], g)) < 1e-9


def written_out(f, steps=200):
    z = f.z0
    for _ in range(steps):
        z = f(z)
    return z


def second(z, x, wanted):
    """Gradients of ⟨v, dL/dx⟩ for fixed cotangents."""
    (gx,) = torch.autograd.grad((z * cotangent(z)).sum(), x, create_graph=True)
    return torch.autograd.grad((gx * cotangent(x, 9)).sum(), wanted)


def test_second_derivatives_see_the_same_mask_and_the_same_buffers():
    """Against the derivatives of two hundred steps, written out, whose rate of convergence is below 0.6."""
    f = Noisy()
    torch.manual_seed(0)
    z, _ = DEQ(TIGHT, IFT(solver=EXACT, order=2), hold_noise=True)(f, f.z0)
    got = second(z, f.x, [f.w, f.x])
    assert len(f.masks) > 20
    assert all_equal(f.masks)
    mask = f.masks[0]
    plain = Noisy()
    plain.w, plain.x, plain.drop = f.w, f.x, lambda ones: mask
    assert error(got, second(written_out(plain), f.x, [f.w, f.x])) < 1e-9

    block = Block()
    plain = copy.deepcopy(block)
    z, _ = DEQ(TIGHT, IFT(solver=EXACT, order=2), **ONE)(block, block.z0)
    got = second(z, block.x, [block.w, block.x])
    assert int(block.norm.num_batches_tracked) == 1
    assert error(got, second(written_out(plain), plain.x, [plain.w, plain.x])) < 1e-9


def test_held_noise_and_held_buffers_together():
    block = Block()
    drop = nn.Dropout(0.3)
    before = copy.deepcopy(block)
    masks = []

    def f(z):
        masks.append(drop(torch.ones_like(z)))
        return block(masks[-1] * z)

    z, solution = DEQ(TIGHT, IFT(solver=EXACT), hold_noise=True, **ONE)(f, block.z0)
    z.sum().backward()
    assert all_equal(masks)
    want = after_one_call(before, masks[0] * solution.z)
    assert same(dict(block.named_buffers()), want)


def test_looking_for_the_cause_of_a_failed_solve_changes_no_buffer_that_was_named():
    class Hidden:
        __slots__ = ("norm",)

    hidden, x = Hidden(), torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    hidden.norm = torch.nn.BatchNorm1d(4)
    deq = DEQ(Anderson(max_iter=3, tol=1e-9), modules=[hidden.norm])
    with pytest.warns(ConvergenceWarning):
        deq(lambda z: torch.tanh(hidden.norm(2 * z + x)), torch.zeros(6, 4))
    assert hidden.norm.num_batches_tracked == 1
