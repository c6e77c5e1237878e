"""The spectral radius of the Jacobian of f at a state, from Ritz values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchdeq._state import FlatMap, Tree, layout_of, per_sample
from torchdeq.solver.gmres import GMRES


def spectral_radius(
    f: Callable[[Tree], Tree],
    z: Tree,
    *,
    steps: int = 40,
    batch_dims: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The largest modulus of an eigenvalue of J = ∂f/∂z at z, per sample.

    Ritz values of Jᵀ from an Arnoldi process with a random start: right for complex pairs and nonnormal J,
    where a Rayleigh quotient is not. Exact once `steps` reaches the number of unknowns; a lower estimate before.

    Arguments:
        f: the map, which must treat samples separately (or give batch_dims=0).
        z: where to take the Jacobian, (B, …) or a pytree of such.
        steps: products with Jᵀ, at least 1.
        batch_dims: see `torchdeq.DEQ`.
        generator: for the random start; None for the global one.

    Returns:
        (B,), zero to rounding where J is zero.

    Example:
        >>> import math
        >>> turn = 0.9 * torch.tensor([[0.5, -math.sqrt(0.75)], [math.sqrt(0.75), 0.5]])
        >>> bool((spectral_radius(lambda z: z @ turn.T, torch.zeros(1, 2)) - 0.9).abs() < 1e-5)
        True
    """
    if steps < 1:
        raise ValueError(f"spectral_radius(steps={steps}): expected at least 1 product with Jᵀ.")
    layout = layout_of(z, batch_dims)
    with torch.enable_grad():
        at = layout.ravel(z, source="z").detach().clone().requires_grad_()
        image = FlatMap(f, layout)(at)
    start = torch.randn(at.shape, dtype=at.dtype, device=at.device, generator=generator)
    if not image.requires_grad or at.shape[1] == 0:
        return at.new_zeros(at.shape[0])
    # Arnoldi for A = I − Jᵀ, as in GMRES, which keeps H = Qᵀ R; the eigenvalues of Jᵀ are 1 − those of A.
    krylov = GMRES()
    state = krylov.first(start / per_sample(start)[:, None])
    for _ in range(min(steps, at.shape[1])):
        (product,) = torch.autograd.grad(image, at, state.probe, retain_graph=True, allow_unused=True)
        state, _ = krylov.advance(state.probe if product is None else state.probe - product, state)
    j = state.j
    h = state.rotation[:, : j + 1, :j].mT @ state.r[:, : j + 1, :j]  # (B, j, j)
    unused = state.basis[:, :j].abs().amax(dim=2) == 0  # beyond an invariant subspace
    h = h.masked_fill(unused[:, None, :] | unused[:, :, None], 0.0) + torch.diag_embed(unused.to(h.dtype))
    return (1 - torch.linalg.eigvals(h)).abs().amax(dim=1)
