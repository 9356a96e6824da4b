"""What a bi-level problem must look like: refused with one sentence, when traced, at no cost to what is compiled."""

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

from agwm_jax.core.types import Batch, Problem
from agwm_jax.errors import AgwmError


def variables(inner, outer) -> None:
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


def same_leaves(name: str, tree, expected_name: str, expected) -> None:
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


def inner_batches(batches: Batch) -> None:
    """All leaves carry one leading axis of inner steps."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batches)]
    steps = {shape[0] if shape else 0 for shape in shapes}
    if len(steps) != 1 or 0 in steps:
        found = ", ".join(str(shape) for shape in shapes[:5]) or "no arrays"
        raise AgwmError(
            f"inner_batches has leaves of shape {found}: expected a leading axis [k, ...] of one and the same number "
            "of inner steps, 1 or more, on each."
        )


def losses(problem: Problem, inner, outer, inner_batches: Batch, outer_batch: Batch) -> None:
    """Both losses must be scalars, and the outer one must depend on the inner variable."""
    first = jax.tree.map(lambda x: x[0], inner_batches)
    for name, loss, batch in (("inner", problem.inner_loss, first), ("outer", problem.outer_loss, outer_batch)):
        closed, out = jax.make_jaxpr(loss, return_shape=True)(inner, outer, batch)
        shapes = jax.tree.leaves(out)
        if len(shapes) != 1 or shapes[0].shape != () or not jnp.issubdtype(shapes[0].dtype, jnp.floating):
            got = ", ".join(f"{x.dtype}{list(x.shape)}" for x in shapes) or "nothing"
            raise AgwmError(f"the {name} loss returns {got}: expected a float scalar; take the mean over the batch.")
    _, used = partial_eval.dce_jaxpr(closed.jaxpr, [True])  # of the outer loss, the last
    if not any(used[: len(jax.tree.leaves(inner))]):
        raise AgwmError(
            "the outer loss does not depend on the inner variable, so there is nothing to differentiate through: "
            "expected outer_loss(inner, outer, batch) to use its first argument; with an outer variable alone, "
            "use jax.grad."
        )
