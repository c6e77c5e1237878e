"""What a solve reports, and how it warns."""

from __future__ import annotations

import pickle
import warnings

import pytest
import torch

from tests.problems import TanhMap
from torchdeq import (
    DEQ,
    GMRES,
    IFT,
    Anderson,
    ConvergenceError,
    ConvergenceWarning,
    FixedPointIteration,
    Status,
)
from torchdeq.solution import Reporter


def short():
    f = TanhMap.make(gain=0.9)
    return FixedPointIteration(max_iter=3, tol=1e-9)(f, f.z0)


def test_status_is_a_code_per_sample_and_a_sentence():
    solution = short()
    assert solution.status.tolist() == [Status.MAX_ITER] * 4
    assert "max_iter" in Status.MAX_ITER.sentence
    assert all(status.sentence.endswith(".") for status in Status)


def test_traces_have_one_row_per_evaluation():
    solution = short()
    assert solution.abs_trace.shape == solution.rel_trace.shape == (3, 4)
    assert torch.equal(solution.trace[-1], solution.residual)
    assert solution.nstep.tolist() == [3] * 4


def test_prints_what_matters():
    assert repr(short()).startswith("Solution(0 of 4 converged, largest abs residual ")


def test_the_warning_names_the_users_line_forward_and_backward():
    f = TanhMap.make(gain=0.9)
    for adjoint in (False, True):
        deq = DEQ(Anderson(tol=1e-3 if adjoint else 1e-12, max_iter=30 if adjoint else 4),
                  IFT(solver=GMRES(max_iter=3 if adjoint else 60)))  # fmt: skip
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            z, _ = deq(f, f.z0)
            z.sum().backward()
        assert [w.category for w in caught] == [ConvergenceWarning]
        assert caught[0].filename == __file__


def test_a_reporter_warns_once_counts_always_and_pickles():
    report = Reporter("Do this.")
    with pytest.warns(ConvergenceWarning, match="Do this"):
        report(short())
    report(short())
    assert report.unconverged == 2
    assert pickle.loads(pickle.dumps(report)).unconverged == 2
    with pytest.raises(ConvergenceError, match="Do that"):
        Reporter("Do that.", throw=True)(short())
