"""Affine maps, products that are counted, and transposes, against dense matrices."""

from __future__ import annotations

import pytest
import torch

from tests.problems import F64, TanhMap, random_matrix
from torchdeq import AffineMap
from torchdeq._replay import AutocastState
from torchdeq.solver.maps import Operator, Tally, with_transpose

A = random_matrix(6, 0.8)
P = torch.tensor([[1.0, -2.0, 0.5, 3.0, 0.0, 1.0]], dtype=F64)
EYE = torch.eye(6, dtype=F64)


def tally(linear):
    return Tally(linear, AutocastState.capture(torch.device("cpu")))


def test_an_affine_map_is_its_two_parts():
    f = AffineMap(lambda u: u @ A.T, P)
    assert torch.equal(f(P), P @ A.T + P)
    assert f.preconditioner is None


def test_an_operator_is_the_preconditioned_system_and_counts_products_with_the_linear_part_only():
    linear = tally(lambda u: u @ A.T)
    assert torch.allclose(Operator(linear)(P), P @ (EYE - A).T, rtol=1e-14)
    inverse = torch.linalg.inv(EYE - A)
    calls = []
    operator = Operator(linear, lambda p: calls.append(1) or p @ inverse.T)
    assert torch.allclose(operator(P), P, rtol=1e-12)
    assert (linear.calls, len(calls)) == (2, 1)


def test_the_transpose_of_the_operator_costs_one_call_each_and_none_for_the_graph():
    calls = []
    linear = tally(lambda u: calls.append(1) or u @ A.T)
    operator = Operator(linear)
    with torch.no_grad():
        assert torch.allclose(operator.recorded(P), P @ (EYE - A).T, rtol=1e-14)
        for _ in range(2):
            transposed = operator.transposed(P)
            assert torch.allclose(transposed, P @ (EYE - A), rtol=1e-14)
            assert not transposed.requires_grad
    assert (linear.calls, len(calls)) == (3, 1)


def test_the_transpose_of_a_linear_map_that_is_not_a_matrix():
    linear = lambda u: torch.fft.ifft(torch.fft.fft(u) * torch.arange(6)).real + u.roll(2, 1)  # noqa: E731
    dense = linear(EYE).T  # rows of EYE are unit vectors
    image, transposed = with_transpose(linear, P)
    assert torch.allclose(image, P @ dense.T, rtol=1e-12)
    assert torch.allclose(transposed(P), P @ dense, rtol=1e-12)


def test_the_transpose_of_the_adjoint_is_the_jacobian():
    f = TanhMap.make(n=6, batch=1)
    z = f.x.detach().requires_grad_()
    fz = f(z)
    vjp = lambda u: torch.autograd.grad(fz, z, u, create_graph=True)[0]  # noqa: E731
    _, jvp = with_transpose(vjp, P)
    jacobian = torch.autograd.functional.jacobian(f, z).reshape(6, 6)
    assert torch.allclose(jvp(P), P @ jacobian.T, rtol=1e-12)


def test_what_does_not_depend_on_a_part_of_its_argument_has_a_transpose_of_zeros_there():
    _, transposed = with_transpose(lambda u: u[:, :1].expand(-1, 6), P)
    assert torch.equal(transposed(torch.ones_like(P)), 6.0 * EYE[:1])


def test_a_map_without_a_graph_is_an_error_that_teaches():
    for linear in (lambda u: u.detach() @ A.T, lambda u: u.detach() @ (A.T + 0 * A.clone().requires_grad_())):
        _, transposed = with_transpose(linear, P)
        with pytest.raises(RuntimeError, match="operations that autograd records.*GMRES"):
            transposed(P)


def test_the_transpose_of_nothing_is_nothing():
    for linear in (torch.zeros_like, lambda u: torch.zeros_like(u) * A[0].clone().requires_grad_()):
        image, transposed = with_transpose(linear, P)
        assert not image.any()
        assert torch.equal(transposed(P), torch.zeros_like(P))


def test_a_map_that_cannot_be_gone_back_through_is_an_error_that_teaches():
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, u):
            return u / 2

        @staticmethod
        def backward(ctx, g):
            raise RuntimeError("no way back")

    _, transposed = with_transpose(Opaque.apply, P)
    with pytest.raises(RuntimeError, match="no way back.*twice differentiable.*BiCGSTAB"):
        transposed(P)
