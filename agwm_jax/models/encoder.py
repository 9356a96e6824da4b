"""What encoders of BERT's layout share: embedding sum, layers, pooling, rows of a table."""

import abc
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from agwm_jax.core.types import Batch
from agwm_jax.errors import AgwmError
from agwm_jax.models.attention import fused_attention, fused_refusal
from agwm_jax.models.encoder_config import ACTIVATIONS, EncoderConfig
from agwm_jax.models.family import Options, Row, dense_rows, norm_rows
from agwm_jax.models.layers import attention, dropout
from agwm_jax.models.stack import Stack, dense, make_linear, make_norm, norm, over_data, split
from agwm_jax.models.weights import Weight


class Embeddings(nnx.Module):
    """Tables of words, positions and token types, and the norm of their sum."""

    def __init__(self, config: EncoderConfig, *, options: Options, rngs: nnx.Rngs) -> None:
        init = nnx.initializers.normal(config.initializer_range)
        embed = partial(
            nnx.Embed,
            features=config.hidden_size,
            dtype=options.dtype,
            param_dtype=options.wide,
            embedding_init=init,
            rngs=rngs,
        )
        self.word = embed(config.vocab_size)
        self.position = embed(config.max_position_embeddings)
        self.token_type = embed(config.type_vocab_size)
        self.norm = make_norm(config, options, rngs)
        self.rate = config.hidden_dropout_prob

    def __call__(
        self,
        words: Float[Array, "b t d"],
        positions: Int[Array, "#b t"],
        types: Int[Array, "b t"],
        *,
        key: Key[Array, ""] | None,
    ) -> Float[Array, "b t d"]:
        x = words + self.token_type(types) + self.position(positions)
        return over_data(dropout(norm(self.norm, x), self.rate, key))


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
        self, x: Float[Array, "b t d"], bias: Float[Array, "b t"], *, key: Key[Array, ""] | None, fuse: bool
    ) -> Float[Array, "b t d"]:
        """Softmax attention over all positions: plain products, which have a forward-mode rule, or the fused kernel."""
        b, t, d = x.shape
        h = self.config.num_attention_heads

        query, keys, value = (dense(one, x).reshape(b, t, h, d // h) for one in (self.query, self.key, self.value))
        if fuse:
            return fused_attention(query, keys, value, (bias == 0).sum(axis=-1)).reshape(b, t, d)
        rate = self.config.attention_probs_dropout_prob
        return attention(query, keys, value, bias, rate=rate, key=key).reshape(b, t, d)

    def __call__(
        self, x: Float[Array, "b t d"], bias: Float[Array, "b t"], *, key: Key[Array, ""] | None, fuse: bool = False
    ) -> Float[Array, "b t d"]:
        attention_key, output_key, ffn_key = split(key, 3)
        rate = self.config.hidden_dropout_prob
        attended = dense(self.attention_output, self.attend(x, bias, key=attention_key, fuse=fuse))
        x = over_data(norm(self.attention_norm, x + dropout(attended, rate, output_key)))
        inner = ACTIVATIONS[self.config.hidden_act](dense(self.intermediate, x))
        return over_data(norm(self.output_norm, x + dropout(dense(self.output, inner), rate, ffn_key)))


class EncoderClassifier(nnx.Module):
    """An encoder and a head on one vector a text: class logits, or one number where `num_labels` is 1.

    A family's class adds its head: `logits`, and where it differs `positions` and `first`.

    Args:
        config: shape and dropout rates.
        pooling: "cls" (what `first` makes of the first token) or "mean" (mean over real tokens).
        options: how it computes.
        rngs: stream "params" for the initial weights.
    """

    def __init__(self, config: EncoderConfig, *, pooling: str, options: Options, rngs: nnx.Rngs) -> None:
        if pooling not in ("cls", "mean"):
            raise AgwmError(f"pooling is {pooling!r}, expected 'cls' or 'mean'.")
        self.embeddings = Embeddings(config, options=options, rngs=rngs)
        self.encoder = Stack(EncoderLayer, config, options=options, rngs=rngs)
        self.config = config
        self.pooling = pooling
        self.options = options

    def embed(self, batch: Batch) -> Float[Array, "b t d"]:
        """Word embeddings of ``batch["input_ids"]``."""
        return self.embeddings.word(jnp.asarray(batch["input_ids"]))

    def features(
        self,
        embedded: Float[Array, "b t d"],
        batch: Batch,
        *,
        key: Key[Array, ""] | None = None,
        reverse_only: bool = False,
    ) -> Float[Array, "b d"]:
        """One vector a text, in float32 or float64.

        Args:
            embedded: what `embed` gives.
            batch: `input_ids`, `attention_mask` [b, t] and, where there are several types, `token_type_ids`; other
                entries are not read.
            key: typed PRNG key of the dropout masks; None means no dropout.
            reverse_only: a promise that nothing differentiates this call in forward mode, or twice (`jax.jvp`,
                `jax.linearize`, a Hessian-vector product), and that padding follows the real tokens: fused attention,
                which bears none of these, may then serve.

        Raises:
            AgwmError: when traced, if t is larger than the position table.
        """
        ids, mask = jnp.asarray(batch["input_ids"]), jnp.asarray(batch["attention_mask"])
        limit = self.config.max_length
        if mask.shape[-1] > limit:
            raise AgwmError(
                f"The texts are {mask.shape[-1]} tokens long but the model's position table ends at {limit}; "
                f"set max_length to {limit} or less."
            )
        wide = self.options.wide
        embedding_key, encoder_key = split(key, 2)
        # Finite, so that a row of nothing but padding gives an even softmax and no NaN.
        bias = jnp.where(mask != 0, 0.0, jnp.finfo(wide).min).astype(wide)
        types = jnp.asarray(batch.get("token_type_ids", jnp.zeros_like(ids)))
        x = self.embeddings(embedded, self.positions(ids), types, key=embedding_key)
        fuse = reverse_only and self.options.fuse_attention
        if fuse:
            width = self.config.hidden_size // self.config.num_attention_heads
            drops = key is not None and self.config.attention_probs_dropout_prob > 0
            reason = fused_refusal(dtype=self.options.dtype, head_width=width, length=mask.shape[-1], dropout=drops)
            fuse = reason is None
        x = self.encoder(x, bias, key=encoder_key, fuse=fuse)
        if self.pooling == "cls":
            return self.first(x[:, 0].astype(wide))
        real = (mask != 0).astype(wide)[:, :, None]
        return (x.astype(wide) * real).sum(1) / jnp.maximum(real.sum(1), 1.0)

    def positions(self, ids: Int[Array, "b t"]) -> Int[Array, "#b t"]:
        """Rows of the position table."""
        return jnp.arange(ids.shape[1])[None]

    def first(self, x: Float[Array, "b d"]) -> Float[Array, "b d"]:
        """What is made of the first token's vector."""
        return x

    @abc.abstractmethod
    def logits(self, features: Float[Array, "b d"], *, key: Key[Array, ""] | None = None) -> Float[Array, "b c"]:
        """Of the head."""


def _table_row(path: str, name: str, axis: str) -> dict[str, Row]:
    return {f"embeddings.{path}.embedding": Row(Weight("embedding", (axis, "width"), 0), f"embeddings.{name}.weight")}


ENCODER_ROWS: dict[str, Row] = {
    **_table_row("word", "word_embeddings", "vocab"),
    **_table_row("position", "position_embeddings", "positions"),
    **_table_row("token_type", "token_type_embeddings", "types"),
    **norm_rows("embeddings.norm", "embeddings.LayerNorm", depth=0),
    **dense_rows("encoder.layers.query", "encoder.layer.{}.attention.self.query", ("width", "heads")),
    **dense_rows("encoder.layers.key", "encoder.layer.{}.attention.self.key", ("width", "heads")),
    **dense_rows("encoder.layers.value", "encoder.layer.{}.attention.self.value", ("width", "heads")),
    **dense_rows("encoder.layers.attention_output", "encoder.layer.{}.attention.output.dense", ("heads", "width")),
    **norm_rows("encoder.layers.attention_norm", "encoder.layer.{}.attention.output.LayerNorm"),
    **dense_rows("encoder.layers.intermediate", "encoder.layer.{}.intermediate.dense", ("width", "mlp")),
    **dense_rows("encoder.layers.output", "encoder.layer.{}.output.dense", ("mlp", "width")),
    **norm_rows("encoder.layers.output_norm", "encoder.layer.{}.output.LayerNorm"),
}
"""All that lies between the word embeddings and the last layer's output."""


def rows_after(config: EncoderConfig, *layers: dict[str, Any]) -> dict[str, Row]:
    """`ENCODER_ROWS` and the dense layers that come after the last layer, given as keywords of `dense_rows`."""
    after = [dense_rows(**layer, depth=config.num_hidden_layers + 1) for layer in layers]
    return {path: row for rows in (ENCODER_ROWS, *after) for path, row in rows.items()}
