"""Approximate solutions of ``B x = b`` where B is known by its products with vectors; one file a solver."""

from agwm_jax.core.solvers.base import SOLVERS as SOLVERS
from agwm_jax.core.solvers.base import LinearSolver as LinearSolver
from agwm_jax.core.solvers.base import Matvec as Matvec
from agwm_jax.core.solvers.base import Solution as Solution
