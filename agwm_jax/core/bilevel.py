"""One outer iteration as a pure step: look-ahead, hypergradient, outer update, kept inner update."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

from agwm_jax.core import check, trees
from agwm_jax.core.estimators import Hypergradient
from agwm_jax.core.inner import InnerState, inner_steps
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

    Raises:
        AgwmError: by ``init``, a variable with a leaf that is no float array; by the first trace of ``step``, a loss
            that is no scalar, an outer loss that does not depend on the inner variable, or trees that do not match.

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

    def init(inner_params, outer) -> BilevelState:
        check.variables(inner_params, outer)
        projected = project(outer)
        check.same_leaves("project(outer)", projected, "the outer variable", outer)
        inner = InnerState(inner_params, inner_tx.init(inner_params))
        return BilevelState(inner, projected, outer_tx.init(projected), hypergrad.init(inner, projected))

    def step(state: BilevelState, inner_batches: Batch, outer_batch: Batch):
        check.inner_batches(inner_batches)
        check.losses(problem, state.inner.params, state.outer, inner_batches, outer_batch)
        estimate = hypergrad.estimate(
            problem, inner_tx, state.inner, state.outer, inner_batches, outer_batch, state.estimator
        )
        check.same_leaves("the estimator's hypergradient", estimate.hypergradient, "the outer variable", state.outer)
        updates, outer_opt_state = outer_tx.update(estimate.hypergradient, state.outer_opt_state, state.outer)
        outer = project(optax.apply_updates(state.outer, updates))
        inner, estimator = estimate.inner, estimate.state
        if rollback:
            inner, _ = inner_steps(problem.inner_loss, inner_tx, state.inner, outer, inner_batches)
            if hypergrad.rollback is not None:
                estimator = hypergrad.rollback(problem, inner_tx, state.estimator, outer, inner_batches, outer_batch)
        info = {**estimate.info, "hypergradient_norm": trees.norm(estimate.hypergradient)}
        return BilevelState(inner, outer, outer_opt_state, estimator), info

    return BilevelSolver(init, step)
