"""A layer whose equilibrium exists, is unique, and is reached however large its weights are.

    W = (1 − m) I − AᵀA + B − Bᵀ   ⇒   ½ ((I − W) + (I − W)ᵀ) = m I + AᵀA ⪰ m I.

Every W with that property is of this form. Source: Winston and Kolter (2020), arXiv 2006.08591, proposition 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchdeq.solver.monotone import MonotoneMap
from torchdeq.solver.prox import Prox


class MonotoneLinear(nn.Module):
    """The linear part of a monotone equilibrium: W z, with W = (1 − m) I − AᵀA + B − Bᵀ, without a bias.

    Any A and B will do, so an optimiser needs no projection. In floating point that holds while ε ‖A‖² ≪ m, ε that of
    the dtype of A: in bfloat16, with n=64 and m=0.1, rounding left 0.056 of m where ‖A‖ was 11, and −0.05 at 22;
    `MonotoneMap.modulus` tells. `map(x)` is the whole map σ(W z + x), which
    `PeacemanRachford` and `ForwardBackward` solve, and any other solver where it can. A convolution is not among what
    this layer does.

    `PeacemanRachford` is the safe solver for it, not always the fastest. For n=24, m=0.1 and 64 samples at tol=1e-4
    it needed 61, 61, 73 and 89 evaluations at ‖W‖ of about 1.7, 2.7, 9 and 19 (the median of five draws of the layer),
    and `Multisecant` 31, 28, 64 and 197. Both solved all samples; `Anderson` did up to 2.7, in 48. `ForwardBackward`
    with its default step needed 1183 and 2541 at the first two.

    Arguments:
        features: n, the size of the last dimension of the state.
        m: m > 0, how far I − W is from having a symmetric part that is singular. The equilibrium is Lipschitz in x with
            the constant 1/m, and the smaller m, the more iterations it takes. 0.1 is in the middle of the paper's.
        activation: σ; see `MonotoneMap`.
        device, dtype: of A and B, (n, n) each, drawn as the weight of a `torch.nn.Linear`.

    Raises:
        ValueError, TypeError: m is not above 0, or the activation is none; see `MonotoneMap`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torchdeq import DEQ, IFT, MonotoneLinear, PeacemanRachford
        >>> class Block(nn.Module):
        ...     def __init__(self, inputs, features):
        ...         super().__init__()
        ...         self.inject, self.inner = nn.Linear(inputs, features), MonotoneLinear(features, m=0.1)
        ...         self.deq = DEQ(PeacemanRachford(tol=1e-4, max_iter=200), IFT())
        ...     def forward(self, x):
        ...         x = self.inject(x)
        ...         return self.deq(self.inner.map(x), torch.zeros_like(x))[0]
        >>> Block(5, 30)(torch.randn(8, 5)).shape
        torch.Size([8, 30])
    """

    def __init__(
        self,
        features: int,
        *,
        m: float = 0.1,
        activation: str | Prox = "relu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.features, self.m, self.activation = features, m, activation
        self.A = nn.Parameter(torch.empty(features, features, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.empty(features, features, device=device, dtype=dtype))
        MonotoneMap(self.A.detach(), self.A.detach()[:1], m, activation)  # so that a wrong m raises here
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw A and B from U(−1/√n, 1/√n), which makes ‖I − W‖ about 1.9 for a large n."""
        for parameter in (self.A, self.B):
            nn.init.uniform_(parameter, -(self.features**-0.5), self.features**-0.5)

    @property
    def weight(self) -> Tensor:
        """W, (n, n), computed at each access; never in the dtype of an autocast, which would cost it its m."""
        with torch.autocast(self.A.device.type, enabled=False):
            eye = torch.eye(self.features, dtype=self.A.dtype, device=self.A.device)
            return (1 - self.m) * eye - self.A.mT @ self.A + self.B - self.B.mT

    def map(self, x: Tensor) -> MonotoneMap:
        """f(z) = σ(W z + x), with W as it is now, computed once.

        Arguments:
            x: what the input adds, (B, …, n).
        """
        return MonotoneMap(self.weight, x, self.m, self.activation)

    def forward(self, z: Tensor) -> Tensor:
        """W z, for z (…, n)."""
        return z @ self.weight.mT

    def extra_repr(self) -> str:
        """What it prints as."""
        return f"features={self.features}, m={self.m}, activation={self.activation!r}"
