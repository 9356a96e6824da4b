"""What a few paired scores can say: an interval, a p-value, a correction for many, and what could have been seen."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from scipy import stats

RESAMPLES = 20_000
MIN_PAIRS = 4
"""For an interval: of three values every ninth resample is one value three times, and says nothing of its error."""


def bootstrap_t(differences: Float[np.ndarray, "n"], *, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Bootstrap-t interval of a mean: resampled means in units of their own standard error (Efron 1981).

    A percentile interval is too narrow for few values, since it takes their spread for the true one; this one makes up
    for that. Of ten values it is about as wide as Student's, and lopsided where they are.

    Args:
        differences: one a pair.
        level: of confidence.
        seed: of the resampling.

    Returns:
        low, high; NaN with fewer than `MIN_PAIRS`, the mean twice where all are equal.
    """
    n, mean = len(differences), float(np.mean(differences))
    if n < MIN_PAIRS:
        return math.nan, math.nan
    error = float(np.std(differences, ddof=1)) / math.sqrt(n)
    if error == 0:
        return mean, mean
    drawn = differences[np.random.default_rng(seed).integers(n, size=(RESAMPLES, n))]
    errors = drawn.std(axis=1, ddof=1) / math.sqrt(n)
    # A draw of one value n times has no error: its ratio is infinite, on the side of its mean.
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.nan_to_num((drawn.mean(axis=1) - mean) / errors, nan=0.0, posinf=np.inf, neginf=-np.inf)
    tail = (1 - level) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail], method="closest_observation")
    return mean - float(high) * error, mean - float(low) * error


def sign_flip(differences: Float[np.ndarray, "n"]) -> float:
    """Two-sided p of the mean under random signs, exact up to 13 values: differences that favour neither side.

    Its least value is ``2 / 2^n``: 0.002 for ten.
    """
    if len(differences) < 2 or not np.any(differences):
        return 1.0

    def mean(values, axis):
        return np.mean(values, axis=axis)

    found = stats.permutation_test(
        (differences,), mean, permutation_type="samples", n_resamples=2**13, vectorized=True, rng=0
    )
    return float(found.pvalue)


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Holm's correction of p-values for all that are tested at once (Holm 1979)."""
    corrected: dict[str, float] = {}
    least = 0.0
    for rank, name in enumerate(sorted(p, key=lambda name: p[name])):
        least = max(least, min(1.0, (len(p) - rank) * p[name]))
        corrected[name] = least
    return {name: corrected[name] for name in p}


def detectable(std: float, n: int, *, size: float = 0.05, power: float = 0.8) -> float:
    """The mean difference that a two-sided paired t-test finds with `power`, about: in the unit of `std`.

    Args:
        std: standard deviation of the n differences.
        n: pairs, two or more.
        size: of the test.
        power: chance to find it.
    """
    degrees = n - 1
    return float((stats.t.ppf(1 - size / 2, degrees) + stats.t.ppf(power, degrees)) * std / math.sqrt(n))


def mean_and_std(values: Sequence[float]) -> str:
    """``72.1 ± 1.3``."""
    spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread}"
