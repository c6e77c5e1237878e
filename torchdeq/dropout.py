"""Variational dropout: one mask for a whole fixed-point solve.

A fresh mask at every evaluation would make f another map each time, and there would be no fixed point. So a mask
is drawn at the first call after `reset_dropout` and kept until the next. Source: Gal and Ghahramani (2016),
arXiv 1512.05287; for equilibrium models Bai, Kolter and Koltun (2019), arXiv 1909.01377.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = [
    "VariationalDropToken1d",
    "VariationalDropToken2d",
    "VariationalDropToken3d",
    "VariationalDropout",
    "VariationalDropout1d",
    "VariationalDropout2d",
    "VariationalDropout3d",
    "reset_dropout",
]


class VariationalDropout(nn.Module):
    """Dropout of single elements with a mask that is kept until `reset_dropout`.

    In training mode x is multiplied by a mask of zeros (with probability `dropout`) and 1 / (1 − dropout); in
    eval mode it is returned as it is.

    Arguments:
        dropout: the probability of zeroing, in [0, 1].

    Raises:
        ValueError: the probability is out of range; or the input no longer fits the mask that is held.

    Example:
        >>> drop, x = VariationalDropout(0.5), torch.ones(2, 8)
        >>> bool((drop(x) == drop(x)).all())
        True
    """

    mask: Tensor | None

    def __init__(self, dropout: float = 0.5):
        super().__init__()
        if not 0 <= dropout <= 1:
            raise ValueError(
                f"{type(self).__name__}(dropout={dropout!r}): the probability of zeroing must lie in [0, 1]."
            )
        self.dropout = dropout
        self.mask = None

    def mask_shape(self, x: Tensor) -> tuple[int, ...]:
        """The shape of the mask for the input x, with 1 where it is shared."""
        return tuple(x.shape)

    def reset_mask(self) -> None:
        """Forget the mask; the next call in training mode draws another."""
        self.mask = None

    def forward(self, x: Tensor) -> Tensor:
        """x (B, …) times the mask."""
        if not self.training or self.dropout == 0:
            return x
        shape = self.mask_shape(x)
        if self.mask is None:
            keep = 1 - self.dropout
            # keep = 0 drops everything; the draw is below 0 nowhere and the scale does not matter.
            self.mask = (torch.rand(shape, device=x.device) < keep).to(x.dtype) / (keep or 1.0)
        elif tuple(self.mask.shape) != shape:
            raise ValueError(
                f"{self!r} holds a mask of shape {tuple(self.mask.shape)}, but this input needs {shape}. Call "
                f"reset_dropout(model) before each solve, at the latest when the batch size changes."
            )
        return x * self.mask.to(x)

    def extra_repr(self) -> str:
        """The options, for printing."""
        return f"dropout={self.dropout}"


class _Shared(VariationalDropout):
    """Dropout of whole channels or whole tokens of an input of a fixed number of dimensions."""

    _space: int
    _whole: str

    def __init__(self, dropout: float = 0.5, token_first: bool = True):
        super().__init__(dropout)
        self.token_first = token_first

    def mask_shape(self, x: Tensor) -> tuple[int, ...]:
        """1 along the tokens if whole channels are dropped, 1 along the channels if whole tokens are."""
        if x.dim() != self._space + 2:
            layout = "(B, *space, D)" if self.token_first else "(B, D, *space)"
            raise ValueError(
                f"{self!r} expects {layout} with {self._space} dimension(s) of space, got shape {tuple(x.shape)}."
            )
        channel = x.dim() - 1 if self.token_first else 1
        dropped_whole = {channel} if self._whole == "token" else set(range(1, x.dim())) - {channel}
        return tuple(1 if d in dropped_whole else size for d, size in enumerate(x.shape))

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}, token_first={self.token_first}"


def _variant(space: int, whole: str) -> type[_Shared]:
    name = f"Variational{'Dropout' if whole == 'channel' else 'DropToken'}{space}d"
    axes = ["L", "H, W", "T, H, W"][space - 1]
    shared = "a channel at all tokens" if whole == "channel" else "a token in all channels"
    doc = f"""Variational dropout that zeroes {shared}; the mask is kept until `reset_dropout`.

    Arguments:
        dropout: the probability of zeroing, in [0, 1].
        token_first: the input is (B, {axes}, D) if True, (B, D, {axes}) if False.

    Raises:
        ValueError: as `VariationalDropout`; or the input has another number of dimensions.

    Example:
        >>> {name}(0.5)(torch.ones(2, {", ".join("4" * space)}, 3)).shape
        torch.Size([2, {", ".join("4" * space)}, 3])
    """
    return type(name, (_Shared,), {"_space": space, "_whole": whole, "__doc__": doc, "__module__": __name__})


VariationalDropout1d = _variant(1, "channel")
VariationalDropout2d = _variant(2, "channel")
VariationalDropout3d = _variant(3, "channel")
VariationalDropToken1d = _variant(1, "token")
VariationalDropToken2d = _variant(2, "token")
VariationalDropToken3d = _variant(3, "token")


def reset_dropout(model: nn.Module) -> None:
    """Forget the masks of all variational dropout layers in `model`; call it before each training step.

    Example:
        >>> drop = VariationalDropout(0.5)
        >>> _ = drop(torch.ones(2, 8))
        >>> reset_dropout(drop)
        >>> drop.mask is None
        True
    """
    for module in model.modules():
        if isinstance(module, VariationalDropout):
            module.reset_mask()
