"""The activations of monotone maps: σ = prox_φ as functions of y and α, by name or given, and checked.

    prox_{αφ}(y) = argmin_z ½ ‖z − y‖² + α φ(z)   ⇔   (y − p) / α ∈ ∂φ(p),  p = prox_{αφ}(y)

So the same p is prox_{βφ} of p + (β/α) (y − p), for every β: the resolvent identity, by which a function of y alone,
such as tanh, or one whose α means something else is found out. Source: Bauschke and Combettes (2017), doi
10.1007/978-3-319-48311-5, chapter 23.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn import functional as F

from torchdeq._suggest import did_you_mean

#: prox_{αφ}(y) from y and α, elementwise.
Prox = Callable[[Tensor, float | Tensor], Tensor]

_SLOPE = 0.01  # of the leaky ReLU, as in torch.nn.LeakyReLU


def _relu(y: Tensor, alpha: float | Tensor) -> Tensor:
    return F.relu(y)  # the projection on z ≥ 0, whatever α is


def _leaky_relu(y: Tensor, alpha: float | Tensor) -> Tensor:
    # φ(z) = (1 − s) / (2 s) · min(z, 0)²
    return torch.where(y > 0, y, y * (_SLOPE / (_SLOPE + alpha * (1 - _SLOPE))))


def _hardtanh(y: Tensor, alpha: float | Tensor) -> Tensor:
    return F.hardtanh(y)  # the projection on |z| ≤ 1


PROXIMAL: dict[str, Prox] = {"relu": _relu, "leaky_relu": _leaky_relu, "hardtanh": _hardtanh}

_KNOWN = f"There are {', '.join(map(repr, PROXIMAL))}"
_WANTED = (
    f"{_KNOWN}; or give a function of y and α that gives prox_αφ(y), such as soft thresholding, "
    f"lambda y, alpha: y - y.clamp(-0.1 * alpha, 0.1 * alpha)."
)


def as_prox(activation: str | Prox) -> Prox:
    """The proximal operator of a name; a function is one already.

    Raises:
        ValueError: there is none of this name.
        TypeError: neither a name nor a function.
    """
    if not isinstance(activation, str):
        if callable(activation) and not isinstance(activation, type | torch.nn.Module):
            return activation
        raise TypeError(
            f"the activation of a monotone map must be one of {', '.join(map(repr, PROXIMAL))}, or a function of y and "
            f"α that gives prox_αφ(y), got {activation!r}."
        )
    if activation in PROXIMAL:
        return PROXIMAL[activation]
    why = (
        f" {activation} is the proximal operator of a φ, but that of αφ, which splitting needs, has no closed form."
        if activation in ("tanh", "sigmoid", "softplus", "elu", "softsign", "arctan")
        else did_you_mean(activation, PROXIMAL)
    )
    raise ValueError(f"there is no monotone activation {activation!r}.{why} {_WANTED}")


#: Functions that have been checked: a layer makes a map at each forward pass.
_CHECKED: WeakSet[Prox] = WeakSet()
_TOLERANCE = (
    1e-3  # one may be computed by an iteration, or round to fewer digits; what is wrong is far from it
)


@torch.no_grad()
def check_prox(activation: str | Prox, features: int, device: torch.device) -> None:
    """Check on a few numbers that an activation is a proximal operator. A function is checked once.

    Arguments:
        activation: a name or a function.
        features: n, the size of the last dimension of what it will be given.
        device: where to try it.

    Raises:
        ValueError: there is none of this name; or the function changes the shape or its argument, is not elementwise,
            nondecreasing and nonexpansive, or breaks the resolvent identity.
        TypeError: neither a name nor a function, or the function raises an error.
    """
    prox = as_prox(activation)
    if isinstance(activation, str) or torch.compiler.is_compiling() or _is_checked(prox):
        return
    y = torch.linspace(-3.0, 3.0, 13, dtype=torch.float64, device=device)[:, None].repeat(
        1, features
    )  # (13, n)
    if type(y) is not Tensor or y.is_meta or features == 0:
        return  # without values there is nothing to compare
    what = f"the activation {activation!r} is not the proximal operator of a monotone map:"
    try:
        wrong = _wrong(prox, y)
    except Exception as error:  # whatever it raises, it cannot be used
        raise TypeError(
            f"{what} called with y and α it raises {type(error).__name__}: {error}. {_WANTED}"
        ) from error
    if wrong:
        raise ValueError(f"{what} {wrong} {_WANTED}")
    with suppress(TypeError):  # one that cannot be remembered is checked again
        _CHECKED.add(prox)


def _is_checked(prox: Prox) -> bool:
    try:
        return prox in _CHECKED
    except TypeError:  # it cannot be hashed
        return False


def _wrong(prox: Prox, y: Tensor) -> str:
    """What is wrong with a function, tried on y (k, n) that increases along its columns; nothing if it is right."""
    steps: list[float | Tensor] = [1.0, 0.5, y.new_tensor(2.0)]  # α comes as a number, and as a tensor ()
    before, images = y.clone(), []
    for alpha in steps:
        p = prox(y, alpha)
        if not isinstance(p, Tensor) or p.shape != y.shape:
            got = tuple(p.shape) if isinstance(p, Tensor) else type(p).__name__
            return f"of y of the shape {tuple(y.shape)} it makes {got}; expected the same shape."
        if not torch.equal(y, before):
            return "it changes y in place; expected a new tensor."
        images.append(p.to(y.dtype))
    row, column = torch.arange(len(y), device=y.device), torch.arange(y.shape[1], device=y.device)
    same = (row[:, None] + column) % 2 == 0
    if not _close(prox(torch.where(same, y, 0.7), 1.0)[same], images[0][same]).all():
        return "it is not elementwise: an entry of its result changes with other entries of y."
    for alpha, p in zip(steps, images, strict=True):
        rise, step = p.diff(dim=0), y.diff(dim=0)
        if not ((rise >= -_TOLERANCE) & (rise <= step + _TOLERANCE)).all():
            return f"with α={float(alpha)} it is not nondecreasing and nonexpansive in y."
        for beta in steps:
            other = p + (beta / alpha) * (y - p)
            again = prox(other, beta).to(y.dtype)
            if not (right := _close(again, p)).all():
                at = int(right.flatten().logical_not().nonzero()[0])
                values = [round(float(t.flatten()[at]), 4) for t in (y, p, other, again)]
                return (
                    f"with α={float(alpha)} it maps y={values[0]} to p={values[1]}, so with β={float(beta)} it must "
                    f"map p + (β/α) (y − p) = {values[2]} to the same p, and gives {values[3]}. α scales φ; a function "
                    f"of y alone will do only if it is a projection."
                )
    return ""


def _close(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs() <= _TOLERANCE  # false for NaN
