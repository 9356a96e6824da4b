"""Whether a method's scores spread more over the seeds than the baseline's, and more than chance makes them."""

import math
from collections.abc import Sequence

import numpy as np

from agwm_jax.report.runs import ReportWarning

MIN_SEEDS = 3


def spread_warning(
    method: str, scores: Sequence[float], baseline: str, reference: Sequence[float]
) -> ReportWarning | None:
    """The warning `spread_above_baseline` where the scores of a method spread more than those of the baseline.

    It has the ratio of the standard deviations that chance reaches in one case of 20. None below `MIN_SEEDS` seeds.
    """
    from scipy.special import fdtri  # here: most reports have too few seeds for it

    if min(len(scores), len(reference)) < MIN_SEEDS:
        return None
    spread, base = float(np.std(scores, ddof=1)), float(np.std(reference, ddof=1))
    if spread <= base:
        return None
    chance = math.sqrt(fdtri(len(scores) - 1, len(reference) - 1, 0.95))
    ratio = spread / base if base > 0 else math.inf
    weight = "more than" if ratio > chance else "within"
    return ReportWarning(
        "spread_above_baseline",
        f"the scores of {method} have standard deviation {spread:.4f} over {len(scores)} seeds, those of {baseline} "
        f"{base:.4f}: the method is meant to lower it. The ratio {ratio:.2f} is {weight} what chance does with so few "
        f"seeds (up to {chance:.2f} in 19 cases of 20). Run more seeds; if it stays, lower "
        "method.search.outer.learning_rate or raise method.search.num_splits.",
    )
