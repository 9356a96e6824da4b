"""The fully first-order estimator: two inner copies and a penalty."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from agwm_jax.core import trees
from agwm_jax.core.estimators.base import ESTIMATORS, Estimate, Estimator
from agwm_jax.core.inner import InnerState
from agwm_jax.core.precision import precise
from agwm_jax.core.types import Scalar, Vector
from agwm_jax.errors import AgwmError


class PenaltyState(NamedTuple):
    """What `penalty` carries."""

    copy: InnerState
    """The inner copy y that feels the outer loss too."""
    num_steps: Int[Array, ""]
    """Outer steps taken: the weight grows with them."""


@ESTIMATORS.register("penalty", cost="3k + 3", paper="arXiv 2301.10945")
def penalty(*, weight: float = 10.0, growth: float = 0.0) -> Estimator:
    """``d_o g(y) + lambda (d_o f(y) - d_o f(z))`` with z ~ argmin f and y ~ argmin f + g / lambda: F2SA.

    z is the inner variable itself; the copy y is carried from one outer step to the next and takes as many steps, with
    the same optimiser, on ``f + g / lambda``. No second derivative of anything. At the optimum of both, the error is
    O(1 / lambda): ``z - y = H^-1 v / lambda`` to first order (Kwon et al. 2023, arXiv 2301.10945). `lambda` is
    `weight` at the first outer step and grows by `growth` with every one.

    Cost 3k + 3 fb for k inner steps; 3k more with ``rollback=True``, where y is taken back too. Memory of a plain step
    and of a second inner state. The choice where second-order products are out of reach and the inner problem is
    followed closely: the response is lambda times a difference of gradients, which is noise where y and z have drifted
    apart for other reasons (an optimiser by signs, a lambda that is too large for the dtype: the relative error of a
    gradient is multiplied by lambda); so both are taken at full matrix precision, and below float32 it is refused.
    `outer_loss` in info is that of y; info also has ``penalty_weight``.

    Args:
        weight: lambda at the start, above 0.
        growth: added to lambda at every outer step, 0 or more.

    Raises:
        AgwmError: a weight that is not above 0, or a negative growth; at the first trace, an inner loss that computes
            in less than float32, or a solve without steps.
    """
    if not weight > 0:
        raise AgwmError(f"penalty(weight={weight}): expected a weight above 0.")
    if not growth >= 0:
        raise AgwmError(f"penalty(growth={growth}): expected a growth of 0 or more.")

    def strength(num_steps: Int[Array, ""]) -> Scalar:
        return weight + growth * num_steps.astype(jnp.result_type(float))

    def copy_steps(problem, solve, state: PenaltyState, outer, inner_batches, outer_batch) -> PenaltyState:
        """As many steps of y on ``f + g / lambda``, the two gradients one after the other."""
        update = solve.require_update("penalty")
        share = 1 / strength(state.num_steps)

        def step(copy: InnerState, batch):
            grads = jax.grad(problem.inner_loss)(copy.params, outer, batch)
            pull = jax.grad(problem.outer_loss)(trees.after(copy.params, grads), outer, outer_batch)
            return update(copy, trees.add_scale(grads, share, pull), outer), None

        copy, _ = jax.lax.scan(step, state.copy, inner_batches)
        return PenaltyState(copy, state.num_steps + 1)

    def estimate(problem, solve, inner, outer, inner_batches, outer_batch, state) -> Estimate:
        inner, losses = solve.run(problem.inner_loss, inner, outer, inner_batches)
        after = copy_steps(problem, solve, state, outer, inner_batches, outer_batch)
        y, last = after.copy.params, jax.tree.map(lambda x: x[-1], inner_batches)
        value, direct = jax.value_and_grad(problem.outer_loss, argnums=1)(y, outer, outer_batch)
        of_outer = jax.grad(problem.inner_loss, argnums=1)
        gradient = precise("penalty", lambda w: of_outer(w, outer, last), y)
        at_copy = gradient.call(trees.after(y, direct))
        at_inner = gradient.call(trees.after(inner.params, at_copy))
        lam = strength(state.num_steps)
        hypergradient = trees.add_scale(direct, lam, optax.tree.sub(at_copy, at_inner))
        info = {"inner_loss": jnp.mean(losses), "outer_loss": value, "penalty_weight": lam}
        return Estimate(hypergradient, inner, after, info)

    def init(inner: InnerState, outer: Vector) -> PenaltyState:
        del outer
        return PenaltyState(jax.tree.map(lambda x: jnp.array(x, copy=True), inner), jnp.zeros((), jnp.int32))

    return Estimator(init, estimate, forward_mode=False, retake=copy_steps)
