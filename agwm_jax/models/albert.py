"""The family of ALBERT: one set of weights for all layers, narrow embeddings, a pooler and a linear classifier."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from agwm_jax.models.config import find_faults
from agwm_jax.models.encoder import PooledClassifier, encoder_rows
from agwm_jax.models.encoder_config import NarrowEmbeddingsConfig
from agwm_jax.models.family import FAMILIES, Family, Row


@dataclasses.dataclass(frozen=True)
class AlbertConfig(NarrowEmbeddingsConfig):
    """Shape and rates of an ALBERT; names, meaning and defaults as in Hugging Face's config.json."""

    file_names: ClassVar = {"classifier_dropout": "classifier_dropout_prob"}

    hidden_act: str = "gelu_new"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    classifier_dropout: float | None = 0.1
    num_hidden_groups: int = 1
    inner_group_num: int = 1

    @classmethod
    def faults(cls, values: Mapping[str, Any]) -> list[str]:
        """What is wrong with values."""
        faults = super().faults(values) + find_faults(values, counts=("inner_group_num",))
        if values["num_hidden_groups"] != 1:
            faults.append(f"num_hidden_groups is {values['num_hidden_groups']!r}, only 1 is supported")
        return faults

    @property
    def projects(self) -> bool:
        """Of whatever width the embeddings are."""
        return True

    @property
    def feed_forward_dropout(self) -> float:
        """There is none after the feed-forward part."""
        return 0.0

    @property
    def depth(self) -> int:
        """Layers of the one group."""
        return self.inner_group_num

    @property
    def turns(self) -> int:
        """How often the group is applied."""
        return self.num_hidden_layers


class AlbertClassifier(PooledClassifier):
    """ALBERT with a pooler (tanh) on the first token, or the mean over tokens and no pooler, and a linear classifier.

    The layers' weights are there once: a gate, a learning rate or a Fisher number acts on all the turns that they take.

    Source: Lan et al., arXiv 1909.11942; layer by layer as in Hugging Face's AlbertForSequenceClassification.
    """


def table(config: Any) -> dict[str, Row]:
    """One row a weight."""
    return encoder_rows(
        config,
        {"path": "pooler", "name": "pooler", "axes": ("width", "width")},
        {"path": "classifier", "name": "classifier", "axes": ("width", "classes"), "role": "head"},
        layer="encoder.albert_layer_groups.0.albert_layers.{}",
        names={
            "query": "attention.query",
            "key": "attention.key",
            "value": "attention.value",
            "attention_output": "attention.dense",
            "attention_norm": "attention.LayerNorm",
            "intermediate": "ffn",
            "output": "ffn_output",
            "output_norm": "full_layer_layer_norm",
        },
        projection="encoder.embedding_hidden_mapping_in",
    )


@FAMILIES.register("albert", paper="arXiv 1909.11942")
def albert() -> Family:
    """ALBERT, base to xxlarge."""
    return Family(
        model_types={"albert": "Albert"},
        read_config=AlbertConfig.from_dict,
        module=AlbertClassifier,
        table=table,
        prefix="albert.",
        ignored=r"embeddings\.(position|token_type)_ids|(predictions|sop_classifier|qa_outputs)\..*",
        tokenizer_files=("tokenizer.json", "spiece.model"),
    )
