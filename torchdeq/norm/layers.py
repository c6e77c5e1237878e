"""Which weights of which layers are normalised, and what stands in the way."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from torchdeq.norm.base import Norm
from torchdeq.norm.modules import attach, lists_of, parametrizations_of

_Place = tuple[nn.Module, str, int]


def normalise(
    model: nn.Module, modules: list[nn.Module], norm_class: type[Norm], options: dict[str, Any]
) -> int:
    """Normalise layers, all or, if there is an error, none.

    Arguments:
        model: where layers that are normalised already may be, which have one of these weights too.
        modules: those to look at.
        norm_class, options: the normalisation; among the options perhaps `names` and `dims`.

    Returns:
        How many weights there were.
    """
    names, dims = options.pop("names", None), options.pop("dims", None)
    lists = {id(one.weight): one for module in model.modules() for one in lists_of(module).values()}
    plan: list[tuple[_Place, Norm]] = []
    normed: dict[int, Norm] = {key: one.norm for key, one in lists.items()}
    for module in modules:
        target = _target(module, norm_class)
        if target is None:
            continue
        for name, dim in pairs(*(target if names is None or dims is None else (names, dims))):
            if getattr(module, name, None) is None:
                continue
            place = (module, name, dim)
            if parametrize.is_parametrized(module, name):
                plan.append((place, _on_top(place, norm_class, options)))
                continue
            weight = _weight(place)
            norm = norm_class.made_for(weight, dim % weight.dim(), **options)
            tied = normed.setdefault(id(weight), norm)
            if type(tied) is not type(norm) or tied.options() != norm.options():
                raise ValueError(
                    f"{_where(place)} is shared with another layer, where it has {tied!r}; here it would have "
                    f"{norm!r}. A shared weight has one normalisation: leave one of the layers out with filter_out."
                )
            norm.check(weight)
            plan.append((place, norm.train(module.training)))
    for (module, name, _), norm in plan:
        if parametrize.is_parametrized(module, name):
            parametrizations_of(module)[name].append(norm)  # type: ignore[operator]
        else:
            key = id(module._parameters[name])
            lists[key] = attach(module, name, norm, lists.get(key))
    return len(plan)


def _target(module: nn.Module, norm_class: type[Norm]) -> Any:
    """Name and dimension of what to normalise, by the nearest class that is registered."""
    table = norm_class._target_modules
    return next((table[cls] for cls in type(module).__mro__ if cls in table), None)


def pairs(names: Any, dims: Any) -> list[tuple[str, int]]:
    """Each name with its dimension."""
    names, dims = [names] if isinstance(names, str) else names, [dims] if isinstance(dims, int) else dims
    if len(names) != len(dims):
        raise ValueError(
            f"each weight has one dimension of outputs, but names={names} and dims={dims} are not equally many."
        )
    return list(zip(names, dims, strict=True))


def _weight(place: _Place) -> nn.Parameter:
    module, name, dim = place
    weight = module._parameters.get(name)
    if weight is None:
        raise ValueError(
            f"{_where(place)} is not a parameter but a {type(getattr(module, name)).__name__}; only parameters can be "
            f"normalised."
        )
    if is_lazy(weight):
        raise ValueError(
            f"{_where(place)} has no shape yet: the layer is lazy. Call the model once on a batch, and then apply_norm."
        )
    if not -weight.dim() <= dim < weight.dim():
        raise ValueError(f"{_where(place)} has shape {tuple(weight.shape)}, which has no dimension {dim}.")
    return weight


def _on_top(place: _Place, norm_class: type[Norm], options: dict[str, Any]) -> Norm:
    """The normalisation of a weight that has another parametrization."""
    module, name, dim = place
    others: Any = parametrizations_of(module)[name]
    if any(isinstance(p, Norm) for p in others):
        raise ValueError(
            f"{_where(place)} is normalised already. Call remove_norm first, or leave it out with filter_out."
        )
    weight = getattr(module, name).detach()
    norm = norm_class.made_for(weight, dim % weight.dim(), **options)
    norm.check(weight)
    if len(norm.originals()) > 1:
        raise ValueError(
            f"{_where(place)} is parametrized already, and weight normalisation with a learned scale must come first: "
            f"call apply_norm before registering the parametrization. Or use learn_scale=False, or 'spectral_norm'."
        )
    return norm.train(module.training)


def _where(place: _Place) -> str:
    module, name, _ = place
    return f"{name!r} of {type(module).__name__}"
