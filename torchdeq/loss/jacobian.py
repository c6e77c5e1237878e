"""The size of the Jacobian J = ∂f/∂z at a state, estimated by random products, as a term of the training loss.

    ‖J‖_F² / n = E ‖Jᵀv‖² / n   for probes v with E v vᵀ = I;  n counts the numbers in the state.

Source: Bai, Koltun and Kolter (2021), arXiv 2106.14342, equation 5; the estimator is Hutchinson's (1990).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal

import optree
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchdeq._held import hold, release
from torchdeq._state import Tree
from torchdeq.loss.spectral import power_method
from torchdeq.loss.tracked import checked_pair, teach_second, vjp
from torchdeq.solver.maps import AffineMap

__all__ = ["deq_jac_loss", "jac_reg", "power_method"]

Distribution = Literal["gaussian", "rademacher"]

_TURN = threading.RLock()


def jac_reg(
    f0: Tree,
    z0: Tree,
    vecs: int = 1,
    create_graph: bool = True,
    *,
    distribution: Distribution = "gaussian",
    generator: torch.Generator | None = None,
) -> Tensor:
    """An unbiased estimate of ‖J‖_F² / n, with J = ∂f0/∂z0 and n the number of real numbers in z0.

    Added to a loss with a weight of about 0.1 to 1 it keeps f contractive, and solves short, as training goes on. J is
    that of the whole batch: where samples are separate, ‖J‖_F² is the sum over them, and the result their mean, per
    number. One probe per step is the usual choice; noise averages out over steps.

    Arguments:
        f0: the value f(z0), with its graph, in the structure and shapes of z0. At an equilibrium, evaluate f once more:
            `z = z.detach().requires_grad_(); loss = loss + jac_reg(f(z), z)`. A tuple state of `get_deq` comes back
            as a list of tensors, and its f takes so many arguments: `z = [t.detach().requires_grad_() for t in
            states[-1]]`, and then `jac_reg(f(*z), z)`.
        z0: the tensor, or pytree of tensors, that f0 was computed from. It must require a gradient.
        vecs: how many probes to average, at least 1. Each costs one product with Jᵀ.
        create_graph: whether the result can be differentiated, as training needs. False: its value alone.
        distribution: 'gaussian', or 'rademacher' for entries ±1. Both are unbiased. With A = J Jᵀ the variance of
            ‖Jᵀv‖² is 2 ‖A‖_F² for the first, and 2 (‖A‖_F² − Σ A_ii²) for the second, which is never more.
        generator: where the probes come from; None for the global one.

    Returns:
        A scalar, in at least float32.

    Raises:
        ValueError: z0 does not require a gradient, f0 does not depend on it or has other shapes, or an option is out
            of its range.
        NotImplementedError: in the backward pass of the result, where f has no second derivative. That of the fused
            kernels of `scaled_dot_product_attention` is missing in torch; the attention in f then has to be evaluated
            within `with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):`.

    Example:
        >>> z = torch.zeros(4, 8, requires_grad=True)
        >>> jac_reg(0.5 * z, z, distribution="rademacher").item()  # ‖J‖_F² = 0.25 n, and J is diagonal
        0.25
    """
    if not isinstance(vecs, int) or isinstance(vecs, bool) or vecs < 1:
        raise ValueError(f"jac_reg(vecs={vecs!r}): expected at least 1 probe.")
    if distribution not in ("gaussian", "rademacher"):
        raise ValueError(f"jac_reg(distribution={distribution!r}): expected 'gaussian' or 'rademacher'.")
    images, states = checked_pair(f0, z0, "jac_reg")
    total = sum(
        _squared_norm(images, states, [_probe(z, distribution, generator) for z in states], create_graph)
        for _ in range(vecs)
    )
    count = sum(z.numel() * (2 if z.is_complex() else 1) for z in states)
    loss = torch.as_tensor(total) / (vecs * max(count, 1))
    teach_second(loss, "jac_reg")
    return loss


def deq_jac_loss(
    deq: nn.Module,
    f: Callable[..., Tree],
    z: Tree,
    vecs: int = 1,
    create_graph: bool = True,
    *,
    distribution: Distribution = "gaussian",
    generator: torch.Generator | None = None,
) -> Tensor:
    """`jac_reg` at the solution z of a DEQ: f is evaluated there once more, as the DEQ evaluates it.

    The point is a constant: the gradient goes to what f depends on, not through z. f gets its own grad mode, its
    buffers stay as they are, and where `DEQ(hold_noise=True)` holds noise for a solve, f draws the same again. With
    two or more solves of one such module before the loss, the noise is that of the last. `jac_reg` needs a second
    derivative, which the fused kernels of `scaled_dot_product_attention` do not have: where there is to be a graph, f
    is evaluated within `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`, which gives the same up to rounding, except
    that dropout inside of the attention may draw another mask on a GPU.

    Arguments:
        deq: the `DEQ`, or the module that `get_deq` made, that solved for z. In training and in eval mode.
        f: the map that was solved.
        z: the solution, in the form the module returns it: of a `DEQ` what comes first; of `get_deq` one of the
            states, such as `states[-1]`. There a list or tuple is handed to f as several arguments, f(*z), as
            `get_deq` does with a tuple state; a `DEQ` hands it over as one, f(z).
        vecs, create_graph, distribution, generator: see `jac_reg`. Under `torch.no_grad()` and in inference
            mode it is the value alone.

    Returns:
        A scalar, in at least float32.

    Raises:
        TypeError: deq is not a module.
        ValueError: see `jac_reg`.

    Example:
        >>> from torchdeq import DEQ
        >>> _ = torch.manual_seed(0)
        >>> layer, x, deq = torch.nn.Linear(8, 8), torch.randn(4, 8), DEQ()
        >>> f = lambda z: torch.tanh(0.5 * layer(z) + x)
        >>> z, _ = deq(f, torch.zeros(4, 8))
        >>> loss = z.square().mean() + 0.1 * deq_jac_loss(deq, f, z)
        >>> loss.backward()
    """
    if not isinstance(deq, nn.Module):
        raise TypeError(
            f"deq_jac_loss(deq, f, z): deq is a {type(deq).__name__}; expected the module that solved for z, a DEQ or "
            f"one that get_deq made. For a map without one: z = z.detach().requires_grad_(); jac_reg(f(z), z)."
        )
    while not hasattr(deq, "stateful") and isinstance(inner := getattr(deq, "module", None), nn.Module):
        deq = inner  # as DistributedDataParallel wraps it
    f = f.linear if isinstance(f, AffineMap) else f
    held = hold(f, getattr(deq, "stateful", None))
    release(held)  # from here on an evaluation changes no buffer
    several = isinstance(z, tuple | list) and not hasattr(
        deq, "stateful"
    )  # 0.1.0 hands over a tuple state so
    track = create_graph and torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():  # in inference mode nothing has a graph
        at = optree.tree_map(lambda t: _point(t) if isinstance(t, Tensor) else t, z)
        noise = getattr(deq, "last_noise", None)
        with noise.again() if noise is not None else nullcontext(), _unfused() if track else nullcontext():
            image = held(*at) if several else held(at)
        return jac_reg(image, at, vecs, track, distribution=distribution, generator=generator)


def _point(z: Tensor) -> Tensor:
    """z as a constant to differentiate at."""
    z = z.detach()
    return (z.clone() if z.is_inference() else z).requires_grad_()


@contextmanager
def _unfused() -> Iterator[None]:
    """Attention by its formula. Torch's setting is one for all threads, so they take turns."""
    with _TURN, sdpa_kernel(SDPBackend.MATH):
        yield


def _squared_norm(images: list[Tensor], states: list[Tensor], v: list[Tensor], create_graph: bool) -> Tensor:
    """‖Jᵀv‖², summed in at least float32: half precision overflows at 65504."""
    products = vjp(images, states, v, "jac_reg", create_graph=create_graph)
    real = [torch.view_as_real(p) if p.is_complex() else p for p in products if p is not None]
    norms = [p.to(torch.promote_types(p.dtype, torch.float32)).square().sum() for p in real]
    return sum(norms[1:], norms[0])


def _probe(z: Tensor, distribution: Distribution, generator: torch.Generator | None) -> Tensor:
    """v like z, with entries of mean 0 and variance 1; a complex number is two of them."""
    real = z.dtype.to_real() if z.is_complex() else z.dtype
    shape = (*z.shape, 2) if z.is_complex() else z.shape
    # In the default dtype whatever that of z is, as 0.1.0 does: a seeded program goes on seeing the same probes.
    wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
    if distribution == "gaussian":
        v = torch.randn(shape, generator=generator, dtype=wide, device=z.device)
    else:
        v = torch.randint(0, 2, shape, generator=generator, device=z.device).to(wide) * 2 - 1
    v = v.to(real)
    return torch.view_as_complex(v) if z.is_complex() else v
