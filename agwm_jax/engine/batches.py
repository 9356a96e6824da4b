"""Batches cut on the device from a data set that lies there whole, and the random streams of a run."""

import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key, Shaped

from agwm_jax.core.types import Batch
from agwm_jax.methods.interface import Batches


def gather(
    data: dict[str, Shaped[Array, "n ..."]], rows: Int[Array, "*k b"], key: Key[Array, ""] | None = None
) -> Batch:
    """The batch of the given rows, with its example weights and its randomness.

    Args:
        data: columns of the data set, one row an example.
        rows: row numbers, -1 for padding; leading axes give as many batches.
        key: split into one dropout key a batch; none for evaluation.

    Returns:
        Every column as ``[*k, b, ...]``, ``weight`` (that of the data, else 1; 0 for padding) and, with a
        key, ``key [*k]``.
    """
    real = rows >= 0
    batch = {name: column[jnp.where(real, rows, 0)] for name, column in data.items()}
    batch["weight"] = real.astype(jnp.float32) * batch.get("weight", 1)
    if key is not None:
        batch["key"] = jax.random.split(key, rows.shape[:-1]) if rows.ndim > 1 else key
    return batch


def step_batches(
    data: dict[str, Shaped[Array, "n ..."]],
    plan: Mapping[str, Int[Array, "steps ..."]],
    key: Key[Array, ""],
    step: int | Int[Array, ""],
) -> Batches:
    """One step's batches by the names of the plan; `key` is the step's, and each batch gets a part of it."""
    keys = jax.random.split(key, len(plan))
    return {name: gather(data, plan[name][step], keys[i]) for i, name in enumerate(sorted(plan))}


def stream(key: Key[Array, ""], name: str) -> Key[Array, ""]:
    """The random stream of that name within another: other names do not shift it."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))
