"""The family of DeBERTa-v2 and v3: attention to contents and to relative positions, a pooler, a linear classifier."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from agwm_jax.models.classifier import Classifier
from agwm_jax.models.config import ACTIVATIONS, find_faults, is_whole
from agwm_jax.models.encoder import EncoderLayer, encoder_rows
from agwm_jax.models.encoder_config import EncoderConfig
from agwm_jax.models.family import FAMILIES, Family, Options, Row, dense_rows, norm_rows
from agwm_jax.models.layers import bias_of, dropout, scored_attention
from agwm_jax.models.stack import Stack, dense, make_linear, make_norm, make_table, norm, over_data, split
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
        return super().from_dict({**values, "pos_att_type": ways})  # type: ignore[return-value]

    @classmethod
    def refused(cls, values: Mapping[str, Any]) -> list[str]:
        """Variants that are not built here."""
        faults, width = super().refused(values), values.get("hidden_size")
        if values["pos_att_type"] and not values.get("relative_attention"):
            faults.append("relative_attention is false beside a pos_att_type, which is not supported")
        if values.get("conv_kernel_size"):
            faults.append(f"conv_kernel_size is {values['conv_kernel_size']!r}, which is not supported")
        if values.get("pooler_hidden_size") not in (None, width):
            faults.append(f"pooler_hidden_size is {values['pooler_hidden_size']!r}, expected hidden_size {width!r}")
        if "attention_head_size" in values:
            faults.append("attention_head_size is given, which is not supported")
        return faults

    @classmethod
    def faults(cls, values: Mapping[str, Any]) -> list[str]:
        """What is wrong with values."""
        given = {k: x for k, x in values.items() if (k, x) not in (("type_vocab_size", 0), ("embedding_size", None))}
        faults = super().faults(given) + find_faults(
            given, counts=("embedding_size",), rates=("pooler_dropout",), activations=("pooler_hidden_act",)
        )
        ways = values["pos_att_type"]
        if set(ways) - set(_WAYS) or len(set(ways)) < len(ways):
            faults.append(f"pos_att_type is {list(ways)}, expected {' and '.join(_WAYS)} at most once each")
        if values["norm_rel_ebd"] not in ("none", "layer_norm"):
            faults.append(f"norm_rel_ebd is {values['norm_rel_ebd']!r}, known are none and layer_norm")
        buckets, reach, limit = (
            values[name] for name in ("position_buckets", "max_relative_positions", "max_position_embeddings")
        )
        if not all(is_whole(x, at_least=-1) for x in (buckets, reach)):
            return [*faults, f"position_buckets {buckets!r} and max_relative_positions {reach!r} must be whole numbers"]
        farthest = reach if reach > 0 else limit
        if buckets > 0 and is_whole(farthest, at_least=1) and not 2 <= buckets // 2 < farthest - 1:
            faults.append(f"position_buckets is {buckets}, expected 4 or more, and half of it below {farthest - 1}")
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
        width = config.embedding_width
        embed = partial(make_table, config, options, rngs, width=width)
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
        real: Bool[Array, "b t"],
        *,
        key: Key[Array, ""] | None,
    ) -> Float[Array, "b t d"]:
        x = words
        if self.config.position_biased_input:
            x = x + self.position(jnp.arange(real.shape[1])[None])
        if self.config.has_types:
            x = x + self.token_type(types)
        if self.config.projects:
            x = dense(self.projection, x)
        x = norm(self.norm, x) * real.astype(x.dtype)[:, :, None]
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
            rows = relative_rows(t, config)
            low, high = int(rows.min()), int(rows.max()) + 1  # a short text reaches few of them
            table = dropout(positions[low:high], config.hidden_dropout_prob, table_key)
            place = jnp.asarray(rows - low)[None, None]

            def of_positions(own: nnx.Linear) -> Float[Array, "r h e"]:
                return dense(own, table).reshape(-1, h, d // h)

        if "c2p" in config.pos_att_type:
            relative = of_positions(self.key if config.share_att_key else self.position_key)
            by_row = jnp.einsum("bqhe,rhe->bhqr", query, relative, preferred_element_type=wide)
            scores = scores + jnp.take_along_axis(by_row, place, axis=-1)
        if "p2c" in config.pos_att_type:
            relative = of_positions(self.query if config.share_att_key else self.position_query)
            by_row = jnp.einsum("bkhe,rhe->bhkr", keys, relative, preferred_element_type=wide)
            # Of key and query: the row of the distance between them, which is that of query and key.
            scores = scores + jnp.take_along_axis(by_row, place.swapaxes(-1, -2), axis=-1).swapaxes(-1, -2)
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


class DebertaV2Classifier(Classifier):
    """DeBERTa with a pooler on the first token, or the mean over tokens and no pooler, and a linear classifier.

    Source: He et al., arXiv 2006.03654 and 2111.09543; layer by layer as in Hugging Face's
    DebertaV2ForSequenceClassification.
    """

    def __init__(
        self, config: DebertaV2Config, *, num_labels: int, pooling: str, options: Options, rngs: nnx.Rngs
    ) -> None:
        super().__init__(config, pooling=pooling, options=options)
        width, wide = config.hidden_size, options.wide
        self.embeddings = Embeddings(config, options=options, rngs=rngs)
        self.encoder = Stack(DebertaV2Layer, config, options=options, rngs=rngs)
        if config.pos_att_type:
            self.relative = make_table(config, options, rngs, 2 * config.span)
            if config.norm_rel_ebd == "layer_norm":
                self.relative_norm = make_norm(config, options, rngs)
        if pooling == "cls":
            self.pooler = make_linear(config, options, wide, rngs, width, width)
        self.classifier = make_linear(config, options, wide, rngs, width, num_labels)

    def states(self, embedded, ids, types, real, *, key, reverse_only) -> Float[Array, "b t d"]:
        """After the last layer."""
        del ids, reverse_only
        embedding_key, encoder_key = split(key, 2)
        x = self.embeddings(embedded, types, real, key=embedding_key)
        positions = jnp.zeros((0, self.config.hidden_size), x.dtype)
        if self.config.pos_att_type:
            positions = jnp.asarray(self.relative.embedding.get_value()).astype(x.dtype)
            if self.config.norm_rel_ebd == "layer_norm":
                positions = norm(self.relative_norm, positions)
        return self.encoder(x, bias_of(real, self.options.wide)[:, None, None], positions, key=encoder_key)

    def first(self, x, real, *, key) -> Float[Array, "b d"]:
        """The pooler, after dropout."""
        del real
        own = None if key is None else jax.random.fold_in(key, 2)  # 0 and 1 are those of the states
        activation = ACTIVATIONS[self.config.pooler_hidden_act]
        return activation(dense(self.pooler, dropout(x[:, 0], self.config.pooler_dropout, own)))


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
