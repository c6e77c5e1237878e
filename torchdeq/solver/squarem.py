"""SQUAREM: two Picard steps, squared.

    r = f(z) − z,   v = (f(f(z)) − f(z)) − r,   α = −‖r‖ / ‖v‖,   z' = z − 2 α r + α² v,   z⁺ = f(z').

Source: Varadhan and Roland (2008), doi 10.1111/j.1467-9469.2007.00585.x, scheme SqS3. α = −1 would be two Picard steps;
where f contracts slowly and evenly, α is much below. Departures: α per sample; a z' whose residual is above ten times
that of z is dropped for f(f(z)).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from torchdeq._state import Map, per_sample
from torchdeq.solver.base import Solver

_WORSE = 10.0


class SquaremState(NamedTuple):
    """What SQUAREM remembers of the cycle it is in."""

    z: Tensor  # (B, D), where the cycle began
    r: Tensor  # (B, D), the residual there
    safe: Tensor  # (B, D), the last Picard step
    phase: int  # 0: at z; 1: at f(z); 2: at z'


@dataclass(frozen=True, kw_only=True, repr=False)
class SQUAREM(Solver):
    """Squared extrapolation: an acceleration that remembers three states. Three evaluations make a cycle.

    For slow contractions with eigenvalues of J in [0, 1), and where the memory of `Anderson` is too much.

    Example:
        >>> import torch
        >>> from torchdeq import FixedPointIteration
        >>> f = lambda z: 0.95 * z + 1
        >>> z0 = torch.zeros(1, 2, dtype=torch.float64)
        >>> SQUAREM()(f, z0).nfe, FixedPointIteration(max_iter=999)(f, z0).nfe
        (3, 143)
    """

    recovers: ClassVar[int] = 3

    def init(self, z: Tensor) -> SquaremState:
        """At the beginning of a cycle."""
        return SquaremState(z, z, z, 0)

    def step(self, f: Map, z: Tensor, fz: Tensor, state: SquaremState) -> tuple[Tensor, SquaremState]:
        """Picard, extrapolation, Picard."""
        r = fz - z
        if state.phase == 0:
            image = fz.clone()  # f may write its next output into the same memory
            return image, SquaremState(z, r, image, 1)
        if state.phase == 1:
            v = r - state.r
            alpha = per_sample(state.r) / per_sample(v)
            alpha = torch.where(alpha.isfinite(), alpha, 1.0).clamp_min(1.0)[
                :, None
            ]  # −α, at least two steps
            image = fz.clone()
            return state.z + 2 * alpha * state.r + alpha * alpha * v, state._replace(safe=image, phase=2)
        bad = per_sample(r) > _WORSE * per_sample(state.r)
        return torch.where(bad[:, None], state.safe, fz), state._replace(phase=0)

    def rescue(
        self, z: Tensor, fz: Tensor, state: SquaremState, struck: Tensor, strikes: Tensor
    ) -> tuple[Tensor, Tensor, SquaremState]:
        """The last Picard step stands in for an extrapolation that went too far."""
        back = struck[:, None]
        return torch.where(back, state.safe, z), torch.where(back, state.safe, fz), state
