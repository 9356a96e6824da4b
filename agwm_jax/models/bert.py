"""The family of BERT: a pooler with tanh on the first token, and a linear classifier."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from agwm_jax.models.encoder import EncoderClassifier, rows_after
from agwm_jax.models.encoder_config import EncoderConfig
from agwm_jax.models.family import FAMILIES, Family, Options, Row
from agwm_jax.models.layers import dropout
from agwm_jax.models.stack import dense, make_linear


class BertConfig(EncoderConfig):
    """Shape and rates of a BERT; names, meaning and defaults as in Hugging Face's config.json."""


class BertClassifier(EncoderClassifier):
    """BERT with a pooler (tanh) on the first token, or the mean over tokens and no pooler, and a linear classifier.

    Source: Devlin et al., arXiv 1810.04805; layer by layer as in Hugging Face's BertForSequenceClassification.
    """

    def __init__(self, config: BertConfig, *, num_labels: int, pooling: str, options: Options, rngs: nnx.Rngs) -> None:
        super().__init__(config, pooling=pooling, options=options, rngs=rngs)
        width, wide = config.hidden_size, options.wide
        if pooling == "cls":
            self.pooler = make_linear(config, options, wide, rngs, width, width)
        self.classifier = make_linear(config, options, wide, rngs, width, num_labels)

    def first(self, x: Float[Array, "b d"]) -> Float[Array, "b d"]:
        """The pooler."""
        return jnp.tanh(dense(self.pooler, x))

    def logits(self, features: Float[Array, "b d"], *, key: Key[Array, ""] | None = None) -> Float[Array, "b c"]:
        """Of the classifier."""
        return self.classifier(dropout(features, self.config.head_dropout, key))


def table(config: Any) -> dict[str, Row]:
    """One row a weight."""
    return rows_after(
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
