"""Does a solve end in the same state wherever it begins? The asymptotic alignment score, per sample.

    cos(z₁, z₂) = ⟨z₁, z₂⟩ / (‖z₁‖ ‖z₂‖),   z₁ solved from z0,   z₂ from the solution of another sample.

Source: Anil et al. (2022), arXiv 2211.09961, section 4: models in which the two agree make better use of more
iterations at test time. Departures: the distance is given beside the cosine, which does not see a difference in length;
and a sample that was not solved from both starts has no score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchdeq._held import hold
from torchdeq._replay import RandomState
from torchdeq._state import Layout, Tree, layout_of, per_sample
from torchdeq.solution import Solution
from torchdeq.solver import Multisecant, SolverLoop
from torchdeq.solver.base import flatten_map, unravel_solution
from torchdeq.solver.registry import as_solver


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PathIndependence:
    """What `path_independence` found. Prints as a line.

    Arguments:
        cosine: of the angle between the two solutions, per sample, (B,), float64; 1 if both are zero, 0 if one is.
        distance: ‖z₁ − z₂‖, relative to the longer of the two, (B,), float64.
        apart: how far the second start was from z₁, likewise, (B,). Where it is near 0 an agreement says nothing, and
            the line says so below 1e-3.
        solved: whether the sample converged from both starts, (B,), bool.
        first, second: the `Solution` from z0 and that from the other start.

    Example:
        >>> from torchdeq import FixedPointIteration
        >>> solver = FixedPointIteration(tol=1e-5)  # to +0.995 or −0.995 in each unknown
        >>> start = torch.tensor([[0.1, 0.1], [0.1, -0.1]])
        >>> path_independence(lambda z: torch.tanh(3 * z), start, solver=solver)
        alignment 0.0000 (least 0.0000), largest distance 1.4e+00, second start at least 1.4e+00 away, 7 + 1 evaluations
    """

    cosine: Tensor
    distance: Tensor
    apart: Tensor
    solved: Tensor
    first: Solution
    second: Solution

    @property
    def score(self) -> float:
        """The mean cosine of the samples that were solved from both starts; NaN if none was."""
        return float(self.cosine[self.solved].mean())

    def __str__(self) -> str:
        count, solved = len(self.solved), int(self.solved.sum())
        out = (
            ""
            if solved == count
            else f"; {count - solved} of {count} samples, not solved from both, left out"
        )
        least, farthest, nearest = (
            float(values[self.solved].sort(descending=largest).values[0]) if solved else math.nan
            for values, largest in ((self.cosine, False), (self.distance, True), (self.apart, False))
        )
        return (
            f"alignment {self.score:.4f} (least {least:.4f}), largest distance {farthest:.1e}, second start at least "
            f"{nearest:.1e} away, {self.first.nfe} + {self.second.nfe} evaluations{out}{self._untested()}"
        )

    def _untested(self) -> str:
        """Of samples whose second start was, to 0.1 %, the first solution: their agreement says nothing."""
        count, same = int(self.solved.sum()), int((self.solved & (self.apart < 1e-3)).sum())
        if not same:
            return ""
        which = (
            "nothing was tested: the second start is the first solution"
            if same == count
            else f"{same} of {count} samples were not tested: their second start is the first solution"
        )
        return f"; {which}. Give start='random', or a state like z0"

    __repr__ = __str__


#: Of a solver that is given by its name.
_SETTINGS: dict[str, Any] = {"tol": 1e-4, "stop_mode": "rel", "max_iter": 200}


@torch.no_grad()
def path_independence(
    f: Callable[[Tree], Tree],
    z0: Tree,
    *,
    solver: SolverLoop | str = Multisecant(tol=1e-4, stop_mode="rel", max_iter=200),  # noqa: B008 - frozen
    start: Tree | Literal["others", "random"] = "others",
    batch_dims: int = 1,
    modules: nn.Module | Sequence[nn.Module] | None = None,
    generator: torch.Generator | None = None,
) -> PathIndependence:
    """Solve z = f(z) twice, from z0 and from another start, and compare the solutions.

    It is a property of f and of the solver together: where there are several fixed points, a solver may find the same
    one from both. Both solves see the same f, buffers and random numbers, which are left as they were.

    Arguments:
        f: the map; see `torchdeq.DEQ`. It takes one argument, a tuple state too; for an f of several, as `get_deq`
            calls it, give `lambda z: f(*z)`.
        z0: the usual start, a tensor (B, …) or a pytree of such.
        solver: solves twice; give that of your model, with a tolerance well below the differences that matter. A
            name gets tol=1e-4, stop_mode="rel" and max_iter=200, as the default one has.
        start: the other start. 'others': the solution of the sample before it in the batch, and for the first that of
            the last. 'random': Gaussian numbers of the size of the sample's solution, or of the size 1 if that is zero.
            Or a state like z0.
        batch_dims: see `torchdeq.DEQ`.
        modules: see `torchdeq.DEQ`.
        generator: for 'random'; None for the global one.

    Returns:
        A `PathIndependence`. Samples that did not converge from both starts are marked, and are not in its `score`.

    Raises:
        ValueError: there is one sample only, and so no other's solution; or no start or solver of that name.
        TypeError: solver is neither a solver nor a name; or f takes the tensors of a tuple state as several arguments.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> layer, x = torch.nn.Linear(8, 8), torch.randn(4, 8)
        >>> found = path_independence(lambda z: torch.tanh(0.5 * layer(z) + x), torch.zeros(4, 8))
        >>> bool(found.solved.all()), bool((found.cosine > 0.9999).all()), bool((found.apart > 0.1).all())
        (True, True, True)
    """
    layout = layout_of(z0, batch_dims)
    device = layout.ravel(z0, source="z0").device
    if isinstance(start, str) and start not in ("others", "random"):
        raise ValueError(
            f"path_independence(start={start!r}): expected 'others', 'random', or a state like z0."
        )
    if isinstance(start, str) and start == "others" and layout.batch < 2:
        raise ValueError(
            f"path_independence: the state has {layout.batch} sample(s), so there is no solution of another sample to "
            f"begin at. Give start='random', or a state like z0."
        )
    solver = as_solver(solver, **_SETTINGS) if isinstance(solver, str) else solver
    if not isinstance(solver, SolverLoop):
        raise TypeError(
            f"path_independence(solver={solver!r}): expected a solver, such as Anderson(tol=1e-5), or the name of one."
        )
    stateful = (modules,) if isinstance(modules, nn.Module) else modules
    with RandomState.capture(device).again():
        flat = flatten_map(hold(f, stateful, noise=device), layout)
        first = solver.run(flat, layout.ravel(z0, source="z0"))
        other = _other_start(start, first.z, layout, generator)
        second = solver.run(flat, other)
    a, b, c = first.z.double(), second.z.double(), other.double()
    return PathIndependence(
        cosine=_cosine(a, b),
        distance=_distance(a, b),
        apart=_distance(a, c),
        solved=first.converged & second.converged,
        first=unravel_solution(first, layout),
        second=unravel_solution(second, layout),
    )


def _other_start(
    start: Tree | Literal["others", "random"], z: Tensor, layout: Layout, generator: torch.Generator | None
) -> Tensor:
    """Where the second solve begins, (B, D), from the solutions z (B, D) of the first."""
    if not isinstance(start, str):
        return layout.ravel(start, source="start")
    if start == "others":
        return z.roll(1, dims=0)
    noise = torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)
    unit, large = _rescaled(z)
    size = per_sample(unit) * large / max(z.shape[1], 1) ** 0.5
    return noise * torch.where(size > 0, size, 1.0)[:, None]


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Per sample, (B,), of (B, D) tensors."""
    (a, large_a), (b, large_b) = _rescaled(a), _rescaled(b)
    sizes = per_sample(a) * per_sample(b)
    cosine = ((a * b).sum(dim=1) / torch.where(sizes > 0, sizes, 1.0)).clamp(-1, 1)
    return torch.where((large_a == 0) & (large_b == 0), 1.0, cosine)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """‖a − b‖ relative to the longer, per sample, (B,)."""
    # Both are scaled before they are subtracted, or the difference of two large ones could overflow.
    a, b = _rescaled(torch.stack((a, b), dim=1).flatten(1))[0].unflatten(1, (2, a.shape[1])).unbind(dim=1)
    longer = torch.maximum(per_sample(a), per_sample(b))
    return per_sample(a - b) / torch.where(longer > 0, longer, 1.0)


def _rescaled(a: Tensor) -> tuple[Tensor, Tensor]:
    """a (B, D) with each sample's largest number scaled to 1, whose squares do not vanish; and what it was, (B,)."""
    large = a.abs().amax(dim=1) if a.shape[1] else a.new_zeros(len(a))
    return a / torch.where((large > 0) & large.isfinite(), large, 1.0)[:, None], large
