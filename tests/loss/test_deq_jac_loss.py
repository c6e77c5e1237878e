"""`deq_jac_loss`: the regulariser at the solution of a DEQ, with f as the DEQ sees it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from tests.problems import F64, TanhMap
from torchdeq import DEQ, AffineMap, FixedPointIteration, VariationalDropout, get_deq, reset_dropout
from torchdeq.loss import deq_jac_loss, jac_reg


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ritual(f, z, **options) -> Tensor:
    z = z.detach().requires_grad_()
    return jac_reg(f(z), z, **options)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("old", [True, False])
def test_it_is_jac_reg_at_the_solution(old: bool, training: bool) -> None:
    f = TanhMap.make(n=6, batch=3)
    deq = (get_deq(ift=True) if old else DEQ()).train(training)
    found, _ = deq(f, torch.zeros(3, 6, dtype=F64))
    z = found[-1] if old else found
    for options in ({}, {"vecs": 3}, {"distribution": "rademacher"}):
        got = deq_jac_loss(deq, f, z, **options, generator=seeded())
        assert torch.equal(got, ritual(f, z, **options, generator=seeded()))
    assert not deq_jac_loss(deq, f, z, create_graph=False).requires_grad


def test_its_gradient_goes_to_f_and_not_through_the_solution() -> None:
    f = TanhMap.make(n=4, batch=2)
    z, _ = DEQ()(f, torch.zeros(2, 4, dtype=F64))
    z.requires_grad_()

    def loss(w: Tensor) -> Tensor:
        return deq_jac_loss(DEQ(), lambda z: torch.tanh(z @ w.T + f.x), z, generator=seeded())

    assert gradcheck(loss, (f.w,))
    (through,) = torch.autograd.grad(loss(f.w), z, allow_unused=True)
    assert through is None


def test_without_grad_mode_it_is_the_value_alone() -> None:
    f = TanhMap.make(n=4, batch=2)
    z = torch.zeros(2, 4, dtype=F64)
    with torch.no_grad():
        got = deq_jac_loss(DEQ(), f, z, generator=seeded())
    assert not got.requires_grad
    assert got == ritual(f, z, generator=seeded())


def test_in_inference_mode_it_is_the_value_alone() -> None:
    f = TanhMap.make(n=4, batch=2, gain=0.5)
    for deq in (DEQ(), DEQ(hold_noise=True), get_deq()):
        with torch.inference_mode():
            found, _ = deq.eval()(f, torch.zeros(2, 4, dtype=F64))
            z = found[-1] if isinstance(found, list) else found
            got = deq_jac_loss(deq, f, z, generator=seeded())
        assert not got.requires_grad
        assert got == ritual(f, z.clone(), generator=seeded())


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_tuple_state_is_several_arguments_for_get_deq_and_one_for_DEQ(kind) -> None:
    a, b = torch.tensor(0.5, dtype=F64, requires_grad=True), torch.tensor(0.25, dtype=F64, requires_grad=True)
    z0 = kind([torch.zeros(3, 2, dtype=F64), torch.zeros(3, 4, dtype=F64)])
    old = get_deq(ift=True)
    states, _ = old(lambda u, v: (a * u + 1, b * v), z0)
    got = deq_jac_loss(old, lambda u, v: (a * u + 1, b * v), states[-1], distribution="rademacher")
    # J is diagonal: a² on 2 of 6 numbers, b² on the others, and rademacher probes are exact on it.
    assert got.item() == pytest.approx((2 * 0.25 + 4 * 0.0625) / 6, rel=1e-14)
    new = DEQ()
    z, _ = new(lambda s: kind([a * s[0] + 1, b * s[1]]), z0)
    again = deq_jac_loss(new, lambda s: kind([a * s[0] + 1, b * s[1]]), z, distribution="rademacher")
    assert again.item() == got.item()


def test_the_buffers_stay_as_the_solve_left_them() -> None:
    norm = nn.BatchNorm1d(4, dtype=F64)
    x = torch.randn(8, 4, dtype=F64, generator=seeded())
    for deq in (DEQ(batch_dims=0), get_deq(ift=True)):
        found, _ = deq(lambda z: 0.1 * norm(z) + x, torch.zeros(8, 4, dtype=F64))
        z = found[-1] if isinstance(found, list) else found
        before = [buffer.clone() for buffer in norm.buffers()]
        deq_jac_loss(deq, lambda z: 0.1 * norm(z) + x, z).backward()
        assert all(torch.equal(a, b) for a, b in zip(before, norm.buffers(), strict=True))


def test_modules_that_f_hides_are_those_the_DEQ_was_told_of() -> None:
    norm = nn.BatchNorm1d(4, dtype=F64)
    hidden = dict.fromkeys(range(200), norm)  # more than anyone looks through
    deq = DEQ(batch_dims=0, modules=norm)
    z = torch.randn(8, 4, dtype=F64, generator=seeded())
    deq_jac_loss(deq, lambda z: hidden[0](z), z)
    assert norm.num_batches_tracked == 0


def test_the_noise_is_that_of_the_solve() -> None:
    """With rademacher probes ‖J‖² of a diagonal J is exact: it is the number of kept entries that is measured."""
    torch.manual_seed(0)
    deq, drop = DEQ(FixedPointIteration(tol=1e-10), hold_noise=True), nn.Dropout(0.5)
    x, gain = torch.ones(20, 30, dtype=F64), torch.tensor(0.3, dtype=F64, requires_grad=True)

    def f(z: Tensor) -> Tensor:
        return gain * drop(z) + x

    z, _ = deq(f, torch.zeros_like(x))
    kept = z > 1.5  # 1 / (1 − 0.6) where z is kept, 1 elsewhere
    torch.rand(7)  # a program draws other numbers in between
    state = torch.get_rng_state()
    got = deq_jac_loss(deq, f, z, distribution="rademacher", generator=seeded())
    assert torch.equal(torch.get_rng_state(), state)
    assert got.item() == pytest.approx(0.36 * kept.double().mean().item(), rel=1e-12)
    for copied in (copy.deepcopy(deq), pickle.loads(pickle.dumps(deq))):
        assert torch.equal(deq_jac_loss(copied, f, z, distribution="rademacher", generator=seeded()), got)


def test_a_variational_mask_is_that_of_the_solve() -> None:
    torch.manual_seed(0)
    deq, drop = get_deq(ift=True, f_tol=1e-4), VariationalDropout(0.5)
    x, gain = torch.ones(20, 30, dtype=F64), torch.tensor(0.3, dtype=F64, requires_grad=True)
    states, _ = deq(lambda z: gain * drop(z) + x, torch.zeros_like(x))
    got = deq_jac_loss(deq, lambda z: gain * drop(z) + x, states[-1], distribution="rademacher")
    assert got.item() == pytest.approx(0.36 * (states[-1] > 1.5).double().mean().item(), rel=1e-12)
    reset_dropout(drop)


def test_an_affine_map_and_a_wrapped_module() -> None:
    gain = torch.tensor(0.5, dtype=F64, requires_grad=True)
    z = (torch.ones(2, 3, dtype=F64), torch.ones(2, 1, dtype=F64))
    f = AffineMap(lambda s: (gain * s[0], gain * s[1]), z)
    assert deq_jac_loss(DEQ(), f, z, distribution="rademacher").item() == pytest.approx(0.25)

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    assert deq_jac_loss(Wrapper(DEQ()), f, z, distribution="rademacher").item() == pytest.approx(0.25)


def test_the_function_in_place_of_the_module_is_an_error() -> None:
    f = TanhMap.make(n=4, batch=2)
    with pytest.raises(TypeError, match="expected the module that solved for z"):
        deq_jac_loss(f.__call__, DEQ(), torch.zeros(2, 4, dtype=F64))
