"""One call of each public name of torchdeq 0.1.0, made to ours and to its own wheel: the same values, shapes and types.

This is the list to look at first. `tests/compat` goes through the options of each: cores, solvers, gradients, norms,
signatures, the rows of what 0.1.0 gets wrong, and whole programs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdeq
from tests.compat.conftest import old  # noqa: F401 - the fixture
from tests.compat.same import CLOSE, TIGHT, assert_same, gradients, small, start_of_two
from tests.problems import F64


def data(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(7))


def solved(lib: Any, **options: Any) -> Any:
    """States, keys of the statistics and gradients of one training step."""
    f = small()
    states, info = lib.get_deq(dict(TIGHT), **options)(f, f.z0)
    return [z.detach() for z in states], gradients(states, f.wanted), info["abs_lowest"].shape


def by_name(lib: Any, name: str) -> Any:
    f = small()
    z, _, info = lib.get_solver(name)(f, f.z0, max_iter=108, tol=1e-13)
    return z.detach(), info["nstep"].shape


def registered_solver(lib: Any) -> Any:
    def halves(func: Any, x0: Tensor, max_iter: int = 50, tol: float = 1e-3, **kwargs: Any) -> Any:
        z = x0
        for _ in range(max_iter):
            z = 0.5 * (z + func(z))
        return z, [], lib.solver_stat_from_final_step(z, func(z), max_iter)

    lib.register_solver("halves", halves)
    return solved(lib, f_solver="halves", ift=True)[:2]


def registered_core(lib: Any) -> Any:
    class Named(lib.core.DEQSliced):
        pass

    lib.register_deq("named", Named)
    return solved(lib, core="named", ift=True)


def reset(lib: Any) -> Any:
    drop = lib.VariationalDropout(0.5)
    torch.manual_seed(0)
    first = drop(torch.ones(3, 4))
    same = torch.equal(first, drop(torch.ones(3, 4)))
    lib.reset_deq(drop)
    return first, same, drop(torch.ones(3, 4))


def dropped(name: str, *shape: int) -> Callable[[Any], Any]:
    def call(lib: Any) -> Any:
        torch.manual_seed(0)
        drop = getattr(lib, name)(0.3)
        return drop(data(*shape).float()), drop.eval()(torch.ones(shape))

    return call


def reset_masks(lib: Any) -> Any:
    drop = nn.Sequential(lib.VariationalDropout(0.5))
    torch.manual_seed(0)
    first = drop(torch.ones(3, 4))
    lib.reset_dropout(drop)
    return first, drop(torch.ones(3, 4))


def normed(lib: Any, end: Callable[[Any, nn.Module], Any]) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, dtype=F64), nn.Linear(4, 2, dtype=F64))
    lib.apply_norm(model, "weight_norm", filter_out="1", learn_scale=False, target_norm=0.5)
    return end(lib, model)


def after_reset(lib: Any, model: nn.Module) -> Any:
    lib.reset_norm(model)
    return model(data(5, 3)), sorted(model.state_dict())


def after_removal(lib: Any, model: nn.Module) -> Any:
    lib.remove_norm(model)
    return model[0].weight.detach(), sorted(dict(model.named_parameters()))


def norm_of_ones_own(lib: Any) -> Any:
    class Halved:
        _target_modules = {nn.Linear: ("weight", 0)}  # noqa: RUF012 - as one wrote it

        @classmethod
        def apply(cls, module: nn.Module, deq_args: Any = None, **kwargs: Any) -> Any:
            return cls()

        def __call__(self, module: nn.Module) -> None:
            module.weight.data.mul_(0.5)

        def remove(self, module: nn.Module) -> None:
            module.weight.data.zero_()

    torch.manual_seed(0)
    layer = nn.Linear(3, 4)
    lib.register_norm("halved", Halved)
    lib.apply_norm(layer, "halved")
    lib.reset_norm(layer)
    return layer.weight.detach().clone()


def norm_of_a_module(lib: Any) -> Any:
    torch.manual_seed(0)
    layer = nn.Bilinear(3, 4, 2)
    lib.register_norm_module(nn.Bilinear, "weight_norm", "weight", 0)
    lib.apply_norm(layer)
    lib.reset_norm(layer)
    return layer(data(5, 3).float(), data(5, 4).float()), sorted(layer.state_dict())


def corrected(lib: Any) -> Any:
    states = [data(3, 4) * k for k in (1, 2, 3)]
    crit = nn.functional.mse_loss
    return [
        lib.fp_correction(crit, (states, data(3, 4)), weight_func=name, return_loss_values=True)
        for name in ("exp", "linear")
    ]


def own_weights(lib: Any) -> Any:
    lib.register_weight_func("squares", lambda n, k: float(k * k))
    return lib.fp_correction(nn.functional.mse_loss, ([data(3), 2 * data(3)], data(3)), "squares")


def jacobian(lib: Any) -> Any:
    f = small()
    z = f.z0.clone().requires_grad_()
    torch.manual_seed(0)
    loss = lib.jac_reg(f(z), z, vecs=2)
    return loss, torch.autograd.grad(loss, f.wanted)


def radius(lib: Any) -> Any:
    basis = torch.linalg.qr(data(6, 6))[0]
    w = basis @ torch.diag(torch.tensor([0.9, 0.3, -0.2, 0.1, 0.05, 0.0], dtype=F64)) @ basis.T
    z = torch.zeros(2, 6, dtype=F64, requires_grad=True)
    vector, value = lib.power_method(z @ w, z)
    return vector.abs(), value  # of its two directions either may come


def checkpointed(lib: Any) -> Any:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh()), data(5, 3).float().requires_grad_()
    out = lib.mem_gc(model, (x,))
    return out, torch.autograd.grad(out.square().sum(), (x, *model.parameters()))


def flags(lib: Any) -> Any:
    parser = argparse.ArgumentParser()
    lib.add_deq_args(parser)
    line = "--f_solver anderson --ift --grad 2 3 --f_tol 1e-4 --norm_type spectral_norm --jac_loss_weight 0.5"
    return sorted(vars(parser.parse_args(line.split())).items())


def start(lib: Any) -> Any:
    torch.manual_seed(0)
    return lib.mixed_init((3, 4))


def of_two(lib: Any) -> Any:
    f = small()
    z = start_of_two(f)
    return lib.solver_stat_from_final_step(torch.cat([z[0], z[1].flatten(1)], 1), f(f.z0), 3)["abs_lowest"]


CALLS: dict[str, Callable[[Any], Any]] = {
    "get_deq": lambda lib: [solved(lib, core=core, ift=True) for core in ("indexing", "sliced")],
    "register_deq": registered_core,
    "reset_deq": reset,
    "get_solver": lambda lib: [by_name(lib, name) for name in ("anderson", "broyden", "fixed_point_iter")],
    "register_solver": registered_solver,
    "solver_stat_from_final_step": of_two,
    "apply_norm": lambda lib: normed(lib, lambda lib, model: model(data(5, 3))),
    "reset_norm": lambda lib: normed(lib, after_reset),
    "remove_norm": lambda lib: normed(lib, after_removal),
    "register_norm": norm_of_ones_own,
    "register_norm_module": norm_of_a_module,
    "VariationalDropout": dropped("VariationalDropout", 3, 4),
    "VariationalDropout1d": dropped("VariationalDropout1d", 3, 4, 5),
    "VariationalDropout2d": dropped("VariationalDropout2d", 3, 4, 4, 5),
    "VariationalDropout3d": dropped("VariationalDropout3d", 3, 2, 4, 4, 5),
    "VariationalDropToken1d": dropped("VariationalDropToken1d", 3, 4, 5),
    "VariationalDropToken2d": dropped("VariationalDropToken2d", 3, 4, 4, 5),
    "VariationalDropToken3d": dropped("VariationalDropToken3d", 3, 2, 4, 4, 5),
    "reset_dropout": reset_masks,
    "fp_correction": corrected,
    "register_weight_func": own_weights,
    "jac_reg": jacobian,
    "power_method": radius,
    "mixed_init": start,
    "mem_gc": checkpointed,
    "add_deq_args": flags,
}


@pytest.fixture(autouse=True)
def registries():
    """What the calls register is forgotten again."""
    kept = [
        (table, dict(table))
        for table in (
            torchdeq.core.CORES,
            torchdeq.solver.registry.SOLVERS,
            torchdeq.norm.functional.NORMS,
            torchdeq.norm.WeightNorm._target_modules,
            torchdeq.loss.correction.WEIGHTS,
        )
    ]
    yield
    for table, before in kept:
        table.clear()
        table.update(before)


@pytest.mark.parametrize("name", CALLS)
def test_a_call_of_each_name_gives_what_0_1_0_gives(old, name):  # noqa: F811 - the fixture
    assert_same(CALLS[name](torchdeq), CALLS[name](old), close=max(CLOSE, 1e-6 * (name == "power_method")))


def test_every_public_name_of_0_1_0_is_called(old):  # noqa: F811
    public = {
        name
        for name, value in vars(old).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert public == set(CALLS)
