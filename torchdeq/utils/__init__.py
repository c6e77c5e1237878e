"""Configuration in torchdeq 0.1.0's form."""

from torchdeq.utils.config import DEQConfig
from torchdeq.utils.options import add_deq_args

__all__ = ["DEQConfig", "add_deq_args"]
