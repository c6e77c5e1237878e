"""The recursive network makes the rounds it says with the gradients it says, and the study runs on right puzzles."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from torchdeq import DEQ, GMRES, IFT, JFB, PhantomGrad, SimpleFixedPointIteration, Unroll
from torchdeq.zoo.recursive import RecursiveReasoner, Thought

ROOT = Path(__file__).parents[2]


@pytest.fixture
def puzzles() -> Tensor:
    return torch.randint(4, (3, 6), generator=torch.Generator().manual_seed(1))


def reasoner(deq: DEQ | None = None, **options: int) -> RecursiveReasoner:
    torch.manual_seed(0)
    return RecursiveReasoner(6, 3, deq, width=4, **options).double()


def rounds(count: int, *, record: tuple[int, ...] = ()) -> DEQ:
    return DEQ(SimpleFixedPointIteration(max_iter=count, tol=math.inf), Unroll(last=1), record=record)


def by_hand(model: RecursiveReasoner, puzzles: Tensor, free: int, cut: int = 0) -> Thought:
    """So many rounds without a graph and one with, of which the first `cut` updates of z have none."""
    x = model.embed(puzzles) + model.places
    y, z = model.y0.expand(3, 6, 4), model.z0.expand(3, 6, 4)
    for r in range(free + 1):
        for update in range(model.inner):
            z = model.net(x + y + z)
            z = z.detach() if r < free or update < cut else z
        y = model.net(y + z)
        y = y.detach() if r < free else y
    return Thought(y, z)


def gradients(model: RecursiveReasoner, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert any(g is not None and g.abs().max() > 1e-3 for g in ours)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# The model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [0, 2])
def test_a_segment_is_rounds_without_a_graph_and_one_with(puzzles: Tensor, cut: int) -> None:
    model = reasoner(rounds(3), inner=3, tracked=3 - cut)
    (logits,), carry, solution = model(puzzles)
    expected = by_hand(model, puzzles, 2, cut)
    torch.testing.assert_close(carry.z, expected.z.detach(), rtol=1e-12, atol=1e-12)
    assert_same(
        gradients(model, logits.square().sum()), gradients(model, model.head(expected.y).square().sum())
    )
    assert solution.nfe == 3


def test_the_cut_changes_the_gradient_and_not_the_answer(puzzles: Tensor) -> None:
    whole, cut = reasoner(rounds(2)), reasoner(rounds(2), tracked=1)
    (a,), (b,) = whole(puzzles)[0], cut(puzzles)[0]
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    g, h = (gradients(m, out.square().sum())[0] for m, out in ((whole, a), (cut, b)))
    assert (g - h).norm() > 0.01 * g.norm()


def test_answers_are_the_same_without_grad_mode_and_when_a_carry_goes_on(puzzles: Tensor) -> None:
    model = reasoner(rounds(2))
    _, carry, _ = model(puzzles)
    (twice,), end, _ = model(puzzles, carry)
    model.deq = rounds(4, record=(2,))
    (_, once), other, _ = model(puzzles)
    torch.testing.assert_close(once, twice, rtol=1e-12, atol=1e-12)
    assert not end.y.requires_grad
    with torch.no_grad():
        answers, same, _ = model(puzzles)
    torch.testing.assert_close(answers[1], twice, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(same.z, other.z, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(answers[0], reasoner(rounds(2))(puzzles)[0][0], rtol=1e-12, atol=1e-12)


def test_recorded_answers_have_the_gradients_of_their_segments(puzzles: Tensor) -> None:
    model = reasoner(rounds(6, record=(2, 4)))
    answers, _, _ = model(puzzles)
    ours = gradients(model, sum(a.square().sum() for a in answers))  # type: ignore[arg-type]
    by_segments = []
    model.deq, carry = rounds(2), None
    for _ in range(3):
        (answer,), carry, _ = model(puzzles, carry)
        by_segments.append(answer)
    theirs = gradients(model, sum(a.square().sum() for a in by_segments))  # type: ignore[arg-type]
    assert_same(ours, theirs)


@pytest.mark.parametrize("method", [IFT(solver=GMRES()), PhantomGrad(steps=2), Unroll(), Unroll(last=2)])
def test_a_cut_round_is_not_for_methods_that_need_all_of_it(method: IFT | PhantomGrad | Unroll) -> None:
    deq = DEQ(SimpleFixedPointIteration(max_iter=3, tol=math.inf), method)
    with pytest.raises(TypeError, match="cuts the graph of a round"):
        reasoner(deq, tracked=1)
    reasoner(deq)  # which a whole one is
    reasoner(DEQ(grad=JFB()), tracked=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner": 0}, "inner of at least 1"),
        ({"inner": 2, "tracked": 3}, "tracked from 1 to inner"),
        ({"tracked": 0}, "tracked from 1 to inner"),
        ({"layers": 0}, "layers=0"),
    ],
)
def test_values_out_of_range_are_errors(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reasoner(**options)


# The study ----------------------------------------------------------------------------------------------------


def is_solution(cells: tuple[int, ...], side: int, height: int, width: int) -> bool:
    """By rows, columns and boxes, rather than by peers."""
    rows = [cells[side * i : side * (i + 1)] for i in range(side)]
    columns = list(zip(*rows, strict=True))
    boxes = [
        [rows[height * a + i][width * b + j] for i in range(height) for j in range(width)]
        for a in range(side // height)
        for b in range(side // width)
    ]
    return all(sorted(group) == list(range(1, side + 1)) for group in (*rows, *columns, *boxes))


def test_there_are_288_solutions_in_12_classes(study: ModuleType) -> None:
    every = study.solutions(study.SMALL, [0] * 16, 10**6)
    assert len(set(every)) == len(every) == 288
    assert all(is_solution(s, 4, 2, 2) for s in every)
    classes = [study.class_of(s) for s in every]
    assert len(set(classes)) == 12
    relabelled = tuple(5 - v for v in every[7])
    assert study.class_of(relabelled) == classes[7]


def test_solutions_of_six_rows_are_solutions(study: ModuleType) -> None:
    some = study.solutions(study.LARGE, [0] * 36, 50, random.Random(0))
    assert len(set(some)) == 50
    assert all(is_solution(s, 6, 2, 3) for s in some)


@pytest.mark.parametrize("which", [0, 1])
def test_puzzles_have_one_solution_and_need_every_given(study: ModuleType, which: int) -> None:
    draw, grid = random.Random(0), study.GRIDS[which]
    for _ in range((20, 2)[which]):
        (solution,) = study.solutions(grid, [0] * grid.cells, 1, draw)
        puzzle = study.dig(grid, solution, draw)
        assert all(given in (0, v) for given, v in zip(puzzle, solution, strict=True))
        assert study.solutions(grid, puzzle, 2) == [solution]
        for cell in (i for i, v in enumerate(puzzle) if v):
            assert len(study.solutions(grid, (*puzzle[:cell], 0, *puzzle[cell + 1 :]), 2)) == 2


@pytest.mark.parametrize("which", [0, 1])
def test_no_class_is_both_trained_and_tested_on(study: ModuleType, which: int) -> None:
    train, test = study.data(study.GRIDS[which], 0, *((60, 30), (6, 3))[which])
    assert train.puzzles.shape == ((60, 16), (6, 36))[which]
    seen, held = ({study.class_of(s) for s in part.solutions.tolist()} for part in (train, test))
    assert len(held) > 1
    assert not seen & held


def test_a_batch_is_relabelled(study: ModuleType) -> None:
    part, _ = study.data(study.SMALL, 0, 4, 1)
    batch = part.draw(64, torch.Generator().manual_seed(0))
    known = {study.class_of(s) for s in part.solutions.tolist()}
    assert {study.class_of(s) for s in batch.solutions.tolist()} == known
    assert len({tuple(s) for s in batch.solutions.tolist()}) > 4  # more than there are
    given = batch.puzzles > 0
    assert torch.equal(batch.puzzles[given], batch.solutions[given])
    assert set(given.sum(dim=1).tolist()) <= set((part.puzzles > 0).sum(dim=1).tolist())


def test_one_batch_can_be_learned_by_heart(study: ModuleType) -> None:
    way, options = study.WAYS["whole round"], study.Options()
    few, _ = study.data(study.SMALL, 0, 4, 1)
    torch.manual_seed(0)
    model = way.model(options)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        carry = None
        for _ in range(2):
            logits, carry, _ = model(few.puzzles, carry)
            optimizer.zero_grad()
            study.loss_of(logits, few.solutions).backward()
            optimizer.step()
    curve = study.test(model, way, few, options, 3)
    assert curve["solved"][1] == curve["cells"][1] == 1.0


def test_the_study_runs(study: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert study.main(["--quick", "--solver", "broyden", "--grad", "jfb", "--out", str(tmp_path)]) == 0
    (found,) = json.loads((tmp_path / "recursive.json").read_text())["measured"]
    for grid, names in zip(study.GRIDS, (study.WAYS, study.WAYS_LARGE), strict=True):
        for name in names:
            at, calls = f"{grid} {name}", study.WAYS[name].calls
            assert found[f"{at}: batches"] >= 2
            assert found[f"{at}: steps"] == calls * found[f"{at}: batches"]
            assert len(found[f"{at}: moves, curve"]) == study.QUICK.segments
            assert found[f"{at}: solved, trained"] <= found[f"{at}: cells, trained"] < 1
            assert 0.5 < found[f"{at}: loss"] < 2.5  # that of guessing is log 4 and log 6
    for name in study.LEVEL:
        assert found[f"4×4 {name}, level: batches"] >= found["4×4 whole round: batches"]
    assert "recursive.png" in capsys.readouterr().out


def test_the_options_are_those_of_the_equilibrium(study: ModuleType) -> None:
    options = study.Options(solver="broyden", grad="jfb")
    assert isinstance(study.equilibrium(options).grad, JFB)
    assert "Broyden" in repr(study.equilibrium(options).solver)
    assert isinstance(study.equilibrium(study.Options()).grad, IFT)
