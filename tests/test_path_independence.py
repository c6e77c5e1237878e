"""Path independence of maps whose fixed points are known, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from tests.problems import F64, CoupledMap, TanhMap, solve_exactly
from torchdeq import FixedPointIteration, PeacemanRachford, as_solver
from torchdeq.diagnostics import path_independence
from torchdeq.monotone import MonotoneLinear

TIGHT = FixedPointIteration(tol=1e-12, max_iter=500)


def two_attractors(z):
    """Each unknown goes to ±a, a = tanh(2a), by the sign it begins with."""
    return torch.tanh(2 * z)


STARTS = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, -1.0], [-1.0, -1.0, -1.0, -1.0]], dtype=F64)


def test_a_contraction_forgets_where_it_began():
    f = TanhMap.make(gain=0.6)
    found = path_independence(f, f.z0, solver=TIGHT)
    assert torch.allclose(found.cosine, torch.ones(4, dtype=F64), atol=1e-14, rtol=0)
    # Two residuals of 1e-12 and a condition below 10.
    assert bool((found.distance < 1e-11).all())
    assert bool((found.apart > 0.1).all())
    assert found.score == pytest.approx(1.0, abs=1e-14)
    assert torch.allclose(found.first.z, solve_exactly(f, f.z0), atol=1e-11)
    assert torch.allclose(found.second.z, found.first.z, atol=1e-11)


def test_attractors_are_told_apart():
    found = path_independence(two_attractors, STARTS, solver=TIGHT)
    # Each begins where the one before it ended: 0 at 2, 1 at 0, 2 at 1.
    assert torch.allclose(found.cosine, torch.tensor([-1.0, 0.5, -0.5], dtype=F64), atol=1e-11)
    assert torch.allclose(found.distance, torch.tensor([2.0, 1.0, math.sqrt(3)], dtype=F64), atol=1e-11)
    assert found.score == pytest.approx(-1 / 3)
    assert "alignment -0.3333 (least -1.0000), largest distance 2.0e+00" in str(found)
    assert repr(found) == str(found)


def test_the_length_of_a_solution_is_not_in_its_cosine_but_in_its_distance():
    """A line of fixed points along each ray: from z0 it ends at z0, and from the other start at that."""
    z = torch.tensor([[1.0, 2.0], [2.0, 4.0]], dtype=F64)
    found = path_independence(lambda z: z.clone(), z)
    assert torch.allclose(found.cosine, torch.ones(2, dtype=F64))
    assert torch.allclose(found.distance, torch.full((2,), 0.5, dtype=F64))


@pytest.mark.parametrize("scale", [1e-310, 1e-200, 1.0, 1e200, 1e307])
@pytest.mark.parametrize("start", ["others", "random"])
def test_sizes_whose_squares_vanish_or_overflow_are_compared_as_any_other(scale, start):
    """Every state is a fixed point, so that each solve ends where it begins."""
    z = scale * torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, -1.0], [0.0, 0.0]], dtype=F64)
    generator = torch.Generator().manual_seed(0)
    found = path_independence(lambda z: z.clone(), z, start=start, generator=generator)
    begun = found.second.z / scale
    if start == "others":
        assert torch.equal(found.second.z, z.roll(1, dims=0))
    else:
        assert bool((begun[:3].norm(dim=1) > 0.05).all())
        assert bool((begun[:3].norm(dim=1) < 5).all())
        begun[3] *= scale if scale < 1 else 0.0
    one, two = z / scale, found.second.z / scale
    exact = torch.nn.functional.cosine_similarity(one, two, dim=1)[:3] if start == "random" else None
    want = torch.tensor([0.0, 0.5**0.5, -(0.5**0.5)], dtype=F64) if exact is None else exact
    assert torch.allclose(found.cosine[:3], want, atol=1e-9)
    longer = torch.maximum(one.norm(dim=1), two.norm(dim=1))
    apart = ((one - two).norm(dim=1) / longer)[:3]
    assert torch.allclose(found.apart[:3], apart, atol=1e-9)
    assert torch.allclose(found.distance[:3], apart, atol=1e-9)


def test_what_is_not_solved_has_no_score():
    rate = torch.tensor([[0.5], [-1.5], [0.9]], dtype=F64)
    found = path_independence(lambda z: rate * z + 1, torch.zeros(3, 1, dtype=F64), solver=TIGHT)
    assert found.solved.tolist() == [True, False, True]
    assert found.score == pytest.approx(1.0)
    assert "1 of 3 samples, not solved from both, left out" in str(found)
    none = path_independence(lambda z: -1.5 * z + 1, torch.zeros(3, 1, dtype=F64), solver=TIGHT)
    assert math.isnan(none.score)
    assert "nan" in str(none)


def test_one_sample_needs_a_start_that_is_given_or_random():
    with pytest.raises(ValueError, match="no solution of another sample"):
        path_independence(two_attractors, STARTS[:1])
    with pytest.raises(ValueError, match="no solution of another sample"):
        path_independence(two_attractors, STARTS, batch_dims=0)
    given = path_independence(two_attractors, STARTS[:1], start=-STARTS[:1], solver=TIGHT)
    assert given.cosine.item() == pytest.approx(-1)
    f = CoupledMap.make(gain=0.5)
    generator = torch.Generator().manual_seed(0)
    found = path_independence(f, f.z0, start="random", generator=generator, batch_dims=0, solver=TIGHT)
    assert found.cosine.shape == (1,)
    assert found.cosine.item() == pytest.approx(1, abs=1e-12)
    assert 0.1 < found.apart.item() < 2


def test_random_starts_follow_the_generator_and_find_both_attractors():
    def cosine(seed):
        generator = torch.Generator().manual_seed(seed)
        return path_independence(
            two_attractors, STARTS, start="random", generator=generator, solver=TIGHT
        ).cosine

    assert torch.equal(cosine(0), cosine(0))
    assert bool((cosine(0) < 0.9).any())


def test_zeros_are_alike():
    found = path_independence(lambda z: 0 * z, torch.zeros(2, 3, dtype=F64), start="random", solver=TIGHT)
    assert found.cosine.tolist() == [1.0, 1.0]
    assert found.distance.tolist() == [0.0, 0.0]
    assert found.apart.tolist() == [1.0, 1.0]


def test_nested_complex_states_are_compared_whole():
    def f(s):
        return {"a": torch.tanh(2 * s["a"]), "b": 0.5j * s["b"] + 1}

    start = {"a": torch.tensor([[1.0], [-1.0]], dtype=F64), "b": torch.zeros(2, 2, dtype=torch.complex128)}
    found = path_independence(f, start, solver=TIGHT)
    a = solve_exactly(two_attractors, torch.ones(1, 1, dtype=F64)).item()
    b = 2 * abs(1 / (1 - 0.5j)) ** 2
    assert torch.allclose(found.cosine, torch.full((2,), (b - a**2) / (b + a**2), dtype=F64), atol=1e-11)
    assert found.second.z["b"].dtype == torch.complex128


def test_buffers_and_random_numbers_are_left_as_they_were():
    torch.manual_seed(0)
    norm, drop = torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5)
    x = torch.randn(6, 4)
    before, state = norm.running_mean.clone(), torch.get_rng_state()
    found = path_independence(lambda z: 0.3 * drop(norm(z + x)) + x, torch.zeros(6, 4))
    assert torch.equal(norm.running_mean, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert bool(found.solved.all())
    assert bool((found.cosine > 0.999).all())


def test_a_monotone_map_is_path_independent_under_its_own_solver():
    torch.manual_seed(0)
    layer = MonotoneLinear(12, m=0.5, dtype=F64)
    x = torch.randn(5, 12, dtype=F64)
    found = path_independence(
        layer.map(x), torch.zeros_like(x), solver=PeacemanRachford(tol=1e-11, max_iter=1000)
    )
    assert bool(found.solved.all())
    assert bool((found.distance < 1e-9).all())


def test_a_start_of_no_name_is_refused():
    with pytest.raises(ValueError, match="expected 'others', 'random'"):
        path_independence(two_attractors, STARTS, start="roll")


@pytest.mark.parametrize("name", ["anderson", "broyden", "fixed_point_iter"])
def test_a_solver_may_be_given_by_name_and_gets_the_settings_of_the_default(name):
    f = TanhMap.make(gain=0.5)
    found = path_independence(f, f.z0, solver=name)
    settings = {"tol": 1e-4, "stop_mode": "rel", "max_iter": 200}
    assert torch.equal(found.first.z, as_solver(name, **settings)(f, f.z0).z)
    with pytest.raises(ValueError, match="Did you mean 'anderson'"):
        path_independence(f, f.z0, solver="andersson")
    with pytest.raises(TypeError, match="or the name of one"):
        path_independence(f, f.z0, solver=3)


def test_the_line_says_where_nothing_was_tested():
    same = torch.ones(3, 1, dtype=F64)
    text = str(path_independence(two_attractors, same, solver=TIGHT))
    assert "nothing was tested: the second start is the first solution. Give start='random'" in text
    some = torch.tensor([[1.0], [1.0], [-1.0]], dtype=F64)  # only the second begins where it ended
    assert "1 of 3 samples were not tested" in str(path_independence(two_attractors, some, solver=TIGHT))
    assert "tested" not in str(path_independence(two_attractors, STARTS, solver=TIGHT, start=-STARTS))


def test_an_f_of_several_arguments_is_told_how_to_write_it():
    z = (torch.zeros(2, 3, dtype=F64), torch.zeros(2, 1, dtype=F64))
    with pytest.raises(
        TypeError, match=r"f takes 2 arguments, and is called with one.*lambda state: f\(\*state\)"
    ):
        path_independence(lambda a, b: (a, b), z)
