"""Looking into an equilibrium: is f fit for it, how contractive is it, what does each gradient method cost and err."""

from torchdeq.diagnostics.check import check_fixed_point
from torchdeq.diagnostics.compare import Candidate, compare_gradients, default_candidates
from torchdeq.diagnostics.memory import SavedBytes
from torchdeq.diagnostics.path import PathIndependence, path_independence
from torchdeq.diagnostics.report import Finding, FixedPointReport
from torchdeq.diagnostics.spectral import LeadingEigenvalue, leading_eigenvalue, spectral_radius
from torchdeq.diagnostics.table import Comparison, Row

__all__ = [
    "Candidate",
    "Comparison",
    "Finding",
    "FixedPointReport",
    "LeadingEigenvalue",
    "PathIndependence",
    "Row",
    "SavedBytes",
    "check_fixed_point",
    "compare_gradients",
    "default_candidates",
    "leading_eigenvalue",
    "path_independence",
    "spectral_radius",
]
