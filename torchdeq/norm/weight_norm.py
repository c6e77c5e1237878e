"""Weight normalisation: length and direction of each output's weights, apart.

    W = v · min(c, g / ‖v‖),   ‖v‖ over all dimensions but that of the outputs.

Source: Salimans and Kingma (2016), arXiv 1602.07868, equation 2; the clip is torchdeq 0.1.0's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchdeq.norm.base import Norm, usual_targets, wide, without_autocast


class WeightNorm(Norm):
    """Each output's weights as a direction v and a length g.

    Arguments:
        dim, clip, clip_value: see `Norm`. The weight is W = v · min(clip_value, g / ‖v‖) with `clip`.
        learn_scale: whether g is a parameter, which begins as ‖v‖, so that the weight is what it was.
        target_norm: g, where it is not learned. For a contraction in the maximum norm: ‖W‖ of each output is an upper
            bound of the gain of no more than one input, so use less than 1 / √(inputs), or `SpectralNorm`.

    Raises:
        ValueError: a value is out of range; an output has weights that are all zero, which have no direction.

    Example:
        >>> layer = torch.nn.Linear(2, 1)
        >>> _ = torch.nn.utils.parametrize.register_parametrization(layer, 'weight', WeightNorm(learn_scale=False))
        >>> layer.weight = torch.tensor([[3.0, 4.0]])
        >>> [round(w, 4) for w in layer.weight[0].tolist()]
        [0.6, 0.8]
    """

    _target_modules = usual_targets()

    def forward(self, *originals: Tensor) -> Tensor:
        """W from (g, v), or from v where the scale is not learned."""
        *scale, v = originals
        with without_autocast(v):
            factor = self.factor(scale[0] if scale else None, self.size(v))
            return (wide(v) * factor).to(v.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """(g, v), or v, of a given weight. Where the scale is not learned, its direction is what remains of it."""
        size = self._checked(weight)
        if not self.learn_scale:
            return weight
        return size.to(weight.real.dtype), weight / self._spare

    def originals(self) -> tuple[str, ...]:
        """g and v, or v alone."""
        return ("g", "v") if self.learn_scale else ("v",)

    def check(self, weight: Tensor) -> None:
        """No output may have weights that are all zero."""
        self._checked(weight.detach())

    def parts(self) -> dict[str, str]:
        """weight_g and weight_v."""
        return {"g": "original0", "v": "original1"} if self.learn_scale else {"v": "original"}

    def release(self, weight: nn.Parameter) -> dict[str, Tensor]:
        """g as it is for this weight, and v, the weight itself."""
        size = self._checked(weight.detach())
        g = {"g": nn.Parameter(size.to(weight.real.dtype), weight.requires_grad)} if self.learn_scale else {}
        return {**g, "v": weight}

    def size(self, v: Tensor) -> Tensor:
        """‖v‖ of each output, of the shape of v but for ones in the other dimensions, in at least float32."""
        w = wide(v)
        if w.dim() == 1:
            return w.abs()
        others = list(range(1, w.dim()))
        if not self.dim:
            return torch.linalg.vector_norm(w, dim=others, keepdim=True)
        w = w.transpose(0, self.dim).contiguous()  # what lies together is summed with a smaller error
        return torch.linalg.vector_norm(w, dim=others, keepdim=True).transpose(0, self.dim)

    def _checked(self, weight: Tensor) -> Tensor:
        size = self.size(weight)
        if not weight.is_meta and bool((size == 0).any()):
            outputs = (size == 0).flatten().nonzero().flatten().tolist()
            raise ValueError(
                f"weight normalisation writes the weights of each output as a length and a direction, but those of "
                f"output(s) {', '.join(map(str, outputs[:5]))}{' …' if len(outputs) > 5 else ''} are all zero, which "
                f"have none. Begin with small random weights, or leave this layer out with filter_out."
            )
        return size
