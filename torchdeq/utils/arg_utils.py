"""Where torchdeq 0.1.0 keeps `add_deq_args`; see `torchdeq.utils.options`."""

from torchdeq.utils.options import add_deq_args

__all__ = ["add_deq_args"]
