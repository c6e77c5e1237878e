"""Terms to add to a training loss that keep an equilibrium well behaved."""

from torchdeq.loss.jacobian import jac_reg

__all__ = ["jac_reg"]
