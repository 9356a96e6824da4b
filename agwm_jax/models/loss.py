"""The training loss of a model: a mean over the real examples of a batch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from agwm_jax.core.types import Batch, Composite, Scalar
from agwm_jax.models.model import Effective


def batch_loss(
    apply: Callable[..., jnp.ndarray], kind: str, *, label_smoothing: float = 0.0, reverse_only: bool = False
) -> Composite:
    """``loss(params, batch)``: cross-entropy, or the squared error of a single logit; logits are its outputs.

    Where a class counts more and labels are smoothed, an example's weight multiplies its smoothed loss, as in Keras;
    PyTorch weighs the spread part by the classes that it falls on.

    Args:
        apply: ``apply(params, batch, key=key) -> logits [b, c]``; the batch's own ``key``, if any, drives dropout.
        kind: of the task, "classification" or "regression" (then c = 1).
        label_smoothing: e; a label becomes 1 - e of its class and e / c of every one (Szegedy et al. 2016, section 7).
        reverse_only: the promise that `Model.features` asks for; handed on to `apply`.

    Returns:
        A loss that weights example i with ``batch["weight"][i]`` (that of its class, else 1; 0 for the padding of a
        short batch) and divides by their sum.
    """
    options = {"reverse_only": True} if reverse_only else {}

    def logits(params: Effective, batch: Batch) -> Float[Array, "b c"]:
        return apply(params, batch, key=batch.get("key"), **options)

    def criterion(logits: Float[Array, "b c"], batch: Batch) -> Scalar:
        if kind == "regression":
            each = (logits[:, 0] - batch["labels"]) ** 2
        else:
            each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
            if label_smoothing:
                uniform = -jnp.mean(jax.nn.log_softmax(logits), axis=-1)
                each = (1 - label_smoothing) * each + label_smoothing * uniform
        return jnp.sum(each * batch["weight"]) / jnp.sum(batch["weight"])

    return Composite(logits, criterion)
