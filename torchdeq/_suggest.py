"""The nearest known name, for errors that teach."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """' Did you mean …?' with the nearest of the known names, or nothing if none is near."""
    word, names = str(name), list(known)
    near = difflib.get_close_matches(word, names, n=2)
    near = near or [k for k in names if word.startswith(k) or k.startswith(word)][:1]
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
