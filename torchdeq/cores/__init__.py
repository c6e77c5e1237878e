"""The DEQ classes of torchdeq 0.1.0; `torchdeq.core` has them under their old address."""

from torchdeq.cores.base import DEQBase
from torchdeq.cores.sampling import DEQIndexing, DEQSliced

__all__ = ["DEQBase", "DEQIndexing", "DEQSliced"]
