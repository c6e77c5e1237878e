"""The command line. `COMMANDS` lists the subcommands; each is a module with `add_to(subparsers)`, which makes a
parser and sets its `run`, a function of the parsed arguments that returns the exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torchdeq
from torchdeq.cli import bench, train
from torchdeq.cli.errors import UsageError

__all__ = ["COMMANDS", "main"]

COMMANDS = (train, bench)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `torchdeq` with these arguments.

    Arguments:
        argv: the arguments; None for those of the process.

    Returns:
        The exit code: 0 if all went well, 2 if the arguments were wrong, 130 after Ctrl-C.

    Example:
        >>> main(["train", "digits", "--tol", "-1"])  # prints what is wrong to stderr
        2
    """
    parser = argparse.ArgumentParser(prog="torchdeq", description="Deep equilibrium models in PyTorch.")
    parser.add_argument("--version", action="version", version=f"torchdeq {torchdeq.__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_to(subparsers)
    try:
        args = parser.parse_args(argv)
    except SystemExit as end:  # argparse has printed what is wrong, or the help
        return int(end.code or 0)
    try:
        return int(args.run(args))
    except UsageError as error:
        print(f"torchdeq: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ntorchdeq: interrupted", file=sys.stderr)
        return 130
