"""Whether a method's scores spread more over the seeds than the baseline's, and more than chance makes them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from agwm_jax.report.runs import ReportWarning


def spread_warnings(scores: Mapping[str, Sequence[float]], *, baseline: str, min_seeds: int = 3) -> list[ReportWarning]:
    """Methods whose scores spread more over the seeds than those of the baseline.

    Args:
        scores: method -> main-metric scores, one a seed.
        baseline: the method that the others are compared with; without it there is nothing to compare.
        min_seeds: methods with fewer finite scores than this are left alone.

    Returns:
        a warning `spread_above_baseline` for each such method, with the ratio that chance reaches in one case of 20.
    """
    reference = _finite(scores.get(baseline, ()))
    if len(reference) < min_seeds:
        return []
    base = float(np.std(reference, ddof=1))
    warnings = []
    for method, raw in scores.items():
        values = _finite(raw)
        if method == baseline or len(values) < min_seeds:
            continue
        spread = float(np.std(values, ddof=1))
        if spread <= base:
            continue
        chance = _chance_ratio(len(values), len(reference))
        ratio = spread / base if base > 0 else math.inf
        weight = "more than" if ratio > chance else "within"
        warnings.append(
            ReportWarning(
                "spread_above_baseline",
                f"the scores of {method} have standard deviation {spread:.4f} over {len(values)} seeds, those of "
                f"{baseline} {base:.4f}: the method is meant to lower it. The ratio {ratio:.2f} is {weight} what "
                f"chance does with so few seeds (up to {chance:.2f} in 19 cases of 20). Run more seeds; if it stays, "
                "lower method.search.outer.learning_rate or raise method.search.num_splits.",
            )
        )
    return warnings


def _chance_ratio(n: int, m: int) -> float:
    """95 % quantile of the ratio of two standard deviations of n and m draws from one normal distribution."""
    rng = np.random.default_rng(0)
    draws = (rng.chisquare(n - 1, 20_000) / (n - 1)) / (rng.chisquare(m - 1, 20_000) / (m - 1))
    return float(np.sqrt(np.quantile(draws, 0.95)))


def _finite(values: Any) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    return array[np.isfinite(array)]
