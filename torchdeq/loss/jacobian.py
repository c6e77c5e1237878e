"""The size of the Jacobian J = ∂f/∂z at a state, estimated by random products, as a term of the training loss.

    ‖J‖_F² / n = E ‖Jᵀv‖² / n   for probes v with E v vᵀ = I;  n counts the numbers in the state.

Source: Bai, Koltun and Kolter (2021), arXiv 2106.14342, equation 5; the estimator is Hutchinson's (1990).
"""

from __future__ import annotations

from typing import Literal

import optree
import torch
from torch import Tensor

from torchdeq._state import Tree

Distribution = Literal["gaussian", "rademacher"]


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
            `z = z.detach().requires_grad_(); loss = loss + jac_reg(f(z), z)`.
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

    Example:
        >>> z = torch.zeros(4, 8, requires_grad=True)
        >>> jac_reg(0.5 * z, z, distribution="rademacher").item()  # ‖J‖_F² = 0.25 n, and J is diagonal
        0.25
    """
    if not isinstance(vecs, int) or isinstance(vecs, bool) or vecs < 1:
        raise ValueError(f"jac_reg(vecs={vecs!r}): expected at least 1 probe.")
    if distribution not in ("gaussian", "rademacher"):
        raise ValueError(f"jac_reg(distribution={distribution!r}): expected 'gaussian' or 'rademacher'.")
    images, states = _checked(f0, z0)
    total = sum(
        _squared_norm(images, states, [_probe(z, distribution, generator) for z in states], create_graph)
        for _ in range(vecs)
    )
    count = sum(z.numel() * (2 if z.is_complex() else 1) for z in states)
    return torch.as_tensor(total) / (vecs * max(count, 1))


def _squared_norm(images: list[Tensor], states: list[Tensor], v: list[Tensor], create_graph: bool) -> Tensor:
    """‖Jᵀv‖², summed in at least float32: half precision overflows at 65504."""
    tracked = [(image, probe) for image, probe in zip(images, v, strict=True) if image.requires_grad]
    outputs, probes = zip(*tracked, strict=True)  # rows of J that belong to the others are zero
    products = torch.autograd.grad(
        outputs, states, probes, retain_graph=True, create_graph=create_graph, allow_unused=True
    )
    if all(product is None for product in products):
        raise ValueError(
            "jac_reg(f0, z0): f0 was not computed from z0, so ∂f0/∂z0 is not there to be measured. Evaluate f at the "
            "very tensor you give: z = z.detach().requires_grad_(); jac_reg(f(z), z)."
        )
    real = [torch.view_as_real(p) if p.is_complex() else p for p in products if p is not None]
    norms = [p.to(torch.promote_types(p.dtype, torch.float32)).square().sum() for p in real]
    return sum(norms[1:], norms[0])


def _probe(z: Tensor, distribution: Distribution, generator: torch.Generator | None) -> Tensor:
    """v like z, with entries of mean 0 and variance 1; a complex number is two of them."""
    real = z.dtype.to_real() if z.is_complex() else z.dtype
    shape = (*z.shape, 2) if z.is_complex() else z.shape
    wide = torch.promote_types(real, torch.float32)
    if distribution == "gaussian":
        v = torch.randn(shape, generator=generator, dtype=wide, device=z.device)
    else:
        v = torch.randint(0, 2, shape, generator=generator, device=z.device).to(wide) * 2 - 1
    v = v.to(real)
    return torch.view_as_complex(v) if z.is_complex() else v


def _checked(f0: Tree, z0: Tree) -> tuple[list[Tensor], list[Tensor]]:
    """The leaves of f0 and z0, which must fit."""
    images, states = optree.tree_leaves(f0), optree.tree_leaves(z0)
    for name, leaves in (("f0", images), ("z0", states)):
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                raise ValueError(
                    f"jac_reg(f0, z0): {name} holds a {type(leaf).__name__}. f0 is the value f(z0), not the function: "
                    f"jac_reg(f(z), z)."
                )
    shapes = [tuple(leaf.shape) for leaf in images], [tuple(leaf.shape) for leaf in states]
    if shapes[0] != shapes[1] or not states:
        raise ValueError(
            f"jac_reg(f0, z0): f0 has the shapes {shapes[0]} and z0 has {shapes[1]}. Give f(z) and z, with at least "
            f"one tensor in them."
        )
    if not all(z.requires_grad for z in states):
        raise ValueError(
            "jac_reg(f0, z0): z0 does not require a gradient, so ∂f0/∂z0 was not recorded. Evaluate f once more with "
            "one: z = z.detach().requires_grad_(); jac_reg(f(z), z)."
        )
    if not any(image.requires_grad for image in images):
        raise ValueError(
            "jac_reg(f0, z0): f0 has no graph. It was computed under torch.no_grad(), or by an f that detaches its "
            "argument; evaluate f under grad mode."
        )
    return images, states
