"""The list of parametrizations of a normalised weight: what it is computed from, and what was written to it.

Its originals are the parameters that were there before, so that an optimiser made earlier, or another module that
shares one, keeps them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from torchdeq._modes import in_dual_level, in_transform
from torchdeq._weights import SharedList, is_held
from torchdeq.norm.base import Norm


class NormedList(SharedList):
    """A normalised weight.

    Arguments:
        norm: the normalisation.
        weight: the parameter.
        tied: the list of another module that has the same parameter, and so has all of it. Not one list for both: a
            module in two places is more than `torch.func.functional_call` can put back.
    """

    names: tuple[str, ...]

    def __init__(self, norm: Norm, weight: nn.Parameter, tied: NormedList | None = None):
        if tied is None:
            originals = norm.originals(weight)
        else:
            originals = tuple(getattr(tied, name) for name in tied.names)
            norm._parameters.update(tied.norm._parameters)
            norm._buffers.update(tied.norm._buffers)
        nn.ModuleList.__init__(self, [norm])  # not torch's __init__, which would make other parameters
        self.unsafe = False
        self.is_tensor, self.ntensors = len(originals) == 1, len(originals)
        self.names = ("original",) if self.is_tensor else tuple(f"original{i}" for i in range(len(originals)))
        for name, original in zip(self.names, originals, strict=True):
            self.register_parameter(name, original)

    @property
    def norm(self) -> Norm:
        """The normalisation."""
        return self[0]  # type: ignore[return-value]

    @property
    def weight(self) -> nn.Parameter:
        """The parameter that was there before."""
        return self._parameters[self.names[-1]]  # type: ignore[return-value]

    def part(self, name: str) -> Tensor:
        """What 0.1.0 calls `weight_{name}`."""
        found: Any = self
        for step in self.norm.parts()[name].split("."):
            found = getattr(found, step)
        return found

    def handed_out(self) -> Tensor:
        """The weight, for whoever reads it. What is written to it is noticed when it is read again."""
        if torch.compiler.is_compiling():
            return self()
        watched = not (
            in_transform() or in_dual_level() or torch.is_inference_mode_enabled() or is_held(self)
        )
        if watched:
            self.prepare()
        weight = self()
        if watched and not weight.is_inference():
            # Without its graph; it counts the same versions.
            self.__dict__["_handed"] = (weight.detach(), weight._version)
        return weight

    def prepare(self) -> None:
        """Take over what was written to the weight that was handed out last, as by `torch.nn.init`."""
        handed = self.__dict__.pop("_handed", None)
        if handed is not None and handed[0]._version != handed[1]:
            self.right_inverse(handed[0])

    @torch.no_grad()
    def right_inverse(self, value: Tensor) -> None:
        """Set what the weight is computed from, so that it becomes `value`, as far as the normalisation can.

        Raises:
            ValueError: the shape is another one; or see the normalisation.
            RuntimeError: another parametrization was put on top that has no right_inverse.
        """
        self.__dict__.pop("_handed", None)
        shape = self.weight.shape
        if value.shape != shape:
            raise ValueError(
                f"a normalised weight of shape {tuple(shape)} was given a value of shape {tuple(value.shape)}."
            )
        values: Any = value.detach().to(self.weight)
        for parametrization in reversed(list(self)):
            inverse = getattr(parametrization, "right_inverse", None)
            if inverse is None:
                raise RuntimeError(
                    f"the weight cannot be set: {type(parametrization).__name__}, a parametrization on top of its "
                    f"normalisation, has no right_inverse. Give it one, or set the weight before it is registered."
                )
            values = inverse(values)
        for name, new in zip(self.names, (values,) if self.is_tensor else values, strict=True):
            getattr(self, name).copy_(new)  # into the parameter: what shares its memory goes on to

    def final(self) -> Tensor:
        """The weight as it is, without a graph, and without another power iteration."""
        self.prepare()
        with torch.no_grad(), at_rest(self):
            return self.evaluate()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self.prepare()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        self.prepare()
        return self.__dict__


@contextmanager
def at_rest(module: nn.Module) -> Iterator[None]:
    """The normalisations in eval mode."""
    norms = [(norm, norm.training) for norm in module.modules() if isinstance(norm, Norm)]
    for norm, _ in norms:
        norm.training = False
    try:
        yield
    finally:
        for norm, training in norms:
            norm.training = training
