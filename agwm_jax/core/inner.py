"""The inner problem's optimiser: its steps, and reverse mode through one update of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from agwm_jax.core.types import Batch, Scalar

Loss = Callable[[Any, Any, Batch], Scalar]


class InnerState(NamedTuple):
    """The inner variable and its optimiser's state."""

    params: Any
    opt_state: optax.OptState


def apply_gradient(tx: optax.GradientTransformation, inner: InnerState, grads) -> InnerState:
    """One update of the optimiser with a gradient that is at hand."""
    updates, opt_state = tx.update(grads, inner.opt_state, inner.params)
    return InnerState(optax.apply_updates(inner.params, updates), opt_state)


def gradient_step(
    loss: Loss, tx: optax.GradientTransformation, inner: InnerState, outer, batch: Batch
) -> tuple[InnerState, Scalar]:
    """One optimiser step on ``loss(params, outer, batch)``; the new state and the loss before it. Cost 1 fb."""
    value, grads = jax.value_and_grad(loss)(inner.params, outer, batch)
    return apply_gradient(tx, inner, grads), value


def inner_steps(
    loss: Loss, tx: optax.GradientTransformation, inner: InnerState, outer, batches: Batch
) -> tuple[InnerState, Any]:
    """One step a batch; `batches` carries a leading axis [k, ...]. Returns the state and the losses [k]. Cost k fb."""
    if jax.tree.leaves(batches)[0].shape[0] == 0:  # spares tracing and compiling a step that is never taken
        return inner, jnp.zeros(0)
    return jax.lax.scan(lambda state, batch: gradient_step(loss, tx, state, outer, batch), inner, batches)


def apply_gradient_vjp(
    tx: optax.GradientTransformation, inner: InnerState, grads, cotangent: InnerState
) -> tuple[Any, InnerState]:
    """Transposed Jacobian of `apply_gradient`, of its gradient and its state, times a cotangent of its result.

    Cotangents of an optimiser's state hold None where it has no floats (a step count): see `float_leaves`. No loss is
    evaluated: what this costs grows with the weights, not with the batch.
    """

    def update(grads, params, opt_floats):
        after = apply_gradient(tx, InnerState(params, _with_floats(inner.opt_state, opt_floats)), grads)
        return after.params, float_leaves(after.opt_state)

    _, vjp = jax.vjp(update, grads, inner.params, float_leaves(inner.opt_state))
    of_grads, of_params, of_opt_state = vjp((cotangent.params, cotangent.opt_state))
    return of_grads, InnerState(of_params, of_opt_state)


def float_leaves(tree):
    """The tree with None in place of every leaf that has no derivative."""
    return jax.tree.map(lambda x: x if jnp.issubdtype(jnp.result_type(x), jnp.floating) else None, tree)


def _with_floats(tree, floats):
    return jax.tree.map(lambda new, old: old if new is None else new, floats, tree, is_leaf=lambda x: x is None)
