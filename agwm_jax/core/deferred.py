"""Weights that are computed where they are used, so that no more than one layer's lives at a time."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jaxtyping import Array, PyTree


@partial(jax.tree_util.register_dataclass, data_fields=["operands"], meta_fields=["function"])
@dataclasses.dataclass(frozen=True)
class Deferred:
    """The weight ``function(*operands)``, not computed yet; stands among a model's weights in place of an array.

    It is a pytree of its operands: it may be differentiated, mapped and passed through `jax.jit`. Where a model scans
    over stacked layers, every operand of a stacked weight has the layer axis first, the scan hands each layer its own
    part, and `function` must be one that works without that axis. The backward pass computes the weight again.

    >>> import jax.numpy as jnp
    >>> from agwm_jax.core.deferred import Deferred
    >>> kernel = Deferred(lambda w0, w, a: a * w + (1 - a) * w0, (jnp.zeros(3), jnp.ones(3), jnp.full(3, 0.25)))
    >>> kernel.materialise().tolist()
    [0.25, 0.25, 0.25]
    """

    function: Callable[..., Array]
    """Pure; part of the pytree's structure, so it must be the same object wherever two of them meet."""
    operands: Any
    """Tuple of arrays, or of pytrees of arrays."""

    def materialise(self) -> Array:
        """The weight as an array."""
        return self.function(*self.operands)


def is_deferred(value: Any) -> bool:
    """Whether it is a weight that is not computed yet."""
    return isinstance(value, Deferred)


def materialise(tree: PyTree) -> PyTree:
    """The same tree with an array in place of every deferred weight."""
    return jax.tree.map(lambda x: x.materialise() if is_deferred(x) else x, tree, is_leaf=is_deferred)
