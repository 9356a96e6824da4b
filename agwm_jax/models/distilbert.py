"""The family of DistilBERT: no token types, no pooler, and a classifier of two layers."""

import dataclasses
from typing import Any, ClassVar

import jax
from jaxtyping import Array, Float, Key

from agwm_jax.models.encoder import DenseHeadClassifier, encoder_rows
from agwm_jax.models.encoder_config import EncoderConfig
from agwm_jax.models.family import FAMILIES, Family, Row
from agwm_jax.models.layers import dropout


@dataclasses.dataclass(frozen=True)
class DistilBertConfig(EncoderConfig):
    """Shape and rates of a DistilBERT; meaning and defaults as in Hugging Face's config.json, which has other names."""

    file_names: ClassVar = {
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "hidden_dim",
        "hidden_act": "activation",
        "hidden_dropout_prob": "dropout",
        "attention_probs_dropout_prob": "attention_dropout",
        "classifier_dropout": "seq_classif_dropout",
    }
    lacks: ClassVar = frozenset({"type_vocab_size", "layer_norm_eps"})

    classifier_dropout: float | None = 0.2


class DistilBertClassifier(DenseHeadClassifier):
    """DistilBERT with the first token's vector, or the mean over tokens, and a classifier of two layers on it.

    Source: Sanh et al., arXiv 1910.01108; layer by layer as in Hugging Face's DistilBertForSequenceClassification.
    """

    def logits(self, features: Float[Array, "b d"], *, key: Key[Array, ""] | None = None) -> Float[Array, "b c"]:
        """Of the classifier's two layers; dropout before the second alone."""
        hidden = jax.nn.relu(self.classifier_dense(features))
        return self.classifier(dropout(hidden, self.config.head_dropout, key))


def table(config: Any) -> dict[str, Row]:
    """One row a weight."""
    return encoder_rows(
        config,
        {"path": "classifier_dense", "name": "pre_classifier", "axes": ("width", "width"), "role": "head"},
        {"path": "classifier", "name": "classifier", "axes": ("width", "classes"), "role": "head"},
        layer="transformer.layer.{}",
        names={
            "query": "attention.q_lin",
            "key": "attention.k_lin",
            "value": "attention.v_lin",
            "attention_output": "attention.out_lin",
            "attention_norm": "sa_layer_norm",
            "intermediate": "ffn.lin1",
            "output": "ffn.lin2",
            "output_norm": "output_layer_norm",
        },
    )


@FAMILIES.register("distilbert", paper="arXiv 1910.01108")
def distilbert() -> Family:
    """DistilBERT, in one language or many."""
    return Family(
        model_types={"distilbert": "DistilBert"},
        read_config=DistilBertConfig.from_dict,
        module=DistilBertClassifier,
        table=table,
        prefix="distilbert.",
        ignored=r"embeddings\.position_ids|vocab_(transform|layer_norm|projector)\..*|qa_outputs\..*",
        tokenizer_files=("tokenizer.json", "vocab.txt"),
    )
