"""`torchdeq train WORK`: a paper's work, made again at the scale of a laptop, beside what the paper says.

The studies are files of the repository, under examples/, where their results are kept, and where each can be run by
itself. They are no part of an installed package. So this command runs those of the checkout that torchdeq is imported
from, and says so where there is none.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchdeq.cli.checkout import programs
from torchdeq.cli.errors import UsageError, need_installed

#: The works that can be made again: the name of the file, and what it is.
WORKS = {
    "rbp": "recurrent back-propagation: a continuous Hopfield memory of digits",
    "lm": "deep equilibrium models: sequences by a transformer block, against stacks of layers",
    "imaml": "implicit MAML: sinusoids and few-shot digits",
    "hamburger": "matrix decomposition in place of attention",
    "jfb": "Jacobian-free backpropagation: digits, against exact and explicit",
    "phantom": "phantom gradients: against the exact one, and in training",
    "recursive": "recursive reasoning: Sudoku by a small network of two states",
    "reversible": "reversible equilibria: exact gradients in constant memory",
}
NEEDED = ("sklearn", "tqdm", "matplotlib")


def add_to(tasks: Any) -> None:
    """Add a parser for each work to the tasks of `torchdeq train`."""
    for name, summary in WORKS.items():
        parser = tasks.add_parser(name, help=summary, description=f"{summary}. {__doc__}")
        parser.add_argument("--seed", type=int, help="of data, weights and batches (default: 0)")
        parser.add_argument("--seeds", type=int, nargs="+", help="several, for the spread")
        parser.add_argument("--quick", action="store_true", help="tiny sizes, in seconds: does it run?")
        for option, what in (("solver", "forward solver"), ("grad", "gradient method")):
            parser.add_argument(f"--{option}", help=f"the {what} (default: the study's own)")
        parser.add_argument("--device", help="where to (default: cpu)")
        parser.add_argument("--out", type=Path, help="folder to write to (default: runs, or runs/quick)")
        parser.set_defaults(run=run, task=name)


def run(args: argparse.Namespace) -> int:
    """Run the study of a work and return its exit code."""
    folder = programs("examples", [args.task], "train,viz")
    if args.seed is not None and args.seeds is not None:
        raise UsageError("--seed is one seed and --seeds are several; give one of them.")
    for package in NEEDED:
        need_installed(package)
    return subprocess.run(command(folder / f"{args.task}.py", args)).returncode


def command(program: Path, args: argparse.Namespace) -> Sequence[str]:
    """How to run a study with these arguments.

    Example:
        >>> given = argparse.Namespace(seed=3, seeds=None, quick=True, solver=None, grad="jfb", device=None, out=None)
        >>> command(Path("examples/rbp.py"), given)[1:]
        ['examples/rbp.py', '--seed', '3', '--grad', 'jfb', '--quick']
    """
    words = [sys.executable, str(program)]
    for name in ("seed", "solver", "grad", "device", "out"):
        if (value := getattr(args, name)) is not None:
            words += [f"--{name}", str(value)]
    if args.seeds is not None:
        words += ["--seeds", *map(str, args.seeds)]
    return [*words, "--quick"] if args.quick else words
