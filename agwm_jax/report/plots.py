"""Figures of scores and losses: the seeds of every method, and the learning curves of both levels."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from agwm_jax.report.comparisons import Comparison
from agwm_jax.report.runs import phase_kind
from agwm_jax.report.style import Look
from agwm_jax.report.table import Summary, summarize

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

Records = Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]  # method -> run -> lines of its metrics.jsonl


class Panel(NamedTuple):
    """A panel of the learning curves: what it reads and how it is labelled."""

    title: str
    phase: str
    key: str
    unit: str
    transform: Callable[[np.ndarray], np.ndarray] = lambda values: values
    smooth: bool = True


def panels(kind: str) -> tuple[Panel, ...]:
    """What may be shown of a kind of phase: losses of both levels, and the gate."""
    return (
        Panel(f"{kind}: training loss", kind, "loss", "loss"),
        Panel(f"{kind}: validation-split loss", kind, "outer_loss", "loss"),
        Panel(
            f"{kind}: share of the pretrained weight",
            kind,
            "alpha_mean",
            "mean of 1 - A (%)",
            lambda a: 100 * (1 - a),
            False,
        ),
    )


def verdict(comparison: Comparison) -> tuple[str, str]:
    """The result, claim and figures: the best of the compared methods against the baseline."""
    rows = summarize(comparison)
    rivals = [row for row in rows if row.difference]
    if not rivals:
        best = max(rows, key=lambda row: row.mean)
        spread = f" ± {100 * best.std:.1f}" if math.isfinite(best.std) else ""
        return f"{best.method} reaches {100 * best.mean:.1f}{spread}", seeds(best.n)
    return _compare(max(rivals, key=lambda row: row.mean), comparison.baseline)


def _compare(row: Summary, baseline: str) -> tuple[str, str]:
    difference = row.difference
    assert difference is not None
    size = f"{100 * difference.mean:+.2f} points"
    if math.isnan(difference.low):
        return f"{row.method} minus {baseline}: {size}", f"{seeds(difference.n)}, too few for an interval"
    size += f" [{100 * difference.low:+.2f}, {100 * difference.high:+.2f}], {seeds(difference.n)}"
    if difference.low > 0:
        return f"{row.method} beats {baseline}", size
    if difference.high < 0:
        return f"{row.method} is worse than {baseline}", size
    return f"{row.method} and {baseline}: no clear difference", size


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
        axes.scatter(
            [index] * len(values),
            values,
            s=34,
            color=look.color,
            marker=look.marker,
            alpha=0.75,
            linewidths=0,
            zorder=3,
        )
        axes.plot(
            [index - 0.2, index + 0.2], [mean, mean], color=look.color, linewidth=3.5, solid_capstyle="butt", zorder=4
        )
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
            row[np.searchsorted(steps, at)] = _smooth(values, max(1, len(values) // 8) if panel.smooth else 1)
        seen = np.isfinite(rows)
        used = seen.any(axis=0)
        steps, rows, count = steps[used], np.where(seen, rows, 0.0)[:, used], seen.sum(axis=0)[used]
        mean = rows.sum(axis=0) / count
        spread = np.sqrt((np.where(seen[:, used], rows - mean, 0.0) ** 2).sum(axis=0) / np.maximum(count - 1, 1))
        color = looks[method].color
        # What is measured only now and then (alpha, once a chunk) shows where.
        marker = "o" if len(steps) < 12 else ""
        axes.plot(steps, mean, color=color, linewidth=2.2, marker=marker, markersize=4, zorder=3)
        if len(curves) > 1:
            axes.fill_between(steps, mean - spread, mean + spread, color=color, alpha=0.18, linewidth=0, zorder=2)
        ends.append((float(mean[0]), float(mean[-1])))
    axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", steps=[1, 2, 5, 10], integer=True))
    axes.set_xlabel("step")
    axes.set_ylabel(panel.unit)
    axes.set_title(panel.title)
    if len(ends) == 1:
        first, last = ends[0]
        digits = 3 if abs(last - first) < 0.05 else 2
        start, end = f"{first:.{digits}f}", f"{last:.{digits}f}"
        change = (
            f"stays at {start}" if start == end else f"{'falls' if last < first else 'rises'} from {start} to {end}"
        )
        axes.set_title(f"{panel.title}\n{change}")


def panels_with_data(records: Records) -> list[Panel]:
    """The panels for which at least one run wrote something; losses first, what most methods train last."""
    runs = [run for members in records.values() for run in members]
    kinds = dict.fromkeys(phase_kind(record["phase"]) for run in runs for record in run)
    found = [panel for kind in kinds for panel in panels(kind) if any(_curves(run, panel) for run in runs)]

    def order(panel: Panel) -> tuple[bool, int]:
        return not panel.smooth, sum(any(_curves(run, panel) for run in members) for members in records.values())

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
    return [
        (np.array([s for s, _ in points]), panel.transform(np.array([v for _, v in points])))
        for points in phases.values()
    ]


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving mean; at the ends over the part of the window that there is."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(at - window // 2, 0), np.minimum(at + window // 2 + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)
