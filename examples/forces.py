"""Learn a polarisable force field from forces alone: second derivatives through an equilibrium.

    python examples/forces.py [--steps N] [--configurations N] [--seed N]

Eight ions on the corners of a cube, shaken. Each carries a charge q_i = ±q and a dipole that the others induce:

    μ_i = m a_i / √(1 + |a_i|²),   a_i = α_i F_i / m,   F_i = E_i(x) + Σ_j T_ij(x) μ_j,   T_ij = ∇∇(1/s_ij).

E is the field of the charges, F the local field, α the polarisability, m the dipole at which an ion saturates. This is
a fixed point μ* = f(μ*, x, θ) for every geometry x. With w_i = 1/√(1 + |a_i|²) the energy is

    U(x) = Σ_{i<j} (q_i q_j / s_ij + B exp((r₀ − s_ij)/ρ)) + Σ_i (α_i |F_i|² w_i² / (1 + w_i) − μ*_i·(F_i + E_i) / 2).

The model is fitted to forces −∂U/∂x. A force is a derivative through the equilibrium, and the gradient of a loss of
forces is a second one. Vibrations come from the Hessian ∂²U/∂x².

The equilibrium is written in both forms there are, which give the same numbers:

- `Cluster` is a module with a `DEQ` and `IFT(order=2)`. f is a closure over whatever it needs. It learns here.
- `energy` is a pure function with `torchdeq.fixed_point`, for torch.func: `vmap` over geometries, `hessian`.

The last sum of U is the energy at the equilibrium and only there: as a function of free dipoles it is not stationary at
μ*, so forces do need dμ*/dx. `functional`, which is stationary, gives the same forces without it, as Hellmann and
Feynman say, and the program compares the two.

Source of the induced dipoles: Applequist, Carl and Fung (1972), doi 10.1021/ja00764a010. The saturation and the soft
distance s = √(r² + a²), which keeps dipoles from a catastrophe at short range, are choices of this example.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import grad, hessian, vmap
from tqdm import tqdm

from torchdeq import DEQ, GMRES, IFT, Multisecant, Solution, fixed_point

# Lengths in Å, charges in e, energies in e²/Å.
EV = 14.399645  # e²/Å in eV
WAVENUMBER = 521.4709  # of √(eV / (Å² u)), in 1/cm
SOFT, R0, RHO = 1.0, 2.5, 0.3  # a, r₀ and ρ, which are not learned
CORNERS = torch.cartesian_prod(*[torch.tensor([-0.5, 0.5], dtype=torch.float64)] * 3)  # (8, 3)
SIGN = 8 * CORNERS.prod(dim=1)  # (8,), +1 for cations and −1 for anions
KIND = (SIGN < 0).long()  # (8,), 0 for cations and 1 for anions
MASS = torch.tensor([22.99, 35.45], dtype=torch.float64)[KIND]  # (8,), of sodium and chlorine in u

SOLVER = Multisecant(tol=1e-12, stop_mode="rel", max_iter=100)
ADJOINT = GMRES(tol=1e-12, max_iter=100)


class Ions(NamedTuple):
    """What is learned, θ. Logarithms of what is positive."""

    charge: Tensor  # (), q
    log_alpha: Tensor  # (2,), of α of a cation and of an anion, in Å³
    log_most: Tensor  # (), of m, in eÅ
    log_repulsion: Tensor  # (), of B, in e²/Å

    @classmethod
    def make(cls, charge: float, alpha: Sequence[float], most: float, repulsion: float) -> Ions:
        def log(value: float | Sequence[float]) -> Tensor:
            return torch.tensor(value, dtype=torch.float64).log()

        return cls(torch.tensor(charge, dtype=torch.float64), log(alpha), log(most), log(repulsion))

    def values(self) -> list[float]:
        """q, α of both kinds, m and B."""
        logs = torch.cat([t.detach().reshape(-1) for t in self[1:]])
        return [self.charge.item(), *logs.exp().tolist()]


NAMES = ("charge q, e", "α of cations, Å³", "α of anions, Å³", "saturation m, eÅ", "repulsion B, e²/Å")
TRUE = Ions.make(1.0, (0.3, 3.0), 0.5, 0.08)
START = Ions.make(0.8, (1.0, 1.0), 1.5, 0.05)


# The physics -----------------------------------------------------------------------------------------------


class Surroundings(NamedTuple):
    """What the ions feel of each other in one geometry; leading dimensions are those of the geometry."""

    distance: Tensor  # (…, N, N), s
    field: Tensor  # (…, N, 3), E
    tensor: Tensor  # (…, N, N, 3, 3), T, zero for an ion with itself


def surroundings(x: Tensor, ions: Ions) -> Surroundings:
    """Of the positions x (…, N, 3)."""
    d = x[..., :, None, :] - x[..., None, :, :]  # (…, N, N, 3)
    s = (d.square().sum(dim=-1) + SOFT**2).sqrt()  # (…, N, N)
    one = torch.eye(len(SIGN), dtype=x.dtype, device=x.device)
    s3 = (1 - one) / s**3
    field = torch.einsum("...ij,...ijk,j->...ik", s3, d, ions.charge * SIGN.to(x))
    dd = d[..., :, None] * d[..., None, :] / s[..., None, None] ** 2
    tensor = s3[..., None, None] * (3 * dd - one[:3, :3])
    return Surroundings(s, field, tensor)


def local_field(mu: Tensor, around: Surroundings) -> Tensor:
    """F of the dipoles mu, (…, N, 3)."""
    return around.field + torch.einsum("...ijkl,...jl->...ik", around.tensor, mu)


def saturation(f: Tensor, ions: Ions) -> tuple[Tensor, Tensor]:
    """α and w in the local field f (…, N, 3): (N, 1) and (…, N, 1)."""
    alpha = ions.log_alpha.exp()[KIND, None]
    a = alpha * f / ions.log_most.exp()
    return alpha, (1 + a.square().sum(dim=-1, keepdim=True)).rsqrt()


def polarise(mu: Tensor, around: Surroundings, ions: Ions) -> Tensor:
    """The map f: the dipoles that the dipoles mu (…, N, 3) induce."""
    f = local_field(mu, around)
    alpha, w = saturation(f, ions)
    return alpha * f * w


def pairwise(around: Surroundings, ions: Ions) -> Tensor:
    """The energy of charges and repulsion, (…)."""
    s, q = around.distance, ions.charge * SIGN.to(around.distance)
    pairs = q[:, None] * q / s + ions.log_repulsion.exp() * ((R0 - s) / RHO).exp()
    return pairs.triu(1).sum(dim=(-2, -1))


def energy_at(mu: Tensor, around: Surroundings, ions: Ions) -> Tensor:
    """U (…) of the dipoles mu, which must be those of the equilibrium, (…, N, 3)."""
    f = local_field(mu, around)
    alpha, w = saturation(f, ions)
    stored = alpha * f.square() * w**2 / (1 + w)
    return pairwise(around, ions) + (stored - mu * (f + around.field) / 2).sum(dim=(-2, -1))


def functional(mu: Tensor, x: Tensor, ions: Ions) -> Tensor:
    """W (…), whose minimum over all dipoles mu (…, N, 3) is U. ∂W/∂mu = 0 there."""
    around = surroundings(x, ions)
    alpha, most = ions.log_alpha.exp()[KIND], ions.log_most.exp()
    w = (1 - mu.square().sum(dim=-1) / most**2).sqrt()  # of the field that would induce mu
    stored = most**2 / alpha * (1 - w)
    work = (mu * (around.field + local_field(mu, around))).sum(dim=-1) / 2
    return pairwise(around, ions) + (stored - work).sum(dim=-1)


# The equilibrium as a pure function -----------------------------------------------------------------------


def dipoles(x: Tensor, ions: Ions) -> Tensor:
    """μ* (N, 3) of one geometry x (N, 3)."""
    start = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    return fixed_point(polarise, start, surroundings(x, ions), ions, solver=SOLVER, adjoint=ADJOINT)


def energy(x: Tensor, ions: Ions) -> Tensor:
    """U () of one geometry x (N, 3), with derivatives of any order by x and θ."""
    return energy_at(dipoles(x, ions), surroundings(x, ions), ions)


def forces(x: Tensor, ions: Ions) -> Tensor:
    """−∂U/∂x of geometries x (C, N, 3), each solved by itself."""
    return -vmap(grad(energy), in_dims=(0, None))(x, ions)


def relax(x: Tensor, ions: Ions, steps: int = 20) -> Tensor:
    """The geometry (N, 3) without forces next to x, by Newton's method; the six rigid motions are left alone."""
    for _ in range(steps):
        h = hessian(energy)(x, ions).reshape(x.numel(), -1)
        step = torch.linalg.pinv(h, rtol=1e-6, hermitian=True) @ grad(energy)(x, ions).reshape(-1)
        x = x - step.reshape(x.shape)
        if step.abs().max() < 1e-10:
            break
    return x


def wavenumbers(x: Tensor, ions: Ions) -> Tensor:
    """Those of the vibrations at the relaxed geometry x (N, 3), in 1/cm, ascending (3N,); imaginary ones negative."""
    h = hessian(energy)(x, ions).reshape(x.numel(), -1)
    root = MASS.repeat_interleave(3).sqrt()
    values = torch.linalg.eigvalsh(EV * h / root / root[:, None])
    return WAVENUMBER * values.sign() * values.abs().sqrt()


# The equilibrium as a module --------------------------------------------------------------------------------


class Cluster(nn.Module):
    """The same model with parameters that learn.

    Arguments:
        ions: where to start.
    """

    def __init__(self, ions: Ions):
        super().__init__()
        self.theta = nn.ParameterDict({name: t.clone() for name, t in ions._asdict().items()})
        self.deq = DEQ(SOLVER, IFT(solver=ADJOINT, order=2))

    @property
    def ions(self) -> Ions:
        return Ions(**self.theta)

    def forward(self, x: Tensor) -> tuple[Tensor, Solution]:
        """U (C,) of geometries x (C, N, 3), and the `Solution` of the solve."""
        ions = self.ions
        around = surroundings(x, ions)  # once, not in every evaluation
        mu, solution = self.deq(lambda mu: polarise(mu, around, ions), torch.zeros_like(x))
        return energy_at(mu, around, ions), solution

    def forces(self, x: Tensor) -> tuple[Tensor, Solution]:
        """−∂U/∂x (C, N, 3), which can be differentiated once more, and the `Solution`."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            u, solution = self(x)
            (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return -du, solution


# The program ------------------------------------------------------------------------------------------------


def shaken(count: int, generator: torch.Generator) -> Tensor:
    """Cubes of edge 2.5 Å, give or take 6 %, each coordinate moved by 0.15 Å or so: (count, 8, 3)."""
    edge = R0 * (1 + 0.06 * torch.randn(count, 1, 1, dtype=torch.float64, generator=generator))
    moved = 0.15 * torch.randn(count, *CORNERS.shape, dtype=torch.float64, generator=generator)
    return edge * CORNERS + moved


def rms(error: Tensor) -> float:
    return error.detach().square().mean().sqrt().item()


def fit(model: Cluster, x: Tensor, wanted: Tensor, steps: int) -> list[float]:
    """Fit forces of x (C, N, 3) to those wanted; the rms error at each evaluation of the loss, in eV/Å."""
    # The loss is in (meV/Å)²: L-BFGS in torch learns nothing from steps along which it changes by less than 1e-10.
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=steps,
        tolerance_grad=1e-7,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )
    history = []
    with tqdm(unit=" losses", mininterval=0.5) as bar:

        def closure() -> Tensor:
            found, solution = model.forces(x)
            loss = (1e3 * EV * (found - wanted)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            history.append(loss.item() ** 0.5 / 1e3)
            bar.set_postfix_str(
                f"force error {history[-1]:.1e} eV/Å, {solution.nfe} evaluations", refresh=False
            )
            bar.update()
            return loss

        if steps:
            optimizer.step(closure)
    return history


def table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[float]]], form: str) -> str:
    lines = [f"{'':22}" + "".join(f"{name:>12}" for name in head)] if head else []
    return "\n".join(
        lines + [f"{name:22}" + "".join(f"{v:12{form}}" for v in values) for name, values in rows]
    )


def agreement(model: Cluster, x: Tensor) -> tuple[float, float]:
    """Relative differences of the module's forces: from the pure function's, and from Hellmann and Feynman's."""
    ions = Ions(*(t.detach() for t in model.ions))
    module, pure = model.forces(x)[0].detach(), forces(x, ions)
    mu = vmap(dipoles, in_dims=(0, None))(x, ions)
    fixed = -vmap(grad(functional, argnums=1), in_dims=(0, 0, None))(mu, x, ions)
    return tuple(((module - other).norm() / module.norm()).item() for other in (pure, fixed))


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Returns the rms error of the forces fitted to, at each evaluation of the loss, in eV/Å."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100, help="of L-BFGS, at most (default: 100)")
    parser.add_argument(
        "--configurations", type=int, default=16, help="geometries to learn from (default: 16)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the geometries (default: 0)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # the tensors are small: more threads only wait for each other

    generator = torch.Generator().manual_seed(args.seed)
    train, test = shaken(args.configurations, generator), shaken(16, generator)
    wanted, unseen = forces(train, TRUE), forces(test, TRUE)
    model = Cluster(START)
    before = rms(model.forces(test)[0] - unseen)
    history = fit(model, train, wanted, args.steps)
    after = rms(model.forces(test)[0] - unseen)
    learned = Ions(*(t.detach() for t in model.ions))

    columns = (TRUE, START, learned)
    print("\nParameters, learned from forces alone")
    values = zip(*(ions.values() for ions in columns), strict=True)
    print(table(("true", "start", "learned"), list(zip(NAMES, values, strict=True)), ".4f"))

    print(
        f"\nForces of 16 geometries that were not in the fit, rms of the true ones {EV * rms(unseen):.3f} eV/Å"
    )
    print(table(("start", "learned"), [("rms error, eV/Å", (EV * before, EV * after))], ".1e"))

    print("\nVibrations of the relaxed cube, from the Hessian through the equilibrium, in 1/cm")
    modes = [wavenumbers(relax(R0 * CORNERS, ions), ions) for ions in columns]
    modes = [m[m.abs().argsort()] for m in modes]  # the six rigid motions first
    rows = [
        ("lowest", [m[6:].min().item() for m in modes]),
        ("median", [m[6:].median().item() for m in modes]),
        ("highest", [m[6:].max().item() for m in modes]),
        ("six rigid motions, ≤", [m[:6].abs().max().item() for m in modes]),
    ]
    print(table(("true", "start", "learned"), rows, ".3f"))

    pure, fixed = agreement(model, test)
    print("\nForces of the module, relative difference")
    print(table((), [("from fixed_point", [pure]), ("Hellmann–Feynman", [fixed])], ".1e"))
    print(
        "\nMade smaller or artificial: eight ions in vacuum and five parameters; reference forces from the same\n"
        "model, without noise, where in practice they come from quantum chemistry; one soft distance for all pairs;\n"
        "the masses are those of sodium and chlorine, the other numbers are of the right size but not fitted to them."
    )
    return history


if __name__ == "__main__":
    main()
