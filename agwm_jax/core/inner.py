"""How the inner problem is solved: by steps of an optimiser, or elsewhere."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from agwm_jax.core.types import Batch, Loss, Scalar, Vector
from agwm_jax.errors import AgwmError

InnerOptimizer: TypeAlias = optax.GradientTransformation | Callable[[Any], optax.GradientTransformation]
"""An optimiser, or a function of the outer variable that returns one."""


class InnerState(NamedTuple):
    """The inner variable and its optimiser's state."""

    params: Vector
    opt_state: optax.OptState


class InnerSolve(NamedTuple):
    """A way to solve the inner problem; an estimator runs it, and differentiates what it did.

    Made by `optimizer_steps` or `solved_elsewhere`.
    """

    init: Callable[[Vector, Vector], InnerState]
    """``init(params, outer) -> state``."""
    run: Callable[[Loss, InnerState, Vector, Batch], tuple[InnerState, Float[Array, " k"]]]
    """``run(loss, state, outer, batches) -> (state, losses [k])``; leaves of `batches` are ``[k, ...]``."""
    update: Callable[[InnerState, Vector, Vector], InnerState] | None
    """``update(state, grads, outer) -> state``, one step with a gradient that is at hand: what is differentiated
    through. None where there are no steps."""
    reads_outer: bool = False
    """Whether `update` depends on the outer variable."""

    def require_update(self, needed_by: str) -> Callable[[InnerState, Vector, Vector], InnerState]:
        """`update`, for an estimator that cannot do without.

        Raises:
            AgwmError: the inner variable was solved elsewhere.
        """
        if self.update is None:
            raise AgwmError(
                f"{needed_by} needs the steps of an inner optimiser, and a solution from elsewhere has none: pass "
                "inner_tx to take steps, or differentiate the solution itself with agwm_jax.hypergrad.implicit."
            )
        return self.update


def optimizer_steps(tx: InnerOptimizer) -> InnerSolve:
    """k steps of an optimiser, one a batch; k fb.

    Args:
        tx: an optax optimiser, or a function ``tx(outer)`` that returns one: learning rates, weight decay or momentum
            are then part of the outer variable.
    """
    reads_outer = not isinstance(tx, optax.GradientTransformation)

    def at(outer: Vector) -> optax.GradientTransformation:
        return tx if isinstance(tx, optax.GradientTransformation) else tx(outer)

    def init(params: Vector, outer: Vector) -> InnerState:
        return InnerState(params, at(outer).init(params))

    def run(loss: Loss, inner: InnerState, outer: Vector, batches: Batch) -> tuple[InnerState, Float[Array, " k"]]:
        return inner_steps(loss, at(outer), inner, outer, batches)

    def update(inner: InnerState, grads: Vector, outer: Vector) -> InnerState:
        return apply_gradient(at(outer), inner, grads)

    return InnerSolve(init, run, update, reads_outer)


def solved_elsewhere() -> InnerSolve:
    """No steps at all: the inner variable is the user's own solution; k/3 fb for its losses."""

    def init(params: Vector, outer: Vector) -> InnerState:
        del outer
        return InnerState(params, ())

    def run(loss: Loss, inner: InnerState, outer: Vector, batches: Batch) -> tuple[InnerState, Float[Array, " k"]]:
        return inner, jax.lax.map(lambda batch: loss(inner.params, outer, batch), batches)

    return InnerSolve(init, run, None)


def apply_gradient(tx: optax.GradientTransformation, inner: InnerState, grads: Vector) -> InnerState:
    """One update of the optimiser with a gradient that is at hand."""
    updates, opt_state = tx.update(grads, inner.opt_state, inner.params)
    return InnerState(optax.apply_updates(inner.params, updates), opt_state)


def gradient_step(
    loss: Loss, tx: optax.GradientTransformation, inner: InnerState, outer: Vector, batch: Batch
) -> tuple[InnerState, Scalar]:
    """One optimiser step on ``loss(params, outer, batch)``; the new state and the loss before it. Cost 1 fb."""
    value, grads = jax.value_and_grad(loss)(inner.params, outer, batch)
    return apply_gradient(tx, inner, grads), value


def inner_steps(
    loss: Loss, tx: optax.GradientTransformation, inner: InnerState, outer: Vector, batches: Batch
) -> tuple[InnerState, Float[Array, " k"]]:
    """One step a batch; `batches` carries a leading axis [k, ...]. Returns the state and the losses [k]. Cost k fb."""
    if jax.tree.leaves(batches)[0].shape[0] == 0:  # spares tracing and compiling a step that is never taken
        return inner, jnp.zeros(0)
    return jax.lax.scan(lambda state, batch: gradient_step(loss, tx, state, outer, batch), inner, batches)
