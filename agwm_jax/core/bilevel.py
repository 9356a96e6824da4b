"""One outer iteration as a pure step: look-ahead, hypergradient, outer update, kept inner update."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import optax

from agwm_jax.core.hypergrad import Hypergradient, InnerState, InnerUpdate, inner_steps
from agwm_jax.core.types import Batch, Problem, Scalar


class BilevelState(NamedTuple):
    """What the next step needs."""

    inner: InnerState
    outer: Any
    outer_opt_state: optax.OptState
    estimator: Any


class BilevelSolver(NamedTuple):
    """A pair of pure functions, made by `bilevel`."""

    init: Callable[[Any, Any], BilevelState]
    """``init(inner_params, outer) -> state``."""
    step: Callable[[BilevelState, Batch, Batch], tuple[BilevelState, dict[str, Scalar]]]
    """``step(state, inner_batches, outer_batch) -> (state, info)``; leaves of `inner_batches` are ``[k, ...]``."""


def gradient_step(loss: Callable[[Any, Any, Batch], Scalar], tx: optax.GradientTransformation) -> InnerUpdate:
    """One optimiser step on ``loss(params, outer, batch)`` as ``update(state, outer, batch) -> (state, loss)``."""

    def update(state: InnerState, outer, batch: Batch) -> tuple[InnerState, Scalar]:
        value, grads = jax.value_and_grad(loss)(state.params, outer, batch)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        return InnerState(optax.apply_updates(state.params, updates), opt_state), value

    return update


def bilevel(
    problem: Problem,
    hypergrad: Hypergradient,
    *,
    inner_tx: optax.GradientTransformation,
    outer_tx: optax.GradientTransformation,
    project: Callable[[Any], Any] = lambda outer: outer,
    rollback: bool = True,
) -> BilevelSolver:
    """Alternate k inner updates with one outer update along the hypergradient.

    One step: a look-ahead of k inner updates at the current outer variable; the hypergradient there; the outer update
    and its projection; then, with `rollback`, the k updates are taken anew from the state before the look-ahead, at the
    new outer variable and on the same batches (the order of arXiv 2403.12918); without it the look-ahead is kept,
    which is k fb cheaper.

    Pure and jittable; the caller jits, donates the state, and may build the solver inside the jitted function so that
    what `problem` closes over are traced arguments.

    Args:
        problem: inner and outer loss.
        hypergrad: an estimator of `agwm_jax.hypergrad`.
        inner_tx: optimiser of the inner variable; differentiated through by `unrolled`.
        outer_tx: optimiser of the outer variable, fed with the hypergradient.
        project: applied to the outer variable at the start and after every update.
        rollback: see above.

    Returns:
        A `BilevelSolver`. ``info`` holds ``inner_loss``, ``outer_loss``, ``hypergradient_norm`` (global 2-norm) and the
        estimator's own diagnostics.

    Example:
        The toy of the DARTS paper; descent along the direct term alone ends at (2, 2), not at the optimum (1, 1).

        >>> import jax, jax.numpy as jnp, optax
        >>> from agwm_jax import Problem, bilevel, hypergrad
        >>> toy = Problem(lambda w, a, _: (w - a) ** 2, lambda w, a, _: a * w - 2 * a + 1)
        >>> solver = bilevel(toy, hypergrad.unrolled(), inner_tx=optax.sgd(0.5), outer_tx=optax.sgd(0.1))
        >>> state = solver.init(jnp.float32(-2), jnp.float32(2))
        >>> for _ in range(50):
        ...     state, info = jax.jit(solver.step)(state, jnp.zeros(1), jnp.zeros(()))
        >>> print(round(float(state.outer), 3))
        1.0
    """
    update = gradient_step(problem.inner_loss, inner_tx)

    def init(inner_params, outer) -> BilevelState:
        outer = project(outer)
        return BilevelState(
            inner=InnerState(inner_params, inner_tx.init(inner_params)),
            outer=outer,
            outer_opt_state=outer_tx.init(outer),
            estimator=hypergrad.init(inner_params, outer),
        )

    def step(state: BilevelState, inner_batches: Batch, outer_batch: Batch):
        estimate = hypergrad.estimate(
            problem, update, state.inner, state.outer, inner_batches, outer_batch, state.estimator
        )
        chex.assert_trees_all_equal_shapes_and_dtypes(
            estimate.hypergradient, state.outer
        )  # an estimator may be the user's
        updates, outer_opt_state = outer_tx.update(estimate.hypergradient, state.outer_opt_state, state.outer)
        outer = project(optax.apply_updates(state.outer, updates))
        inner = inner_steps(update, state.inner, outer, inner_batches)[0] if rollback else estimate.inner
        info = {**estimate.info, "hypergradient_norm": optax.tree.norm(estimate.hypergradient)}
        return BilevelState(inner, outer, outer_opt_state, estimate.state), info

    return BilevelSolver(init, step)
