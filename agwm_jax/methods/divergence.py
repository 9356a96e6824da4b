"""What methods share that want two passes to agree: how far their outputs are from each other, and a key for noise."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from agwm_jax.core.types import Batch, Scalar


def divergence(first: Float[Array, "b c"], second: Float[Array, "b c"], batch: Batch, kind: str) -> Scalar:
    """``KL(p, q) + KL(q, p)`` of two logits, or their squared difference for a regression; a mean over real examples.

    Both directions together are ``sum (p - q) (log p - log q)``.
    """
    if kind == "regression":
        each = (first[:, 0] - second[:, 0]) ** 2
    else:
        log_p, log_q = jax.nn.log_softmax(first), jax.nn.log_softmax(second)
        each = jnp.sum((jnp.exp(log_p) - jnp.exp(log_q)) * (log_p - log_q), -1)
    return jnp.sum(each * batch["weight"]) / jnp.sum(batch["weight"])


def noise_key(key: Key[Array, ""]) -> Key[Array, ""]:
    """For noise of a method's own beside the dropout of a batch; `Model.from_embedded` has keys 0 and 1 of this one."""
    return jax.random.fold_in(key, 2)
