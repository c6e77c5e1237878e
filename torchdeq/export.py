"""Inference without Python: a model with a fixed-point solve in it as one program.

`torch.export` records what a model does once. Here the solve becomes a loop of that program: it stops when all samples
have converged, as in Python, and takes any batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map

from torchdeq._held import modules_of
from torchdeq._replay import RandomState
from torchdeq._state import Tree
from torchdeq.deq import DEQ
from torchdeq.solution import Solution


@overload
def export(
    model: nn.Module, example: Any, /, *, dynamic_batch: bool = True, check: bool = True
) -> ExportedProgram: ...


@overload
def export(
    model: DEQ,
    f: Callable[..., Tree],
    example: Any,
    /,
    *,
    dynamic_batch: bool = True,
    check: bool = True,
) -> ExportedProgram: ...


def export(model: nn.Module, *what: Any, dynamic_batch: bool = True, check: bool = True) -> ExportedProgram:
    """A program for inference, by `torch.export`: `export(model, example)`, or `export(deq, f, example)`.

    The program needs no Python class and no torchdeq: it is saved by `torch.export.save`, loaded by
    `torch.export.load`, called as `program.module()(*inputs)`, and compiled ahead of time by AOTInductor. It makes the
    evaluations that the model makes in eval mode without grad mode, and stops when every sample has converged.

    Arguments:
        model: the model, in eval mode, with a `DEQ` in it that its forward calls. Or a `DEQ`, in eval mode, whose f
            follows.
        *what: the example; before it, for a `DEQ`, f.
            f: called as f(z, *inputs). Modules in it are in eval mode.
            example: what the program is called with, a tensor or a tuple of arguments; for a `DEQ` these are z0 and
                then the inputs of f. They are tensors, or tuples, lists and dicts of tensors. Their sizes are those of
                the program, but for the batch.
        dynamic_batch: the program takes any batch size; the batch is the first dimension of each tensor in the example
            that has as many rows as the first one, and has two or more. False, or `DEQ(batch_dims=0)`: all sizes are
            those of the example.
        check: run the program on the example, and compare with the model.

    Returns:
        The program. For a model it returns what the model returns. For a `DEQ` it returns z and a dict of what is
        known of each sample, (B,) each: `residual` and `nstep` as in `Solution`, and `converged`. A model that is to
        return such things too returns the tensors of its `Solution`, rather than the `Solution`.

    Raises:
        ValueError: the example cannot be used as one.
        RuntimeError: a module is in training mode; or the program, on the example, gives something else than the model.
        TypeError: the solver cannot be exported, while FixedPointIteration, Anderson, Broyden and Multisecant can; or
            the model returns a `Solution`.

    There is no way to train through the program: its parameters do not require grad, and what it returns has no graph.
    `torch.export.export(model.eval(), args)` does the same without the checks. Run what that gives in
    `torch.no_grad()`: with grad mode what comes after the solve has a derivative, and the solve has none.
    `DEQ(throw=True)` stays what it is: the program raises where a sample does not converge. Otherwise it does not
    warn; look at `converged`.

    The loop of the program differs from Python's in three ways: it asks after every evaluation whether to stop, keeps
    finished samples in the batch, and does not solve again with the batch as one sample where f turns out to couple
    samples (use `batch_dims=0`).

    Example:
        >>> import torch, torchdeq
        >>> layer = torch.nn.Linear(4, 4).eval()
        >>> deq = torchdeq.DEQ(torchdeq.FixedPointIteration(tol=1e-4)).eval()
        >>> f = lambda z, x, layer=layer: torch.tanh(0.2 * layer(z) + x)
        >>> program = torchdeq.export(deq, f, (torch.zeros(2, 4), torch.randn(2, 4)))
        >>> z, info = program.module()(torch.zeros(5, 4), torch.randn(5, 4))
        >>> z.shape, bool(info["converged"].all())
        (torch.Size([5, 4]), True)
    """
    if len(what) not in (1, 2) or (len(what) == 1) == isinstance(model, DEQ):
        raise TypeError(
            f"export takes a model and an example, export(model, (x,)), or a DEQ, its f and an example, "
            f"export(deq, f, (z0, x)); got a {type(model).__name__} and {len(what)} more."
        )
    args: tuple[Any, ...] = what[-1] if isinstance(what[-1], tuple) else (what[-1],)
    program: nn.Module = _Solve(model, what[0]) if isinstance(model, DEQ) else _Inference(model)
    _refuse_training(model, program)
    has_batch = dynamic_batch and getattr(model, "batch_dims", 1) > 0
    shapes = (_batches(args),) if has_batch else None
    random = RandomState.capture(_first(args).device)
    with random.again(), torch.no_grad(), _called(model, args):
        expected = program(*tree_map(_copy, args))
    _refuse_solutions(expected)
    with _explained(), torch.no_grad():
        exported = torch.export.export(program, args, dynamic_shapes=shapes, strict=False)
    # The same memory; but the model's own go on being trained.
    for name, tensor in exported.state_dict.items():
        if isinstance(tensor, nn.Parameter):
            exported.state_dict[name] = nn.Parameter(tensor.detach(), requires_grad=False)
    if check:
        with random.again():
            got = exported.module()(*tree_map(_copy, args))
        # Of a solve the states are enough: those that agree have the same residual, but for its rounding.
        _compare(*(expected[0], got[0]) if isinstance(model, DEQ) else (expected, got))
    return exported


class _Inference(nn.Module):
    """A model whose parameters and buffers keep their names, and whose inputs get no gradient."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.__dict__["model"] = model  # not as a submodule, which would put its name before all others
        self._parameters, self._buffers, self._modules = model._parameters, model._buffers, model._modules
        self._non_persistent_buffers_set = model._non_persistent_buffers_set
        self.training = False

    def forward(self, *args: Any) -> Any:
        model: Any = self.model
        return model(*tree_map(_bare, args))


class _Solve(nn.Module):
    """The solve of z = f(z, *inputs) by a DEQ."""

    def __init__(self, deq: DEQ, f: Callable[..., Tree]):
        super().__init__()
        self.deq = deq
        self.f = f
        if not isinstance(f, nn.Module):
            self.modules_of_f = nn.ModuleList(modules_of(f))
            self.modules_of_f.training = False
        self.training = False

    def forward(self, *args: Any) -> tuple[Tree, dict[str, Tensor]]:
        z0, *inputs = tree_map(_bare, args)
        z, info = self.deq(lambda z: self.f(z, *inputs), z0)
        return z, {"residual": info.residual, "nstep": info.nstep, "converged": info.converged}


def _refuse_training(model: nn.Module, program: nn.Module) -> None:
    training = [name or type(model).__name__ for name, one in model.named_modules() if one.training]
    training = training or [name for name, one in program.named_modules() if one.training]
    if training:
        raise RuntimeError(
            f"export: {', '.join(training[:3])}{' and others are' if len(training) > 3 else ' is'} in training mode; "
            f"what is exported is inference. Call .eval() on the model, or on the DEQ and on the modules of f."
        )


def _first(args: tuple[Any, ...]) -> Tensor:
    """The first tensor of the example."""
    for leaf in tree_leaves(args):
        if isinstance(leaf, Tensor):
            return leaf
    raise ValueError("export: there is no tensor in the example. Give what the program is to be called with.")


def _batches(args: tuple[Any, ...]) -> Any:
    """For each leaf of the example which sizes are free, as `torch.export` wants it."""
    first = _first(args)
    size = first.shape[0] if first.dim() else 0
    if size < 2:
        raise ValueError(
            f"export: the first tensor of the example has the shape {tuple(first.shape)}. To tell the batch from other "
            f"sizes, which are fixed, its first dimension must be two or more. Give a batch of two, or "
            f"dynamic_batch=False for a program that takes this size only."
        )
    batch = Dim("batch")

    def sizes(leaf: Any) -> Any:
        is_batch = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == size
        return {0: batch} if is_batch else None

    return tree_map(sizes, args)


def _bare(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _copy(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _refuse_solutions(out: Any) -> None:
    if any(isinstance(leaf, Solution) for leaf in tree_leaves(out)):
        raise TypeError(
            "export: the model returns a Solution, and a program returns tensors. Return those that are wanted, such "
            "as info.residual, info.nstep and info.converged."
        )


@contextmanager
def _called(model: nn.Module, args: tuple[Any, ...]) -> Iterator[None]:
    """With what the example is for, where a call of the model with it fails."""
    try:
        yield
    except TypeError as error:
        what = "f(z0, *inputs) of a DEQ" if isinstance(model, DEQ) else "the model"
        error.add_note(
            f"torchdeq.export calls {what} with the example, a tuple with one entry for each argument, here "
            f"{len(args)}: for two arguments give (z0, x)."
        )
        raise


@contextmanager
def _explained() -> Iterator[None]:
    """With what to look for, where torch cannot trace the model."""
    try:
        yield
    except (TypeError, ValueError):  # ours say it
        raise
    except Exception as error:
        error.add_note(
            "torchdeq.export: f becomes the body of a loop in a graph. It must consist of torch operations, choose "
            "nothing in Python by the values of tensors, and write to nothing outside. In place of an x.shape that it "
            "closes over it needs tuple(x.shape). If the complaint is about the size of the batch, the model fixes "
            "it, as torch.zeros(len(x), 8) does: write x.new_zeros(x.shape[0], 8), and give what f closes over as an "
            "input; or use dynamic_batch=False."
        )
        raise


def _compare(expected: Any, got: Any) -> None:
    """Raise if the program has given something else than the model."""
    pairs = [
        (a, b, float(a.abs().nan_to_num().max()))
        for a, b in zip(tree_leaves(expected), tree_leaves(got), strict=True)
        if isinstance(a, Tensor) and (a.is_floating_point() or a.is_complex()) and a.numel()
    ]
    largest = max((size for *_, size in pairs), default=0.0)
    for a, b, size in pairs:
        eps = torch.finfo(a.dtype).eps
        # What is a difference of larger numbers, as a residual is, has the rounding of those.
        close = eps**0.5 * size + 32 * eps * largest
        if torch.allclose(a, b, rtol=eps**0.5, atol=close, equal_nan=True):
            continue
        raise RuntimeError(
            f"export: on the example the program gives something else than the model, by up to "
            f"{float((a - b).abs().max()):.1e} where the model gives numbers up to {float(a.abs().max()):.1e}. Perhaps "
            f"f couples the samples of a batch, which a program does not notice: use DEQ(batch_dims=0). Or samples do "
            f"not converge, or end so near the tolerance that rounding decides which evaluation is the last: "
            f"check=False takes the program as it is."
        )
