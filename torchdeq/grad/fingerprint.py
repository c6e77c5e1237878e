"""Whether f, evaluated again for a backward pass, is the map that it was: one number for each sample tells.

    s = Σ_j p_j f(z)_j,   p_j = cos(c j):   another f at the same z gives another s, but by an unlikely chance.

It is kept in place of f(z), which would be as large as what a checkpoint has let go.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchdeq._modes import without_tangents
from torchdeq._replay import AutocastState
from torchdeq._state import Layout, per_sample


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """What is kept of a value of f.

    Arguments:
        sums: s, (B,); NaN for a sample that is not compared.
        allowed: the relative difference that rounding may make.
    """

    sums: Tensor
    allowed: float

    @classmethod
    def of(cls, fz: Tensor, layout: Layout | None) -> Fingerprint:
        """That of a value fz (B, D), under the autocast state in which f has made it."""
        amp = AutocastState.capture(fz.device)
        dtypes = [fz.dtype, *(() if layout is None else layout.dtypes), *([amp.dtype] if amp.enabled else [])]
        # One map evaluated twice gives the same up to the order of its sums, which a GPU does not keep.
        return cls(_sums(fz), max(1e-5, *(2 * torch.finfo(dtype).eps for dtype in dtypes)))

    def check(self, again: Tensor, name: str) -> None:
        """Compare with the value (B, D) that f gives now.

        Raises:
            RuntimeError: it is another one.
        """
        with torch.no_grad(), without_tangents():
            off = (_sums(again) - self.sums).abs()
            same = (off <= self.allowed * per_sample(again)) | ~self.sums.isfinite()
        if not bool(same.all()):
            raise RuntimeError(
                f"{name}: f gave another value in the backward pass than in the forward pass at the same state, so the "
                f"gradient would be that of another map. Either something f closes over has changed in between "
                f"(weights updated in place: call backward first; a loop variable: bind it with a default argument), "
                f"or f is random in a way that its generator's state does not repeat."
            )


def _sums(fz: Tensor) -> Tensor:
    with torch.no_grad(), without_tangents():
        # From an angle, not from a generator: the same on every device, and nobody's random numbers move.
        wide = torch.promote_types(fz.dtype, torch.float32)  # half precision does not count to 2.4 D
        p = torch.arange(fz.shape[1], dtype=wide, device=fz.device).mul_(2.4).cos_()
        return (fz * p).sum(dim=1)
