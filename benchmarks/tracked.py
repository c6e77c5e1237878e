"""Does it pay to compile the one tracked call of f, from which the gradients of parameters come? On this machine.

    python benchmarks/tracked.py [--quick] [--rounds N] [--out benchmarks/results]

compares f with torch.compile(f): a call at a state, and the gradients of all parameters for a cotangent. That is what
`IFT`, `JFB` and one phantom step do once for a solve. Writes tracked.md. See README.md here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpu import Block
from layers import conv, dense
from peers import Peers
from report import environment, grid
from timing import Spread, clocked, ratios, take_turns

WAYS: Mapping[str, Callable[[Any], Any]] = {
    "f": lambda f: f,
    "torch.compile(f)": lambda f: torch.compile(f, fullgraph=True),
}


def cases(*, quick: bool) -> list[tuple[str, Callable[[Tensor], Tensor], Tensor, list[Tensor]]]:
    """Name, f, a state, and the parameters."""
    if quick:
        return [("tanh 4×8", layer := dense(4, 8), torch.zeros_like(layer.x), list(layer.parameters))]
    layers = [dense(32, 64), dense(32, 512), conv(32, 16, 16)]
    found: list[Any] = [
        (layer.name, layer, torch.zeros_like(layer.x), list(layer.parameters)) for layer in layers
    ]
    torch.manual_seed(0)
    block: nn.Module = Block(8, 32, 128)
    return [*found, ("transformer block 8×32×128", block, torch.randn(8, 32 * 128), list(block.parameters()))]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one tiny layer, by torch's own operations")
    parser.add_argument("--rounds", type=int, default=30, help="turns of each")
    parser.add_argument("--out", type=Path, help="where to write tracked.md; nowhere if it is not given")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rounds = 2 if options.quick else options.rounds
    ways = (
        WAYS
        if not options.quick
        else {**WAYS, "torch.compile(f)": lambda f: torch.compile(f, backend="eager")}
    )
    rows = []
    for name, f, z, parameters in cases(quick=options.quick):
        cotangent = torch.ones_like(z)

        def turn(g: Callable[[Tensor], Tensor], z: Any = z, p: Any = parameters, u: Any = cotangent) -> Any:
            return clocked(lambda: lambda: torch.autograd.grad(g(z), p, u))

        seconds = take_turns({way: turn(make(f)) for way, make in ways.items()}, rounds, name)
        plain, compiled = seconds.values()
        rows.append(
            [name, *(Spread.of(s).cell(1e6) for s in (plain, compiled)), ratios(compiled, plain).cell()]
        )
    table = grid(["", *(f"{way}, µs" for way in ways), "ratio"], rows)
    print(*table, sep="\n")
    if options.out:
        head = "# The tracked call of f and its backward pass"
        about = "Written by `benchmarks/tracked.py`, which says what is measured. Medians, with quartiles."
        lines = [head, "", about, "", *environment(Peers([], [], {}, [])), "", *table]
        (options.out / "tracked.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
