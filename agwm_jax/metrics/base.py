"""What a metric is, where metrics are registered, and how a task's are checked and computed."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Num

from agwm_jax.errors import AgwmError
from agwm_jax.registry import Registry

Metric = Callable[[np.ndarray, np.ndarray], float]
"""``metric(labels [n], predictions [n]) -> score``: class numbers, or scores in the user's unit for a regression."""

METRICS: Registry[Metric] = Registry("metric", "metrics", "agwm_jax.metrics")
"""Registered with ``kind``, "classification" or "regression", and ``num_classes`` where only so many can be scored."""

KINDS = ("classification", "regression")


def of_kind(kind: str) -> tuple[str, ...]:
    """Names of the metrics for a kind of task."""
    return tuple(entry.name for entry in METRICS.entries() if entry.facts.get("kind") == kind)


def check(names: Sequence[str], *, kind: str, num_classes: int | None = None) -> None:
    """Raise AgwmError unless all metrics are known and fit the task; call it before training, not after.

    Args:
        kind: "classification" or "regression".
        num_classes: c; None where it is not known yet.
    """
    for name in names:
        facts = METRICS[name].facts
        if facts.get("kind") not in KINDS:
            raise AgwmError(
                f"the metric {name!r} was registered with kind {facts.get('kind')!r}: give one of {', '.join(KINDS)}."
            )
        if facts["kind"] != kind:
            raise AgwmError(f"{name!r} is no metric for {kind}: take {', '.join(of_kind(kind))}.")
        wanted = facts.get("num_classes", num_classes)
        if num_classes is not None and num_classes != wanted:
            others = ", ".join(other for other in of_kind(kind) if "num_classes" not in METRICS[other].facts)
            raise AgwmError(f"{name!r} needs {wanted} classes, the task has {num_classes}: take {others}.")


def compute(names: Sequence[str], logits: Float[np.ndarray, "n c"], labels: Num[np.ndarray, "n"]) -> dict[str, float]:
    """Scores by name: of the class with the largest logit, or, for regression metrics, of the only logit.

    Args:
        logits: [n, c], for regression [n, 1], in the unit of the labels.
        labels: [n] class numbers, or floats for regression.

    Raises:
        AgwmError: unknown or unfitting metric, no examples, logits that are not finite.

    >>> compute(("accuracy",), np.array([[0.0, 1.0], [2.0, 1.0]]), np.array([1, 1]))
    {'accuracy': 0.5}
    """
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    if not len(labels):
        raise AgwmError("There are no examples to score.")
    bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if bad.size:
        raise AgwmError(
            f"The logits of {bad.size} of {len(labels)} examples are not finite (the first is example {bad[0]}): the "
            "weights have diverged, train with a lower learning rate."
        )
    num_classes = logits.shape[1]
    check(names, kind="regression" if num_classes == 1 else "classification", num_classes=num_classes)
    predictions = logits[:, 0] if num_classes == 1 else logits.argmax(axis=1)
    return {name: float(METRICS[name].value(labels, predictions)) for name in names}
