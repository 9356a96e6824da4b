"""The family of RoBERTa: positions that count real tokens, no pooler, and a classifier of two layers."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from agwm_jax.models.encoder import EncoderClassifier, rows_after
from agwm_jax.models.encoder_config import EncoderConfig, is_whole
from agwm_jax.models.family import FAMILIES, Family, Options, Row
from agwm_jax.models.layers import dropout
from agwm_jax.models.stack import make_linear, split


@dataclasses.dataclass(frozen=True)
class RobertaConfig(EncoderConfig):
    """Shape and rates of a RoBERTa; names, meaning and defaults as in Hugging Face's config.json."""

    pad_token_id: int = 1  # its row of the position table is that of padding; real tokens count on from it

    @classmethod
    def faults(cls, values: Mapping[str, Any]) -> list[str]:
        """What is wrong with values."""
        faults, padding = super().faults(values), values["pad_token_id"]
        if not is_whole(padding, at_least=0):
            return [*faults, f"pad_token_id is {padding!r}, expected a whole number of at least 0"]
        for name, least in (("vocab_size", padding + 1), ("max_position_embeddings", padding + 2)):
            if is_whole(values.get(name), at_least=1) and values[name] < least:
                faults.append(f"{name} is {values[name]}, expected at least {least} for pad_token_id {padding}")
        return faults

    @property
    def max_length(self) -> int:
        """Longest text in tokens."""
        return self.max_position_embeddings - self.pad_token_id - 1


class RobertaClassifier(EncoderClassifier):
    """RoBERTa with the first token's vector, or the mean over tokens, and a classifier of two layers on it.

    Source: Liu et al., arXiv 1907.11692; layer by layer as in Hugging Face's RobertaForSequenceClassification.
    """

    def __init__(
        self, config: RobertaConfig, *, num_labels: int, pooling: str, options: Options, rngs: nnx.Rngs
    ) -> None:
        super().__init__(config, pooling=pooling, options=options, rngs=rngs)
        width, wide = config.hidden_size, options.wide
        self.classifier_dense = make_linear(config, options, wide, rngs, width, width)
        self.classifier = make_linear(config, options, wide, rngs, width, num_labels)
        self.padding = config.pad_token_id

    def positions(self, ids: Int[Array, "b t"]) -> Int[Array, "b t"]:
        """Padding has its own row; real tokens count on from it."""
        real = (ids != self.padding).astype(ids.dtype)
        return jnp.cumsum(real, axis=1, dtype=ids.dtype) * real + self.padding

    def logits(self, features: Float[Array, "b d"], *, key: Key[Array, ""] | None = None) -> Float[Array, "b c"]:
        """Of the classifier's two layers, with dropout before each."""
        first, second = split(key, 2)
        rate = self.config.head_dropout
        hidden = jnp.tanh(self.classifier_dense(dropout(features, rate, first)))
        return self.classifier(dropout(hidden, rate, second))


def table(config: Any) -> dict[str, Row]:
    """One row a weight."""
    return rows_after(
        config,
        {"path": "classifier_dense", "name": "classifier.dense", "axes": ("width", "width"), "role": "head"},
        {"path": "classifier", "name": "classifier.out_proj", "axes": ("width", "classes"), "role": "head"},
    )


@FAMILIES.register("roberta", paper="arXiv 1907.11692")
def roberta() -> Family:
    """RoBERTa, and all that has its layout: XLM-R, CamemBERT, BERTweet and others."""
    return Family(
        model_types={"roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert"},
        read_config=RobertaConfig.from_dict,
        module=RobertaClassifier,
        table=table,
        prefix="roberta.",
        # Checkpoints of other tasks hold a pooler, which this classifier does without.
        ignored=r"embeddings\.(position|token_type)_ids|lm_head\..*|qa_outputs\..*|pooler\.dense\..*",
        tokenizer_files=("tokenizer.json", "vocab.json", "sentencepiece.bpe.model", "bpe.codes"),
    )
