"""Phantom gradient, unrolled: k damped steps from the solved state, differentiated as they are.

    ẑ_{i+1} = τ f(ẑ_i) + (1 − τ) ẑ_i,   ẑ_0 = z*,   i < k.

At z* its parameter gradient is Bᵀ û with û = (I − M^k) u, M = (1 − τ) I + τ Jᵀ and u the exact adjoint. The bias is
‖û − u‖ ≤ ‖M‖^k ‖u‖. A start that is not z* adds a term of first order in its distance from z*; see
`torchdeq.grad.unroll`. `NeumannPhantom` gives the same at z*, with the graph of one call of f.

Source: Geng, Zhang, Bai, Wang and Lin (2021), arXiv 2111.05177 (the unrolled form, UPG). k = 1, τ = 1 is the one-step
gradient of Geng et al. (2021), arXiv 2109.04553, and JFB of Fung et al. (2022), arXiv 2103.12803.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from torchdeq._state import Map
from torchdeq.grad.base import GradMethod, OnBackward


@dataclass(frozen=True, kw_only=True, repr=False)
class PhantomGrad(GradMethod):
    """k damped steps from the solved state. No adjoint solve; memory and time of k calls of f.

    Bias at a fixed point: ‖û − u‖ ≤ ‖M‖^k ‖u‖ with M = (1 − τ) I + τ Jᵀ, where û stands for the exact adjoint u.

    Arguments:
        steps: k, at least 1.
        tau: the damping τ in (0, 2). On a strong contraction 1 is best; 0.5 to 0.7 helps where the spectrum
            of J reaches below −1.
        sup_gap: also return the states after every `sup_gap`-th step; −1 for none.
        sup_loc: also return the states after these steps, each within 1 … k.

    The final state is returned once, and last, whatever is sampled. The start is taken as it comes: `DEQ` gives it
    without a graph.

    Raises:
        ValueError: a value is out of range, or both `sup_gap` and `sup_loc` are given.

    Example:
        >>> import torch
        >>> f = lambda z: 0.5 * z + 1
        >>> [z.item() for z in PhantomGrad(steps=5, sup_gap=2).attach(f, torch.zeros(1, 1))]
        [1.5, 1.875, 1.9375]
    """

    steps: int = 1
    tau: float = 1.0
    sup_gap: int = -1
    sup_loc: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.require(
            isinstance(self.steps, int) and not isinstance(self.steps, bool) and self.steps >= 1,
            f"steps counts calls of f and must be an integer of at least 1, got {self.steps!r}",
        )
        self.require(0 < self.tau < 2, f"the damping tau must lie in (0, 2), got {self.tau!r}")
        self.require(
            self.sup_gap == -1 or self.sup_gap >= 1,
            f"sup_gap must be at least 1, or -1 for no sampling, got {self.sup_gap!r}",
        )
        self.require(
            all(1 <= at <= self.steps for at in self.sup_loc),
            f"sup_loc must lie within 1 … steps={self.steps}, got {list(self.sup_loc)}",
        )
        self.require(
            self.sup_gap == -1 or not self.sup_loc,
            "sup_gap and sup_loc both say which states to sample; give one of them",
        )

    def attach(self, f: Map, z: Tensor, *, on_backward: OnBackward | None = None) -> list[Tensor]:
        """See `GradMethod.attach`; there is no adjoint solve, so `on_backward` is not called."""
        states = []
        for step in range(1, self.steps + 1):
            fz = f(z)
            z = fz if self.tau == 1 else self.tau * fz + (1 - self.tau) * z
            sampled = step in self.sup_loc or (self.sup_gap > 0 and step % self.sup_gap == 0)
            if sampled or step == self.steps:
                states.append(z)
        return states
