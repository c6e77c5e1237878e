"""What `check_fixed_point` found, as a record that prints as a report."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Verdict = Literal["ok", "note", "fault", "unknown"]

_WIDTH = 110


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The answer to one question about f.

    Arguments:
        name: of the question; see `check_fixed_point`.
        verdict: 'ok'; 'note' for something to know or to choose by; 'fault' for what gives wrong numbers, errors or no
            fixed point; 'unknown' for what could not be examined.
        text: what was found.
        advice: what to do about it; '' for nothing.

    Example:
        >>> print(Finding(name="shape", verdict="ok", text="f keeps structure, shape and dtype."))
        ok       shape       f keeps structure, shape and dtype.
    """

    name: str
    verdict: Verdict
    text: str
    advice: str = ""

    def __str__(self) -> str:
        verdict = self.verdict.upper() if self.verdict == "fault" else self.verdict
        head = f"{verdict:8} {self.name:11} "
        indent = " " * len(head)
        lines = textwrap.wrap(self.text, _WIDTH, initial_indent=head, subsequent_indent=indent)
        lines += textwrap.wrap(
            self.advice, _WIDTH, initial_indent=indent + "→ ", subsequent_indent=indent + "  "
        )
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class FixedPointReport:
    """What `check_fixed_point` found. Prints as a report; `report["samples"]` is one finding.

    Arguments:
        subject: f and its state, in words.
        findings: one `Finding` per question, in the order of the examination.
        at: where derivatives were taken: 'solution', or 'z0' if no solve converged.
        norm: estimate of ‖J‖₂ there, per sample, (B,); of the whole batch, (1,), if f couples samples. None if there
            was no derivative to take.
        radius: estimate of the spectral radius of J, likewise.
        use: a `torchdeq.DEQ` that suits f, as a call; '' if f must be mended first.
        why: the reason, in words.

    Example:
        >>> finding = Finding(name="runs", verdict="fault", text="f(z0) is not finite.", advice="Look at it.")
        >>> report = FixedPointReport(subject="f", findings=(finding,), why="Mend f first.")
        >>> report.ok, report["runs"].advice
        (False, 'Look at it.')
    """

    subject: str
    findings: tuple[Finding, ...]
    at: Literal["solution", "z0"] = "z0"
    norm: Tensor | None = None
    radius: Tensor | None = None
    use: str = ""
    why: str = ""

    @property
    def ok(self) -> bool:
        """Whether nothing is at fault. Notes may remain."""
        return all(finding.verdict != "fault" for finding in self.findings)

    def __getitem__(self, name: str) -> Finding:
        for finding in self.findings:
            if finding.name == name:
                return finding
        raise KeyError(f"there is no finding {name!r}; there are {', '.join(f.name for f in self.findings)}.")

    def __str__(self) -> str:
        use = textwrap.wrap(
            f"Use: {self.use or 'nothing yet'}. {self.why}", _WIDTH, subsequent_indent="     "
        )
        return "\n".join([self.subject, "", *map(str, self.findings), "", *use])

    __repr__ = __str__
