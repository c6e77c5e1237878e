"""Looking into an equilibrium: how contractive it is, and what each gradient method costs and errs."""

from torchdeq.diagnostics.spectral import spectral_radius

__all__ = ["spectral_radius"]
