"""Whether a map couples samples is seen, and not imagined."""

from __future__ import annotations

import pytest
import torch

from tests.problems import F64, random_matrix
from torchdeq.solver.coupling import couples_samples, mixes_samples


def states(batch, dtype=F64, n=5):
    return torch.randn(batch, n, dtype=F64, generator=torch.Generator().manual_seed(batch)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("batch", [2, 3, 24, 100])
def test_samples_that_are_treated_apart_are_not_called_coupled(batch, dtype):
    a = random_matrix(5, 2.0).to(dtype)
    own = states(batch, dtype)[:, :, None] * a  # another matrix for each sample
    assert not couples_samples(lambda u: torch.einsum("bij,bj->bi", own, u), states(batch, dtype))


@pytest.mark.parametrize("batch", [3, 24, 26, 52])
@pytest.mark.parametrize("strength", [1.0, 1e-3])
def test_a_coupling_at_any_distance_is_seen(batch, strength):
    for distance in range(1, batch):
        assert couples_samples(lambda u, d=distance: u + strength * u.roll(d, 0), states(batch))


def test_a_coupling_through_the_mean_is_seen():
    assert couples_samples(lambda u: u - u.mean(dim=0), states(8))


@pytest.mark.parametrize("batch", [2, 3, 8])
def test_mixes_samples_sees_both_directions(batch):
    z = torch.randn(batch, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    down = torch.ones(batch, batch, dtype=F64).tril()
    for mix in (down, down.T, torch.full((batch, batch), 0.1, dtype=F64)):
        assert mixes_samples(lambda z, mix=mix: mix @ z, z)
    assert not mixes_samples(lambda z: torch.tanh(z), z)
    assert not mixes_samples(torch.zeros_like, torch.zeros_like(z))


def test_batch_normalisation_in_training_mode_is_seen():
    norm = torch.nn.BatchNorm1d(3, dtype=F64)
    z = torch.randn(4, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    assert mixes_samples(norm, z)
    assert not mixes_samples(norm.eval(), z)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("shift", [1.0, 1e4])
def test_a_coupling_is_seen_at_zero(dtype, shift):
    assert mixes_samples(lambda z: (z - z.mean(0)) * 0.5 + shift, torch.zeros(6, 4, dtype=dtype))
    assert not mixes_samples(lambda z: 0.5 * z + shift, torch.zeros(6, 4, dtype=dtype))


def test_a_random_map_does_not_count_as_coupling():
    assert not mixes_samples(lambda z: torch.rand_like(z), torch.zeros(6, 4))


def test_a_map_that_cannot_be_asked_is_not_known_to_couple():
    def f(z):
        if (z != 1).any():
            raise ValueError("out of domain")
        return z

    assert not mixes_samples(f, torch.ones(6, 4))


def test_the_question_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    mixes_samples(torch.cos, torch.zeros(6, 4))
    assert torch.equal(before, torch.get_rng_state())
