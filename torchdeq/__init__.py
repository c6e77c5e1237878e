"""torchdeq: differentiating through fixed points in PyTorch.

`DEQ` is the front door; `Solver` and `GradMethod` objects say how to solve and how to differentiate. The names of
torchdeq 0.1.0 (`get_deq`, `add_deq_args`, `backward_factory`, …) work as they did, where they were right.
"""

from torchdeq.core import DEQBase, DEQIndexing, DEQSliced, get_deq, register_deq, reset_deq
from torchdeq.deq import DEQ
from torchdeq.dropout import (
    VariationalDropout,
    VariationalDropout1d,
    VariationalDropout2d,
    VariationalDropout3d,
    VariationalDropToken1d,
    VariationalDropToken2d,
    VariationalDropToken3d,
    reset_dropout,
)
from torchdeq.grad import GRADS, IFT, GradMethod, PhantomGrad, Unroll, as_grad, backward_factory
from torchdeq.solution import ConvergenceError, ConvergenceWarning, CouplingWarning, Solution, Status
from torchdeq.solver import (
    CG,
    CGNR,
    GMRES,
    RRE,
    SOLVERS,
    SQUAREM,
    AffineMap,
    Anderson,
    BiCGSTAB,
    Broyden,
    Fallback,
    FixedPointIteration,
    Multisecant,
    Neumann,
    NewtonKrylov,
    SimpleFixedPointIteration,
    Solver,
    SolverModule,
    as_solver,
    get_solver,
    register_solver,
    solver_stat_from_final_step,
)
from torchdeq.utils import DEQConfig, add_deq_args

__version__ = "1.0.0.dev0"

__all__ = [
    "CG",
    "CGNR",
    "DEQ",
    "GMRES",
    "GRADS",
    "IFT",
    "RRE",
    "SOLVERS",
    "SQUAREM",
    "AffineMap",
    "Anderson",
    "BiCGSTAB",
    "Broyden",
    "ConvergenceError",
    "ConvergenceWarning",
    "CouplingWarning",
    "DEQBase",
    "DEQConfig",
    "DEQIndexing",
    "DEQSliced",
    "Fallback",
    "FixedPointIteration",
    "GradMethod",
    "Multisecant",
    "Neumann",
    "NewtonKrylov",
    "PhantomGrad",
    "SimpleFixedPointIteration",
    "Solution",
    "Solver",
    "SolverModule",
    "Status",
    "Unroll",
    "VariationalDropToken1d",
    "VariationalDropToken2d",
    "VariationalDropToken3d",
    "VariationalDropout",
    "VariationalDropout1d",
    "VariationalDropout2d",
    "VariationalDropout3d",
    "add_deq_args",
    "as_grad",
    "as_solver",
    "backward_factory",
    "get_deq",
    "get_solver",
    "register_deq",
    "register_solver",
    "reset_deq",
    "reset_dropout",
    "solver_stat_from_final_step",
]
