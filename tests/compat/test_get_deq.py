"""`get_deq` beside that of 0.1.0: states, gradients and statistics, wherever 0.1.0 is right.

Both solve to rounding, so that what is compared is the fixed point and its derivative and not the way to them. Where
0.1.0 counts steps and looks at no residual, the steps are compared one by one.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import pytest
import torch
from torch import nn

import torchdeq
from tests.compat.same import (
    SOLVERS,
    TIGHT,
    assert_same,
    assert_same_info,
    gradients,
    in_two,
    small,
    start_of_two,
)
from tests.problems import F64

pytestmark = pytest.mark.filterwarnings("ignore::torchdeq.ConvergenceWarning")
CORES = ("sliced", "indexing")
GRADS: dict[str, dict[str, Any]] = {
    "one step": {},
    "ift": {"ift": True},
    "hook_ift": {"hook_ift": True},
    "phantom": {"grad": 3, "tau": 0.5},
    "sup_gap": {"grad": 4, "sup_gap": 2},
    "sup_loc": {"grad": 4, "sup_loc": [1, 2]},
    "n_states": {"n_states": 3},
    "indexing": {"indexing": [40, 72]},
    "all": {"n_states": 3, "grad": [1, 2, 3], "ift": True},
}


def raises_in_0_1_0(solver: str, grad: str, several: bool) -> bool:
    """Row 12: a state of several tensors goes through the simple solver as a list, of which IFT knows nothing."""
    return several and solver == "simple_fixed_point_iter" and grad in ("ift", "hook_ift", "all")


CASES = [
    pytest.param(core, solver, grad, several, id=f"{core}-{solver}-{grad}-{'pair' if several else 'tensor'}")
    for core, solver, grad, several in itertools.product(CORES, SOLVERS, GRADS, (False, True))
    if not raises_in_0_1_0(solver, grad, several)
]


@pytest.mark.parametrize(("core", "solver", "grad", "several"), CASES)
def test_training(old, core, solver, grad, several):
    # Row 3: with f_tol > 0 the core 'indexing' of 0.1.0 stops before the samples are due, and forgets them.
    early = {"f_tol": 0.0} if core == "indexing" else {}
    options = {**TIGHT, "core": core, "f_solver": solver, **early, **GRADS[grad]}
    answers = []
    for lib in (torchdeq, old):
        f = small()
        deq = lib.get_deq(**options)
        states, info = deq(in_two(f), start_of_two(f)) if several else deq(f, f.z0)
        if several:  # 0.1.0's simple solver hands on what f returned, here a tuple; the others make lists
            states = [list(state) for state in states]
        answers.append((states, gradients(states, f.wanted), info))
    (states, grads, info), (states_old, grads_old, info_old) = answers
    assert_same(states, states_old, where="states")
    assert_same(grads, grads_old, where="gradients")
    assert_same_info(info, info_old)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("hook", [False, True])
@pytest.mark.parametrize("b_solver", ["anderson", "broyden", "fixed_point_iter"])
def test_adjoint_solvers_and_the_writer(old, core, hook, b_solver):
    answers = []
    for lib in (torchdeq, old):
        f, written = small(), []
        deq = lib.get_deq({**TIGHT, "core": core, "ift": True, "hook_ift": hook, "b_solver": b_solver})
        states, _ = deq(f, f.z0, backward_writer=written.append)
        answers.append((gradients(states, f.wanted), written))
    assert_same(answers[0][0], answers[1][0])
    ours, theirs = answers[0][1], answers[1][1]
    assert len(ours) == len(theirs) == 1
    assert_same_info(ours[0], theirs[0], residual=1e-6)


@pytest.mark.parametrize(
    ("core", "solver", "several"),
    # Row 12: the last of these raises in 0.1.0.
    [
        case
        for case in itertools.product(CORES, SOLVERS, (False, True))
        if case != ("indexing", SOLVERS[1], True)
    ],
)
def test_eval_mode(old, core, solver, several):
    answers = []
    for lib in (torchdeq, old):
        f = small()
        deq = lib.get_deq({**TIGHT, "core": core, "f_solver": solver, "n_states": 3, "ift": True}).eval()
        with torch.no_grad():
            states, info = deq(in_two(f), start_of_two(f)) if several else deq(f, f.z0)
            answers.append(([list(state) if several else state for state in states], info))
    assert_same(answers[0][0], answers[1][0])
    assert_same_info(answers[0][1], answers[1][1])
    assert answers[0][1]["sradius"].tolist() == answers[1][1]["sradius"].tolist() == [0.0]


STEPS = [
    {}, {"indexing": [3]}, {"n_states": 3}, {"n_states": 4}, {"grad": 2}, {"grad": [1, 2, 3], "n_states": 3},
    {"grad": 3, "sup_gap": 1}, {"grad": 3, "sup_loc": [1]}, {"f_max_iter": 0, "grad": 4}, {"f_max_iter": 1},
]  # fmt: skip


MODES = ("train", "train without grad", "eval without grad", "eval")


def comparable(core: str, options: dict[str, Any], mode: str) -> bool:
    """Row 3: with f_max_iter=0 the core 'indexing' of 0.1.0 has no state. Row 8: its eval mode has no gradient, the
    steps of which are added here."""
    if "train" in mode:
        return core == "sliced" or options.get("f_max_iter") != 0
    return mode != "eval" or options.get("grad", 1) == 1


@pytest.mark.parametrize(
    ("core", "options", "mode"),
    [case for case in itertools.product(CORES, STEPS, MODES) if comparable(*case)],
    ids=str,
)
def test_the_simple_solver_step_by_step(old, core, options, mode):
    """The map z + 1 counts how often it was applied."""
    counts, infos = [], []
    for lib in (torchdeq, old):
        deq = lib.get_deq({"core": core, "f_solver": "simple_fixed_point_iter", "f_max_iter": 10, **options})
        deq.train("train" in mode)
        with torch.set_grad_enabled("without" not in mode):
            states, info = deq(lambda z: z + 1, torch.zeros(2, 1, dtype=F64))
        counts.append([state[0].item() for state in states])
        infos.append(info)
    if mode == "eval" and options.get("f_max_iter") == 0:
        assert counts == [[1.0], [0.0]], "row 8: the step of the gradient"
    else:
        assert counts[0] == counts[1]
    if options.get("f_max_iter", 1) > 0:
        assert infos[0]["nstep"].tolist() == infos[1]["nstep"].tolist()


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("solver", ["fixed_point_iter", "anderson", "broyden"])
def test_no_steps_at_all(old, core, solver):
    """The model zoo skips the solver with f_max_iter=0, and unrolls the phantom gradient from the start."""
    answers = []
    for lib in (torchdeq, old):
        f = small()
        deq = lib.get_deq(core=core, f_solver=solver, f_max_iter=0 if solver != "broyden" else 30, grad=5)
        states, _ = deq(f, f.z0 + 1, solver_kwargs={"f_max_iter": 0})
        answers.append((states, gradients(states, f.wanted)))
    assert_same(answers[0], answers[1], close=1e-14)


@pytest.mark.parametrize("n_states", [1, 2, 3, 7])
@pytest.mark.parametrize("core", CORES)
def test_which_evaluations_are_sampled(old, core, n_states):
    for options in ({"n_states": n_states}, {"indexing": [5, 11], "grad": [1, 2, 3]}):
        ours, theirs = (lib.get_deq(core=core, f_max_iter=20, **options) for lib in (torchdeq, old))
        assert list(ours.indexing) == list(theirs.indexing)
        assert ours._compute_f_iter(33) == list(theirs._compute_f_iter(33))
        assert len(ours.produce_grad) == len(theirs.produce_grad)


def forms_of_args(options: dict[str, Any]) -> dict[str, Any]:
    return {
        "dict": dict(options),
        "Namespace": argparse.Namespace(**options, learning_rate=1e-3),
        "DEQConfig": None,
    }


@pytest.mark.parametrize("form", ["dict", "Namespace", "DEQConfig", "keywords"])
def test_forms_of_the_configuration(old, form):
    options = {
        "f_solver": "broyden",
        "f_max_iter": 33,
        "f_tol": 1e-5,
        "eval_factor": 2.5,
        "grad": [2],
        "tau": 0.8,
    }
    found = []
    for lib, module in ((torchdeq, torchdeq.utils.config), (old, old.utils.config)):
        args = module.DEQConfig(dict(options)) if form == "DEQConfig" else forms_of_args(options).get(form)
        deq = lib.get_deq(**options) if form == "keywords" else lib.get_deq(args)
        found.append(deq)
    for name in (
        "f_max_iter",
        "b_max_iter",
        "f_tol",
        "b_tol",
        "f_stop_mode",
        "b_stop_mode",
        "eval_f_max_iter",
    ):
        assert getattr(found[0], name) == getattr(found[1], name), name
    assert found[0].f_solver.__name__ == found[1].f_solver.__name__ == "broyden_solver"
    assert found[0].b_solver.__name__ == found[1].b_solver.__name__
    assert found[0].args.get("tau") == found[1].args.get("tau") == 0.8


@pytest.mark.parametrize(
    ("solver", "options"),
    [
        ("fixed_point_iter", {"tau": 0.7}),
        ("fixed_point_iter", {"f_max_iter": 200}),
        ("fixed_point_iter", {"return_final": True}),
        ("simple_fixed_point_iter", {"tau": 0.7}),
        ("anderson", {"m": 3, "lam": 1e-6, "tau": 0.9}),
        ("broyden", {"LBFGS_thres": 200, "ls": True}),
        ("broyden", {"ls": False}),
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False])
def test_solver_kwargs(old, solver, options, training):
    answers = []
    for lib in (torchdeq, old):
        f = small()
        deq = lib.get_deq({**TIGHT, "f_solver": solver, "f_max_iter": 150}).train(training)
        given = dict(options)
        with torch.set_grad_enabled(training):
            answers.append(deq(f, f.z0, solver_kwargs=given)[0])
        assert given == options, "the caller's dictionary is as it was"
    assert_same(answers[0], answers[1])


def test_solver_kwargs_of_another_solver_are_ignored_as_they_were(old):
    """The zoo's MDEQ gives `tau` to whatever solver `--f_solver` names."""
    f = small()
    ours, theirs = (lib.get_deq({**TIGHT, "f_solver": "broyden"}) for lib in (torchdeq, old))
    with pytest.warns(UserWarning, match="broyden_solver has no use for tau"):
        states, _ = ours(f, f.z0, solver_kwargs={"tau": 0.6})
    ours(f, f.z0, solver_kwargs={"tau": 0.6})  # and says so once
    assert_same(states, theirs(f, f.z0, solver_kwargs={"tau": 0.6})[0])


def test_the_traces_of_solves_can_be_put_together(old):
    """One column per evaluation up to f_max_iter, whenever a solve stopped. 0.1.0 has a sentinel in front."""
    f = small()
    for core, training in itertools.product(CORES, (True, False)):
        ours, theirs = (
            lib.get_deq(core=core, n_states=2, f_max_iter=20).train(training) for lib in (torchdeq, old)
        )
        for scale in (1.0, 10.0):
            with torch.set_grad_enabled(training):
                widths = [
                    deq(lambda z, scale=scale: f(scale * z / 10), f.z0)[1]["abs_trace"].shape[1]
                    for deq in (ours, theirs)
                ]
            assert widths[0] == widths[1] - 1


def test_the_spectral_radius(old):
    torch.manual_seed(0)
    root = torch.randn(6, 6, dtype=F64)
    w = root @ root.T / 60
    for core in CORES:
        radii = []
        for lib in (torchdeq, old):
            deq = lib.get_deq(core=core, f_max_iter=200, f_tol=1e-12).eval()
            _, info = deq(lambda z: z @ w + 1, torch.zeros(3, 6, dtype=F64), sradius_mode=True)
            radii.append(info["sradius"].detach())
        assert_same(radii[0], radii[1], close=1e-6)
    assert_same(radii[0], torch.linalg.eigvalsh(w).max().expand(3), close=1e-9)


class Model(nn.Module):
    """A module around the DEQ, as programs have it."""

    def __init__(self, deq: nn.Module):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 6, dtype=F64)
        with torch.no_grad():
            self.layer.weight.mul_(0.5)
        self.deq = deq

    def forward(self, x):
        states, info = self.deq(lambda z: torch.tanh(self.layer(z) + x), torch.zeros_like(x))
        return states[-1], info


@pytest.mark.parametrize("hook", [False, True])
def test_wrapped_for_distributed_training(old, hook, tmp_path):
    """One process is enough to see that the parameters' hooks are met once and in time."""
    x = torch.randn(4, 6, dtype=F64, generator=torch.Generator().manual_seed(1))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        found = []
        for lib in (torchdeq, old):
            model = Model(lib.get_deq(**TIGHT, ift=True, hook_ift=hook))
            wrapped = nn.parallel.DistributedDataParallel(model)
            for _ in range(2):
                wrapped(x)[0].square().sum().backward()
            found.append([p.grad for p in model.parameters()])
    finally:
        torch.distributed.destroy_process_group()
    assert_same(found[0], found[1])


def test_a_state_of_one_number_and_of_one_dimension(old):
    """The first example of 0.1.0's documentation is on 0-D tensors."""
    for z0, f in (
        (torch.tensor(0.5, dtype=F64), lambda z: torch.exp(-z)),
        (torch.zeros(5, dtype=F64), torch.cos),
    ):
        for solver in ("fixed_point_iter", "anderson", "broyden"):
            answers = [lib.get_deq(**{**TIGHT, "f_solver": solver})(f, z0) for lib in (torchdeq, old)]
            want = answers[1][0][-1]
            assert_same(answers[0][0], [want.reshape(z0.shape)])  # 0.1.0 makes (1,) of some 0-D states
            assert_same_info(answers[0][1], answers[1][1])


def test_lists_of_tensors_and_maps_that_return_lists(old):
    f = small()
    two = in_two(f)
    for start in (start_of_two(f), list(start_of_two(f))):
        answers = []
        for lib in (torchdeq, old):
            states, _ = lib.get_deq(**TIGHT)(lambda a, b: list(two(a, b)), start)
            answers.append(states)
        assert_same(answers[0], answers[1])
        assert type(answers[0][-1]) is list


def test_calls_in_a_loop_without_grad_from_the_last_state(old):
    """Frames of a video: each solve begins at the last solution."""
    ends = []
    for lib in (torchdeq, old):
        f, deq = small(), lib.get_deq(**TIGHT).eval()
        z = f.z0
        with torch.no_grad():
            for frame in range(3):
                z = deq(lambda z, f=f, frame=frame: f(z) + 0.1 * frame, z)[0][-1]
        ends.append(z)
    assert_same(ends[0], ends[1])
