"""What encoders of BERT's layout share: embedding sum, layers stacked and scanned, pooling, rows of a table."""

import abc
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from agwm_jax.core.deferred import is_deferred, materialise
from agwm_jax.core.types import Batch
from agwm_jax.errors import AgwmError
from agwm_jax.models.attention import fused_attention, fused_refusal
from agwm_jax.models.encoder_config import ACTIVATIONS, EncoderConfig
from agwm_jax.models.family import Options, Row, dense_rows, norm_rows
from agwm_jax.models.layers import attention, dropout, layer_norm, linear
from agwm_jax.models.weights import Weight

_FEW_LAYERS = 6
"""So many in one turn make a training step of MiniLM 10 to 15 % faster than a scan, and its programs compile one and a
half times as long; more would make compiling the longer part of a short run."""
_POLICIES = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}


def _over_data(x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """Keep the examples cut over the axis `data` of the mesh that is set (`jax.set_mesh`), if one is.

    Where weights are cut over that axis too, the partitioner may otherwise bring the examples of all devices to the
    parts of the weights, and not the weights, layer by layer, to the examples.
    """
    if "data" not in jax.sharding.get_abstract_mesh().axis_names:
        return x
    return lax.with_sharding_constraint(x, PartitionSpec("data"))


def split(key: Key[Array, ""] | None, num: int) -> Key[Array, " num"] | list[None]:
    """`num` keys out of one, or as many None."""
    return [None] * num if key is None else jax.random.split(key, num)


def dense(module: nnx.Linear, x: Float[Array, "*b d"]) -> Float[Array, "*b e"]:
    """``x @ kernel + bias``; a deferred kernel is computed here, and once more in the backward pass instead of kept."""
    kernel, bias = module.kernel.get_value(), module.bias.get_value()  # type: ignore[union-attr]  # it has one
    if not is_deferred(kernel):
        return linear(x, jnp.asarray(kernel), jnp.asarray(bias))
    return jax.checkpoint(lambda kernel, bias, x: linear(x, materialise(kernel), bias))(kernel, bias, x)


def norm(module: nnx.LayerNorm, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Layer norm with the module's weights."""
    scale, bias = module.scale.get_value(), module.bias.get_value()  # type: ignore[union-attr]  # it has both
    return layer_norm(x, jnp.asarray(scale), jnp.asarray(bias), epsilon=module.epsilon)


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
        return _over_data(dropout(norm(self.norm, x), self.rate, key))


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
        x = _over_data(norm(self.attention_norm, x + dropout(attended, rate, output_key)))
        inner = ACTIVATIONS[self.config.hidden_act](dense(self.intermediate, x))
        return _over_data(norm(self.output_norm, x + dropout(dense(self.output, inner), rate, ffn_key)))


class Encoder(nnx.Module):
    """All layers in one module whose weights carry a leading layer axis; applied by a scan over that axis."""

    def __init__(self, config: EncoderConfig, *, options: Options, rngs: nnx.Rngs) -> None:
        @nnx.split_rngs(splits=config.num_hidden_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> EncoderLayer:
            return EncoderLayer(config, options=options, rngs=rngs)

        self.layers = stack(rngs)
        self.num_layers = config.num_hidden_layers
        self.unroll = options.unroll or (self.num_layers if self.num_layers <= _FEW_LAYERS else 1)
        self.remat = options.remat

    def __call__(
        self, x: Float[Array, "b t d"], bias: Float[Array, "b t"], *, key: Key[Array, ""] | None, fuse: bool = False
    ) -> Float[Array, "b t d"]:
        graph, weights = nnx.split(self.layers)
        keys = None if key is None else jax.random.split(key, self.num_layers)

        def layer(x, weights_and_key):
            weights, key = weights_and_key
            return nnx.merge(graph, weights)(x, bias, key=key, fuse=fuse), None

        if self.remat != "none":
            # Layers of one turn could share what they compute again, layers of two turns cannot.
            layer = jax.checkpoint(layer, policy=_POLICIES[self.remat], prevent_cse=self.unroll > 1)
        return lax.scan(layer, x, (weights, keys), unroll=self.unroll)[0]


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
        self.encoder = Encoder(config, options=options, rngs=rngs)
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


def make_linear(
    config: EncoderConfig, options: Options, dtype: DTypeLike, rngs: nnx.Rngs, inputs: int, outputs: int
) -> nnx.Linear:
    """A dense layer that computes in `dtype`."""
    init = nnx.initializers.normal(config.initializer_range)
    return nnx.Linear(inputs, outputs, dtype=dtype, param_dtype=options.wide, kernel_init=init, rngs=rngs)


def make_norm(config: EncoderConfig, options: Options, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """A norm over the width."""
    # The fast variance, E[x^2] - E[x]^2, loses too many digits for parity with the reference.
    return nnx.LayerNorm(
        config.hidden_size,
        epsilon=config.layer_norm_eps,
        dtype=options.dtype,
        param_dtype=options.wide,
        use_fast_variance=False,
        rngs=rngs,
    )


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
