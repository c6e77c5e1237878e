"""Do other libraries give the same forces, and the same gradient of a loss of forces, as examples/forces.py?

    python benchmarks/forces_peer.py [--quick] [--out benchmarks/results] [--peers PATH ...]

writes forces.md. See README.md here for what is compared and how.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from tqdm import tqdm

from peers import Method, Peers
from report import environment, grid

sys.path.append(str(Path(__file__).parent.parent / "examples"))
import forces as model

STEPS = 80  # of plain iteration for the yardstick; J's spectral radius is below .5 here, and .5^80 is 1e-24
TOL = 1e-12
Energies = Callable[[Tensor, model.Ions], Tensor]  # geometries (C, N, 3) and θ -> (C,)


class Answers(NamedTuple):
    """What is compared; a string says why there is no number."""

    energy: Tensor | str  # (C,)
    forces: Tensor | str  # (C, N, 3)
    gradient: Tensor | str  # of the mean squared force error, by θ
    reverse: Tensor | str  # the Hessian of the first geometry, reverse over reverse
    forward: Tensor | str  # and forward over reverse


@dataclass(frozen=True)
class Case:
    """Geometries x (C, N, 3), the forces wanted there, and parameters that do not give them."""

    x: Tensor
    wanted: Tensor
    ions: model.Ions

    @classmethod
    def make(cls, count: int) -> Case:
        x = model.shaken(count, torch.Generator().manual_seed(0))
        return cls(x, model.forces(x, model.TRUE), model.Ions.make(0.9, (0.5, 2.0), 0.8, 0.07))


def answers(only: Sequence[str], **runs: Callable[[], Tensor]) -> Answers:
    """What each of the `runs` returns, or the first words of why it does not; of those in `only`."""

    def attempt(run: Callable[[], Tensor]) -> Tensor | str:
        try:
            return run().detach()
        except (TypeError, ValueError, RuntimeError) as error:  # the ways of libraries to refuse a derivative
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"

    return Answers(**{name: attempt(run) if name in only else "not asked" for name, run in runs.items()})


# In torch ---------------------------------------------------------------------------------------------------


def torch_answers(case: Case, only: Sequence[str] = Answers._fields, *, energies: Energies) -> Answers:
    """With plain autograd."""
    x = case.x.clone().requires_grad_()
    ions = model.Ions(*(t.clone().requires_grad_() for t in case.ions))
    energy = energies(x, ions)
    (du,) = torch.autograd.grad(energy.sum(), x, create_graph=True)

    def gradient() -> Tensor:
        grads = torch.autograd.grad((-du - case.wanted).square().mean(), list(ions), retain_graph=True)
        return torch.cat([g.reshape(-1) for g in grads])

    def reverse() -> Tensor:
        rows = [torch.autograd.grad(g, x, retain_graph=True)[0][0].reshape(-1) for g in du[0].reshape(-1)]
        return torch.stack(rows)

    def tangents() -> Tensor:
        first, columns = x[:1].detach().requires_grad_(), []
        for v in torch.eye(first.numel(), dtype=x.dtype):
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(first, v.reshape(first.shape))
                (g,) = torch.autograd.grad(energies(dual, case.ions).sum(), dual, create_graph=True)
                columns.append(forward_ad.unpack_dual(g).tangent.reshape(-1))
        return torch.stack(columns, dim=1)

    return answers(
        only, energy=lambda: energy, forces=lambda: -du, gradient=gradient, reverse=reverse, forward=tangents
    )


def unrolled(x: Tensor, ions: model.Ions) -> Tensor:
    """The yardstick: no library, plain iteration through which autograd runs."""
    around = model.surroundings(x, ions)
    mu = torch.zeros_like(x)
    for _ in range(STEPS):
        mu = model.polarise(mu, around, ions)
    return model.energy_at(mu, around, ions)


def with_xitorch(x: Tensor, ions: model.Ions, **options: Any) -> Tensor:
    from xitorch.optimize import equilibrium

    around = model.surroundings(x, ions)

    def f(mu: Tensor, distance: Tensor, field: Tensor, tensor: Tensor, *theta: Tensor) -> Tensor:
        return model.polarise(mu, model.Surroundings(distance, field, tensor), model.Ions(*theta))

    mu = equilibrium(f, torch.zeros_like(x), params=(*around, *ions), **options)
    return model.energy_at(mu, around, ions)


def deq_energies(x: Tensor, ions: model.Ions) -> Tensor:
    around = model.surroundings(x, ions)
    deq = model.DEQ(model.SOLVER, model.IFT(solver=model.ADJOINT, order=2))
    mu, _ = deq(lambda mu: model.polarise(mu, around, ions), torch.zeros_like(x))
    return model.energy_at(mu, around, ions)


def pure_answers(case: Case, only: Sequence[str] = Answers._fields) -> Answers:
    """With torch.func, and `fixed_point`."""
    func, size = torch.func, case.x[0].numel()

    def loss(ions: model.Ions) -> Tensor:
        return (model.forces(case.x, ions) - case.wanted).square().mean()

    return answers(
        only,
        energy=lambda: func.vmap(model.energy, in_dims=(0, None))(case.x, case.ions),
        forces=lambda: model.forces(case.x, case.ions),
        gradient=lambda: torch.cat([g.reshape(-1) for g in func.grad(loss)(case.ions)]),
        reverse=lambda: func.jacrev(func.jacrev(model.energy))(case.x[0], case.ions).reshape(size, size),
        forward=lambda: func.hessian(model.energy)(case.x[0], case.ions).reshape(size, size),
    )


# In jax -----------------------------------------------------------------------------------------------------


def jaxopt_answers(
    case: Case,
    only: Sequence[str] = Answers._fields,
    *,
    solver: str,
    options: dict[str, Any],
    linear: str | None,
) -> Answers:
    """The same model, written again in jax."""
    import jax
    import jax.numpy as jnp
    import jaxopt
    from jaxopt import linear_solve

    jax.config.update("jax_enable_x64", True)
    sign, kind = jnp.asarray(model.SIGN.numpy()), jnp.asarray(model.KIND.numpy())
    other = 1 - jnp.eye(len(sign))

    def around(x, theta):
        d = x[:, None, :] - x[None, :, :]
        s = jnp.sqrt((d**2).sum(-1) + model.SOFT**2)
        e = jnp.einsum("ij,ijk,j->ik", other / s**3, d, theta[0] * sign)
        t = (
            3 * d[..., :, None] * d[..., None, :] / s[..., None, None] ** 5
            - jnp.eye(3) / s[..., None, None] ** 3
        )
        return s, e, other[..., None, None] * t

    def local(mu, e, t):
        return e + jnp.einsum("ijkl,jl->ik", t, mu)

    def shrink(f, theta):
        alpha = jnp.exp(theta[1])[kind, None]
        return alpha, 1 / jnp.sqrt(1 + ((alpha * f / jnp.exp(theta[2])) ** 2).sum(-1, keepdims=True))

    def polarise(mu, e, t, theta):
        f = local(mu, e, t)
        alpha, w = shrink(f, theta)
        return alpha * f * w

    if linear is not None:
        solve = functools.partial(getattr(linear_solve, linear), tol=TOL)
        options = {**options, "implicit_diff_solve": solve}
    iteration = getattr(jaxopt, solver)(polarise, **options)

    def energy(x, theta):
        s, e, t = around(x, theta)
        mu = iteration.run(jnp.zeros_like(x), e, t, theta).params
        f = local(mu, e, t)
        alpha, w = shrink(f, theta)
        q = theta[0] * sign
        pairs = q[:, None] * q / s + jnp.exp(theta[3]) * jnp.exp((model.R0 - s) / model.RHO)
        stored = alpha * f**2 * w**2 / (1 + w)
        return jnp.triu(pairs, 1).sum() + (stored - mu * (f + e) / 2).sum()

    xs, wanted = jnp.asarray(case.x.numpy()), jnp.asarray(case.wanted.numpy())
    theta = tuple(jnp.asarray(t.numpy()) for t in case.ions)
    size = case.x[0].numel()

    def forces(theta):
        return -jax.vmap(jax.grad(energy), in_axes=(0, None))(xs, theta)

    def back(value) -> Tensor:
        return torch.tensor(jax.device_get(value).tolist(), dtype=torch.float64)

    def gradient() -> Tensor:
        grads = jax.jit(jax.grad(lambda theta: ((forces(theta) - wanted) ** 2).mean()))(theta)
        return torch.cat([back(g).reshape(-1) for g in grads])

    return answers(
        only,
        energy=lambda: back(jax.jit(jax.vmap(energy, in_axes=(0, None)))(xs, theta)),
        forces=lambda: back(jax.jit(forces)(theta)),
        gradient=gradient,
        reverse=lambda: back(jax.jit(jax.jacrev(jax.jacrev(energy)))(xs[0], theta)).reshape(size, size),
        forward=lambda: back(jax.jit(jax.jacfwd(jax.jacrev(energy)))(xs[0], theta)).reshape(size, size),
    )


# The table --------------------------------------------------------------------------------------------------


def ours() -> list[Method]:
    return [
        Method(
            "DEQ, IFT(order=2)",
            f"solver {model.SOLVER!r}, adjoint {model.ADJOINT!r}",
            "ours",
            functools.partial(torch_answers, energies=deq_energies),
        ),
        Method("fixed_point", "the same, under `torch.func`", "ours", pure_answers),
    ]


def peers() -> tuple[list[Method], dict[str, str], list[str]]:
    """Methods of the other libraries that are installed, their versions, and what is missing."""
    methods, versions, missing = [], {}, []
    for name, load in {"jaxopt": jaxopt_methods, "xitorch": xitorch_methods}.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # jaxopt's, that it is no longer maintained
                importlib.import_module(name)
        except ImportError as error:
            missing.append(f"{name}: skipped, {error}")
            continue
        methods += load()
        for package in (name, *(["jax"] if name == "jaxopt" else [])):
            versions[package] = importlib.metadata.version(package)
    return methods, versions, missing


def jaxopt_methods() -> list[Method]:
    def method(solver: str, group: str, linear: str | None = None, **options: Any) -> Method:
        given = {**options, **({"implicit_diff_solve": f"{linear}, tol={TOL:g}"} if linear else {})}
        setting = ", ".join(f"{k}={v}" for k, v in given.items())
        run = functools.partial(jaxopt_answers, solver=solver, options=options, linear=linear)
        return Method(f"jaxopt {solver}", f"`{solver}({setting})`", group, run)

    tight = {"tol": TOL, "maxiter": 200}
    return [
        method("FixedPointIteration", "as shipped"),
        method("AndersonAcceleration", "as shipped"),
        method("FixedPointIteration", "tuned", "solve_normal_cg", **tight),
        method("FixedPointIteration", "tuned", "solve_gmres", **tight),
        method("AndersonAcceleration", "tuned", "solve_normal_cg", **tight),
        method("FixedPointIteration", "tuned", implicit_diff=False, tol=0.0, maxiter=STEPS),
    ]


def xitorch_methods() -> list[Method]:
    def method(group: str, **options: Any) -> Method:
        setting = ", ".join(f"{k}={v}" for k, v in options.items())
        run = functools.partial(torch_answers, energies=functools.partial(with_xitorch, **options))
        return Method("xitorch equilibrium", f"`equilibrium({setting})`", group, run)

    tight = {"f_tol": TOL, "x_tol": TOL, "maxiter": 200}
    return [
        method("as shipped"),
        method("tuned", **tight, bck_options={"method": "gmres", "rtol": TOL, "atol": TOL / 10}),
        method("tuned", **tight, bck_options={"method": "exactsolve"}),
    ]


def cells(reference: Answers, found: Answers, notes: list[str]) -> list[str]:
    """Relative differences; a reason becomes the number of a note."""
    row = []
    for expected, got in zip(reference, found, strict=True):
        if isinstance(got, str):
            if got not in notes:
                notes.append(got)
            row.append(f"error ({notes.index(got) + 1})")
        else:
            row.append(f"{((got - expected).norm() / expected.norm()).item():.1e}")
    return row


def run(case: Case, methods: Sequence[Method]) -> tuple[dict[Method, list[str]], list[str]]:
    """For each method its row, and the notes."""
    reference = torch_answers(case, Answers._fields[:4], energies=unrolled)
    reference = reference._replace(forward=reference.reverse)
    rows: dict[Method, list[str]] = {}
    notes: list[str] = []
    with tqdm(methods, unit="method") as bar, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peers that do not converge, which the table shows
        for method in bar:
            bar.set_postfix_str(method.name)
            rows[method] = cells(reference, method.run(case), notes)
    return rows, notes


def write_report(
    path: Path, case: Case, rows: dict[Method, list[str]], notes: Sequence[str], circumstances: Sequence[str]
) -> None:
    head = ["", "setting", "energy", "forces", "gradient of the loss", "Hessian, rev-rev", "Hessian, fwd-rev"]
    lines = [
        "# Forces through an equilibrium, ours and other libraries'",
        "",
        "Written by `benchmarks/forces_peer.py`; `benchmarks/README.md` says what is compared.",
        "",
        *circumstances,
        "",
        f"Relative differences, in the Euclidean norm, from automatic differentiation of {STEPS} plain iterations. "
        f"{len(case.x)} geometries of eight ions, float64.",
        "",
        *grid(head, [[f"{m.name}, {m.group}", str(i + 1), *row] for i, (m, row) in enumerate(rows.items())]),
        "",
        "Settings:",
        "",
        *(f"{i + 1}. {method.setting}" for i, method in enumerate(rows)),
        "",
        *(["Errors:", "", *(f"{i + 1}. {note}" for i, note in enumerate(notes))] if notes else []),
    ]
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one geometry, no peers: a test that it runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="where to write")
    parser.add_argument(
        "--peers",
        type=Path,
        nargs="+",
        default=[],
        metavar="PATH",
        help="folders in which peers are installed",
    )
    args = parser.parse_args(argv)
    sys.path[:0] = [str(path) for path in args.peers]
    torch.set_num_threads(1)
    methods, versions, missing = ([], {}, ["all: --quick"]) if args.quick else peers()
    circumstances = environment(Peers([], [], versions, missing))
    case = Case.make(1 if args.quick else 4)
    rows, notes = run(case, ours() + methods)
    args.out.mkdir(parents=True, exist_ok=True)
    write_report(args.out / "forces.md", case, rows, notes, circumstances)


if __name__ == "__main__":
    main()
