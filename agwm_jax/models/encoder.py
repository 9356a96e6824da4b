"""What encoders of BERT's layout share: embedding sum, layers, pooling, rows of a table."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from agwm_jax.models.attention import fused_attention
from agwm_jax.models.classifier import Classifier
from agwm_jax.models.config import ACTIVATIONS
from agwm_jax.models.encoder_config import EncoderConfig
from agwm_jax.models.family import Options, Row, dense_rows, norm_rows
from agwm_jax.models.layers import attention, bias_of, dropout
from agwm_jax.models.stack import Stack, dense, make_linear, make_norm, make_table, norm, over_data, split
from agwm_jax.models.weights import Weight


class Embeddings(nnx.Module):
    """Tables of words, positions and, where the model has them, token types; the norm of their sum."""

    def __init__(self, config: EncoderConfig, *, options: Options, rngs: nnx.Rngs) -> None:
        embed = partial(make_table, config, options, rngs, width=config.embedding_width)
        self.word = embed(config.vocab_size)
        self.position = embed(config.max_position_embeddings)
        if config.has_types:
            self.token_type = embed(config.type_vocab_size)
        self.norm = make_norm(config, options, rngs, config.embedding_width)
        if config.projects:
            widths = config.embedding_width, config.hidden_size
            self.projection = make_linear(config, options, options.dtype, rngs, *widths)
        self.config = config

    def __call__(
        self,
        words: Float[Array, "b t e"],
        positions: Int[Array, "#b t"],
        types: Int[Array, "b t"],
        *,
        key: Key[Array, ""] | None,
    ) -> Float[Array, "b t d"]:
        x = words + self.token_type(types) if self.config.has_types else words
        x = dropout(norm(self.norm, x + self.position(positions)), self.config.hidden_dropout_prob, key)
        return over_data(dense(self.projection, x) if self.config.projects else x)


class EncoderLayer(nnx.Module):
    """One transformer layer: self-attention and feed-forward, each with a residual and a norm after it."""

    def __init__(self, config: EncoderConfig, *, options: Options, rngs: nnx.Rngs) -> None:
        make = partial(make_linear, config, options, options.dtype, rngs)
        width, inner = config.hidden_size, config.intermediate_size
        self.query = make(width, width)
        self.key = make(width, width)
        self.value = make(width, width)
        self.attention_output = make(width, width)
        self.attention_norm = make_norm(config, options, rngs)
        self.intermediate = make(width, inner)
        self.output = make(inner, width)
        self.output_norm = make_norm(config, options, rngs)
        self.config = config

    def attend(
        self,
        x: Float[Array, "b t d"],
        bias: Float[Array, "#b #h #t t"],
        lengths: Int[Array, "b"],
        *,
        key: Key[Array, ""] | None,
        fuse: bool,
    ) -> Float[Array, "b t d"]:
        """Softmax attention over all positions: plain products, which have a forward-mode rule, or the fused kernel."""
        b, t, d = x.shape
        h = self.config.num_attention_heads

        query, keys, value = (dense(one, x).reshape(b, t, h, d // h) for one in (self.query, self.key, self.value))
        if fuse:
            return fused_attention(query, keys, value, lengths).reshape(b, t, d)
        rate = self.config.attention_probs_dropout_prob
        return attention(query, keys, value, bias, rate=rate, key=key).reshape(b, t, d)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        bias: Float[Array, "#b #h #t t"],
        others: Any,
        *,
        key: Key[Array, ""] | None,
        fuse: bool = False,
    ) -> Float[Array, "b t d"]:
        """`bias` and `others` are what `attend` reads."""
        attention_key, output_key, ffn_key = split(key, 3)
        rate = self.config.hidden_dropout_prob
        attended = dense(self.attention_output, self.attend(x, bias, others, key=attention_key, fuse=fuse))
        x = over_data(norm(self.attention_norm, x + dropout(attended, rate, output_key)))
        inner = ACTIVATIONS[self.config.hidden_act](dense(self.intermediate, x))
        inner = dropout(dense(self.output, inner), self.config.feed_forward_dropout, ffn_key)
        return over_data(norm(self.output_norm, x + inner))


class EncoderClassifier(Classifier):
    """An encoder with a head on the first token's state ("cls") or on the mean.

    A family's class adds its head: `classifier`, and where it differs `logits`, `positions`, `bias` and `first`.

    Args:
        config: shape and dropout rates.
        pooling: "cls" or "mean".
        options: how it computes.
        rngs: stream "params" for the initial weights.
    """

    can_fuse: ClassVar[bool] = True
    """Whether attention is that of `fused_attention`: no bias but that of padding."""

    def __init__(self, config: EncoderConfig, *, pooling: str, options: Options, rngs: nnx.Rngs) -> None:
        super().__init__(config, pooling=pooling, options=options)
        self.embeddings = Embeddings(config, options=options, rngs=rngs)
        self.encoder = Stack(EncoderLayer, config, options=options, rngs=rngs)

    def states(self, embedded, ids, types, real, *, key, reverse_only) -> Float[Array, "b t d"]:
        """After the last layer."""
        config, t = self.config, real.shape[-1]
        embedding_key, encoder_key = split(key, 2)
        x = self.embeddings(embedded, self.positions(ids), types, key=embedding_key)
        fuse = self.can_fuse and self.fuses(
            reverse_only=reverse_only,
            head_width=config.hidden_size // config.num_attention_heads,
            length=t,
            drops=key is not None and config.attention_probs_dropout_prob > 0,
        )
        return self.encoder(x, self.bias(real), real.sum(axis=-1), key=encoder_key, fuse=fuse)

    def positions(self, ids: Int[Array, "b t"]) -> Int[Array, "#b t"]:
        """Rows of the position table."""
        return jnp.arange(ids.shape[1])[None]

    def bias(self, real: Bool[Array, "b t"]) -> Float[Array, "#b #h #t t"]:
        """Added to the scores of attention."""
        return bias_of(real, self.options.wide)[:, None, None]


class PooledClassifier(EncoderClassifier):
    """An encoder with a pooler (tanh) on the first token, or the mean over tokens and no pooler, and a linear
    classifier."""

    def __init__(
        self, config: EncoderConfig, *, num_labels: int, pooling: str, options: Options, rngs: nnx.Rngs
    ) -> None:
        super().__init__(config, pooling=pooling, options=options, rngs=rngs)
        width, wide = config.hidden_size, options.wide
        if pooling == "cls":
            self.pooler = make_linear(config, options, wide, rngs, width, width)
        self.classifier = make_linear(config, options, wide, rngs, width, num_labels)

    def first(self, x, real, *, key) -> Float[Array, "b d"]:
        """The pooler."""
        return jnp.tanh(dense(self.pooler, super().first(x, real, key=key)))


class DenseHeadClassifier(EncoderClassifier):
    """An encoder with a classifier of two layers, dropout before each, and no pooler."""

    activation: ClassVar[Callable[[Array], Array]] = jnp.tanh
    """Between the two layers."""

    def __init__(
        self, config: EncoderConfig, *, num_labels: int, pooling: str, options: Options, rngs: nnx.Rngs
    ) -> None:
        super().__init__(config, pooling=pooling, options=options, rngs=rngs)
        width, wide = config.hidden_size, options.wide
        self.classifier_dense = make_linear(config, options, wide, rngs, width, width)
        self.classifier = make_linear(config, options, wide, rngs, width, num_labels)

    def logits(self, features: Float[Array, "b d"], *, key: Key[Array, ""] | None = None) -> Float[Array, "b c"]:
        """Of the classifier's two layers."""
        first, second = split(key, 2)
        rate = self.config.head_dropout
        hidden = type(self).activation(self.classifier_dense(dropout(features, rate, first)))
        return self.classifier(dropout(hidden, rate, second))


def count_positions(ids: Int[Array, "b t"], padding: int) -> Int[Array, "b t"]:
    """Padding has its own row of the table; real tokens count on from it."""
    real = (ids != padding).astype(ids.dtype)
    return jnp.cumsum(real, axis=1, dtype=ids.dtype) * real + padding


LAYER_NAMES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
}
"""Of a layer's parts in the file: BERT's."""


def encoder_rows(
    config: EncoderConfig,
    *after: dict[str, Any],
    layer: str = "encoder.layer.{}",
    names: Mapping[str, str] = LAYER_NAMES,
    projection: str = "",
) -> dict[str, Row]:
    """The table of an encoder.

    Args:
        config: of the model.
        after: what comes after the last layer: dense layers, as keywords of `dense_rows`.
        layer: name of a layer in the file, before those of its parts.
        names: of its parts.
        projection: of the dense layer after the embeddings, where there is one.
    """
    last = config.depth + 1
    axis = "width" if config.embedding_width == config.hidden_size else "embedding"
    tables = {"embeddings.word": "vocab"}
    if config.has_positions:
        tables["embeddings.position"] = "positions"
    if config.has_types:
        tables["embeddings.token_type"] = "types"
    rows = {
        f"{name}.embedding": Row(Weight("embedding", (what, axis), 0), f"{name}_embeddings.weight")
        for name, what in tables.items()
    }
    rows |= norm_rows("embeddings.norm", "embeddings.LayerNorm", depth=0, axis="vector" if axis == "width" else axis)
    if config.projects:
        rows |= dense_rows("embeddings.projection", projection, (axis, "width"), depth=0)
    axes = {"attention_output": ("heads", "width"), "intermediate": ("width", "mlp"), "output": ("mlp", "width")}
    for part, name in names.items():
        path, name = f"encoder.layers.{part}", f"{layer}.{name}"
        rows |= norm_rows(path, name) if "norm" in part else dense_rows(path, name, axes.get(part, ("width", "heads")))
    for dense_layer in after:
        rows |= dense_rows(**dense_layer, depth=last)
    return rows
