"""Gradient methods: how a solved state gets its derivative.

`GRADS` lists what is registered. `backward_factory` is torchdeq 0.1.0's door to them.
"""

from torchdeq.grad.base import GradMethod
from torchdeq.grad.factory import GradFunctor, backward_factory
from torchdeq.grad.ift import IFT
from torchdeq.grad.phantom import PhantomGrad
from torchdeq.grad.registry import GRADS, as_grad
from torchdeq.grad.unroll import Unroll

__all__ = [
    "GRADS",
    "IFT",
    "GradFunctor",
    "GradMethod",
    "PhantomGrad",
    "Unroll",
    "as_grad",
    "backward_factory",
]
