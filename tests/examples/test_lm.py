"""The sequence model is an equilibrium that sees no future, its stacks are what they say, and the study runs."""

from __future__ import annotations

import copy
import json
import math
import random
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from torchdeq import DEQ, GMRES, IFT, Anderson, FixedPointIteration, Unroll
from torchdeq.zoo.lm import CausalBlock, EquilibriumLM

ROOT = Path(__file__).parents[2]
EXACT = DEQ(Anderson(tol=1e-13, stop_mode="rel", max_iter=300), IFT(solver=GMRES(tol=1e-12, max_iter=200)))


def model(deq: DEQ = EXACT) -> EquilibriumLM:
    torch.manual_seed(0)
    return EquilibriumLM(6, 7, deq, width=8, heads=2).double()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(6, (3, 7), generator=torch.Generator().manual_seed(1))


# The model ----------------------------------------------------------------------------------------------------


def test_the_block_is_its_equation() -> None:
    torch.manual_seed(0)
    block = CausalBlock(4, heads=2).double()
    z, x = torch.randn(2, 1, 5, 4, dtype=torch.float64)
    injected = block.inject(x)
    qkv, around = (block.attend(z) + injected[..., :12])[0], injected[0, :, 12:]  # (T, 12) and (T, 4)
    rows = []
    for t in range(5):
        heads = []
        for h in range(2):
            q, k, v = (qkv[:, 4 * i + 2 * h : 4 * i + 2 * h + 2] for i in range(3))
            weights = torch.softmax(k[: t + 1] @ q[t] / math.sqrt(2), dim=0)
            heads.append(weights @ v[: t + 1])
        h = block.norm(z[0, t] + around[t] + block.join.weight @ torch.cat(heads))
        rows.append(block.norm_out(h + block.inside(h)))
    torch.testing.assert_close(block(z, injected)[0], torch.stack(rows), rtol=1e-12, atol=1e-12)


def test_nothing_depends_on_what_comes_after_it(tokens: Tensor) -> None:
    net, other = model(), tokens.clone()
    other[:, 4:] = (other[:, 4:] + 1) % 6
    a, b = net(tokens)[0], net(other)[0]
    torch.testing.assert_close(a[:, :4], b[:, :4], rtol=1e-9, atol=1e-9)
    assert (a[:, 4:] - b[:, 4:]).abs().min(dim=-1).values.max() > 1e-3


def test_the_equilibrium_is_where_a_deep_stack_arrives(study: ModuleType, tokens: Tensor) -> None:
    net = model()
    deep = study.Stack(6, 7, width=8, heads=2, depth=200, tied=True).double()
    deep.load_state_dict(net.state_dict())
    logits, solution = net(tokens)
    assert bool(solution.converged.all())
    torch.testing.assert_close(deep(tokens)[0], logits, rtol=1e-9, atol=1e-9)
    deep.depth = 2
    assert (deep(tokens)[0] - logits).abs().max() > 1e-2  # so that the depth counts


def test_the_gradient_is_that_of_200_layers(tokens: Tensor) -> None:
    net = model()
    layers = copy.deepcopy(net)
    layers.deq = DEQ(FixedPointIteration(tol=1e-14, max_iter=200), Unroll())
    for m in (net, layers):
        m(tokens)[0].square().sum().backward()
    for ours, theirs in zip(net.parameters(), layers.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((1, 4), {}, "two tokens or more"),
        ((4, 0), {}, "length of at least 1"),
        ((4, 4), {"width": 6, "heads": 4}, "positive multiple of heads"),
        ((4, 4), {"heads": 0}, "one head or more"),
    ],
)
def test_values_out_of_range_are_errors(
    arguments: tuple[int, int], options: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        EquilibriumLM(*arguments, **options)  # type: ignore[arg-type]


def test_a_sequence_that_is_too_long_is_an_error() -> None:
    with pytest.raises(ValueError, match="got sequences of 8 tokens, expected at most length=7"):
        model()(torch.zeros(1, 8, dtype=torch.long))


# The study ----------------------------------------------------------------------------------------------------


def bits(words: list[str], study: ModuleType) -> float:
    """−log₂ of a sentence's probability, by reading it rather than from its making; agreement is checked."""

    def phrase() -> tuple[float, bool]:
        assert words.pop(0) == "the"
        plural = words[0].endswith("s")
        assert words.pop(0).removesuffix("s") in study.NOUNS
        chance = 0.5 / len(study.NOUNS)
        if words and words[0] == "that":
            words.pop(0)
            inner, other = phrase()
            assert verb(other) in study.ACTING
            return chance * study.RELATIVE * inner / len(study.ACTING), plural
        return chance * (1 - study.RELATIVE), plural

    def verb(plural: bool) -> str:
        word = words.pop(0)
        assert word.endswith("s") != plural
        return word.removesuffix("s")

    chance, plural = phrase()
    if verb(plural) in study.ALONE:
        chance *= (1 - study.OBJECT) / len(study.ALONE)
    else:
        chance *= study.OBJECT / len(study.ACTING) * phrase()[0]
    assert not words
    return -math.log2(chance)


def test_sentences_agree_in_number_and_have_the_bits_they_say(study: ModuleType) -> None:
    for seed in range(200):
        text, said = study.sentence(random.Random(seed))
        assert text.endswith(". ")
        assert said == pytest.approx(bits(text[:-2].split(), study), rel=1e-12)


def test_windows_are_shifted_by_one_and_the_texts_differ(study: ModuleType) -> None:
    task = study.Characters(0, 50)
    batch = task.batch(5, torch.Generator().manual_seed(0))
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    held = "".join(task.alphabet[i] for i in task.held.tolist())
    assert len(held) > 20_000
    assert not torch.equal(task.train[:200], task.held[:200])


def test_the_letters_to_repeat_are_those_at_the_beginning(study: ModuleType) -> None:
    task = study.Copy(3, 4)
    batch = task.batch(5, torch.Generator().manual_seed(0))
    assert batch.tokens.shape == (5, task.length)
    assert torch.equal(batch.targets[:, batch.places], batch.tokens[:, :3])
    assert bool((batch.tokens[:, 3:] < 2).all())


def test_stacks_have_as_many_parameters_and_no_more(study: ModuleType) -> None:
    task = study.Copy()
    most = study.size(EquilibriumLM(task.vocab, task.length, width=study.WIDTH, heads=study.HEADS))
    for name in study.STACKS:
        count = study.size(study.stack(name, task, most))
        assert count == most if name.startswith("tied") else 0.8 * most < count <= most


def test_memory_is_that_of_the_gradient_method(study: ModuleType) -> None:
    few, many = study.EVALUATIONS[0], study.EVALUATIONS[-1]
    grown = {}
    for method in ("ift", "unroll"):
        found: dict[str, float] = {}
        options = study.Options(solver="fixed_point_iter", grad=method)
        with pytest.warns(UserWarning, match="did not converge"):
            study.memory(study.Copy(2, 2), options, found)
        grown[method] = found[f"bytes of equilibrium {many}"] / found[f"bytes of equilibrium {few}"]
        assert found["bytes of tied 32"] > 10 * found["bytes of tied 2"]
    assert grown["ift"] == 1
    assert grown["unroll"] > 0.8 * many / few


def test_the_study_runs(study: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert study.main(["--quick", "--out", str(tmp_path)]) == 0
    (found,) = json.loads((tmp_path / "lm.json").read_text())["measured"]
    for task in ("copy", "characters"):
        for kind in ("equilibrium", *study.STACKS):
            seconds, losses = found[f"{task}: {kind}, curve"]
            assert len(losses) == found[f"{task}: {kind}, steps"] >= 3
            assert all(math.isfinite(loss) for loss in losses)
            assert seconds[-1] >= found[f"{task}: equilibrium, curve"][0][-1]
        # Untrained, a model knows nothing; and none can be better than the grammar.
        assert found[f"{task}: equilibrium, loss at equal steps"] > found[f"{task}: floor"]
    assert "lm.png" in capsys.readouterr().out
