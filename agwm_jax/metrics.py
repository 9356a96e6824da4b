"""The scores of predictions, by the names that tasks and configs use."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.stats
import sklearn.metrics
from jaxtyping import Float, Num

from agwm_jax.errors import AgwmError


class _Metric(NamedTuple):
    kind: Literal["classification", "regression"]
    score: Callable[[np.ndarray, np.ndarray], float]  # (labels, predictions), each [n]


def _correlation(correlate: Callable[..., Any]) -> Callable[[np.ndarray, np.ndarray], float]:
    def score(labels: np.ndarray, predictions: np.ndarray) -> float:
        # Undefined for a constant; 0, for such a model does not tell the examples apart at all. What is constant to
        # rounding error counts as constant.
        spread = np.ptp(predictions)
        if len(labels) < 2 or np.ptp(labels) == 0 or spread <= 1e-13 * np.abs(predictions).max():
            return 0.0
        return float(correlate(labels, predictions).statistic)

    return score


def _f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    return float(sklearn.metrics.f1_score(labels, predictions, pos_label=1, zero_division=0.0))


def _macro_f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    return float(sklearn.metrics.f1_score(labels, predictions, average="macro", zero_division=0.0))


def _matthews(labels: np.ndarray, predictions: np.ndarray) -> float:
    if len(np.unique(predictions)) < 2 or len(np.unique(labels)) < 2:
        return 0.0  # undefined; 0 by convention (scikit-learn warns where labels and predictions are one class)
    return float(sklearn.metrics.matthews_corrcoef(labels, predictions))


_METRICS = {
    "accuracy": _Metric("classification", lambda labels, predictions: float(np.mean(labels == predictions))),
    "f1": _Metric("classification", _f1),
    "macro_f1": _Metric("classification", _macro_f1),
    "matthews": _Metric("classification", _matthews),
    "pearson": _Metric("regression", _correlation(scipy.stats.pearsonr)),
    "spearman": _Metric("regression", _correlation(scipy.stats.spearmanr)),
}
METRICS = tuple(_METRICS)


def check(names: Sequence[str], *, kind: str, num_classes: int) -> None:
    """Raise AgwmError unless all metrics are known and fit the task; call it before training, not after.

    Args:
      kind: "classification" or "regression".
      num_classes: c; f1 is the score of class 1 of two.
    """
    for name in names:
        if name not in _METRICS:
            raise AgwmError(f"{name!r} is not a metric: there are {', '.join(METRICS)}.")
        if _METRICS[name].kind != kind:
            fitting = ", ".join(other for other in METRICS if _METRICS[other].kind == kind)
            raise AgwmError(f"{name!r} is no metric for {kind}: take {fitting}.")
        if name == "f1" and num_classes != 2:
            raise AgwmError(f"'f1' needs two classes, the task has {num_classes}: take 'macro_f1'.")


def compute(names: Sequence[str], logits: Float[np.ndarray, "n c"], labels: Num[np.ndarray, "n"]) -> dict[str, float]:
    """Scores by name: of the class with the largest logit, or, for regression metrics, of the only logit.

    f1 is that of class 1; macro_f1 the plain mean over the classes that occur in labels or predictions. matthews,
    pearson and spearman are 0 where they are undefined because the predictions (or labels) are all the same.

    Args:
      logits: [n, c], for regression [n, 1].
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
    return {name: _METRICS[name].score(labels, predictions) for name in names}
