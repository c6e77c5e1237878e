"""What 0.1.0 gets wrong, row by row of the page "Coming from torchdeq 0.1.0", and what is right instead.

Each test also shows 0.1.0's answer, so that a row cannot outlive its reason. Further tests of a row stand beside the
code that repairs it, under names that begin alike.
"""

from __future__ import annotations

import argparse
import copy
import math
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import torchdeq
from tests.problems import F64, TanhMap, cotangent, error, exact_gradient, solve_exactly

ROWS = range(1, 21)
TIGHT = {
    "f_solver": "anderson",
    "f_tol": 1e-12,
    "f_max_iter": 120,
    "b_solver": "anderson",
    "b_tol": 1e-12,
    "b_max_iter": 200,
}
quiet = pytest.mark.filterwarnings("ignore::torchdeq.ConvergenceWarning", "ignore::torchdeq.CouplingWarning")


def test_every_row_has_a_test():
    text = "\n".join(
        path.read_text(encoding="utf-8") for path in Path(__file__).parent.parent.rglob("test_*.py")
    )
    tested = {int(number) for number in re.findall(r"^def test_row_(\d+)_\w+\(", text, re.M)}
    assert tested == set(ROWS)


def libraries(old: Any) -> list[Any]:
    return [torchdeq] if old is None else [torchdeq, old]


def residual(f: Any, z: torch.Tensor) -> torch.Tensor:
    return (f(z) - z).detach().norm(dim=1)


def test_row_1_every_backward_through_a_hook_solves(old_or_none):
    for lib in libraries(old_or_none):
        f = TanhMap.make(gain=0.7)
        g = cotangent(f.x)
        deq = lib.get_deq({**TIGHT, "hook_ift": True})
        z = deq(f, f.z0)[0][-1]
        torch.autograd.grad(z, f.wanted, g, retain_graph=True)
        again = torch.autograd.grad(z, f.wanted, g)
        wrong = error(again, exact_gradient(f, f.z0, g, f.wanted))
        assert wrong < 1e-9 if lib is torchdeq else wrong > 0.1
    # Two calls before one backward: 0.1.0 does not return from it.
    f, deq = TanhMap.make(gain=0.7), torchdeq.get_deq({**TIGHT, "hook_ift": True})
    both = deq(f, f.z0)[0][-1] + deq(f, f.z0)[0][-1]
    got = torch.autograd.grad(both, f.wanted, cotangent(f.x))
    assert error(got, [2 * g for g in exact_gradient(f, f.z0, cotangent(f.x), f.wanted)]) < 1e-9


@pytest.mark.parametrize("hook", [False, True])
def test_row_2_second_derivatives_are_right_or_an_error(old_or_none, hook):
    a = torch.tensor(0.5, dtype=F64, requires_grad=True)
    f, z0, want = lambda z: a * z + 1, torch.zeros(1, 1, dtype=F64), 2 / (1 - 0.5) ** 3
    z, _ = torchdeq.DEQ(torchdeq.Anderson(tol=1e-12), torchdeq.IFT(order=2))(f, z0)
    (first,) = torch.autograd.grad(z.sum(), a, create_graph=True)
    assert abs(torch.autograd.grad(first, a)[0].item() - want) < 1e-6
    z = torchdeq.get_deq({**TIGHT, "ift": True, "hook_ift": hook})(f, z0)[0][-1]
    (first,) = torch.autograd.grad(z.sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="order=2"):
        torch.autograd.grad(first, a)
    if old_or_none is not None:
        z = old_or_none.get_deq({**TIGHT, "ift": not hook, "hook_ift": hook})(f, z0)[0][-1]
        (first,) = torch.autograd.grad(z.sum(), a, create_graph=True)
        (second,) = torch.autograd.grad(first, a, allow_unused=True) if first.requires_grad else (None,)
        assert second is None or abs(second.item() - want) > 1


def test_row_3_the_states_that_were_asked_for(old_or_none):
    for lib in libraries(old_or_none):
        f = TanhMap.make(gain=0.5)
        deq = lib.get_deq(
            {**TIGHT, "f_solver": "fixed_point_iter", "f_tol": 1e-3, "core": "indexing"}, n_states=3, ift=True
        )
        states, info = deq(f, f.z0)
        assert info["nstep"].max() < 40, "it converges before the first sample is due"
        assert len(states) == (3 if lib is torchdeq else 1)


@quiet
def test_row_4_a_sample_that_is_not_finite(old_or_none):
    for lib in libraries(old_or_none):
        f, calls = TanhMap.make(gain=0.5), []

        def breaks(z, f=f, calls=calls):
            calls.append(1)
            out = f(z).detach()
            return out if len(calls) < 4 else out.index_fill(0, torch.tensor([1]), math.nan)

        z, _, info = lib.get_solver("fixed_point_iter")(breaks, f.z0, tol=1e-8, max_iter=60)
        if lib is torchdeq:
            assert z.isfinite().all()
            assert info["status"].tolist() == [0, 2, 0, 0]
            assert len(calls) < 60
        else:
            assert z[1].isnan().all()
            assert len(calls) == 60


def test_row_5_anderson_does_not_see_the_scale(old_or_none):
    f = TanhMap.make(gain=0.9, batch=1)

    def evaluations(lib: Any, scale: float) -> int:
        calls: list[int] = []
        lib.get_solver("anderson")(
            lambda z: (calls.append(1), scale * f(z / scale).detach())[1],
            f.z0,
            tol=1e-6 * scale,
            max_iter=400,
        )
        return len(calls)

    assert evaluations(torchdeq, 1.0) == evaluations(torchdeq, 2.0**-10) < 60
    torchdeq.solver.anderson_solver(torch.cos, f.z0, m=1)
    if old_or_none is not None:
        assert evaluations(old_or_none, 2.0**-10) > 1.3 * evaluations(old_or_none, 1.0)
        with pytest.raises(IndexError):
            old_or_none.get_solver("anderson")(torch.cos, f.z0, m=1)


def test_row_6_the_adjoint_tolerance_is_relative_and_a_shortfall_is_told(old_or_none):
    for lib in libraries(old_or_none):
        f = TanhMap.make(gain=0.8)
        g = cotangent(f.x)
        z = lib.get_deq({**TIGHT, "b_tol": 1e-6}, ift=True)(f, f.z0)[0][-1]
        got = [grad * 1e8 for grad in torch.autograd.grad(z, f.wanted, 1e-8 * g)]
        wrong = error(got, exact_gradient(f, f.z0, g, f.wanted))
        assert wrong < 1e-5 if lib is torchdeq else wrong > 0.1
    slow = torch.full((1, 1), 0.99, dtype=F64, requires_grad=True)
    for lib in libraries(old_or_none):
        deq = lib.get_deq(f_solver="anderson", ift=True, b_max_iter=40)
        z = deq(lambda z: slow * z + 1, torch.full((1, 1), 100.0, dtype=F64))[0][-1]
        if lib is torchdeq:
            with pytest.warns(torchdeq.ConvergenceWarning):
                torch.autograd.grad(z.sum(), slow)
        else:
            (grad,) = torch.autograd.grad(z.sum(), slow)
            assert abs(grad.item() / 100 / 100 - 1) > 0.5, "without a word"


def test_row_7_options_are_heard_or_refused(old_or_none):
    with pytest.raises(TypeError, match="Did you mean 'f_solver'"):
        torchdeq.get_deq(f_slover="anderson")
    kept = {"f_tol": 1e-3}
    torchdeq.get_deq(kept, f_tol=1e-7)
    assert kept == {"f_tol": 1e-3}
    keys = {}
    for lib in libraries(old_or_none):
        model = nn.Linear(2, 2)
        lib.apply_norm(model, "spectral_norm", args=argparse.Namespace(norm_type="weight_norm"))
        keys[lib.__name__] = "weight_orig" in model.state_dict()
    assert keys["torchdeq"]
    if old_or_none is not None:
        old_or_none.get_deq(f_slover="anderson")
        old_or_none.get_deq(kept, f_tol=1e-7)
        assert kept == {"f_tol": 1e-7}
        assert not keys["torchdeq_peer"]


def test_row_8_derivatives_in_eval_mode(old_or_none):
    for lib in libraries(old_or_none):
        f = TanhMap.make(gain=0.5)
        z = lib.get_deq({**TIGHT, "ift": True}).eval()(f, f.z0)[0][-1]
        assert z.requires_grad is (lib is torchdeq)


@pytest.mark.parametrize("name", ["anderson", "broyden", "fixed_point_iter"])
def test_row_9_max_iter_is_the_number_of_evaluations(old_or_none, name):
    for lib in libraries(old_or_none):
        f, calls = TanhMap.make(gain=0.9), []
        z, _, _ = lib.get_solver(name)(
            lambda z, f=f, calls=calls: (calls.append(1), f(z))[1], f.z0, max_iter=2, tol=1e-14
        )
        if lib is torchdeq or name == "fixed_point_iter":
            assert len(calls) == 2
            assert not torch.equal(z, f.z0)
        elif name == "anderson":
            assert torch.equal(z, f.z0), "no step at all"
        else:
            assert len(calls) == 3


def test_row_10_the_residual_is_that_of_f_whatever_the_damping(old_or_none):
    for lib in libraries(old_or_none):
        f = TanhMap.make(gain=0.5)
        z, _, _ = lib.get_solver("fixed_point_iter")(f, f.z0, tau=0.1, tol=1e-4, max_iter=400)
        met = residual(f, z) <= 1e-4
        assert met.all() if lib is torchdeq else not met.any()


@quiet
def test_row_11_the_residual_is_that_of_the_state(old_or_none):
    for lib in libraries(old_or_none):
        f = TanhMap.make(gain=0.9)
        z, _, info = lib.get_solver("anderson")(f, f.z0, max_iter=8, tol=1e-9)
        told = torch.allclose(info["abs_lowest"], residual(f, z).to(info["abs_lowest"].dtype), rtol=1e-5)
        assert told is (lib is torchdeq)
        assert (info["abs_trace"][0, 0].item() == 1e8) is (lib is not torchdeq)


def test_row_12_the_simple_solver_takes_any_function(old_or_none):
    for lib in libraries(old_or_none):
        f = TanhMap.make(gain=0.5)
        solve = lib.get_solver("simple_fixed_point_iter")
        if lib is torchdeq:
            assert (solve(f, f.z0)[0] - solve_exactly(f, f.z0)).norm() < 1e-9
        else:
            with pytest.raises(TypeError, match="tau"):
                solve(f, f.z0)


def test_row_13_weights_and_masks_are_of_the_kind_of_their_input(old_or_none):
    states = [torch.ones(2, dtype=F64), torch.zeros(2, dtype=F64)]
    loss = torchdeq.fp_correction(nn.MSELoss(), (states, states[1]), weight_func="const", gamma=0.9)
    assert (loss.shape, loss.dtype, loss.item()) == ((), F64, 1.0)
    for lib in libraries(old_or_none):
        out = lib.VariationalDropout(1.0)(torch.ones(3))
        assert out.isnan().all() if lib is not torchdeq else torch.equal(out, torch.zeros(3))
        layer = nn.Linear(2, 2, dtype=F64)
        lib.apply_norm(layer, "spectral_norm")
        assert layer.weight_g.dtype == (F64 if lib is torchdeq else torch.float32)
    if old_or_none is not None:
        with pytest.raises(TypeError, match="gamma"):
            old_or_none.fp_correction(nn.MSELoss(), (states, states[1]), weight_func="const", gamma=0.9)


def test_row_14_normed_weights_are_never_stale(old_or_none):
    for lib in libraries(old_or_none):
        torch.manual_seed(0)
        layer, x = nn.Linear(3, 3), torch.ones(1, 3)
        lib.apply_norm(layer, "spectral_norm")
        layer(x).sum().backward()
        trained = [p for name, p in layer.named_parameters() if "bias" not in name and p.grad is not None]
        assert bool(trained) is (lib is torchdeq), "without reset_norm"
        layer = nn.Linear(3, 3)
        lib.apply_norm(layer, "weight_norm")
        lib.reset_norm(layer)
        before = layer(x)
        with torch.no_grad():
            layer.weight_g.mul_(2)
        assert torch.equal(layer(x), before) is (lib is not torchdeq), "after a step of the optimiser"
        moved = layer.double()
        assert (moved.weight.dtype == F64) is (lib is torchdeq)
        if lib is torchdeq:
            assert torch.equal(copy.deepcopy(layer).weight, layer.weight)
        else:
            with pytest.raises(RuntimeError, match="deepcopy"):
                copy.deepcopy(layer)


def test_row_15_forward_mode_and_recomputation(old_or_none):
    a, z0, want = torch.tensor(0.5, dtype=F64), torch.zeros(1, 1, dtype=F64), 1 / (1 - 0.5) ** 2

    def tangent(deq: Any) -> float:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(a, torch.ones_like(a))
            z = deq(lambda z: dual * z + 1, z0)[0][-1]
            return forward_ad.unpack_dual(z).tangent.item()

    assert abs(tangent(torchdeq.get_deq({**TIGHT, "ift": True})) - want) < 1e-6
    if old_or_none is not None:
        assert abs(tangent(old_or_none.get_deq({**TIGHT, "hook_ift": True})) - want) > 1
    for lib in libraries(old_or_none):
        torch.manual_seed(0)
        x, drop = torch.ones(50, requires_grad=True), nn.Dropout(0.5)
        y = lib.mem_gc(drop, (x,))
        y.sum().backward()
        assert torch.equal(x.grad, y.detach()) is (lib is torchdeq), "the mask is that of the forward pass"


def test_row_16_the_radius_of_a_complex_pair_and_of_nothing(old_or_none):
    turn = 0.9 * torch.tensor([[0.5, -math.sqrt(0.75)], [math.sqrt(0.75), 0.5]], dtype=F64)
    for lib in libraries(old_or_none):
        torch.manual_seed(0)
        z = torch.zeros(8, 2, dtype=F64, requires_grad=True)
        pair = lib.power_method(z @ turn.T, z)[1]
        zero = lib.power_method(0 * z, z)[1]
        if lib is torchdeq:
            assert ((pair - 0.9).abs() < 0.009).all()
            assert (zero == 0).all()
        else:
            assert ((pair - 0.9).abs() > 0.2).any()
            assert zero.isnan().all()


def test_row_17_what_f_returns_is_checked_and_more_states_are_taken(old_or_none):
    f = TanhMap.make(gain=0.5, n=6)
    for lib in libraries(old_or_none):
        deq, wrong = lib.get_deq(f_solver="anderson"), lambda z: f(z).T  # as many numbers, in another order
        if lib is torchdeq:
            with pytest.raises(ValueError, match="f returned shape"):
                deq(wrong, f.z0)
            assert deq(lambda s: {"a": f(s["a"])}, {"a": f.z0})[0][-1]["a"].shape == f.z0.shape
            assert deq(torch.cos, torch.zeros(0, 6))[0][-1].shape == (0, 6)
            assert repr(pickle.loads(pickle.dumps(deq))) == repr(deq)
        else:
            with torch.no_grad():
                assert lib.get_solver("anderson")(wrong, f.z0, max_iter=9)[0].shape == f.z0.shape, (
                    "without a word"
                )
            with pytest.raises((AssertionError, AttributeError)):
                deq(lambda s: {"a": f(s["a"])}, {"a": f.z0})
            with pytest.raises((AttributeError, pickle.PicklingError)):
                pickle.dumps(deq)


@pytest.mark.parametrize(
    ("options", "ours", "theirs"),
    [
        ({"grad": 5, "sup_gap": 2}, 3, 2),
        ({"grad": 5, "sup_loc": [5]}, 1, 2),
        ({"grad": 5, "sup_loc": [2, 5]}, 2, 3),
    ],
    ids=str,
)
def test_row_18_the_final_state_once(old_or_none, options, ours, theirs):
    for lib in libraries(old_or_none):
        f = TanhMap.make(gain=0.5)
        assert len(lib.get_deq(**options)(f, f.z0)[0]) == (ours if lib is torchdeq else theirs)
    for wrong in ({"indexing": [20, 10]}, {"n_states": 50}):
        with pytest.raises(ValueError, match="sample"):
            torchdeq.get_deq(**wrong)
        if old_or_none is not None:
            old_or_none.get_deq(**wrong)


def test_row_19_a_writer_is_heard_under_either_name(old_or_none):
    for lib in libraries(old_or_none):
        f, heard = TanhMap.make(gain=0.5), []
        z = lib.get_deq({**TIGHT, "ift": True})(f, f.z0, writer=heard.append)[0][-1]
        z.sum().backward()
        assert len(heard) == (1 if lib is torchdeq else 0)


@quiet
def test_row_20_the_state_of_coupled_samples_is_one_iterate(old_or_none):
    """A rotation that hardly contracts: the residual of one sample is least where that of the other is largest."""
    turn = 0.98 * torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=F64)
    f = lambda z: turn @ z + torch.tensor([[1.0], [3.0]], dtype=F64)  # noqa: E731
    for lib in libraries(old_or_none):
        z, _, info = lib.get_solver("fixed_point_iter")(
            f, torch.zeros(2, 1, dtype=F64), max_iter=20, tol=1e-6
        )
        told = torch.allclose(info["abs_lowest"], residual(f, z), rtol=0.1)
        assert told is (lib is torchdeq)
