"""The spread over seeds against the baseline's, and against what chance does."""

import math

import pytest

from agwm_jax.report.spread import spread_warning


def test_a_method_that_spreads_more_is_named_with_both_figures():
    plain = [0.70, 0.71, 0.72]
    warning = spread_warning("mixed", [0.60, 0.72, 0.84], "plain", plain)
    assert warning.name == "spread_above_baseline"
    parts = ("mixed", "0.1200", "0.0100", "more than what chance does")
    assert [part for part in parts if part not in warning.message] == []
    assert spread_warning("calm", [0.71, 0.715, 0.72], "plain", plain) is None
    assert spread_warning("mixed", [0.1, 0.9], "plain", plain) is None
    assert spread_warning("mixed", [0.60, 0.72, 0.84], "plain", [0.7, 0.71]) is None


def test_the_ratio_of_chance_is_the_quantile_of_f():
    # 95 % quantile of F(4, 4) is 6.388: five seeds on both sides.
    message = spread_warning("mixed", [0.0, 1.1, 2.1, 3.1, 4.1], "plain", [0.0, 1.0, 2.0, 3.0, 4.0]).message
    ratio = float(message.split("up to ")[1].split(" ")[0])
    assert ratio == pytest.approx(math.sqrt(6.388), abs=0.005)
    assert "within what chance does" in message
