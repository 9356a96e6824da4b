"""Figures of scores and losses: the seeds of every method, and the learning curves of both levels."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from agwm_jax.report.comparisons import Comparison
from agwm_jax.report.leverage import PHASE
from agwm_jax.report.runs import phase_kind
from agwm_jax.report.style import Look
from agwm_jax.report.table import summarize

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

Records = Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]  # method -> run -> lines of its metrics.jsonl


class Panel(NamedTuple):
    """A panel of the learning curves: a key of the records of one kind of phase."""

    phase: str
    key: str

    @property
    def is_gate(self) -> bool:
        """Whether it shows the gate, which is measured now and then, and not a loss, which is smoothed."""
        return self.key == "alpha_mean"


_TITLES = {
    "loss": ("training loss", "loss"),
    "outer_loss": ("validation-split loss", "loss"),
    "alpha_mean": ("share of the pretrained weight", "mean of 1 - A (%)"),
}
"""Of what is shown: title and unit."""


def verdict(comparison: Comparison) -> tuple[str, str]:
    """The result, claim and figures: the best of the compared methods against the baseline."""
    rows = summarize(comparison)
    rivals = [(row.mean, row.method, row.difference) for row in rows if row.difference]
    if not rivals:
        best = max(rows, key=lambda row: row.mean)
        spread = f" ± {100 * best.std:.1f}" if math.isfinite(best.std) else ""
        return f"{best.method} reaches {100 * best.mean:.1f}{spread}", seeds(best.n)
    _, method, difference = max(rivals, key=lambda rival: rival[0])
    size, baseline = f"{100 * difference.mean:+.2f} points", comparison.baseline
    if math.isnan(difference.low):
        return f"{method} minus {baseline}: {size}", f"{seeds(difference.n)}, too few for an interval"
    size += f" [{100 * difference.low:+.2f}, {100 * difference.high:+.2f}], {seeds(difference.n)}"
    if difference.low > 0:
        return f"{method} beats {baseline}", size
    if difference.high < 0:
        return f"{method} is worse than {baseline}", size
    return f"{method} and {baseline}: no clear difference", size


def seeds(n: int) -> str:
    """ "1 seed", "5 seeds"."""
    return f"{n} seed" + "s" * (n != 1)


def draw_scores(axes: "Axes", comparison: Comparison, looks: Mapping[str, Look]) -> None:
    """Every seed of every method as a point, the same seed joined by a line, the mean as a bar with its value."""
    names = list(comparison.methods)
    scores = {name: {run.seed: 100 * run.score for run in runs} for name, runs in comparison.methods.items()}
    for seed in sorted({seed for each in scores.values() for seed in each}):
        at = [index for index, name in enumerate(names) if seed in scores[name]]
        axes.plot(at, [scores[names[index]][seed] for index in at], color="#cfcfcf", linewidth=1.0, zorder=1)
    for index, name in enumerate(names):
        values = list(scores[name].values())
        look, mean = looks[name], float(np.mean(values))
        at = [index] * len(values)
        axes.scatter(at, values, s=34, color=look.color, marker=look.marker, alpha=0.75, linewidths=0, zorder=3)
        axes.hlines(mean, index - 0.2, index + 0.2, color=look.color, linewidth=3.5, zorder=4)
        axes.annotate(
            f"{mean:.1f}",
            (index + 0.2, mean),
            xytext=(4, 0),
            textcoords="offset points",
            color=look.color,
            fontweight="bold",
            fontsize=12,
            va="center",
            zorder=5,
            bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.75},
        )
    labels = [name.replace(" (", "\n").replace(", ", "\n").rstrip(")") for name in names]
    crowded = len(names) > 4
    labels = [label.replace("_", "_\n") for label in labels] if crowded else labels
    axes.set_xticks(range(len(names)), labels, fontsize=11 if not crowded else 8.5 if len(names) == 5 else 7.5)
    # Room for at least three, so that the bar of a lone method is not as wide as the panel.
    room = max(0.0, (3 - len(names)) / 2)
    axes.set_xlim(-0.5 - room, len(names) - 0.3 + room)
    axes.margins(y=0.12)
    low, high = axes.get_ylim()
    if high - low < 1.0:  # differences within a point should not fill the panel
        axes.set_ylim((low + high) / 2 - 0.5, (low + high) / 2 + 0.5)
    axes.set_ylabel(f"{comparison.metric.replace('_', '-')}, {comparison.split} split (points)")


def draw_curves(axes: "Axes", panel: Panel, records: Records, looks: Mapping[str, Look]) -> None:
    """The smoothed mean over runs (seeds and splits) of each method, in a band of one standard deviation."""
    from matplotlib.ticker import MaxNLocator

    ends = []
    for method, runs in records.items():
        curves = [curve for run in runs for curve in _curves(run, panel)]
        if not curves:
            continue
        steps = np.arange(min(curve[0][0] for curve in curves), max(curve[0][-1] for curve in curves) + 1)
        rows = np.full((len(curves), len(steps)), math.nan)
        for row, (at, values) in zip(rows, curves, strict=True):
            row[np.searchsorted(steps, at)] = values if panel.is_gate else _smooth(values, max(1, len(values) // 8))
        count = np.isfinite(rows).sum(axis=0)
        steps, rows, count = steps[count > 0], rows[:, count > 0], count[count > 0]
        mean = np.nanmean(rows, axis=0)
        spread = np.sqrt(np.nansum((rows - mean) ** 2, axis=0) / np.maximum(count - 1, 1))
        color = looks[method].color
        # What is measured only now and then (alpha, once a chunk) shows where.
        marker = "o" if len(steps) < 12 else ""
        axes.plot(steps, mean, color=color, linewidth=2.2, marker=marker, markersize=4, zorder=3)
        if len(curves) > 1:
            axes.fill_between(steps, mean - spread, mean + spread, color=color, alpha=0.18, linewidth=0, zorder=2)
        ends.append((float(mean[0]), float(mean[-1])))
    axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", steps=[1, 2, 5, 10], integer=True))
    axes.set_xlabel("step")
    what, unit = _TITLES[panel.key]
    title = f"{panel.phase}: {what}"
    axes.set_ylabel(unit)
    axes.set_title(title)
    if len(ends) == 1:
        first, last = ends[0]
        digits = 3 if abs(last - first) < 0.05 else 2
        start, end = f"{first:.{digits}f}", f"{last:.{digits}f}"
        change = (
            f"stays at {start}" if start == end else f"{'falls' if last < first else 'rises'} from {start} to {end}"
        )
        axes.set_title(f"{title}\n{change}")


def panels_with_data(records: Records) -> list[Panel]:
    """The panels of what was trained, and written by one run or more; losses first, what most methods train last."""
    runs = [run for members in records.values() for run in members]
    kinds = dict.fromkeys(phase_kind(record["phase"]) for run in runs for record in run)
    panels = [Panel(kind, key) for kind in kinds if kind != PHASE for key in _TITLES]
    found = [panel for panel in panels if any(_curves(run, panel) for run in runs)]

    def order(panel: Panel) -> tuple[bool, int]:
        return panel.is_gate, sum(any(_curves(run, panel) for run in members) for members in records.values())

    return sorted(found, key=order)


def draw_legend(
    figure: "Figure | SubFigure", labels: Mapping[str, str], looks: Mapping[str, Look], columns: int
) -> None:
    """A legend below the panels: method -> text next to its colour."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=looks[name].color, linewidth=4, label=text) for name, text in labels.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)


def _curves(run: Sequence[Mapping[str, Any]], panel: Panel) -> list[tuple[np.ndarray, np.ndarray]]:
    """(steps, values) of each phase of the run that the panel shows: one a split of the search."""
    phases: dict[str, list[tuple[int, float]]] = {}
    for record in run:
        value = record.get(panel.key)
        if phase_kind(str(record["phase"])) == panel.phase and isinstance(value, int | float) and math.isfinite(value):
            phases.setdefault(record["phase"], []).append((record["step"], value))
    curves = [tuple(np.array(points).T) for points in phases.values()]
    return [(steps, 100 * (1 - values) if panel.is_gate else values) for steps, values in curves]


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving mean; at the ends over the part of the window that there is."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(at - window // 2, 0), np.minimum(at + window // 2 + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)
