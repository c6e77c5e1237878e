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
