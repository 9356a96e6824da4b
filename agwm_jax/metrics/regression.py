"""Scores of predicted numbers. The library is imported where it is used: settings are read without it."""

import numpy as np

from agwm_jax.metrics.base import METRICS


def _correlates(labels: np.ndarray, predictions: np.ndarray) -> bool:
    """Whether a correlation is defined; what is constant to rounding error counts as constant."""
    spread = np.ptp(predictions)
    return bool(len(labels) > 1 and np.ptp(labels) > 0 and spread > 1e-13 * np.abs(predictions).max())


@METRICS.register("pearson", kind="regression")
def pearson(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Pearson correlation; 0 where labels or predictions are constant, which tell the examples apart not at all."""
    from scipy.stats import pearsonr

    return float(pearsonr(labels, predictions).statistic) if _correlates(labels, predictions) else 0.0


@METRICS.register("spearman", kind="regression")
def spearman(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Spearman's rank correlation; 0 where labels or predictions are constant."""
    from scipy.stats import spearmanr

    return float(spearmanr(labels, predictions).statistic) if _correlates(labels, predictions) else 0.0
