"""Derivatives along a line by difference quotients, with what they may be off, to check derivatives against.

    (φ(h) − φ(−h)) / 2h   at two step lengths; the change from the longer to the shorter bounds the error of the latter.

φ has a kink at 0 if the slopes to its right and left stay apart as h shrinks; where φ is smooth they close in as h. A
bend that is sharper than the steps are short looks like a kink.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

#: φ(t), a number in double precision, however coarse the map behind it.
Line = Callable[[float], float]


@dataclass(frozen=True, kw_only=True)
class Slope:
    """The slope of φ at 0.

    Arguments:
        value: the central difference quotient at the short step.
        error: how far it may be off.
        kink: whether the slopes to the right and to the left differ.
        noise: the relative precision ε of φ.
    """

    value: float
    error: float
    kink: bool
    noise: float

    def confirms(self, derivative: float) -> bool:
        """Whether `derivative` may be the slope. Half of the digits must agree, as far as the quotient has them."""
        return abs(derivative - self.value) <= self.tolerance + self.noise**0.5 * abs(derivative)

    @property
    def tolerance(self) -> float:
        """What a derivative may differ by."""
        return 8 * self.error + self.noise**0.5 * abs(self.value)


def slope(phi: Line, noise: float, size: float) -> Slope:
    """The slope of φ at 0 for steps t of which 1 is a change of order one.

    Arguments:
        phi: the function.
        noise: ε of the precision in which φ is computed.
        size: |φ| and its arguments are off by some `noise · size` from rounding.

    Example:
        >>> import math
        >>> s = slope(math.sin, 2e-16, 1.0)
        >>> s.confirms(1.0), s.confirms(1.00001), s.kink, slope(abs, 2e-16, 1.0).kink
        (True, False, False, True)
    """
    short = noise ** (1 / 3)  # where rounding ε/h and curvature h² meet
    long = 4 * short
    here = phi(0.0)
    right, left = (phi(short) - here) / short, (here - phi(-short)) / short
    far_right, far_left = (phi(long) - here) / long, (here - phi(-long)) / long
    value, before = (right + left) / 2, (far_right + far_left) / 2
    rounding = noise * size / short
    error = abs(value - before) + rounding
    apart, far_apart = abs(right - left), abs(far_right - far_left)
    level = 16 * rounding + noise**0.5 * (abs(right) + abs(left))
    return Slope(value=value, error=error, kink=apart > 0.5 * far_apart and apart > level, noise=noise)
