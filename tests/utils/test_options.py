"""`add_deq_args`: 0.1.0's flags, and what it says of wrong ones."""

from __future__ import annotations

import argparse

import pytest

from torchdeq import SOLVERS, add_deq_args, get_deq, register_solver
from torchdeq.utils.options import OPTIONS


def parser(**options) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="train", **options)
    add_deq_args(made)
    return made


def test_without_flags_they_are_the_defaults() -> None:
    found = vars(parser().parse_args([]))
    assert found == {option.name: option.default for option in OPTIONS if option.name != "no_stat"}
    get_deq(argparse.Namespace(**found))


@pytest.mark.parametrize("option", [o for o in OPTIONS if o.name != "no_stat"], ids=lambda o: o.name)
def test_each_flag_is_read_as_its_type(option) -> None:
    words, value = {
        bool: ([], True),
        str: (["gmres"], "gmres"),
        int: (["3"], 3),
        float: (["2.5"], 2.5),
    }[option.kind]
    if option.many:
        words, value = ["3", "4"], [3, 4]
    found = getattr(parser().parse_args([f"--{option.name}", *words]), option.name)
    assert found == value
    assert type(found) is type(value)


def test_lists_are_not_shared_between_parsers() -> None:
    one, two = parser().parse_args([]), parser().parse_args([])
    one.indexing.append(3)
    assert two.indexing == []


def test_any_registered_solver_can_solve_backward(capsys) -> None:
    """0.1.0 knew four."""
    for name in SOLVERS:
        assert parser().parse_args(["--b_solver", name]).b_solver == name
    made = parser()
    register_solver("late", SOLVERS["anderson"])
    try:
        assert made.parse_args(["--b_solver", "late"]).b_solver == "late"
    finally:
        del SOLVERS["late"]
    with pytest.raises(SystemExit):
        made.parse_args(["--b_solver", "andersen"])
    assert "there is no solver 'andersen'. Did you mean 'anderson'?" in capsys.readouterr().err


def test_the_help_has_groups_and_defaults() -> None:
    text = " ".join(parser().format_help().split())
    for heading in ("torchdeq: solvers:", "torchdeq: normalisation:", "torchdeq: training:"):
        assert heading in text
    assert "tolerance of the forward solve (default: 0.001)" in text
    assert "one number or one per state (default: 1)" in text
    for option in OPTIONS:
        assert option.name == "no_stat" or f"--{option.name}" in text


def test_flags_that_are_there_already_are_named_and_nothing_is_added() -> None:
    """argparse names the first of them and has added the rest up to there."""
    made = argparse.ArgumentParser()
    made.add_argument("--tau", type=float)
    made.add_argument("--gamma", type=float)
    with pytest.raises(argparse.ArgumentError, match="already has --tau, --gamma"):
        add_deq_args(made)
    assert not hasattr(made.parse_args([]), "f_solver")
    with pytest.raises(argparse.ArgumentError, match="Call add_deq_args once"):
        add_deq_args(parser())


def test_flags_are_replaced_where_the_parser_says_so() -> None:
    made = argparse.ArgumentParser(conflict_handler="resolve")
    made.add_argument("--tau", type=int, default=7)
    add_deq_args(made)
    assert made.parse_args([]).tau == 1.0
    assert made.parse_args(["--tau", "0.5"]).tau == 0.5


def test_a_group_of_a_parser_takes_them_too() -> None:
    made = argparse.ArgumentParser()
    add_deq_args(made.add_argument_group("equilibrium"))
    assert made.parse_args(["--ift"]).ift
