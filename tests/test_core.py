"""torchdeq 0.1.0's entry points. Tests named 'row n' repair row n of what 0.1.0 gets wrong."""

from __future__ import annotations

import argparse
import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

import torchdeq
from tests.problems import F64, TanhMap, cotangent, error, exact_gradient, solve_exactly
from torchdeq import (
    ConvergenceWarning,
    DEQBase,
    DEQConfig,
    DEQIndexing,
    DEQSliced,
    Status,
    add_deq_args,
    get_deq,
    register_deq,
    reset_deq,
)
from torchdeq.solver import anderson_solver, broyden_solver, fixed_point_iter, simple_fixed_point_iter

CORES = pytest.mark.parametrize("core", ["sliced", "indexing"])
TIGHT = {
    "f_solver": "anderson",
    "f_tol": 1e-12,
    "f_max_iter": 120,
    "b_solver": "anderson",
    "b_tol": 1e-12,
    "b_max_iter": 200,
}


def test_signatures_are_those_of_0_1_0():
    base = inspect.signature(DEQBase)
    assert str(base) == (
        "(args=None, f_solver='fixed_point_iter', b_solver='fixed_point_iter', no_stat=None, f_max_iter=40, "
        "b_max_iter=40, f_tol=0.001, b_tol=1e-06, f_stop_mode='abs', b_stop_mode='abs', eval_factor=1.0, "
        "eval_f_max_iter=0, **kwargs)"
    )
    for core in (DEQIndexing, DEQSliced):
        assert str(inspect.signature(core)) == (
            "(args=None, ift=False, hook_ift=False, grad=1, tau=1.0, sup_gap=-1, sup_loc=None, n_states=1, "
            "indexing=None, **kwargs)"
        )
    assert list(inspect.signature(get_deq).parameters) == ["args", "kwargs"]
    assert list(inspect.signature(DEQSliced.forward).parameters)[1:6] == [
        "func", "z_init", "solver_kwargs", "sradius_mode", "backward_writer",
    ]  # fmt: skip


def test_command_line_flags_and_defaults_are_those_of_0_1_0():
    parser = argparse.ArgumentParser()
    add_deq_args(parser)
    assert vars(parser.parse_args([])) == {
        "f_solver": "fixed_point_iter", "b_solver": "fixed_point_iter", "f_max_iter": 40, "b_max_iter": 40,
        "f_tol": 1e-3, "b_tol": 1e-6, "f_stop_mode": "abs", "b_stop_mode": "abs", "eval_factor": 1.0,
        "eval_f_max_iter": 0, "norm_type": "weight_norm", "norm_no_scale": False, "norm_clip": False,
        "norm_clip_value": 1.0, "norm_target_norm": 1.0, "sn_n_power_iters": 1, "core": "sliced", "ift": False,
        "hook_ift": False, "n_states": 1, "indexing": [], "gamma": 0.8, "grad": [1], "tau": 1.0, "sup_gap": -1,
        "sup_loc": [], "jac_loss_weight": 0.0, "jac_loss_freq": 0.0, "jac_incremental": 0, "sradius_mode": False,
    }  # fmt: skip
    args = parser.parse_args(["--grad", "1", "5", "--indexing", "10", "--hook_ift"])
    assert (args.grad, args.indexing, args.hook_ift) == ([1, 5], [10], True)


@CORES
def test_return_forms(core):
    f = TanhMap.make(gain=0.5)
    deq = get_deq(core=core, f_max_iter=30)
    states, info = deq(f, f.z0)
    assert isinstance(states, list)
    assert states[0].shape == f.x.shape
    assert info["abs_lowest"].shape == info["rel_lowest"].shape == info["nstep"].shape == (4,)
    assert info["abs_trace"].shape[0] == info["rel_trace"].shape[0] == 4
    assert info["nstep"].mean() > 1
    two = (torch.zeros(3, 2, 5), torch.zeros(3, 4))
    states, info = deq(lambda a, b: (0.4 * a + 1, 0.4 * b + a.mean((1, 2))[:, None]), two)
    assert isinstance(states[0], list)
    assert [s.shape for s in states[0]] == [(3, 2, 5), (3, 4)]
    states, _ = deq(lambda s: {"a": 0.4 * s["a"] + 1}, {"a": torch.zeros(2, 3)})
    assert states[0]["a"].shape == (2, 3)
    deq.eval()
    states, info = deq(f, f.z0)
    assert len(states) == 1
    assert torch.equal(info["sradius"], torch.zeros(1))


@CORES
@pytest.mark.parametrize("hook_ift", [False, True])
@pytest.mark.parametrize(
    "b_solver", ["anderson", "broyden", "fixed_point_iter", "simple_fixed_point_iter", "gmres"]
)
def test_ift_against_the_dense_gradient(core, hook_ift, b_solver):
    f = TanhMap.make(gain=0.7)
    g = cotangent(f.x)
    deq = get_deq({**TIGHT, "core": core}, ift=True, hook_ift=hook_ift, b_solver=b_solver)
    states, _ = deq(f, f.z0)
    assert error(torch.autograd.grad(states[-1], f.wanted, g), exact_gradient(f, f.z0, g, f.wanted)) < 1e-9
    # A tuple state, passed as two arguments.
    halves = lambda z: (z[:, :10], z[:, 10:])  # noqa: E731
    states, _ = deq(lambda a, b: halves(f(torch.cat([a, b], 1))), halves(f.z0))
    got = torch.autograd.grad(torch.cat(states[-1], 1), f.wanted, g)
    assert error(got, exact_gradient(f, f.z0, g, f.wanted)) < 1e-9


@CORES
def test_row_3_early_convergence_gives_all_states_and_the_last_is_exact(core):
    f = TanhMap.make(gain=0.5)
    g = cotangent(f.x)
    deq = get_deq({**TIGHT, "core": core}, ift=True, n_states=3)
    states, info = deq(f, f.z0)
    assert len(states) == 3
    assert info["nstep"].max() < 40, "it converges before the first sample is due"
    got = torch.autograd.grad(states[-1], f.wanted, g, retain_graph=True)
    assert error(got, exact_gradient(f, f.z0, g, f.wanted)) < 1e-9
    assert (states[-1] - solve_exactly(f, f.z0)).norm() < 1e-10
    assert all(state.requires_grad for state in states)


def test_indexing_samples_one_trajectory_at_the_evaluations_asked_for():
    f = TanhMap.make(gain=0.9)
    deq = DEQIndexing(indexing=[2, 5], f_max_iter=8, f_tol=1e-3)
    with pytest.warns(torchdeq.ConvergenceWarning):
        states, _ = deq(f, f.z0)
    trail = [f.z0]
    for _ in range(8):
        trail.append(f(trail[-1]).detach())
    # The k-th evaluation is at z_{k−1}; the one-step gradient returns f of it.
    for state, k in zip(states, (2, 5, 8), strict=True):
        assert torch.allclose(state, trail[k], atol=1e-14)


def test_sliced_goes_on_from_the_output_of_the_gradient_method():
    f = TanhMap.make(gain=0.9)
    deq = DEQSliced(indexing=[2], f_max_iter=5, grad=[3, 1])
    with pytest.warns(torchdeq.ConvergenceWarning):
        states, _ = deq(f, f.z0)
    trail = [f.z0]
    for _ in range(12):
        trail.append(f(trail[-1]).detach())
    assert torch.allclose(states[0], trail[1 + 3], atol=1e-14)  # 2 evaluations leave z_1, then 3 steps
    assert torch.allclose(states[1], trail[4 + 2 + 1], atol=1e-14)


def test_row_7_options_are_checked_and_nothing_of_the_callers_is_changed():
    with pytest.raises(TypeError, match=r"no option 'stop_mode'. Did you mean '[fb]_stop_mode'"):
        get_deq(stop_mode="rel")
    with pytest.raises(TypeError, match="'f_slover'. Did you mean 'f_solver'"):
        get_deq(f_slover="anderson")
    with pytest.raises(TypeError, match="'f_slover'. Did you mean 'f_solver'"):
        DEQSliced(f_slover="anderson")
    with pytest.raises(ValueError, match="no solver called 'andersen'. Did you mean 'anderson'"):
        get_deq(f_solver="andersen")
    with pytest.raises(ValueError, match="no DEQ core 'slice'. Did you mean 'sliced'"):
        get_deq(core="slice")
    with pytest.raises(ValueError, match="stop_mode"):
        get_deq(f_stop_mode="relative")
    args = {"f_solver": "anderson", "learning_rate": 1e-3}
    namespace = argparse.Namespace(**args)
    before = dict(args)
    deq = get_deq(args, f_solver="broyden")
    assert get_deq(namespace, f_tol=1e-7).f_tol == 1e-7
    assert args == before == vars(namespace)
    assert deq.f_solver is broyden_solver, "an explicit argument wins"
    assert DEQSliced({"ift": False}, ift=True).ift
    assert not DEQSliced({"ift": True}, ift=False).ift
    with pytest.warns(UserWarning, match="'f_solvr'.*Did you mean 'f_solver'"):
        get_deq({"f_solvr": "anderson"})
    f = TanhMap.make(gain=0.5)
    with pytest.raises(
        TypeError, match="no option 'f_maxiter'. Did you mean 'f_max_iter'|no option 'f_maxiter'"
    ):
        deq(f, f.z0, f_maxiter=3)
    with pytest.raises(TypeError, match="no option 'max_itr'. Did you mean 'max_iter'"):
        deq(f, f.z0, solver_kwargs={"max_itr": 3})


def test_row_7_no_stat_does_something():
    f = TanhMap.make(gain=0.5)
    calls = []
    deq = get_deq(no_stat=True, f_max_iter=13)
    _, info = deq(lambda z: calls.append(1) or f(z), f.z0)
    assert len(calls) == 13 + 1, "every evaluation, and no stop test in between"
    assert info["abs_trace"].shape == (4, 1)
    with pytest.raises(ValueError, match="only Picard iteration"):
        get_deq(no_stat=True, f_solver="anderson")


@CORES
def test_row_8_eval_mode_keeps_gradients_under_grad(core):
    f = TanhMap.make(gain=0.5)
    g = cotangent(f.x)
    deq = get_deq({**TIGHT, "core": core}, ift=True).eval()
    states, _ = deq(f, f.z0)
    assert error(torch.autograd.grad(states[-1], f.wanted, g), exact_gradient(f, f.z0, g, f.wanted)) < 1e-9
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            states, _ = deq(f, f.z0)
            assert not states[-1].requires_grad


@pytest.mark.parametrize("solver", [anderson_solver, broyden_solver, fixed_point_iter])
@pytest.mark.parametrize("max_iter", [1, 2, 3, 10])
def test_row_9_max_iter_counts_evaluations_for_every_solver(solver, max_iter):
    f = TanhMap.make(gain=0.9)
    calls = []
    z, states, info = solver(
        lambda z: calls.append(1) or f(z),
        f.z0,
        max_iter=max_iter,
        tol=1e-14,
        indexing=list(range(1, max_iter + 1)),
    )
    assert info["nfe"].tolist() == [len(calls)] * 4
    assert len(calls) == max_iter
    assert len(states) == max_iter
    assert torch.equal(states[0], f.z0)
    if max_iter > 1:
        assert (f(z) - z).norm() < (f(f.z0) - f.z0).norm()


@pytest.mark.parametrize("training", [True, False])
def test_a_logger_can_take_the_mean_of_every_statistic(training):
    told = []
    deq = get_deq(ift=True, f_tol=1e-3).train(training)
    f = TanhMap.make(batch=3)
    states, info = deq(f, f.z0, sradius_mode=True, backward_writer=told.append)
    states[-1].sum().backward()
    for stat in (info, *told):
        means = {key: value.mean() for key, value in stat.items()}
        assert all(mean.isfinite() for mean in means.values())
        assert means["converged"] == 1
        assert means["status"] == Status.CONVERGED
        assert stat["converged"].shape == stat["status"].shape == stat["nfe"].shape == (3,)
    assert len(told) == 1
    missed = get_deq(f_max_iter=3, f_tol=1e-12, f_solver="anderson").train(training)
    with pytest.warns(ConvergenceWarning):
        _, info = missed(f, f.z0)
    assert info["converged"].tolist() == [0.0] * 3
    assert info["status"].tolist() == [Status.MAX_ITER] * 3


def test_row_9_a_wrapped_memory_restarts():
    f = TanhMap.make(gain=1.1)
    z, _, info = broyden_solver(f, f.z0, max_iter=200, tol=1e-10, LBFGS_thres=4)
    assert info["converged"].all()
    assert (z - solve_exactly(f, f.z0)).norm() < 1e-7


def test_row_10_damping_does_not_loosen_the_tolerance():
    f = TanhMap.make(gain=0.5)
    z, _, info = fixed_point_iter(f, f.z0, tau=0.1, tol=1e-4, max_iter=400)
    r = (f(z) - z).norm(dim=1)
    assert (r <= 1e-4).all()
    assert torch.allclose(r, info["abs_lowest"])


@pytest.mark.parametrize("solver", [anderson_solver, broyden_solver, fixed_point_iter])
def test_row_11_the_statistics_are_those_of_the_state_and_the_trace_of_what_happened(solver):
    f = TanhMap.make(gain=0.9)
    z, _, info = solver(f, f.z0, max_iter=50, tol=1e-5)
    r, size = (f(z) - z).norm(dim=1), f(z).norm(dim=1)
    assert torch.allclose(info["abs_lowest"], r, rtol=1e-10)
    assert torch.allclose(info["rel_lowest"], r / size, rtol=1e-10)
    assert info["abs_trace"].shape == (4, info["nfe"][0])
    assert torch.allclose(info["abs_trace"][:, 0], (f(f.z0) - f.z0).norm(dim=1)), "no sentinel at the front"


def test_row_12_the_simple_solver_works_everywhere():
    f = TanhMap.make(gain=0.5)
    z, states, info = simple_fixed_point_iter(f, f.z0, max_iter=4, indexing=[1, 4])
    assert torch.equal(states[0], f(f.z0))
    assert torch.equal(z, states[1])
    assert torch.equal(z, f(f(f(f(f.z0)))))
    assert z.requires_grad, "it keeps the graph of its steps, as in 0.1.0"
    assert (info["nfe"] == 4).all()
    damped, _, _ = simple_fixed_point_iter(f, f.z0, max_iter=1, tau=0.5)
    assert torch.allclose(damped, 0.5 * f(f.z0))
    deq = get_deq(core="indexing", f_solver="simple_fixed_point_iter", f_max_iter=60).eval()
    halves = lambda z: (z[:, :10], z[:, 10:])  # noqa: E731
    states, _ = deq(lambda a, b: halves(f(torch.cat([a, b], 1))), halves(f.z0))
    assert (torch.cat(states[0], 1) - solve_exactly(f, f.z0)).norm() < 1e-9


@CORES
def test_row_17_modules_pickle_and_copy(core):
    deq = get_deq(core=core, f_solver="anderson", ift=True, n_states=2)
    f = TanhMap.make(gain=0.5)
    want = deq(f, f.z0)[0][-1]
    for other in (pickle.loads(pickle.dumps(deq)), copy.deepcopy(deq)):
        assert torch.equal(other(f, f.z0)[0][-1], want)


def test_prints_the_options_that_were_given():
    assert (
        repr(get_deq(f_solver="anderson", ift=True, f_tol=1e-3)) == "DEQSliced(f_solver='anderson', ift=True)"
    )


@CORES
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"indexing": [20, 10]}, "increase"),
        ({"indexing": [50]}, "within 1 … max_iter=40"),
        ({"n_states": 41}, "cannot sample 41 states from f_max_iter=40"),
        ({"n_states": 0}, "n_states"),
        ({"grad": [1, 2, 3]}, "one for each of the 1 sampled"),
        ({"grad": 0}, "steps"),
        ({"grad": 2, "sup_loc": [3]}, "beyond the last step"),
        ({"f_max_iter": -1}, "max_iter"),
    ],
)
def test_row_18_sampling_that_cannot_be_is_an_error(core, options, message):
    with pytest.raises(ValueError, match=message):
        get_deq(core=core, **options)


@CORES
def test_row_18_the_final_state_is_there_once_and_last(core):
    f = TanhMap.make(gain=0.4)
    for options, count in (
        ({"grad": 5, "sup_gap": 2}, 3),
        ({"grad": 5, "sup_loc": [2, 5]}, 2),
        ({"grad": 5, "sup_loc": [2]}, 2),
        ({"indexing": [10, 40]}, 2),
        ({"n_states": 3}, 3),
        ({"grad": [1, 4], "indexing": [10], "sup_loc": [3]}, 3),
    ):
        states, _ = get_deq(core=core, f_tol=1e-8, **options)(f, f.z0)
        assert len(states) == count, options
        assert (states[-1] - solve_exactly(f, f.z0)).norm() < 1e-7


@CORES
def test_row_19_writer_and_backward_writer(core):
    f = TanhMap.make(gain=0.5)
    for name in ("writer", "backward_writer"):
        stats = []
        states, _ = get_deq(core=core, ift=True, b_max_iter=100)(f, f.z0, **{name: stats.append})
        states[-1].sum().backward()
        assert len(stats) == 1
        assert stats[0]["abs_lowest"].max() <= 1e-6
    with pytest.raises(TypeError, match="two names of one argument"):
        get_deq()(f, f.z0, writer=print, backward_writer=print)


def test_attributes_and_per_call_settings_are_heard():
    f = TanhMap.make(gain=0.9)
    deq = get_deq(f_tol=1e-15, eval_factor=2.0)
    assert deq.eval_f_max_iter == 80
    with pytest.warns(torchdeq.ConvergenceWarning):
        assert deq(f, f.z0, solver_kwargs={"f_max_iter": 7})[1]["nfe"][0] == 7
    deq.f_max_iter = 9
    assert deq(f, f.z0)[1]["nfe"][0] == 9
    deq.eval()
    assert deq(f, f.z0)[1]["nfe"][0] == 80
    deq.eval_f_max_iter = 11
    assert deq(f, f.z0)[1]["nfe"][0] == 11
    assert deq(f, f.z0, solver_kwargs={"tol": 1.0})[1]["nfe"][0] < 11
    assert get_deq(eval_f_max_iter=5).eval_f_max_iter == 5
    assert get_deq(f_solver=torchdeq.Anderson(tol=1e-7)).f_tol == 1e-7
    deq = get_deq(f_solver="broyden")
    deq(f, f.z0, solver_kwargs={"LBFGS_thres": 5, "ls": True})


def test_the_spectral_radius_in_eval_mode():
    turn = 0.9 * torch.tensor([[0.5, -(0.75**0.5)], [0.75**0.5, 0.5]], dtype=F64)
    deq = get_deq(f_solver="anderson", f_tol=1e-8).eval()
    _, info = deq(lambda z: z @ turn.T + 1, torch.zeros(3, 2, dtype=F64), sradius_mode=True)
    assert torch.allclose(info["sradius"], torch.full((3,), 0.9, dtype=F64), atol=1e-9)


def test_classes_can_be_registered_and_derived():
    class Mine(DEQSliced):
        def __init__(self, args, extra=1, **kwargs):
            super().__init__(args, **kwargs)
            self.extra = extra

    class Foreign(nn.Module):
        def __init__(self, args):
            super().__init__()
            self.args = args

    register_deq("mine", Mine)
    register_deq("foreign", Foreign)
    try:
        assert get_deq(core="mine", f_tol=1e-7).f_tol == 1e-7
        assert get_deq({"core": "foreign"}, anything=3).args.get("anything") == 3
    finally:
        del torchdeq.core.CORES["mine"], torchdeq.core.CORES["foreign"]
    with pytest.raises(NotImplementedError, match="get_deq"):
        DEQBase()(torch.cos, torch.zeros(1, 1))


def test_config_reads_many_things_and_copies():
    class Settings:
        def __init__(self):
            self.f_tol = 0.5

    for source in ({"f_tol": 0.5}, argparse.Namespace(f_tol=0.5), Settings(), DEQConfig({"f_tol": 0.5})):
        config = DEQConfig(source)
        config.update(f_tol=0.1)
        assert config.get("f_tol") == 0.1
        assert DEQConfig(source).get("f_tol") == 0.5
    assert DEQConfig(None).get("f_tol", 7) == 7
    with pytest.raises(TypeError, match="configuration is"):
        DEQConfig(3)


def test_reset_deq_forgets_dropout_masks_and_a_solve_keeps_one():
    torch.manual_seed(0)
    drop = torchdeq.VariationalDropout(0.5)
    deq = get_deq(f_solver="anderson", f_tol=1e-6, ift=True)
    f = lambda z: 0.2 * drop(z) + 1  # noqa: E731
    first, info = deq(f, torch.zeros(4, 8))
    assert info["converged"].all()
    reset_deq(drop)
    second, _ = deq(f, torch.zeros(4, 8))
    assert not torch.equal(first[0], second[0])


def test_reset_deq_wants_a_module():
    with pytest.raises(
        TypeError, match=r"reset_deq\(model\): model is a function; expected the torch\.nn\.Module"
    ):
        reset_deq(lambda z: z)


@pytest.mark.parametrize(
    ("name", "core"), [("mine", "DEQSliced"), ("mine", DEQSliced()), (DEQSliced, "mine")]
)
def test_a_core_that_cannot_be_built_is_refused_where_it_is_registered(name, core):
    with pytest.raises(TypeError, match=r"expected a name and a class, not an object of one"):
        register_deq(name, core)
    assert name not in torchdeq.core.CORES


@pytest.mark.parametrize(
    ("name", "solver"), [("mine", "anderson"), ("mine", None), (torchdeq.Anderson, torchdeq.Anderson)]
)
def test_a_solver_that_is_none_is_refused_where_it_is_registered(name, solver):
    with pytest.raises(TypeError, match=r"register_solver\("):
        torchdeq.register_solver(name, solver)
    assert name not in torchdeq.SOLVERS


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("peaceman_rachford", "PeacemanRachford()"),
        ("PeacemanRachford", "PeacemanRachford()"),
        ("forward_backward", "ForwardBackward()"),
        ("newton_cg", "NewtonCG()"),
        ("fallback", "Fallback(Multisecant(), NewtonKrylov())"),
    ],
)
def test_a_solver_without_a_name_is_told_to_be_given_as_an_object(name, written):
    for ask in (
        lambda: get_deq(f_solver=name),
        lambda: torchdeq.as_solver(name),
        lambda: torchdeq.DEQ(torchdeq.as_solver(name)),
    ):
        with pytest.raises(ValueError, match="is given as an object") as caught:
            ask()
        assert f"DEQ({written})" in str(caught.value)
    solver = eval(written, vars(torchdeq))
    assert isinstance(get_deq(f_solver=solver), torch.nn.Module)
    assert repr(torchdeq.DEQ(solver).solver) == repr(solver)
