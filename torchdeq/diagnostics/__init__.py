"""Looking into an equilibrium: how contractive it is, and what each gradient method costs and errs."""

from torchdeq.diagnostics.compare import Candidate, compare_gradients, default_candidates
from torchdeq.diagnostics.spectral import spectral_radius
from torchdeq.diagnostics.table import Comparison, Row

__all__ = ["Candidate", "Comparison", "Row", "compare_gradients", "default_candidates", "spectral_radius"]
