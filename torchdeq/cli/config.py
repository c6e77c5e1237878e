"""The options of a training run in one table: what the parser offers, what `config.json` holds, and what becomes of
them. One field of `TrainConfig` is one option."""

from __future__ import annotations

import argparse
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from torchdeq import DEQ, GRADS, SOLVERS, ConvergenceWarning, GradMethod, as_grad, as_solver
from torchdeq.cli.errors import UsageError
from torchdeq.solver import AffineSolver, SolverLoop

#: The field of a gradient method that an option sets. An option that is not here concerns every method.
GRAD_FIELDS = {
    "adjoint_solver": "solver",
    "adjoint_tol": "solver",
    "adjoint_max_iter": "solver",
    "hook": "hook",
    "phantom_steps": "steps",
    "phantom_tau": "tau",
}


def forward_solvers() -> list[str]:
    """The registered solvers that take any map.

    Example:
        >>> "anderson" in forward_solvers(), "gmres" in forward_solvers()
        (True, False)
    """
    return [name for name in SOLVERS if not isinstance(as_solver(name), AffineSolver)]


def option(default: Any, text: str, choices: Callable[[], Iterable[str]] | None = None) -> Any:
    """A field of `TrainConfig`."""
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that the result of a run depends on. None stands for an option the gradient method has not.

    Example:
        >>> config = TrainConfig(solver="broyden", tol=1e-3)
        >>> config.forward_solver()
        Broyden(max_iter=40, stop_mode='rel')
        >>> config.grad_method()
        IFT(solver=GMRES(max_iter=40, tol=0.01, stop_mode='rel'))
    """

    solver: str = option("anderson", "forward solver", forward_solvers)
    tol: float = option(1e-2, "relative residual at which a training sample has converged")
    max_iter: int = option(40, "most evaluations of f in a forward solve")
    eval_tol: float = option(1e-3, "relative residual at which a test sample has converged")
    grad: str = option("ift", "gradient method", lambda: GRADS)
    adjoint_solver: str | None = option("gmres", "solver of the adjoint system", lambda: SOLVERS)
    adjoint_tol: float | None = option(1e-2, "relative residual of the adjoint system")
    adjoint_max_iter: int | None = option(
        40, "most products with the transposed Jacobian in an adjoint solve"
    )
    hook: bool | None = option(False, "solve the adjoint system in a hook, on the graph of the forward pass")
    phantom_steps: int | None = option(5, "steps of the phantom gradient")
    phantom_tau: float | None = option(1.0, "damping of the phantom gradient, in (0, 2)")
    epochs: int = option(15, "passes over the training data")
    batch_size: int = option(64, "samples in a training step")
    lr: float = option(1e-2, "largest learning rate of the one-cycle schedule")
    channels: int = option(24, "channels of the state, a multiple of 4")
    seed: int = option(0, "seed of weights, order and augmentation; the test split is always the same")
    device: str = option("cpu", "device, such as cpu, cuda or cuda:1")
    # On small images a second thread gains little, and costs a factor of ten while other programs run.
    threads: int = option(1, "CPU threads that an operation may use")

    @classmethod
    def from_options(cls, given: Mapping[str, Any]) -> TrainConfig:
        """The defaults, with the given options in their place.

        Raises:
            UsageError: an option belongs to another gradient method, or a value cannot be used.

        Example:
            >>> TrainConfig.from_options({"grad": "phantom"}).adjoint_solver is None
            True
        """
        method = as_grad(given.get("grad", cls.grad))
        has = {f.name for f in dataclasses.fields(method)}
        foreign = [name for name, field in GRAD_FIELDS.items() if field not in has]
        for name in foreign:
            if name in given:
                users = [g for g in GRADS if hasattr(as_grad(g), GRAD_FIELDS[name])]
                raise UsageError(
                    f"{flag(name)} would change nothing with --grad {given.get('grad', cls.grad)}; it belongs to "
                    f"--grad {' or '.join(users)}. Leave it out, or change the gradient method."
                )
        config = cls(**{**dict.fromkeys(foreign), **given})
        config.check()
        return config

    def check(self) -> None:
        """Make everything once, so that what cannot work ends here and not after an epoch.

        Raises:
            UsageError: a value cannot be used.
        """
        for name in ("epochs", "batch_size", "threads"):
            if getattr(self, name) < 1:
                raise UsageError(f"{flag(name)} {getattr(self, name)}: expected at least 1.")
        if self.batch_size < 2:
            raise UsageError("--batch-size 1: batch normalisation needs at least 2 samples.")
        if not self.lr > 0:
            raise UsageError(f"--lr {self.lr}: expected a positive number.")
        if self.channels < 4 or self.channels % 4:
            raise UsageError(f"--channels {self.channels}: expected a positive multiple of 4.")
        try:
            torch.empty(1, device=self.torch_device()).cpu()
        # An unknown name, a device that is not there, a build without it: each raises something else.
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).partition("\n")[0]
            raise UsageError(f"--device {self.device} cannot be used: {reason}") from error
        problem = self._problem()
        if problem is not None:
            others = [n for n in forward_solvers() if dataclasses.replace(self, solver=n)._problem() is None]
            hint = f" --grad {self.grad} works with --solver {' or '.join(others)}." if others else ""
            raise UsageError(problem + hint)

    def _problem(self) -> str | None:
        """What is wrong with the equilibrium layer, learnt from a fixed point of one number; None if it works."""
        a = torch.full((1, 1), 0.5, requires_grad=True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                z, _ = self.deq()(lambda z: a * z + 1, torch.zeros(1, 1))
                z.sum().backward()
        except (TypeError, ValueError) as error:
            return str(error)
        return None

    def torch_device(self) -> torch.device:
        """The device of the run."""
        return torch.device(self.device)

    def forward_solver(self, tol: float | None = None) -> SolverLoop:
        """The forward solver, at `tol` rather than that of training if it is given."""
        tol = self.tol if tol is None else tol
        return as_solver(self.solver, tol=tol, max_iter=self.max_iter, stop_mode="rel")

    def grad_method(self) -> GradMethod:
        """The gradient method with those of the options that it has."""
        has = {f.name for f in dataclasses.fields(as_grad(self.grad))}
        options: dict[str, Any] = {}
        if "solver" in has and self.adjoint_solver is not None:
            options["solver"] = as_solver(
                self.adjoint_solver, tol=self.adjoint_tol, max_iter=self.adjoint_max_iter, stop_mode="rel"
            )
        for name in ("hook", "phantom_steps", "phantom_tau"):
            if GRAD_FIELDS[name] in has:
                options[GRAD_FIELDS[name]] = getattr(self, name)
        if "dtype" in has:  # a reversible iteration in float32 ends after some ten evaluations
            options["dtype"] = torch.float64
        return as_grad(self.grad, **options)

    def deq(self, on_backward: Callable[[Any], None] | None = None) -> DEQ:
        """The equilibrium layer of the model."""
        return DEQ(
            self.forward_solver(),
            self.grad_method(),
            eval_solver=self.forward_solver(self.eval_tol),
            on_backward=on_backward,
        )

    def as_dict(self) -> dict[str, Any]:
        """The options by name."""
        return dataclasses.asdict(self)


def flag(name: str) -> str:
    """The command-line spelling of an option.

    Example:
        >>> flag("max_iter")
        '--max-iter'
    """
    return "--" + name.replace("_", "-")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `TrainConfig`. One that is not given is absent from the namespace.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_options(parser)
        >>> vars(parser.parse_args(["--tol", "1e-4", "--hook"]))
        {'tol': 0.0001, 'hook': True}
    """
    group = parser.add_argument_group("options of the run")
    for field in dataclasses.fields(TrainConfig):
        settings: dict[str, Any] = {"default": argparse.SUPPRESS}
        settings["help"] = field.metadata["help"]
        if isinstance(field.default, bool):
            settings["action"] = "store_true"
        else:
            settings["type"] = type(field.default)
            settings["help"] += f" (default: {field.default})"
            settings["metavar"] = field.name.rpartition("_")[2].upper()
            if field.metadata["choices"]:
                settings["choices"] = list(field.metadata["choices"]())
                settings["metavar"] = None
        group.add_argument(flag(field.name), **settings)
