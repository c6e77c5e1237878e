"""`backward_factory` keeps its contract."""

from __future__ import annotations

import inspect
import pickle
from contextlib import nullcontext

import pytest
import torch

from tests.problems import SymmetricMap, TanhMap, cotangent, error, exact_gradient, solve_exactly
from torchdeq import (
    GMRES,
    IFT,
    SHINE,
    SOLVERS,
    Anderson,
    Broyden,
    ConvergenceWarning,
    FixedPointIteration,
    PhantomGrad,
    Reversible,
)
from torchdeq.grad import GradFunctor, backward_factory
from torchdeq.solver import SolverStat, anderson_solver


def test_the_signature_is_the_documented_one():
    assert [(p.name, p.default) for p in inspect.signature(backward_factory).parameters.values()] == [
        ("grad_type", "ift"),
        ("hook_ift", False),
        ("b_solver", None),
        ("b_solver_kwargs", {}),
        ("sup_gap", -1),
        ("sup_loc", None),
        ("tau", 1.0),
        ("grad_factory_kwargs", inspect.Parameter.empty),
    ]
    assert list(inspect.signature(backward_factory()).parameters)[:4] == [
        "trainer",
        "func",
        "z_pred",
        "writer",
    ]


def old_style_solver(func, x0, max_iter=50, tol=1e-3, stop_mode="abs", indexing=None, **kwargs):
    for _ in range(max_iter):
        x0 = func(x0)
    return x0, [], {}


@pytest.mark.parametrize("hook_ift", [False, True])
@pytest.mark.parametrize("b_solver", [None, *SOLVERS, Anderson(), anderson_solver, old_style_solver])
def test_b_solver_takes_a_name_an_object_a_function_or_none(b_solver, hook_ift):
    f = (SymmetricMap if b_solver == "cg" else TanhMap).make(gain=0.6)
    g = cotangent(f.x)
    functor = backward_factory(
        "ift", hook_ift=hook_ift, b_solver=b_solver, b_solver_kwargs={"max_iter": 120, "tol": 1e-12}
    )
    stats = []
    (z,) = functor(None, f, solve_exactly(f, f.z0), writer=stats.append)
    got = torch.autograd.grad(z, f.wanted, g)
    assert error(got, exact_gradient(f, f.z0, g, f.wanted)) < 1e-9
    assert len(stats) == 1, "the writer gets the statistics once per backward"
    assert isinstance(stats[0], dict)
    assert stats[0]["abs_lowest"].shape == (4,)
    assert stats[0]["rel_trace"].shape[0] == 4


def test_the_writer_is_called_once_per_backward():
    f = TanhMap.make()
    stats = []
    (z,) = backward_factory("ift", hook_ift=True)(None, f, solve_exactly(f, f.z0), stats.append)
    assert not stats
    for count in (1, 2):
        torch.autograd.grad(z.sum(), f.wanted, retain_graph=True)
        assert len(stats) == count
    assert isinstance(stats[0], SolverStat)


def test_a_number_is_a_phantom_gradient():
    f = TanhMap.make()
    states = backward_factory(5, tau=0.5, sup_gap=2)(None, f, f.z0)
    assert len(states) == 3
    states = backward_factory(5, sup_loc=[2, 5])(None, f, f.z0)
    assert len(states) == 2
    assert torch.equal(states[0], f(f(f.z0)))


@pytest.mark.parametrize("trainer", [None, torch.nn.Linear(2, 2)])
def test_nothing_is_kept_on_the_trainer_and_z_pred_is_not_changed(trainer):
    f = TanhMap.make()
    before = None if trainer is None else dict(vars(trainer))
    z_pred = solve_exactly(f, f.z0)
    kept = z_pred.clone()
    for hook in (False, True):
        (z,) = backward_factory("ift", hook_ift=hook)(trainer, f, z_pred)
        z.sum().backward()
    assert not z_pred.requires_grad
    assert torch.equal(z_pred, kept)
    if trainer is not None:
        assert dict(vars(trainer)) == before


def test_a_tuple_state_comes_back_as_a_tuple():
    f = lambda s: (0.5 * s[1] + 1, 0.5 * s[0])  # noqa: E731
    (z,) = backward_factory(3)(None, f, (torch.zeros(2, 3), torch.zeros(2, 3)))
    assert isinstance(z, tuple)
    assert z[0].shape == (2, 3)


@pytest.mark.parametrize(
    "call",
    [
        "backward_factory(1)",
        "backward_factory(5, sup_gap=2, tau=0.5)",
        "backward_factory(5, sup_loc=(2,))",
        "backward_factory('ift', b_solver=GMRES(tol=1e-05))",
        "backward_factory('ift', hook_ift=True, b_solver=Anderson(max_iter=7, m=3))",
    ],
)
def test_prints_compares_and_pickles(call):
    import torchdeq

    functor = eval(call, vars(torchdeq))
    assert repr(functor) == call
    assert pickle.loads(pickle.dumps(functor)) == functor
    assert isinstance(functor, GradFunctor)


def test_wrong_calls_teach():
    with pytest.raises(ValueError, match="no gradient method 'itf'. Did you mean 'ift'"):
        backward_factory("itf")
    with pytest.raises(ValueError, match="steps"):
        backward_factory(0)
    with pytest.raises(ValueError, match="no solver called 'andersen'. Did you mean 'anderson'"):
        backward_factory(b_solver="andersen")
    with pytest.raises(TypeError, match="no option 'stop_mod'. Did you mean 'stop_mode'"):
        backward_factory(b_solver="anderson", b_solver_kwargs={"stop_mod": "rel"})
    with pytest.warns(UserWarning, match="ignores the keyword .*Did you mean 'hook_ift'"):
        backward_factory(hook_itf=True)
    with pytest.warns(UserWarning, match="ignores sup_gap and tau: "):
        backward_factory("ift", sup_gap=2, tau=0.5)
    with pytest.raises(TypeError, match="name of a solver, a Solver or a solver function"):
        backward_factory(b_solver=3)


def test_an_unconverged_adjoint_warns_once_per_functor():
    f = TanhMap.make(gain=0.95)
    functor = backward_factory(b_solver="fixed_point_iter", b_solver_kwargs={"max_iter": 3})
    z_star = solve_exactly(f, f.z0)
    with pytest.warns(ConvergenceWarning, match="b_max_iter"):
        functor(None, f, z_star)[0].sum().backward()
    functor(None, f, z_star)[0].sum().backward()


def test_options_given_to_the_factory_are_not_changed():
    options = {"max_iter": 7}
    backward_factory(b_solver="anderson", b_solver_kwargs=options)
    assert options == {"max_iter": 7}
    assert inspect.signature(backward_factory).parameters["b_solver_kwargs"].default == {}


@pytest.mark.parametrize(
    "options",
    [
        {"hook_ift": True},
        {"b_solver": "gmres"},
        {"b_solver_kwargs": {"tol": 1}},
        {"sup_gap": 2},
        {"sup_loc": [1]},
        {"tau": 0.5},
    ],
)
def test_options_beside_a_method_that_has_its_own_are_refused(options):
    for method in (IFT(), PhantomGrad(steps=3)):
        assert backward_factory(method).method is method
        with pytest.raises(TypeError, match=f"{next(iter(options))}=.*has its options already"):
            backward_factory(method, **options)


@pytest.mark.parametrize("grad_type", [3, "jfb", "phantom_neumann"])
def test_a_hook_of_a_method_that_has_none_is_ignored_with_a_warning(grad_type):
    with pytest.warns(UserWarning, match="ignores hook_ift: only 'ift' has a hook"):
        assert backward_factory(grad_type, hook_ift=True) == backward_factory(grad_type)


def test_an_adjoint_solver_of_a_phantom_gradient_is_ignored_with_a_warning():
    with pytest.warns(UserWarning, match="ignores b_solver and b_solver_kwargs"):
        backward_factory(3, b_solver="gmres", b_solver_kwargs={"tol": 1e-3})


@pytest.mark.parametrize("grad_type", ["shine", "reversible", SHINE(), Reversible(beta=0.3)])
def test_methods_that_make_the_solve_are_refused_at_once_without_a_solver(grad_type):
    with pytest.raises(TypeError, match=r"needs the forward solve.*DEQ\(solver, grad=.*b_solver="):
        backward_factory(grad_type)


@pytest.mark.parametrize(
    ("grad_type", "solver", "bound"),
    [
        ("unroll", FixedPointIteration(tol=1e-12, max_iter=200), 1e-10),
        ("reversible", FixedPointIteration(tol=0.0, max_iter=41), 1e-4),  # (1 − β(1 − γ))⁴¹ with γ = 0.6
        (SHINE(refine=GMRES(tol=1e-12)), Broyden(tol=1e-12), 1e-10),
    ],
    ids=["unroll", "reversible", "shine"],
)
def test_methods_that_make_the_solve_begin_it_at_the_given_state(grad_type, solver, bound):
    f = TanhMap.make(gain=0.3)
    functor = backward_factory(grad_type, b_solver=solver)
    assert functor.solver is not None
    assert repr(functor.solver) in repr(functor)
    context = pytest.warns(ConvergenceWarning) if solver.tol == 0 else nullcontext()
    with context:
        z = functor(None, f, f.z0)[-1]
    g = cotangent(z)
    assert error(torch.autograd.grad(z, f.wanted, g), exact_gradient(f, f.z0, g, f.wanted)) < bound


def test_unrolling_is_of_fifty_steps_unless_a_solver_says_otherwise():
    f = TanhMap.make(gain=0.8)
    z_star = solve_exactly(f, f.z0)
    z = backward_factory("unroll")(None, f, z_star)[-1]
    g = cotangent(z)
    assert error(torch.autograd.grad(z, f.wanted, g), exact_gradient(f, f.z0, g, f.wanted)) < 1e-4  # 0.8⁵⁰
    few = backward_factory("unroll", b_solver_kwargs={"max_iter": 3})(None, f, z_star)[-1]
    want = f(f(f(z_star)))
    assert error(torch.autograd.grad(few, f.wanted, g), torch.autograd.grad(want, f.wanted, g)) < 1e-12


def test_numbers_and_options_of_other_kinds():
    three = torch.tensor([3]).numpy()[0]
    assert backward_factory(three, sup_gap=three).method == PhantomGrad(steps=3, sup_gap=3)
    assert backward_factory(three, sup_loc=[three]).method == PhantomGrad(steps=3, sup_loc=(3,))
    assert backward_factory(b_solver="gmres", b_solver_kwargs=None).method == IFT(solver=GMRES())
    with pytest.raises(TypeError, match="b_solver_kwargs=3.*mapping"):
        backward_factory(b_solver_kwargs=3)
    with pytest.raises(ValueError, match="no gradient method True"):
        backward_factory(True)


@pytest.mark.parametrize("name", ["unroll", "reversible"])
def test_from_a_solved_state_every_evaluation_counts(name):
    """Not the one-step gradient, though the stop test is met at once."""
    f = TanhMap.make(gain=0.3)
    z_star = solve_exactly(f, f.z0)
    functor = backward_factory(
        name, b_solver="fixed_point_iter", b_solver_kwargs={"max_iter": 41, "tol": 1e-6}
    )
    z = functor(None, f, z_star)[-1]
    g = cotangent(z)
    assert error(torch.autograd.grad(z, f.wanted, g), exact_gradient(f, f.z0, g, f.wanted)) < 1e-4


def test_shine_refuses_a_state_from_which_nothing_can_be_learned():
    f = TanhMap.make(gain=0.3)
    with pytest.raises(ValueError, match="learned nothing"):
        backward_factory("shine", b_solver="broyden")(None, f, solve_exactly(f, f.z0))
