"""Approximate solutions of ``H x = b`` where H is known by its products with vectors."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from agwm_jax.errors import AgwmError

Matvec = Callable[[Any], Any]


class LinearSolver(NamedTuple):
    """A rule ``solve(matvec, b) -> x`` on pytrees: x has the structure, shapes and dtypes of b."""

    solve: Callable[[Matvec, Any], Any]


def neumann(*, num_terms: int, step_size: float) -> LinearSolver:
    r"""Truncated Neumann series, ``x = eta * sum_{k < K} (I - eta H)^k b``: exactly K terms, K - 1 products.

    Converges to ``H^-1 b`` where every eigenvalue of H is in (0, 2 / eta) and diverges otherwise; at the inner optimum
    it equals reverse mode through the last K gradient steps of size eta (Lorraine et al. 2020, arXiv 1911.02590,
    theorem 2).

    Args:
        num_terms: K, 1 or more; one term is ``eta * b``.
        step_size: eta, above 0; below 2 / (largest eigenvalue of H) for convergence.

    Raises:
        AgwmError: ``num_terms`` below 1 or ``step_size`` not above 0.
    """
    if num_terms < 1:
        raise AgwmError(f"neumann(num_terms={num_terms}): expected 1 term or more.")
    if not step_size > 0:
        raise AgwmError(f"neumann(step_size={step_size}): expected a step size above 0.")

    def solve(matvec: Matvec, b):
        # Richardson's iteration x <- x + eta (b - H x) adds one term a step and keeps one vector, not two.
        def add_term(x, _):
            return jax.tree.map(lambda xi, bi, hi: xi + step_size * (bi - hi), x, b, matvec(x)), None

        first = jax.tree.map(lambda bi: step_size * bi, b)
        return jax.lax.scan(add_term, first, length=num_terms - 1)[0]

    return LinearSolver(solve)


def dense() -> LinearSolver:
    """Exact: writes H out, one product a column, and factorises it. For tests and small problems."""

    def solve(matvec: Matvec, b):
        flat, unravel = ravel_pytree(b)
        columns = jax.vmap(lambda column: ravel_pytree(matvec(unravel(column)))[0])(
            jnp.eye(flat.size, dtype=flat.dtype)
        )
        return unravel(jnp.linalg.solve(columns.T, flat))

    return LinearSolver(solve)
