"""A model as the rest of the library sees it: pure functions of its weights, and what is known of each weight."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Key

from agwm_jax.core.types import Batch
from agwm_jax.models.weights import Weights

Effective = Mapping[str, Any]
"""Weights of a forward pass by path: an array each, of any kind that JAX takes, or a `Deferred` that computes it."""


class Model(NamedTuple):
    """A text classifier or regressor; `logits(features(embed))` is its forward pass.

    Functions are pure and take all weights by path; randomness comes in by keys, and without a key there is no dropout.
    A weight may be a `Deferred`: one that is stacked over layers is then computed within the scan, layer by layer.
    """

    embed: Callable[[Effective, Batch], Float[Array, "b t d"]]
    """``embed(params, batch)``: the word embeddings of ``batch["input_ids"] [b, t]``, before positions and norms: what
    methods that perturb the input perturb."""
    features: Callable[..., Float[Array, "b d"]]
    """``features(params, embedded, batch, *, key=None, reverse_only=False)``: one vector a text. `reverse_only` is the
    promise that nothing differentiates the call in forward mode, or twice; fused attention may then serve."""
    logits: Callable[..., Float[Array, "b c"]]
    """``logits(params, features, *, key=None)``: of the head."""
    weights: Weights
    """By path, in the order of the model."""
    num_heads: int | None = None
    """Into how many equal blocks attention cuts what the logical axis ``heads`` counts; None: there is no attention."""

    def apply(
        self, params: Effective, batch: Batch, *, key: Key[Array, ""] | None = None, reverse_only: bool = False
    ) -> Float[Array, "b c"]:
        """Logits of a batch: the composition of the three functions, with dropout where there is a key."""
        return self.from_embedded(params, self.embed(params, batch), batch, key=key, reverse_only=reverse_only)

    def from_embedded(
        self,
        params: Effective,
        embedded: Float[Array, "n t d"],
        batch: Batch,
        *,
        key: Key[Array, ""] | None = None,
        reverse_only: bool = False,
    ) -> Float[Array, "b c"]:
        """What `apply` makes of the word embeddings (n is b, or what the model's own `embed` makes of b examples)."""
        features_key, head_key = (None, None) if key is None else jax.random.split(key)
        features = self.features(params, embedded, batch, key=features_key, reverse_only=reverse_only)
        return self.logits(params, features, key=head_key)


Shapes = dict[str, jax.ShapeDtypeStruct]
"""Of every weight by path."""
