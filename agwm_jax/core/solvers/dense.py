"""The exact solution of a system that is small enough to write out."""

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from agwm_jax.core.solvers.base import SOLVERS, LinearSolver, Matvec, Solution, stateless
from agwm_jax.core.types import Vector


@SOLVERS.register("dense", cost="as many products as weights", paper="arXiv 1602.02355")
def dense() -> LinearSolver:
    """Exact: writes B out, one product a column, and factorises it; for tests and small problems."""

    def solve(matvec: Matvec, b: Vector, state) -> Solution:
        flat, unravel = ravel_pytree(b)
        columns = jax.vmap(lambda column: ravel_pytree(matvec(unravel(column), 0))[0])(
            jnp.eye(flat.size, dtype=flat.dtype)
        )
        wide = jnp.promote_types(flat.dtype, jnp.float32)
        x = jnp.linalg.solve(columns.T.astype(wide), flat.astype(wide))
        return Solution(unravel(x.astype(flat.dtype)), state, {})

    return LinearSolver(stateless, solve)
