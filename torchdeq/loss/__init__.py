"""Terms to add to a training loss that keep an equilibrium well behaved, and what they are made of."""

from torchdeq.loss.correction import fp_correction, register_weight_func
from torchdeq.loss.jacobian import deq_jac_loss, jac_reg
from torchdeq.loss.spectral import power_method

__all__ = ["deq_jac_loss", "fp_correction", "jac_reg", "power_method", "register_weight_func"]
