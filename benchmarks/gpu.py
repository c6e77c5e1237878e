"""What do solvers cost on a GPU beyond evaluations? Times, kernel launches, and waits of the host.

    python benchmarks/gpu.py                            # prints a table; needs a CUDA device
    python benchmarks/gpu.py --out benchmarks/results   # writes gpu.md too
    python benchmarks/gpu.py --quick                    # small states, few rounds; also on the CPU

Without a CUDA device it does what --quick does, on the CPU. See README.md here for what is counted.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from launches import Counts, count
from peers import Peers
from report import environment, grid
from torchdeq import DEQ, GMRES, IFT, Anderson, Broyden, FixedPointIteration, Multisecant, Solver

SOLVERS: tuple[Solver, ...] = (FixedPointIteration(), Anderson(), Broyden(), Multisecant())
SHORT, LONG = 8, 20  # evaluations; launches in an iteration are the difference
SIZES = ((32, 64), (32, 512), (128, 512), (32, 4096), (256, 65536))
QUICK = ((4, 8), (4, 96))
DENSE = 2048  # the largest D that gets a matrix
RANK = 16
HEADS = ("overhead", "launches", "waits")

Action = Callable[[], Any]


class Tanh(nn.Module):
    """f(z) = tanh(W z + x) for z (B, D), a contraction. W is a matrix, or of rank 16 where D is large."""

    def __init__(self, batch: int, size: int):
        super().__init__()
        rank = size if size <= DENSE else RANK
        self.v = nn.Parameter(torch.randn(rank, size) / (size**0.5))
        self.u = None if rank == size else nn.Parameter(torch.randn(size, rank) / rank**0.5)
        self.register_buffer("x", torch.randn(batch, size))

    def forward(self, z: Tensor) -> Tensor:
        h = nn.functional.linear(z, self.v)
        h = h if self.u is None else nn.functional.linear(h, self.u)
        return torch.tanh(0.4 * h + self.x)


class Block(nn.Module):
    """A transformer block with the input injected, for z (B, tokens · width): about a contraction."""

    def __init__(self, batch: int, tokens: int, width: int, heads: int = 4):
        super().__init__()
        self.shape, self.heads = (batch, tokens, width), heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.register_buffer("x", torch.randn(batch, tokens * width))

    def forward(self, z: Tensor) -> Tensor:
        z = z.reshape(self.shape)
        batch, tokens, width = self.shape
        q, k, v = (
            t.reshape(batch, tokens, self.heads, -1).transpose(1, 2)
            for t in self.qkv(self.first(z)).chunk(3, dim=-1)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(self.shape)
        z = 0.3 * z + 0.3 * self.out(mixed)
        z = z + 0.1 * self.down(nn.functional.gelu(self.up(self.second(z))))
        return z.reshape(batch, -1) + self.x


@dataclass(frozen=True)
class Case:
    """A map, and where it is solved from."""

    name: str
    f: nn.Module
    z0: Tensor

    @property
    def device(self) -> torch.device:
        return self.z0.device


def cases(device: torch.device, *, quick: bool) -> Iterator[Case]:
    """One at a time: the largest take gigabytes."""
    torch.manual_seed(0)
    for batch, size in QUICK if quick else SIZES:
        rank = "" if size <= DENSE else f", rank {RANK}"
        f = Tanh(batch, size).to(device)
        yield Case(f"tanh {batch}×{size}{rank}", f, torch.zeros_like(f.x))
    batch, tokens, width = (2, 3, 8) if quick else (16, 128, 256)
    block = Block(batch, tokens, width).to(device)
    yield Case(f"transformer {batch}×{tokens}×{width}", block, torch.zeros_like(block.x))


def seconds(action: Action, device: torch.device, rounds: int) -> float:
    """The median over rounds, by events on a CUDA device, which see the device and the gaps that the host leaves."""
    times = []
    for number in range(-2, rounds):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            action()
            end.record()
            end.synchronize()
            took = begin.elapsed_time(end) / 1e3
        else:
            start = time.perf_counter()
            action()
            took = time.perf_counter() - start
        if number >= 0:  # two to warm up
            times.append(took)
    return statistics.median(times)


class Row(NamedTuple):
    """One solver on one map."""

    case: str
    what: str
    overhead: (
        float  # time over that of its evaluations, or of its products and what else a backward pass must do
    )
    launches: float  # in an iteration, those of f among them; a product's share of the whole backward pass
    f_launches: float
    counts: Counts  # of the whole solve


def forward_rows(case: Case, modes: Sequence[dict[str, Any]], rounds: int) -> Iterator[Row]:
    """Solves without a graph."""
    f, z0, device = case.f, case.z0, case.device

    def evaluations() -> None:
        z = z0
        for _ in range(LONG):
            z = f(z)

    with torch.no_grad():
        one = seconds(evaluations, device, rounds) / LONG
        f_launches = count(lambda: f(z0), device).launches
        for solver in SOLVERS:
            for options in modes:
                # All samples are near enough at once, but must make all evaluations.
                short, long = (
                    DEQ(solver.replace(max_iter=k, min_iter=k, tol=1e30), **options) for k in (SHORT, LONG)
                )
                _, solution = long(f, z0)
                took = seconds(lambda deq=long: deq(f, z0), device, rounds)
                few, many = (count(lambda deq=deq: deq(f, z0), device) for deq in (short, long))
                yield Row(
                    case.name,
                    f"{type(solver).__name__}{_mode(options)}",
                    took / (solution.nfe * one),
                    many.per(few, LONG - SHORT),
                    f_launches,
                    many,
                )


def backward_rows(case: Case, modes: Sequence[dict[str, Any]], rounds: int) -> Iterator[Row]:
    """The backward pass of IFT with GMRES: products, one evaluation with a graph, one pass to the parameters."""
    f, z0, device = case.f, case.z0, case.device
    at = z0.clone().requires_grad_()
    fz, g, wanted = f(at), torch.ones_like(z0), list(f.parameters())
    product = lambda: torch.autograd.grad(fz, at, g, retain_graph=True)  # noqa: E731
    one = seconds(product, device, rounds)
    fixed = seconds(lambda: f(at), device, rounds)
    fixed += seconds(
        lambda: torch.autograd.grad(fz, wanted, g, retain_graph=True, allow_unused=True), device, rounds
    )
    launches = count(product, device).launches
    for options in modes:
        products: list[int] = []
        deq = DEQ(
            Anderson(tol=1e-4, stop_mode="rel"),
            IFT(solver=GMRES(tol=1e-5)),
            on_backward=lambda solution, products=products: products.append(solution.nfe),
            **options,
        )
        z, _ = deq(f, z0)

        def backward(z: Tensor = z) -> None:
            torch.autograd.grad(z, wanted, g, retain_graph=True, allow_unused=True)

        took = seconds(backward, device, rounds)
        counts = count(backward, device)
        n = products[-1]
        yield Row(
            case.name,
            f"IFT backward, GMRES{_mode(options)}",
            took / (n * one + fixed),
            counts.launches / n,
            launches,
            counts,
        )


def _mode(options: dict[str, Any]) -> str:
    return ", compiled" if options else ""


def run(device: torch.device, *, quick: bool, rounds: int) -> list[Row]:
    modes: list[dict[str, Any]] = [{}]
    if "compile" in inspect.signature(DEQ).parameters and not quick:
        modes.append({"compile": True})
    found: list[Row] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in cases(device, quick=quick):
            for rows in (forward_rows, backward_rows):
                for row in rows(case, modes, rounds):
                    found.append(row)
                    print(f"{row.case:32} {row.what:32} {'  '.join(_cells(row))}", flush=True)
    return found


def _cells(row: Row) -> list[str]:
    return [
        f"{row.overhead:.2f}",
        f"{row.launches:.0f} ({row.f_launches:.0f})",
        f"{row.counts.waits} + {row.counts.late}",
    ]


def report(rows: Sequence[Row], device: torch.device) -> list[str]:
    """The lines of the Markdown file."""
    cuda = device.type == "cuda"
    named = torch.cuda.get_device_name(device) if cuda else "no GPU: small states on the CPU"
    return [
        "# Overhead on a GPU",
        "",
        "Written by `benchmarks/gpu.py`; `benchmarks/README.md` says what is counted.",
        "",
        *environment(Peers([], [], {}, [])),
        f"- {named}",
        "",
        "*Overhead*: time over that of the evaluations, or the products, alone. *Launches* in an iteration, and in "
        f"brackets those of {'f' if cuda else 'f; ATen operations'} by itself. *Waits* of the host in a solve of "
        f"{LONG} evaluations: for the whole queue + for what was queued earlier.",
        "",
        *grid(["map", "what", *HEADS], [[row.case, row.what, *_cells(row)] for row in rows]),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small states and few rounds")
    parser.add_argument("--rounds", type=int, default=21, help="of each measurement")
    parser.add_argument("--out", type=Path, help="a folder to write gpu.md to")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    quick = args.quick or device.type == "cpu"
    rows = run(device, quick=quick, rounds=3 if quick else args.rounds)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "gpu.md").write_text("\n".join(report(rows, device)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
