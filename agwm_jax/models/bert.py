"""The family of BERT: a pooler with tanh on the first token, and a linear classifier."""

from typing import Any

from agwm_jax.models.encoder import PooledClassifier, encoder_rows
from agwm_jax.models.encoder_config import EncoderConfig
from agwm_jax.models.family import FAMILIES, Family, Row


class BertConfig(EncoderConfig):
    """Shape and rates of a BERT; names, meaning and defaults as in Hugging Face's config.json."""


class BertClassifier(PooledClassifier):
    """BERT with a pooler (tanh) on the first token, or the mean over tokens and no pooler, and a linear classifier.

    Source: Devlin et al., arXiv 1810.04805; layer by layer as in Hugging Face's BertForSequenceClassification.
    """


def table(config: Any) -> dict[str, Row]:
    """One row a weight."""
    return encoder_rows(
        config,
        {"path": "pooler", "name": "pooler.dense", "axes": ("width", "width")},
        {"path": "classifier", "name": "classifier", "axes": ("width", "classes"), "role": "head"},
    )


@FAMILIES.register("bert", paper="arXiv 1810.04805")
def bert() -> Family:
    """BERT, and all that has its layout: MiniLM, BioBERT, SciBERT and others."""
    return Family(
        model_types={"bert": "Bert"},
        read_config=BertConfig.from_dict,
        module=BertClassifier,
        table=table,
        prefix="bert.",
        ignored=r"embeddings\.(position|token_type)_ids|cls\..*|qa_outputs\..*",
        # From TensorFlow days, still in the hub's bert-base-uncased.
        renames={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
        tokenizer_files=("tokenizer.json", "vocab.txt"),
    )
