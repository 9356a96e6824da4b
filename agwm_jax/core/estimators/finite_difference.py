"""The inner response by a central difference along the outer gradient."""

import jax
import jax.numpy as jnp
import optax

from agwm_jax.core import trees
from agwm_jax.core.adjoint import cotangent_of, update_vjp
from agwm_jax.core.estimators.base import ESTIMATORS, Estimate, Estimator, stateless
from agwm_jax.core.precision import precise
from agwm_jax.errors import AgwmError


@ESTIMATORS.register("finite_difference", cost="k + 3", paper="arXiv 1806.09055, 2310.05674")
def finite_difference(*, radius: float = 0.1, step_size: float = 1.0, precondition: bool = False) -> Estimator:
    """``d_o g - J x`` with ``x = step_size * v`` and ``J x`` by a central difference of ``d_o f``: first-order only.

    ``J x ~ (d_o f(w + e x) - d_o f(w - e x)) / 2e``, ``e = radius / |x|``, at the weights w before the last update of
    the look-ahead, as in DARTS (Liu et al. 2019, arXiv 1806.09055, eq. 7 and 8), whose x is (inner learning rate) * v.
    That x stands for ``B^-1 v`` with B = I / step_size. With `precondition`, ``x = -(d u / d grad)' v`` where u is the
    inner optimiser's own update: for Adam this is SAMA (Choe et al. 2023, arXiv 2310.05674), for plain gradient descent
    DARTS, and for any optimiser it tends to ``unrolled(num_steps=1)`` as `radius` goes to 0.

    Cost k + 3 fb for k inner steps; memory of a plain step and three vectors. The choice where second-order
    differentiation is impossible or too large. Both ends see the same batch, so the same dropout mask: with masks of
    their own the difference is noise. Both are taken at full matrix precision; below float32 it is refused.

    Args:
        radius: norm of the step to either side, above 0. The error is O(radius^2) plus rounding / radius;
            DARTS takes 0.01, which on MiniLM in float32 is the rounding's (0.1 and 1 agree with the exact product).
        step_size: factor of v, above 0; with `precondition` the optimiser says it, and 1 changes nothing.
        precondition: take x from the optimiser's update.

    Raises:
        AgwmError: a radius or a step size that is not above 0, or a step size beside `precondition`; at the first
            trace, an inner loss that computes in less than float32.
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

    def estimate(problem, solve, inner, outer, inner_batches, outer_batch, state) -> Estimate:
        early, last = (jax.tree.map(lambda x, part=part: x[part], inner_batches) for part in (slice(-1), -1))
        inner, early_losses = solve.run(problem.inner_loss, inner, outer, early)
        loss, grads = jax.value_and_grad(problem.inner_loss)(inner.params, outer, last)
        after = inner if solve.update is None else solve.update(inner, grads)
        value, (v, direct) = jax.value_and_grad(problem.outer_loss, argnums=(0, 1))(after.params, outer, outer_batch)
        if precondition:
            update = solve.require_update("finite_difference(precondition=True)")
            x = trees.scale(-1.0, update_vjp(update, inner, grads, cotangent_of(v, after.opt_state))[0])
        else:
            x = trees.scale(step_size, v)
        e = radius / trees.divisor(trees.norm(x))  # where x = 0 the response is 0, not 0 / 0
        of_outer = jax.grad(problem.inner_loss, argnums=1)
        gradient = precise("finite_difference", lambda w: of_outer(w, outer, last), inner.params)

        def end(total, sign):
            return trees.add_scale(total, sign, gradient.call(trees.add_scale(inner.params, sign * e, x))), None

        # A loop, for a compiler that is given both ends at once holds the activations of both.
        difference, _ = jax.lax.scan(end, optax.tree.zeros_like(outer), jnp.array([1.0, -1.0]))
        hypergradient = trees.add_scale(direct, -1 / (2 * e), difference)
        inner_loss = jnp.mean(jnp.append(early_losses, loss))
        return Estimate(hypergradient, after, state, {"inner_loss": inner_loss, "outer_loss": value})

    return Estimator(stateless, estimate, forward_mode=False)
