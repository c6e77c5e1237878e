"""Spectral normalisation: a weight's largest singular value is divided out.

    W = w · min(c, g / σ),   σ = uᵀ w v,   v ← wᵀ u / ‖wᵀ u‖,   u ← w v / ‖w v‖   (power iteration),

w as a matrix whose rows belong to the outputs. For a convolution σ is that of this matrix, which bounds the norm of the
convolution up to a factor of the kernel's size.

Source: Miyato, Kataoka, Koyama and Yoshida (2018), arXiv 1802.05957, algorithm 1; scale and clip are torchdeq 0.1.0's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from torchdeq._modes import in_transform
from torchdeq._weights import recomputed
from torchdeq.norm.base import Norm, usual_targets, wide, without_autocast

_WARM = 50  # power iterations at first: they leave σ of a random matrix, 1000 × 1000, less than 1 % short


class SpectralNorm(Norm):
    """A weight divided by its largest singular value σ, times a scale.

    In training mode each evaluation makes `n_power_iterations` before it takes σ; a solve of `DEQ` counts as one
    evaluation. In eval mode, in a backward pass that evaluates a weight again, and under a transform of torch.func none
    are made. The derivative takes u and v for constants, which is exact where they have converged.

    Arguments:
        weight: what to normalise. Random u and v are drawn for it from torch's generator, and brought near
            convergence.
        dim, clip, clip_value: see `Norm`. The weight is W = w · min(clip_value, g / σ) with `clip`.
        learn_scale: whether there is a parameter g, a factor for each output, which begins as `target_norm`.
        target_norm: the largest singular value, of W as it begins if the scale is learned. Below 1 for a contraction.
        n_power_iterations: at least 1. One is enough while the weight changes slowly.
        eps: what norms of vectors are taken to be at least.

    Raises:
        ValueError: a value is out of range; the weight is all zero, or complex.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> layer = torch.nn.Linear(3, 3)
        >>> norm = SpectralNorm(layer.weight, learn_scale=False, target_norm=0.5)
        >>> _ = torch.nn.utils.parametrize.register_parametrization(layer, 'weight', norm)
        >>> round(torch.linalg.matrix_norm(layer.weight, 2).item(), 3)
        0.5
    """

    _target_modules = usual_targets()
    OPTIONS = {**Norm.OPTIONS, "n_power_iterations": 1, "eps": 1e-12}  # noqa: RUF012 - declared at the base

    u: Tensor
    v: Tensor
    g: nn.Parameter | None

    def __init__(
        self,
        weight: Tensor,
        dim: int = 0,
        learn_scale: bool = True,
        target_norm: float = 1.0,
        clip: bool = False,
        clip_value: float = 1.0,
        n_power_iterations: int = 1,
        eps: float = 1e-12,
    ):
        super().__init__(dim, learn_scale, target_norm, clip, clip_value)
        self.n_power_iterations, self.eps = n_power_iterations, float(eps)
        if type(n_power_iterations) is not int or n_power_iterations < 1:
            raise ValueError(
                f"{self!r}: n_power_iterations counts steps and must be an integer of at least 1."
            )
        if not self.eps > 0:
            raise ValueError(f"{self!r}: eps must be positive.")
        if weight.is_complex():
            raise ValueError(
                f"spectral normalisation is for real weights, got {weight.dtype}. Use 'weight_norm'."
            )
        w = self.matrix(weight.detach())
        # In this order, from the global generator: a seeded program of 0.1.0 stays in step.
        u = normalize(weight.detach().new_empty(w.shape[0]).normal_(), dim=0, eps=self.eps)
        v = normalize(weight.detach().new_empty(w.shape[1]).normal_(), dim=0, eps=self.eps)
        self.register_buffer("u", u)
        self.register_buffer("v", v)
        self._warmed(w)
        shape = [1] * weight.dim()
        shape[dim] = w.shape[0]
        scale = weight.detach().new_full(shape, self.target_norm)
        self.register_parameter("g", nn.Parameter(scale, weight.requires_grad) if learn_scale else None)

    @classmethod
    def made_for(cls, weight: Tensor, dim: int, **options: Any) -> Norm:
        return cls(weight, dim, **options)

    def forward(self, w: Tensor) -> Tensor:
        """W from w."""
        with without_autocast(w):
            matrix = self.matrix(w)
            # The graph sees copies: the buffers are written to at the next evaluation.
            u, v = (
                self._stepped(matrix)
                if self._steps()
                else (wide(self.part("u")).clone(), wide(self.part("v")).clone())
            )
            sigma = torch.dot(u, torch.mv(matrix, v))
            return (wide(w) * self.factor(self.part("g"), sigma)).to(w.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """w of a given weight, with a scale that gives the same weight, if it is learned."""
        sigma = self._warmed(self.matrix(weight))
        g = self.part("g")
        if g is None:
            return weight
        with torch.no_grad():
            scale = sigma.expand_as(g)
            g.copy_(scale) if self.home is None else self.home.put("g", scale)
        return weight / self._spare

    def originals(self) -> tuple[str, ...]:
        """The weight."""
        return ("orig",)

    def parts(self) -> dict[str, str]:
        """weight_orig, weight_g, and the buffers weight_u and weight_v."""
        scale = {"g": "0.g"} if self.learn_scale else {}
        return {"orig": "original", **scale, "u": "0.u", "v": "0.v"}

    def release(self, weight: nn.Parameter) -> dict[str, Tensor]:
        """The weight itself, g, u and v, which are this module's no longer."""
        own = {name: tensor for name in ("g", "u", "v") if (tensor := self.part(name)) is not None}
        for name in ("g", "u", "v"):
            delattr(self, name)
        return {"orig": weight, **own}

    def part(self, name: str) -> Any:
        """g, which may be None, u or v, wherever it is."""
        if self.home is None:
            return getattr(self, name)
        return self.home.part(name) if name in self.parts() else None

    def matrix(self, w: Tensor) -> Tensor:
        """w as a matrix (outputs, all others), in at least float32."""
        return wide(w).movedim(self.dim, 0).flatten(1) if w.dim() > 1 else wide(w)[:, None]

    def _steps(self) -> bool:
        return self.training and (torch.compiler.is_compiling() or not (in_transform() or recomputed()))

    @torch.no_grad()
    def _stepped(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """u and v after the power iterations of one evaluation; the buffers hold them too."""
        u, v = self._iterated(matrix, wide(self.part("u")), self.n_power_iterations)
        self.part("u").copy_(u)
        self.part("v").copy_(v)
        return u, v

    def _iterated(self, matrix: Tensor, u: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        for _ in range(steps):
            v = normalize(torch.mv(matrix.mT, u), dim=0, eps=self.eps)
            u = normalize(torch.mv(matrix, v), dim=0, eps=self.eps)
        return u, v

    @torch.no_grad()
    def _warmed(self, matrix: Tensor) -> Tensor:
        """σ of a matrix that the vectors do not know yet; they know it afterwards."""
        with without_autocast(matrix):
            u, v = self._iterated(matrix, wide(self.part("u")), _WARM)
            sigma = torch.dot(u, torch.mv(matrix, v))
            if not matrix.is_meta and not bool(sigma > 0):  # u was orthogonal to all columns, or never set
                u = matrix[:, matrix.square().sum(0).argmax()]
                u, v = self._iterated(matrix, normalize(u, dim=0, eps=self.eps), _WARM)
                sigma = torch.dot(u, torch.mv(matrix, v))
        if not matrix.is_meta and bool(sigma == 0):
            raise ValueError(
                "spectral normalisation divides a weight by its largest singular value, but this weight, of shape "
                f"{tuple(matrix.shape)} as a matrix, is all zero. Begin with small random weights, or leave this layer "
                f"out with filter_out."
            )
        self.part("u").copy_(u)
        self.part("v").copy_(v)
        return sigma
