"""The family of Llama: decoders, read as classifiers at the last real token; Qwen2 and Qwen3 have its layout."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from agwm_jax.core.types import Batch
from agwm_jax.models.attention import fused_attention, fused_refusal
from agwm_jax.models.encoder_config import ACTIVATIONS, is_number, is_whole, refuse
from agwm_jax.models.family import FAMILIES, Family, Options, Row, check_length, dense_rows, scale_row
from agwm_jax.models.layers import attention, rms_norm
from agwm_jax.models.rotary import Rope, read_rope, turn, turns
from agwm_jax.models.stack import Stack, dense, make_linear, over_data, split
from agwm_jax.models.weights import Weight

_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_PLAIN = Rope(theta=10_000.0)


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shape of a decoder; names, meaning and defaults as in Hugging Face's config.json."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    num_key_value_heads: int
    head_dim: int
    model_type: str = "llama"
    rope: Rope = _PLAIN
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LlamaConfig":
        """Take what this model needs from the values of a config.json.

        Raises:
            AgwmError: a size is missing or not usable, or the file asks for a variant that is not built here (sliding
                windows, other rotary scalings). All faults are in the one message.
        """
        kind, heads, width = (values.get(name) for name in ("model_type", "num_attention_heads", "hidden_size"))
        derived = 128 if kind == "qwen3" else width // heads if _is_size(width) and _is_size(heads) else 1  # type: ignore[operator]
        defaults = {field.name: field.default for field in dataclasses.fields(cls) if field.name not in _SIZES}
        used = {name: values[name] for name in _SIZES if name in values}
        used |= {name: values.get(name, default) for name, default in defaults.items()}
        used["num_key_value_heads"] = values.get("num_key_value_heads") or used.get("num_attention_heads", 1)
        used["head_dim"] = values.get("head_dim") or derived
        used["rope"], faults = read_rope(values, _PLAIN.theta)
        faults += [f"{name} is missing" for name in _SIZES if name not in values]
        sizes = (*_SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings")
        faults += [
            f"{name} is {used[name]!r}, expected a whole number of at least 1"
            for name in sizes
            if name in used and not _is_size(used[name])
        ]
        for name in ("rms_norm_eps", "initializer_range"):
            if not is_number(used[name]) or not used[name] > 0:
                faults.append(f"{name} is {used[name]!r}, expected a number above 0")
        if not is_number(used["attention_dropout"]) or not 0 <= used["attention_dropout"] < 1:
            faults.append(f"attention_dropout is {used['attention_dropout']!r}, expected a number in [0, 1)")
        if not isinstance(used["hidden_act"], str) or used["hidden_act"] not in ACTIVATIONS:
            faults.append(f"hidden_act is {used['hidden_act']!r}, known are {', '.join(ACTIVATIONS)}")
        if values.get("use_sliding_window") or set(values.get("layer_types") or ()) - {"full_attention"}:
            faults.append("use_sliding_window is true, which is not supported")
        if not faults and used["num_attention_heads"] % used["num_key_value_heads"]:
            faults.append(f"num_attention_heads {heads} is not a multiple of num_key_value_heads")
        if not faults and used["head_dim"] % 2:
            faults.append(f"head_dim is {used['head_dim']}, expected an even number")
        refuse(faults)
        return cls(**used)

    @property
    def qkv_bias(self) -> bool:
        """Whether queries, keys and values have a bias."""
        return self.attention_bias or self.model_type == "qwen2"

    @property
    def norms_heads(self) -> bool:
        """Whether there is a norm over each head's query and key."""
        return self.model_type == "qwen3"

    @property
    def max_length(self) -> int:
        """Longest text in tokens."""
        return self.max_position_embeddings

    @property
    def depth(self) -> int:
        """Layers that have weights of their own."""
        return self.num_hidden_layers

    @property
    def turns(self) -> int:
        """How often the layers are applied, one after the other."""
        return 1

    def with_dropout(self, rate: float | None) -> "LlamaConfig":
        """The same configuration with attention's dropout, the only one there is, at `rate`; None changes nothing."""
        return self if rate is None else dataclasses.replace(self, attention_dropout=rate)

    def with_attention_dropout(self, rate: float) -> "LlamaConfig":
        """The same configuration with attention's dropout at `rate`."""
        return dataclasses.replace(self, attention_dropout=rate)

    def to_dict(self) -> dict[str, Any]:
        """As config.json has it."""
        values = dataclasses.asdict(self) | {"rope_parameters": self.rope.to_dict()}
        return {name: value for name, value in values.items() if name not in ("model_type", "rope")}


def _is_size(value: Any) -> bool:
    return is_whole(value, at_least=1)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(self, width: int, config: LlamaConfig, options: Options) -> None:
        self.scale = nnx.Param(jnp.ones(width, options.wide))
        self.epsilon = config.rms_norm_eps

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return rms_norm(x, jnp.asarray(self.scale.get_value()), epsilon=self.epsilon)


class Tables(nnx.Module):
    """The table of words."""

    def __init__(self, config: LlamaConfig, *, options: Options, rngs: nnx.Rngs) -> None:
        init = nnx.initializers.normal(config.initializer_range)
        sizes = config.vocab_size, config.hidden_size
        self.word = nnx.Embed(*sizes, dtype=options.dtype, param_dtype=options.wide, embedding_init=init, rngs=rngs)


class DecoderLayer(nnx.Module):
    """One layer: attention to what came before and a gated feed-forward part, each after a norm, with a residual."""

    def __init__(self, config: LlamaConfig, *, options: Options, rngs: nnx.Rngs) -> None:
        make = partial(make_linear, config, options, options.dtype, rngs)
        width, inner, one = config.hidden_size, config.intermediate_size, config.head_dim
        queries, keys = one * config.num_attention_heads, one * config.num_key_value_heads
        self.attention_norm = RMSNorm(width, config, options)
        self.query = make(width, queries, bias=config.qkv_bias)
        self.key = make(width, keys, bias=config.qkv_bias)
        self.value = make(width, keys, bias=config.qkv_bias)
        if config.norms_heads:
            self.query_norm, self.key_norm = RMSNorm(one, config, options), RMSNorm(one, config, options)
        self.attention_output = make(queries, width, bias=config.attention_bias)
        self.mlp_norm = RMSNorm(width, config, options)
        self.gate = make(width, inner, bias=config.mlp_bias)
        self.intermediate = make(width, inner, bias=config.mlp_bias)
        self.output = make(inner, width, bias=config.mlp_bias)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "b t d"],
        bias: Float[Array, "b 1 t t"],
        angles: tuple[Float[Array, "t e"], Float[Array, "t e"]],
        lengths: Int[Array, "b"],
        *,
        key: Key[Array, ""] | None,
        fuse: bool = False,
    ) -> Float[Array, "b t d"]:
        config, (b, t, _) = self.config, x.shape
        normed = self.attention_norm(x)
        query, keys, value = (
            dense(one, normed).reshape(b, t, -1, config.head_dim) for one in (self.query, self.key, self.value)
        )
        if config.norms_heads:
            query, keys = self.query_norm(query), self.key_norm(keys)
        query, keys = turn(query, *angles), turn(keys, *angles)
        if fuse:
            attended = fused_attention(query, keys, value, lengths, causal=True)
        else:
            # A key serves as many heads, one after the other (Ainslie et al., arXiv 2305.13245).
            group = config.num_attention_heads // config.num_key_value_heads
            keys, value = (jnp.repeat(each, group, axis=2) for each in (keys, value))
            attended = attention(query, keys, value, bias, rate=config.attention_dropout, key=key)
        x = over_data(x + dense(self.attention_output, attended.reshape(b, t, -1)))
        normed = self.mlp_norm(x)
        inner = ACTIVATIONS[config.hidden_act](dense(self.gate, normed)) * dense(self.intermediate, normed)
        return over_data(x + dense(self.output, inner))


class LlamaClassifier(nnx.Module):
    """A decoder with a linear classifier without bias on the last real token's state, or on the mean over tokens.

    Padding may stand on either side. Source: Touvron et al., arXiv 2302.13971; Qwen: arXiv 2407.10671, 2505.09388;
    layer by layer as in Hugging Face's LlamaForSequenceClassification.
    """

    def __init__(self, config: LlamaConfig, *, num_labels: int, pooling: str, options: Options, rngs: nnx.Rngs) -> None:
        self.embeddings = Tables(config, options=options, rngs=rngs)
        self.encoder = Stack(DecoderLayer, config, options=options, rngs=rngs)
        self.norm = RMSNorm(config.hidden_size, config, options)
        self.classifier = make_linear(config, options, options.wide, rngs, config.hidden_size, num_labels, bias=False)
        self.config, self.pooling, self.options = config, pooling, options

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
        """One vector a text, in float32 or float64; arguments as for encoders.

        Raises:
            AgwmError: when traced, if the texts are longer than the model's positions.
        """
        config, wide, real = self.config, self.options.wide, jnp.asarray(batch["attention_mask"]) != 0
        t = real.shape[-1]
        check_length(t, config.max_length)
        fuse = reverse_only and self.options.fuse_attention
        if fuse:
            drops, kind = key is not None and config.attention_dropout > 0, self.options.dtype
            fuse = fused_refusal(dtype=kind, head_width=config.head_dim, length=t, dropout=drops) is None
        angles = tuple(jnp.asarray(each) for each in turns(config.rope, t, config.head_dim, wide))
        x = self.encoder(embedded, causal_bias(real, wide), angles, real.sum(axis=-1), key=split(key, 2)[0], fuse=fuse)
        x = self.norm(x).astype(wide)
        if self.pooling == "last":
            last = jnp.max(jnp.where(real, jnp.arange(t)[None], 0), axis=-1)
            return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
        weights = real.astype(wide)[:, :, None]
        return (x * weights).sum(1) / jnp.maximum(weights.sum(1), 1.0)

    def logits(self, features: Float[Array, "b d"], *, key: Key[Array, ""] | None = None) -> Float[Array, "b c"]:
        """Of the classifier."""
        del key  # it has no dropout
        return self.classifier(features)


def causal_bias(real: Bool[Array, "b t"], dtype: Any) -> Float[Array, "b 1 t t"]:
    """Added to the scores of attention: very small for what comes later, and for padding."""
    t = real.shape[-1]
    seen = real[:, None, None] & jnp.asarray(np.tril(np.ones((t, t), bool)))[None, None]
    return jnp.where(seen, 0.0, jnp.finfo(dtype).min).astype(dtype)


def table(config: LlamaConfig) -> dict[str, Row]:
    """One row a weight."""
    layer, path = "layers.{}", "encoder.layers"
    last, mlp = config.depth + 1, config.mlp_bias
    rows = {"embeddings.word.embedding": Row(Weight("embedding", ("vocab", "width"), 0), "embed_tokens.weight")}
    rows |= scale_row(f"{path}.attention_norm", f"{layer}.input_layernorm")
    rows |= dense_rows(f"{path}.query", f"{layer}.self_attn.q_proj", ("width", "heads"), bias=config.qkv_bias)
    rows |= dense_rows(f"{path}.key", f"{layer}.self_attn.k_proj", ("width", "kv_heads"), bias=config.qkv_bias)
    rows |= dense_rows(f"{path}.value", f"{layer}.self_attn.v_proj", ("width", "kv_heads"), bias=config.qkv_bias)
    if config.norms_heads:
        rows |= scale_row(f"{path}.query_norm", f"{layer}.self_attn.q_norm", axis="head")
        rows |= scale_row(f"{path}.key_norm", f"{layer}.self_attn.k_norm", axis="head")
    output = f"{layer}.self_attn.o_proj"
    rows |= dense_rows(f"{path}.attention_output", output, ("heads", "width"), bias=config.attention_bias)
    rows |= scale_row(f"{path}.mlp_norm", f"{layer}.post_attention_layernorm")
    rows |= dense_rows(f"{path}.gate", f"{layer}.mlp.gate_proj", ("width", "mlp"), bias=mlp)
    rows |= dense_rows(f"{path}.intermediate", f"{layer}.mlp.up_proj", ("width", "mlp"), bias=mlp)
    rows |= dense_rows(f"{path}.output", f"{layer}.mlp.down_proj", ("mlp", "width"), bias=mlp)
    rows |= scale_row("norm", "norm", depth=last)
    return rows | dense_rows("classifier", "score", ("width", "classes"), depth=last, role="head", bias=False)


@FAMILIES.register("llama", paper="arXiv 2302.13971")
def llama() -> Family:
    """Llama, SmolLM, Qwen2 and Qwen3, and other decoders of their layout."""
    return Family(
        model_types={"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"},
        read_config=LlamaConfig.from_dict,
        module=LlamaClassifier,
        table=table,
        prefix="model.",
        ignored=r"lm_head\.weight|(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
        tokenizer_files=("tokenizer.json", "vocab.json", "tokenizer.model"),
        poolings=("last", "mean"),
    )
