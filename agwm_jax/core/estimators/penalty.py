"""The fully first-order estimator: two inner copies and a penalty."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from agwm_jax.core import trees
from agwm_jax.core.estimators.base import Estimate, Hypergradient
from agwm_jax.core.inner import InnerState, apply_gradient, inner_steps
from agwm_jax.core.types import Problem, Scalar
from agwm_jax.errors import AgwmError


class PenaltyState(NamedTuple):
    """What `penalty` carries."""

    copy: InnerState
    """The inner copy y that feels the outer loss too."""
    num_steps: Any
    """Outer steps taken, an int32 scalar: the weight grows with them."""


def penalty(*, weight: float, growth: float = 0.0) -> Hypergradient:
    """``d_o g(y) + lambda (d_o f(y) - d_o f(z))`` with z ~ argmin f and y ~ argmin f + g / lambda: F2SA.

    z is the inner variable itself; the copy y is carried from one outer step to the next and takes as many steps, with
    the same optimiser, on ``f + g / lambda``. No second derivative of anything. At the optimum of both, the error is
    O(1 / lambda): ``z - y = H^-1 v / lambda`` to first order (Kwon et al. 2023, arXiv 2301.10945). `lambda` is
    `weight` at the first outer step and grows by `growth` with every one.

    Cost 3k + 3 fb for k inner steps; 3k more with ``rollback=True``, where y is taken back too. Memory of a plain step
    and of a second inner state. The choice where second-order products are out of reach and the inner problem is
    followed closely: the response is lambda times a difference of gradients, which is noise where y and z have drifted
    apart for other reasons (an optimiser by signs, a lambda that is too large for the dtype: the relative error of a
    gradient is multiplied by lambda). `outer_loss` in info is that of y; info also has ``penalty_weight``.

    Args:
        weight: lambda at the start, above 0.
        growth: added to lambda at every outer step, 0 or more.

    Raises:
        AgwmError: a weight that is not above 0, or a negative growth.
    """
    if not weight > 0:
        raise AgwmError(f"penalty(weight={weight}): expected a weight above 0.")
    if not growth >= 0:
        raise AgwmError(f"penalty(growth={growth}): expected a growth of 0 or more.")

    def strength(num_steps) -> Scalar:
        return weight + growth * num_steps.astype(jnp.result_type(float))

    def copy_steps(problem: Problem, tx, state: PenaltyState, outer, inner_batches, outer_batch) -> PenaltyState:
        """As many steps of y on ``f + g / lambda``, the two gradients one after the other."""
        share = 1 / strength(state.num_steps)

        def step(copy: InnerState, batch):
            grads = jax.grad(problem.inner_loss)(copy.params, outer, batch)
            pull = jax.grad(problem.outer_loss)(trees.after(copy.params, grads), outer, outer_batch)
            return apply_gradient(tx, copy, trees.add_scale(grads, share, pull)), None

        copy, _ = jax.lax.scan(step, state.copy, inner_batches)
        return PenaltyState(copy, state.num_steps + 1)

    def estimate(problem: Problem, tx: optax.GradientTransformation, inner, outer, inner_batches, outer_batch, state):
        inner, losses = inner_steps(problem.inner_loss, tx, inner, outer, inner_batches)
        after = copy_steps(problem, tx, state, outer, inner_batches, outer_batch)
        y, last = after.copy.params, jax.tree.map(lambda x: x[-1], inner_batches)
        value, direct = jax.value_and_grad(problem.outer_loss, argnums=1)(y, outer, outer_batch)
        at_copy = jax.grad(problem.inner_loss, argnums=1)(trees.after(y, direct), outer, last)
        at_inner = jax.grad(problem.inner_loss, argnums=1)(trees.after(inner.params, at_copy), outer, last)
        lam = strength(state.num_steps)
        hypergradient = trees.add_scale(direct, lam, optax.tree.sub(at_copy, at_inner))
        info = {"inner_loss": jnp.mean(losses), "outer_loss": value, "penalty_weight": lam}
        return Estimate(hypergradient, inner, after, info)

    def init(inner: InnerState, outer) -> PenaltyState:
        del outer
        return PenaltyState(jax.tree.map(lambda x: jnp.array(x, copy=True), inner), jnp.zeros((), jnp.int32))

    return Hypergradient(init, estimate, rollback=copy_steps)
