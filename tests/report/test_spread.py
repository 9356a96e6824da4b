"""The spread over seeds against the baseline's, and against what chance does."""

import math
from functools import partial

import pytest

from agwm_jax.report.spread import spread_warnings

compare = partial(spread_warnings, baseline="plain")


def test_a_method_that_spreads_more_is_named_with_both_figures():
    scores = {"plain": [0.70, 0.71, 0.72], "mixed": [0.60, 0.72, 0.84], "calm": [0.71, 0.715, 0.72]}
    (warning,) = compare(scores)
    assert warning.name == "spread_above_baseline"
    assert [
        part for part in ("mixed", "0.1200", "0.0100", "more than what chance does") if part not in warning[1]
    ] == []
    assert compare({"mixed": scores["mixed"]}) == []
    assert compare({**scores, "plain": [0.7, 0.9]}) == []
    # A run without a score is not a seed.
    assert compare({"plain": scores["plain"], "mixed": [0.1, 0.9, math.nan]}) == []


def test_the_ratio_of_chance_is_the_quantile_of_f():
    # 95 % quantile of F(4, 4) is 6.388: five seeds on both sides.
    message = compare({"plain": [0.0, 1.0, 2.0, 3.0, 4.0], "mixed": [0.0, 1.1, 2.1, 3.1, 4.1]})[0].message
    ratio = float(message.split("up to ")[1].split(" ")[0])
    assert ratio == pytest.approx(math.sqrt(6.388), rel=0.03)
    assert "within what chance does" in message
