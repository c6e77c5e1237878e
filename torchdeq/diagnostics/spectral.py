"""The eigenvalue of largest modulus of the Jacobian of f at a state, from Ritz values."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from torchdeq._held import hold
from torchdeq._replay import AutocastState, RandomState
from torchdeq._ritz import leading_ritz
from torchdeq._state import FlatMap, Layout, Tree, layout_of


class LeadingEigenvalue(NamedTuple):
    """The eigenvalue of largest modulus of a Jacobian, per sample, and how far it can be trusted.

    Attributes:
        value: (B,), complex. One of a pair stands for both.
        error: (B,), an estimate, to first order, of the distance to an eigenvalue: what the products leave over and
            what rounding makes of it, times how much the eigenvalue moves when J does. Large where there were too few
            products; where J is defective too, if a sample has at most m numbers. With more, and a J that is defective
            or far from normal, it may be far too small: a Jordan block of 100 numbers with the radius 0.5 and ‖J‖ = 1.3
            gave 1.14 and an error of 0.001. Nor does it know of an eigenvalue that the products have not seen.
        products: how many were made.

    Example:
        >>> found = leading_eigenvalue(lambda z: -0.5 * z, torch.ones(1, 3))
        >>> round(found.value.real.item(), 4), found.error.item() < 1e-5
        (-0.5, True)
    """

    value: Tensor
    error: Tensor
    products: int


def spectral_radius(
    f: Callable[[Tree], Tree],
    z: Tree,
    *,
    steps: int = 40,
    batch_dims: int = 1,
    m: int = 64,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The largest modulus of an eigenvalue of J = ∂f/∂z at z, per sample: |`leading_eigenvalue`|.

    Below 1, f contracts in some norm near z and plain iteration converges from close by. Right for complex pairs and
    nonnormal J, where a Rayleigh quotient is not. Exact where a sample has at most `min(steps, m)` numbers; else it
    may be off, mostly downwards, for a J far from normal upwards as well. `leading_eigenvalue` gives an error with it.

    Arguments: see `leading_eigenvalue`.

    Returns:
        (B,), zero where J is zero.

    Raises: see `leading_eigenvalue`.

    Example:
        >>> import math
        >>> turn = 0.9 * torch.tensor([[0.5, -math.sqrt(0.75)], [math.sqrt(0.75), 0.5]])
        >>> bool((spectral_radius(lambda z: z @ turn.T, torch.zeros(1, 2)) - 0.9).abs() < 1e-5)
        True
    """
    found = _leading("spectral_radius", f, z, steps, batch_dims, m, generator)
    return found.value.abs()


def leading_eigenvalue(
    f: Callable[[Tree], Tree],
    z: Tree,
    *,
    steps: int = 40,
    batch_dims: int = 1,
    m: int = 64,
    generator: torch.Generator | None = None,
) -> LeadingEigenvalue:
    """The eigenvalue of largest modulus of J = ∂f/∂z at z, per sample, with an estimate of its error.

    Its place says what plain iteration does near z. On the positive axis: it creeps; near −1: it jumps to and fro,
    and damping helps; a pair off the axis: it spirals. It is a Ritz value of Jᵀ from Arnoldi's process with a
    random start.

    Arguments:
        f: the map, which must treat samples separately (or give batch_dims=0). It takes one argument, a tuple state
            too; for an f of several, as `get_deq` calls it, give `lambda z: f(*z)`.
        z: where to take the Jacobian, (B, …) or a pytree of such.
        steps: products with Jᵀ to make at most, at least 1. After m of them, and at each restart, it is seen
            whether more are needed.
        batch_dims: see `torchdeq.DEQ`.
        m: how many vectors of the size of z to hold, at least 8. Where `steps` is more, the space is restarted with
            the best 30 % of it.
        generator: for the random start; None for the global one.

    In inference mode and under `no_grad` f is evaluated with a graph all the same. What f has from elsewhere must not
    have been made in inference mode, if its derivative is a product with it.

    Raises:
        ValueError: a number is out of its range, or f depends on z and autograd sees nothing of it.
        RuntimeError: f needs a tensor that was made in inference mode.
        TypeError: f takes the tensors of a tuple state as several arguments.

    Source: Arnoldi (1951), doi 10.1090/qam/42792; Stewart (2001), doi 10.1137/S0895479800371529, for restarts.

    Example:
        >>> w = torch.tensor([[0.0, -0.8], [0.8, 0.0]])
        >>> found = leading_eigenvalue(lambda z: z @ w.T, torch.zeros(1, 2))
        >>> round(found.value.real.abs().item(), 4), round(found.value.imag.abs().item(), 4), found.products
        (0.0, 0.8, 2)
    """
    return _leading("leading_eigenvalue", f, z, steps, batch_dims, m, generator)


def _leading(
    name: str,
    f: Callable[[Tree], Tree],
    z: Tree,
    steps: int,
    batch_dims: int,
    m: int,
    generator: torch.Generator | None,
) -> LeadingEigenvalue:
    if steps < 1:
        raise ValueError(f"{name}(steps={steps}): expected at least 1 product with Jᵀ.")
    if m < 8:
        raise ValueError(f"{name}(m={m}): expected at least 8 vectors, the state's size each.")
    # The caller may be in inference mode, where nothing has a graph.
    with torch.inference_mode(False), torch.enable_grad():
        layout = layout_of(z, batch_dims)
        at = layout.ravel(z, source="z").detach().clone().requires_grad_()
        image = _evaluated(FlatMap(f, layout), at, name)
        start = torch.randn(at.shape, dtype=at.dtype, device=at.device, generator=generator)
        if at.numel() == 0:
            zero = at.new_zeros(at.shape[0])
            return LeadingEigenvalue(torch.complex(zero, zero), zero, 0)
        if not image.requires_grad or _vjp(image, at, start) is None:
            if _depends(f, layout, at.detach()):
                raise ValueError(_HIDDEN.format(name=name))
            zero = at.new_zeros(at.shape[0])
            return LeadingEigenvalue(torch.complex(zero, zero), zero, 0)

    def transposed(u: Tensor) -> Tensor:
        product = _vjp(image, at, u)
        assert product is not None  # seen above
        return product

    with torch.no_grad(), AutocastState.capture(at.device).off():
        found = leading_ritz(transposed, start, steps, m)
    return LeadingEigenvalue(found.value, found.error, found.products)


def _evaluated(f: FlatMap, at: Tensor, name: str) -> Tensor:
    try:
        return f(at)
    except RuntimeError as error:
        if "Inference tensors cannot be saved" in str(error):
            error.add_note(
                f"{name} differentiates f, and f uses a tensor that was made in inference mode, which autograd cannot. "
                f"Compute it, or the whole model, under torch.no_grad() instead, or give f a clone() of it that was "
                f"made outside of inference mode."
            )
        raise


def _vjp(image: Tensor, at: Tensor, u: Tensor) -> Tensor | None:
    """Jᵀu; None where no path leads from the image to the state."""
    (product,) = torch.autograd.grad(image, at, u, retain_graph=True, allow_unused=True)
    return product


def _depends(f: Callable[[Tree], Tree], layout: Layout, z: Tensor) -> bool:
    """Whether f has another value a little beside z, with the same buffers and the same noise.

    Arguments:
        f: the map.
        layout: of its state.
        z: the state, (B, D).
    """
    amp, random = AutocastState.capture(z.device), RandomState.capture(z.device)
    dtypes = [*layout.dtypes, *([amp.dtype] if amp.enabled else [])]
    step = max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5 * z.abs().amax().clamp_min(1)
    held = FlatMap(hold(f, noise=z.device), layout)  # not released, so that to look changes no buffer
    with torch.no_grad(), random.again():
        beside = z + step * torch.randn_like(z)
        here, again, there = held(z), held(z), held(beside)
        # A GPU may sum in another order, and so give one f two values at one state.
        return bool(((there - here).abs().amax() > 10 * (again - here).abs().amax()).item())


_HIDDEN = (
    "{name}: f(z) depends on z, but autograd does not know it: there is no path from the one to the other, so the "
    "eigenvalues of ∂f/∂z cannot be had from it, and are not zero. Look for torch.no_grad() or inference_mode() around "
    "f, and for detach(), .data, .item() or NumPy between z and f(z)."
)
