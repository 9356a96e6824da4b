"""Layer-wise learning-rate decay: the nearer a layer is to the input, the smaller its steps."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import DictKey
from pydantic import Field

from agwm_jax.methods.interface import METHODS, Setup
from agwm_jax.methods.technique import Technique
from agwm_jax.models.weights import Weights, num_layers


@METHODS.register("llrd", cost="1", paper="arXiv 1801.06146, 2006.05987")
class Llrd(Technique):
    """Plain fine-tuning whose learning rate falls from the top to the bottom: ``lr * decay^(depth from the top)``.

    The head and the pooler have the whole rate, the last layer that times `decay`, the embeddings the smallest one.
    Weight decay is scaled with it, as AdamW's is by the rate. decay = 1 is `vanilla` bit for bit.

    Cost 1 fb a step; memory of plain fine-tuning. For long training on few examples: the lower layers are general, and
    stay so. Source: Howard and Ruder 2018 (arXiv 1801.06146); for BERT Zhang et al. 2020 (arXiv 2006.05987).
    """

    changes: ClassVar = "gradient"
    name: Literal["llrd"] = Field(default="llrd", description="fine-tuning method")
    decay: float = Field(default=0.95, gt=0, le=1, description="factor of the learning rate from a layer to that below")

    def change_optimizer(self, tx: optax.GradientTransformation, setup: Setup) -> optax.GradientTransformation:
        """Updates times the factor of their layer."""
        depths = from_the_top(setup)
        return optax.chain(tx, scale_by_layer({path: self.decay**depth for path, depth in depths.items()}, setup))


def from_the_top(setup: Setup) -> dict[str, np.ndarray]:
    """How many layers lie above each weight: 0 of pooler and head; ``[l]``, l to 1, of a weight stacked over l layers.

    Embeddings have l + 1.
    """
    weights: Weights = setup.model.weights
    count = num_layers(weights, {path: shape.shape for path, shape in setup.shapes.items()})
    top = max([count + 1, *(weight.depth or 0 for weight in weights.values())])
    return {
        path: np.asarray(top - (np.arange(1, count + 1) if weight.depth is None else weight.depth))
        for path, weight in weights.items()
    }


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
