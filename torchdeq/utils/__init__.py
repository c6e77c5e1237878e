"""Configuration, a start and checkpoints, in torchdeq 0.1.0's form."""

from torchdeq.utils.config import DEQConfig
from torchdeq.utils.init import mixed_init
from torchdeq.utils.mem import mem_gc
from torchdeq.utils.options import add_deq_args

__all__ = ["DEQConfig", "add_deq_args", "mem_gc", "mixed_init"]
