"""How fast is an exported solve? Python, the program run as a module, and compiled ahead of time by AOTInductor.

python benchmarks/export.py            # prints a table
python benchmarks/export.py --quick    # small states, few rounds, without AOTInductor
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peers import Peers
from report import environment, grid
from timing import Spread, clocked, take_turns
from torchdeq import DEQ, Anderson, export

HEAD = ("problem", "evaluations", "Python, ms", "program, ms", "AOTInductor, ms")
TOL = 1e-4


class Tanh(nn.Module):
    """f(z) = tanh(W z + x)."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(0.5 * torch.randn(width, width) / width**0.5)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(nn.functional.linear(z, self.weight) + x)


class Conv(nn.Module):
    """f(z) = tanh(conv(z) + x)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.normal_(self.conv.weight, std=0.3 / (9 * channels) ** 0.5)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.conv(z) + x)


def problems(quick: bool) -> dict[str, tuple[nn.Module, Tensor]]:
    """Maps and inputs by name."""
    if quick:
        return {"tanh 4×8": (Tanh(8), torch.randn(4, 8))}
    return {
        "tanh 32×64": (Tanh(64), torch.randn(32, 64)),
        "tanh 32×512": (Tanh(512), torch.randn(32, 512)),
        "conv 8×16×16×16": (Conv(16), torch.randn(8, 16, 16, 16)),
    }


def compiled(program: Any) -> Callable[..., Any]:
    """The program by AOTInductor."""
    with tempfile.TemporaryDirectory() as folder:
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(Path(folder) / "solve.pt2"))
        run: Callable[..., Any] = torch._inductor.aoti_load_package(path)
        return run


@torch.no_grad()
def measure(quick: bool = False, rounds: int = 50, ahead: bool = True) -> list[tuple[str, ...]]:
    """The rows of the table."""
    torch.manual_seed(0)
    rows = []
    for name, (f, x) in problems(quick).items():
        f.eval()
        deq, z0 = DEQ(Anderson(tol=TOL)).eval(), torch.zeros_like(x)
        program = export(deq, f, (z0, x))
        runs: dict[str, Callable[[], Any]] = {
            "Python": lambda deq=deq, f=f, z0=z0, x=x: deq(lambda z: f(z, x), z0),
            "program": partial(program.module(), z0, x),
        }
        if ahead:
            runs["AOTInductor"] = partial(compiled(program), z0, x)
        turns = {who: clocked(lambda run=run: run) for who, run in runs.items()}
        seconds = take_turns(turns, rounds, name)
        nfe = int(runs["Python"]()[1].nfe)
        cells = [
            Spread.of(seconds[who]).cell(1e3) if who in seconds else "–"
            for who in ("Python", "program", "AOTInductor")
        ]
        rows.append((name, str(nfe), *cells))
    return rows


def main(args: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small, and without AOTInductor")
    parser.add_argument("--out", type=Path, help="where to write export.md; nowhere if it is not given")
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    where = environment(Peers([], [], {}, []))  # before the run, for the code that is loaded
    rows = measure(options.quick, 2 if options.quick else 50, not options.quick)
    about = f"Anderson, relative residual {TOL:g}, float32. Median (quartiles) of turns."
    lines = [*where, "", about, "", *grid(HEAD, rows)]
    print(*lines, sep="\n")
    if options.out:
        head = [
            "# Exported programs",
            "",
            "Written by `benchmarks/export.py`, which says what is measured.",
            "",
        ]
        (options.out / "export.md").write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
