"""The questions of `check_fixed_point` about the derivative of f at one state."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchdeq._ritz import leading_ritz
from torchdeq._state import per_sample
from torchdeq.diagnostics.leaves import leaves_of
from torchdeq.diagnostics.probe import Probe, Unfit, dot, told
from torchdeq.diagnostics.report import Finding
from torchdeq.diagnostics.slopes import Slope
from torchdeq.diagnostics.spectral import spectral_radius


class Contraction(NamedTuple):
    """How contractive f is."""

    norm: Tensor  # (B,), ‖J‖₂
    radius: Tensor  # (B,), the spectral radius
    symmetric: bool  # whether J is symmetric


def tracked(probe: Probe) -> Finding | None:
    """Evaluate f with a graph, for the other questions; what is wrong with that, if anything."""
    try:
        probe.track()
    except Exception as error:
        return Finding(
            name="gradient",
            verdict="fault",
            text=f"f runs without a graph, but with one it raised {told(error)}",
        )
    return None


def learns(probe: Probe) -> Finding:
    """Whether f depends on anything that requires a gradient."""
    leaves = leaves_of([probe.fz], without=[probe.point])
    if not leaves:
        return Finding(
            name="learns",
            verdict="note",
            text="f depends on no tensor that requires a gradient, so there is nothing to learn through it.",
            advice="Call requires_grad_() on parameters or inputs, if that is not meant so.",
        )
    count = sum(leaf.numel() for leaf in leaves)
    text = f"f depends on tensors that require a gradient: {len(leaves)}, {count} numbers."
    return Finding(name="learns", verdict="ok", text=text)


def gradient(probe: Probe, where: str) -> tuple[Finding, str]:
    """Whether products with Jᵀ exist, are finite, and agree with difference quotients; and if there is no use in going
    on, why."""
    finding = functools.partial(Finding, name="gradient")
    directions = [probe.direction(), probe.direction()]
    try:
        images = [probe.quotient(d) for d in directions]
    except Exception as error:
        return finding(verdict="unknown", text=f"beside {where} f raised {told(error)}"), "f fails there"
    try:
        products = [probe.vjp(probe.cotangent(image)) for image in images]
    except Exception as error:
        return finding(
            verdict="fault",
            text=f"the backward pass of f raised {told(error)}",
            advice="Every gradient method needs products with Jᵀ.",
        ), "f has no product with Jᵀ"
    if all(product is None for product in products):
        if all(probe.is_rounding(image) for image in images):
            return finding(
                verdict="note",
                text="f does not depend on z, so its value is the fixed point.",
                advice="No solver is needed: call f once.",
            ), "f does not depend on z"
        return finding(
            verdict="fault",
            text="f(z) depends on z, but autograd does not know it: there is no path from the one to the other.",
            advice="Look for detach(), .data, torch.no_grad(), .item() or NumPy between z and f(z).",
        ), "autograd does not see that f depends on z"
    if not all(product is None or bool(product.isfinite().all()) for product in products):
        return finding(
            verdict="fault",
            text=f"a product with Jᵀ is not finite at {where}.",
            advice="Look for a root or a norm at 0, 0/0, or torch.where around one: add a small number inside.",
        ), "a product with Jᵀ is not finite"
    return _compared(finding, probe, directions, images, where)


def _compared(
    finding: Callable[..., Finding], probe: Probe, directions: list[Tensor], images: list[Tensor], where: str
) -> tuple[Finding, str]:
    """⟨Jᵀu, d⟩ beside the slope of ⟨u, f(z + t d)⟩, with u along what f does in the direction d."""
    pairs: list[tuple[float, Slope]] = []
    for d, image in zip(directions, images, strict=True):
        u = probe.cotangent(image)
        pairs.append((dot(probe.vjp_or_zero(u), d), probe.slope(u, d)))
    if not all(math.isfinite(found.error) for _, found in pairs):
        return finding(
            verdict="unknown", text=f"f is not finite beside {where}, so there is no quotient."
        ), ""
    if any(found.kink for _, found in pairs):
        return finding(
            verdict="note",
            text=f"f has a kink at {where}, or bends sharply: its slopes to one side and the other differ. What "
            f"autograd gives for J cannot be checked there, and at a kink is one of several.",
            advice="Usual for ReLU, abs or max exactly at 0, as from a zero start with zero biases, and for a "
            "normalisation of zeros; rare elsewhere.",
        ), ""
    wrong = [(got, found) for got, found in pairs if not found.confirms(got)]
    if wrong:
        got, found = max(wrong, key=lambda pair: abs(pair[0] - pair[1].value))
        return finding(
            verdict="fault",
            text=f"autograd's derivative along a line is {got:.6g}, but difference quotients say {found.value:.6g} "
            f"(± {found.error:.0e}).",
            advice="Part of f is hidden from autograd (detach(), .data, no_grad()), or a custom backward is wrong, or "
            "one that is wrong on purpose (straight-through). Implicit gradients would be those of another map.",
        ), "autograd's J is not that of f"
    blur = max(found.tolerance / max(abs(found.value), 1e-300) for _, found in pairs)
    if blur > 0.2:
        return finding(
            verdict="unknown",
            text=f"products with Jᵀ exist and are finite, but difference quotients are too coarse in this precision to "
            f"check them (± {100 * blur:.0f} %).",
            advice="Check f in float32 or float64.",
        ), ""
    return finding(verdict="ok", text=f"products with Jᵀ agree with difference quotients at {where}."), ""


def contraction(probe: Probe, where: str, steps: int) -> tuple[Finding, Contraction | None]:
    """How contractive f is."""
    finding = functools.partial(Finding, name="contraction")
    jvp = probe.jvp()
    try:
        radius = spectral_radius(
            probe.subject,
            probe.layout.unravel(probe.z),
            steps=steps,
            batch_dims=probe.layout.depth,
            generator=torch.Generator(probe.z.device).manual_seed(0),
        )
        square = leading_ritz(lambda v: probe.vjp_or_zero(jvp(v)), probe.noise(), steps, steps).value
        norm = square.real.clamp_min(0).sqrt()
        d = probe.direction()
        jd, jtd = jvp(d), probe.vjp_or_zero(d)
    except Exception as error:
        return finding(verdict="unknown", text=f"its estimate raised {told(error)}"), None
    symmetric = float(jd.norm()) > 0 and bool(
        (per_sample(jd - jtd) <= 10 * probe.eps**0.5 * per_sample(jd)).all()
    )
    what = "of the whole state" if probe.layout.depth == 0 else "of the worst sample"
    text = (
        f"‖J‖₂ ≈ {float(norm.max()):.3g} and spectral radius ≈ {float(radius.max()):.3g} at {where}, {what}."
    )
    found = Contraction(norm, radius, symmetric)
    if float(norm.max()) < 1:
        return finding(verdict="ok", text=f"{text} A contraction there."), found
    near = (
        "Plain iteration converges near there, but may first move away."
        if float(radius.max()) < 1
        else "Plain iteration moves away from there, and there may be several fixed points; accelerated solvers can "
        "still converge."
    )
    mend = "Normalise the weights or add torchdeq.loss.jac_reg to the loss, if training does not keep it so."
    return finding(verdict="note", text=f"{text} {near}", advice=mend), found


def second(probe: Probe, *, checked: bool) -> Finding:
    """Whether ⟨Jᵀu, d⟩ can be differentiated in u, which gives Jd, and in z.

    `checked`: whether difference quotients were good for first derivatives. Else they decide nothing here.
    """
    finding = functools.partial(Finding, name="second")
    d, e = probe.direction(), probe.direction()
    u = probe.cotangent(probe.quotient(d))
    try:
        with torch.enable_grad():
            z, cotangent = probe.z.clone().requires_grad_(), u.clone().requires_grad_()
            (w,) = torch.autograd.grad(probe.flat(z), z, cotangent, create_graph=True)
            product = (w * d).sum()
            if not product.requires_grad:
                raise Unfit("it has no graph.")
            in_u, in_z = torch.autograd.grad(product, (cotangent, z), allow_unused=True)
            if in_u is None and bool(w.any()):
                raise Unfit("it is linear in u, but has no path to u.")
        line, bend = probe.slope(u, d), probe.bend(u, d, e)
    except Exception as error:
        return finding(
            verdict="note",
            text=f"a product with Jᵀ cannot be differentiated again: "
            f"{error if isinstance(error, Unfit) else told(error)}",
            advice="IFT(order=2) and CGNR need it; IFT(), GMRES and the other adjoint solvers do not.",
        )
    right = line.kink or line.confirms(0.0 if in_u is None else dot(in_u, u))
    if right and (bend.kink or bend.confirms(0.0 if in_z is None else dot(in_z, e))):
        return finding(verdict="ok", text="a product with Jᵀ can be differentiated again.")
    if not checked:
        return finding(
            verdict="unknown",
            text="a product with Jᵀ can be differentiated again, but difference quotients cannot check the result "
            "there, as they could not check `gradient`.",
        )
    return finding(
        verdict="fault",
        text="a product with Jᵀ can be differentiated again, but the result disagrees with difference quotients: "
        "second derivatives would be wrong without an error.",
        advice="A custom backward detaches or uses saved values that carry no graph; mend it, or decorate it with "
        "once_differentiable.",
    )


def forward(probe: Probe) -> Finding:
    """Whether forward-mode differentiation works."""
    finding = functools.partial(Finding, name="forward")
    d = probe.direction()
    needed = "Only forward-mode differentiation (torch.func.jvp, jacfwd) needs it."
    try:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(probe.z, d)
            tangent = forward_ad.unpack_dual(probe.flat(dual)).tangent
            tangent = torch.zeros_like(d) if tangent is None else tangent.detach().clone()
        u = probe.cotangent(probe.quotient(d))
        line = probe.slope(u, d)
    except Exception as error:
        return finding(verdict="note", text=f"f has no forward-mode derivative: {told(error)}", advice=needed)
    got = dot(u, tangent)
    if line.kink or line.confirms(got):
        return finding(verdict="ok", text="forward-mode differentiation works.")
    return finding(
        verdict="fault",
        text=f"forward mode gives {got:.6g} along a line, but difference quotients say {line.value:.6g} "
        f"(± {line.error:.0e}).",
        advice=f"Look for detach() or a custom jvp that is wrong. {needed}",
    )
