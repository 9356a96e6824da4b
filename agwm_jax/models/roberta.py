"""The family of RoBERTa: positions that count real tokens, no pooler, and a classifier of two layers."""

from typing import Any

from jaxtyping import Array, Int

from agwm_jax.models.encoder import DenseHeadClassifier, count_positions, encoder_rows
from agwm_jax.models.encoder_config import PaddedPositionsConfig
from agwm_jax.models.family import FAMILIES, Family, Row


class RobertaConfig(PaddedPositionsConfig):
    """Shape and rates of a RoBERTa; names, meaning and defaults as in Hugging Face's config.json."""


class RobertaClassifier(DenseHeadClassifier):
    """RoBERTa with the first token's vector, or the mean over tokens, and a classifier of two layers on it.

    Source: Liu et al., arXiv 1907.11692; layer by layer as in Hugging Face's RobertaForSequenceClassification.
    """

    config: PaddedPositionsConfig

    def positions(self, ids: Int[Array, "b t"]) -> Int[Array, "b t"]:
        """On from the row of padding."""
        return count_positions(ids, self.config.pad_token_id)


def table(config: Any) -> dict[str, Row]:
    """One row a weight."""
    return encoder_rows(
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
