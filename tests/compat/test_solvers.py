"""The solver functions and `backward_factory` beside those of 0.1.0, and solvers and classes written for it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import torchdeq
import torchdeq.solver.utils
import torchdeq.utils.layer_utils
from tests.compat.same import (
    TIGHT,
    assert_same,
    assert_same_info,
    gradients,
    in_two,
    small,
    start_of_two,
)
from tests.problems import F64, random_matrix
from torchdeq import get_deq, register_deq

pytestmark = pytest.mark.filterwarnings("ignore::torchdeq.ConvergenceWarning")

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("fixed_point_iter", {}),
    ("fixed_point_iter", {"tau": 0.8}),
    ("fixed_point_iter", {"stop_mode": "rel"}),
    ("fixed_point_iter", {"return_final": True}),
    ("fixed_point_iter", {"indexing": [60, 90]}),
    ("anderson", {}),
    ("anderson", {"m": 2, "lam": 1e-8}),
    ("anderson", {"tau": 0.9, "stop_mode": "rel"}),
    ("anderson", {"return_final": True, "indexing": [120]}),
    ("broyden", {}),
    ("broyden", {"ls": True}),
    ("broyden", {"LBFGS_thres": 150, "stop_mode": "rel"}),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(3,), (3, 4), (2, 3, 2, 2)], ids=str)
def test_solver_functions(old, name, options, shape):
    w = random_matrix(
        shape[1:].numel() if isinstance(shape, torch.Size) else int(torch.Size(shape[1:]).numel()), 0.3
    )
    x = torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(3))

    def f(z):
        return torch.tanh((z.reshape(shape[0], -1) @ w).reshape(shape) + x)

    # Row 3: a solve of 0.1.0 that stops before a sample is due forgets the sample.
    tol = 0.0 if "indexing" in options else 1e-12
    answers = []
    for lib in (torchdeq, old):
        solver = lib.get_solver(name)
        answers.append(solver(f, x0=torch.zeros_like(x), max_iter=150, tol=tol, **options))
    (z, states, info), (z_old, states_old, info_old) = answers
    assert_same(z, z_old)
    assert_same(states, states_old)
    assert_same_info(info, info_old)


@pytest.mark.parametrize(
    "options", [{"max_iter": 7}, {"max_iter": 9, "tau": 0.5, "indexing": [2, 9]}], ids=str
)
def test_the_simple_function_steps_alike_and_keeps_its_graph(old, options):
    """Row 12: in 0.1.0 f must take `tau` itself."""
    answers = []
    for lib in (torchdeq, old):
        f = small()
        wrapped = lib.utils.layer_utils.DEQWrapper(f, f.z0)
        z, states, info = lib.get_solver("simple_fixed_point_iter")(wrapped, f.z0, **options)
        answers.append((z, states, gradients([z], f.wanted), {k: info[k] for k in ("abs_lowest", "nstep")}))
    assert_same(answers[0][:3], answers[1][:3], close=1e-14)
    for key in ("abs_lowest", "nstep"):
        if "tau" not in options:  # row 10: with damping it is not the residual of f
            torch.testing.assert_close(answers[0][3][key], answers[1][3][key], check_dtype=False)


FACTORY: list[tuple[Any, dict[str, Any]]] = [
    ("ift", {}),
    ("ift", {"hook_ift": True}),
    (1, {}),
    (4, {"tau": 0.6}),
    (5, {"sup_gap": 1, "tau": 0.9}),
    (4, {"sup_loc": [1, 3]}),
]


@pytest.mark.parametrize(("grad", "options"), FACTORY, ids=str)
@pytest.mark.parametrize("b_solver", ["fixed_point_iter", "anderson", "broyden"])
def test_backward_factory(old, grad, options, b_solver):
    answers = []
    for lib, module in ((torchdeq, torchdeq.grad), (old, old.grad)):
        f = small()
        z, _, _ = lib.get_solver("fixed_point_iter")(f, f.z0, max_iter=100, tol=1e-13)
        given = dict(options)
        if grad == "ift":
            given |= {
                "b_solver": lib.get_solver(b_solver),
                "b_solver_kwargs": {"max_iter": 100, "tol": 1e-12},
            }
        functor = module.backward_factory(grad_type=grad, **given)
        owner = torch.nn.Module()
        owner.hook = None
        wrapped = lib.utils.layer_utils.DEQWrapper(f, f.z0)
        written: list[Any] = []
        states = functor(owner, wrapped, z.detach(), writer=written.append)
        answers.append((states, gradients(states, f.wanted), len(written)))
    assert_same(answers[0], answers[1])


def averaged(lib: Any) -> Any:
    """A solver in the manner of 0.1.0, with the helpers of its solvers: Picard iteration, then an average."""
    tools = lib.solver.utils

    def solve(func, x0, max_iter=50, tol=1e-3, stop_mode="abs", indexing=None, weight=0.1, **kwargs):
        traces, lowest, steps = tools.init_solver_info(x0.shape[0], x0.device)
        best, x, sampled = x0, x0, []
        for k in range(max_iter):
            fx = func(x)
            gx = tools.batch_flatten(fx - x)
            abs_diff = gx.norm(dim=1)
            rel_diff = abs_diff / (tools.batch_flatten(fx).norm(dim=1) + 1e-9)
            best = tools.update_state(best, fx, k + 1, stop_mode, abs_diff, rel_diff, traces, lowest, steps)
            if indexing and k + 1 in indexing:
                sampled.append(best)
            if traces[stop_mode][-1].max() < tol:
                break
            x = (1 - weight) * fx + weight * x
        if indexing and not sampled:
            sampled.append(best)
        return best, sampled, tools.solver_stat_from_info(stop_mode, lowest, traces, steps)

    return solve


@pytest.mark.parametrize("core", ["sliced", "indexing"])
@pytest.mark.parametrize("several", [False, True])
def test_a_solver_of_ones_own(old, core, several):
    answers = []
    for lib in (torchdeq, old):
        lib.register_solver("averaged", averaged(lib))
        f = small()
        shapes: set[tuple[int, ...]] = set()
        two = in_two(f)

        def seen(*z, two=two, one=f, shapes=shapes):
            shapes.add(tuple(z[0].shape))
            return two(*z) if len(z) > 1 else one(*z)

        deq = lib.get_deq(
            {**TIGHT, "core": core, "f_solver": "averaged", "b_solver": "averaged", "ift": True}
        )
        states, _ = deq(seen, start_of_two(f) if several else f.z0)
        answers.append((states, gradients(states, f.wanted), shapes))
        with torch.no_grad():
            z, _, info = lib.get_solver("averaged")(f, f.z0, tol=1e-12, weight=0.3, max_iter=100)
        answers[-1] += (z, info["abs_trace"].shape, info["nstep"])
    torchdeq.SOLVERS.pop("averaged")
    assert_same(answers[0], answers[1])


def test_a_solver_without_further_keywords(old):
    """The sliced core of 0.1.0 gives `indexing` to no solver, and some have no parameter for it."""
    found = []
    for lib in (torchdeq, old):

        def picard(func, x0, max_iter, tol, stop_mode, lib=lib):
            assert x0.shape == (3, 2, 4), "the shape of the state, as it was"
            for _ in range(max_iter):
                x0, last = func(x0), x0
            return x0, [], lib.solver_stat_from_final_step(last, x0, max_iter)

        lib.register_solver("picard", picard)
        f = small()
        deq = lib.get_deq(core="sliced", f_solver="picard", n_states=2, f_max_iter=100)
        states, _ = deq(lambda z, f=f: f(z.flatten(1)).view_as(z), f.z0.view(3, 2, 4))
        found.append((states, gradients(states, f.wanted)))
    torchdeq.SOLVERS.pop("picard")
    assert_same(found[0], found[1])


def own_core(lib: Any) -> Any:
    """A DEQ class in the manner of 0.1.0: it wraps f, solves with `f_solver`, and calls a functor for the gradient."""

    class Restarted(lib.core.DEQBase):
        """Solves, averages with the start, and solves again."""

        def __init__(self, args=None, restarts=2, **kwargs):
            super().__init__(args=args, **kwargs)
            self.restarts = self.args.get("restarts", restarts)
            self.produce_grad = lib.grad.backward_factory(
                grad_type="ift",
                b_solver=self.b_solver,
                b_solver_kwargs={
                    "max_iter": self.b_max_iter, "tol": self.b_tol, "stop_mode": self.b_stop_mode,
                },
            )  # fmt: skip

        def _solve_fixed_point(self, deq_func, z_init, f_max_iter=None, solver_kwargs=None, **kwargs):
            with torch.no_grad():
                z, _, info = self.f_solver(
                    deq_func, x0=z_init, max_iter=f_max_iter, tol=self.f_tol, stop_mode=self.f_stop_mode
                )
            return z, info

        def forward(
            self, func, z_init, solver_kwargs=None, sradius_mode=False, backward_writer=None, **kwargs
        ):
            deq_func, z = lib.utils.layer_utils.deq_decorator(func, z_init, no_stat=self.no_stat)
            for _ in range(self.restarts):
                z, info = self._solve_fixed_point(deq_func, 0.9 * z, f_max_iter=self.f_max_iter)
            if not self.training:
                info["sradius"] = self._sradius(deq_func, z) if sradius_mode else torch.zeros(1)
                return [deq_func.vec2list(z)], info
            states = self.produce_grad(self, deq_func, deq_func.detach(z), writer=backward_writer)
            return [deq_func.vec2list(state) for state in states], info

    return Restarted


@pytest.mark.parametrize("solver", ["anderson", "broyden", "fixed_point_iter"])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_a_core_of_ones_own(old, solver, several, training):
    found = []
    for lib in (torchdeq, old):
        lib.core.register_deq("restarted", own_core(lib))
        f, written = small(), []
        deq = lib.get_deq(dict(TIGHT), core="restarted", f_solver=solver, restarts=3).train(training)
        assert deq.restarts == 3, "an option of the class's own, by keyword"
        start = start_of_two(f) if several else f.z0
        states, info = deq(in_two(f) if several else f, start, backward_writer=written.append)
        found.append((states, gradients(states, f.wanted), len(written)))
        assert info["abs_lowest"].max() < 1e-9
    torchdeq.core.CORES.pop("restarted")
    if training:
        assert_same(found[0], found[1])
        assert found[0][2] == 1
    else:
        assert_same(found[0][0], found[1][0])


def with_forward_of_its_own(lib: Any, base: str) -> Any:
    """A copy of the training step of 0.1.0's classes, as a class derived from one of them would have it."""

    class Derived(getattr(lib.core, base)):
        def forward(self, func, z_init, solver_kwargs=None, backward_writer=None, **kwargs):
            deq_func, z = lib.utils.layer_utils.deq_decorator(func, z_init, no_stat=self.no_stat)
            out = []
            if base == "DEQSliced":
                for steps, grad in zip(self.indexing, self.produce_grad, strict=True):
                    z, info = self._solve_fixed_point(deq_func, z, f_max_iter=steps, solver_kwargs={})
                    out += grad(self, deq_func, deq_func.detach(z), writer=backward_writer)
                    z = deq_func.detach(out[-1])
            else:
                _, trail, info = self._solve_fixed_point(
                    deq_func, z, f_max_iter=self.f_max_iter, indexing=self.indexing, solver_kwargs={}
                )
                for z, grad in zip(trail, self.produce_grad, strict=True):
                    out += grad(self, deq_func, deq_func.detach(z), writer=backward_writer)
            return [deq_func.vec2list(z) for z in out], info

    return Derived


@pytest.mark.parametrize("base", ["DEQSliced", "DEQIndexing"])
@pytest.mark.parametrize(
    "options", [{"ift": True}, {"n_states": 3, "grad": [1, 2, 3]}, {"grad": 3, "sup_gap": 1}], ids=str
)
@pytest.mark.parametrize("several", [False, True])
def test_classes_derived_with_a_forward_of_their_own(old, base, options, several):
    found = []
    for lib in (torchdeq, old):
        f = small()
        deq = with_forward_of_its_own(lib, base)({**TIGHT, "f_tol": 0.0, **options})
        states, _ = deq(in_two(f), start_of_two(f)) if several else deq(f, f.z0)
        found.append((states, gradients(states, f.wanted)))
    assert_same(found[0], found[1])


def test_a_derived_class_whose_piece_would_not_be_called_is_refused():
    with pytest.raises(
        TypeError, match="Hurried defines _solve_fixed_point, which the forward of torchdeq 0.1.0 called"
    ):

        class Hurried(torchdeq.DEQSliced):
            def _solve_fixed_point(self, deq_func, z_init, **kwargs):
                return z_init, {}


def test_pieces_that_are_called_may_be_replaced():
    class Twice(torchdeq.DEQSliced):
        def _compute_f_iter(self, f_max_iter):
            return [f_max_iter, f_max_iter]

        def _sradius(self, deq_func, z_star):
            return torch.full((3,), 7.0)

    register_deq("twice", Twice)
    try:
        f, deq = small(), get_deq(core="twice", f_max_iter=20)
        assert len(deq(f, f.z0)[0]) == 2
        assert deq.eval()(f, f.z0, sradius_mode=True)[1]["sradius"].tolist() == [7.0] * 3
    finally:
        torchdeq.core.CORES.pop("twice")


@pytest.mark.parametrize("core", ["sliced", "indexing"])
def test_the_functors_of_a_module_may_be_exchanged(core):
    f = small()
    deq = get_deq({**TIGHT, "core": core}, grad=1)
    deq.produce_grad = [torchdeq.backward_factory("ift", b_solver="gmres", b_solver_kwargs={"tol": 1e-12})]
    want = get_deq({**TIGHT, "core": core}, ift=True)
    for a, b in itertools.pairwise(gradients(d(f, f.z0)[0], f.wanted) for d in (deq, want)):
        assert_same(a, b)
    for wrong in ([], [lambda trainer, func, z, **kw: [func(z)]]):
        with pytest.raises(TypeError, match="produce_grad takes what backward_factory returns"):
            deq.produce_grad = wrong
    with pytest.raises(TypeError, match="item assignment"):
        deq.produce_grad[0] = torchdeq.backward_factory(2)
