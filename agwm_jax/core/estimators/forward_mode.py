"""Forward mode through the inner updates: a tangent of the weights for every number of the outer variable."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from agwm_jax.core.adjoint import float_leaves, update_jvp
from agwm_jax.core.estimators.base import ESTIMATORS, Estimate, Estimator, stateless
from agwm_jax.core.inner import InnerState
from agwm_jax.core.types import Vector
from agwm_jax.errors import AgwmError


@ESTIMATORS.register("forward_mode", cost="k (2n + 1) + 1", paper="arXiv 1703.01785, 2007.07869, 2406.14095")
def forward_mode(*, directions: int | None = None, limit: int = 32, seed: int = 0) -> Estimator:
    """Forward mode through all k updates of the look-ahead, the optimiser itself included.

    The tangents ``dw / do`` are carried along the steps: ``dw' = dw + du (H dw + J do)``. Nothing of a step is kept for
    later, so memory does not grow with k: n + 1 times the weights and their optimiser's state, however long the
    training. For a few outer numbers, such as learning rates, strengths of penalties or the gates of layers.

    Exact with a tangent for each of the n numbers (Franceschi et al. 2017, arXiv 1703.01785; over long horizons:
    Micaelli and Storkey 2021, arXiv 2007.07869), also where the joint Hessian is not symmetric. With `directions`, m
    random ones u of signs stand for them: ``d_o g + 1/m sum <d_w g, dw u> u``, whose mean is the exact one and whose
    variance falls as 1 / m and grows with n (Shen et al. 2024, arXiv 2406.14095).

    Cost k (2n + 1) + 1 fb, with m in place of n for random directions. The derivative of an update where a root has
    none is that of `unrolled`.

    Args:
        directions: m random ones drawn anew at each outer step; None: all n, exactly.
        limit: most tangents at once.
        seed: of the random directions.

    Raises:
        AgwmError: `directions` or `limit` below 1, or at the first trace more tangents than `limit`.
    """
    for name, value in (("directions", 1 if directions is None else directions), ("limit", limit)):
        if value < 1:
            raise AgwmError(f"forward_mode({name}={value}): expected 1 or more.")

    def init(inner: InnerState, outer: Vector) -> Any:
        return stateless(inner, outer) if directions is None else jnp.int32(0)

    def estimate(problem, solve, inner, outer, inner_batches, outer_batch, state) -> Estimate:
        update = solve.require_update("forward_mode")
        flat, unravel = ravel_pytree(outer)
        count = flat.size if directions is None else directions
        if count > limit:
            raise AgwmError(
                f"forward_mode carries a copy of the weights for each of {count} "
                f"{'outer numbers' if directions is None else 'directions'}, and its limit is {limit}: say directions "
                "for an estimate by random ones, take unrolled, or raise limit."
            )
        if directions is None:
            rows = weights = jnp.eye(count, dtype=flat.dtype)
        else:
            key = jax.random.fold_in(jax.random.key(seed), state)
            rows, state = jax.random.rademacher(key, (count, flat.size), flat.dtype), state + 1
            weights = rows / count
        along = jax.vmap(unravel)(rows)

        def step(carry, batch):
            inner, tangents = carry

            def gradient(params, outer):
                return jax.value_and_grad(problem.inner_loss)(params, outer, batch)

            (loss, grads), push = jax.linearize(gradient, inner.params, outer)
            both = grads, outer
            move = update_jvp(lambda inner, both: update(inner, *both), inner, both)

            def moved(tangent, along):
                _, of_grads = push(tangent.params, along)
                return move(tangent, (of_grads, along))

            return (update(inner, grads, outer), jax.vmap(moved)(tangents, along)), loss

        start = InnerState(inner.params, float_leaves(inner.opt_state))
        tangents = jax.tree.map(lambda x: jnp.zeros((count, *jnp.shape(x)), jnp.result_type(x)), start)
        (inner, tangents), losses = jax.lax.scan(step, (inner, tangents), inner_batches)
        value, (v, direct) = jax.value_and_grad(problem.outer_loss, argnums=(0, 1))(inner.params, outer, outer_batch)
        response = jax.vmap(lambda dw: optax.tree.vdot(v, dw))(tangents.params).astype(flat.dtype)
        through = unravel(response @ weights)
        info = {"inner_loss": jnp.mean(losses), "outer_loss": value}
        return Estimate(optax.tree.add(direct, through), inner, state, info)

    return Estimator(init, estimate, forward_mode=True, through_optimizer=True)
