"""The training loop of one run: its objects, an epoch, an evaluation, and the state to go on from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from torchdeq import Solution
from torchdeq.cli.config import TrainConfig
from torchdeq.cli.errors import UsageError
from torchdeq.cli.tasks import Task

OnStep = Callable[[dict[str, float]], None]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The model on the test set, in eval mode and without grad.

    Arguments:
        accuracy: the share of test samples whose largest logit is that of their class.
        solution: of the solve over the whole test set.
    """

    accuracy: float
    solution: Solution

    @property
    def converged(self) -> int:
        """How many test samples converged."""
        return int(self.solution.converged.sum())


class Run:
    """A model in training. What it is at the end of an epoch is in `state_dict`, bit for bit.

    Arguments:
        task: what to train.
        config: how.
    """

    def __init__(self, task: Task, config: TrainConfig):
        self.task, self.config = task, config
        self.device = config.torch_device()
        self.data = task.load().to(self.device)
        if config.batch_size > len(self.data.train_x):
            raise UsageError(
                f"--batch-size {config.batch_size}: there are only {len(self.data.train_x)} training samples."
            )
        torch.manual_seed(config.seed)
        self.generator = torch.Generator().manual_seed(config.seed)  # order and augmentation
        self.adjoint: Solution | None = None
        self.model = task.model(config.channels, config.deq(self._note_adjoint)).to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.lr)
        self.steps_per_epoch = len(self.data.train_x) // config.batch_size
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            config.lr,
            total_steps=config.epochs * self.steps_per_epoch,
            pct_start=0.2,
            div_factor=10,
        )
        #: One entry per epoch: means over its steps, and the test accuracy after it.
        self.history: list[dict[str, float]] = []

    def _note_adjoint(self, solution: Solution) -> None:
        self.adjoint = solution

    def loss(self, model: torch.nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy of a batch."""
        return cross_entropy(model(x)[0], y)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Augmented training samples."""
        return self.task.augment(self.data.train_x[index], self.generator), self.data.train_y[index]

    def train_epoch(self, on_step: OnStep) -> None:
        """One pass over the training data; adds its means to the history.

        Arguments:
            on_step: called after each step with the means over the epoch so far.
        """
        start = time.perf_counter()
        self.model.train()
        totals: dict[str, float] = {}
        order = torch.randperm(len(self.data.train_x), generator=self.generator)
        for step, index in enumerate(order.split(self.config.batch_size)[: self.steps_per_epoch], start=1):
            for name, value in self._step(*self.batch(index)).items():
                totals[name] = totals.get(name, 0.0) + value
            on_step({name: total / step for name, total in totals.items()})
        means = {name: total / self.steps_per_epoch for name, total in totals.items()}
        self.history.append(
            {**means, "test_accuracy": self.evaluate().accuracy, "seconds": time.perf_counter() - start}
        )

    def _step(self, x: Tensor, y: Tensor) -> dict[str, float]:
        self.adjoint = None
        logits, solution = self.model(x)
        loss = cross_entropy(logits, y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        numbers = {"loss": loss.item(), "nfe": solution.nfe, "residual": float(solution.residual.max())}
        if self.adjoint is not None:  # a phantom gradient solves no adjoint system
            numbers |= {"vjps": self.adjoint.nfe, "adjoint_residual": float(self.adjoint.residual.max())}
        if not math.isfinite(numbers["loss"]):
            raise FloatingPointError(f"the loss is {numbers['loss']} in epoch {len(self.history) + 1}")
        return numbers

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        """The test set, in one batch."""
        self.model.eval()
        logits, solution = self.model(self.data.test_x)
        right = logits.argmax(dim=1) == self.data.test_y
        return Evaluation(accuracy=float(right.double().mean()), solution=solution)

    def state_dict(self) -> dict[str, Any]:
        """All that the next epoch depends on; tensors, numbers and strings only."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generator": self.generator.get_state(),
            "rng": torch.get_rng_state(),
            "history": self.history,
        }
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to where `state_dict` was taken."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["rng"])
        if "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        self.history = list(state["history"])
