"""Parametrized weights for one solve: each is evaluated once, rather than at each evaluation of f.

    W = p(θ; s₀),   θ its parameters, s₀ its buffers (the vectors of spectral normalisation, …) as the solve begins.

`torch.nn.utils.parametrize` evaluates a weight whenever it is read. In a solve neither θ nor s₀ changes, so W does not.
It is kept for as long as the solver, or a gradient method, is at work and never longer, so it cannot be out of date. An
evaluation with a graph and one without are kept apart.

What is not kept, and evaluated as often as it is read: a weight that draws random numbers; one read under a transform
of torch.func, within a checkpoint, which must save the same tensors when it is made again, or in compiled code; and one
of whose parts another has taken the place, as `torch.func.functional_call` does, if it is not the same as before.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.nn.utils.parametrize import ParametrizationList

from torchdeq._buffers import Buffer, Loan, is_as_lent
from torchdeq._modes import in_backward, in_dual_level, in_transform, saves_elsewhere
from torchdeq._replay import RandomState


class _Now(threading.local):
    """What is going on in this thread: solves, from the outside in, and whose weight is being evaluated."""

    def __init__(self) -> None:
        self.solves: list[Weights] = []
        self.owner: Weights | None = None


_now = _Now()


#: Where a tensor is: a module, and its name there.
Place = tuple[nn.Module, str]


class SharedList(ParametrizationList):
    """torch's list of a weight's parametrizations; where a solve is going on, that one is asked for the weight."""

    #: For code that is traced: the weight, evaluated before it.
    given: Tensor | None = None

    def forward(self) -> Tensor:
        """The weight."""
        if torch.compiler.is_compiling():
            return self.evaluate() if self.given is None else self.given
        if not _now.solves:
            return self.evaluate()
        # The outermost solve: its buffers are those that all evaluations begin with.
        owner = next((solve for solve in _now.solves if id(self) in solve.of), None)
        return self.evaluate() if owner is None else owner.get(self)

    def evaluate(self) -> Tensor:
        """The weight, evaluated now."""
        out: Tensor = super().forward()
        return out

    def prepare(self) -> None:
        """Called when a solve begins, outside of any evaluation."""

    def places(self) -> list[Place]:
        """The parameters and buffers that the weight depends on."""
        return [(m, name) for m in self.modules() for name in (*m._parameters, *m._buffers)]

    def _get_name(self) -> str:
        return ParametrizationList.__name__  # a model prints alike before and after a solve

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy, or what is read from a file, is torch's list again."""
        if type(self) is not SharedList:
            return super().__reduce_ex__(protocol)
        return object.__new__, (ParametrizationList,), self.__getstate__()


class Weights:
    """The parametrized weights among the modules of one f, for one solve.

    Arguments:
        lists: of their parametrizations.
        buffers: those that an evaluation may change, those of these lists among them.
    """

    def __init__(self, lists: Iterable[SharedList], buffers: Iterable[Buffer]):
        owned = {(id(module), name): buffer for buffer in buffers for module, name in buffer.places}
        self.of = {id(one): _Weight(one, owned) for one in lists}
        self.again = in_backward()  # then the solve itself is one that is made again
        self.open = True
        self._kept: dict[Any, tuple[_Parts, Tensor]] | None = None
        self._once: dict[Any, tuple[_Parts, Tensor]] = {}
        self._tracked = False

    @property
    def buffers(self) -> list[Buffer]:
        """Those of the lists."""
        return list({id(b): b for weight in self.of.values() for b in weight.buffers}.values())

    @contextmanager
    def shared(self) -> Iterator[None]:
        """For a solver or a gradient method: until the end, evaluations of f share the weights."""
        self._kept = {}
        try:
            yield
        finally:
            self._kept = None

    def begin(self) -> None:
        """An evaluation of f begins. By itself it has one value of each weight, too."""
        self._once, self._tracked = {}, torch.is_grad_enabled()
        _now.solves.append(self)

    def end(self) -> None:
        """It ends."""
        _now.solves.pop()
        self._once = {}

    def get(self, one: SharedList) -> Tensor:
        """The weight of a list in `of`."""
        weight = self.of[id(one)]
        if weight.random or weight.touched() or in_transform() or saves_elsewhere():
            return self._evaluate(weight)
        # An f that differentiates within, in a solve without a graph, has a graph for each evaluation of its own.
        apart = self._kept is None or (torch.is_grad_enabled() and not self._tracked)
        kept = self._once if apart or self._kept is None else self._kept
        key = (id(one), *weight.modes())
        found = kept.get(key)
        if found is not None and found[0].are(weight.made_of()):
            return found[1]
        random = RandomState.capture(weight.device)
        value = self._evaluate(weight)
        if random.is_now():
            kept[key] = (weight.made_of(), value)
        else:
            weight.random = True
        return value

    def _evaluate(self, weight: _Weight) -> Tensor:
        """The weight, from the buffers as they were when the solve began."""
        outer, _now.owner = _now.owner, self
        loans: list[Loan] = []
        if not weight.touched():
            with temporarily_clear_interpreter_stack() if in_transform() else nullcontext():
                loans += [Loan(buffer) for buffer in weight.buffers]
        try:
            value = weight.list.evaluate()
        finally:
            _now.owner = outer
            changes = [loan.end() for loan in loans]
        if self.open:
            for loan, change in zip(loans, changes, strict=True):
                loan.buffer.last = change
        return value


class _Parts(NamedTuple):
    """What a weight has been made of.

    Arguments:
        things: tensors, and the attributes of modules.
        versions: of the tensors.
    """

    things: list[Any]
    versions: list[int | None]

    def are(self, others: _Parts) -> bool:
        """Whether they are the same things, unchanged."""
        same = len(self.things) == len(others.things) and all(map(operator.is_, self.things, others.things))
        return same and self.versions == others.versions


class _Weight:
    """One weight of a solve.

    Arguments:
        one: its list.
        owned: buffers by their places, a module's id and a name.
    """

    def __init__(self, one: SharedList, owned: dict[tuple[int, str], Buffer]):
        self.list = one
        places = one.places()
        self.buffers = list({id(b): b for m, name in places if (b := owned.get((id(m), name)))}.values())
        self.random = False
        self._attributes = [module.__dict__ for module in one.modules()]
        dicts = [(_holder(m, name), m, name) for m, name in places]
        tensors = [d.get(name) for d, _, name in dicts]
        # A buffer that is held is as it was when the solve began.
        self._tensors = [(d, name) for d, m, name in dicts if (id(m), name) not in owned]
        self.device = next((t.device for t in tensors if t is not None), torch.device("cpu"))
        self._autocast = self.device.type if torch.amp.is_autocast_available(self.device.type) else None

    def touched(self) -> bool:
        """Whether f itself has changed a buffer of the list in this evaluation."""
        return any(
            buffer.lent is not None and not is_as_lent(module._buffers.get(name))
            for buffer in self.buffers
            for module, name in buffer.places
        )

    def made_of(self) -> _Parts:
        """All that the weight depends on, but for buffers that are held."""
        tensors = [owner.get(name) for owner, name in self._tensors]
        things = [thing for attributes in self._attributes for thing in attributes.values()]
        return _Parts(
            things + tensors,
            [None if t is None or t.is_inference() else t._version for t in tensors],
        )

    def modes(self) -> tuple[Any, ...]:
        """What, besides its parts, it may depend on: the modes of autograd, and autocast."""
        kind = self._autocast
        return (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            in_dual_level() and torch._C._is_fwd_grad_enabled(),
            torch.get_autocast_dtype(kind) if kind and torch.is_autocast_enabled(kind) else None,
        )


def _holder(module: nn.Module, name: str) -> dict[str, Any]:
    """Where a module keeps a tensor; as a plain attribute if it is computed (replicas, torch.nn.utils.prune)."""
    kept: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
    return next((one for one in kept if name in one), module.__dict__)


def is_held(one: SharedList) -> bool:
    """Whether f is being evaluated in a solve that this weight belongs to."""
    return bool(_now.solves) and any(id(one) in solve.of for solve in _now.solves)


def recomputed() -> bool:
    """Whether what is being evaluated has been evaluated before: in a backward pass, by a checkpoint.

    A solve that began in the forward pass does not count: it sees to it that its evaluations begin alike.
    """
    return in_backward() if _now.owner is None else _now.owner.again


def lists_in(modules: Iterable[nn.Module]) -> list[SharedList]:
    """The lists of parametrizations among the modules. torch's own become `SharedList`."""
    found = []
    for module in modules:
        if type(module) is ParametrizationList:
            module.__class__ = SharedList
        if isinstance(module, SharedList):
            found.append(module)
    return found
