"""Reverse mode through the inner updates."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from agwm_jax.core import curvature
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


@ESTIMATORS.register("unrolled", cost="3k + 1", paper="arXiv 1703.01785, 2505.00793", check=_check)
def unrolled(*, num_steps: int | None = None, hvp: Hvp = "linearize") -> Estimator:
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

    Raises:
        AgwmError: `num_steps` below 1, or at the first trace more than the look-ahead has.
    """
    if num_steps is not None and num_steps < 1:
        raise AgwmError(f"unrolled(num_steps={num_steps}): expected 1 step or more.")
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

        def backward(adjoint, step):
            cotangent, hypergradient = adjoint
            stack, batch = step
            inner, grads, saved = steps.restore(stack, batch)
            if solve.reads_outer:
                both = grads, outer
                (of_grads, of_outer), cotangent = update_vjp(lambda x, both: update(x, *both), inner, both, cotangent)
                hypergradient = optax.tree.add(hypergradient, of_outer)
            else:
                of_grads, cotangent = update_vjp(lambda x, grads: update(x, grads, outer), inner, grads, cotangent)
            hp, jp = curvature.product(problem.inner_loss, inner.params, outer, batch, saved, of_grads, hvp)
            cotangent = InnerState(optax.tree.add(cotangent.params, hp), cotangent.opt_state)
            return (cotangent, optax.tree.add(hypergradient, jp)), None

        steps = scan_keeping(forward, inner, late)
        after = steps.carry
        value, (v, direct) = jax.value_and_grad(problem.outer_loss, argnums=(0, 1))(after.params, outer, outer_batch)
        cotangent = cotangent_of(v, after.opt_state)
        (_, hypergradient), _ = jax.lax.scan(backward, (cotangent, direct), (steps.stack, late), reverse=True)
        inner_loss = jnp.mean(jnp.concatenate([early_losses, steps.ys]))
        return Estimate(hypergradient, after, state, {"inner_loss": inner_loss, "outer_loss": value})

    return Estimator(stateless, estimate, forward_mode=hvp != "finite_difference", through_optimizer=True)
