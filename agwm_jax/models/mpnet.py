"""The family of MPNet: a bias for relative positions that all layers share, and a classifier of two layers."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from agwm_jax.models.encoder import DenseHeadClassifier, count_positions, encoder_rows
from agwm_jax.models.encoder_config import PaddedPositionsConfig
from agwm_jax.models.family import FAMILIES, Family, Options, Row
from agwm_jax.models.weights import Weight

_BUCKETS = 32
_FARTHEST = 128


@dataclasses.dataclass(frozen=True)
class MPNetConfig(PaddedPositionsConfig):
    """Shape and rates of an MPNet; names, meaning and defaults as in Hugging Face's config.json."""

    lacks: ClassVar = frozenset({"type_vocab_size"})

    relative_attention_num_buckets: int = _BUCKETS

    @classmethod
    def faults(cls, values: Mapping[str, Any]) -> list[str]:
        """What is wrong with values."""
        buckets = values["relative_attention_num_buckets"]
        faults = super().faults(values)
        if buckets != _BUCKETS:
            faults.append(f"relative_attention_num_buckets is {buckets!r}, expected {_BUCKETS}")
        if values["pad_token_id"] != 1:  # whatever the file says, transformers counts positions on from row 1
            faults.append(f"pad_token_id is {values['pad_token_id']!r}, expected 1")
        return faults


class MPNetClassifier(DenseHeadClassifier):
    """MPNet with the first token's vector, or the mean over tokens, and a classifier of two layers on it.

    Source: Song et al., arXiv 2004.09297; layer by layer as in Hugging Face's MPNetForSequenceClassification.
    """

    can_fuse: ClassVar = False
    config: MPNetConfig

    def __init__(self, config: MPNetConfig, *, num_labels: int, pooling: str, options: Options, rngs: nnx.Rngs) -> None:
        super().__init__(config, num_labels=num_labels, pooling=pooling, options=options, rngs=rngs)
        self.relative = nnx.Embed(_BUCKETS, config.num_attention_heads, param_dtype=options.wide, rngs=rngs)

    def positions(self, ids: Int[Array, "b t"]) -> Int[Array, "b t"]:
        """On from the row of padding."""
        return count_positions(ids, self.config.pad_token_id)

    def bias(self, real: Bool[Array, "b t"]) -> Float[Array, "b h t t"]:
        """A number for each head and bucket of the distance between two tokens; very small for padding."""
        near = jnp.moveaxis(self.relative(jnp.asarray(buckets(real.shape[-1]))), -1, 0)
        # In place of it, not added to it: the sum with what stands for padding could be beyond the range.
        return jnp.where(real[:, None, None], near[None], super().bias(real))


def buckets(length: int) -> Int[np.ndarray, "t t"]:
    """The bucket of every pair of positions (query, key): one each up to 7 apart, then ever wider, to 128."""
    distance = np.arange(length)[:, None] - np.arange(length)[None]
    half, exact = _BUCKETS // 2, _BUCKETS // 4
    apart = np.maximum(np.abs(distance), 1).astype(np.float32)
    share = np.log(apart / exact) / math.log(_FARTHEST / exact)
    far = np.minimum(exact + (share * (half - exact)).astype(np.int64), half - 1)
    return half * (distance < 0) + np.where(np.abs(distance) < exact, np.abs(distance), far)


def table(config: Any) -> dict[str, Row]:
    """One row a weight."""
    rows = encoder_rows(
        config,
        {"path": "classifier_dense", "name": "classifier.dense", "axes": ("width", "width"), "role": "head"},
        {"path": "classifier", "name": "classifier.out_proj", "axes": ("width", "classes"), "role": "head"},
        names={
            "query": "attention.attn.q",
            "key": "attention.attn.k",
            "value": "attention.attn.v",
            "attention_output": "attention.attn.o",
            "attention_norm": "attention.LayerNorm",
            "intermediate": "intermediate.dense",
            "output": "output.dense",
            "output_norm": "output.LayerNorm",
        },
    )
    relative = Row(Weight("embedding", ("buckets", "per_head"), 0), "encoder.relative_attention_bias.weight")
    return {"relative.embedding": relative, **rows}


@FAMILIES.register("mpnet", paper="arXiv 2004.09297")
def mpnet() -> Family:
    """MPNet, and the sentence encoders that are made of it."""
    return Family(
        model_types={"mpnet": "MPNet"},
        read_config=MPNetConfig.from_dict,
        module=MPNetClassifier,
        table=table,
        prefix="mpnet.",
        # The classifier does without the pooler.
        ignored=r"embeddings\.position_ids|lm_head\..*|qa_outputs\..*|pooler\.dense\..*",
        tokenizer_files=("tokenizer.json", "vocab.txt"),
    )
