"""The family of Llama: decoders, read as classifiers at the last real token; Qwen2 and Qwen3 have its layout."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from agwm_jax.models.attention import fused_attention
from agwm_jax.models.classifier import Classifier
from agwm_jax.models.config import ACTIVATIONS, SIZES, LayeredConfig, find_faults, is_whole, refuse
from agwm_jax.models.family import FAMILIES, Family, Options, Row, dense_rows, scale_row
from agwm_jax.models.layers import attention, bias_of, rms_norm
from agwm_jax.models.rotary import Rope, read_rope, turn, turns
from agwm_jax.models.stack import Stack, dense, make_linear, make_table, over_data
from agwm_jax.models.weights import Weight

_PLAIN = Rope(theta=10_000.0)


@dataclasses.dataclass(frozen=True)
class LlamaConfig(LayeredConfig):
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
        defaults = {field.name: field.default for field in dataclasses.fields(cls) if field.name not in SIZES}
        used: dict[str, Any] = {name: values[name] for name in SIZES if name in values}
        used |= {name: values.get(name, default) for name, default in defaults.items()}
        heads: Any = used.get("num_attention_heads")
        width: Any = used.get("hidden_size")
        used["num_key_value_heads"] = values.get("num_key_value_heads") or heads
        if not values.get("head_dim"):
            whole = is_whole(heads, at_least=1) and is_whole(width, at_least=1)
            used["head_dim"] = 128 if used["model_type"] == "qwen3" else width // heads if whole else 1
        used["rope"], faults = read_rope(values, _PLAIN.theta)
        faults += [f"{name} is missing" for name in SIZES if name not in values]
        faults += find_faults(
            {name: x for name, x in used.items() if name in values or x is not None},
            counts=(*SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings"),
            rates=("attention_dropout",),
            positive=("rms_norm_eps", "initializer_range"),
            activations=("hidden_act",),
        )
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
    def head_dropout(self) -> float:
        """The classifier has none."""
        return 0.0

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
        self.word = make_table(config, options, rngs, config.vocab_size)


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


class LlamaClassifier(Classifier):
    """A decoder with a linear classifier without bias on the last real token's state, or on the mean over tokens.

    Padding may stand on either side. Source: Touvron et al., arXiv 2302.13971; Qwen: arXiv 2407.10671, 2505.09388;
    layer by layer as in Hugging Face's LlamaForSequenceClassification.
    """

    def __init__(self, config: LlamaConfig, *, num_labels: int, pooling: str, options: Options, rngs: nnx.Rngs) -> None:
        super().__init__(config, pooling=pooling, options=options)
        self.embeddings = Tables(config, options=options, rngs=rngs)
        self.encoder = Stack(DecoderLayer, config, options=options, rngs=rngs)
        self.norm = RMSNorm(config.hidden_size, config, options)
        self.classifier = make_linear(config, options, options.wide, rngs, config.hidden_size, num_labels, bias=False)

    def states(self, embedded, ids, types, real, *, key, reverse_only) -> Float[Array, "b t d"]:
        """After the last norm."""
        del ids, types
        config, wide, t = self.config, self.options.wide, real.shape[-1]
        drops = key is not None and config.attention_dropout > 0
        fuse = self.fuses(reverse_only=reverse_only, head_width=config.head_dim, length=t, drops=drops)
        angles = tuple(jnp.asarray(each) for each in turns(config.rope, t, config.head_dim, wide))
        earlier = jnp.asarray(np.tril(np.ones((t, t), bool)))[None, None]
        bias = bias_of(real[:, None, None] & earlier, wide)
        return self.norm(self.encoder(embedded, bias, angles, real.sum(axis=-1), key=key, fuse=fuse))

    def first(self, x, real, *, key) -> Float[Array, "b d"]:
        """The last real token's state."""
        del key
        last = jnp.max(jnp.where(real, jnp.arange(real.shape[-1])[None], 0), axis=-1)
        return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]


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
