"""Solvers of z = f(z), as objects and in torchdeq 0.1.0's call form.

`SOLVERS` lists what is registered. A solver is a frozen dataclass: its fields are its hyperparameters, calling
it solves. See `torchdeq.solver.base` for the loop they share.
"""

from torchdeq.solver.affine import AffineSolver
from torchdeq.solver.anderson import Anderson
from torchdeq.solver.base import Solver, SolverLoop
from torchdeq.solver.bicgstab import BiCGSTAB
from torchdeq.solver.broyden import Broyden
from torchdeq.solver.cg import CG, CGNR
from torchdeq.solver.fallback import Fallback
from torchdeq.solver.fp_iter import FixedPointIteration, SimpleFixedPointIteration
from torchdeq.solver.functional import (
    SolverFunction,
    anderson_solver,
    broyden_solver,
    fixed_point_iter,
    get_solver,
    simple_fixed_point_iter,
)
from torchdeq.solver.gmres import GMRES
from torchdeq.solver.maps import AffineMap
from torchdeq.solver.module import SolverModule
from torchdeq.solver.monotone import MonotoneMap
from torchdeq.solver.multisecant import Multisecant
from torchdeq.solver.neumann import Neumann
from torchdeq.solver.newton_cg import NewtonCG
from torchdeq.solver.newton_krylov import NewtonKrylov
from torchdeq.solver.registry import SOLVERS, FunctionSolver, as_solver, register_solver
from torchdeq.solver.rre import RRE
from torchdeq.solver.splitting import ForwardBackward, PeacemanRachford
from torchdeq.solver.squarem import SQUAREM
from torchdeq.solver.stat import SolverStat, solver_stat_from_final_step

__all__ = [
    "CG",
    "CGNR",
    "GMRES",
    "RRE",
    "SOLVERS",
    "SQUAREM",
    "AffineMap",
    "AffineSolver",
    "Anderson",
    "BiCGSTAB",
    "Broyden",
    "Fallback",
    "FixedPointIteration",
    "ForwardBackward",
    "FunctionSolver",
    "MonotoneMap",
    "Multisecant",
    "Neumann",
    "NewtonCG",
    "NewtonKrylov",
    "PeacemanRachford",
    "SimpleFixedPointIteration",
    "Solver",
    "SolverFunction",
    "SolverLoop",
    "SolverModule",
    "SolverStat",
    "anderson_solver",
    "as_solver",
    "broyden_solver",
    "fixed_point_iter",
    "get_solver",
    "register_solver",
    "simple_fixed_point_iter",
    "solver_stat_from_final_step",
]
