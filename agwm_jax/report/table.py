"""The numbers of a report: summaries per method, paired bootstrap intervals, Markdown tables, the CSV of all runs."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from agwm_jax.report.comparisons import Collection, Comparison
from agwm_jax.report.statistics import MIN_PAIRS, RESAMPLES, bootstrap_t


class Difference(NamedTuple):
    """Mean paired difference to the baseline over `n` common seeds; `low`, `high` are NaN below MIN_PAIRS seeds."""

    mean: float
    low: float
    high: float
    n: int


class Summary(NamedTuple):
    """One row of the results table; scores as in result.json (not in points), times in seconds, memory in bytes."""

    method: str
    n: int
    mean: float
    std: float
    difference: Difference | None
    seconds: dict[str, float]
    total_seconds: float
    peak_memory: float


def paired_difference(
    scores: Mapping[int, float], baseline: Mapping[int, float], *, seed: int = 0
) -> Difference | None:
    """Mean of score - baseline over the common seeds, with its 95 % bootstrap-t interval over those seeds.

    Args:
        scores: seed -> score of a method.
        baseline: seed -> score of the baseline.
        seed: of the resampling, so that a report of the same runs is the same report.

    Returns:
        None without a common seed; without an interval (NaN) below MIN_PAIRS common seeds.
    """
    common = sorted(set(scores) & set(baseline))
    if not common:
        return None
    values = np.array([scores[key] - baseline[key] for key in common], dtype=np.float64)
    return Difference(float(values.mean()), *bootstrap_t(values, seed=seed), len(values))


def summarize(comparison: Comparison) -> list[Summary]:
    """One summary a method, in the order of the methods."""
    rows = []
    for method, runs in comparison.methods.items():
        rival = comparison.rival(method)
        baseline = {run.seed: run.score for run in comparison.methods.get(rival or "", [])}
        scores = np.array([run.score for run in runs])
        own = {run.seed: run.score for run in runs}
        difference = None if comparison.is_baseline(method) else paired_difference(own, baseline)
        times = {phase: _mean([run.seconds.get(phase, math.nan) for run in runs]) for phase in runs[0].seconds}
        total = _mean([run.result.get("seconds", {}).get("total", math.nan) for run in runs])
        memory = max(run.result.get("peak_memory_bytes", math.nan) for run in runs)
        std = float(scores.std(ddof=1)) if len(scores) > 1 else math.nan
        rows.append(Summary(method, len(scores), float(scores.mean()), std, difference, times, total, memory))
    return rows


def results_table(comparison: Comparison) -> str:
    """Markdown table: one row a method; scores and differences in points (times 100)."""
    summaries = summarize(comparison)
    rows = []
    for row in summaries:
        cells = {"method": row.method, "mean": f"{100 * row.mean:.2f}", "std": f"{100 * row.std:.2f}"}
        cells |= {"n seeds": str(row.n), f"difference to {comparison.baseline}": difference_text(comparison, row)}
        cells |= {f"{phase} s": f"{row.seconds.get(phase, math.nan):.1f}" for phase in _phases(summaries)}
        cells |= {"total s": f"{row.total_seconds:.1f}", "peak memory": f"{row.peak_memory / 2**30:.2f} GiB"}
        rows.append({name: "-" if "nan" in cell.split() else cell for name, cell in cells.items()})
    return markdown_table(rows)


def _phases(summaries: Sequence[Summary]) -> list[str]:
    """All kinds of phases; the one that most methods have, the last stage of all, last."""
    found = list(dict.fromkeys(phase for row in summaries for phase in row.seconds))
    return sorted(found, key=lambda phase: sum(phase in row.seconds for row in summaries))


def difference_text(comparison: Comparison, row: Summary) -> str:
    """The difference cell: "+1.20 [+0.31, +2.05], n = 5", or why there is no interval."""
    difference = row.difference
    if difference is None:
        return "-" if comparison.is_baseline(row.method) else f"n/a (no {comparison.baseline} run to pair with)"
    text = f"{100 * difference.mean:+.2f}"
    if math.isnan(difference.low):
        return f"{text}, interval n/a (n < {MIN_PAIRS})"
    return f"{text} [{100 * difference.low:+.2f}, {100 * difference.high:+.2f}], n = {difference.n}"


def interval_sentence(baseline: str) -> str:
    """What mean, spread and interval are, in words."""
    return (
        "Scores are in points (metric times 100), after the last epoch. Mean and standard deviation (n - 1) are over "
        f"seeds. The difference is paired: score minus that of {baseline} with the same seed, averaged over the n "
        f"common seeds; the brackets hold its 95 % bootstrap-t interval over them ({RESAMPLES:,} resamples, fixed "
        f"seed), which {MIN_PAIRS} seeds or more can give. An interval that contains 0 is no evidence of a difference. "
        "Seconds are means over seeds, peak memory is the largest."
    )


def groups_table(comparison: Comparison) -> str:
    """Markdown table of the scores per group (e.g. phenomenon) of the reported split; empty without groups."""
    found = {method: [run.groups() for run in runs] for method, runs in comparison.methods.items()}
    names = sorted({name for runs in found.values() for run in runs for name in run})
    if not names:
        return ""
    rows = []
    for name in names:
        cells = {"accuracy, points": name.replace("_", " ")}
        for method, runs in found.items():
            values = 100 * np.array([run[name] for run in runs if name in run])
            spread = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
            cells[method] = f"{values.mean():.1f}{spread}" if len(values) else "-"
        rows.append(cells)
    return markdown_table(rows)


def results_csv(collection: Collection) -> str:
    """All finished runs, one row a run; raw scores, seconds and bytes."""
    rows = []
    for comparison in collection.comparisons:
        for run in (run for members in comparison.methods.values() for run in members):
            result = run.result
            row: dict[str, object] = {
                "comparison": comparison.title,
                "task": run.task,
                "model": run.model,
                "train_size": run.train_size,
            }
            row |= {"method": run.method, "seed": run.seed, "metric": comparison.metric, "split": comparison.split}
            row |= {"score": run.score, "folder": run.folder}
            row |= {key: result.get(key) for key in ("peak_memory_bytes", "device", "git_commit")}
            for split, values in result.get("scores", {}).items():
                row |= {f"{split}.{name}": value for name, value in values.items()}
            rows.append(row | {f"seconds.{phase}": value for phase, value in result.get("seconds", {}).items()})
    text = io.StringIO()
    writer = csv.DictWriter(text, dict.fromkeys(key for row in rows for key in row), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows of cells by column, in the order in which columns are first named; what a row lacks is "-"."""
    head = list(dict.fromkeys(name for row in rows for name in row))
    cells = [head, ["---", *["---:"] * (len(head) - 1)], *([row.get(name, "-") for name in head] for row in rows)]
    # A "|" inside a name would open a new column.
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in cells)
