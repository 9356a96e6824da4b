"""Did training learn anything: the two ways in which a finished run shows that it did not, with the remedy."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Num

from agwm_jax.methods.warning import MethodWarning

NAMES = ("training_hardly_moved", "one_class_predicted")
_MIN_STEPS = 8
"""Of finetune: of fewer, a quarter is one batch."""
_REMEDY = (
    "Raise finetune.optimizer.learning_rate (five times the default is a start for a small encoder) or "
    "finetune.epochs; the method probe, which trains a classifier on the encoder's features, shows what can be reached."
)


def learning_warnings(
    records: Sequence[Mapping[str, Any]],
    guessing: tuple[float, float],
    logits: Float[np.ndarray, "m c"],
    truth: Num[np.ndarray, "m"],
    label_names: Sequence[str],
) -> list[MethodWarning]:
    """At most one warning of each of `NAMES`.

    Args:
        records: of the run.
        guessing: loss of who knows the training labels' distribution and nothing else, and the least there is; see
            `guessing_loss`.
        logits: of the reported split.
        truth: its labels.
        label_names: of the classes; empty for a regression.
    """
    found = []
    losses = [float(r["loss"]) for r in records if r.get("phase") == "finetune" and r.get("loss") is not None]
    if len(losses) >= _MIN_STEPS:
        last = float(np.mean(losses[-(len(losses) // 4) :]))
        guess, least = guessing
        if guess > least and last > least + 0.95 * (guess - least):
            sentence = (
                f"the loss of the last quarter of finetune is {last:.3f}, and that of guessing by the labels alone is "
                f"{guess:.3f}: training has hardly moved the model. {_REMEDY}"
            )
            found.append(MethodWarning(NAMES[0], sentence))
    predicted = np.unique(logits.argmax(1)) if label_names else np.array([])
    if len(predicted) == 1 and len(np.unique(truth)) > 1:
        name = label_names[int(predicted[0])]
        sentence = f"every one of the {len(logits)} texts that are scored is predicted as {name}. {_REMEDY}"
        found.append(MethodWarning(NAMES[1], sentence))
    return found


def guessing_loss(
    labels: Num[np.ndarray, "n"],
    *,
    num_classes: int,
    weights: Float[np.ndarray, "c"] | None = None,
    label_smoothing: float = 0.0,
) -> tuple[float, float]:
    """Loss of who knows the labels' distribution and nothing else, and the least that there is.

    The former is the entropy of the labels, or the variance of scores.

    Args:
        labels: of the training set: classes, or standardised scores.
        num_classes: c; 0 for a regression.
        weights: what an example of each class counts; None: all alike.
        label_smoothing: share of a label that is spread over all classes.
    """
    if not num_classes:
        return float(np.var(labels)), 0.0
    counts = np.bincount(labels, minlength=num_classes) * (1.0 if weights is None else weights)
    shares = (1 - label_smoothing) * counts / counts.sum() + label_smoothing / num_classes
    spread = np.full(num_classes, label_smoothing / num_classes)
    spread[0] += 1 - label_smoothing  # one label, whichever, as it is smoothed
    return _entropy(shares), _entropy(spread)


def _entropy(shares: Float[np.ndarray, "c"]) -> float:
    return -math.fsum(share * math.log(share) for share in shares if share)
