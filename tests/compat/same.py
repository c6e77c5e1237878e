"""What the comparisons share: a map, a call under both versions, and what counts as the same answer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.problems import TanhMap

#: Both versions come this far on `small`, whatever the solver; 0.1.0's Anderson with its absolute `lam` slowly.
TIGHT = {"f_tol": 1e-13, "f_max_iter": 108, "b_solver": "fixed_point_iter", "b_tol": 1e-13, "b_max_iter": 75}
CLOSE = 1e-9
SOLVERS = ("fixed_point_iter", "simple_fixed_point_iter", "anderson", "broyden")


def small() -> TanhMap:
    """A contraction of three samples with eight numbers each."""
    return TanhMap.make(n=8, batch=3, gain=0.3)


def in_two(f: Any) -> Any:
    """The same map on a state of two tensors, of three and of five numbers."""

    def two(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        z = f(torch.cat([a, b.flatten(1)], 1))
        return z[:, :3], z[:, 3:].reshape(-1, 1, 5)

    return two


def start_of_two(f: TanhMap) -> tuple[Tensor, Tensor]:
    return f.z0[:, :3], f.z0[:, 3:].reshape(-1, 1, 5)


def assert_same(got: Any, want: Any, close: float = CLOSE, where: str = "") -> None:
    """The same structure of the same types, shapes and dtypes, and values that agree to `close`."""
    if isinstance(want, Tensor):
        assert isinstance(got, Tensor), f"{where}: {type(got)}"
        assert (got.shape, got.dtype) == (want.shape, want.dtype), where
        apart = (got - want).abs().max().item() if want.numel() else 0.0
        assert apart <= close * (1 + (want.abs().max().item() if want.numel() else 0.0)), f"{where}: {apart}"
    elif isinstance(want, list | tuple):
        assert type(got) is type(want), where
        assert len(got) == len(want), f"{where}: {len(got)} for {len(want)}"
        for at, (a, b) in enumerate(zip(got, want, strict=True)):
            assert_same(a, b, close, f"{where}[{at}]")
    elif isinstance(want, float):
        assert abs(got - want) <= close * (1 + abs(want)), f"{where}: {got} for {want}"
    else:
        assert type(got) is type(want), where
        assert got == want, f"{where}: {got} for {want}"


def assert_same_info(got: Any, want: Any, residual: float = 1e-8) -> None:
    """Every key of 0.1.0 with a value of its shape, all of them floating point; residuals that are small alike."""
    assert isinstance(got, dict)
    for key, value in want.items():
        assert isinstance(got[key], Tensor), key
        assert got[key].is_floating_point(), key
        assert got[key].dim() == value.dim(), key
        assert len(got[key]) == len(value), key
        if key.endswith("lowest"):
            assert (got[key] <= residual).all(), key
            assert (value <= residual).all(), key
    for key, value in got.items():
        assert isinstance(value, Tensor), "a gather over devices needs tensors"
        assert value.is_floating_point(), f"{key}: a logger takes the mean of each value"
        assert value.dim() >= 1


def gradients(states: list[Any], wanted: Any) -> list[Any]:
    """The gradient of a number made of each state, None for a state without one."""
    found = []
    for state in states:
        parts = state if isinstance(state, list) else [state]
        loss = sum(
            (part * torch.arange(1.0, part[0].numel() + 1).reshape(part[0].shape)).sum() for part in parts
        )
        found.append(torch.autograd.grad(loss, wanted, retain_graph=True) if loss.requires_grad else None)
    return found
