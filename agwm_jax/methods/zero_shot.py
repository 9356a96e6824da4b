"""Zero-shot similarity: the cosine of the two texts' features, as the pretrained model gives them."""

from typing import ClassVar, Literal

import jax.numpy as jnp
from pydantic import Field

from agwm_jax.core.types import Batch
from agwm_jax.errors import AgwmError
from agwm_jax.methods.interface import METHODS, Method, MethodSettings, Setup
from agwm_jax.methods.setfit import cosine
from agwm_jax.methods.training import TASK, replace_weights
from agwm_jax.models.model import Model


@METHODS.register("zero_shot", cost="0", paper="arXiv 1908.10084")
class ZeroShot(MethodSettings):
    """The similarity of two texts without any training: ``cos(f(a), f(b))`` of the pretrained features f.

    Each text is read by itself: the pair, as it was tokenised, is cut where its token types change, and the second
    text put behind the first token. The score is the cosine, from -1 to 1, and not in the unit of the labels, so it is
    its order that counts. For regressions on pairs; the head is not read.

    Cost nothing in training; 2/3 fb to score a pair. Memory of the weights. Which score a sentence encoder has before
    it is fine-tuned. Source: Reimers and Gurevych 2019 (arXiv 1908.10084), section 4.1.
    """

    open_to: ClassVar = frozenset()
    has_rate: ClassVar = False
    name: Literal["zero_shot"] = Field(default="zero_shot", description="fine-tuning method")

    def build(self, setup: Setup) -> Method:
        """The method for one seed."""
        if setup.kind != "regression":
            raise AgwmError(
                "zero_shot gives the similarity of two texts, and this task has classes: choose a task with a score, "
                "or another method."
            )
        if not setup.pair:
            raise AgwmError(
                "zero_shot compares the two texts of a pair, and this task has single texts: choose a task of pairs, "
                "or another method."
            )
        return Method(lambda pretrained, key: {TASK: {}}, (), replace_weights, model=cosine_of_pairs(setup.model))


def cosine_of_pairs(model: Model) -> Model:
    """A model whose one output is the cosine of the features of both texts of a pair, each read alone."""

    def embed(params, batch):
        return model.embed(params, each_text(batch))

    def features(params, embedded, batch, *, key=None, reverse_only=False):
        found = model.features(params, embedded, each_text(batch), key=key, reverse_only=reverse_only)
        return found.reshape(-1, 2 * found.shape[1])

    def logits(params, features, *, key=None):
        del params, key
        return cosine(*jnp.split(features, 2, axis=1))[:, None]

    return Model(embed, features, logits, model.weights)


def each_text(batch: Batch) -> Batch:
    """The texts of b pairs as 2b single texts, a pair's two one after the other.

    A pair is ``[CLS] a [SEP] b [SEP]`` with token type 1 from b on, and padding after it.

    Raises:
        AgwmError: when traced, if there are no token types.
    """
    if "token_type_ids" not in batch:
        raise AgwmError(
            "zero_shot cuts a pair where its token types change, and this model's tokenizer gives none: choose a model "
            "of the family bert."
        )
    ids, mask = jnp.asarray(batch["input_ids"]), jnp.asarray(batch["attention_mask"])
    is_real = mask != 0
    is_first = is_real & (jnp.asarray(batch["token_type_ids"]) == 0)
    num_first, num_real = is_first.sum(1, keepdims=True), is_real.sum(1, keepdims=True)
    place = jnp.arange(ids.shape[1])[None]
    source = jnp.where(place == 0, 0, num_first - 1 + place)
    second = jnp.take_along_axis(ids, jnp.minimum(source, ids.shape[1] - 1), axis=1)

    def both(a, b):
        return jnp.stack([a, b], axis=1).reshape(-1, a.shape[1])

    masks = both(is_first, source < num_real).astype(mask.dtype)
    return {"input_ids": both(ids, second), "attention_mask": masks, "token_type_ids": jnp.zeros_like(masks)}
