"""The direct term alone."""

import jax
import jax.numpy as jnp
import optax

from agwm_jax.core.estimators.base import Estimate, Hypergradient, stateless
from agwm_jax.core.inner import inner_steps
from agwm_jax.core.types import Problem


def first_order() -> Hypergradient:
    """The direct term ``d_o g`` alone, after the look-ahead: x = 0.

    Cost k + 1 fb for k inner steps; memory of a plain step. Right where the outer variable acts on g mostly directly;
    blind to the inner response. The first-order variant of DARTS (Liu et al. 2019, arXiv 1806.09055).
    """

    def estimate(problem: Problem, tx: optax.GradientTransformation, inner, outer, inner_batches, outer_batch, state):
        inner, losses = inner_steps(problem.inner_loss, tx, inner, outer, inner_batches)
        value, hypergradient = jax.value_and_grad(problem.outer_loss, argnums=1)(inner.params, outer, outer_batch)
        return Estimate(hypergradient, inner, state, {"inner_loss": jnp.mean(losses), "outer_loss": value})

    return Hypergradient(stateless, estimate)
