"""The hypergradient at a point, and one outer iteration as a pure step."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from agwm_jax.core import check, trees
from agwm_jax.core.estimators.base import Estimate, Estimator
from agwm_jax.core.inner import InnerOptimizer, InnerSolve, InnerState, optimizer_steps, solved_elsewhere
from agwm_jax.core.types import Batch, Composite, Info, Problem, Vector
from agwm_jax.errors import AgwmError

Rollback = bool | Literal["from_look_ahead"]


class BilevelState(NamedTuple):
    """What the next step needs."""

    inner: InnerState
    outer: Vector
    outer_opt_state: optax.OptState
    estimator: PyTree
    start: PyTree = ()
    """Where every inner solve starts, with ``restart=True``."""


class BilevelSolver(NamedTuple):
    """A pair of pure functions, made by `bilevel`."""

    init: Callable[[Vector, Vector], BilevelState]
    """``init(inner_params, outer) -> state``; the state is a copy, its outer variable in float32 or better."""
    step: Callable[..., tuple[BilevelState, Info]]
    """``step(state, inner_batches, outer_batch) -> (state, info)``; leaves of `inner_batches` are ``[k, ...]``. With
    ``num_steps=k`` of `bilevel`: ``step(state)``, or ``step(state, None, outer_batch)``."""


def hypergradient(
    problem: Problem,
    estimator: Estimator,
    inner: PyTree | InnerState,
    outer: PyTree,
    inner_batches: Batch = None,
    outer_batch: Batch = None,
    *,
    inner_tx: InnerOptimizer | None = None,
    num_steps: int | None = None,
    state: PyTree | None = None,
) -> Estimate:
    """The gradient in `outer` of the outer loss at the solution of the inner problem, which was found in any way.

    Where the inner steps start at the outer variable (MAML, arXiv 1703.03400), let the inner variable be the change
    from it: losses of ``outer + inner``, and `inner` at zeros. Exact by ``unrolled`` for any optimiser whose update
    does not read the weights (a weight decay would pull at the change alone).

    Args:
        problem: inner and outer loss.
        estimator: an estimator of `agwm_jax.hypergrad`, called: ``hypergrad.implicit(...)``.
        inner: the solution w, or where the steps of `inner_tx` start (an `InnerState`, to go on with an optimiser's
            state).
        outer: the outer variable.
        inner_batches: what the inner loss is taken on; leaves ``[k, ...]``. A solution on one batch has k = 1. None:
            the inner loss is called with None in its place (full batch: it closes over its data).
        outer_batch: what the outer loss is taken on; None is passed on.
        inner_tx: None: `inner` is the solution. An optimiser, or a function of the outer variable that returns one
            (see `bilevel`): k steps of it, one a batch, are the solve.
        num_steps: k, of the steps of `inner_tx` where there are no `inner_batches`.
        state: of the estimator, what the estimate before returned as ``state``; None: it starts anew.

    Returns:
        An `Estimate`, whose ``hypergradient`` is a tree like `outer`; ``info`` also has ``hypergradient_norm``.

    Raises:
        AgwmError: as for `bilevel`, or an estimator that differentiates steps (``unrolled``, ``penalty``, a
            ``finite_difference`` with a preconditioner) without `inner_tx`.

    Example:
        Ridge regression ``|w - 3|^2 / 2 + o |w|^2 / 2``, solved by hand: w = 3 / (1 + o).

        >>> import jax.numpy as jnp
        >>> from agwm_jax import Problem, hypergrad, hypergradient, linear_solve
        >>> problem = Problem(lambda w, o, _: ((w - 3) ** 2 + o * w**2) / 2, lambda w, o, _: w**2)
        >>> w, o = jnp.float32(1.5), jnp.float32(1.0)
        >>> exact = hypergrad.implicit(linear_solve.dense())
        >>> print(hypergradient(problem, exact, w, o).hypergradient)  # 2 w dw/do
        -2.25
    """
    check.estimator(estimator)
    if inner_tx is None and inner_batches is None:
        if num_steps is not None:
            raise AgwmError(
                f"num_steps={num_steps}: a solution from elsewhere takes no steps; drop it, or pass inner_tx."
            )
        num_steps = 1
    problem, inner_batches = _steps(problem, inner_batches, num_steps)
    if inner_tx is not None:
        check.optimizer("inner_tx", inner_tx, inner.params if isinstance(inner, InnerState) else inner, outer)
    solve = solved_elsewhere() if inner_tx is None else optimizer_steps(inner_tx)
    start = inner if isinstance(inner, InnerState) else solve.init(inner, outer)
    check.variables(start.params, outer)
    state = estimator.init(start, outer) if state is None else state
    return _estimate(problem, estimator, solve, start, outer, inner_batches, outer_batch, state)


def bilevel(
    problem: Problem,
    estimator: Estimator,
    *,
    inner_tx: InnerOptimizer,
    outer_tx: optax.GradientTransformation,
    project: Callable[[Vector], Vector] = lambda outer: outer,
    rollback: Rollback = False,
    renew: Callable[[Batch, Any], Batch] | None = None,
    num_inner: int | None = None,
    num_steps: int | None = None,
    restart: bool = False,
) -> BilevelSolver:
    """Alternate k inner updates with one outer update along the hypergradient.

    One step: a look-ahead of k inner updates at the current outer variable; the hypergradient there; the outer update
    and its projection. The look-ahead is kept; with `rollback` the k updates are taken anew from the state before it,
    at the new outer variable and on the same batches (the order of arXiv 2403.12918), which costs k fb. With
    ``rollback="from_look_ahead"`` they are taken on top of the look-ahead, which is what Betty 0.2.0 does where it is
    asked to roll back: its copy of the weights and moments shares their memory. Schedules do not count those steps,
    and at the very first iteration, where there was no state to share, the optimiser starts anew.

    The outer variable is held in float32 whatever it comes in (float64 stays): near 1 bfloat16 has steps of 0.004,
    which swallow the updates of a usual learning rate. The losses get it so; what computes in less casts it there.

    Pure and jittable; the caller jits, donates the state, and may build the solver inside the jitted function so that
    what `problem` closes over are traced arguments.

    Args:
        problem: inner and outer loss.
        estimator: an estimator of `agwm_jax.hypergrad`, called: ``hypergrad.unrolled()``.
        inner_tx: optimiser of the inner variable, differentiated through by ``unrolled``; or a function
            ``outer -> optimiser``: learning rates (one, or one a weight), weight decay, momentum are then outer
            variables like any other, exact by ``unrolled``, and refused by the other estimators.
        outer_tx: optimiser of the outer variable, fed with the hypergradient.
        project: applied to the outer variable at the start and after every update.
        rollback: see above.
        renew: ``renew(batch, number) -> batch`` with randomness of its own, for the batches of the k updates that
            `rollback` takes anew (number 3; 1 and 2 are the ends of a ``finite_difference``); None: they share that of
            the look-ahead.
        num_inner: K inner problems that share the outer variable, one a cross-validation fold for instance: the outer
            loss is the mean of theirs, each hypergradient goes through its own inner variable, and all K are one
            mapped program. Leaves of the inner variable, of its state, of the estimator's and of the outer batch then
            have a leading axis ``[K, ...]``, those of the inner batches ``[K, k, ...]``; what `problem` closes over is
            there once. Costs K times as much. ``info`` holds means, and the norm of the mean hypergradient.
        num_steps: k, for losses that close over their data (full batch): ``step(state)`` then takes no batches, and the
            inner loss is called with None in place of one.
        restart: every step solves the inner problem anew from where ``init`` was given (a cold start), as whole
            trainings and MAML's tasks are, in place of going on from where the last step ended.

    Returns:
        A `BilevelSolver`. ``info`` holds ``inner_loss``, ``outer_loss``, ``hypergradient_norm`` (global 2-norm) and the
        estimator's own diagnostics. The norm is NaN or infinite where the hypergradient is: stop there, for the outer
        variable is lost.

    Raises:
        AgwmError: by ``init``, a variable with a leaf that is no float array, or an optimiser that needs more than
            a gradient; by the first trace of ``step``, a loss that is no scalar, an outer loss that does not depend on
            the inner variable, a leaf of the outer variable that no loss depends on, batches without their leading
            axis, or trees that do not match.

    Example:
        The toy of the DARTS paper; descent along the direct term alone ends at (2, 2), not at the optimum (1, 1).

        >>> import jax, jax.numpy as jnp, optax
        >>> from agwm_jax import Problem, bilevel, hypergrad
        >>> toy = Problem(lambda w, a, _: (w - a) ** 2, lambda w, a, _: a * w - 2 * a + 1)
        >>> solver = bilevel(toy, hypergrad.unrolled(), inner_tx=optax.sgd(0.5), outer_tx=optax.sgd(0.1), num_steps=1)
        >>> state = solver.init(jnp.float32(-2), jnp.float32(2))
        >>> for _ in range(50):
        ...     state, info = jax.jit(solver.step)(state)
        >>> print(round(float(state.outer), 3))
        1.0
    """
    check.estimator(estimator)
    if not isinstance(rollback, bool) and rollback not in get_args(get_args(Rollback)[1]):
        raise AgwmError(f"bilevel(rollback={rollback!r}): expected True, False or 'from_look_ahead'.")
    check.num_inner(num_inner)
    if restart and rollback:
        raise AgwmError(
            "bilevel(restart=True, rollback=...): a step that starts anew has no look-ahead to take back; drop one."
        )
    if num_steps is not None and renew is not None:
        raise AgwmError("bilevel(num_steps=..., renew=...): without batches there is nothing to renew; drop one.")
    solve = optimizer_steps(inner_tx)
    stated = problem

    def each(fn: Callable[..., Any], in_axes: Any = 0) -> Callable[..., Any]:
        """`fn` of all inner problems."""
        return fn if num_inner is None else jax.vmap(fn, in_axes=in_axes, axis_size=num_inner)

    def init(inner_params: PyTree, outer: PyTree) -> BilevelState:
        check.variables(inner_params, outer)
        check.inner_axis("inner_params", inner_params, num_inner)
        check.optimizer("inner_tx", inner_tx, inner_params, outer)
        check.optimizer("outer_tx", outer_tx, outer)
        inner_params = jax.tree.map(lambda x: jnp.array(x, copy=True), inner_params)
        outer = jax.tree.map(lambda x: jnp.array(x, jnp.promote_types(x.dtype, jnp.float32), copy=True), outer)
        projected = project(outer)
        check.same_leaves("project(outer)", projected, "the outer variable", outer)
        inner = each(solve.init, (0, None))(inner_params, projected)
        own = each(estimator.init, (0, None))(inner, projected)
        start = jax.tree.map(lambda x: jnp.array(x, copy=True), inner_params) if restart else ()
        return BilevelState(inner, projected, outer_tx.init(projected), own, start)

    def step(state: BilevelState, inner_batches: Batch = None, outer_batch: Batch = None) -> tuple[BilevelState, Info]:
        problem, inner_batches = _steps(stated, inner_batches, num_steps, num_inner)
        if restart:
            state = state._replace(inner=each(solve.init, (0, None))(state.start, state.outer))
        check.inner_axis("inner_batches", inner_batches, num_inner)
        check.inner_axis("outer_batch", outer_batch, num_inner)
        inner, outer, after = state.inner, state.outer, state.estimator
        estimate_each = each(partial(_estimate, problem, estimator, solve), (0, None, 0, 0, 0))
        estimate = estimate_each(inner, outer, inner_batches, outer_batch, after)
        if num_inner is not None:
            estimate = _mean(estimate)
        updates, outer_opt_state = outer_tx.update(estimate.hypergradient, state.outer_opt_state, state.outer)
        outer = project(optax.apply_updates(state.outer, updates))
        inner, after = estimate.inner, estimate.state
        if rollback:
            onward = rollback == "from_look_ahead"
            start = each(_onward)(state.inner, inner) if onward else state.inner
            batches = inner_batches
            if renew is not None:
                batches = each(jax.vmap(lambda batch: renew(batch, 3)))(inner_batches)
            solve_each = each(partial(solve.run, problem.inner_loss), (0, None, 0))
            inner, _ = solve_each(start, outer, batches)
            if estimator.retake is not None:
                retake_each = each(partial(estimator.retake, problem, solve), (0, None, 0, 0))
                after = retake_each(after if onward else state.estimator, outer, inner_batches, outer_batch)
        return BilevelState(inner, outer, outer_opt_state, after, state.start), estimate.info

    return BilevelSolver(init, step)


def _steps(
    problem: Problem, inner_batches: Batch, num_steps: int | None, num_inner: int | None = None
) -> tuple[Problem, Batch]:
    """Problem and inner batches; without batches k numbers stand for them, which the inner loss does not see."""
    if inner_batches is not None:
        if num_steps is not None:
            raise AgwmError(
                f"num_steps={num_steps} is for losses that close over their data, and inner_batches were given: there "
                "is one step a batch; drop num_steps, or the batches."
            )
        return problem, inner_batches
    if num_steps is None:
        raise AgwmError(
            "inner_batches is None: expected batches, leaves [k, ...], one an inner step; or, for losses that close "
            "over their data, num_steps=k."
        )
    if num_steps < 1:
        raise AgwmError(f"num_steps={num_steps}: expected 1 inner step or more.")
    loss = problem.inner_loss

    def without(fn: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: fn(*arguments[:-1], None)

    full = Composite(without(loss.outputs), without(loss.criterion)) if isinstance(loss, Composite) else without(loss)
    count = (num_steps,) if num_inner is None else (num_inner, num_steps)
    return problem._replace(inner_loss=full), jnp.zeros(count)


def _onward(before: InnerState, after: InnerState) -> InnerState:
    """Where ``rollback="from_look_ahead"`` steps from: as after, but for what counts iterations."""
    moments = jax.tree.map(
        lambda new, old: old if _is_schedule(new) else new, after.opt_state, before.opt_state, is_leaf=_is_schedule
    )
    counts = [x for x in jax.tree.leaves(before.opt_state) if jnp.issubdtype(jnp.result_type(x), jnp.integer)]
    if counts:
        first = jnp.all(jnp.stack([jnp.all(count == 0) for count in counts]))
        moments = jax.tree.map(lambda new, old: jnp.where(first, old, new), moments, before.opt_state)
    return InnerState(after.params, moments)


def _is_schedule(state: Any) -> bool:
    return isinstance(state, optax.ScaleByScheduleState)


def _estimate(
    problem: Problem,
    estimator: Estimator,
    solve: InnerSolve,
    inner: InnerState,
    outer: Vector,
    inner_batches: Batch,
    outer_batch: Batch,
    state: PyTree,
) -> Estimate:
    """The estimate of a problem that was looked over, with the norm in its info."""
    check.inner_batches(inner_batches, outer_batch)
    problem = check.scalar_losses(problem)
    check.through_optimizer(estimator, solve)
    check.dependencies(problem, solve, inner, outer, inner_batches, outer_batch)
    estimate = estimator.estimate(problem, solve, inner, outer, inner_batches, outer_batch, state)
    check.same_leaves("the estimator's hypergradient", estimate.hypergradient, "the outer variable", outer)
    return estimate._replace(info={**estimate.info, "hypergradient_norm": trees.norm(estimate.hypergradient)})


def _mean(estimates: Estimate) -> Estimate:
    """Of the estimates of several inner problems, whose leaves have a leading axis: their hypergradient and info."""
    hypergradient, info = jax.tree.map(lambda x: x.mean(axis=0), (estimates.hypergradient, estimates.info))
    return estimates._replace(
        hypergradient=hypergradient, info={**info, "hypergradient_norm": trees.norm(hypergradient)}
    )
