"""Conjugate gradients for (I − L) u = b: CG where I − L is symmetric positive definite, CGNR for any L.

    α = ‖r‖² / ⟨p, A p⟩,   u ← u + α p,   r ← r − α A p,   p ← r + (‖r‖²_new / ‖r‖²) p,   A = I − L.

CGNR is this for the normal equations (Aᵀ A + η I) u = Aᵀ b, with the residual s = Aᵀ r − η u in the place of r.

Sources: Hestenes and Stiefel (1952), doi 10.6028/jres.049.044, sections 3 and 10. Liao et al. (2018), arXiv
1803.06396 (CG-RBP): for the adjoint system, A = I − Jᵀ, they multiply by I − J from the left and solve
((I − J)(I − Jᵀ) + η I) u = (I − J) g, which is CGNR and not CGNE. Departures: one recurrence per sample, all in one
batch. The call of L that records the graph of Lᵀ is made at the first residual, so that it is worth one step of
smallest residual before CGNR begins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from torchdeq._state import per_sample
from torchdeq.solver.affine import AffineSolver, dot, ratio
from torchdeq.solver.maps import Operator


class CGState(NamedTuple):
    """The iterate, its residual and the search direction."""

    probe: Tensor  # (B, D), the direction p
    u: Tensor  # (B, D)
    r: Tensor  # (B, D)
    rho: Tensor  # (B,), ‖r‖²
    norm: Tensor  # (B,), the largest ‖A p‖ / ‖p‖ so far, a lower estimate of ‖A‖


@dataclass(frozen=True, kw_only=True, repr=False)
class CG(AffineSolver):
    """Conjugate gradients, per sample, for a symmetric L with all eigenvalues below 1. Memory four states.

    Such an L comes from an f that is a step of gradient descent: J = I − τ H is symmetric, and I − J = τ H is positive
    definite at a minimum. CG is then the cheapest of all, and close to `GMRES` in products. A sample that meets a
    direction with ⟨p, A p⟩ ≤ 0 ends there as `STALLED`: I − L is not positive definite. That L is not
    symmetric cannot be seen from products; the residual tells. In both cases use `GMRES`, `BiCGSTAB` or `CGNR`.

    Example:
        >>> import torch
        >>> from torchdeq import AffineMap
        >>> a = torch.tensor([[0.5, 0.2], [0.2, -0.3]], dtype=torch.float64)
        >>> sol = CG(tol=1e-10).run(AffineMap(lambda u: u @ a, torch.ones(1, 2, dtype=torch.float64)))
        >>> [round(x, 6) for x in sol.z[0].tolist()], sol.nstep.item()
        ([2.459016, 1.147541], 2)
    """

    preconditionable: ClassVar[bool] = False
    symmetric_only: ClassVar[bool] = True

    def first(self, r: Tensor) -> CGState:
        """The first direction is the residual."""
        rho = dot(r, r)
        return CGState(r, torch.zeros_like(r), r, rho, torch.zeros_like(rho))

    def advance(self, ap: Tensor, state: CGState) -> tuple[CGState, Tensor]:
        """One step of CG; none, and no further direction, where ⟨p, A p⟩ is not positive."""
        p = state.probe
        curvature, square = dot(p, ap), dot(p, p)
        norm = _largest(state.norm, ap, p)
        positive = curvature > 10 * torch.finfo(p.dtype).eps * norm * square
        alpha = ratio(state.rho, curvature, positive)
        u = state.u + alpha[:, None] * p
        r = state.r - alpha[:, None] * ap
        rho = dot(r, r)
        beta = ratio(rho, state.rho, positive)
        p = torch.where(positive[:, None], r + beta[:, None] * p, 0.0)
        return CGState(p, u, r, rho, norm), per_sample(r)

    def correction(self, state: CGState, steps: Tensor) -> Tensor:
        """The iterate."""
        return state.u


class CGNRState(NamedTuple):
    """The iterate, its residual and the search direction, and which product is wanted next."""

    probe: Tensor  # (B, D), r for a product with Aᵀ, p for one with A
    u: Tensor  # (B, D)
    r: Tensor  # (B, D), b − A u
    p: Tensor  # (B, D), the direction
    gamma: Tensor  # (B,), ‖s‖² of the last s; inf before the first
    norm: Tensor  # (B,), the largest ‖A p‖ / ‖p‖ or ‖Aᵀ r‖ / ‖r‖ so far
    wants: Literal["A, recorded", "A", "Aᵀ"]


@dataclass(frozen=True, kw_only=True, repr=False)
class CGNR(AffineSolver):
    """CG on the normal equations, per sample, for any L. Two products per iteration; memory three states.

    Its residual never grows, and a singular or an indefinite I − L does no harm: the answer is the least-squares
    solution. But the condition of I − L is squared: where `GMRES` works it needs 3 to 9 times fewer products.

    It needs products with Lᵀ, which come from differentiating L; each counts as an evaluation. As the adjoint
    solver of `IFT` it differentiates Jᵀu, so f must be twice differentiable, and the graph takes the memory of a second
    backward pass.

    Arguments:
        eta: η ≥ 0, the weight of ‖u − u₀‖² in what is minimised, ‖b − A u‖² + η ‖u − u₀‖². Above 0 it bounds u where
            I − L is nearly singular, and biases it everywhere: the residual stays above about η ‖u − u₀‖ / ‖A‖, so
            a small `tol` is not reached and the sample ends as `STALLED`. CG-RBP has 1e-5.

    Example:
        >>> import torch
        >>> from torchdeq import AffineMap
        >>> a = torch.tensor([[0.0, 2.0], [-2.0, 0.0]], dtype=torch.float64)
        >>> sol = CGNR(tol=1e-10).run(AffineMap(lambda u: u @ a.T, torch.ones(1, 2, dtype=torch.float64)))
        >>> [round(x, 6) for x in sol.z[0].tolist()]
        [0.6, -0.2]
    """

    eta: float = 0.0

    #: In ‖b − A u‖² + η ‖u − u₀‖², which is not what the residual says.
    monotone: ClassVar[bool] = True
    preconditionable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            isinstance(self.eta, int | float) and self.eta >= 0,
            f"eta must be a number of at least 0, got {self.eta!r}",
        )

    def product(self, operator: Operator, state: CGNRState) -> Tensor:
        """A or Aᵀ at the probe."""
        if state.wants == "Aᵀ":
            return operator.transposed(state.probe)
        return operator(state.probe) if state.wants == "A" else operator.recorded(state.probe)

    def first(self, r: Tensor) -> CGNRState:
        """The first direction is the residual; it is not one of CG's."""
        none = r.new_zeros(r.shape[0])
        return CGNRState(r, torch.zeros_like(r), r, r, none + torch.inf, none, "A, recorded")

    def advance(self, ap: Tensor, state: CGNRState) -> tuple[CGNRState, Tensor]:
        """A step along p, or the next p; the latter leaves the residual as it was."""
        state = self._direction(ap, state) if state.wants == "Aᵀ" else self._step(ap, state)
        return state, torch.where(state.norm.isfinite(), per_sample(state.r), torch.nan)

    def _step(self, ap: Tensor, state: CGNRState) -> CGNRState:
        p = state.probe
        # ⟨A p, r⟩ − η ⟨p, u⟩ is ‖s‖² for a direction of CG, but this makes the objective fall along any p.
        descent = dot(ap, state.r) - self.eta * dot(p, state.u)
        square = dot(ap, ap) + self.eta * dot(p, p)
        alpha = ratio(descent, square, square > 0)
        u, r = state.u + alpha[:, None] * p, state.r - alpha[:, None] * ap
        return CGNRState(r, u, r, p, state.gamma, _largest(state.norm, ap, p), "Aᵀ")

    def _direction(self, atr: Tensor, state: CGNRState) -> CGNRState:
        s = atr - self.eta * state.u
        gamma = dot(s, s)
        p = s + (gamma / state.gamma)[:, None] * state.p
        norm = _largest(state.norm, atr, state.r)
        # Where Aᵀ r is zero to rounding, r is that of the least-squares solution.
        more = per_sample(s) > 10 * torch.finfo(s.dtype).eps * norm * per_sample(state.r)
        p = torch.where(more[:, None], p, 0.0)
        return CGNRState(p, state.u, state.r, p, gamma, norm, "A")

    def correction(self, state: CGNRState, steps: Tensor) -> Tensor:
        """The iterate."""
        return state.u


def _largest(norm: Tensor, ap: Tensor, p: Tensor) -> Tensor:
    """The larger of `norm` and ‖A p‖ / ‖p‖, (B,)."""
    size = per_sample(p)
    return torch.maximum(norm, ratio(per_sample(ap), size, size > 0))
