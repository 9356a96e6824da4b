"""Numbers of the report: paired differences, intervals, tables, CSV."""

import csv
import io
import math

import numpy as np
import pytest
from scipy import stats

from agwm_jax.report.comparisons import collect
from agwm_jax.report.table import groups_table, paired_difference, results_csv, results_table, summarize


def test_difference_is_paired_by_seed():
    # Seed 3 has no partner; unpaired means would differ by 0.075.
    difference = paired_difference({0: 0.72, 1: 0.81, 2: 0.64, 3: 0.99}, {2: 0.60, 0: 0.70, 1: 0.78, 7: 0.0})
    assert difference is not None
    assert difference.n == 3
    assert difference.mean == pytest.approx(0.03, abs=1e-12)


def test_interval_is_near_student_s_and_the_same_every_time():
    values = 0.02 + 0.01 * stats.norm.ppf((np.arange(10) + 0.5) / 10)  # not lopsided, unlike most draws
    scores = {seed: 0.5 + value for seed, value in enumerate(values)}
    baseline = dict.fromkeys(range(10), 0.5)
    first, second = paired_difference(scores, baseline), paired_difference(scores, baseline)
    assert first is not None
    assert first == second
    assert first != paired_difference(scores, baseline, seed=1)
    error = stats.t.ppf(0.975, 9) * values.std(ddof=1) / math.sqrt(10)
    assert first.low == pytest.approx(values.mean() - error, abs=0.05 * error)
    assert first.high == pytest.approx(values.mean() + error, abs=0.05 * error)


def test_no_interval_below_four_common_seeds():
    difference = paired_difference({0: 0.7, 1: 0.8, 2: 0.75}, {0: 0.6, 1: 0.6, 2: 0.6})
    assert difference is not None
    assert difference.mean == pytest.approx(0.15)
    assert math.isnan(difference.low)
    assert math.isnan(difference.high)
    assert paired_difference({0: 0.7}, {1: 0.7}) is None


def test_summary_and_table(write_run, tmp_path):
    for seed, (plain, mixed) in enumerate([(0.70, 0.73), (0.72, 0.74), (0.74, 0.78)]):
        write_run("vanilla", seed, plain)
        write_run(
            "agwm",
            seed,
            mixed,
            num_splits=2,
            result={"seconds": {"search-0": 10.0, "search-1": 20.0, "finetune": 12.0, "total": 50.0}},
        )
    (comparison,) = collect([tmp_path]).comparisons
    vanilla, agwm = summarize(comparison)
    assert (vanilla.method, vanilla.n, vanilla.difference) == ("vanilla", 3, None)
    assert vanilla.mean == pytest.approx(0.72)
    assert vanilla.std == pytest.approx(0.02)  # ddof = 1
    assert agwm.difference is not None
    assert agwm.difference.mean == pytest.approx(0.03)
    assert agwm.seconds["search"] == pytest.approx(30.0)  # all splits
    assert vanilla.seconds == {"finetune": pytest.approx(12.25)}
    lines = results_table(comparison).splitlines()
    assert lines[2] == "| vanilla | 72.00 | 2.00 | 3 | - | - | 12.2 | 55.5 | 1.50 GiB |"
    assert lines[3] == "| agwm | 75.00 | 2.65 | 3 | +3.00, interval n/a (n < 4) | 30.0 | 12.0 | 50.0 | 1.50 GiB |"


def test_two_seeds_say_why_there_is_no_interval(write_run, tmp_path):
    for seed in range(2):
        write_run("vanilla", seed, 0.7)
        write_run("agwm", seed, 0.71)
    (comparison,) = collect([tmp_path]).comparisons
    assert "+1.00, interval n/a (n < 4)" in results_table(comparison)


def test_one_seed_has_no_standard_deviation(write_run, tmp_path):
    write_run("vanilla", 0, 0.7)
    (comparison,) = collect([tmp_path]).comparisons
    assert results_table(comparison).splitlines()[2].startswith("| vanilla | 70.00 | - | 1 | - |")


def test_a_method_without_vanilla_says_so(write_run, tmp_path):
    write_run("agwm", 0, 0.7)
    (comparison,) = collect([tmp_path]).comparisons
    assert "n/a (no vanilla run to pair with)" in results_table(comparison)


def test_groups_table(write_run, tmp_path):
    for seed in range(2):
        write_run("vanilla", seed, 0.6 + 0.02 * seed, groups=True)
    write_run("agwm", 0, 0.7)  # a run without groups
    (comparison,) = collect([tmp_path]).comparisons
    lines = groups_table(comparison).splitlines()
    assert lines[0] == "| accuracy, points | vanilla | agwm |"
    assert "| subject verb | 61.0 ± 1.4 | - |" in lines
    assert len(lines) == 2 + 4


def test_no_groups_no_table(write_run, tmp_path):
    write_run("vanilla", 0)
    assert groups_table(collect([tmp_path]).comparisons[0]) == ""


def test_csv_has_one_row_a_run_with_raw_numbers(write_run, tmp_path):
    write_run("vanilla", 0, 0.7)
    write_run("agwm", 1, 0.75)
    rows = list(csv.DictReader(io.StringIO(results_csv(collect([tmp_path])))))
    assert [(row["method"], row["seed"], row["score"]) for row in rows] == [
        ("vanilla", "0", "0.7"),
        ("agwm", "1", "0.75"),
    ]
    assert rows[0]["validation.accuracy"] == "0.71"
    assert rows[0]["seconds.search-0"] == ""
    assert rows[1]["seconds.search-0"] == "31.5"
    assert rows[1]["peak_memory_bytes"] == str(3 * 2**29)
