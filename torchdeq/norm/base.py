"""What the normalisations share: a weight is a direction times a factor, which may be learned and may be clipped.

    W = v · min(c, g / ‖v‖),   c the clip value, g the scale: learned, or the target norm.

They are parametrizations in the sense of `torch.nn.utils.parametrize`: W is computed from v and g whenever it is read,
so it is never out of date. Within a solve of `DEQ` it is computed once.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear


class Home(NamedTuple):
    """Where a normalised weight is: the layer has its parts as `weight_g` and so on, of which torch knows."""

    layer: nn.Module
    name: str

    def part(self, part: str) -> Tensor:
        """A parameter or buffer of the layer."""
        found: Tensor = getattr(self.layer, f"{self.name}_{part}")
        return found

    def put(self, part: str, value: Tensor) -> None:
        """Set a part."""
        layer, name = self.layer, f"{self.name}_{part}"
        if name in layer.parametrizations:  # type: ignore[operator]
            setattr(layer, name, value)
        else:
            self.part(part).copy_(value)  # into the parameter: what shares its memory goes on to


_HALF = (torch.float16, torch.bfloat16)
Target = tuple[str | list[str], int | list[int]] | None


def usual_targets() -> dict[type[nn.Module], Target]:
    """The layers that are normalised: the name of the weight, and the dimension of its outputs."""
    return {
        nn.Linear: ("weight", 0),
        nn.Conv1d: ("weight", 0),
        nn.Conv2d: ("weight", 0),
        nn.Conv3d: ("weight", 0),
        nn.ConvTranspose1d: ("weight", 1),
        nn.ConvTranspose2d: ("weight", 1),
        nn.ConvTranspose3d: ("weight", 1),
        # A Linear inside torch.nn.MultiheadAttention, whose other weights are not normalised either.
        NonDynamicallyQuantizableLinear: None,
    }


class Norm(nn.Module):
    """A normalisation of one weight.

    Arguments:
        dim: the dimension of the weight that counts its outputs.
        learn_scale: whether g is a parameter. Otherwise it is `target_norm`.
        target_norm: g, where it is not learned, above 0.
        clip: whether the factor is at most `clip_value`, so that weights are only ever scaled down to so much.
        clip_value: c, above 0.

    Raises:
        ValueError: a value is out of its range.
        TypeError: learn_scale or clip is neither true nor false, but a string for example.
    """

    #: Which layers `apply_norm` normalises. `register_norm_module` adds to it. None: not this class of them.
    _target_modules: ClassVar[dict[type[nn.Module], Target]] = {}
    #: The options, as keywords.
    OPTIONS: ClassVar[dict[str, Any]] = {
        "learn_scale": True,
        "target_norm": 1.0,
        "clip": False,
        "clip_value": 1.0,
    }

    def __init__(
        self,
        dim: int = 0,
        learn_scale: bool = True,
        target_norm: float = 1.0,
        clip: bool = False,
        clip_value: float = 1.0,
    ):
        super().__init__()
        self.dim = dim
        for name, value in (("learn_scale", learn_scale), ("clip", clip)):
            check_switch(name, value)
        self.learn_scale = bool(learn_scale)
        self.target_norm, self.clip, self.clip_value = float(target_norm), bool(clip), float(clip_value)
        for name in ("target_norm", "clip_value"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{self!r}: {name} must be positive and finite.")

    @classmethod
    def made_for(cls, weight: Tensor, dim: int, **options: Any) -> Norm:
        """The normalisation of this weight."""
        return cls(dim=dim, **options)

    #: The layer, once the parts are there. Until then they are the normalisation's own.
    home: Home | None = None

    def originals(self) -> tuple[str, ...]:
        """Which parts the weight is computed from by `forward`, the weight that was there before the last of them."""
        raise NotImplementedError(f"{type(self).__name__} must define originals.")

    def check(self, weight: Tensor) -> None:
        """Raise a ValueError if this weight cannot be normalised."""

    def parts(self) -> dict[str, str]:
        """All parts, what checkpoints of 0.1.0 call `weight_…`, and how torch calls them from its list."""
        raise NotImplementedError(f"{type(self).__name__} must define parts.")

    def release(self, weight: nn.Parameter) -> dict[str, Tensor]:
        """The parts for this weight, in the order in which 0.1.0 has them, to be the layer's."""
        raise NotImplementedError(f"{type(self).__name__} must define release.")

    def factor(self, g: Tensor | None, size: Tensor) -> Tensor:
        """min(c, g / size). For g None it is the target norm; in the precision of size."""
        factor = self.target_norm / size if g is None else g.to(size.dtype) / size
        # Not clamp: where a learned scale begins at the clip, half the derivative is passed on, as in 0.1.0.
        return torch.minimum(factor, torch.full_like(factor, self.clip_value)) if self.clip else factor

    @property
    def _spare(self) -> float:
        """The largest factor that is at most 1, in which a given weight can be written."""
        return min(self.clip_value, 1.0) if self.clip else 1.0

    def options(self) -> dict[str, Any]:
        """All options and the dimension, by name."""
        return {"dim": self.dim, **{name: getattr(self, name) for name in self.OPTIONS}}

    def extra_repr(self) -> str:
        """The options that are not the default ones, for printing."""
        plain = {"dim": 0, **self.OPTIONS}
        return ", ".join(
            f"{name}={value!r}"
            for name in plain
            if (value := getattr(self, name, plain[name])) != plain[name]
        )


def check_switch(name: str, value: Any) -> None:
    """Raise a TypeError if a value is not True, False, 1 or 0; 'False' of a configuration file would be true."""
    if isinstance(value, str) or value not in (True, False):
        raise TypeError(f"{name} is a switch, True or False, got {value!r}.")


def wide(tensor: Tensor) -> Tensor:
    """In at least float32, where sums of squares do not overflow."""
    return tensor.float() if tensor.dtype in _HALF else tensor


def without_autocast(tensor: Tensor) -> Any:
    """A context without autocast, which would turn products into half precision."""
    kind = tensor.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()
