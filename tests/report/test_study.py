"""The report of a study from a table with known scores."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agwm_jax import AgwmError
from agwm_jax.report.study import chosen, read_cells, write_study_report

# By arm and rate: what each reported seed scores more than 70 + seed, and the development score of the tuning seeds.
SCORES = {
    ("vanilla", 1e-4): ([0, 0, 0, 0], [60, 62]),
    ("vanilla", 1e-3): ([9, 9, 9, 9], [50, 51]),  # better where it is reported: may not be looked at
    ("gate", 1e-4): ([1, 2, 1, 2], [50, 50]),
    ("gate", 1e-3): ([2, 1, 4, 3], [70, 70]),
}


@pytest.fixture
def table(tmp_path):
    rows = []
    for (arm, rate), (more, development) in SCORES.items():
        where = {"task": "topics", "arm": arm, "rate": rate, "control": "" if arm == "vanilla" else "vanilla"}
        for seed in range(6):
            tuning = seed >= 4
            test, chooses = (99.0, development[seed - 4]) if tuning else (70.0 + seed + more[seed], 0.0)
            scores = {"test": test, "development": float(chooses)}
            costs = {"seconds": 12.0, "compile_seconds": 2.0}
            rows.append({**where, "seed": seed, "tuning": tuning, "reported": "test", **scores, **costs})
    path = tmp_path / "results.parquet"
    pq.write_table(pa.Table.from_pylist(rows).replace_schema_metadata({"grid": "rate"}), path)
    return path


def test_the_tuning_seeds_choose_and_are_not_scored(table):
    best = chosen(read_cells(table))
    assert {arm: dict(cell.point)["rate"] for (_, arm), cell in best.items()} == {"vanilla": 1e-4, "gate": 1e-3}
    assert best["topics", "gate"].scores == {0: 72, 1: 72, 2: 76, 3: 76}
    assert best["topics", "gate"].development == 70
    assert best["topics", "gate"].seconds == 10


def test_differences_are_paired_with_the_control(table, tmp_path):
    text = write_study_report(table, tmp_path / "report")
    gate, vanilla = (
        next(line for line in text.splitlines() if line.startswith(f"| `{arm}`")) for arm in ("gate", "vanilla")
    )
    assert "| rate 0.001 | 74.0 ± 2.3 | 4 | 10.0 | `vanilla` | +2.5 [" in gate
    assert "| 0.125 |" in gate  # all of four signs alike: 2 / 16
    assert "| rate 0.0001 | 71.5 ± 1.3 | 4 | 10.0 | - | - | - | - |" in vanilla
    # At the same rate as its control, not at the control's own.
    assert "| `gate` | 73.0 (+1.5) | 74.0 (-6.5) |" in text
    assert (tmp_path / "report" / "study.md").read_text() == text
    assert (tmp_path / "report" / "study.png").stat().st_size > 10_000


def test_a_table_of_something_else_is_refused(tmp_path):
    path = tmp_path / "other.parquet"
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(AgwmError, match="does not say what its grid is"):
        read_cells(path)
    with pytest.raises(AgwmError, match=r"expected the results.parquet of `agwm sweep`"):
        read_cells(tmp_path / "none.parquet")
