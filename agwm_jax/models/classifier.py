"""What the classifiers of all families share: words looked up, a stack of layers, one vector a text, a head on it."""

import abc
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from agwm_jax.core.types import Batch
from agwm_jax.models.attention import fused_refusal
from agwm_jax.models.family import Options, check_length
from agwm_jax.models.layers import dropout


class Classifier(nnx.Module):
    """Class logits of a text, or one number where `num_labels` is 1.

    A family's class makes `embeddings` (with the table `word`) and `classifier`, and says by `states` what becomes of
    the words; where it differs, by `first` what is made of the states where they are not averaged, and by `logits` what
    the head is.

    Args:
        config: shape and dropout rates.
        pooling: "mean" (over real tokens), or the family's own.
        options: how it computes.
    """

    embeddings: Any
    classifier: nnx.Linear

    def __init__(self, config: Any, *, pooling: str, options: Options) -> None:
        self.config, self.pooling, self.options = config, pooling, options

    def embed(self, batch: Batch) -> Float[Array, "b t e"]:
        """Word embeddings of ``batch["input_ids"]``."""
        return self.embeddings.word(jnp.asarray(batch["input_ids"]))

    def features(
        self,
        embedded: Float[Array, "b t e"],
        batch: Batch,
        *,
        key: Key[Array, ""] | None = None,
        reverse_only: bool = False,
    ) -> Float[Array, "b d"]:
        """One vector a text, in float32 or float64.

        Args:
            embedded: what `embed` gives.
            batch: `input_ids`, `attention_mask` [b, t] and, where there are several types, `token_type_ids`; other
                entries are not read.
            key: typed PRNG key of the dropout masks; None means no dropout.
            reverse_only: a promise that nothing differentiates this call in forward mode, or twice (`jax.jvp`,
                `jax.linearize`, a Hessian-vector product), and that padding follows the real tokens: fused attention,
                which bears none of these, may then serve.

        Raises:
            AgwmError: when traced, if t is larger than the position table.
        """
        ids, real = jnp.asarray(batch["input_ids"]), jnp.asarray(batch["attention_mask"]) != 0
        check_length(real.shape[-1], self.config.max_length)
        types = jnp.asarray(batch.get("token_type_ids", jnp.zeros_like(ids)))
        x = self.states(embedded, ids, types, real, key=key, reverse_only=reverse_only).astype(self.options.wide)
        if self.pooling != "mean":
            return self.first(x, real, key=key)
        weights = real.astype(x.dtype)[:, :, None]
        return (x * weights).sum(1) / jnp.maximum(weights.sum(1), 1.0)

    @abc.abstractmethod
    def states(
        self,
        embedded: Float[Array, "b t e"],
        ids: Int[Array, "b t"],
        types: Int[Array, "b t"],
        real: Bool[Array, "b t"],
        *,
        key: Key[Array, ""] | None,
        reverse_only: bool,
    ) -> Float[Array, "b t d"]:
        """The tokens' states after the last layer; `real` where they are no padding."""

    def first(
        self, x: Float[Array, "b t d"], real: Bool[Array, "b t"], *, key: Key[Array, ""] | None
    ) -> Float[Array, "b d"]:
        """The first token's state."""
        del real, key
        return x[:, 0]

    def logits(self, features: Float[Array, "b d"], *, key: Key[Array, ""] | None = None) -> Float[Array, "b c"]:
        """Of one linear layer, after dropout."""
        return self.classifier(dropout(features, self.config.head_dropout, key))

    def fuses(self, *, reverse_only: bool, head_width: int, length: int, drops: bool) -> bool:
        """Whether attention may be the fused kernel's; `drops`: whether it drops probabilities."""
        if not reverse_only or not self.options.fuse_attention:
            return False
        return fused_refusal(dtype=self.options.dtype, head_width=head_width, length=length, dropout=drops) is None
