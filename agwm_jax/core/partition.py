"""Who is frozen, who is trained and who is mixed: the split of a model's weights by path."""

import difflib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from agwm_jax.core.types import Params
from agwm_jax.errors import AgwmError


class Structure(NamedTuple):
    """How to rebuild the user's pytree from a flat dict of weights."""

    treedef: Any
    paths: tuple[str, ...]
    static: dict[str, Any]
    """Leaves that are no weights (functions, integers, flags), kept as they were."""

    def unflatten(self, params: Params) -> PyTree:
        """The user's own structure, filled with `params` (keyed by path)."""
        missing = [path for path in self.paths if path not in params and path not in self.static]
        if missing:
            raise AgwmError(f"cannot rebuild the model: no weight for {_listed(missing)}; pass what `mix` returned.")
        leaves = [self.static[path] if path in self.static else params[path] for path in self.paths]
        return jax.tree.unflatten(self.treedef, leaves)


class Partition(NamedTuple):
    """The weights of a model, split by role. See :func:`partition`."""

    frozen: Params
    """Never trained: the pretrained copy W0 of every mixed weight, and what matched `frozen`."""
    task: Params
    """Trained by the inner problem: the task copy W of every mixed weight, and everything else that is not frozen."""
    mixed: tuple[str, ...]
    """Paths that have a copy on both sides."""
    structure: Structure


def partition(params: PyTree, *, mixed: str, frozen: str | None = None) -> Partition:
    r"""Split a model's weights into frozen (W0), task (W) and mixed paths.

    A path is the leaf's keys joined by dots (``"encoder.layers.query.kernel"``); both patterns must match a whole
    path (`re.fullmatch`). Mixed weights are copied, so that a donated training state never deletes W0.

    Args:
        params: any pytree of arrays: a flat or nested dict (Linen, Haiku), an NNX state, an Equinox module. Leaves
            that are no floating-point arrays are carried along unchanged.
        mixed: regular expression of the weights to mix; each needs two axes or more, of which the last two are
            ``[d_in, d_out]`` and the others stack layers.
        frozen: regular expression of weights that are never trained; nothing by default.

    Returns:
        A `Partition`; ``partition.structure.unflatten(flat)`` gives back the structure of `params`.

    Raises:
        AgwmError: a pattern matches nothing, is no regular expression, or matches a weight with fewer than two axes,
            or both patterns match one path.

    Example:
        >>> import jax.numpy as jnp
        >>> from agwm_jax import partition
        >>> weights = {"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}
        >>> parts = partition(weights, mixed=r".*kernel")
        >>> parts.mixed, sorted(parts.task), sorted(parts.frozen)
        (('dense.kernel',), ['dense.bias', 'dense.kernel'], ['dense.kernel'])
    """
    named, treedef = _named_leaves(params)
    paths = tuple(name for name, _ in named)
    if len(set(paths)) < len(paths):
        twice = sorted({p for p in paths if paths.count(p) > 1})
        raise AgwmError(f"two leaves have the same path: {_listed(twice)}; rename a key so that paths are unique.")
    # A NumPy array is copied: as W0 it would change when its owner changes it, and go to the device at every call.
    weights = {name: jnp.array(x) if isinstance(x, np.ndarray) else x for name, x in named if _is_weight(x)}
    if not weights:
        raise AgwmError("`params` has no floating-point array to train; expected the weights of a model.")
    static = {name: leaf for name, leaf in named if not _is_weight(leaf)}

    mixed_paths = _matching("mixed", mixed, weights)
    frozen_paths = _matching("frozen", frozen, weights) if frozen is not None else ()
    both = sorted(set(mixed_paths) & set(frozen_paths))
    if both:
        raise AgwmError(f"`mixed` and `frozen` both match {_listed(both)}; a weight has one role: narrow a pattern.")
    for path in mixed_paths:
        if weights[path].ndim < 2:
            raise AgwmError(
                f"`mixed` matches {path!r} of shape {weights[path].shape}; a mixed weight needs two axes or more "
                "[d_in, d_out]: narrow the pattern to kernels."
            )
    return Partition(
        frozen={path: weights[path] for path in (*frozen_paths, *mixed_paths)},
        task={path: jnp.array(w, copy=True) for path, w in weights.items() if path not in set(frozen_paths)},
        mixed=mixed_paths,
        structure=Structure(treedef, paths, static),
    )


def _named_leaves(params: PyTree) -> tuple[list[tuple[str, Any]], Any]:
    # An NNX variable is itself a node with one child, which is not part of the name that its user knows.
    nodes, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_nnx_variable)
    variables = {path for path, node in nodes if _is_nnx_variable(node)}
    keyed, treedef = jax.tree_util.tree_flatten_with_path(params)
    short = [(path[:-1] if path[:-1] in variables else path, leaf) for path, leaf in keyed]
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in short], treedef


def _is_nnx_variable(node) -> bool:
    # By name: the core does not import flax.
    return any(kind.__name__ == "Variable" and kind.__module__.startswith("flax.nnx") for kind in type(node).__mro__)


def _is_weight(leaf) -> bool:
    return hasattr(leaf, "dtype") and hasattr(leaf, "shape") and jnp.issubdtype(leaf.dtype, jnp.floating)


def _matching(role: str, pattern: str, weights: Params) -> tuple[str, ...]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise AgwmError(f"`{role}` = {pattern!r} is not a regular expression: {error}.") from error
    found = tuple(path for path in weights if compiled.fullmatch(path))
    if not found:
        near = difflib.get_close_matches(pattern, weights, n=3, cutoff=0.0)
        raise AgwmError(
            f"`{role}` = {pattern!r} matches none of the {len(weights)} weights; a pattern must match a whole path, "
            f"such as {_listed(near)}."
        )
    return found


def _listed(paths) -> str:
    shown = ", ".join(repr(path) for path in list(paths)[:5])
    return shown + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")
