"""The spectral radius of the Jacobian of f at a state, from Ritz values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchdeq._state import FlatMap, Map, Tree, layout_of, per_sample
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

    def transposed(u: Tensor) -> Tensor:
        (product,) = torch.autograd.grad(image, at, u, retain_graph=True, allow_unused=True)
        return torch.zeros_like(u) if product is None else product

    return ritz_values(transposed, start, steps).abs().amax(dim=1)


def ritz_values(linear: Map, start: Tensor, steps: int) -> Tensor:
    """Eigenvalues of the linear map on the Krylov space of `start`, per sample, (B, j), complex; j ≤ min(steps, D).

    Arguments:
        linear: (B, D) -> (B, D).
        start: (B, D), not zero.
        steps: products with the map.
    """
    # Arnoldi for A = I − linear, as in GMRES, which keeps H = Qᵀ R; the eigenvalues of linear are 1 − those of A.
    krylov = GMRES()
    state = krylov.first(start / per_sample(start)[:, None])
    for _ in range(min(steps, start.shape[1])):
        state, _ = krylov.advance(state.probe - linear(state.probe), state)
    j = state.j
    h = state.rotation[:, : j + 1, :j].mT @ state.r[:, : j + 1, :j]  # (B, j, j)
    unused = state.basis[:, :j].abs().amax(dim=2) == 0  # beyond an invariant subspace
    h = h.masked_fill(unused[:, None, :] | unused[:, :, None], 0.0) + torch.diag_embed(unused.to(h.dtype))
    return 1 - torch.linalg.eigvals(h)
