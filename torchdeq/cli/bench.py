"""`torchdeq bench`: how fast is this library here, beside torchdeq 0.1.0, jaxopt and optimistix?

The programs that measure are files of the repository, under benchmarks/, where their results and their peers'
environments are kept, and where each can be run by itself. They are no part of an installed package. So this command
runs those of the checkout that torchdeq is imported from, each in a process of its own, and says so where there is
none.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchdeq.cli.checkout import programs
from torchdeq.cli.errors import UsageError, need

#: What can be measured: the name of the program, and what it asks.
STUDIES = {
    "overhead": "the time of a solve over that of its evaluations, beside torchdeq 0.1.0",
    "training": "a training step at equal residual, beside torchdeq 0.1.0, jaxopt and optimistix",
    "scaling": "what a solver adds to an evaluation, by batch, size, iterations and history",
}
NEEDED = ("numpy", "matplotlib.figure", "scipy.optimize", "tqdm")


def add_to(subparsers: Any) -> None:
    """Add the parser of `torchdeq bench`."""
    parser = subparsers.add_parser(
        "bench",
        help="measure the library's speed beside its peers'",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(["studies:", *(f"  {name:10} {what}" for name, what in STUDIES.items())]),
    )
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"{', '.join(STUDIES)} (default: all)")
    parser.add_argument(
        "--quick", action="store_true", help="tiny problems, no peers, nothing compiled: does it run?"
    )
    parser.add_argument(
        "--no-compile", action="store_true", help="without what torch.compile takes minutes for"
    )
    parser.add_argument(
        "--redraw", action="store_true", help="reports and plots only, from the last run's numbers"
    )
    parser.add_argument(
        "--out", type=Path, help="where to write (default: benchmarks/results, or with --quick runs)"
    )
    parser.add_argument(
        "--peers",
        type=Path,
        metavar="WHEEL",
        help="a wheel of torchdeq 0.1.0 (default: downloaded once, into benchmarks/.cache)",
    )
    parser.add_argument(
        "--jax-python",
        type=Path,
        metavar="PATH",
        help="an interpreter with jax, jaxopt and optimistix (default: an environment made once, in benchmarks/.cache)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry out `torchdeq bench` and return its exit code: 0, or that of the first program that failed."""
    folder = programs("benchmarks", STUDIES, "train,bench")
    if unknown := [name for name in args.studies if name not in STUDIES]:
        raise UsageError(f"bench {unknown[0]}: there is no such study; expected {', '.join(STUDIES)}.")
    for option, path in (("--peers", args.peers), ("--jax-python", args.jax_python)):
        if path is not None and not path.is_file():
            raise UsageError(f"{option} {path}: there is no such file.")
    if args.quick and args.redraw:
        raise UsageError("--quick measures and --redraw does not; give one of them.")
    for module in NEEDED:
        need(module, "train,bench")
    for name in args.studies or STUDIES:
        print(f"{name}: {STUDIES[name]}", flush=True)
        code = subprocess.run(command(folder / f"{name}.py", args)).returncode
        if code:
            print(f"torchdeq: error: {name} ended with code {code}", file=sys.stderr)
            return code
    print(f"Written to {args.out or (Path('runs') if args.quick else folder / 'results')}.")
    return 0


def command(program: Path, args: argparse.Namespace) -> Sequence[str]:
    """How to run a program with what is meant for it."""
    words = [sys.executable, str(program)]
    words += ["--quick"] * args.quick + ["--redraw"] * args.redraw
    if args.out is not None:
        words += ["--out", str(args.out)]
    if args.no_compile and program.stem in ("overhead", "training"):
        words.append("--no-compile")
    if args.peers is not None and program.stem in ("overhead", "training"):
        words += ["--peers", str(args.peers)]
    if args.jax_python is not None and program.stem == "training":
        words += ["--jax-python", str(args.jax_python)]
    return words
