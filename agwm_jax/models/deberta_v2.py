"""The family of DeBERTa-v2 and v3: attention to contents and to relative positions, a pooler, a linear classifier."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from agwm_jax.core.types import Batch
from agwm_jax.models.encoder import EncoderLayer, encoder_rows
from agwm_jax.models.encoder_config import ACTIVATIONS, EncoderConfig, is_whole, refuse
from agwm_jax.models.family import FAMILIES, Family, Options, Row, check_length, dense_rows, norm_rows
from agwm_jax.models.layers import dropout, scored_attention
from agwm_jax.models.stack import Stack, dense, make_linear, make_norm, norm, over_data, split
from agwm_jax.models.weights import Weight

_WAYS = ("c2p", "p2c")


@dataclasses.dataclass(frozen=True)
class DebertaV2Config(EncoderConfig):
    """Shape and rates of a DeBERTa-v2 or v3; names, meaning and defaults as in Hugging Face's config.json."""

    file_names: ClassVar = {"classifier_dropout": "cls_dropout"}

    type_vocab_size: int = 0
    layer_norm_eps: float = 1e-7
    embedding_size: int | None = None  # None: as hidden_size
    position_biased_input: bool = True
    pos_att_type: tuple[str, ...] = ()
    share_att_key: bool = False
    position_buckets: int = -1  # below 1: a bucket for each distance
    max_relative_positions: int = -1  # below 1: max_position_embeddings
    norm_rel_ebd: str = "none"
    pooler_hidden_act: str = "gelu"
    pooler_dropout: float = 0.0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DebertaV2Config":
        """As for other encoders; ``pos_att_type`` may be a list or words joined by "|"."""
        ways = values.get("pos_att_type") or ()
        ways = tuple(way.strip() for way in ways.lower().split("|")) if isinstance(ways, str) else tuple(ways)
        if ways and not values.get("relative_attention"):
            refuse(["relative_attention is false beside a pos_att_type, which is not supported"])
        if values.get("conv_kernel_size"):
            refuse([f"conv_kernel_size is {values['conv_kernel_size']!r}, which is not supported"])
        return super().from_dict({**values, "pos_att_type": ways})  # type: ignore[return-value]

    @classmethod
    def faults(cls, values: Mapping[str, Any]) -> list[str]:
        """What is wrong with values."""
        no_types = values.get("type_vocab_size") == 0
        faults = super().faults({k: x for k, x in values.items() if k != "type_vocab_size" or not no_types})
        if set(values["pos_att_type"]) - set(_WAYS):
            faults.append(f"pos_att_type is {list(values['pos_att_type'])}, known are {' and '.join(_WAYS)}")
        if values["norm_rel_ebd"] not in ("none", "layer_norm"):
            faults.append(f"norm_rel_ebd is {values['norm_rel_ebd']!r}, known are none and layer_norm")
        if values["pooler_hidden_act"] not in ACTIVATIONS:
            faults.append(f"pooler_hidden_act is {values['pooler_hidden_act']!r}, known are {', '.join(ACTIVATIONS)}")
        if values["embedding_size"] is not None and not is_whole(values["embedding_size"], at_least=1):
            faults.append(f"embedding_size is {values['embedding_size']!r}, expected a whole number of at least 1")
        return faults

    @property
    def has_types(self) -> bool:
        """Whether there is a table of token types."""
        return self.type_vocab_size > 0

    @property
    def has_positions(self) -> bool:
        """Whether there is a table of positions."""
        return self.position_biased_input

    @property
    def embedding_width(self) -> int:
        """Of the tables."""
        return self.embedding_size or self.hidden_size

    @property
    def reach(self) -> int:
        """The farthest distance that is told apart."""
        return self.max_relative_positions if self.max_relative_positions > 0 else self.max_position_embeddings

    @property
    def span(self) -> int:
        """Rows of the table of relative positions, on either side of 0."""
        return self.position_buckets if self.position_buckets > 0 else self.reach

    def with_dropout(self, rate: float | None) -> "DebertaV2Config":
        """The same configuration with all dropout rates set to `rate`; None changes nothing."""
        rates: dict[str, Any] = {} if rate is None else {"pooler_dropout": rate}
        return dataclasses.replace(super().with_dropout(rate), **rates)  # type: ignore[return-value]

    def to_dict(self) -> dict[str, Any]:
        """As config.json has it."""
        return super().to_dict() | {
            "pos_att_type": list(self.pos_att_type),
            "relative_attention": bool(self.pos_att_type),
        }


class Embeddings(nnx.Module):
    """Tables of words and, where the model has them, positions and token types; their sum, widened and normed."""

    def __init__(self, config: DebertaV2Config, *, options: Options, rngs: nnx.Rngs) -> None:
        init, width = nnx.initializers.normal(config.initializer_range), config.embedding_width
        embed = partial(
            nnx.Embed, features=width, dtype=options.dtype, param_dtype=options.wide, embedding_init=init, rngs=rngs
        )
        self.word = embed(config.vocab_size)
        if config.position_biased_input:
            self.position = embed(config.max_position_embeddings)
        if config.has_types:
            self.token_type = embed(config.type_vocab_size)
        if config.projects:
            self.projection = make_linear(config, options, options.dtype, rngs, width, config.hidden_size, bias=False)
        self.norm = make_norm(config, options, rngs)
        self.config = config

    def __call__(
        self,
        words: Float[Array, "b t e"],
        types: Int[Array, "b t"],
        mask: Int[Array, "b t"],
        *,
        key: Key[Array, ""] | None,
    ) -> Float[Array, "b t d"]:
        x = words
        if self.config.position_biased_input:
            x = x + self.position(jnp.arange(mask.shape[1])[None])
        if self.config.has_types:
            x = x + self.token_type(types)
        if self.config.projects:
            x = dense(self.projection, x)
        x = norm(self.norm, x) * (mask != 0).astype(x.dtype)[:, :, None]
        return over_data(dropout(x, self.config.hidden_dropout_prob, key))


class DebertaV2Layer(EncoderLayer):
    """A layer of an encoder whose scores add what a content makes of a relative position, and the other way round."""

    config: DebertaV2Config

    def __init__(self, config: DebertaV2Config, *, options: Options, rngs: nnx.Rngs) -> None:
        super().__init__(config, options=options, rngs=rngs)
        make, width = partial(make_linear, config, options, options.dtype, rngs), config.hidden_size
        if "c2p" in config.pos_att_type and not config.share_att_key:
            self.position_key = make(width, width)
        if "p2c" in config.pos_att_type and not config.share_att_key:
            self.position_query = make(width, width)

    def attend(self, x, bias, positions, *, key, fuse) -> Float[Array, "b t d"]:
        """Softmax of ``(q k' + q kr' + k qr') / sqrt(n e) + bias``, n the number of terms, r relative positions.

        Args:
            x: ``[b, t, d]``.
            bias: of padding, ``[b, 1, 1, t]``.
            positions: the table of relative positions, normed, ``[2 span, d]``.
            key: of dropout, of the table and of the probabilities.
            fuse: not offered here: the fused kernel adds no such scores.
        """
        del fuse
        config, (b, t, d) = self.config, x.shape
        h = config.num_attention_heads
        table_key, key = split(key, 2)
        query, keys, value = (dense(one, x).reshape(b, t, h, d // h) for one in (self.query, self.key, self.value))
        wide = jnp.promote_types(x.dtype, jnp.float32)
        scores = jnp.einsum("bqhe,bkhe->bhqk", query, keys, preferred_element_type=wide)
        if config.pos_att_type:
            table = dropout(positions, config.hidden_dropout_prob, table_key)
            rows = jnp.asarray(relative_rows(t, config))[None, None]

            def of_positions(own: nnx.Linear) -> Float[Array, "r h e"]:
                return dense(own, table).reshape(-1, h, d // h)

        if "c2p" in config.pos_att_type:
            relative = of_positions(self.key if config.share_att_key else self.position_key)
            by_row = jnp.einsum("bqhe,rhe->bhqr", query, relative, preferred_element_type=wide)
            scores = scores + jnp.take_along_axis(by_row, rows, axis=-1)
        if "p2c" in config.pos_att_type:
            relative = of_positions(self.query if config.share_att_key else self.position_query)
            by_row = jnp.einsum("bkhe,rhe->bhkr", keys, relative, preferred_element_type=wide)
            # Of key and query: the row of the distance between them, which is that of query and key.
            scores = scores + jnp.take_along_axis(by_row, rows.swapaxes(-1, -2), axis=-1).swapaxes(-1, -2)
        scores = scores * (d // h * (1 + len(config.pos_att_type))) ** -0.5
        rate = config.attention_probs_dropout_prob
        return scored_attention(scores + bias, value, rate=rate, key=key).reshape(b, t, d)


def relative_rows(length: int, config: DebertaV2Config) -> Int[np.ndarray, "t t"]:
    """Row of the table of relative positions for every query and key: a bucket of ``query - key``, from span on.

    Up to half the buckets each distance has its own, farther ones share buckets on a logarithmic scale up to `reach`.
    """
    distance = np.arange(length)[:, None] - np.arange(length)[None]
    if config.position_buckets > 0:
        middle = config.position_buckets // 2
        apart = np.where(np.abs(distance) < middle, middle - 1, np.abs(distance)).astype(np.float32)
        steps = np.log(apart / middle) / np.log(np.float32((config.reach - 1) / middle)) * (middle - 1)
        far = (np.ceil(steps) + middle).astype(np.int64) * np.sign(distance)
        distance = np.where(apart <= middle, distance, far)
    return np.clip(distance + config.span, 0, 2 * config.span - 1)


class DebertaV2Classifier(nnx.Module):
    """DeBERTa with a pooler on the first token, or the mean over tokens and no pooler, and a linear classifier.

    Source: He et al., arXiv 2006.03654 and 2111.09543; layer by layer as in Hugging Face's
    DebertaV2ForSequenceClassification.
    """

    def __init__(
        self, config: DebertaV2Config, *, num_labels: int, pooling: str, options: Options, rngs: nnx.Rngs
    ) -> None:
        width, wide = config.hidden_size, options.wide
        self.embeddings = Embeddings(config, options=options, rngs=rngs)
        self.encoder = Stack(DebertaV2Layer, config, options=options, rngs=rngs)
        if config.pos_att_type:
            init = nnx.initializers.normal(config.initializer_range)
            self.relative = nnx.Embed(2 * config.span, width, param_dtype=wide, embedding_init=init, rngs=rngs)
            if config.norm_rel_ebd == "layer_norm":
                self.relative_norm = make_norm(config, options, rngs)
        if pooling == "cls":
            self.pooler = make_linear(config, options, wide, rngs, width, width)
        self.classifier = make_linear(config, options, wide, rngs, width, num_labels)
        self.config, self.pooling, self.options = config, pooling, options

    def embed(self, batch: Batch) -> Float[Array, "b t e"]:
        """Word embeddings of ``batch["input_ids"]``."""
        return self.embeddings.word(jnp.asarray(batch["input_ids"]))

    def features(
        self,
        embedded: Float[Array, "b t e"],
        batch: Batch,
        *,
        key: Key[Array, ""] | None = None,
        reverse_only: bool = False,
    ) -> Float[Array, "b d"]:
        """One vector a text, in float32 or float64; arguments as for other encoders.

        Raises:
            AgwmError: when traced, if the texts are longer than the model's positions.
        """
        del reverse_only
        config, wide, mask = self.config, self.options.wide, jnp.asarray(batch["attention_mask"])
        check_length(mask.shape[-1], config.max_length)
        embedding_key, encoder_key, pooler_key = split(key, 3)
        types = jnp.asarray(batch.get("token_type_ids", jnp.zeros_like(mask)))
        x = self.embeddings(embedded, types, mask, key=embedding_key)
        positions = jnp.zeros((0, config.hidden_size), x.dtype)
        if config.pos_att_type:
            positions = jnp.asarray(self.relative.embedding.get_value()).astype(x.dtype)
            if config.norm_rel_ebd == "layer_norm":
                positions = norm(self.relative_norm, positions)
        bias = jnp.where(mask != 0, 0.0, jnp.finfo(wide).min).astype(wide)[:, None, None]
        x = self.encoder(x, bias, positions, key=encoder_key).astype(wide)
        if self.pooling == "cls":
            first = dropout(x[:, 0], config.pooler_dropout, pooler_key)
            return ACTIVATIONS[config.pooler_hidden_act](dense(self.pooler, first))
        weights = (mask != 0).astype(wide)[:, :, None]
        return (x * weights).sum(1) / jnp.maximum(weights.sum(1), 1.0)

    def logits(self, features: Float[Array, "b d"], *, key: Key[Array, ""] | None = None) -> Float[Array, "b c"]:
        """Of the classifier, after dropout."""
        return self.classifier(dropout(features, self.config.head_dropout, key))


def table(config: DebertaV2Config) -> dict[str, Row]:
    """One row a weight."""
    layer = "encoder.layer.{}"
    rows = encoder_rows(
        config,
        # Of the head: published encoders have no pooler.
        {"path": "pooler", "name": "pooler.dense", "axes": ("width", "width"), "role": "head"},
        {"path": "classifier", "name": "classifier", "axes": ("width", "classes"), "role": "head"},
        names={
            "query": "attention.self.query_proj",
            "key": "attention.self.key_proj",
            "value": "attention.self.value_proj",
            "attention_output": "attention.output.dense",
            "attention_norm": "attention.output.LayerNorm",
            "intermediate": "intermediate.dense",
            "output": "output.dense",
            "output_norm": "output.LayerNorm",
        },
    )
    rows |= norm_rows("embeddings.norm", "embeddings.LayerNorm", depth=0)
    if config.projects:
        del rows["embeddings.projection.bias"]
        rows |= dense_rows(
            "embeddings.projection", "embeddings.embed_proj", ("embedding", "width"), depth=0, bias=False
        )
    own = {"position_key": ("c2p", "pos_key_proj"), "position_query": ("p2c", "pos_query_proj")}
    for part, (way, name) in own.items():
        if way in config.pos_att_type and not config.share_att_key:
            rows |= dense_rows(f"encoder.layers.{part}", f"{layer}.attention.self.{name}", ("width", "heads"))
    if config.pos_att_type:
        rows["relative.embedding"] = Row(Weight("embedding", ("buckets", "width"), 0), "encoder.rel_embeddings.weight")
        rows |= norm_rows("relative_norm", "encoder.LayerNorm", depth=0)
    return rows


@FAMILIES.register("deberta_v2", paper="arXiv 2006.03654, 2111.09543")
def deberta_v2() -> Family:
    """DeBERTa-v3 from xsmall to large, mDeBERTa-v3, and those of v2 without a convolution."""
    return Family(
        model_types={"deberta-v2": "DebertaV2"},
        read_config=DebertaV2Config.from_dict,
        module=DebertaV2Classifier,
        table=table,
        prefix="deberta.",
        # Of pretraining; v3 keeps position embeddings that it does not read.
        ignored=r"embeddings\.position_(ids|embeddings\.weight)|(lm_predictions|mask_predictions|cls)\..*",
        tokenizer_files=("tokenizer.json", "spm.model"),
    )
