"""Scores of predicted classes. The libraries are imported where they are used: settings are read without them."""

import numpy as np

from agwm_jax.metrics.base import METRICS


@METRICS.register("accuracy", kind="classification")
def accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Share of the examples whose class is the predicted one."""
    return float(np.mean(labels == predictions))


@METRICS.register("f1", kind="classification", num_classes=2)
def f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """F1 of class 1 of two."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, pos_label=1, zero_division=0.0))


@METRICS.register("macro_f1", kind="classification")
def macro_f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Plain mean of F1 over the classes that occur in labels or predictions."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, average="macro", zero_division=0.0))


@METRICS.register("matthews", kind="classification")
def matthews(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Matthews correlation; 0 where it is undefined because labels or predictions are one class."""
    from sklearn.metrics import matthews_corrcoef

    if len(np.unique(predictions)) < 2 or len(np.unique(labels)) < 2:
        return 0.0  # scikit-learn warns where both are one class
    return float(matthews_corrcoef(labels, predictions))
