"""torchdeq 0.1.0's entry points: `get_deq`, and the registry of the classes behind it. Translation only."""

from __future__ import annotations

from typing import Any

from torch import nn

from torchdeq._suggest import did_you_mean
from torchdeq.cores import DEQBase, DEQIndexing, DEQSliced
from torchdeq.dropout import reset_dropout
from torchdeq.utils.config import DEQConfig
from torchdeq.utils.options import NAMES, check_keywords

__all__ = ["DEQBase", "DEQIndexing", "DEQSliced", "get_deq", "register_deq", "reset_deq"]

#: Cores by name, as `get_deq(core=…)` and `--core` know them.
CORES: dict[str, type[nn.Module]] = {"indexing": DEQIndexing, "sliced": DEQSliced}


def register_deq(deq_type: str, core: type[nn.Module]) -> None:
    """Make a DEQ class known to `get_deq` under a name.

    Arguments:
        deq_type: the name, for `core=…`.
        core: a class that is built as `core(args)`, where args is a `DEQConfig`.

    Raises:
        TypeError: the name is not a string, or core cannot be built.

    Example:
        >>> register_deq('mine', DEQIndexing)
        >>> type(get_deq(core='mine')).__name__
        'DEQIndexing'
        >>> _ = CORES.pop('mine')
    """
    if not isinstance(deq_type, str) or not callable(core) or isinstance(core, nn.Module):
        raise TypeError(
            f"register_deq({deq_type!r}, {core!r}): expected a name and a class, not an object of one: get_deq builds "
            f"it as core(args). Derive it from DEQBase, and define train_states or forward."
        )
    CORES[deq_type] = core


def get_deq(args: Any = None, **kwargs: Any) -> Any:
    """A DEQ module from a configuration, as in torchdeq 0.1.0.

    Arguments:
        args: options in an argparse.Namespace, a mapping, a `DEQConfig` or any object with attributes. It is
            copied, never changed, and may hold keys of other programs.
        **kwargs: options by name; they win over `args`.

    Returns:
        An instance of the class registered as option `core`: 'sliced' (the default) or 'indexing'. See
        `DEQBase` for how it is called.

    Raises:
        TypeError: an option that does not exist was given by name; the nearest is named.
        ValueError: the core is not registered, or a value is out of range.

    Example:
        >>> get_deq(f_solver='broyden', ift=True).b_max_iter
        40
        >>> get_deq(f_slover='broyden')
        Traceback (most recent call last):
            ...
        TypeError: get_deq has no option 'f_slover'. Did you mean 'f_solver'...
    """
    config = DEQConfig(args)
    core = kwargs.get("core", config.get("core", "sliced"))
    if core not in CORES:
        raise ValueError(
            f"there is no DEQ core {core!r}.{did_you_mean(core, CORES)} Registered are {', '.join(CORES)}; "
            f"register_deq adds to them."
        )
    if CORES[core] in (DEQIndexing, DEQSliced):
        check_keywords(kwargs, NAMES, "get_deq")
        return CORES[core](config, **kwargs)
    config.update(**kwargs)  # a class of the caller's may have options of its own
    return CORES[core](config)


def reset_deq(model: nn.Module) -> None:
    """Begin a new solve: forget the masks of variational dropout. Call it before each training step.

    Raises:
        TypeError: `model` is no module.

    Example:
        >>> import torch
        >>> from torchdeq.dropout import VariationalDropout
        >>> model = VariationalDropout(0.5)
        >>> _ = model(torch.ones(2, 3))
        >>> reset_deq(model)
        >>> model.mask is None
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"reset_deq(model): model is a {type(model).__name__}; expected the torch.nn.Module that holds the layers "
            f"of f."
        )
    reset_dropout(model)
