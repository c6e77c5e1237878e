"""`torchdeq train TASK`: train a model, evaluate it, and leave a folder with what came of it."""

from __future__ import annotations

import argparse
import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchdeq import DEQ, ConvergenceWarning, FixedPointIteration, as_solver
from torchdeq.cli import works
from torchdeq.cli.config import TrainConfig, add_options
from torchdeq.cli.errors import UsageError, need
from torchdeq.cli.folder import METRICS, PLOT, TABLE, RunFolder
from torchdeq.cli.loop import Run
from torchdeq.cli.plot import plot_run
from torchdeq.cli.progress import ProgressBar
from torchdeq.cli.tasks import TASKS
from torchdeq.diagnostics import Candidate, Comparison, compare_gradients, default_candidates

#: The gradient methods of the table; `compare_gradients` has more.
COMPARED = ("IFT", "IFT, hook", "JFB", "phantom, 5 steps", "unrolled")
NEEDED = ("sklearn.datasets", "tqdm", "safetensors.torch", "matplotlib.figure")


def add_to(subparsers: Any) -> None:
    """Add the parser of `torchdeq train`, with one subcommand per task."""
    train = subparsers.add_parser("train", help="train a small equilibrium model", description=__doc__)
    tasks = train.add_subparsers(title="tasks", metavar="TASK", required=True)
    for name, task in TASKS.items():
        parser = tasks.add_parser(
            name,
            help=task.summary,
            description=f"Train {task.summary}.",
            usage=f"torchdeq train {name} [OPTION ...]",
        )
        add_options(parser)
        group = parser.add_argument_group("where")
        group.add_argument(
            "--out", type=Path, help=f"folder of the run (default: runs/{name}-1, runs/{name}-2, …)"
        )
        group.add_argument(
            "--resume",
            action="store_true",
            help="continue the run in --out, or the newest in runs/, after its last finished epoch",
        )
        group.add_argument(
            "--overwrite", action="store_true", help="start over in --out, although it holds a run"
        )
        parser.set_defaults(run=run, task=name)
    works.add_to(tasks)


def run(args: argparse.Namespace) -> int:
    """Carry out `torchdeq train TASK` and return its exit code."""
    given = {name: value for name, value in vars(args).items() if name in TrainConfig.__dataclass_fields__}
    for module in NEEDED:  # rather now than after training
        need(module)
    if args.resume and args.overwrite:
        raise UsageError("--resume continues a run and --overwrite deletes it; give one of them.")
    if args.overwrite and args.out is None:
        raise UsageError("--overwrite needs --out; without it every run gets a new folder anyway.")
    folder = RunFolder(args.out) if args.out else RunFolder.numbered(args.task, newest=args.resume)
    config = folder.config(args.task, given) if args.resume else TrainConfig.from_options(given)
    with cpu_threads(config.threads):
        training = Run(TASKS[args.task], config)
        if not args.resume:
            folder.start(args.task, config, overwrite=args.overwrite)
        elif (state := folder.load()) is not None:
            training.load_state_dict(state)
        describe(training, folder)
        try:
            train(training, folder)
        except KeyboardInterrupt:
            print(f"\nInterrupted. Continue with: torchdeq train {args.task} --resume --out {folder.path}")
            return 130
        report(training, folder)
    return 0


@contextlib.contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """So many threads for one operation of torch, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def describe(training: Run, folder: RunFolder) -> None:
    """Say what is about to happen."""
    size = sum(p.numel() for p in training.model.parameters())
    print(
        f"{training.task.summary}: {len(training.data.train_x)} to train on, {len(training.data.test_x)} held out"
    )
    print(f"{type(training.model).__name__}, {size} parameters, {training.config.deq()}")
    if training.history:
        print(f"resuming {folder.path} after epoch {len(training.history)} of {training.config.epochs}")


def train(training: Run, folder: RunFolder) -> None:
    """The epochs that are left, each followed by a checkpoint."""
    epochs, done = training.config.epochs, len(training.history)
    with ProgressBar(epochs=epochs, steps=training.steps_per_epoch, done=done) as bar:
        for _ in range(done, epochs):
            training.train_epoch(bar.step)
            folder.save(training.state_dict())
            bar.end_epoch(training.history[-1]["test_accuracy"])


def report(training: Run, folder: RunFolder) -> None:
    """Evaluate the trained model, compare gradient methods on it, and write and print what came of it."""
    config, history = training.config, training.history
    evaluation = training.evaluate()
    solution = evaluation.solution
    table = gradients(training)
    metrics = {
        "test_accuracy": evaluation.accuracy,
        "test_samples": solution.status.numel(),
        "converged": evaluation.converged,
        "eval_tol": config.eval_tol,
        "largest_residual": float(solution.residual.max()),
        "evaluations": solution.nfe,
        "train_seconds": sum(h["seconds"] for h in history),
        "epochs": history,
    }
    folder.write_text(METRICS, json.dumps(metrics, indent=2) + "\n")
    folder.write_text(TABLE, table.to_markdown() + "\n")
    title = f"{type(training.model).__name__}: test accuracy {evaluation.accuracy:.4f} at equilibrium"
    folder.write(
        PLOT,
        lambda path: plot_run(
            path,
            title=title,
            history=history,
            traces=traces(training, max(10, 2 * solution.nfe)),
            tol=config.eval_tol,
        ),
    )
    print(f"\n{table}\n")
    print(f"trained for {metrics['train_seconds']:.1f} s; {folder.path}/ holds {', '.join(folder.files())}")
    print(
        f"converged {evaluation.converged} of {solution.status.numel()} test samples to relative "
        f"{config.eval_tol:.0e} (largest residual {metrics['largest_residual']:.1e}, {solution.nfe} evaluations)"
    )
    print(f"test accuracy {evaluation.accuracy:.4f}")


def gradients(training: Run, tol: float = 1e-5) -> Comparison:
    """The run's own gradient on a batch of its training data, and all methods where every solve goes to `tol`.

    At the tolerances of training, the residual of the forward solve would hide what the methods themselves err.
    """
    config = training.config
    adjoint = as_solver(
        config.adjoint_solver or "gmres", tol=tol, max_iter=config.adjoint_max_iter or 40, stop_mode="rel"
    )
    candidates = [
        Candidate(name="as trained", grad=config.grad_method(), solver=config.forward_solver()),
        *(c for c in default_candidates(config.forward_solver(tol), adjoint) if c.name in COMPARED),
    ]
    x, y = training.batch(torch.arange(min(64, config.batch_size)))
    training.model.train()
    with equilibrium_layer(training.model, DEQ(config.forward_solver(tol))):
        return compare_gradients(training.model, training.loss, x, y, candidates=candidates, repeats=5)


@torch.no_grad()
def traces(training: Run, evaluations: int) -> dict[str, Tensor]:
    """The test set's relative residuals at each evaluation, (N, B), by solver: the run's own, and Picard iteration."""
    own = training.config.forward_solver(0.0).replace(max_iter=evaluations)
    picard = FixedPointIteration(tol=0.0, stop_mode="rel", max_iter=evaluations)
    found: dict[str, Tensor] = {}
    for solver in (own, picard):
        with equilibrium_layer(training.model, DEQ(solver)), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # tol=0 asks for all evaluations
            trace = training.evaluate().solution.rel_trace
        if len(trace) > 1:  # not every solver looks at residuals on its way
            found.setdefault(type(solver).__name__, trace.cpu())
    return found


@contextlib.contextmanager
def equilibrium_layer(model: Any, deq: DEQ) -> Iterator[None]:
    """The model with another equilibrium layer, for a while."""
    own, model.deq = model.deq, deq.train(model.training)
    try:
        yield
    finally:
        model.deq = own
