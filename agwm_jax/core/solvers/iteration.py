"""What the iterative solvers share: a loop, steps along the residual, and a step size that finds itself."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from agwm_jax.core import trees
from agwm_jax.core.solvers.base import Matvec, stateless
from agwm_jax.core.types import Info, Vector
from agwm_jax.errors import AgwmError

T = TypeVar("T")

StepSize = float | Literal["auto"]


class StepRule(NamedTuple):
    """How a step size comes about."""

    init: Callable[[Vector], PyTree]
    find: Callable[[Matvec, Vector, Any], tuple[Any, PyTree, Info]]
    """``find(matvec, b, state) -> (step_size, state, info)``."""


def step_rule(name: str, step_size: StepSize, power_iterations: int) -> StepRule:
    """A given step size, or 1 / (largest eigenvalue in size) by power iterations whose direction is carried."""
    if step_size != "auto":
        if isinstance(step_size, str) or not step_size > 0:
            raise AgwmError(f"{name}(step_size={step_size!r}): expected a step size above 0, or 'auto'.")
        return StepRule(stateless, lambda matvec, b, state: (step_size, state, {}))
    if not isinstance(power_iterations, int) or power_iterations < 1:
        raise AgwmError(f"{name}(power_iterations={power_iterations}): expected 1 or more.")

    def find(matvec: Matvec, b: Vector, state):
        def iterate(q, i):
            return matvec(trees.scale(1 / trees.divisor(trees.norm(q)), q), i)

        # At the first solve there is no direction yet; b lies where the curvature is, a random one hardly does.
        seen = trees.norm(state) > 0
        start = jax.tree.map(lambda q, bi: jnp.where(seen, q, bi), state, b)
        q = repeat(iterate, start, power_iterations)
        largest = trees.norm(q)
        eta = jnp.where(largest == 0, 0, 1 / trees.divisor(largest))
        return eta, q, {"step_size": eta}

    return StepRule(optax.tree.zeros_like, find)


def richardson(matvec: Matvec, b: Vector, x: Vector, eta: Any, num_steps: int) -> Vector:
    """``x <- x + eta (b - B x)``: from ``eta b`` each step adds one term of Neumann's series, and keeps one vector."""

    def step(x, i):
        new = jax.tree.map(lambda xi, bi, hi: xi + jnp.asarray(eta, xi.dtype) * (bi - hi), x, b, matvec(x, i))
        moves = jnp.isfinite(trees.dot(new, new))  # a series that diverges ends in the huge, not in inf - inf
        return jax.tree.map(lambda xi, old: jnp.where(moves, xi, old), new, x)

    return repeat(step, x, num_steps)


def repeat(step: Callable[[T, Any], T], carry: T, count: int) -> T:
    """``carry = step(carry, i)`` for i from 0 to `count` - 1."""
    # No scan: mapped over lanes, that moves the lanes of all that `step` closes over to the front, and what was
    # linearised once, which has the layers there, would be copied (2 lanes of `neumann` took 2.8 times one's memory).
    return jax.lax.while_loop(
        lambda loop: loop[0] < count, lambda loop: (loop[0] + 1, step(loop[1], loop[0])), (0, carry)
    )[1]
