"""torchdeq: differentiating through fixed points in PyTorch."""

from torchdeq.deq import DEQ
from torchdeq.grad import *
from torchdeq.solution import *
from torchdeq.solver import *
