"""Phantom gradients against the steps they are, and against their closed formula."""

from __future__ import annotations

import pytest
import torch

from tests.problems import F64, TanhMap, cotangent, error, exact_adjoint, solve_exactly
from torchdeq import DEQ, FixedPointIteration, PhantomGrad, as_grad, backward_factory

STEPS = pytest.mark.parametrize(("steps", "tau"), [(1, 1.0), (5, 0.5), (10, 0.7)])


@STEPS
def test_equals_as_many_damped_steps_written_out(steps, tau):
    f = TanhMap.make()
    start, g = cotangent(f.x, 3), cotangent(f.x)
    z = start
    for _ in range(steps):
        z = tau * f(z) + (1 - tau) * z
    want = torch.autograd.grad(z, f.wanted, g)
    (got,) = PhantomGrad(steps=steps, tau=tau).attach(f, start)
    assert torch.allclose(got, z, rtol=0, atol=1e-15)
    assert error(torch.autograd.grad(got, f.wanted, g), want) < 1e-12


@STEPS
def test_at_the_fixed_point_it_is_the_exact_gradient_less_a_known_bias(steps, tau):
    """Bᵀ (I − M^k) u with M = (1 − τ) I + τ Jᵀ."""
    f = TanhMap.make(n=12, batch=2)
    g = cotangent(f.x)
    z = solve_exactly(f, f.z0)
    u = exact_adjoint(f, z, g).reshape(-1)
    jacobian = torch.autograd.functional.jacobian(f, z).reshape(z.numel(), -1)
    m = (1 - tau) * torch.eye(z.numel(), dtype=F64) + tau * jacobian.T
    v = (u - torch.linalg.matrix_power(m, steps) @ u).reshape(z.shape)
    want = torch.autograd.grad(f(z), f.wanted, v)
    (out,) = PhantomGrad(steps=steps, tau=tau).attach(f, z)
    assert error(torch.autograd.grad(out, f.wanted, g), want) < 1e-12


@pytest.mark.parametrize(
    ("options", "sampled"),
    [
        ({"sup_gap": 2}, [2, 4, 5]),
        ({"sup_gap": 5}, [5]),
        ({"sup_gap": 9}, [5]),
        ({"sup_loc": (2, 5)}, [2, 5]),
        ({"sup_loc": (3,)}, [3, 5]),
        ({}, [5]),
    ],
)
def test_samples_the_steps_asked_for_and_the_final_one_once(options, sampled):
    f = TanhMap.make()
    trail, z = [], f.z0
    for _ in range(5):
        z = f(z)
        trail.append(z)
    states = PhantomGrad(steps=5, **options).attach(f, f.z0)
    assert len(states) == len(sampled)
    assert all(torch.equal(s, trail[k - 1]) for s, k in zip(states, sampled, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps counts calls of f"),
        ({"steps": 1.5}, "steps counts calls of f"),
        ({"steps": True}, "steps counts calls of f"),
        ({"tau": 0.0}, "tau must lie"),
        ({"sup_gap": 0}, "sup_gap must be at least 1"),
        ({"steps": 5, "sup_loc": (6,)}, "sup_loc must lie within"),
        ({"steps": 5, "sup_loc": (2,), "sup_gap": 2}, "give one of them"),
    ],
)
def test_wrong_options_teach(options, message):
    with pytest.raises(ValueError, match=message):
        PhantomGrad(**options)


def test_a_number_stands_for_as_many_steps():
    assert as_grad(5, tau=0.5) == PhantomGrad(steps=5, tau=0.5)
    assert backward_factory(5, tau=0.5).method == backward_factory("phantom", steps=5, tau=0.5).method
    f = TanhMap.make(n=4, batch=2)
    (got,) = backward_factory(3, tau=0.5)(None, f, f.z0)
    assert torch.equal(got, PhantomGrad(steps=3, tau=0.5).attach(f, f.z0)[0])


@pytest.mark.parametrize("batch_dims", [0, 1])
def test_a_nested_state_gets_the_gradient_of_the_flat_one(batch_dims):
    f = TanhMap.make(n=6, batch=3)
    g = cotangent(f.x)
    deq = DEQ(
        FixedPointIteration(tol=1e-13, max_iter=300), PhantomGrad(steps=3, tau=0.7), batch_dims=batch_dims
    )
    z, solution = deq(lambda s: tuple(f(torch.cat(s, 1)).split(3, 1)), tuple(f.z0.split(3, 1)))
    want = torch.cat(solution.z, 1)
    for _ in range(3):
        want = 0.7 * f(want) + 0.3 * want
    want = torch.autograd.grad(want, f.wanted, g)
    assert error(torch.autograd.grad(torch.cat(z, 1), f.wanted, g), want) < 1e-14
