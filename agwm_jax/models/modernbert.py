"""The family of ModernBERT: rotary positions, local and global attention by turns, gated feed-forward, few biases."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from agwm_jax.models.classifier import Classifier
from agwm_jax.models.config import ACTIVATIONS, SIZES, LayeredConfig, find_faults, is_whole, refuse
from agwm_jax.models.family import FAMILIES, Family, Options, Row, dense_rows, norm_rows, scale_row
from agwm_jax.models.layers import attention, bias_of, dropout, local_attention
from agwm_jax.models.rotary import Rope, read_rope, turn, turns
from agwm_jax.models.stack import Stack, dense, make_linear, make_norm, make_table, norm, over_data, split
from agwm_jax.models.weights import Weight

_RATES = ("attention_dropout", "embedding_dropout", "mlp_dropout", "classifier_dropout")
_GLOBAL, _LOCAL = "full_attention", "sliding_attention"
_FAR, _NEAR = Rope(theta=160_000.0), Rope(theta=10_000.0)
_ROPES = {"far": (_GLOBAL, "global_rope_theta", _FAR), "near": (_LOCAL, "local_rope_theta", _NEAR)}


@dataclasses.dataclass(frozen=True)
class ModernBertConfig(LayeredConfig):
    """Shape and rates of a ModernBERT; names, meaning and defaults as in Hugging Face's config.json."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    layer_types: tuple[str, ...]
    far: Rope = _FAR
    near: Rope = _NEAR
    local_attention: int = 128
    hidden_activation: str = "gelu"
    classifier_activation: str = "gelu"
    attention_bias: bool = False
    mlp_bias: bool = False
    norm_bias: bool = False
    classifier_bias: bool = False
    attention_dropout: float = 0.0
    embedding_dropout: float = 0.0
    mlp_dropout: float = 0.0
    classifier_dropout: float = 0.0
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    norm_eps: float = 1e-5

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModernBertConfig":
        """Take what this model needs from the values of a config.json.

        Raises:
            AgwmError: a size is missing or not usable, or the file asks for a variant that is not built here. All
                faults are in the one message.
        """
        names = {field.name: field.default for field in dataclasses.fields(cls)}
        used = {name: values[name] for name in SIZES if name in values}
        others = [name for name in names if name not in (*SIZES, "layer_types", "far", "near")]
        used |= {name: values.get(name, names[name]) for name in others}
        faults = [f"{name} is missing" for name in SIZES if name not in values]
        faults += find_faults(
            used,
            counts=(*SIZES, "max_position_embeddings", "local_attention"),
            rates=_RATES,
            positive=("norm_eps", "initializer_range"),
            activations=("hidden_activation", "classifier_activation"),
        )
        ropes = values.get("rope_parameters") or {}
        if not isinstance(ropes, Mapping):
            faults.append(f"rope_parameters is {ropes!r}, expected an object")
            ropes = {}
        for name, (kind, theta, default) in _ROPES.items():
            used[name], wrong = read_rope({"rope_parameters": ropes.get(kind)}, values.get(theta, default.theta))
            faults += wrong
        every: Any = values.get("global_attn_every_n_layers", 3)
        count: Any = used.get("num_hidden_layers")
        kinds: Any = values.get("layer_types")
        if kinds is None and is_whole(every, at_least=1) and is_whole(count, at_least=1):
            kinds = [_LOCAL if i % every else _GLOBAL for i in range(count)]
        if not isinstance(kinds, list | tuple) or len(kinds) != count or set(kinds) - {_GLOBAL, _LOCAL}:
            faults.append(f"layer_types is {kinds!r}, expected {_GLOBAL} or {_LOCAL} for each of {count} layers")
        refuse(faults)
        used["layer_types"] = tuple(kinds)
        width, heads = used["hidden_size"], used["num_attention_heads"]
        if width % (2 * heads):
            refuse([f"hidden_size {width} is not a multiple of twice num_attention_heads {heads}"])
        return cls(**used)

    @property
    def head_dropout(self) -> float:
        """Rate before the classifier."""
        return self.classifier_dropout

    @property
    def layer_norm_eps(self) -> float:
        """Added to the variance."""
        return self.norm_eps

    @property
    def kinds(self) -> tuple[tuple[bool, bool], ...]:
        """Of each layer: whether it is the first, which has no norm before attention, and whether it is local."""
        return tuple((i == 0, kind == _LOCAL) for i, kind in enumerate(self.layer_types))

    def with_dropout(self, rate: float | None) -> "ModernBertConfig":
        """The same configuration with all dropout rates set to `rate`; None changes nothing."""
        rates: dict[str, Any] = {} if rate is None else dict.fromkeys(_RATES, rate)
        return dataclasses.replace(self, **rates)

    def with_attention_dropout(self, rate: float) -> "ModernBertConfig":
        """The same configuration with attention's dropout at `rate`."""
        return dataclasses.replace(self, attention_dropout=rate)

    def to_dict(self) -> dict[str, Any]:
        """As config.json has it."""
        values = {name: x for name, x in dataclasses.asdict(self).items() if name not in ("far", "near")}
        ropes = {_GLOBAL: self.far.to_dict(), _LOCAL: self.near.to_dict()}
        return values | {"layer_types": list(self.layer_types), "rope_parameters": ropes}


class Embeddings(nnx.Module):
    """The table of words and a norm."""

    def __init__(self, config: ModernBertConfig, *, options: Options, rngs: nnx.Rngs) -> None:
        self.word = make_table(config, options, rngs, config.vocab_size)
        self.norm = make_norm(config, options, rngs, bias=config.norm_bias)


class ModernBertLayer(nnx.Module):
    """One layer: attention to all positions or to near ones, and a gated feed-forward part, each after a norm."""

    def __init__(self, config: ModernBertConfig, *, options: Options, rngs: nnx.Rngs) -> None:
        make = partial(make_linear, config, options, options.dtype, rngs)
        width, inner = config.hidden_size, config.intermediate_size
        self.attention_norm = make_norm(config, options, rngs, bias=config.norm_bias)
        self.query = make(width, width, bias=config.attention_bias)
        self.key = make(width, width, bias=config.attention_bias)
        self.value = make(width, width, bias=config.attention_bias)
        self.attention_output = make(width, width, bias=config.attention_bias)
        self.mlp_norm = make_norm(config, options, rngs, bias=config.norm_bias)
        self.intermediate = make(width, inner, bias=config.mlp_bias)
        self.gate = make(width, inner, bias=config.mlp_bias)
        self.output = make(inner, width, bias=config.mlp_bias)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "b t d"],
        real: Bool[Array, "b t"],
        angles: tuple[tuple[Float[Array, "t e"], Float[Array, "t e"]], ...],
        *,
        key: Key[Array, ""] | None,
        kind: tuple[bool, bool],
    ) -> Float[Array, "b t d"]:
        """`angles` of global and of local attention; `kind` as in the configuration."""
        (is_first, is_local), config, (b, t, d) = kind, self.config, x.shape
        attention_key, output_key, ffn_key = split(key, 3)
        normed = x if is_first else norm(self.attention_norm, x)
        shape = b, t, config.num_attention_heads, d // config.num_attention_heads
        query, keys, value = (dense(one, normed).reshape(shape) for one in (self.query, self.key, self.value))
        query, keys = (turn(each, *angles[is_local]) for each in (query, keys))
        options: dict[str, Any] = {"rate": config.attention_dropout, "key": attention_key}
        if is_local:
            attended = local_attention(query, keys, value, real, reach=config.local_attention // 2, **options)
        else:
            bias = bias_of(real, jnp.promote_types(x.dtype, jnp.float32))[:, None, None]
            attended = attention(query, keys, value, bias, **options)
        attended = dense(self.attention_output, attended.reshape(b, t, d))
        x = over_data(x + dropout(attended, config.attention_dropout, output_key))
        normed = norm(self.mlp_norm, x)
        inner = ACTIVATIONS[config.hidden_activation](dense(self.intermediate, normed)) * dense(self.gate, normed)
        return over_data(x + dense(self.output, dropout(inner, config.mlp_dropout, ffn_key)))


class ModernBertClassifier(Classifier):
    """ModernBERT with a dense layer and a norm on the first token, or on the mean over tokens, and a linear classifier.

    Attention is plain products, for the fused kernel knows no window; local layers never form the whole score matrix.

    Source: Warner et al., arXiv 2412.13663; layer by layer as in Hugging Face's ModernBertForSequenceClassification.
    """

    def __init__(
        self, config: ModernBertConfig, *, num_labels: int, pooling: str, options: Options, rngs: nnx.Rngs
    ) -> None:
        super().__init__(config, pooling=pooling, options=options)
        width, wide = config.hidden_size, options.wide
        self.embeddings = Embeddings(config, options=options, rngs=rngs)
        self.encoder = Stack(ModernBertLayer, config, options=options, rngs=rngs, kinds=config.kinds)
        self.norm = make_norm(config, options, rngs, bias=config.norm_bias)
        self.pooler = make_linear(config, options, wide, rngs, width, width, bias=config.classifier_bias)
        self.pooler_norm = make_norm(config, options, rngs, bias=config.norm_bias)
        self.classifier = make_linear(config, options, wide, rngs, width, num_labels)

    def states(self, embedded, ids, types, real, *, key, reverse_only) -> Float[Array, "b t d"]:
        """After the last norm."""
        del ids, types, reverse_only
        config, t, wide = self.config, real.shape[-1], self.options.wide
        embedding_key, encoder_key = split(key, 2)
        x = over_data(dropout(norm(self.embeddings.norm, embedded), config.embedding_dropout, embedding_key))
        width = config.hidden_size // config.num_attention_heads
        angles = tuple(
            tuple(jnp.asarray(each) for each in turns(rope, t, width, wide)) for rope in (config.far, config.near)
        )
        return norm(self.norm, self.encoder(x, real, angles, key=encoder_key))

    def features(self, embedded, batch, *, key=None, reverse_only=False) -> Float[Array, "b d"]:
        """One vector a text: of the first token's state or of the mean, through a dense layer and a norm."""
        pooled = super().features(embedded, batch, key=key, reverse_only=reverse_only)
        activation = ACTIVATIONS[self.config.classifier_activation]
        return norm(self.pooler_norm, activation(dense(self.pooler, pooled)))


def table(config: ModernBertConfig) -> dict[str, Row]:
    """One row a weight."""
    layer, path, last = "layers.{}", "encoder.layers", config.depth + 1
    norms = norm_rows if config.norm_bias else scale_row
    rows = {
        "embeddings.word.embedding": Row(Weight("embedding", ("vocab", "width"), 0), "embeddings.tok_embeddings.weight")
    }
    rows |= norms("embeddings.norm", "embeddings.norm", depth=0)
    before = norms(f"{path}.attention_norm", f"{layer}.attn_norm")
    rows |= {name: row._replace(first_layer=1) for name, row in before.items()}
    for part, name in enumerate(("query", "key", "value")):
        fused = dense_rows(f"{path}.{name}", f"{layer}.attn.Wqkv", ("width", "heads"), bias=config.attention_bias)
        rows |= {key: row._replace(part=(part, 3)) for key, row in fused.items()}
    rows |= dense_rows(f"{path}.attention_output", f"{layer}.attn.Wo", ("heads", "width"), bias=config.attention_bias)
    rows |= norms(f"{path}.mlp_norm", f"{layer}.mlp_norm")
    for part, name in enumerate(("intermediate", "gate")):
        fused = dense_rows(f"{path}.{name}", f"{layer}.mlp.Wi", ("width", "mlp"), bias=config.mlp_bias)
        rows |= {key: row._replace(part=(part, 2)) for key, row in fused.items()}
    rows |= dense_rows(f"{path}.output", f"{layer}.mlp.Wo", ("mlp", "width"), bias=config.mlp_bias)
    rows |= norms("norm", "final_norm", depth=last)
    top = dense_rows("pooler", "head.dense", ("width", "width"), depth=last, bias=config.classifier_bias)
    top |= norms("pooler_norm", "head.norm", depth=last)
    rows |= {name: row._replace(prefixed=False) for name, row in top.items()}
    return rows | dense_rows("classifier", "classifier", ("width", "classes"), depth=last, role="head")


@FAMILIES.register("modernbert", paper="arXiv 2412.13663")
def modernbert() -> Family:
    """ModernBERT, mmBERT and the encoders of Ettin."""
    return Family(
        model_types={"modernbert": "ModernBert"},
        read_config=ModernBertConfig.from_dict,
        module=ModernBertClassifier,
        table=table,
        prefix="model.",
        ignored=r"decoder\.(weight|bias)",
        pooling_key="classifier_pooling",
    )
