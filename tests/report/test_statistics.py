"""Intervals and tests of paired scores against answers worked out by hand, SciPy's, and simulated pairs."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from agwm_jax.report.statistics import bootstrap_t, detectable, holm, sign_flip


def test_sign_flip_counts_all_signs():
    values = np.array([0.3, -0.1, 0.8, 0.4, 1.1])
    means = [abs(np.mean(values * signs)) for signs in itertools.product([1, -1], repeat=5)]
    assert sign_flip(values) == pytest.approx(np.mean([mean >= abs(values.mean()) - 1e-12 for mean in means]))
    assert sign_flip(np.array([1.0, 2.0, 3.0])) == 2 / 8
    assert sign_flip(np.arange(1.0, 11.0)) == 2 / 1024
    assert sign_flip(np.zeros(4)) == 1.0


def test_holm_multiplies_the_least_by_all_and_never_falls():
    assert holm({"a": 0.04, "b": 0.01, "c": 0.03}) == pytest.approx({"a": 0.06, "b": 0.03, "c": 0.06})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_the_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = {"bootstrap-t": 0, "percentile": 0}
    for number in range(300):
        values = rng.normal(1.0, 2.0, size=6)
        low, high = bootstrap_t(values, seed=number)
        hits["bootstrap-t"] += low <= 1.0 <= high
        means = values[rng.integers(6, size=(2000, 6))].mean(axis=1)
        low, high = np.quantile(means, [0.025, 0.975])
        hits["percentile"] += low <= 1.0 <= high
    assert 0.92 <= hits["bootstrap-t"] / 300 <= 0.99
    assert hits["percentile"] / 300 < 0.91  # what it is there instead of


def test_the_interval_follows_the_values():
    values = np.array([0.2, 0.5, -0.1, 0.9, 0.4, 0.3])
    low, high = bootstrap_t(values)
    assert low < values.mean() < high
    moved = bootstrap_t(10 * values - 3)
    assert moved == pytest.approx((10 * low - 3, 10 * high - 3))
    lopsided = bootstrap_t(np.array([0.0, 0.1, 0.0, 0.2, 0.1, 4.0]))
    mean = 4.4 / 6
    assert lopsided[1] - mean > mean - lopsided[0]
    assert bootstrap_t(np.full(4, 0.5)) == (0.5, 0.5)
    assert all(math.isfinite(bound) for bound in bootstrap_t(np.array([0.1, 0.2, 0.4, 0.3])))
    assert all(math.isnan(bound) for bound in bootstrap_t(np.array([0.5, 0.6, 0.7])))


def test_what_can_be_seen_is_seen_in_four_of_five():
    size = detectable(2.0, 10)
    assert size == pytest.approx(2.0, rel=0.02)  # one standard deviation with ten pairs
    drawn = np.random.default_rng(0).normal(size, 2.0, size=(4000, 10))
    assert np.mean(stats.ttest_1samp(drawn, 0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.03)
