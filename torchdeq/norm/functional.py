"""0.1.0's functions: `apply_norm` finds the layers of a model and gives them a normalisation. Translation only."""

from __future__ import annotations

import functools
import inspect
import operator
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from torchdeq._suggest import did_you_mean
from torchdeq.norm.base import Norm, check_switch
from torchdeq.norm.layers import normalise, pairs
from torchdeq.norm.lists import NormedList, at_rest
from torchdeq.norm.modules import detach, lists_of, parametrizations_of
from torchdeq.norm.spectral_norm import SpectralNorm
from torchdeq.norm.weight_norm import WeightNorm
from torchdeq.utils.config import DEQConfig
from torchdeq.utils.options import NAMES, check_keywords, warn_near_misses

#: Normalisations by name. `register_norm` adds to them.
NORMS: dict[str, Any] = {"weight_norm": WeightNorm, "spectral_norm": SpectralNorm}

#: The keys of a configuration, and the options they stand for.
_KEYS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "norm_no_scale": ("learn_scale", operator.not_),
    "norm_target_norm": ("target_norm", float),
    "norm_clip": ("clip", operator.truth),
    "norm_clip_value": ("clip_value", float),
    "sn_n_power_iters": ("n_power_iterations", int),
}


def _type_from_args(function: Callable[..., None]) -> Callable[..., None]:
    """Take norm_type from `args` where it is not given by itself, be it as the default."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*positional: Any, **keywords: Any) -> None:
        given = signature.bind(*positional, **keywords).arguments
        if "norm_type" not in given:
            default = signature.parameters["norm_type"].default
            keywords["norm_type"] = DEQConfig(given.get("args")).get("norm_type", default)
        return function(*positional, **keywords)

    return call


@_type_from_args
def apply_norm(
    model: nn.Module,
    norm_type: str = "weight_norm",
    prefix_filter_out: str | list[str] | None = None,
    filter_out: str | list[str] | None = None,
    args: Any = None,
    **norm_kwargs: Any,
) -> None:
    """Normalise the weights of the linear and convolutional layers of a model.

    The weight becomes a function of new parameters: `weight_g` and `weight_v` for 'weight_norm' (v is the parameter
    that was there), `weight_orig` and `weight_g` for 'spectral_norm'. It is computed whenever it is read, in a solve of
    `DEQ` or `get_deq` once. Make the optimiser afterwards, as there are more parameters.

    Arguments:
        model: a module; classes derived from the layers count too. Layers that share one parameter share its
            normalisation.
        norm_type: 'weight_norm', 'spectral_norm', a registered name, or 'none', which does nothing.
        prefix_filter_out: leave out the modules whose name begins with this, or with one of these.
        filter_out: leave out the modules whose name contains this, or one of these.
        args: options in a Namespace, a mapping, a `DEQConfig` or any object with attributes: norm_type, norm_no_scale,
            norm_target_norm, norm_clip, norm_clip_value, sn_n_power_iters. What is given by itself wins over them.
        **norm_kwargs: learn_scale, target_norm, clip, clip_value; for 'spectral_norm' also n_power_iterations and eps.
            See `WeightNorm` and `SpectralNorm`. With both `names` and `dims`, these are the weights of each layer to be
            normalised, and the dimension of their outputs.

    Raises:
        ValueError: the name is not registered; a layer is normalised already, is lazy and has no weight yet, shares its
            weight with one that counts outputs along another dimension, or has a weight without a direction.
        TypeError: there is no such option; the nearest is named. Or what is given is no module, or a switch is neither
            True nor False.

    Warns:
        UserWarning: no layer was found; a filter leaves nothing out; an option given by name changes nothing, as
            target_norm does where 'weight_norm' learns the scale, and clip_value without clip.

    A weight can be set, `layer.weight = t`, and initialised in place, `torch.nn.init.normal_(layer.weight)`: that is
    noticed when it is read for the next time, or a solve begins, outside of compiled code. What is written through
    `.data` cannot be seen and is lost. For that the last value read outside a solve is kept in memory.

    Example:
        >>> layer = torch.nn.Linear(4, 4)
        >>> apply_norm(layer, 'spectral_norm', target_norm=0.9)
        >>> sorted(layer.state_dict())
        ['bias', 'weight_g', 'weight_orig', 'weight_u', 'weight_v']
    """
    _check_model(model, "apply_norm")
    config = DEQConfig(args)
    warn_near_misses(config.config, NAMES)
    if norm_type == "none":
        return
    norm_class = _registered(norm_type)
    native = isinstance(norm_class, type) and issubclass(norm_class, Norm)
    modules = _chosen(model, prefix_filter_out, filter_out)
    if native:
        options = _options(norm_class, norm_type, config, norm_kwargs)
        _warn_idle(norm_class, options, norm_kwargs)
        done = normalise(model, modules, norm_class, options)
    else:
        config.update(**norm_kwargs)
        done = 0
        for module in modules:
            if type(module) in norm_class._target_modules:
                own: Any = module
                own._deq_norm = norm_class.apply(module, deq_args=config, **norm_kwargs)
                done += 1
    if not done:
        warnings.warn(
            f"apply_norm({type(model).__name__}, {norm_type!r}) found no layer to normalise. It looks for "
            f"{', '.join(cls.__name__ for cls, target in norm_class._target_modules.items() if target)}; "
            f"register_norm_module adds others, and the filters leave some out.",
            UserWarning,
            stacklevel=3,
        )


def reset_norm(model: torch.nn.Module) -> None:
    """Begin a new training step. 0.1.0 computed the weights here; now they are whenever they are read.

    For 'weight_norm' and 'spectral_norm' there is nothing to do, and it need not be called: a solve in training mode
    makes the power iterations that this call made. Normalisations of your own that compute theirs here, do.

    Example:
        >>> layer = torch.nn.Linear(4, 4)
        >>> apply_norm(layer)
        >>> reset_norm(layer)
    """
    _check_model(model, "reset_norm")
    for module in model.modules():
        for one in lists_of(module).values():
            one.prepare()
        if hasattr(module, "_deq_norm"):
            norm: Any = module._deq_norm
            norm(module)


def remove_norm(model: nn.Module) -> None:
    """Make the weights plain parameters again, with the values that they have.

    The parameters are new ones. A parametrization that was put on the normalised weight, or beneath it, is made a part
    of the values too.

    Raises:
        ValueError: something else computes a part of a weight, as torch.nn.utils.prune does; nothing is removed then.

    Example:
        >>> layer = torch.nn.Linear(4, 4)
        >>> apply_norm(layer, 'spectral_norm')
        >>> remove_norm(layer)
        >>> sorted(name for name, _ in layer.named_parameters())
        ['bias', 'weight']
    """
    _check_model(model, "remove_norm")
    for path, module in model.named_modules():
        for name, one in lists_of(module).items():
            _check_parts(f"{path}.{name}" if path else name, one)
    made: dict[int, nn.Parameter] = {}
    kept: list[nn.Parameter] = []  # so that no other gets the id of one that is gone
    for module in list(model.modules()):
        for name, one in lists_of(module).items():
            weight = one.weight
            if id(weight) not in made:  # layers that share it go on to
                made[id(weight)] = nn.Parameter(one.final(), weight.requires_grad)
                kept.append(weight)
            detach(module, name, made[id(weight)])
        if parametrize.is_parametrized(module):
            inner: list[tuple[str, Any]] = list(parametrizations_of(module).items())
            for name, others in inner:
                if any(isinstance(p, Norm) for p in others):
                    with at_rest(others):
                        parametrize.remove_parametrizations(module, name)
        if hasattr(module, "_deq_norm"):
            norm: Any = module._deq_norm
            norm.remove(module)
            del module._deq_norm


def register_norm(norm_type: str, norm_class: Any) -> None:
    """Make a normalisation of your own known to `apply_norm`.

    Arguments:
        norm_type: its name.
        norm_class: a class with a dictionary `_target_modules`, from classes of modules to (name of the weight,
            dimension), and a class method `apply(module, deq_args=..., **norm_kwargs)`. What that returns is called
            with the module by `reset_norm`, and its `remove(module)` by `remove_norm`. Or a class derived from
            `WeightNorm` or `SpectralNorm`.

    Raises:
        TypeError: the class is not of this form.
        ValueError: the name is 'none', which stands for no normalisation.

    Example:
        >>> class Unit(WeightNorm):
        ...     _target_modules = {torch.nn.Linear: ('weight', 1)}
        >>> register_norm('unit', Unit)
        >>> layer = torch.nn.Linear(3, 2)
        >>> apply_norm(layer, 'unit', learn_scale=False)
        >>> [round(size, 4) for size in layer.weight.norm(dim=0).tolist()]
        [1.0, 1.0, 1.0]
        >>> del NORMS['unit']
    """
    if norm_type == "none":
        raise ValueError("register_norm: 'none' stands for no normalisation; choose another name.")
    table, apply = getattr(norm_class, "_target_modules", None), getattr(norm_class, "apply", None)
    if not isinstance(table, Mapping) or not callable(apply):
        raise TypeError(
            f"register_norm({norm_type!r}, ...) takes a class with a dictionary `_target_modules` and a class method "
            f"`apply`, or one derived from WeightNorm or SpectralNorm; got {norm_class!r}. To have a class of layers "
            f"normalised, use register_norm_module."
        )
    NORMS[norm_type] = norm_class


def register_norm_module(
    module_class: type[nn.Module],
    norm_type: str,
    names: str | list[str] = "weight",
    dims: int | list[int] = 0,
) -> None:
    """Add a class of modules to those that `apply_norm` normalises.

    Arguments:
        module_class: the class.
        norm_type: the name of the normalisation.
        names: the parameters to normalise, one or several.
        dims: the dimension that counts outputs, one for each name.

    Raises:
        ValueError: the name is not registered; names and dims are not equally many.
        TypeError: module_class is no class of modules, but a layer for example.

    Example:
        >>> register_norm_module(torch.nn.Bilinear, 'weight_norm')
        >>> layer = torch.nn.Bilinear(2, 2, 2)
        >>> apply_norm(layer)
        >>> layer.weight_g.shape
        torch.Size([2, 1, 1])
        >>> del WeightNorm._target_modules[torch.nn.Bilinear]
    """
    if not (isinstance(module_class, type) and issubclass(module_class, nn.Module)):
        instead = (
            f" Give its class, {type(module_class).__name__}." if isinstance(module_class, nn.Module) else ""
        )
        raise TypeError(f"register_norm_module takes a class of modules, got {module_class!r}.{instead}")
    norm_class = _registered(norm_type)
    pairs(names, dims)
    norm_class._target_modules[module_class] = (names, dims)


def _check_parts(path: str, one: NormedList) -> None:
    layer = one.home.layer
    for name in one.names_of_parts():
        if name in vars(layer):
            raise ValueError(
                f"remove_norm: {path!r} is computed from {name!r}, which is no parameter but computed too, as "
                f"torch.nn.utils.prune does. Remove that first: torch.nn.utils.prune.remove(layer, {name!r})."
            )


def _registered(norm_type: str) -> Any:
    if norm_type not in NORMS:
        raise ValueError(
            f"there is no normalisation {norm_type!r}.{did_you_mean(norm_type, [*NORMS, 'none'])} Registered are "
            f"{', '.join(NORMS)}, and 'none' for none; register_norm adds to them."
        )
    return NORMS[norm_type]


def _options(
    norm_class: type[Norm], norm_type: str, config: DEQConfig, keywords: dict[str, Any]
) -> dict[str, Any]:
    """The options of a normalisation: those of the configuration, then those given by name."""
    known = norm_class.OPTIONS
    check_keywords(keywords, (*known, "names", "dims"), f"apply_norm({norm_type!r})")
    options = {}
    for key, (name, read) in _KEYS.items():
        value = config.get(key)
        if name in known and value is not None:
            if isinstance(known[name], bool):
                check_switch(key, value)
            options[name] = read(value)
    return {**options, **keywords}


def _warn_idle(norm_class: type[Norm], options: dict[str, Any], keywords: dict[str, Any]) -> None:
    """Warn about options given by name that change nothing. Configurations have all of them, always."""
    whole = {**norm_class.OPTIONS, **options}
    idle = {
        "clip_value": None if whole["clip"] else "without clip=True",
        "target_norm": "where the scale is learned: it begins as the norm that the weight has. Add learn_scale=False"
        if whole["learn_scale"] and issubclass(norm_class, WeightNorm)
        else None,
    }
    for name, why in idle.items():
        if why and keywords.get(name, norm_class.OPTIONS[name]) != norm_class.OPTIONS[name]:
            _warn(f"apply_norm: {name}={keywords[name]!r} changes nothing {why}.")


def _chosen(model: nn.Module, prefixes: Any, parts: Any) -> list[nn.Module]:
    """The modules that the filters do not leave out. A filter that leaves out none is warned of."""
    left = dict(model.named_modules())
    names = list(left)
    for option, given, fits in (
        ("prefix_filter_out", prefixes, str.startswith),
        ("filter_out", parts, str.__contains__),
    ):
        for word in [given] if isinstance(given, str) else list(given or ()):
            out = [name for name in names if fits(name, word)]
            for name in out:
                left.pop(name, None)
            if not out:
                known = {part for name in names for part in (name, name.rpartition(".")[2])}
                _warn(
                    f"apply_norm: {option}={word!r} leaves nothing out, as no module of {type(model).__name__} has a "
                    f"name that {'begins with' if fits is str.startswith else 'contains'} it."
                    f"{did_you_mean(word, known)}"
                )
    return list(left.values())


def _warn(text: str) -> None:
    # The caller of apply_norm, past this function, the one that calls it, apply_norm and what is around it.
    warnings.warn(text, UserWarning, stacklevel=5)


def _check_model(model: Any, call: str) -> None:
    if isinstance(model, nn.Module):
        return
    hint = "put them into a torch.nn.ModuleList, or call it for each"
    if isinstance(model, type):
        hint = f"make one first, {model.__name__}(...)"
    got = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
    raise TypeError(
        f"{call} takes a model, an instance of torch.nn.Module, got {got}"
        f"{f'; {hint}' if isinstance(model, type | list | tuple | dict) else ''}."
    )
