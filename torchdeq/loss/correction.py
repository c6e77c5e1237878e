"""Fixed-point correction: the loss at several states on the way to the fixed point, the later ones weighing more.

    L = Σ_k w(n, k) crit(z_k, …),   k = 0 … n − 1

Source: Bai, Geng, Savani and Kolter (2022), arXiv 2204.08442, where it is made sparse in the same way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchdeq._suggest import did_you_mean

__all__ = ["fp_correction", "register_weight_func"]

WeightFunc = Callable[..., Any]


def exp_weight(n: int, k: int, gamma: float = 0.8) -> float:
    """γ^(n−k−1): 1 for the last state."""
    return gamma ** (n - k - 1)


def linear_weight(n: int, k: int, gamma: float = 0.9, bias: float = 0.0) -> float:
    """1 − γ (n−k−1) / n + bias: 1 + bias for the last state."""
    return 1 - (n - k - 1) / n * gamma + bias


def const_weight(n: int, k: int, c: float = 1.0) -> float:
    """c for each state."""
    return c


#: Weight functions by name.
WEIGHTS: dict[str, WeightFunc] = {"exp": exp_weight, "linear": linear_weight, "const": const_weight}
#: What the built-in ones take. One program sets them all and chooses the function by name.
_COMMON = ("gamma", "bias", "c")


def register_weight_func(name: str, func: WeightFunc) -> None:
    """Make a weight function known to `fp_correction` under a name.

    Arguments:
        name: the name, for `weight_func=…`.
        func: maps n, the number of states, and k, which of them counted from 0, to a weight. Further arguments come
            from the keywords of `fp_correction`.

    Raises:
        TypeError: func cannot be called, or the name is not a string.

    Example:
        >>> register_weight_func("last", lambda n, k: float(k == n - 1))
        >>> fp_correction(lambda z: z.sum(), ([torch.ones(2), 3 * torch.ones(2)],), "last")
        tensor(6.)
        >>> _ = WEIGHTS.pop("last")
    """
    if not callable(func) or not isinstance(name, str):
        raise TypeError(
            f"register_weight_func({name!r}, {func!r}): expected a name and a function (n, k) -> weight."
        )
    WEIGHTS[name] = func


def fp_correction(
    crit: Callable[..., Any],
    args: Sequence[Any],
    weight_func: str | WeightFunc = "exp",
    return_loss_values: bool = False,
    **kwargs: Any,
) -> Any:
    """The weighted sum of a criterion over sampled states, Σ_k w(n, k) crit(args at k).

    Arguments:
        crit: the criterion, of as many arguments as `args` has entries.
        args: for each argument a list or tuple with its value at each state, or one value for all. The longest has n;
            a shorter one must divide n and is gone through n / length times.
        weight_func: 'exp' for γ^(n−k−1), with gamma=0.8; 'linear' for 1 − γ (n−k−1) / n + bias, with gamma=0.9 and
            bias=0; 'const' for c=1; another name that `register_weight_func` made known; or a function
            (n, k, …) -> weight.
        return_loss_values: whether to return the values of the criterion as well, without weights.
        **kwargs: arguments of the weight function. Those of the built-in ones, gamma, bias and c, are ignored by a
            function that has no use for them.

    Returns:
        The sum, in the shape, dtype and device of the criterion's value. With `return_loss_values` also a list of
        Python floats, which waits for the device once.

    Raises:
        TypeError: `args` is no list or tuple; the weight function is neither a name nor a function, or has no such
            argument, and the nearest is named; or the criterion gives neither a tensor nor a number.
        ValueError: there is nothing to sum, a list has a length that does not divide the longest, there is no
            weight function of this name, or the values are asked for where the criterion gives more than one number.

    Departure from torchdeq 0.1.0: that began a list again at its end whatever its length, so two targets for three
    states gave the third state the first target.

    Example:
        >>> states, target = [torch.zeros(2), torch.ones(2)], torch.ones(2)
        >>> crit = lambda z, y: (z - y).abs().mean()
        >>> fp_correction(crit, (states, target), return_loss_values=True)  # 0.8 · 1 + 1 · 0
        (tensor(0.8000), [1.0, 0.0])
    """
    columns, n = _aligned(args)
    weight = _weight(weight_func, kwargs)
    losses = [_checked(crit(*(column[k % len(column)] for column in columns)), crit) for k in range(n)]
    terms = [weight(n, k) * loss for k, loss in enumerate(losses)]
    total = sum(terms[1:], terms[0])
    return (total, _floats(losses)) if return_loss_values else total


def _aligned(args: Sequence[Any]) -> tuple[list[Sequence[Any]], int]:
    """Each argument as a sequence, and the length of the longest."""
    if not isinstance(args, list | tuple):
        raise TypeError(
            f"fp_correction(crit, args): args is a {type(args).__name__}; expected a list or tuple with an entry for "
            f"each argument of crit: fp_correction(crit, (states, target))."
        )
    # Exactly a list or tuple: a named tuple is one state.
    columns = [arg if type(arg) in (list, tuple) else [arg] for arg in args]
    lengths = [len(column) for column in columns]
    if not lengths or 0 in lengths:
        raise ValueError(
            f"fp_correction(crit, args): args has entries of the lengths {lengths}; expected at least one entry, and "
            f"at least one value in each."
        )
    n = max(lengths)
    if any(n % length for length in lengths):
        raise ValueError(
            f"fp_correction(crit, args): the entries of args have the lengths {lengths}. Each must divide the longest, "
            f"or be a single value: give one for each state, or one for all."
        )
    return columns, n


def _weight(weight_func: str | WeightFunc, kwargs: dict[str, Any]) -> Callable[[int, int], Any]:
    """The function (n, k) -> weight, its further arguments given."""
    if not isinstance(weight_func, str) and not callable(weight_func):
        raise TypeError(
            f"fp_correction(crit, args, weight_func): weight_func is a {type(weight_func).__name__}; expected a name "
            f"or a function (n, k) -> weight. All arguments of crit go into args, a tuple: "
            f"fp_correction(crit, (states, target))."
        )
    if callable(weight_func):
        func = weight_func
    elif weight_func in WEIGHTS:
        func = WEIGHTS[weight_func]
    else:
        raise ValueError(
            f"fp_correction(weight_func={weight_func!r}): there is no such weight function."
            f"{did_you_mean(weight_func, WEIGHTS)} Known are {', '.join(WEIGHTS)}; register_weight_func adds to them, "
            f"and a function (n, k) -> weight can be given as it is."
        )
    taken = _arguments(func)
    if taken is not None:
        for name in kwargs:
            if name not in taken and name not in _COMMON:
                known = (*taken, *(common for common in _COMMON if common not in taken))
                raise TypeError(
                    f"fp_correction: the weight function {weight_func!r} has no argument {name!r}."
                    f"{did_you_mean(name, known)} It takes {', '.join(taken) or 'none'}."
                )
        kwargs = {name: value for name, value in kwargs.items() if name in taken}
    return lambda n, k: func(n, k, **kwargs)


def _arguments(func: WeightFunc) -> tuple[str, ...] | None:
    """The names that func takes beside n and k; None if any, or if there is no telling."""
    try:
        parameters = list(inspect.signature(func).parameters.values())
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return tuple(p.name for p in parameters if p not in positional[:2] and p.kind is not p.VAR_POSITIONAL)


def _checked(loss: Any, crit: Callable[..., Any]) -> Any:
    """What the criterion gave, which must be something to add up."""
    if loss is None or isinstance(loss, tuple | list | dict | str):
        raise TypeError(
            f"fp_correction(crit, args): crit={crit!r} returned a {type(loss).__name__}; expected a tensor or a "
            f"number. Of several losses give their sum, as in lambda *args: sum(crit(*args))."
        )
    return loss


def _floats(losses: list[Any]) -> list[float]:
    if all(isinstance(loss, Tensor) and loss.numel() == 1 for loss in losses):
        return [float(x) for x in torch.stack([loss.detach().reshape(()) for loss in losses]).tolist()]
    for loss in losses:
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise ValueError(
                f"fp_correction(return_loss_values=True): crit returned a tensor of the shape {tuple(loss.shape)}, and "
                f"the values are Python floats; expected one number. Have crit take the mean, or leave "
                f"return_loss_values out for a sum in that shape."
            )
    return [float(loss) for loss in losses]
