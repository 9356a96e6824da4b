"""Reverse mode through the inner updates."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from agwm_jax.core import curvature, reverse
from agwm_jax.core.adjoint import cotangent_of, update_vjp
from agwm_jax.core.curvature import Hvp
from agwm_jax.core.estimators.base import ESTIMATORS, Estimate, Estimator, stateless
from agwm_jax.core.inner import InnerState
from agwm_jax.core.scan import scan_keeping
from agwm_jax.errors import AgwmError


def _fits(num_steps: int | None, inner_steps: int) -> None:
    if num_steps is not None and num_steps > inner_steps:
        raise AgwmError(
            f"unrolled(num_steps={num_steps}): the look-ahead has {inner_steps} inner steps; lower num_steps."
        )


def _check(settings: Any, *, inner_steps: int) -> None:
    _fits(settings.num_steps, inner_steps)
    if settings.states is not None:
        reverse.strides(settings.num_steps or inner_steps, settings.states)


@ESTIMATORS.register("unrolled", cost="3k + 1", paper="arXiv 1703.01785, 2505.00793", check=_check)
def unrolled(*, num_steps: int | None = None, hvp: Hvp = "linearize", states: int | None = None) -> Estimator:
    """Reverse mode through the last k updates of the look-ahead, the optimiser itself included.

    The adjoint y of the weights goes back through each update ``w' = w + u(d_w f(w, o))``: through u by reverse mode,
    through the gradient by forward over reverse, which serves because the joint Hessian is symmetric (where it is not,
    see `agwm_jax.core.curvature.Hvp`, take ``hvp="reverse"``): one product gives both ``H p`` for the adjoint and
    ``J p`` for the hypergradient (Kemaev et al. 2025, arXiv 2505.00793). So what is kept for a step is its weights, its
    optimiser's state and its gradient, and with ``hvp="linearize"`` the linearisation of its gradient (activations of
    the forward and backward pass, mixed weights; what all steps share, such as gates, once); never the graph of an
    optimiser's derivative. For many steps of a large model take ``"jvp"``.

    Cost 3k + 1 fb with ``hvp="linearize"`` and ``"reverse"``; 4k + 1 with ``"jvp"``, which recomputes each step
    (rematerialisation) and keeps no activations; 2k + 1 with ``"finite_difference"``. Earlier steps of the
    look-ahead cost 1 each.

    Exact for what the look-ahead really does, and the right default: it needs no convergence and no step size
    (Franceschi et al. 2017, arXiv 1703.01785; truncated: Shaban et al. 2019, arXiv 1810.10667). Adam's first step is
    ``sign(g)``, which has derivative 0: only the direct term is left there, as it is at every step of an optimiser by
    signs, such as Lion.

    Args:
        num_steps: k; all steps of the look-ahead by default.
        hvp: how the products are taken, see `agwm_jax.core.curvature.Hvp`.
        states: how many states of the inner optimiser may be kept, for whole trainings of hundreds or thousands of
            steps; None: all k, and the linearisations of all k. Else one linearisation is kept at a time, and each
            step is evaluated again: once from k states on, twice from ``2 sqrt(k)`` on, L times from ``L k^(1/L)`` on
            (1 fb each), down to ``2 log2 k`` states. The same hypergradient.

    Raises:
        AgwmError: `num_steps` below 1, or at the first trace more than the look-ahead has; fewer `states` than are
            needed.
    """
    for name, value in (("num_steps", num_steps), ("states", states)):
        if value is not None and value < 1:
            raise AgwmError(f"unrolled({name}={value}): expected 1 {name.removeprefix('num_')[:-1]} or more.")
    curvature.check("unrolled", hvp)

    def estimate(problem, solve, inner, outer, inner_batches, outer_batch, state) -> Estimate:
        update = solve.require_update("unrolled")
        total = jax.tree.leaves(inner_batches)[0].shape[0]
        _fits(num_steps, total)
        first = 0 if num_steps is None else total - num_steps
        early, late = (
            jax.tree.map(lambda x, part=part: x[part], inner_batches) for part in (slice(first), slice(first, None))
        )
        inner, early_losses = solve.run(problem.inner_loss, inner, outer, early)

        def forward(inner: InnerState, batch):
            loss, grads, saved = curvature.linearize(problem.inner_loss, inner.params, outer, batch, hvp)
            return update(inner, grads, outer), (loss, (inner, grads, saved))

        def backward(adjoint, kept, batch):
            """Through one step: of the optimiser first, then of the gradient that it was given."""
            cotangent, hypergradient = adjoint
            inner, grads, saved = kept
            if solve.reads_outer:
                both = grads, outer
                (of_grads, of_outer), cotangent = update_vjp(lambda x, both: update(x, *both), inner, both, cotangent)
                hypergradient = optax.tree.add(hypergradient, of_outer)
            else:
                of_grads, cotangent = update_vjp(lambda x, grads: update(x, grads, outer), inner, grads, cotangent)
            hp, jp = curvature.product(problem.inner_loss, inner.params, outer, batch, saved, of_grads, hvp)
            cotangent = InnerState(optax.tree.add(cotangent.params, hp), cotangent.opt_state)
            return cotangent, optax.tree.add(hypergradient, jp)

        def keeping_all():
            steps = scan_keeping(forward, inner, late)

            def back(adjoint):
                def one(adjoint, step):
                    stack, batch = step
                    return backward(adjoint, steps.restore(stack, batch), batch), None

                return jax.lax.scan(one, adjoint, (steps.stack, late), reverse=True)[0]

            return steps.carry, steps.ys, back

        def keeping_few(states: int):
            count = total - first

            def batch_of(i):
                return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), late)

            def plain(inner: InnerState, i) -> tuple[InnerState, Any]:
                loss, grads = jax.value_and_grad(problem.inner_loss)(inner.params, outer, batch_of(i))
                return update(inner, grads, outer), loss

            def plain_summing(carry, i):
                inner, loss = plain(carry[0], i)
                return inner, carry[1] + loss

            def through(adjoint, carry, i):
                _, (_, kept) = forward(carry[0], batch_of(i))
                return backward(adjoint, kept, batch_of(i))

            loss = jax.eval_shape(plain, inner, 0)[1]
            start = inner, jnp.zeros(loss.shape, loss.dtype)
            (after, sum_), kept = reverse.run(plain_summing, start, count, states)
            mean = jnp.full(count, sum_ / count)

            def back(adjoint):
                return reverse.back(plain_summing, through, kept, adjoint, count, states)

            return after, mean, back

        after, late_losses, back = keeping_all() if states is None else keeping_few(states)
        value, (v, direct) = jax.value_and_grad(problem.outer_loss, argnums=(0, 1))(after.params, outer, outer_batch)
        _, hypergradient = back((cotangent_of(v, after.opt_state), direct))
        inner_loss = jnp.mean(jnp.concatenate([early_losses, late_losses]))
        return Estimate(hypergradient, after, state, {"inner_loss": inner_loss, "outer_loss": value})

    return Estimator(stateless, estimate, forward_mode=hvp != "finite_difference", through_optimizer=True)
