"""Reverse mode through the inner updates."""

import jax
import jax.numpy as jnp
import optax

from agwm_jax.core import curvature
from agwm_jax.core.curvature import Hvp
from agwm_jax.core.estimators.base import Estimate, Hypergradient, stateless
from agwm_jax.core.inner import InnerState, apply_gradient, apply_gradient_vjp, float_leaves, inner_steps
from agwm_jax.core.types import Problem
from agwm_jax.errors import AgwmError


def unrolled(*, num_steps: int | None = None, hvp: Hvp = "linearize") -> Hypergradient:
    """Reverse mode through the last k updates of the look-ahead, the optimiser itself included.

    The adjoint y of the weights goes back through each update ``w' = w + u(d_w f(w, o))``: through u by reverse mode,
    through the gradient by forward over reverse, which serves because the joint Hessian is symmetric: one product gives
    both ``H p`` for the adjoint and ``J p`` for the hypergradient (Kemaev et al. 2025, arXiv 2505.00793). So what
    is kept for a step is its weights, its optimiser's state and its gradient, and with ``hvp="linearize"`` the
    linearisation of its gradient (activations of the forward and backward pass, mixed weights); never the graph of an
    optimiser's derivative. For many steps of a large model take ``"jvp"``.

    Cost 3k + 1 fb with ``hvp="linearize"``; 4k + 1 with ``"jvp"``, which recomputes each step (rematerialisation) and
    keeps no activations; 2k + 1 with ``"finite_difference"``. Steps of the look-ahead before the last k cost 1 each.

    Exact for what the look-ahead really does, and the right default: it needs no convergence and no step size
    (Franceschi et al. 2017, arXiv 1703.01785; truncated: Shaban et al. 2019, arXiv 1810.10667). An Adam needs
    ``eps_root > 0``: where a gradient is 0 its square root has no derivative. Its first step is ``sign(g)``, which has
    derivative 0: only the direct term is left there, as it is at every step of an optimiser by signs, such as Lion.

    Args:
        num_steps: k; all steps of the look-ahead by default.
        hvp: how the products are taken, see `agwm_jax.core.curvature.Hvp`.

    Raises:
        AgwmError: `num_steps` below 1, or at the first trace more than the look-ahead has.
    """
    if num_steps is not None and num_steps < 1:
        raise AgwmError(f"unrolled(num_steps={num_steps}): expected 1 step or more.")
    curvature.check("unrolled", hvp)

    def estimate(problem: Problem, tx: optax.GradientTransformation, inner, outer, inner_batches, outer_batch, state):
        total = jax.tree.leaves(inner_batches)[0].shape[0]
        last = total if num_steps is None else num_steps
        if last > total:
            raise AgwmError(f"unrolled(num_steps={last}): the look-ahead has {total} inner steps; lower num_steps.")
        early = jax.tree.map(lambda x: x[: total - last], inner_batches)
        late = jax.tree.map(lambda x: x[total - last :], inner_batches)
        inner, early_losses = inner_steps(problem.inner_loss, tx, inner, outer, early)

        def forward(inner: InnerState, batch):
            loss, grads, saved = curvature.linearize(problem.inner_loss, inner.params, outer, batch, hvp)
            return apply_gradient(tx, inner, grads), (loss, (inner, grads, saved))

        def backward(adjoint, step):
            cotangent, hypergradient = adjoint
            (inner, grads, saved), batch = step
            of_grads, cotangent = apply_gradient_vjp(tx, inner, grads, cotangent)
            hp, jp = curvature.product(problem.inner_loss, inner.params, outer, batch, saved, of_grads, hvp)
            cotangent = InnerState(optax.tree.add(cotangent.params, hp), cotangent.opt_state)
            return (cotangent, optax.tree.add(hypergradient, jp)), None

        after, (losses, steps) = jax.lax.scan(forward, inner, late)
        value, (v, direct) = jax.value_and_grad(problem.outer_loss, argnums=(0, 1))(after.params, outer, outer_batch)
        cotangent = InnerState(v, optax.tree.zeros_like(float_leaves(after.opt_state)))
        (_, hypergradient), _ = jax.lax.scan(backward, (cotangent, direct), (steps, late), reverse=True)
        inner_loss = jnp.mean(jnp.concatenate([early_losses, losses]))
        return Estimate(hypergradient, after, state, {"inner_loss": inner_loss, "outer_loss": value})

    return Hypergradient(stateless, estimate)
