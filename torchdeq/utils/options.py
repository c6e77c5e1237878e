"""The options of torchdeq 0.1.0's entry points, in one table.

The signatures of `DEQBase` and its cores, the command-line flags of `add_deq_args`, and the check of what
`get_deq` is given are all read from here.
"""

from __future__ import annotations

import argparse
import difflib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchdeq._suggest import did_you_mean
from torchdeq.solver.registry import SOLVERS


@dataclass(frozen=True)
class Option:
    """One option: its name, its default on the command line, and what it does.

    `kind` is the type a command-line word is read as; bool makes a switch. `where` says who reads it: 'base'
    and 'core' are parameters of the DEQ classes, in this order; 'other' are flags for the training script.
    """

    name: str
    default: Any
    kind: type
    where: str
    help: str
    many: bool = False
    signature_default: Any = ...

    @property
    def in_signature(self) -> Any:
        """The default in a DEQ class's signature, where it differs from the flag's."""
        return self.default if self.signature_default is ... else self.signature_default

    @property
    def group(self) -> str:
        """The heading in `--help`."""
        if self.where == "base":
            return "torchdeq: solvers"
        if self.name.startswith(("norm_", "sn_")):
            return "torchdeq: normalisation"
        return "torchdeq: training"


OPTIONS = (
    Option("f_solver", "fixed_point_iter", str, "base", "forward solver, by its registered name"),
    Option(
        "b_solver",
        "fixed_point_iter",
        str,
        "base",
        "adjoint solver of the backward pass, by its registered name",
    ),
    Option("no_stat", None, bool, "base", "do not measure residuals on the way (Picard iteration only)"),
    Option("f_max_iter", 40, int, "base", "most evaluations of f in the forward solve"),
    Option("b_max_iter", 40, int, "base", "most vector-Jacobian products in the adjoint solve"),
    Option("f_tol", 1e-3, float, "base", "tolerance of the forward solve"),
    Option("b_tol", 1e-6, float, "base", "tolerance of the adjoint solve, relative to the cotangent"),
    Option("f_stop_mode", "abs", str, "base", "residual of the forward solve: abs or rel"),
    Option("b_stop_mode", "abs", str, "base", "residual of the adjoint solve: abs or rel"),
    Option("eval_factor", 1.0, float, "base", "in eval mode, f_max_iter times this"),
    Option("eval_f_max_iter", 0, int, "base", "in eval mode, this instead of f_max_iter, if above 0"),
    Option("norm_type", "weight_norm", str, "other", "normalisation: none, weight_norm or spectral_norm"),
    Option("norm_no_scale", False, bool, "other", "no learnable scale in the normalisation"),
    Option("norm_clip", False, bool, "other", "only ever scale weights down, to at most norm_clip_value"),
    Option("norm_clip_value", 1.0, float, "other", "upper bound of the scale factor"),
    Option("norm_target_norm", 1.0, float, "other", "norm to scale to where no scale is learned"),
    Option("sn_n_power_iters", 1, int, "other", "power iterations per update in spectral norm"),
    Option("core", "sliced", str, "other", "how sampled states are made: sliced or indexing"),
    Option("ift", False, bool, "core", "implicit differentiation for the last state"),
    Option(
        "hook_ift", False, bool, "core", "implicit differentiation in a tensor hook, on the forward's graph"
    ),
    Option(
        "grad",
        [1],
        int,
        "core",
        "steps of the phantom gradient, one number or one per state",
        many=True,
        signature_default=1,
    ),
    Option("tau", 1.0, float, "core", "damping of the phantom gradient"),
    Option("sup_gap", -1, int, "core", "sample every so many steps of the phantom gradient"),
    Option(
        "sup_loc",
        [],
        int,
        "core",
        "sample these steps of the phantom gradient",
        many=True,
        signature_default=None,
    ),
    Option("n_states", 1, int, "core", "number of states sampled evenly from the forward solve"),
    Option(
        "indexing",
        [],
        int,
        "core",
        "evaluations of the forward solve to sample",
        many=True,
        signature_default=None,
    ),
    Option("gamma", 0.8, float, "other", "strength of the fixed-point correction loss"),
    Option("jac_loss_weight", 0.0, float, "other", "weight of the Jacobian regularisation"),
    Option("jac_loss_freq", 0.0, float, "other", "how often to apply the Jacobian regularisation"),
    Option(
        "jac_incremental", 0, int, "other", "raise jac_loss_weight by 0.1 after so many steps, if positive"
    ),
    Option("sradius_mode", False, bool, "other", "compute the spectral radius in validation"),
)

NAMES = tuple(option.name for option in OPTIONS)


def add_deq_args(parser: argparse.ArgumentParser) -> None:
    """Add the options of torchdeq to a command-line parser, under the names and defaults of 0.1.0.

    `--help` shows them in groups of their own, with their defaults. They are read by `get_deq(args)` and
    `apply_norm(model, args=args)`; those of training and monitoring are for the program to read.

    Arguments:
        parser: an `argparse.ArgumentParser`, or a group of one.

    Raises:
        argparse.ArgumentError: the parser has some of the flags already; nothing is added then. A parser made with
            `conflict_handler='resolve'` has them replaced.

    Where 0.1.0 accepts four names for `--b_solver`, it may be any that is registered when the command line is read.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_deq_args(parser)
        >>> args = parser.parse_args(['--f_solver', 'anderson', '--ift'])
        >>> args.f_solver, args.ift, args.f_max_iter
        ('anderson', True, 40)
    """
    shown = [option for option in OPTIONS if option.name != "no_stat"]  # which 0.1.0 has in the classes only
    there = getattr(parser, "_option_string_actions", {})
    taken = [f"--{option.name}" for option in shown if f"--{option.name}" in there]
    if taken and parser.conflict_handler != "resolve":
        raise argparse.ArgumentError(
            None,
            f"add_deq_args: the parser already has {', '.join(taken)}. Call add_deq_args once, give the program's own "
            f"options other names, or make the parser with conflict_handler='resolve' to have them replaced.",
        )
    groups: dict[str, Any] = {}
    for option in shown:
        if option.group not in groups:
            whole = isinstance(parser, argparse.ArgumentParser)
            groups[option.group] = parser.add_argument_group(option.group) if whole else parser
        _add(groups[option.group], option)


def _add(group: Any, option: Option) -> None:
    """Add the flag of one option."""
    flag, text = f"--{option.name}", option.help.replace("%", "%%")
    if option.kind is bool:
        group.add_argument(flag, action="store_true", help=text)
        return
    kind: Any = _registered_solver if option.name == "b_solver" else option.kind
    shown = " ".join(map(str, option.default)) if option.many else option.default
    text += f" (default: {shown if shown != '' else 'none'})"
    meta = {int: "N", float: "X", str: "NAME"}[option.kind]
    if option.many:
        group.add_argument(flag, type=kind, nargs="+", metavar=meta, default=list(option.default), help=text)
    else:
        group.add_argument(flag, type=kind, metavar=meta, default=option.default, help=text)


def _registered_solver(name: str) -> str:
    """The name of a solver, as argparse reads it."""
    if name not in SOLVERS:
        raise argparse.ArgumentTypeError(
            f"there is no solver {name!r}.{did_you_mean(name, SOLVERS)} Registered are {', '.join(SOLVERS)}"
        )
    return name


def check_keywords(keywords: Mapping[str, Any], known: tuple[str, ...], call: str) -> None:
    """Raise a TypeError that names the nearest option if a keyword is not known."""
    for name in keywords:
        if name not in known:
            raise TypeError(
                f"{call} has no option {name!r}.{did_you_mean(name, known)} Its options are {', '.join(known)}."
            )


def warn_near_misses(config: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Warn about keys of a foreign configuration that look like misspelt options."""
    for name in config:
        if isinstance(name, str) and name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
            if near:
                warnings.warn(
                    f"the configuration has {name!r}, which torchdeq does not know and ignores. Did you mean "
                    f"{near[0]!r}?",
                    UserWarning,
                    stacklevel=4,
                )
