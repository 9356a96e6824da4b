"""Failure signatures: each fires on what it is for, and on nothing else."""

import math

from agwm_jax.methods.search_warnings import search_warnings


def search(steps=40, phase="search-0", upto=None, **series):
    """Lines of a healthy search, of which `series` (key -> function of progress in [0, 1]) replaces columns."""
    healthy = {
        "loss": lambda done: 0.7 - 0.3 * done,
        "outer_loss": lambda done: 0.7 - 0.2 * done,
        "hypergradient_norm": lambda done: 0.01,
        "alpha_mean": lambda done: 0.996 - 0.05 * done,
        "alpha_std": lambda done: 0.004 + 0.01 * done,
        "alpha_below": lambda done: 0.0,
        "alpha_above": lambda done: 1.0 - 0.3 * done,
    }
    columns = {**healthy, **series}
    return [
        {"phase": phase, "step": step, "num_steps": steps}
        | {key: column(step / (steps - 1)) for key, column in columns.items() if column is not None}
        for step in range(steps)
    ][:upto]


def names(records, **settings):
    return [warning.name for warning in search_warnings(records, **settings)]


def test_a_healthy_search_and_a_run_without_one_are_silent():
    assert names(search()) == []
    assert names([{"phase": "finetune", "step": 0, "num_steps": 1, "loss": math.nan}]) == []
    assert names([]) == []


def test_collapsed_alpha_is_told_apart_from_unmoved_alpha():
    collapsed = search(alpha_below=lambda d: 0.97 * d, alpha_above=lambda d: 1 - d)
    assert names(collapsed) == ["alpha_collapsed"]
    unmoved = search(alpha_mean=lambda d: 0.996, alpha_std=lambda d: 0.004, alpha_above=lambda d: 1.0)
    assert names(unmoved) == ["alpha_unmoved"]


def test_alpha_above_095_that_moved_is_no_failure():
    # The start lies above 0.95 altogether: a small but real movement within that range must not be called a failure.
    assert names(search(alpha_above=lambda d: 1.0, alpha_mean=lambda d: 0.996 - 0.01 * d)) == []
    # Entries may move apart while their mean stays.
    assert names(search(alpha_above=lambda d: 1.0, alpha_mean=lambda d: 0.99)) == []


def test_what_needs_a_whole_search_waits_for_its_end():
    settings = {
        "outer_loss": lambda d: 0.7,
        "alpha_mean": lambda d: 0.996,
        "alpha_std": lambda d: 0.004,
        "alpha_above": lambda d: 1.0,
    }
    assert names(search(upto=30, **settings)) == []
    assert names(search(**settings)) == ["alpha_unmoved", "validation_loss_not_falling"]


def test_collapse_is_told_while_the_search_runs():
    assert names(search(upto=38, alpha_below=lambda d: d, alpha_above=lambda d: 1 - d)) == ["alpha_collapsed"]


def test_validation_loss_compares_first_and_last_quarter():
    # A spike at either end does not decide.
    falling = search(outer_loss=lambda d: 0.7 - 0.2 * d + (0.5 if d == 1 else 0.0))
    assert names(falling) == []
    assert names(search(outer_loss=lambda d: 0.6 + 0.01 * d)) == ["validation_loss_not_falling"]
    assert names(search(steps=8, outer_loss=lambda d: 0.6 + d)) == []


def test_hypergradient_vanished_or_not_finite():
    assert names(search(hypergradient_norm=lambda d: 1e-9)) == ["hypergradient_vanished"]
    assert names(search(hypergradient_norm=lambda d: 1e-9 if d < 0.4 else 1e-3)) == []
    records = search(hypergradient_norm=lambda d: math.inf if d > 0.5 else 0.01)
    assert names(records) == ["hypergradient_not_finite"]
    assert "first at step 20" in search_warnings(records)[0].message
    # What is not finite is null in metrics.jsonl.
    assert names(search(outer_loss=lambda d: None if d > 0.9 else 0.5 - 0.1 * d)) == ["hypergradient_not_finite"]


def test_a_diverging_linear_solve_is_told_with_its_remedies():
    (warning,) = search_warnings(search(residual=lambda d: 0.5 + d))
    assert warning.name == "linear_solve_diverged"
    assert "above 1 at 20 of 40 steps (largest finite one 1.5)" in warning.message
    for remedy in ("method.estimator.solver.step_size", "solver.damping", "gauss_newton"):
        assert remedy in warning.message
    # While it runs; an infinite one, null in metrics.jsonl, counts; a solve that has not converged is none.
    assert names(search(upto=25, residual=lambda d: None if d > 0.5 else 0.1)) == ["linear_solve_diverged"]
    assert names(search(residual=lambda d: 1.0)) == []
    # A step size that is still being found at the first steps.
    assert names(search(residual=lambda d: 5.0 if d < 0.05 else 0.9)) == []


def test_columns_that_are_not_recorded_are_not_looked_for():
    assert names(search(alpha_mean=None, alpha_std=None, alpha_below=None, alpha_above=None)) == []
    assert names(search(hypergradient_norm=None, outer_loss=None)) == []


def test_splits_are_judged_one_by_one_and_named():
    records = (
        search()
        + search(phase="search-1", outer_loss=lambda d: 0.7)
        + search(phase="search-2", outer_loss=lambda d: 0.8)
    )
    (warning,) = search_warnings(records)
    assert warning.message.startswith("search-1, search-2: ")
