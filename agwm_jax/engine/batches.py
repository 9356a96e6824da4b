"""Batches cut on the device from a data set that lies there whole."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray, Shaped

from agwm_jax.core.types import Batch


def gather(data: dict[str, Shaped[Array, "n ..."]], rows: Int[Array, "*k b"], key: PRNGKeyArray | None = None) -> Batch:
    """The batch of the given rows, with its example weights and its randomness.

    Args:
        data: columns of the data set, one row an example.
        rows: row numbers, -1 for padding; leading axes give as many batches.
        key: split into one dropout key a batch; none for evaluation.

    Returns:
        Every column as ``[*k, b, ...]``, ``weight`` (1, or 0 for padding) and, with a key, ``key [*k]``.
    """
    real = rows >= 0
    batch = {name: column[jnp.where(real, rows, 0)] for name, column in data.items()}
    batch["weight"] = real.astype(jnp.float32)
    if key is not None:
        batch["key"] = jax.random.split(key, rows.shape[:-1]) if rows.ndim > 1 else key
    return batch
