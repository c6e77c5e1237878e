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

        y = x m / (1 − p),   m ~ Bernoulli(1 − p), drawn once

    in training mode; in eval mode y = x.

    Arguments:
        dropout: p, the probability of zeroing, in [0, 1].
        generator: where masks come from; None for the global one of the device. A mask is drawn on the generator's
            device and goes to that of x, so that a seeded one on the CPU gives the same masks everywhere. Copies of
            the layer, pickled ones too, have a copy of the generator, in the state it was in; layers that share one
            share it in a copy of the model.

    The mask is no buffer. It is not in `state_dict`, and it follows the dtype and device of x by itself.

    Raises:
        ValueError: the probability is out of range; or the input no longer fits the mask that is held.
        TypeError: the probability is no number; or the input holds integers.

    Source: Gal and Ghahramani (2016), arXiv 1512.05287. The draws from the global generator of the CPU are those of
    torchdeq 0.1.0.

    Example:
        >>> drop, x = VariationalDropout(0.5), torch.ones(2, 8)
        >>> bool((drop(x) == drop(x)).all())
        True
    """

    #: zeros and 1 / (1 − p), in float32 or the dtype of x if that is wider; None until it is drawn.
    mask: Tensor | None

    def __init__(self, dropout: float = 0.5, *, generator: torch.Generator | None = None):
        super().__init__()
        try:
            if isinstance(dropout, bool):  # for p=True everything would be dropped
                raise TypeError
            within = 0 <= dropout <= 1
        except TypeError:
            raise TypeError(
                f"{type(self).__name__}(dropout={dropout!r}): the probability of zeroing must be a number, got a "
                f"{type(dropout).__name__}."
            ) from None
        if not within:
            raise ValueError(
                f"{type(self).__name__}(dropout={dropout!r}): the probability of zeroing must lie in [0, 1]."
            )
        self.dropout = dropout
        self.generator = generator
        self.mask = None

    def mask_shape(self, x: Tensor) -> tuple[int, ...]:
        """The shape of the mask for the input x, with 1 where it is shared."""
        return tuple(x.shape)

    def reset_mask(self, x: Tensor) -> None:
        """Draw a mask that fits x. `reset_dropout` has it drawn at the next call."""
        device = x.device if self.generator is None else self.generator.device
        real = x.dtype.to_real() if x.is_complex() else x.dtype
        # Outside inference mode: the mask may be used in training, where an inference tensor cannot be saved.
        with torch.inference_mode(False), torch.no_grad():
            mask = torch.zeros(self.mask_shape(x), dtype=torch.float32, device=device)
            mask.bernoulli_(1 - self.dropout, generator=self.generator)
            mask = self._scaled(mask.to(x.device), torch.promote_types(real, torch.float32))
            while torch._C._functorch.is_gradtrackingtensor(mask):  # it outlives a transform of torch.func
                mask = torch._C._functorch.get_unwrapped(mask)
            self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        """x (B, …) times the mask, in the dtype of x."""
        if not self.training or self.dropout == 0:
            return x
        if not (x.is_floating_point() or x.is_complex()):
            raise TypeError(f"{self!r} expects floating-point or complex numbers, got {x.dtype}.")
        if self.mask is None:
            self.reset_mask(x)
        mask = self.mask
        assert mask is not None
        shape = self.mask_shape(x)
        if tuple(mask.shape) != shape:
            raise ValueError(
                f"{self!r} holds a mask of shape {tuple(mask.shape)}, but this input needs {shape}. Call "
                f"reset_dropout(model) before each solve, at the latest when the batch size changes."
            )
        real = x.dtype.to_real() if x.is_complex() else x.dtype
        if torch.promote_types(mask.dtype, real) != mask.dtype:
            mask = self._scaled(mask.to(x.device), real)  # drawn for float32, say, and used for float64
        return x * mask.to(x)

    def _scaled(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """Zeros where the mask is zero, 1 / (1 − p) elsewhere; for p = 1 there is no elsewhere."""
        return (mask != 0).to(dtype) / ((1 - self.dropout) or 1.0)

    def extra_repr(self) -> str:
        """The options, for printing."""
        return f"dropout={self.dropout}"


class _Shared(VariationalDropout):
    """Dropout of whole channels or whole tokens of an input of a fixed number of dimensions."""

    _space: int
    _whole: str

    def __init__(
        self, dropout: float = 0.5, token_first: bool = True, *, generator: torch.Generator | None = None
    ):
        super().__init__(dropout, generator=generator)
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
        generator: see `VariationalDropout`.

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
    """Forget the masks of all variational dropout layers in `model`; the next call in training mode draws others.

    Call it before each training step, and not before the backward pass of the step is over: that evaluates f again.

    Raises:
        TypeError: `model` is no module.

    Example:
        >>> drop = VariationalDropout(0.5)
        >>> _ = drop(torch.ones(2, 8))
        >>> reset_dropout(drop)
        >>> drop.mask is None
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"reset_dropout(model): model is a {type(model).__name__}; expected the torch.nn.Module that holds the "
            f"dropout layers."
        )
    for module in model.modules():
        if isinstance(module, VariationalDropout):
            module.mask = None
