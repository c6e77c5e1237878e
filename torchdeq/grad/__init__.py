"""Gradient methods: how a solved state gets its derivative.

`GRADS` lists what is registered. `backward_factory` is torchdeq 0.1.0's door to them.
"""

from torchdeq.grad.base import GradMethod
from torchdeq.grad.factory import GradFunctor, backward_factory
from torchdeq.grad.factory import make_pair as make_pair
from torchdeq.grad.ift import IFT
from torchdeq.grad.jfb import JFB
from torchdeq.grad.neumann_phantom import NeumannPhantom
from torchdeq.grad.phantom import PhantomGrad
from torchdeq.grad.registry import GRADS, as_grad
from torchdeq.grad.reversible import Reversible
from torchdeq.grad.shine import SHINE
from torchdeq.grad.truncated_cycle import TruncatedCycle
from torchdeq.grad.unroll import Unroll

__all__ = [
    "GRADS",
    "IFT",
    "JFB",
    "SHINE",
    "GradFunctor",
    "GradMethod",
    "NeumannPhantom",
    "PhantomGrad",
    "Reversible",
    "TruncatedCycle",
    "Unroll",
    "as_grad",
    "backward_factory",
]
