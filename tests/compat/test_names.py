"""Every public name of 0.1.0 is where it was, and takes what it took.

The tables are written out, so that names are checked without the wheel too; with it the tables themselves are checked.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
from typing import Any

import pytest

import torchdeq

#: What each module of 0.1.0 defined.
DEFINED = {
    "core": "DEQBase DEQIndexing DEQSliced get_deq register_deq reset_deq",
    "dropout": "VariationalDropout VariationalDropout1d VariationalDropout2d VariationalDropout3d reset_dropout "
    "VariationalDropToken1d VariationalDropToken2d VariationalDropToken3d",
    "grad": "backward_factory make_pair",
    "loss.correction": "fp_correction register_weight_func",
    "loss.jacobian": "jac_reg power_method",
    "norm": "",
    "norm.spectral_norm": "SpectralNorm",
    "norm.weight_norm": "WeightNorm",
    "solver": "get_solver register_solver",
    "solver.anderson": "anderson_solver",
    "solver.broyden": "broyden_solver",
    "solver.fp_iter": "fixed_point_iter simple_fixed_point_iter",
    "solver.stat": "SolverStat",
    "solver.utils": "init_solver_info batch_masked_mixing batch_flatten update_state solver_stat_from_info "
    "solver_stat_from_final_step dummy_solver_stat",
    "utils.arg_utils": "add_deq_args",
    "utils.config": "DEQConfig",
    "utils.init": "mixed_init",
    "utils.layer_utils": "DEQWrapper MDEQWrapper SpeedyMDEQWrapper deq_decorator",
    "utils.mem": "mem_gc",
}

#: What could be imported from its packages besides.
GATHERED = {
    "": "add_deq_args get_deq register_deq reset_deq register_solver get_solver solver_stat_from_final_step apply_norm "
    "reset_norm remove_norm register_norm register_norm_module VariationalDropout VariationalDropout1d "
    "VariationalDropout2d VariationalDropout3d VariationalDropToken1d VariationalDropToken2d VariationalDropToken3d "
    "reset_dropout fp_correction register_weight_func jac_reg power_method mixed_init mem_gc "
    "core dropout grad loss norm solver utils",
    "loss": "fp_correction register_weight_func jac_reg power_method",
    "norm": "apply_norm reset_norm remove_norm register_norm register_norm_module",
    "solver": "anderson_solver broyden_solver fixed_point_iter simple_fixed_point_iter solver_stat_from_final_step",
    "utils": "mixed_init mem_gc add_deq_args",
}

#: What is not here: parts of an implementation that is another now.
GONE = {
    "loss": "",
    "norm.base_norm": "apply_norm reset_norm remove_norm register_norm register_norm_module: import them from "
    "torchdeq.norm",
    "solver.broyden": "scalar_search_armijo line_search rmatvec matvec: the line search and the inverse of Broyden",
    "utils.mem": "filter_input filter_out reset_grad DEQGradCkpt: mem_gc is made of torch.utils.checkpoint",
}

#: Parameters that accept what they accepted, and differ in sight; and why.
DIFFERENT = {
    ("core.DEQSliced.forward", "z_star"): "is called z_init, as in the other classes",
    ("utils.config.DEQConfig", "config"): "may be left out",
    ("grad.backward_factory", "b_solver_kwargs"): "an empty mapping in both, though not the same one",
    ("utils.layer_utils.MDEQWrapper.list2vec", "z_list"): "is called z, as in the class that it overrides",
    ("utils.layer_utils.MDEQWrapper.vec2list", "z_hid"): "is called z, as in the class that it overrides",
    ("utils.layer_utils.MDEQWrapper.detach", "z_hid"): "is called z, as in the class that it overrides",
    ("utils.layer_utils.MDEQWrapper.__call__", "z_hid"): "is called z, as in the class that it overrides",
    (
        "utils.layer_utils.SpeedyMDEQWrapper.detach",
        "z_list",
    ): "is called z, as in the class that it overrides",
    (
        "utils.layer_utils.SpeedyMDEQWrapper.__call__",
        "z_list",
    ): "is called z, as in the class that it overrides",
    ("utils.layer_utils.DEQWrapper.norm_diff", "kwargs"): "the one keyword in use has a name, show_list",
}

#: Classes that `apply_norm` makes, never a program: their constructors and methods are others now.
INNER = ("norm.spectral_norm.SpectralNorm", "norm.weight_norm.WeightNorm")

NAMES = sorted(
    {
        (module, name)
        for table in (DEFINED, GATHERED)
        for module, names in table.items()
        for name in names.split()
    }
)


def ours(module: str, name: str) -> Any:
    return getattr(importlib.import_module(".".join(["torchdeq", *filter(None, [module])])), name)


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_the_name_is_where_it_was(module, name):
    assert ours(module, name) is not None


@pytest.mark.parametrize("module", sorted({**DEFINED, **GATHERED, **GONE}))
def test_the_tables_are_those_of_the_wheel(old, module):
    package = importlib.import_module(".".join(filter(None, ["torchdeq_peer", module])))
    public = {
        n for n, v in vars(package).items() if not n.startswith("_") and inspect.getmodule(v) is not None
    }
    defined = {n for n in public if getattr(vars(package)[n], "__module__", "") == package.__name__}
    gone = set(GONE.get(module, "").split(":")[0].split())
    assert defined == set(DEFINED.get(module, "").split()) | gone
    assert set(GATHERED.get(module, "").split()) <= public


def test_the_modules_are_those_of_the_wheel(old):
    from tests.compat.peer import MODULES

    assert set(MODULES) == {name for name in {**DEFINED, **GATHERED, **GONE} if name}


def accepts_all(new: inspect.Signature, was: inspect.Signature, call: str) -> None:
    """Whether every call that bound to `was` binds to `new`, to parameters of the same names and defaults."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    old_parameters = [p for p in was.parameters.values() if (call, p.name) not in DIFFERENT]
    places = [p.name for p in new.parameters.values() if p.kind in positional]
    for at, parameter in enumerate(was.parameters.values()):
        if parameter not in old_parameters:
            continue
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            assert any(p.kind is parameter.kind for p in new.parameters.values()), (
                f"{call}(**{parameter.name})"
            )
            continue
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            assert any(p.kind is parameter.kind for p in new.parameters.values()), (
                f"{call}(*{parameter.name})"
            )
            continue
        here = new.parameters.get(parameter.name)
        assert here is not None, f"{call} has no parameter {parameter.name}"
        assert places.index(parameter.name) == at, f"{call}: {parameter.name} stands elsewhere"
        assert here.default == parameter.default, f"{call}({parameter.name}={here.default})"
    for name, here in new.parameters.items():
        optional = here.default is not here.empty or here.kind in (here.VAR_KEYWORD, here.VAR_POSITIONAL)
        added = name not in was.parameters and not any(key == (call, name) for key in DIFFERENT)
        assert optional or not added or any(call == key[0] for key in DIFFERENT), f"{call} asks for {name}"


CALLS = [
    (module, name)
    for module, names in DEFINED.items()
    for name in names.split()
    if f"{module}.{name}" not in INNER
]


@pytest.mark.parametrize(("module", "name"), CALLS)
def test_the_signature_accepts_what_it_accepted(old, module, name):
    was = getattr(importlib.import_module(f"torchdeq_peer.{module}"), name)
    here = ours(module, name)
    accepts_all(inspect.signature(here), inspect.signature(was), f"{module}.{name}")
    if not inspect.isclass(was):
        return
    for method, function in inspect.getmembers(was, callable):
        if method.startswith("_") and method not in ("__call__",):
            continue
        if not str(getattr(function, "__module__", "")).startswith("torchdeq_peer"):
            continue  # inherited from torch or dict
        assert hasattr(here, method), f"{name}.{method} is missing"
        accepts_all(
            inspect.signature(getattr(here, method)), inspect.signature(function), f"{module}.{name}.{method}"
        )


def flags(add_deq_args: Any) -> dict[str, tuple[Any, ...]]:
    parser = argparse.ArgumentParser()
    add_deq_args(parser)
    return {
        action.option_strings[0]: (action.dest, action.default, action.type, action.nargs, action.const)
        for action in parser._actions
        if action.dest != "help"
    }


def test_the_command_line_has_the_same_flags(old):
    """The choices of --b_solver were a fixed list, and are what is registered."""
    new, was = flags(torchdeq.add_deq_args), flags(old.add_deq_args)
    for table in (new, was):
        table["--b_solver"] = table["--b_solver"][:2]  # ours reads the word, to name the nearest solver
    assert new == was
    words = "--f_solver broyden --b_solver anderson --ift --grad 1 2 --indexing 3 9 --tau .5 --sup_loc 1 --norm_clip"
    for line in (
        "",
        words,
        "--hook_ift --n_states 3 --f_tol 1e-4 --norm_type none --jac_loss_freq .2 --sradius_mode",
    ):
        values = []
        for lib in (torchdeq, old):
            parser = argparse.ArgumentParser()
            lib.add_deq_args(parser)
            values.append(vars(parser.parse_args(line.split())))
        assert values[0] == values[1]
