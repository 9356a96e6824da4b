"""Where in the stack of layers each weight lies, and updates that depend on it."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import DictKey

from agwm_jax.errors import AgwmError
from agwm_jax.methods.interface import Setup
from agwm_jax.models.weights import num_layers


def count_layers(setup: Setup) -> int:
    """l, of the model."""
    weights = setup.model.weights
    return max([_stacked(setup), *((weight.depth or 0) - 1 for weight in weights.values())])


def from_the_top(setup: Setup) -> dict[str, np.ndarray]:
    """How many layers lie above each weight: 0 of pooler and head; ``[l]``, l to 1, of a weight stacked over l layers.

    Embeddings have l + 1.
    """
    top, stacked = count_layers(setup) + 1, np.arange(1, _stacked(setup) + 1)
    return {
        path: np.asarray(top - (stacked if weight.depth is None else weight.depth))
        for path, weight in setup.model.weights.items()
    }


def check_layers(count: int, setup: Setup, *, setting: str) -> int:
    """The count.

    Raises:
        AgwmError: the model has fewer layers.
    """
    if count > count_layers(setup):
        raise AgwmError(
            f"{setting}: got {count} layers, and the model has {count_layers(setup)}: give no more than that."
        )
    return count


def scale_by_layer(factors: Mapping[str, Any], setup: Setup) -> optax.GradientTransformation:
    """Leaves times the factor of the weight that the last known key on their way names; one number, or one a layer."""
    weights = setup.model.weights

    def scaled(path, x):
        known = [entry.key for entry in path if isinstance(entry, DictKey) and entry.key in factors]
        if not known:
            return x
        factor = np.asarray(factors[known[-1]])
        shape = (-1, *[1] * (x.ndim - 1)) if weights[known[-1]].is_stacked else ()
        return x * jnp.asarray(factor.reshape(shape), x.dtype)

    def update(updates, state, params=None):
        del params
        return jax.tree_util.tree_map_with_path(scaled, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _stacked(setup: Setup) -> int:
    return num_layers(setup.model.weights, {path: shape.shape for path, shape in setup.shapes.items()})
