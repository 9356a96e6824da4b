"""The direct term alone."""

import jax
import jax.numpy as jnp

from agwm_jax.core.estimators.base import ESTIMATORS, Estimate, Estimator, stateless


@ESTIMATORS.register("first_order", cost="k + 1", paper="arXiv 1806.09055")
def first_order() -> Estimator:
    """The direct term ``d_o g`` alone, after the inner solve: x = 0.

    Cost k + 1 fb for k inner steps; memory of a plain step. Right where the outer variable acts on g mostly directly;
    blind to the inner response. The first-order variant of DARTS (Liu et al. 2019, arXiv 1806.09055).
    """

    def estimate(problem, solve, inner, outer, inner_batches, outer_batch, state) -> Estimate:
        inner, losses = solve.run(problem.inner_loss, inner, outer, inner_batches)
        value, hypergradient = jax.value_and_grad(problem.outer_loss, argnums=1)(inner.params, outer, outer_batch)
        return Estimate(hypergradient, inner, state, {"inner_loss": jnp.mean(losses), "outer_loss": value})

    return Estimator(stateless, estimate, forward_mode=False)
