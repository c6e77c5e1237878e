"""The progress bar: one over the whole run in a terminal, one line per epoch elsewhere."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from typing import TextIO

from torchdeq.cli.errors import need


class ProgressBar:
    """Shows the means over the current epoch: loss, forward evaluations and residual, adjoint VJPs and residual.

    Arguments:
        epochs: in the whole run.
        steps: in an epoch.
        done: epochs that were finished before.
        file: where to; None for stderr.

    Example:
        >>> out = io.StringIO()
        >>> with ProgressBar(epochs=1, steps=1, file=out) as bar:
        ...     bar.step({"loss": 0.5, "nfe": 5, "residual": 8e-3, "vjps": 4, "adjoint_residual": 7e-3})
        ...     bar.end_epoch(0.991)
        >>> out.getvalue().partition("epoch")[2]
        ' 1/1: loss 0.500 | evals 5.0, residual 8.0e-03 | VJPs 4.0, residual 7.0e-03 | test 0.9910\\n'
    """

    def __init__(self, *, epochs: int, steps: int, done: int = 0, file: TextIO | None = None):
        self.epochs, self.epoch = epochs, done + 1
        self.file = file or sys.stderr
        self.live = self.file.isatty()
        self.means, self.accuracy = "", ""
        self.bar = need("tqdm").tqdm(
            total=epochs * steps,
            initial=done * steps,
            bar_format="{percentage:3.0f}% {bar} {elapsed}<{remaining} {desc}",
            # Where there is no terminal, the bar only formats, and end_epoch writes its line.
            file=self.file if self.live else io.StringIO(),
            ascii=not self.live,
            dynamic_ncols=self.live,
        )

    def step(self, means: Mapping[str, float]) -> None:
        """One training step is done; these are the means over its epoch so far."""
        adjoint = "no adjoint solve"
        if "vjps" in means:
            adjoint = f"VJPs {means['vjps']:.1f}, residual {means['adjoint_residual']:.1e}"
        forward = f"evals {means['nfe']:.1f}, residual {means['residual']:.1e}"
        self.means = f"loss {means['loss']:.3f} | {forward} | {adjoint}"
        self._describe()
        self.bar.update()

    def end_epoch(self, accuracy: float) -> None:
        """An epoch and its evaluation are done."""
        self.accuracy = f" | test {accuracy:.4f}"
        self._describe()
        if not self.live:
            print(self.bar, file=self.file, flush=True)
        self.epoch += 1

    def _describe(self) -> None:
        text = f"epoch {self.epoch}/{self.epochs}: {self.means}{self.accuracy}"
        self.bar.set_description_str(text, refresh=False)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
