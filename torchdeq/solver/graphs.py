"""Functions for `torch.compile`, made once and kept; and what becomes of what torch says when it cannot compile one."""

from __future__ import annotations

import itertools
import re
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from torchdeq._held import Held
from torchdeq._state import FlatMap

_NUMBERS = itertools.count()
#: The loop of a solve runs in C++, not in Python. A convolution takes states as the solver has them: to turn them into
#: another layout and back costs more than it gains, and keeps the loops over them from being vectorised.
OF_INDUCTOR = {"cpp_wrapper": True, "layout_optimization": False}
#: What a sum over small matrices is made of is stored, not computed again for each of their elements.
STORED = {"realize_opcount_threshold": 4, "realize_reads_threshold": 2}


class Graphs:
    """The compiled functions of one module.

    Arguments:
        options: of `torch.compile`: backend, mode, dynamic, options.

    A copy, or what is read from a file, has the options and compiles anew.
    """

    def __init__(self, options: Mapping[str, Any] | None = None):
        self.options = dict(options or {})
        self._kept: dict[Any, Any] = {}

    def __reduce__(self) -> Any:
        return Graphs, (self.options,)

    def __deepcopy__(self, memo: Any) -> Graphs:
        return Graphs(self.options)

    def kept(self, key: Any, make: Callable[[], Any]) -> Any:
        """What was made for this key, once.

        Arguments:
            key: what it is made for.
            make: makes it, if there is none yet.
        """
        found = self._kept.get(key)
        if found is None:
            found = self._kept[key] = make()
        return found

    def __call__(self, key: Any, make: Callable[[], Any], *, stored: bool = False) -> Program:
        """The program of this key.

        Arguments:
            key: what it is made for.
            make: makes the function that is to be compiled, if there is none yet.
            stored: whether its sums are over matrices that are large enough, see `STORED`.
        """
        program: Program = self.kept(key, lambda: Program(make, self.options, stored=stored))
        return program


class Program:
    """A function under `torch.compile`, as one graph for each kind of arguments.

    Arguments:
        make: makes the function. What it closes over is named `ours`, and does not change.
        options: of `torch.compile`.
        stored: see `Graphs`.
    """

    def __init__(self, make: Callable[[], Any], options: Mapping[str, Any], *, stored: bool = False):
        self.make = make
        self.options = dict(options)
        if "mode" not in options:  # which excludes options of any other kind
            own: dict[str, Any] = OF_INDUCTOR | (STORED if stored else {})
            if options.get("backend", "inductor") != "inductor":
                own = {}
            inner = {"guard_filter_fn": needed, **own, **options.get("options", {})}
            self.options["options"] = inner
        self.compiled = self._anew()

    def __call__(self, *args: Any) -> Any:
        from torch._dynamo.exc import (
            FailOnRecompileLimitHit,  # not before something is compiled: it takes a second
        )

        try:
            return self.compiled(*args)
        except FailOnRecompileLimitHit:  # as many kinds of f as torch keeps; it forgets them
            self.compiled = self._anew()
            return self.compiled(*args)

    def _anew(self) -> Callable[..., Any]:
        """The function with code of its own, by which torch keeps what it has compiled, and of a name of its own, by
        which it takes note of what has changed: another solver's numbers have not."""
        f = self.make()
        code = f.__code__.replace(co_name=f"program_{next(_NUMBERS)}")
        apart = types.FunctionType(code, f.__globals__, f.__name__, None, f.__closure__)
        return torch.compile(apart, fullgraph=True, **self.options)


def needed(guards: Any) -> list[bool]:
    """Which guards are worth a look at each call: not those on this library's loop, nor on private parts of torch.

    They do not change, and are hundreds. A guard on anything that f names must stay, or a number that f had when it was
    captured would be used for ever.
    """
    return [not _is_fixed(guard.name) for guard in guards]


#: What a program closes over or finds among the globals of its module; and what torch runs a loop and a product with.
_FIXED = re.compile(
    r"(type\(|dict\()*"
    r"(?:L\['(ours|solver|packing|room)'\]|(ours|solver|packing|room)(?!\w)|G\['(?!_|torch')"
    r"|G\['__(builtins_dict|import_torchdeq_dot_solver|import_torch_dot__(dynamo|functorch|higher_order_ops))"
    r"|(G\['__import_torch_dot_utils_dot__pytree'\]|__import__\('torch'\)\.utils\._pytree)"
    r"|G\['___unnamed_scope.*\['_tuple_new'\])"  # the rest of that scope may be of an f that was made by exec
)


def _is_fixed(name: str) -> bool:
    return _FIXED.match(name) is not None


@contextmanager
def weights_given(held: Held) -> Iterator[None]:
    """Within, code that is traced finds each parametrized weight of f evaluated."""
    lists = [weight.list for weight in held.weights.of.values()]
    held.weights.begin()
    try:
        for one in lists:
            one.__dict__["given"] = held.weights.get(one)
        yield
    finally:
        held.weights.end()
        for one in lists:
            one.__dict__.pop("given", None)


@contextmanager
def captured(flat: FlatMap, z: Tensor) -> Iterator[Callable[..., Any]]:
    """The user's f as torch is to capture it, its weights evaluated; and errors of torch in plain words.

    Arguments:
        flat: f as the loop sees it.
        z: a state, (B, D), to see what is wrong with f.

    Raises:
        RuntimeError: f changes buffers; or torch cannot capture it.
    """
    f = flat.f
    try:
        if not isinstance(f, Held):
            yield f
            return
        if f.fresh and f.buffers:
            flat(z)  # which tells the buffers that it changes
        inner = {id(buffer) for buffer in f.weights.buffers}
        names = [name for buffer in f.buffers if id(buffer) not in inner for _, name in buffer.places]
        if names and not f.fresh:
            raise RuntimeError(
                f"f changes its buffers {', '.join(dict.fromkeys(names))} in training mode, which a compiled solve "
                f"cannot hold. Call eval() on the module that has them, use another normalisation, or "
                f"DEQ(compile=False)."
            )
        with weights_given(f):
            yield f.f
    except RuntimeError as error:  # of torch's compiler, in a module that takes a second to import
        if not _is_of_capture(error):
            if "functorch" in str(error) or "torch.func" in str(error):
                error.add_note(
                    "A compiled solve takes products with Jᵀ by torch.func. Use DEQ(compile=False)."
                )
            raise
        flat(z)  # an error of f itself says more
        raise RuntimeError(
            f"f cannot be captured as one graph by torch.compile. Use DEQ(compile=False); or write f in torch "
            f"operations, without Python that looks at values, changes lists or calls other libraries. {_reason(error)}"
        ) from error


def _is_of_capture(error: Exception) -> bool:
    """Whether it is torch that could not capture something, and not a compiler that failed or does not exist."""
    from torch._dynamo.exc import BackendCompilerFailed, InvalidBackend, TorchDynamoException

    others = BackendCompilerFailed, InvalidBackend
    return isinstance(error, TorchDynamoException) and not isinstance(error, others)


def _reason(error: Exception) -> str:
    """What torch says, in a line or two: why, and where."""
    text = str(error)
    why = re.search(r"Explanation: (.*)", text)
    places = re.findall(r'File "[^"]*", line \d+, in .*\n.*', text)
    where = f" At {' '.join(places[-1].split())}" if places else ""
    return f"torch says: {why[1] if why else text.strip().splitlines()[0]}{where}"
