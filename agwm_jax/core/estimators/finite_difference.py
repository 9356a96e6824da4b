"""The inner response by a central difference along the outer gradient."""

import jax
import jax.numpy as jnp
import optax

from agwm_jax.core import trees
from agwm_jax.core.estimators.base import Estimate, Hypergradient, stateless
from agwm_jax.core.inner import InnerState, apply_gradient, apply_gradient_vjp, float_leaves, inner_steps
from agwm_jax.core.types import Problem
from agwm_jax.errors import AgwmError


def finite_difference(*, radius: float = 0.1, step_size: float = 1.0, precondition: bool = False) -> Hypergradient:
    """``d_o g - J x`` with ``x = step_size * v`` and ``J x`` by a central difference of ``d_o f``: first-order only.

    ``J x ~ (d_o f(w + e x) - d_o f(w - e x)) / 2e``, ``e = radius / |x|``, at the weights w before the last update of
    the look-ahead, as in DARTS (Liu et al. 2019, arXiv 1806.09055, eq. 7 and 8), whose x is (inner learning rate) * v.
    That x stands for ``B^-1 v`` with B = I / step_size. With `precondition`, ``x = -(d u / d grad)' v`` where u is the
    inner optimiser's own update: for Adam this is SAMA (Choe et al. 2023, arXiv 2310.05674), for plain gradient descent
    DARTS, and for any optimiser it tends to ``unrolled(num_steps=1)`` as `radius` goes to 0.

    Cost k + 3 fb for k inner steps; memory of a plain step and three vectors. The choice where second-order
    differentiation is impossible or too large. Both ends see the same batch, so the same dropout mask: with masks of
    their own the difference is noise.

    Args:
        radius: norm of the step to either side, above 0. The error is O(radius^2) plus rounding / radius;
            DARTS takes 0.01, which on MiniLM in float32 is the rounding's (0.1 and 1 agree with the exact product).
        step_size: factor of v, above 0; with `precondition` the optimiser says it, and 1 changes nothing.
        precondition: take x from the optimiser's update.

    Raises:
        AgwmError: a radius or a step size that is not above 0, or a step size beside `precondition`.
    """
    if not radius > 0:
        raise AgwmError(f"finite_difference(radius={radius}): expected a radius above 0.")
    if not step_size > 0:
        raise AgwmError(f"finite_difference(step_size={step_size}): expected a step size above 0.")
    if precondition and step_size != 1:
        raise AgwmError(
            f"finite_difference(step_size={step_size}, precondition=True): the optimiser's own update sets the scale; "
            "leave step_size out."
        )

    def estimate(problem: Problem, tx: optax.GradientTransformation, inner, outer, inner_batches, outer_batch, state):
        early = jax.tree.map(lambda x: x[:-1], inner_batches)
        last = jax.tree.map(lambda x: x[-1], inner_batches)
        inner, early_losses = inner_steps(problem.inner_loss, tx, inner, outer, early)
        loss, grads = jax.value_and_grad(problem.inner_loss)(inner.params, outer, last)
        after = apply_gradient(tx, inner, grads)
        value, (v, direct) = jax.value_and_grad(problem.outer_loss, argnums=(0, 1))(after.params, outer, outer_batch)
        if precondition:
            cotangent = InnerState(v, optax.tree.zeros_like(float_leaves(after.opt_state)))
            x = trees.scale(-1, apply_gradient_vjp(tx, inner, grads, cotangent)[0])
        else:
            x = trees.scale(step_size, v)

        norm = trees.norm(x)
        e = radius / jnp.where(norm > 0, norm, 1)  # where x = 0 the response is 0, not 0 / 0

        def end(total, sign):
            w = trees.add_scale(inner.params, sign * e, x)
            grads = jax.grad(problem.inner_loss, argnums=1)(w, outer, last)
            return trees.add_scale(total, sign, grads), None

        # A loop, for a compiler that is given both ends at once holds the activations of both.
        difference, _ = jax.lax.scan(end, optax.tree.zeros_like(outer), jnp.array([1.0, -1.0]))
        hypergradient = trees.add_scale(direct, -1 / (2 * e), difference)
        inner_loss = jnp.mean(jnp.append(early_losses, loss))
        return Estimate(hypergradient, after, state, {"inner_loss": inner_loss, "outer_loss": value})

    return Hypergradient(stateless, estimate)
