"""What a bi-level problem must look like: refused with one sentence, when traced, at no cost to what is compiled."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.interpreters import partial_eval
from jaxtyping import PyTree

from agwm_jax.core.estimators.base import Estimator
from agwm_jax.core.inner import InnerSolve, InnerState
from agwm_jax.core.types import Batch, Composite, Loss, Problem, Vector
from agwm_jax.errors import AgwmError


def estimator(value: Any) -> None:
    """It must be an estimator and not its factory."""
    if not isinstance(value, Estimator):
        name = getattr(value, "__name__", repr(value))
        raise AgwmError(
            f"the estimator is {name}: expected what a factory of agwm_jax.hypergrad returns, such as "
            "hypergrad.unrolled(); is it called?"
        )


def optimizer(name: str, tx: Any, params: PyTree, outer: PyTree = None) -> None:
    """An optax transformation, or where `outer` is given a function of it that returns one, which asks for no more
    than the gradient."""
    of_outer = outer is not None and callable(tx) and not isinstance(tx, optax.GradientTransformation)
    if not of_outer and not isinstance(tx, optax.GradientTransformation):
        what = getattr(tx, "__name__", repr(tx))
        raise AgwmError(f"{name} is {what}: expected an optax optimiser, such as optax.adam(1e-3); is it called?")

    def update(params: PyTree, outer: PyTree) -> Any:
        made = tx(outer) if of_outer else tx
        return made.update(params, made.init(params), params)

    try:
        jax.eval_shape(update, params, outer)
    except (TypeError, AttributeError) as error:
        if "required keyword" in str(error):
            raise AgwmError(
                f"{name} wants more than the gradient ({error}), as line searches, L-BFGS and Polyak steps do: take "
                "one that does with it, such as optax.sgd or adam; or solve the inner problem by it yourself, and call "
                "hypergradient at the solution."
            ) from error
        if of_outer:
            raise AgwmError(
                f"{name} is the function {getattr(tx, '__name__', repr(tx))}, which makes no optimiser of the outer "
                f"variable ({error}): expected an optax optimiser, called, or a function outer -> optimiser."
            ) from error
        raise


def variables(inner: PyTree, outer: PyTree) -> None:
    """Every leaf of both variables must be an array of floats."""
    for name, tree in (("inner", inner), ("outer", outer)):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        if not leaves:
            raise AgwmError(f"the {name} variable has no leaves: expected a pytree of float arrays.")
        for path, leaf in leaves:
            dtype = getattr(leaf, "dtype", type(leaf).__name__)
            if not hasattr(leaf, "dtype") or not jnp.issubdtype(dtype, jnp.floating):
                raise AgwmError(
                    f"{name}{jax.tree_util.keystr(path)} is {dtype}: expected float arrays only, for there is no "
                    "derivative in anything else; close over it in the losses, or cast it."
                )


def same_leaves(name: str, tree: PyTree, expected_name: str, expected: PyTree) -> None:
    """Structure, shapes and dtypes of two trees must agree."""

    def specs(tree) -> dict[str, str]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path): jax.typeof(leaf).str_short() for path, leaf in leaves}

    found, wanted = specs(tree), specs(expected)
    for path in {**wanted, **found}:
        got, want = found.get(path, "nothing"), wanted.get(path, "nothing")
        if got != want:
            raise AgwmError(f"{name}{path} is {got} where {expected_name} has {want}: expected the same tree.")
    kind, expected_kind = str(jax.tree.structure(tree)), str(jax.tree.structure(expected))
    if kind != expected_kind:
        raise AgwmError(f"{name} is a {kind} where {expected_name} is a {expected_kind}: expected the same tree.")


def num_inner(number: int | None) -> None:
    """How many inner problems there are."""
    if number is not None and (not isinstance(number, int) or number < 1):
        raise AgwmError(
            f"num_inner = {number!r}: expected an integer of 1 or more, or None for a single inner problem."
        )


def through_optimizer(estimator: Estimator, solve: InnerSolve) -> None:
    """An optimiser that is a function of the outer variable needs an estimator that differentiates it."""
    if solve.reads_outer and not estimator.through_optimizer:
        raise AgwmError(
            "inner_tx is a function of the outer variable, and this estimator differentiates no steps of an optimiser, "
            "so that what the optimiser makes of it would get no gradient: use hypergrad.unrolled()."
        )


def inner_axis(name: str, tree: PyTree, number: int | None) -> None:
    """All leaves carry one leading axis of that many inner problems."""
    if number is None:
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.shape(leaf)[:1] != (number,):
            raise AgwmError(
                f"{name}{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}: expected [{number}, ...], one entry "
                f"an inner problem, for num_inner = {number}."
            )


def inner_batches(batches: Batch, outer_batch: Batch) -> None:
    """All leaves carry one leading axis of inner steps, which the outer batch lacks."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batches)]
    steps = {shape[0] if shape else 0 for shape in shapes}
    if len(steps) != 1 or 0 in steps:
        found = ", ".join(str(shape) for shape in shapes[:5]) or "no arrays"
        raise AgwmError(
            f"inner_batches has leaves of shape {found}: expected a leading axis [k, ...] of one and the same number "
            "of inner steps, 1 or more, on each."
        )
    whole = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(outer_batch)}
    for path, inner in jax.tree_util.tree_leaves_with_path(batches):
        outer = whole.get(jax.tree_util.keystr(path))  # of the same name in a batch of another kind too
        if outer is not None and jnp.ndim(inner) <= jnp.ndim(outer):
            raise AgwmError(
                f"inner_batches{jax.tree_util.keystr(path)} has shape {jnp.shape(inner)} and outer_batch "
                f"{jnp.shape(outer)}: expected one axis more in inner_batches, [k, ...], one batch an inner step; for "
                "a single step add it by x[None]."
            )


def scalar_losses(problem: Problem) -> Problem:
    """The same losses, which raise where they return anything but a float scalar; no trace of their own."""

    def checked(name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        def loss(*args):
            out = fn(*args)
            leaves = [jax.typeof(leaf) for leaf in jax.tree.leaves(out)]
            if len(leaves) != 1 or leaves[0].shape != () or not jnp.issubdtype(leaves[0].dtype, jnp.floating):
                got = ", ".join(f"{x.dtype}{list(x.shape)}" for x in leaves) or "nothing"
                remedy = "take the mean over the batch"
                if leaves and leaves[0].shape == () and len(leaves) > 1:
                    remedy = "return the loss alone; what goes with it (has_aux) can be computed beside the step"
                raise AgwmError(f"the {name} loss returns {got}: expected a float scalar; {remedy}.")
            return jax.tree.leaves(out)[0]

        return loss

    def wrapped(name: str, loss: Loss) -> Loss:
        if isinstance(loss, Composite):
            return Composite(loss.outputs, checked(name, loss.criterion))
        return checked(name, loss)

    return Problem(wrapped("inner", problem.inner_loss), wrapped("outer", problem.outer_loss))


def dependencies(
    problem: Problem,
    solve: InnerSolve,
    inner: InnerState,
    outer: Vector,
    inner_batches: Batch,
    outer_batch: Batch,
) -> None:
    """The outer loss must depend on the inner variable, and a loss or the optimiser on every leaf of the outer one."""

    num_inner, num_outer = (len(jax.tree.leaves(x)) for x in (inner.params, outer))

    def uses(fn: Callable[..., Any], batch: Any) -> tuple[bool, list[bool]]:
        closed = jax.make_jaxpr(fn)(inner.params, outer, batch)
        _, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
        return any(used[:num_inner]), used[num_inner : num_inner + num_outer]

    of_inner, of_outer = uses(problem.outer_loss, outer_batch)
    if not of_inner:
        raise AgwmError(
            "the outer loss does not depend on the inner variable, so there is nothing to differentiate through: "
            "expected outer_loss(inner, outer, batch) to use its first argument; with an outer variable alone, "
            "use jax.grad."
        )
    if all(of_outer):  # the inner loss is traced only where there is a question, for a large model takes seconds
        return
    readers = [of_outer, uses(problem.inner_loss, jax.tree.map(lambda x: x[0], inner_batches))[1]]
    if solve.update is not None and solve.reads_outer:
        update = solve.update
        readers.append(uses(lambda grads, outer, state: update(state, grads, outer), inner)[1])
    read = [any(uses) for uses in zip(*readers, strict=True)]
    if not any(read):
        raise AgwmError(
            "nothing depends on the outer variable, so its gradient is zero: expected inner_loss(inner, outer, batch) "
            "or outer_loss to use its second argument. Where the inner steps start at it (MAML), let the losses take "
            "outer + inner, and start the inner variable at zeros."
        )
    paths = (jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(outer))
    unread = [path for path, is_read in zip(paths, read, strict=True) if not is_read]
    if unread:
        raise AgwmError(
            f"nothing depends on outer{unread[0]}, so its gradient is zero and it would never move: leave it out of "
            "the outer variable, or let a loss use it."
        )
