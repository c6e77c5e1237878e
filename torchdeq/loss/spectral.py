"""The spectral radius of J = ∂f/∂z at a state, from a value f(z) and its graph, in torchdeq 0.1.0's form."""

from __future__ import annotations

import optree
import torch
from torch import Tensor

from torchdeq._replay import AutocastState
from torchdeq._ritz import leading_ritz
from torchdeq._state import Tree, layout_of
from torchdeq.loss.tracked import checked_pair, vjp


def power_method(
    f0: Tree,
    z0: Tree,
    n_iters: int = 100,
    *,
    m: int = 64,
    generator: torch.Generator | None = None,
) -> tuple[Tree, Tensor]:
    """The spectral radius of J = ∂f0/∂z0 per sample, and the vector that belongs to it.

        Jᵀ v = λ v,   |λ| largest

    Not a power iteration, in spite of the name, which is that of torchdeq 0.1.0: the products with Jᵀ are the same,
    but λ is the largest of their Ritz values, in a Krylov space of Arnoldi's. So complex pairs are right, where a
    Rayleigh quotient gives a part of |λ|, nonnormal J too, and where J is zero, so is |λ|. The result is exact where
    the state has at most `min(n_iters, m)` numbers. Else it may be off, mostly downwards; for a J far from
    normal, with ‖J‖ far above the radius, upwards as well. Where J is defective, n equal eigenvalues with one vector
    are told apart by rounding, by about ε^(1/n), and by far more if the state has more than m numbers.
    `diagnostics.leading_eigenvalue` estimates the error beside λ, and says when that can be believed.

    Arguments:
        f0: the value f(z0), with its graph, in the structure and shapes of z0. The graph is kept.
        z0: the tensor (B, …), or pytree of such, that f0 was computed from. It must require a gradient. f must treat
            samples separately.
        n_iters: how many products with Jᵀ to make at most, at least 1.
        m: how many vectors of the size of z0 to hold, at least 8. Where n_iters is more, the space is restarted with
            the best 30 % of it. For a J that is far from normal as many as n_iters are worth their memory.
        generator: where the first vector comes from; None for the global one.

    Returns:
        The vector, as z0 and with unit norm for each sample: the real part of the eigenvector of Jᵀ, a left
        eigenvector of J. And |λ| (B,), in at least float32.

    Raises:
        ValueError: z0 does not require a gradient, f0 does not depend on it or has other shapes, or a number is out
            of its range.

    Source: see Arnoldi (1951) for the space; Bai, Koltun and Kolter (2021), arXiv 2106.14342, for what it is used for.

    Example:
        >>> import math
        >>> turn = 0.9 * torch.tensor([[0.5, -math.sqrt(0.75)], [math.sqrt(0.75), 0.5]])
        >>> z = torch.zeros(3, 2, requires_grad=True)
        >>> vector, radius = power_method(z @ turn.T, z)
        >>> vector.shape, [round(r, 4) for r in radius.tolist()]
        (torch.Size([3, 2]), [0.9, 0.9, 0.9])
    """
    for option, value, least in (("n_iters", n_iters, 1), ("m", m, 8)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"power_method({option}={value!r}): expected an integer of at least {least}.")
    images, states = checked_pair(f0, z0, "power_method")
    layout = layout_of(z0)
    shape = (layout.batch, sum(layout.sizes))
    start = torch.randn(shape, dtype=layout.dtype, device=states[0].device, generator=generator)
    if start.numel() == 0:
        return layout.unravel(start), start.new_zeros(layout.batch)

    def transposed(u: Tensor) -> Tensor:
        products = vjp(images, states, optree.tree_leaves(layout.unravel(u)), "power_method")
        filled = [torch.zeros_like(z) if p is None else p for p, z in zip(products, states, strict=True)]
        return layout.ravel(optree.tree_unflatten(layout.spec, filled))

    with torch.no_grad(), AutocastState.capture(start.device).off():
        found = leading_ritz(transposed, start, n_iters, m)
    return layout.unravel(found.vector), found.value.abs()
