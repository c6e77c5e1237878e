"""What the comparisons of speed share: contenders that take turns, quartiles, and operations counted.

A busy machine slows everything, but not for long. So all contenders of a comparison take turns, in an order that is
drawn anew for each round, and a ratio is that of two times of the same round.
"""

from __future__ import annotations

import json
import random
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import trange

#: Takes a turn, and returns the seconds that count.
Turn = Callable[[], float]


class Spread(NamedTuple):
    """The quartiles of repeated measurements."""

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))

    def cell(self, scale: float = 1.0) -> str:
        """As "1.53 (1.50–1.60)"; of large numbers fewer digits."""
        digits = 2 if scale * self.middle < 10 else 1 if scale * self.middle < 100 else 0
        low, middle, high = (f"{scale * value:.{digits}f}" for value in self)
        return f"{middle} ({low}–{high})"


def clocked(prepare: Callable[[], Callable[[], object]]) -> Turn:
    """A turn of the action that `prepare` returns. The turn is taken twice, and the second time the action is timed: a
    training loop finds its memory as it left it, and here another contender has just used the cache."""

    def turn() -> float:
        prepare()()
        action = prepare()
        began = time.perf_counter()
        action()
        return time.perf_counter() - began

    return turn


def take_turns(
    turns: Mapping[str, Turn], rounds: int, title: str, *, seed: int = 0, warm: int = 2
) -> dict[str, list[float]]:
    """The seconds of each contender, one for each round.

    Arguments:
        turns: by the contenders' names.
        rounds: at least 2.
        title: for the progress bar.
        seed: of the order.
        warm: rounds before the first one that counts.
    """
    order = random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for number in trange(-warm, rounds, desc=title, leave=False, disable=None):
        names = list(turns)
        order.shuffle(names)
        for name in names:
            took = turns[name]()
            if number >= 0:
                seconds[name].append(took)
    return seconds


def ratios(seconds: Sequence[float], others: Sequence[float]) -> Spread:
    """Of two contenders, round by round."""
    return Spread.of([a / b for a, b in zip(seconds, others, strict=True)])


class Operations(TorchDispatchMode):
    """Counts the ATen operations that are dispatched within it; views count too."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(action: Callable[[], object]) -> int:
    """How many ATen operations it takes."""
    with Operations() as seen:
        action()
    return seen.count


def save(path: Path, results: Mapping[str, Any]) -> None:
    """The raw numbers, from which --redraw makes report and plot again. Each list of numbers is one line."""
    text = json.dumps(results, indent=1, ensure_ascii=False)
    text = re.sub(r"\[[^][{}\"]*\]", lambda found: " ".join(found[0].split()), text)
    path.write_text(text + "\n", encoding="utf-8")


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote."""
    if not path.is_file():
        raise SystemExit(f"{path} is not there: run without --redraw first, which measures and writes it.")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def rounded(seconds: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Times to five digits, which is more than they are worth."""
    return {name: [float(f"{value:.5g}") for value in values] for name, values in seconds.items()}
