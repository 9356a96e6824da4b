"""Who is frozen, who is trained and who is mixed: the split of a model's weights by path."""

import difflib
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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

    weights: Params
    """All of them by path, as `partition` got them."""
    mixed: tuple[str, ...]
    """Paths that have a copy on both sides."""
    axes: dict[str, str]
    """Of every mixed path, what its axes were taken for: ``l`` (stacks kernels), ``i`` (input) or ``o`` (output)."""
    fixed: tuple[str, ...]
    """Paths that are never trained."""
    structure: Structure

    def matrix_shape(self, path: str) -> tuple[int, ...]:
        """``[*l, d_in, d_out]`` of a mixed weight, its input axes counted as one, and its output axes."""
        shape, axes = self.weights[path].shape, self.axes[path]
        stack = axes.count("l")
        inputs = stack + axes.count("i")
        return (*shape[:stack], math.prod(shape[stack:inputs]), math.prod(shape[inputs:]))

    @property
    def frozen(self) -> Params:
        """Never trained: the pretrained weight W0 of every mixed path, and what matched `frozen`."""
        return {path: jnp.asarray(self.weights[path]) for path in (*self.fixed, *self.mixed)}

    @property
    def task(self) -> Params:
        """Trained by the inner problem, to start with: the task weight W of every mixed path, and all other weights.

        A copy, made anew each time, so that a donated training state never deletes W0; under tracing there is nothing
        to copy.
        """
        fixed = set(self.fixed)
        trained = {path: w for path, w in self.weights.items() if path not in fixed}
        return {path: w if isinstance(w, jax.core.Tracer) else jnp.array(w, copy=True) for path, w in trained.items()}


def partition(
    params: PyTree,
    *,
    mixed: str | Sequence[str],
    frozen: str | Sequence[str] | None = None,
    static: str | Sequence[str] | None = None,
    axes: Mapping[str, str] | None = None,
) -> Partition:
    r"""Split a model's weights into frozen (W0), task (W) and mixed paths.

    A path is the leaf's keys joined by dots (``"encoder.layers.query.kernel"``). Nothing is computed or copied, also
    where `params` is traced; the arrays of `params` stay those of the partition.

    Args:
        params: any pytree of arrays: a flat or nested dict (Linen, Haiku), an NNX state, an Equinox module. Leaves
            that are no floating-point arrays are carried along unchanged (the key of a dropout layer too: the same
            masks in every call), and so are the NNX variables that are no `nnx.Param`, such as statistics of a batch
            norm. Arrays that are tied by being one object must be there once.
        mixed: the weights to mix: a regular expression that must match a whole path (`re.fullmatch`), or the paths
            themselves. Each needs two axes or more, of which the last two are ``[d_in, d_out]`` and the others stack
            layers, unless `axes` says otherwise. A stacked bias looks like that too, so that a pattern may not match a
            path that ends in ``bias`` or ``scale``; listed as a path it is taken.
        frozen: weights that are never trained, likewise; nothing by default.
        static: floating-point arrays that are no weights, likewise, and are carried along unchanged:
            ``r"batch_stats\..*"`` of a Linen model.
        axes: what the axes of mixed weights are, by pattern or path: a letter each, ``l`` for those that stack
            kernels, ``i`` for their input, ``o`` for their output, in this order. ``"ioo"`` is a kernel
            ``[d, heads, d_head]`` that makes the heads, ``"iio"`` one that reads them, ``"iiio"`` a convolution.

    Returns:
        A `Partition`; ``partition.structure.unflatten(flat)`` gives back the structure of `params`.

    Raises:
        AgwmError: a pattern or path that matches nothing, is no regular expression, or matches a weight that cannot be
            a kernel, one weight with two roles, or a trained array that is there twice.

    Example:
        >>> import jax.numpy as jnp
        >>> from agwm_jax import partition
        >>> weights = {"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}
        >>> parts = partition(weights, mixed=r".*kernel")
        >>> parts.mixed, sorted(parts.task), sorted(parts.frozen)
        (('dense.kernel',), ['dense.bias', 'dense.kernel'], ['dense.kernel'])
    """
    named, kept, treedef = _named_leaves(params)
    paths = tuple(name for name, _ in named)
    if len(set(paths)) < len(paths):
        twice = sorted({p for p in paths if paths.count(p) > 1})
        raise AgwmError(f"two leaves have the same path: {_listed(twice)}; rename a key so that paths are unique.")
    arrays = {name: x for name, x in named if _is_weight(x) and name not in kept}
    unchanged = () if static is None else _chosen("static", static, arrays)
    weights = {name: x for name, x in arrays.items() if name not in unchanged}
    if not weights:
        raise AgwmError("`params` has no floating-point array to train; expected the weights of a model.")
    others = {name: leaf for name, leaf in named if name not in weights}

    mixed_paths = _chosen("mixed", mixed, weights)
    frozen_paths = () if frozen is None else _chosen("frozen", frozen, weights)
    both = sorted(set(mixed_paths) & set(frozen_paths))
    if both:
        raise AgwmError(f"`mixed` and `frozen` both match {_listed(both)}; a weight has one role: narrow a pattern.")
    for path in mixed_paths:
        by_pattern = isinstance(mixed, str)
        if weights[path].ndim < 2 or (by_pattern and path.rpartition(".")[2] in ("bias", "scale")):
            raise AgwmError(
                f"`mixed` matches {path!r} of shape {weights[path].shape}, which is no kernel: a mixed weight has two "
                "axes or more [*layers, d_in, d_out], and only a list of paths may name a bias or scale; narrow the "
                "pattern to kernels."
            )
    named_axes = {path: "l" * (weights[path].ndim - 2) + "io" for path in mixed_paths}
    for pattern, letters in (axes or {}).items():
        for path in _chosen("axes", pattern if pattern not in weights else [pattern], mixed_paths):
            if len(letters) != weights[path].ndim or not re.fullmatch("l*i+o+", letters):
                raise AgwmError(
                    f"axes: {path!r} of shape {weights[path].shape} has axes {letters!r}; expected a letter for each, "
                    "first l (stacked), then i (input), then o (output), such as 'ioo' for [d, heads, d_head]."
                )
            named_axes[path] = letters
    _refuse_tied({path: x for path, x in weights.items() if path not in frozen_paths})
    return Partition(weights, mixed_paths, named_axes, frozen_paths, Structure(treedef, paths, others))


def _refuse_tied(trained: Mapping[str, Any]) -> None:
    first: dict[int, str] = {}
    for path, x in trained.items():
        if isinstance(x, jax.ShapeDtypeStruct):  # of one shape, which says nothing
            continue
        other = first.setdefault(id(x), path)
        if other != path:
            raise AgwmError(
                f"{other!r} and {path!r} are one array, and would be trained apart: leave one of them out of `params` "
                "and tie them in the loss, or copy one if they are not meant to be tied."
            )


def _named_leaves(params: PyTree) -> tuple[list[tuple[str, Any]], set[str], Any]:
    """Leaves by path, the paths of NNX variables that are no parameters, and the structure."""
    # An NNX variable is itself a node with one child, which is not part of the name that its user knows.
    nodes, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_nnx_variable)
    variables = {path: node for path, node in nodes if _is_nnx_variable(node)}
    keyed, treedef = jax.tree_util.tree_flatten_with_path(params)
    short = [(path[:-1] if path[:-1] in variables else path, leaf) for path, leaf in keyed]
    kept = {_dotted(path) for path, node in variables.items() if not _is_nnx(node, "Param")}
    return [(_dotted(path), leaf) for path, leaf in short], kept, treedef


def _dotted(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _is_nnx_variable(node) -> bool:
    return _is_nnx(node, "Variable")


def _is_nnx(node, name: str) -> bool:
    # By name: the core does not import flax.
    return any(kind.__name__ == name and kind.__module__.startswith("flax.nnx") for kind in type(node).__mro__)


def _is_weight(leaf) -> bool:
    return hasattr(leaf, "dtype") and hasattr(leaf, "shape") and jnp.issubdtype(leaf.dtype, jnp.floating)


def _chosen(role: str, chosen: str | Sequence[str], weights: Collection[str]) -> tuple[str, ...]:
    """Paths by pattern, or the paths that are listed, in the order of the weights."""
    if isinstance(chosen, str):
        return _matching(role, chosen, weights)
    unknown = [path for path in chosen if path not in weights]
    if unknown:
        near = difflib.get_close_matches(unknown[0], weights, n=3, cutoff=0.0)
        raise AgwmError(
            f"`{role}` lists {_listed(unknown)}, which is none of the {len(weights)} weights, such as {_listed(near)}."
        )
    listed = set(chosen)
    return tuple(path for path in weights if path in listed)


def _matching(role: str, pattern: str, weights: Collection[str]) -> tuple[str, ...]:
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
