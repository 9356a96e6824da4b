"""The BERT encoder with a classification or regression head, as a Flax NNX module with stacked, scanned layers."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key, Num

from agwm_jax.errors import AgwmError
from agwm_jax.models.attention import fused_attention, fused_refusal

# Names as in Hugging Face's config.json. BERT's "gelu" is the exact one (erf), the other two the tanh approximation.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}

_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_COUNTS = (*_SIZES, "max_position_embeddings", "type_vocab_size")
_RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
_POSITIVE = ("initializer_range", "layer_norm_eps")
_REFUSED = ("is_decoder", "add_cross_attention")


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Shape and rates of a BERT encoder; names and meaning as in Hugging Face's config.json."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None  # None: as hidden_dropout_prob
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        _refuse(_value_faults(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "BertConfig":
        """Take what this model needs from the values of a config.json.

        Args:
            values: the parsed file; keys without a bearing on the forward pass are left alone.

        Raises:
            AgwmError: a size is missing or not usable, or the file asks for a variant that is not built here
                (decoder, cross attention, relative positions). All faults are in the one message.
        """
        faults = [f"{name} is missing" for name in _SIZES if name not in values]
        faults += [f"{name} is true, which is not supported" for name in _REFUSED if values.get(name)]
        position = values.get("position_embedding_type", "absolute")
        if position not in ("absolute", None):
            faults.append(f"position_embedding_type is {position!r}, only 'absolute' is supported")
        _refuse(faults)
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        used = {name: values.get(name, default) for name, default in defaults.items()}
        _refuse(_value_faults(used))
        for name in (*_RATES, *_POSITIVE):
            used[name] = None if used[name] is None else float(used[name])
        return cls(**used)

    def with_dropout(self, rate: float | None) -> "BertConfig":
        """The same configuration with all three dropout rates set to `rate`; None changes nothing."""
        if rate is None:
            return self
        return dataclasses.replace(
            self, hidden_dropout_prob=rate, attention_probs_dropout_prob=rate, classifier_dropout=rate
        )


def _value_faults(values: Mapping[str, Any]) -> list[str]:
    def is_number(value: Any, kind: Any) -> bool:
        return isinstance(value, kind) and not isinstance(value, bool)

    faults = [
        f"{name} is {values[name]!r}, expected a whole number of at least 1"
        for name in _COUNTS
        if not is_number(values[name], int) or values[name] < 1
    ]
    for name in _RATES:
        optional = name == "classifier_dropout" and values[name] is None
        if not optional and not (is_number(values[name], int | float) and 0 <= values[name] < 1):
            faults.append(f"{name} is {values[name]!r}, expected a number in [0, 1)")
    for name in _POSITIVE:
        if not (is_number(values[name], int | float) and values[name] > 0):
            faults.append(f"{name} is {values[name]!r}, expected a number above 0")
    if not isinstance(values["hidden_act"], str) or values["hidden_act"] not in ACTIVATIONS:
        faults.append(f"hidden_act is {values['hidden_act']!r}, known are {', '.join(ACTIVATIONS)}")
    width, heads = values["hidden_size"], values["num_attention_heads"]
    if not faults and width % heads:
        faults.append(f"hidden_size {width} is not a multiple of num_attention_heads {heads}")
    return faults


def _refuse(faults: list[str]) -> None:
    if faults:
        raise AgwmError("BERT configuration not usable: " + "; ".join(faults) + ".")


def dropout(x: Float[Array, "*shape"], rate: float, key: Key[Array, ""] | None) -> Float[Array, "*shape"]:
    """Zero each entry with probability `rate` and scale the others by the inverse of the probability to be kept.

    A bit generator that yields one 32-bit word per entry is a notable part of a training step on a CPU; a word here
    serves two entries. The rate is rounded to a multiple of 2^-16 and the scale is that of the rounded rate, so the
    expectation is exact.

    Args:
        x: any array with at least one axis.
        rate: probability to be zeroed, in [0, 1).
        key: typed PRNG key; None means no dropout.
    """
    kept = 65536 - round(rate * 65536)
    if key is None or kept == 65536:
        return x
    *leading, last = x.shape
    words = jax.random.bits(key, (*leading, -(-last // 2)), jnp.uint32)
    bits = lax.bitcast_convert_type(words, jnp.uint16).reshape(*leading, -1)[..., :last]
    return jnp.where(bits < kept, x * jnp.asarray(65536 / kept, x.dtype), jnp.zeros((), x.dtype))


def _over_data(x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """Keep the examples cut over the axis `data` of the mesh that is set (`jax.set_mesh`), if one is.

    Where weights are cut over that axis too, the partitioner may otherwise bring the examples of all devices to the
    parts of the weights, and not the weights, layer by layer, to the examples.
    """
    if "data" not in jax.sharding.get_abstract_mesh().axis_names:
        return x
    return lax.with_sharding_constraint(x, PartitionSpec("data"))


def _split(key: Key[Array, ""] | None, num: int) -> Key[Array, " num"] | list[None]:
    return [None] * num if key is None else jax.random.split(key, num)


class BertEmbeddings(nnx.Module):
    """Sum of word, position and token type embeddings, normalised."""

    def __init__(self, config: BertConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        init = nnx.initializers.normal(config.initializer_range)
        embed = partial(nnx.Embed, features=config.hidden_size, dtype=dtype, embedding_init=init, rngs=rngs)
        self.word = embed(config.vocab_size)
        self.position = embed(config.max_position_embeddings)
        self.token_type = embed(config.type_vocab_size)
        self.norm = _layer_norm(config, dtype, rngs)
        self.rate = config.hidden_dropout_prob

    def __call__(
        self, input_ids: Int[Array, "b t"], token_type_ids: Int[Array, "b t"], *, key: Key[Array, ""] | None
    ) -> Float[Array, "b t d"]:
        positions = self.position(jnp.arange(input_ids.shape[1]))
        x = self.word(input_ids) + self.token_type(token_type_ids) + positions[None]
        return _over_data(dropout(self.norm(x), self.rate, key))


class BertLayer(nnx.Module):
    """One transformer layer: self-attention and feed-forward, each with a residual and a norm after it."""

    def __init__(self, config: BertConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        linear = partial(_linear, config, dtype, rngs)
        width, inner = config.hidden_size, config.intermediate_size
        self.query = linear(width, width)
        self.key = linear(width, width)
        self.value = linear(width, width)
        self.attention_output = linear(width, width)
        self.attention_norm = _layer_norm(config, dtype, rngs)
        self.intermediate = linear(width, inner)
        self.output = linear(inner, width)
        self.output_norm = _layer_norm(config, dtype, rngs)
        self.config = config

    def attend(
        self, x: Float[Array, "b t d"], bias: Float[Array, "b t"], *, key: Key[Array, ""] | None, fuse: bool
    ) -> Float[Array, "b t d"]:
        """Softmax attention over all positions: plain products, which have a forward-mode rule, or the fused kernel."""
        b, t, d = x.shape
        h = self.config.num_attention_heads

        query, keys, value = (linear(x).reshape(b, t, h, d // h) for linear in (self.query, self.key, self.value))
        if fuse:
            return fused_attention(query, keys, value, (bias == 0).sum(axis=-1)).reshape(b, t, d)
        scores = jnp.einsum("bqhe,bkhe->bhqk", query, keys, preferred_element_type=jnp.float32)
        probabilities = jax.nn.softmax(scores * (d // h) ** -0.5 + bias[:, None, None, :], axis=-1).astype(x.dtype)
        probabilities = dropout(probabilities, self.config.attention_probs_dropout_prob, key)
        return jnp.einsum("bhqk,bkhe->bqhe", probabilities, value).reshape(b, t, d)

    def __call__(
        self, x: Float[Array, "b t d"], bias: Float[Array, "b t"], *, key: Key[Array, ""] | None, fuse: bool = False
    ) -> Float[Array, "b t d"]:
        attention_key, output_key, ffn_key = _split(key, 3)
        rate = self.config.hidden_dropout_prob
        attended = self.attention_output(self.attend(x, bias, key=attention_key, fuse=fuse))
        x = _over_data(self.attention_norm(x + dropout(attended, rate, output_key)))
        inner = ACTIVATIONS[self.config.hidden_act](self.intermediate(x))
        return _over_data(self.output_norm(x + dropout(self.output(inner), rate, ffn_key)))


class BertEncoder(nnx.Module):
    """All layers in one module whose weights carry a leading layer axis; applied by a scan over that axis."""

    def __init__(self, config: BertConfig, *, dtype: DTypeLike, unroll: int, rngs: nnx.Rngs) -> None:
        @nnx.split_rngs(splits=config.num_hidden_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> BertLayer:
            return BertLayer(config, dtype=dtype, rngs=rngs)

        self.layers = stack(rngs)
        self.num_layers = config.num_hidden_layers
        self.unroll = unroll

    def __call__(
        self, x: Float[Array, "b t d"], bias: Float[Array, "b t"], *, key: Key[Array, ""] | None, fuse: bool = False
    ) -> Float[Array, "b t d"]:
        graph, weights = nnx.split(self.layers)
        keys = None if key is None else jax.random.split(key, self.num_layers)

        def layer(x, weights_and_key):
            weights, key = weights_and_key
            return nnx.merge(graph, weights)(x, bias, key=key, fuse=fuse), None

        return lax.scan(layer, x, (weights, keys), unroll=self.unroll)[0]


class BertClassifier(nnx.Module):
    """BERT with a head on one vector a text: class logits, or one number where `num_labels` is 1.

    Args:
        config: shape and dropout rates.
        num_labels: size of the head, c.
        pooling: "cls" (first token, pooler with tanh) or "mean" (mean over real tokens, no pooler weights).
        dtype: dtype of the computation; weights, softmax, pooling and head stay float32.
        unroll: how many layers one turn of the scan holds.
        fuse_attention: run cuDNN's fused attention in calls that promise `reverse_only`, unless `fused_refusal` has a
            reason not to; False: never.
        rngs: stream "params" for the initial weights.

    Source: Devlin et al., arXiv 1810.04805; layer by layer as in Hugging Face's BertForSequenceClassification.
    """

    def __init__(
        self,
        config: BertConfig,
        *,
        num_labels: int,
        pooling: str = "cls",
        dtype: DTypeLike = jnp.float32,
        unroll: int = 1,
        fuse_attention: bool = True,
        rngs: nnx.Rngs,
    ) -> None:
        if pooling not in ("cls", "mean"):
            raise AgwmError(f"pooling is {pooling!r}, expected 'cls' or 'mean'.")
        self.embeddings = BertEmbeddings(config, dtype=dtype, rngs=rngs)
        self.encoder = BertEncoder(config, dtype=dtype, unroll=unroll, rngs=rngs)
        if pooling == "cls":
            self.pooler = _linear(config, jnp.float32, rngs, config.hidden_size, config.hidden_size)
        self.classifier = _linear(config, jnp.float32, rngs, config.hidden_size, num_labels)
        self.config = config
        self.pooling = pooling
        self.dtype = dtype
        self.fuse_attention = fuse_attention

    def __call__(
        self, batch: Mapping[str, Num[Array, "b t"]], *, key: Key[Array, ""] | None = None, reverse_only: bool = False
    ) -> Float[Array, "b c"]:
        """Logits of a batch.

        Args:
            batch: `input_ids`, `token_type_ids`, `attention_mask` [b, t]; other entries are not read.
            key: typed PRNG key of the dropout masks; None means no dropout.
            reverse_only: a promise that nothing differentiates this call in forward mode, or twice (`jax.jvp`,
                `jax.linearize`, a Hessian-vector product), and that padding follows the real tokens: fused attention,
                which bears none of these, may then serve.

        Returns:
            Logits [b, c], float32.

        Raises:
            AgwmError: when traced, if t is larger than the position table.
        """
        mask, limit = batch["attention_mask"], self.config.max_position_embeddings
        if mask.shape[-1] > limit:
            raise AgwmError(
                f"The texts are {mask.shape[-1]} tokens long but the model's position table ends at {limit}; "
                f"set max_length to {limit} or less."
            )
        embedding_key, encoder_key, head_key = _split(key, 3)
        # Finite, so that a row of nothing but padding gives an even softmax and no NaN.
        bias = jnp.where(mask != 0, 0.0, jnp.finfo(jnp.float32).min).astype(jnp.float32)
        x = self.embeddings(batch["input_ids"], batch["token_type_ids"], key=embedding_key)
        x = self.encoder(
            x, bias, key=encoder_key, fuse=reverse_only and self._fused_refusal(mask.shape[-1], key) is None
        )
        if self.pooling == "cls":
            pooled = jnp.tanh(self.pooler(x[:, 0].astype(jnp.float32)))
        else:
            real = (mask != 0).astype(jnp.float32)[:, :, None]
            pooled = (x.astype(jnp.float32) * real).sum(1) / jnp.maximum(real.sum(1), 1.0)
        rate = self.config.classifier_dropout
        return self.classifier(dropout(pooled, self.config.hidden_dropout_prob if rate is None else rate, head_key))

    def _fused_refusal(self, length: int, key: Key[Array, ""] | None) -> str | None:
        if not self.fuse_attention:
            return "fuse_attention is false"
        return fused_refusal(
            dtype=self.dtype,
            head_width=self.config.hidden_size // self.config.num_attention_heads,
            length=length,
            dropout=key is not None and self.config.attention_probs_dropout_prob > 0,
        )


def _linear(config: BertConfig, dtype: DTypeLike, rngs: nnx.Rngs, inputs: int, outputs: int) -> nnx.Linear:
    init = nnx.initializers.normal(config.initializer_range)
    return nnx.Linear(inputs, outputs, dtype=dtype, kernel_init=init, rngs=rngs)


def _layer_norm(config: BertConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # The fast variance, E[x^2] - E[x]^2, loses too many digits for parity with the reference.
    return nnx.LayerNorm(
        config.hidden_size, epsilon=config.layer_norm_eps, dtype=dtype, use_fast_variance=False, rngs=rngs
    )
