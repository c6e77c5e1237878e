"""Fixed-point correction: weights, lengths, and the form of what is returned."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from tests.problems import F64
from torchdeq.loss import fp_correction, register_weight_func
from torchdeq.loss.correction import WEIGHTS

STATES = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), torch.tensor([5.0, 6.0])]
SUMS = [3.0, 7.0, 11.0]


@pytest.fixture
def _weights() -> Iterator[None]:
    before = dict(WEIGHTS)
    yield
    WEIGHTS.clear()
    WEIGHTS.update(before)


def weights(name: object, n: int = 3, **kwargs: float) -> list[float]:
    """The weight of each state, found by a criterion that is 1 there and 0 elsewhere."""
    states = [torch.eye(n)[i] for i in range(n)]
    return fp_correction(lambda z: z, (states,), name, **kwargs).tolist()


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("exp", {}, [0.64, 0.8, 1.0]),
        ("exp", {"gamma": 0.5}, [0.25, 0.5, 1.0]),
        ("linear", {}, [0.4, 0.7, 1.0]),
        ("linear", {"gamma": 0.3, "bias": 0.1}, [0.9, 1.0, 1.1]),
        ("const", {}, [1.0, 1.0, 1.0]),
        ("const", {"c": 0.25}, [0.25, 0.25, 0.25]),
    ],
)
def test_the_weights_are_those_of_the_formulas(name, options, expected) -> None:
    assert weights(name, **options) == pytest.approx(expected, rel=1e-6)


def test_the_sum_is_weighted_and_the_values_are_not() -> None:
    loss, values = fp_correction(torch.sum, (STATES,), gamma=0.5, return_loss_values=True)
    assert loss.item() == pytest.approx(0.25 * 3 + 0.5 * 7 + 11)
    assert values == SUMS
    assert all(type(value) is float for value in values)


@pytest.mark.parametrize("name", ["exp", "linear", "const"])
def test_arguments_of_the_other_weight_functions_are_accepted(name: str) -> None:
    """A program that reads gamma from the command line chooses among them by name; 'const' raised in 0.1.0."""
    own = {"exp": {"gamma": 0.7}, "linear": {"gamma": 0.7, "bias": 0.2}, "const": {"c": 2.0}}[name]
    assert weights(name, gamma=0.7, bias=0.2, c=2.0) == weights(name, **own)


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
@pytest.mark.parametrize("name", ["exp", "linear", "const"])
def test_dtype_and_shape_are_those_of_the_criterion(name: str, dtype: torch.dtype) -> None:
    """'const' returned a vector, on a GPU, in 0.1.0."""
    loss = fp_correction(torch.sum, ([z.to(dtype) for z in STATES],), name)
    assert loss.dtype == dtype
    assert loss.shape == ()
    assert loss.device == STATES[0].device


@pytest.mark.parametrize("name", ["exp", "linear", "const"])
def test_its_gradient_is_right(name: str) -> None:
    states = [torch.randn(3, 2, dtype=F64, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    target = torch.zeros(3, 2, dtype=F64)

    def loss(*z: Tensor) -> Tensor:
        return fp_correction(torch.nn.functional.mse_loss, (list(z), target), name)

    assert gradcheck(loss, [z.requires_grad_() for z in states])


def test_the_values_are_detached_and_the_sum_is_not() -> None:
    z = torch.ones(2, requires_grad=True)
    loss, values = fp_correction(torch.sum, ([z, 2 * z],), return_loss_values=True)
    loss.backward()
    assert torch.equal(z.grad, torch.full((2,), 0.8 + 2.0))
    assert values == [2.0, 4.0]


def test_one_value_stands_for_all_and_a_divisor_goes_round() -> None:
    def crit(z: Tensor, y: Tensor) -> Tensor:
        return (z * y).sum()

    one = [torch.ones(1)] * 4
    two = [torch.tensor([1.0]), torch.tensor([10.0])]
    assert fp_correction(crit, (one, torch.ones(1)), "const") == 4
    assert fp_correction(crit, (one, [torch.ones(1)]), "const") == 4
    assert fp_correction(crit, (one, two), "const") == 22


def test_a_length_that_does_not_divide_is_an_error() -> None:
    """0.1.0 gave the third of three states the first of two targets."""
    with pytest.raises(ValueError, match=r"lengths \[3, 2\]"):
        fp_correction(lambda z, y: (z - y).sum(), (STATES, STATES[:2]))


def test_the_states_of_a_tuple_state_go_to_the_criterion_together() -> None:
    states = [[STATES[0], STATES[1]], [STATES[1], STATES[2]]]
    loss = fp_correction(lambda pair, y: (pair[0] + pair[1]).sum() * y, (states, 1.0), "const")
    assert loss.item() == 10 + 18


def test_a_named_tuple_is_one_value() -> None:
    Pair = namedtuple("Pair", "u v")
    loss = fp_correction(lambda pair: pair.u + pair.v, (Pair(torch.tensor(1.0), torch.tensor(2.0)),))
    assert loss == 3


def test_a_criterion_may_be_a_module_and_may_give_numbers() -> None:
    assert fp_correction(torch.nn.MSELoss(), (STATES, STATES)) == 0
    assert fp_correction(lambda z: float(z.sum()), (STATES,), "const", return_loss_values=True) == (21, SUMS)


@pytest.mark.usefixtures("_weights")
def test_a_registered_function_gets_its_arguments_and_no_others() -> None:
    register_weight_func("last", lambda n, k, factor=1.0: factor * (k == n - 1))
    assert weights("last", factor=2.0, gamma=0.3) == [0.0, 0.0, 2.0]
    with pytest.raises(TypeError, match="'factr'.*Did you mean 'factor'"):
        weights("last", factr=2.0)
    register_weight_func("open", lambda n, k, **options: options["anything"])
    assert weights("open", anything=3.0) == [3.0, 3.0, 3.0]
    with pytest.raises(TypeError, match="expected a name and a function"):
        register_weight_func("none", 3.0)


def test_a_function_can_be_given_as_it_is() -> None:
    assert weights(lambda n, k: k) == [0.0, 1.0, 2.0]
    assert weights(max) == [3.0, 3.0, 3.0]  # a built-in has no signature to read


def test_what_it_cannot_use_is_said() -> None:
    with pytest.raises(TypeError, match="'gama'.*Did you mean 'gamma'"):
        fp_correction(torch.sum, (STATES,), gama=0.5)
    with pytest.raises(ValueError, match="'expo'.*Did you mean 'exp'"):
        fp_correction(torch.sum, (STATES,), "expo")
    with pytest.raises(ValueError, match="at least one entry"):
        fp_correction(torch.sum, ())
    with pytest.raises(ValueError, match="at least one value"):
        fp_correction(torch.sum, ([],))
    with pytest.raises(TypeError, match="args is a Tensor"):
        fp_correction(torch.sum, STATES[0])


def test_a_target_outside_of_args_is_an_error_that_does_not_print_it() -> None:
    with pytest.raises(
        TypeError, match=r"weight_func is a Tensor.*fp_correction\(crit, \(states, target\)\)"
    ) as caught:
        fp_correction(lambda z, y: (z - y).sum(), [torch.ones(50), torch.ones(50)], torch.full((50,), 7.0))
    assert "7." not in str(caught.value)


@pytest.mark.parametrize("loss", [(1.0, 2.0), [1.0], {"a": 1.0}, None])
def test_a_criterion_that_gives_no_number_is_an_error(loss: object) -> None:
    """With a weight that is an integer a tuple would be repeated, and no error at all."""
    with pytest.raises(TypeError, match=f"returned a {type(loss).__name__}; expected a tensor or a number"):
        fp_correction(lambda z: loss, ([torch.ones(2)],), lambda n, k: 2)


def test_a_criterion_without_a_reduction_is_summed_and_has_no_values() -> None:
    states, crit = [torch.zeros(3), torch.ones(3)], torch.nn.MSELoss(reduction="none")
    total = fp_correction(crit, (states, torch.tensor([0.0, 1.0, 3.0])))
    assert torch.allclose(total, torch.tensor([1.0, 0.8, 0.8 * 9 + 4]))
    with pytest.raises(ValueError, match=r"a tensor of the shape \(3,\).*expected one number"):
        fp_correction(crit, (states, torch.ones(3)), return_loss_values=True)
