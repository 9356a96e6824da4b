"""Solvers of the linear system of `agwm_jax.hypergrad.implicit`."""

from agwm_jax.core.solvers.base import SOLVERS as SOLVERS
from agwm_jax.core.solvers.base import LinearSolver as LinearSolver
from agwm_jax.core.solvers.base import Matvec as Matvec
from agwm_jax.core.solvers.base import Solution as Solution
from agwm_jax.core.solvers.conjugate_gradient import conjugate_gradient as conjugate_gradient
from agwm_jax.core.solvers.dense import dense as dense
from agwm_jax.core.solvers.gradient_descent import gradient_descent as gradient_descent
from agwm_jax.core.solvers.neumann import neumann as neumann
from agwm_jax.core.solvers.nystrom import nystrom as nystrom
