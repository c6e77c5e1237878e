"""Which weights of which layers are normalised, and what stands in the way."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from torchdeq.norm.base import Norm
from torchdeq.norm.modules import attach, lists_of, parametrizations_of

#: Modules of torch that compute a weight in a hook, rather than as a parametrization, and what a weight of theirs is.
_HOOKS = {
    "torch.nn.utils.weight_norm": "has torch.nn.utils.weight_norm already",
    "torch.nn.utils.spectral_norm": "has torch.nn.utils.spectral_norm already",
    "torch.nn.utils.prune": "is pruned by torch.nn.utils.prune",
}


class _Place(NamedTuple):
    """A weight to normalise; as a string, where in the model it is."""

    path: str
    module: nn.Module
    name: str
    dim: int

    def __str__(self) -> str:
        kind = type(self.module).__name__
        return f"{self.name!r} of {f'{self.path} ({kind})' if self.path else kind}"


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
    paths = {id(module): path for path, module in model.named_modules()}
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
            place = _Place(paths[id(module)], module, name, dim)
            if parametrize.is_parametrized(module, name):
                plan.append((place, _on_top(place, norm_class, options)))
                continue
            weight = _weight(place)
            norm = _made(place, norm_class, weight, options)
            tied = normed.setdefault(id(weight), norm)
            if type(tied) is not type(norm) or tied.options() != norm.options():
                raise ValueError(
                    f"{place} is shared with another layer, where it has {tied!r}; here it would have "
                    f"{norm!r}. A shared weight has one normalisation: leave one of the layers out with filter_out."
                )
            _check_names(place, norm)
            plan.append((place, norm))
    for (_, module, name, _), norm in plan:
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
    _, module, name, dim = place
    weight = module._parameters.get(name)
    if weight is None:
        raise ValueError(_no_parameter(place))
    if is_lazy(weight):
        raise ValueError(
            f"{place} has no shape yet: the layer is lazy. Call the model once on a batch, and then apply_norm."
        )
    if not -weight.dim() <= dim < weight.dim():
        raise ValueError(f"{place} has shape {tuple(weight.shape)}, which has no dimension {dim}.")
    return weight


def _no_parameter(place: _Place) -> str:
    """Why a weight that is no parameter cannot be normalised."""
    for hook in place.module._forward_pre_hooks.values():
        what = next((_HOOKS[cls.__module__] for cls in type(hook).__mro__ if cls.__module__ in _HOOKS), None)
        if what and place.name in (getattr(hook, "name", None), getattr(hook, "_tensor_name", None)):
            return (
                f"{place} {what}, which computes it at each call of the layer, in a solve at each evaluation. "
                f"Remove that first, or leave this layer out with filter_out={place.path or '...'!r}."
            )
    value = getattr(place.module, place.name)
    return f"{place} is not a parameter but a {type(value).__name__}; only parameters can be normalised."


def _made(place: _Place, norm_class: type[Norm], weight: Tensor, options: dict[str, Any]) -> Norm:
    """The normalisation of a weight; an error says which weight it is."""
    try:
        norm = norm_class.made_for(weight, place.dim % weight.dim(), **options)
        norm.check(weight)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    return norm.train(place.module.training)


def _check_names(place: _Place, norm: Norm) -> None:
    """Raise if the layer has something under a name that a part would get."""
    for name in (f"{place.name}_{part}" for part in norm.parts()):
        if hasattr(place.module, name):
            raise ValueError(
                f"{place} would be computed from {name!r}, but the layer has something of this name, which would be "
                f"lost. Give that another name, or leave this layer out with filter_out={place.path or '...'!r}."
            )


def _on_top(place: _Place, norm_class: type[Norm], options: dict[str, Any]) -> Norm:
    """The normalisation of a weight that has another parametrization."""
    _, module, name, _ = place
    others: Any = parametrizations_of(module)[name]
    if any(isinstance(p, Norm) for p in others):
        raise ValueError(
            f"{place} is normalised already. Call remove_norm first, or leave it out with filter_out."
        )
    weight = getattr(module, name).detach()
    norm = _made(place, norm_class, weight, options)
    if len(norm.originals()) > 1:
        raise ValueError(
            f"{place} is parametrized already, and weight normalisation with a learned scale must come first: "
            f"call apply_norm before registering the parametrization. Or use learn_scale=False, or 'spectral_norm'."
        )
    return norm
