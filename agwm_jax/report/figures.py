"""Which figures a report has, how their panels are arranged, and the files they go to."""

import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from agwm_jax.report.comparisons import Comparison
from agwm_jax.report.gate_plots import draw_heat, draw_histogram, heat_verdict, histogram_label, histogram_verdict
from agwm_jax.report.plots import draw_curves, draw_legend, draw_scores, panels_with_data, verdict
from agwm_jax.report.style import Look, headline, looks, save
from agwm_jax.report.table import summarize
from agwm_jax.report.write import ComparisonData

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Written = tuple[str, Path, Comparison | None]  # alternative text, file, what it belongs to (None: the whole report)


def write_figures(
    data: Sequence[ComparisonData], methods: Sequence[str], output: Path, *, baseline: str
) -> list[Written]:
    """Writes all figures that the runs have data for; overview and scores first.

    Args:
        data: what is drawn.
        methods: all methods in the order of legends.
        output: folder of the files.
        baseline: the method that the others are compared with.
    """
    look = looks(methods, baseline=baseline)
    main = max(data, key=lambda each: (bool(searched(each)), len(each.comparison.methods)))
    height = 4.2 if len(data) == 1 else 3.9 * math.ceil(len(data) / 2)
    path = save(output / "overview.png", 8.4, partial(_overview, data=main, look=look))
    written: list[Written] = [("overview", path, None)]
    path = save(output / "scores.png", height, partial(_scores, data=data, look=look))
    written.append(("scores of every method, seed by seed", path, None))
    for each in data:
        end = ".png" if len(data) == 1 else f"-{each.comparison.slug}.png"
        for name, text, height, draw in _own_figures(each, look):
            written.append((text, save(output / f"{name}{end}", height, draw), each.comparison))
    return written


def _own_figures(
    data: ComparisonData, look: Mapping[str, Look]
) -> Iterator[tuple[str, str, float, Callable[["Figure"], None]]]:
    """Name, alternative text, height and content of each figure of one comparison."""
    panels = panels_with_data(data.records)
    if panels:
        height = 4.2 if len(panels) == 1 else 0.4 + 3.5 * math.ceil(len(panels) / 2)
        yield "curves", "learning curves of both levels", height, partial(_curves, data=data, look=look)
    heated = [method for method in searched(data) if data.gates[method].layers]
    for method in heated:
        layers = max(len(means) for means in data.gates[method].layers.values())
        name = "heat" if len(heated) == 1 else f"heat-{_slug(method)}"
        height = 2.0 + (0.42 if layers <= 14 else 0.3) * layers
        yield name, f"mean of 1 - A per layer and module, {method}", height, partial(_heat, data=data, method=method)
    if data.gates:
        yield "histogram", "histogram of A", 3.8 + 0.26 * len(data.gates), partial(_histogram, data=data, look=look)


def searched(data: ComparisonData) -> list[str]:
    """The methods whose gate was trained on a loss of its own, the best last; those with any gate where none was."""
    found = [method for method in data.gates if data.searches(method)]
    means = {row.method: row.mean for row in summarize(data.comparison)}
    return sorted(found or data.gates, key=lambda method: means[method])


def _scores(figure: "Figure", data: Sequence[ComparisonData], look: Mapping[str, Look]) -> None:
    columns = min(2, len(data))
    for index, each in enumerate(data):
        axes = figure.add_subplot(math.ceil(len(data) / columns), columns, index + 1)
        draw_scores(axes, each.comparison, look)
        claim, size = verdict(each.comparison)
        axes.set_title(_wrap(f"{each.comparison.task}: {claim}", 78 // columns) + "\n" + _wrap(size, 78 // columns))
    headline(figure, "Scores: one point a seed, grey lines join a seed, bars are means")


def _curves(figure: "Figure", data: ComparisonData, look: Mapping[str, Look]) -> None:
    panels = panels_with_data(data.records)
    columns = min(2, len(panels))
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(math.ceil(len(panels) / columns), columns, index + 1)
        draw_curves(axes, panel, data.records, look)
    draw_legend(figure, {method: method for method in data.comparison.methods}, look, 4)
    several = any(len(runs) > 1 for runs in data.records.values())
    title = data.comparison.title + ": mean over runs, band ± one standard deviation" * several
    headline(figure, _wrap(title, 88), size=12.0)


def _heat(figure: "Figure", data: ComparisonData, method: str) -> None:
    axes = figure.add_subplot()
    draw_heat(axes, data.gates[method])
    axes.set_title(_wrap(f"{method}: {heat_verdict(data.gates[method])}", 80))
    label = f"{data.comparison.title}\n100 (1 - mean A): percent of the pretrained weight in the mixture"
    axes.set_xlabel(label, fontsize=10)


def _histogram(figure: "Figure", data: ComparisonData, look: Mapping[str, Look]) -> None:
    axes = figure.add_subplot()
    draw_histogram(axes, data.gates, look)
    best = searched(data)[-1]
    axes.set_title(_wrap(f"{best}: {histogram_verdict(data.gates[best])}", 80))
    draw_legend(figure, {method: histogram_label(method, each) for method, each in data.gates.items()}, look, 1)


def _overview(figure: "Figure", data: ComparisonData, look: Mapping[str, Look]) -> None:
    panels = [panel for panel in panels_with_data(data.records) if not panel.is_gate][:3]
    heat = [method for method in searched(data) if data.gates[method].layers][-1:]
    rows = figure.subfigures(1 + bool(panels), 1, height_ratios=[1.2, 1.0][: 1 + bool(panels)], squeeze=False)[:, 0]
    top = rows[0]
    left = top.add_subplot(1, 1 + len(heat), 1)
    draw_scores(left, data.comparison, look)
    width = 38 if heat else 78
    left.set_title("\n".join(_wrap(part, width) for part in verdict(data.comparison)))
    for method in heat:
        right = top.add_subplot(1, 2, 2)
        draw_heat(right, data.gates[method], most_labels=12)
        right.set_title(_wrap(f"{method}: {heat_verdict(data.gates[method])}", width))
        right.set_xlabel("percent of the pretrained weight in the mixture", fontsize=10)
    for bottom in rows[1:]:
        for index, panel in enumerate(panels):
            axes = bottom.add_subplot(1, len(panels), index + 1)
            draw_curves(axes, panel, data.records, look)
            title = axes.get_title(loc="left")
            # A third of the width: the first line names the phase, the others say what happens in it.
            axes.set_title(title.replace(": ", ":\n", 1) if len(panels) > 1 else title, fontsize=10.5)
        draw_legend(bottom, {method: method for method in data.comparison.methods}, look, 4)
    headline(figure, _wrap(data.comparison.title, 80))


def _wrap(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width))


def _slug(text: str) -> str:
    return "_".join("".join(c if c.isalnum() else " " for c in text).split())
