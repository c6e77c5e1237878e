"""The table of gradient methods that `compare_gradients` returns."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one gradient method does on the model.

    Arguments:
        name: of the method.
        seconds: of one step, forward and backward, median over the repeats.
        quartiles: the middle half of the repeats, seconds.
        nfe: evaluations of f in the forward solves.
        vjps: products with Jᵀ in the adjoint solves; None for a method that solves none.
        residual: the largest forward residual of a sample, in the solver's stop mode.
        converged: whether every sample converged, forward and in the adjoint solve.
        saved_bytes: peak bytes autograd held during the step; see `compare_gradients`.
        error: ‖g − g*‖ / ‖g*‖ over all parameters, g* the exact gradient.
        cosine: of the angle between g and g*.
        uncounted: whether the method holds memory that is not among `saved_bytes`: what it evaluates again in the
            backward pass, as `Reversible` and a checkpoint do, or what `SHINE` keeps of the solve.
        failure: the error that the method ended in, and then there are no numbers; '' if there was none.

    Example:
        >>> Row(name="IFT", seconds=0.02, quartiles=(0.019, 0.021), nfe=5, vjps=4, residual=8e-3,
        ...     converged=True, saved_bytes=2**20, error=1e-2, cosine=0.9999).saved_bytes
        1048576
    """

    name: str
    seconds: float
    quartiles: tuple[float, float]
    nfe: int
    vjps: int | None
    residual: float
    converged: bool
    saved_bytes: int
    error: float
    cosine: float
    uncounted: bool = False
    failure: str = ""

    @classmethod
    def failed(cls, name: str, failure: str) -> Row:
        """The row of a method that ended in an error."""
        return cls(
            name=name,
            seconds=math.nan,
            quartiles=(math.nan, math.nan),
            nfe=0,
            vjps=None,
            residual=math.nan,
            converged=False,
            saved_bytes=0,
            error=math.nan,
            cosine=math.nan,
            failure=failure,
        )

    def cells(self) -> list[str]:
        """The row as text, one string per column of `Comparison`."""
        if self.failure:
            return [self.name, "failed", *["-"] * 6]
        low, high = self.quartiles
        return [
            self.name,
            f"{1e3 * self.seconds:.1f} ({1e3 * low:.1f}-{1e3 * high:.1f})",
            str(self.nfe),
            "-" if self.vjps is None else str(self.vjps),
            f"{self.residual:.1e}" + ("" if self.converged else "*"),
            f"{self.saved_bytes / 2**20:.2f}" + ("°" if self.uncounted else ""),
            f"{self.error:.1e}",
            f"{self.cosine:.5f}",
        ]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The table that `compare_gradients` returns; prints as aligned text.

    Arguments:
        rows: one `Row` per method.
        setting: what it was measured on.

    Example:
        >>> print(Comparison(rows=(), setting="2 threads").to_markdown().splitlines()[-1])
        2 threads
    """

    rows: tuple[Row, ...]
    setting: str

    HEADER = ("method", "ms per step", "f evals", "VJPs", "residual", "saved MiB", "grad error", "cosine")

    def _lines(self) -> list[list[str]]:
        return [list(self.HEADER), *(row.cells() for row in self.rows)]

    def _notes(self) -> str:
        star = (
            "" if all(row.converged or row.failure for row in self.rows) else " * a solve did not converge."
        )
        ring = (
            ""
            if not any(row.uncounted for row in self.rows)
            else " ° and memory that autograd does not count."
        )
        return self.setting + star + ring

    def _failures(self) -> list[str]:
        return [f"{row.name}: {row.failure}" for row in self.rows if row.failure]

    def __str__(self) -> str:
        lines = self._lines()
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.HEADER))]
        text = [
            "  ".join(
                [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
            )
            for line in lines
        ]
        rule = "-" * len(text[0])
        return "\n".join([text[0], rule, *text[1:], rule, self._notes(), *self._failures()])

    def to_markdown(self) -> str:
        """The table in Markdown, with the setting below it, and what went wrong."""
        lines = self._lines()
        lines.insert(1, ["---", *["---:"] * (len(self.HEADER) - 1)])
        failures = [line for failure in self._failures() for line in ("", failure)]
        return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", self._notes(), *failures])
