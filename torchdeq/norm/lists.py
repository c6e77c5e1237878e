"""The list of parametrizations of a normalised weight: what it is computed from, and what was written to it.

The parameters and buffers are those of the layer, under the names that they have in torchdeq 0.1.0: `weight_g`,
`weight_v` and so on. Whoever looks for parameters by name, sets one, or exchanges them for others, finds an ordinary
layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from torchdeq._modes import in_dual_level, in_transform
from torchdeq._weights import Place, SharedList, is_held
from torchdeq.norm.base import Home, Norm


class NormedList(SharedList):
    """A normalised weight.

    Arguments:
        norm: the normalisation.
        home: the layer and the name of the weight. The layer has the parts already.
    """

    def __init__(self, norm: Norm, home: Home):
        nn.ModuleList.__init__(self, [norm])  # not torch's __init__, which would make parameters of its own
        self.unsafe = False
        self.names = norm.originals()
        self.is_tensor, self.ntensors = len(self.names) == 1, len(self.names)
        self.move_to(home)

    def move_to(self, home: Home) -> None:
        """Look for the parts in another layer: a replica has this list, and tensors of its own."""
        # Past torch's __setattr__, to which a layer within would be a module within.
        self.__dict__["home"] = self.norm.__dict__["home"] = home

    @property
    def norm(self) -> Norm:
        """The normalisation."""
        return self._modules["0"]  # type: ignore[return-value]

    @property
    def weight(self) -> nn.Parameter:
        """The parameter that was there before."""
        return self.home.part(self.names[-1])

    def __getattr__(self, name: str) -> Any:
        """`original`, `original0`, …: what torch calls the parameters."""
        stem, number = name[:8], name[8:]
        names = self.__dict__.get("names", ())
        if stem == "original" and (number.isdigit() if len(names) > 1 else not number):
            return self.home.part(names[int(number or 0)])
        return super().__getattr__(name)

    def names_of_parts(self) -> list[str]:
        """How the layer calls the parts."""
        return [f"{self.home.name}_{part}" for part in self.norm.parts()]

    def places(self) -> list[Place]:
        """See `SharedList`; those in the layer too."""
        layer, names = self.home.layer, self.names_of_parts()
        others: Any = layer.parametrizations
        beneath = [place for name in names if name in others for place in others[name].places()]
        return [*super().places(), *((layer, name) for name in names if name not in others), *beneath]

    def evaluate(self) -> Tensor:
        """See `SharedList`; torch's list, which looks for each part under several names, takes twice as long."""
        weight: Tensor = self.norm(*(self.home.part(name) for name in self.names))
        for other in list(self._modules.values())[1:]:
            weight = other(weight)
        return weight

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
        for part, new in zip(self.names, (values,) if self.is_tensor else values, strict=True):
            self.home.put(part, new)

    def final(self) -> Tensor:
        """The weight as it is, without a graph, and without another power iteration."""
        self.prepare()
        with torch.no_grad(), at_rest(self):
            return self.evaluate()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self.prepare()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_handed"}


class Parametrizations(nn.ModuleDict):
    """The parametrizations of a module with normalised weights. Whoever removes one, as
    `torch.nn.utils.parametrize.remove_parametrizations` does, removes its parts from the layer."""

    def __delitem__(self, name: str) -> None:
        one: Any = self[name]
        super().__delitem__(name)
        for part in one.names_of_parts() if isinstance(one, NormedList) else ():
            if part in self:  # a part has a parametrization of its own
                super().__delitem__(part)
                delattr(type(one.home.layer), part)
            else:
                delattr(one.home.layer, part)

    def _get_name(self) -> str:
        return nn.ModuleDict.__name__


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
