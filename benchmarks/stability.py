"""What keeps an equilibrium easy to solve while it trains: normalisation, regularisation, correction losses.

    python benchmarks/stability.py [--quick] [--seeds N] [--out benchmarks/results]

writes stability.md and stability.png. See README.md here for what is measured and how.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu
from tqdm import tqdm

from peers import Peers
from report import environment, grid, number
from torchdeq import Anderson, apply_norm, fp_correction, get_deq, reset_norm
from torchdeq.cli.tasks import Split, jitter, load_digits
from torchdeq.diagnostics import spectral_radius
from torchdeq.loss import deq_jac_loss, jac_reg
from torchdeq.solver import SolverStat

BUDGET = 16  # evaluations of f in a training step, at most
CAP = 200  # evaluations that are looked at when the trained models are compared
LEVEL = 1e-3  # relative residual
FEW = 4  # evaluations after which an answer in a hurry is asked for


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What is done to the block, or added to the loss.

    Arguments:
        name: for the table.
        norm: options of `apply_norm` on the block; None: none.
        n_states: states that the loss is asked for, by `fp_correction`.
        jac: weight of the Jacobian regularisation.
        every: the Jacobian regularisation is added in one step of so many.
    """

    name: str
    norm: Mapping[str, object] | None = None
    n_states: int = 1
    jac: float = 0.0
    every: int = 1


VARIANTS = (
    Variant(name="nothing"),
    Variant(name="weight norm", norm={"norm_type": "weight_norm"}),
    Variant(
        name="weight norm, rows of 0.7",
        norm={"norm_type": "weight_norm", "learn_scale": False, "target_norm": 0.7},
    ),
    Variant(name="spectral norm", norm={"norm_type": "spectral_norm"}),
    Variant(
        name="spectral norm of 0.7",
        norm={"norm_type": "spectral_norm", "learn_scale": False, "target_norm": 0.7},
    ),
    Variant(name="Jacobian 0.03", jac=0.03),
    Variant(name="Jacobian 0.3", jac=0.3),
    Variant(name="Jacobian 0.3, every 4th step", jac=0.3, every=4),
    Variant(name="correction, 3 states", n_states=3),
    Variant(name="correction and Jacobian 0.3", n_states=3, jac=0.3),
)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How much is asked of the equilibrium.

    Arguments:
        name: for the title.
        what: for the report.
        encoder: whether x̂ comes from two convolutions and a group normalisation, or from one convolution.
        pool: the head sees the mean of the state over so many by so many fields.
        lr: largest learning rate.
    """

    name: str
    what: str
    encoder: bool
    pool: int
    lr: float


SETTINGS = (
    Setting(
        name="With an encoder",
        what="x̂ comes from two convolutions and a group normalisation, and the head sees 4 × 4 fields. Little is "
        "asked of the equilibrium.",
        encoder=True,
        pool=4,
        lr=5e-3,
    ),
    Setting(
        name="Without an encoder",
        what="x̂ is one convolution of the image, the head sees 2 × 2 fields, and the learning rate is doubled. The "
        "block has to do the work, and training pushes its weights up.",
        encoder=False,
        pool=2,
        lr=1e-2,
    ),
)


class Digits(nn.Module):
    """The digits model of `torchdeq.zoo` with a free block: z = relu(W₂ relu(W₁ z + b₁) + b₂ + x̂), W convolutions."""

    def __init__(self, setting: Setting, variant: Variant, channels: int):
        super().__init__()
        self.calls = 0
        self.inject: nn.Module = nn.Conv2d(1, channels, 3, padding=1)
        if setting.encoder:
            second = nn.Conv2d(channels, channels, 3, padding=1)
            self.inject = nn.Sequential(self.inject, nn.ReLU(), second, nn.GroupNorm(4, channels))
        self.block = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(2 * channels, channels, 3, padding=1),
        )
        self.head = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.AdaptiveAvgPool2d(setting.pool),
            nn.Flatten(),
            nn.Linear(setting.pool**2 * channels, 10),
        )
        self.deq = get_deq(
            f_solver="anderson", f_max_iter=BUDGET, f_tol=LEVEL, f_stop_mode="rel",
            b_solver="gmres", b_max_iter=BUDGET, b_tol=1e-2, ift=True, n_states=variant.n_states,
        )  # fmt: skip
        if variant.norm is not None:
            apply_norm(self.block, **variant.norm)

    def f(self, x: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """The map of images x (B, 1, 8, 8), and where its solves begin."""
        x = self.inject(x)

        def f(z: Tensor) -> Tensor:
            self.calls += 1
            return relu(self.block(z) + x)

        return f, torch.zeros_like(x)


@dataclass
class Trained:
    """What was noted in training, by step: time, largest relative residual in the batch, evaluations and products."""

    seconds: list[float] = field(default_factory=list)
    residuals: list[float] = field(default_factory=list)
    work: list[float] = field(default_factory=list)


def train(
    setting: Setting, variant: Variant, data: Split, *, seed: int, channels: int, epochs: int
) -> tuple[Digits, Trained]:
    """A model, trained from this seed."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Digits(setting, variant, channels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.lr)
    steps = epochs * (len(data.train_x) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, setting.lr, total_steps=steps, pct_start=0.2)
    trained = Trained()
    for step in range(steps):
        index = torch.randint(len(data.train_x), (64,), generator=generator)
        x, y = jitter(data.train_x[index], generator), data.train_y[index]
        began = time.perf_counter()
        model.calls = 0
        reset_norm(model)
        f, z0 = model.f(x)
        adjoints: list[SolverStat] = []
        states, info = model.deq(f, z0, backward_writer=adjoints.append)
        loss = fp_correction(cross_entropy, ([model.head(z) for z in states], y))
        if variant.jac and step % variant.every == 0:
            loss = loss + variant.jac * deq_jac_loss(model.deq, f, states[-1])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        trained.seconds.append(time.perf_counter() - began)
        trained.residuals.append(float(info["rel_lowest"].max()))
        trained.work.append(model.calls + sum(float(adjoint["nfe"].max()) for adjoint in adjoints))
    return model, trained


#: What is measured on a trained model: the head of its column, and how its value is written.
COLUMNS: dict[str, Callable[[float], str]] = {
    "accuracy": "{:.4f}".format,
    f"after {FEW} evaluations": "{:.4f}".format,
    f"solved to {LEVEL:g} in {BUDGET}": "{:.0%}".format,
    "evaluations": number,
    "ρ(J)": "{:.2f}".format,
    "‖J‖²_F/n": "{:.3f}".format,
    "steps unsolved": "{:.0%}".format,
    "work a step": "{:.0f}".format,
    "ms a step": "{:.0f}".format,
}


def measure(model: Digits, trained: Trained, data: Split) -> tuple[list[float], list[float]]:
    """The numbers of `COLUMNS`, and the worst test sample's relative residual after each evaluation."""
    model.eval()
    f, z0 = model.f(data.test_x)

    def accuracy(z: Tensor) -> float:
        return float((model.head(z).argmax(dim=1) == data.test_y).double().mean())

    with torch.no_grad():
        within = model.deq(f, z0)[0][-1]
        few = model.deq(f, z0, solver_kwargs={"f_max_iter": FEW})[0][-1]
        far = Anderson(tol=LEVEL, stop_mode="rel", max_iter=CAP)(f, z0)
        tight = Anderson(tol=1e-5, stop_mode="rel", max_iter=CAP)(f, z0)
        first = data.test_x[:32]
        probe, zero = model.f(first)
        radius = spectral_radius(probe, Anderson(tol=1e-4, max_iter=CAP)(probe, zero).z)
    state = tight.z.clone().requires_grad_()
    size = jac_reg(f(state), state, vecs=4, create_graph=False)
    numbers = [
        accuracy(within),
        accuracy(few),
        float((far.converged & (far.nstep <= BUDGET)).double().mean()),
        float(far.nstep.double().quantile(0.95, interpolation="higher"))
        if bool(far.converged.double().mean() >= 0.95)
        else math.inf,
        float(radius.max()),
        float(size),
        sum(r > LEVEL for r in trained.residuals) / len(trained.residuals),
        statistics.mean(trained.work),
        1e3 * statistics.median(trained.seconds),
    ]
    return numbers, tight.trace.amax(dim=1).tolist()


def table(results: Mapping[str, list[list[float]]]) -> list[str]:
    """Medians over the seeds, and smallest and largest below them."""
    rows = []
    for name, by_seed in results.items():
        columns = list(zip(*by_seed, strict=True))
        shown = [
            f"{form(statistics.median(c))} ({form(min(c))}–{form(max(c))})"
            for form, c in zip(COLUMNS.values(), columns, strict=True)
        ]
        rows.append([name, *shown])
    return grid(["variant", *COLUMNS], rows)


@dataclass
class Drawn:
    """By variant, of the first seed: residuals by training step, and by evaluation of the trained model."""

    training: dict[str, list[float]] = field(default_factory=dict)
    solve: dict[str, list[float]] = field(default_factory=dict)


def plot(path: Path, drawn: Mapping[str, Drawn]) -> None:
    """A row for each setting: on the left the residual in training, on the right the solve of the trained model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(drawn), 2, figsize=(12, 4 * len(drawn)), sharex="col", layout="constrained"
    )
    for (left, right), (name, curves) in zip(axes, drawn.items(), strict=True):
        for i, variant in enumerate(curves.solve):
            style = {"color": f"C{i}", "ls": "-" if i < 5 else "--", "label": variant}
            residuals = curves.training[variant]
            width = max(1, len(residuals) // 40)
            steps = range(0, len(residuals), width)
            left.semilogy(steps, [statistics.median(residuals[k : k + width]) for k in steps], **style)
            right.semilogy(range(1, len(curves.solve[variant]) + 1), curves.solve[variant], **style)
        left.axhline(LEVEL, color="0.6", lw=0.8)
        left.set_ylabel("largest relative residual")
        left.set_title(f"{name}: training, at most {BUDGET} evaluations", fontsize=10)
        right.set_title(f"{name}: the trained models, worst test sample", fontsize=10)
        right.set(xlim=(0, 60), ylim=(1e-5, 10))
    axes[-1, 0].set_xlabel("training step")
    axes[-1, 1].set_xlabel("evaluations of f")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.legend(*axes[0, 1].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model: a test that it runs")
    parser.add_argument("--seeds", type=int, default=3, help="how many runs of each variant")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="where to write")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    where = environment(Peers([], [], {}, []))  # before the run, for the code that is loaded
    data = load_digits()
    seeds, channels, epochs = (1, 4, 1) if args.quick else (args.seeds, 24, 8)
    if args.quick:
        data = Split(data.train_x[:128], data.train_y[:128], data.test_x[:16], data.test_y[:16])
    runs = [(setting, seed, variant) for setting in SETTINGS for seed in range(seeds) for variant in VARIANTS]
    results: dict[str, dict[str, list[list[float]]]] = {setting.name: {} for setting in SETTINGS}
    drawn = {setting.name: Drawn() for setting in SETTINGS}
    for setting, seed, variant in tqdm(runs, desc="stability", leave=False):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what does not converge is counted
            model, trained = train(setting, variant, data, seed=seed, channels=channels, epochs=epochs)
            numbers, curve = measure(model, trained, data)
        results[setting.name].setdefault(variant.name, []).append(numbers)
        drawn[setting.name].solve.setdefault(variant.name, curve)
        drawn[setting.name].training.setdefault(variant.name, trained.residuals)
    lines = [
        "# What keeps an equilibrium easy to solve",
        "",
        "Written by `benchmarks/stability.py`; `benchmarks/README.md` says what is measured.",
        "",
        *where,
        f"- digits, {channels} channels, {epochs} epochs, {seeds} seeds: median (smallest–largest)",
        "",
        "![Residual in training, and of the trained models](stability.png)",
    ]
    for setting in SETTINGS:
        lines += ["", f"## {setting.name}", "", setting.what, "", *table(results[setting.name])]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "stability.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    plot(args.out / "stability.png", drawn)


if __name__ == "__main__":
    main()
