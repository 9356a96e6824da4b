"""The inner response by a central difference along the outer gradient."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from agwm_jax.core import trees
from agwm_jax.core.adjoint import cotangent_of, update_vjp
from agwm_jax.core.estimators.base import ESTIMATORS, Estimate, Estimator, stateless
from agwm_jax.core.precision import precise
from agwm_jax.core.types import Batch, Vector
from agwm_jax.errors import AgwmError

Precondition = Literal["none", "adjoint", "rms"]
At = Literal["before", "after"]


def rms_scale(
    *, b2: float = 0.999, eps: float = 1e-8, stacked: Callable[[tuple], bool] = lambda path: False
) -> Callable[[Any], Vector]:
    """``scale(opt_state) -> s``, a number a tensor: ``s = sqrt(1 - b2^t) / (sqrt(mean(b2 * nu)) + eps)``.

    nu and t are second moment and step count of the one Adam within an optax state. Its own step divides each entry by
    the root of that entry's second moment; this divides a whole tensor by one root of the mean. Source: `precondition`
    of Betty 0.2.0, whose further factor b2 is kept.

    Args:
        b2: of that Adam.
        eps: likewise.
        stacked: ``stacked(path) -> bool``, for the path of a leaf (`jax.tree_util`): whether its first axis counts
            layers, each of which is a tensor with a number of its own.
    """

    def number(path, nu, count):
        axes = tuple(range(1, nu.ndim)) if stacked(path) else None
        mean = jnp.mean(b2 * nu, axis=axes, keepdims=True)
        return jnp.sqrt(1 - b2 ** count.astype(mean.dtype)) / (jnp.sqrt(mean) + eps)

    def scale(opt_state: Any) -> Vector:
        adams = [x for x in jax.tree.leaves(opt_state, is_leaf=_is_adam) if _is_adam(x)]
        if len(adams) != 1:
            raise AgwmError(
                f"finite_difference(precondition='rms') reads the second moments of the inner optimiser, and its state "
                f"holds those of {len(adams)} Adams: take one optax.adam or adamw as inner optimiser, or "
                "precondition='adjoint', which takes any."
            )
        return jax.tree_util.tree_map_with_path(lambda path, nu: number(path, nu, adams[0].count), adams[0].nu)

    return scale


def _is_adam(state: Any) -> bool:
    return hasattr(state, "nu") and hasattr(state, "count")


@ESTIMATORS.register("finite_difference", cost="k + 3", paper="arXiv 1806.09055, 2310.05674")
def finite_difference(
    *,
    radius: float = 0.1,
    step_size: float = 1.0,
    precondition: Precondition = "none",
    at: At = "before",
    restore: bool = True,
    scale: Callable[[Any], Vector] | None = None,
    renew: Callable[[Batch, Any], Batch] | None = None,
) -> Estimator:
    """``d_o g - J x`` with ``x = step_size * v`` and ``J x`` by a central difference of ``d_o f``: first-order only.

    ``J x ~ (d_o f(w + e x) - d_o f(w - e x)) / 2e``, ``e = radius / |x|``, at the weights w before the last update of
    the look-ahead, as in DARTS (Liu et al. 2019, arXiv 1806.09055, eq. 7 and 8), whose x is (inner learning rate) * v.
    That x stands for ``B^-1 v`` with B = I / step_size. With ``precondition="adjoint"``, ``x = -(d u / d grad)' v``
    where u is the inner optimiser's own update: for Adam this is SAMA (Choe et al. 2023, arXiv 2310.05674), for plain
    gradient descent DARTS, and for any optimiser it tends to ``unrolled(num_steps=1)`` as `radius` goes to 0.

    J is taken for the transpose of the mixed derivative, which it is where the second derivatives of the inner loss are
    symmetric. Where they are not (`hypergrad.check_hvp` tells) take ``unrolled(num_steps=1, hvp="reverse")``, to
    which "adjoint" tends elsewhere; a difference has no transpose.

    Cost k + 3 fb for k inner steps; memory of a plain step and three vectors. The choice where second-order
    differentiation is impossible or too large. Both ends see the same batch, so the same dropout mask: with masks of
    their own the difference is noise. Both are taken at full matrix precision; below float32 it is refused.

    What Betty does differently is there to compare with, and no advice: ``at="after"``; version 0.2.0 also
    ``precondition="rms"`` and ``restore=False``, by a forgotten underscore.

    Args:
        radius: norm of the step to either side, above 0. The error is O(radius^2) plus rounding / radius;
            DARTS takes 0.01, which on MiniLM in float32 is the rounding's (0.1 and 1 agree with the exact product).
        step_size: factor of v, above 0; with "adjoint" the optimiser says it, and 1 changes nothing.
        precondition: none; adjoint takes x from the optimiser's update (SAMA); rms multiplies v by one number a tensor
            from Adam's second moments after the look-ahead, with no learning rate in it, as Betty 0.2.0 does.
        at: the weights that the difference is taken around, before the look-ahead's last update (whose derivative it
            then is) or after it, as Betty does.
        restore: take the weights back to where the look-ahead left them; false leaves them at the lower end of an
            "after" difference, radius down along x, as Betty 0.2.0 does; it shows where the look-ahead is kept.
        scale: for "rms", see `rms_scale`, which is the default: no leaf is stacked.
        renew: ``renew(batch, number) -> batch`` with randomness of its own for end 1 and end 2; None: both ends share
            that of the look-ahead.

    Raises:
        AgwmError: a radius or a step size that is not above 0, or a step size beside "adjoint", or ``restore=False``
            before the look-ahead; at the first trace, an inner loss that computes in less than float32.
    """
    if not radius > 0:
        raise AgwmError(f"finite_difference(radius={radius}): expected a radius above 0.")
    if not step_size > 0:
        raise AgwmError(f"finite_difference(step_size={step_size}): expected a step size above 0.")
    for name, value, known in (("precondition", precondition, Precondition), ("at", at, At)):
        if value not in get_args(known):
            options = ", ".join(map(repr, get_args(known)))
            raise AgwmError(f"finite_difference({name}={value!r}): expected one of {options}.")
    if precondition == "adjoint" and step_size != 1:
        raise AgwmError(
            f"finite_difference(step_size={step_size}, precondition='adjoint'): the optimiser's own update sets the "
            "scale; leave step_size out."
        )
    if not restore and at == "before":
        raise AgwmError(
            "finite_difference(restore=False, at='before'): the weights before the last update are not kept, so none "
            "can be left at an end of the difference; give at='after'."
        )
    scale = rms_scale() if scale is None else scale

    def direction(solve, inner, grads, outer, after, v) -> Vector:
        if precondition == "none":
            return trees.scale(step_size, v)
        update = solve.require_update(f"finite_difference(precondition={precondition!r})")
        if precondition == "rms":
            return jax.tree.map(lambda s, x: (step_size * s * x).astype(x.dtype), scale(after.opt_state), v)
        return trees.scale(
            -1.0,
            update_vjp(
                lambda inner, grads: update(inner, grads, outer), inner, grads, cotangent_of(v, after.opt_state)
            )[0],
        )

    def estimate(problem, solve, inner, outer, inner_batches, outer_batch, state) -> Estimate:
        early, last = (jax.tree.map(lambda x, part=part: x[part], inner_batches) for part in (slice(-1), -1))
        inner, early_losses = solve.run(problem.inner_loss, inner, outer, early)
        loss, grads = jax.value_and_grad(problem.inner_loss)(inner.params, outer, last)
        after = inner if solve.update is None else solve.update(inner, grads, outer)
        value, (v, direct) = jax.value_and_grad(problem.outer_loss, argnums=(0, 1))(after.params, outer, outer_batch)
        x = direction(solve, inner, grads, outer, after, v)
        e = radius / trees.divisor(trees.norm(x))  # where x = 0 the response is 0, not 0 / 0
        middle = inner.params if at == "before" else after.params
        of_outer = jax.grad(problem.inner_loss, argnums=1)
        gradient = precise("finite_difference", lambda w, batch: of_outer(w, outer, batch), middle, last)

        def end(total, side):
            sign, number = side
            batch = last if renew is None else renew(last, number)
            return trees.add_scale(total, sign, gradient.call(trees.add_scale(middle, sign * e, x), batch)), None

        # A loop, for a compiler that is given both ends at once holds the activations of both.
        sides = jnp.array([1.0, -1.0]), jnp.array([1, 2])
        difference, _ = jax.lax.scan(end, optax.tree.zeros_like(outer), sides)
        hypergradient = trees.add_scale(direct, -1 / (2 * e), difference)
        inner_loss = jnp.mean(jnp.append(early_losses, loss))
        if not restore:
            after = after._replace(params=trees.add_scale(middle, -e, x))
        return Estimate(hypergradient, after, state, {"inner_loss": inner_loss, "outer_loss": value})

    return Estimator(stateless, estimate, forward_mode=False)
