"""The family of ELECTRA: narrow embeddings, no pooler, and a classifier of two layers."""

from typing import Any, ClassVar

from agwm_jax.models.encoder import DenseHeadClassifier, encoder_rows
from agwm_jax.models.encoder_config import NarrowEmbeddingsConfig
from agwm_jax.models.family import FAMILIES, Family, Row
from agwm_jax.models.layers import gelu


class ElectraConfig(NarrowEmbeddingsConfig):
    """Shape and rates of an ELECTRA; names, meaning and defaults as in Hugging Face's config.json.

    Embeddings that are as wide as the hidden state meet it without a layer between.
    """


class ElectraClassifier(DenseHeadClassifier):
    """ELECTRA's discriminator with the first token's vector, or the mean over tokens, and a classifier of two layers.

    Source: Clark et al., arXiv 2003.10555; layer by layer as in Hugging Face's ElectraForSequenceClassification.
    """

    activation: ClassVar = gelu


def table(config: Any) -> dict[str, Row]:
    """One row a weight."""
    return encoder_rows(
        config,
        {"path": "classifier_dense", "name": "classifier.dense", "axes": ("width", "width"), "role": "head"},
        {"path": "classifier", "name": "classifier.out_proj", "axes": ("width", "classes"), "role": "head"},
        projection="embeddings_project",
    )


@FAMILIES.register("electra", paper="arXiv 2003.10555")
def electra() -> Family:
    """ELECTRA, small to large."""
    return Family(
        model_types={"electra": "Electra"},
        read_config=ElectraConfig.from_dict,
        module=ElectraClassifier,
        table=table,
        prefix="electra.",
        # Heads of pretraining: who was replaced, and by what.
        ignored=r"embeddings\.(position|token_type)_ids|(discriminator|generator)_\w+\..*|qa_outputs\..*",
        tokenizer_files=("tokenizer.json", "vocab.txt"),
    )
