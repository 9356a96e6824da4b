"""Nystrom's low-rank approximation of the matrix, inverted by Woodbury's formula."""

import jax
import jax.numpy as jnp
import optax

from agwm_jax.core import trees
from agwm_jax.core.solvers.base import SOLVERS, LinearSolver, Matvec, Solution
from agwm_jax.core.types import Vector
from agwm_jax.errors import AgwmError


@SOLVERS.register("nystrom", cost="rank products", paper="arXiv 2302.09726")
def nystrom(*, rank: int = 5, rho: float = 1.0, seed: int = 0) -> LinearSolver:
    """``(B_r + rho I)^-1 b`` with a random rank-r approximation of B: r products, each solve a new draw.

    ``B_r = Y (Q' Y)^+ Y'``, ``Y = B Q``, Q [n, r] Gaussian and, where r is near n, orthonormalised. The paper samples
    columns of B (Q of unit vectors; Hataya and Yamada 2023, arXiv 2302.09726); a Gaussian sketch needs as many products
    and does not miss a curvature that lies in few weights, such as the embeddings of one batch's words. The share of b
    outside the sketch is divided by rho, as by a one-term Neumann series with step 1 / rho: take a rank above the
    number of large eigenvalues (a batch of b texts has b or so) or a rho of the size of those that are left out.
    Memory: 3r vectors, whose algebra on a CPU outweighs the products.

    Args:
        rank: r, from 1 to the number of weights.
        rho: above 0; the curvature that unseen directions are taken to have. The relative error in float32 is about
            1e-6 times the largest eigenvalue over rho.
        seed: of the draws.

    Raises:
        AgwmError: ``rank`` below 1 or, at the first trace, above the number of weights; ``rho`` not above 0.
    """
    if not isinstance(rank, int) or rank < 1:
        raise AgwmError(f"nystrom(rank={rank}): expected a rank of 1 or more.")
    if not rho > 0:
        raise AgwmError(f"nystrom(rho={rho}): expected a rho above 0.")

    def init(like: Vector):
        size = sum(x.size for x in jax.tree.leaves(like))
        if rank > size:
            raise AgwmError(f"nystrom(rank={rank}): the inner variable has {size} entries; lower the rank.")
        return jnp.zeros((), jnp.int32)  # solves so far: plain numbers are what a checkpoint can hold

    def solve(matvec: Matvec, b: Vector, state) -> Solution:
        key = jax.random.fold_in(jax.random.key(seed), state)
        s = jax.vmap(lambda i: optax.tree.random_like(jax.random.fold_in(key, i), b))(jnp.arange(rank))
        # Few Gaussian vectors in many dimensions are orthogonal as they are; else Gram-Schmidt by Cholesky's factor, of
        # which the second pass removes the rounding of the first.
        for _ in range(2 if 10 * rank > sum(x.size for x in jax.tree.leaves(b)) else 0):
            factor = jnp.linalg.cholesky(trees.inner_products(s, s))
            s = trees.combine(jnp.linalg.inv(factor), s)
        y = jax.lax.map(lambda column: matvec(column[1], column[0]), (jnp.arange(rank), s))
        core = trees.inner_products(s, y)
        values, vectors = jnp.linalg.eigh((core + core.T) / 2)
        size = jnp.abs(values)
        kept = size > rank * jnp.finfo(values.dtype).eps * jnp.max(size)
        z = trees.combine(jnp.where(kept, 1 / jnp.sqrt(trees.divisor(size)), 0)[:, None] * vectors.T, y)
        # B_r = z' D z with the signs D of the eigenvalues, and by Woodbury's formula
        # (z' D z + rho I)^-1 b = (b - z' (z z' + rho D)^-1 z b) / rho.
        system = trees.inner_products(z, z) + rho * jnp.diag(jnp.where(values < 0, -1.0, 1.0))
        weights = jnp.linalg.solve(system, trees.inner_products(z, jax.tree.map(lambda x: x[None], b)))
        seen = jax.tree.map(lambda x: x[0], trees.combine(weights.T, z))
        return Solution(trees.scale(1 / rho, optax.tree.sub(b, seen)), state + 1, {})

    return LinearSolver(init, solve)
