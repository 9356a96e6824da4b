"""Figures of alpha: the heat map of mean A per layer and module, and the histogram of A."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from agwm_jax.report.gates import BINS, Gates
from agwm_jax.report.style import INK, Look, note

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHORT = {"attention_output": "attention\noutput", "intermediate": "inter-\nmediate"}


def heat_verdict(gates: Gates) -> str:
    """Where the share of the pretrained weight is largest, in one line."""
    cells = [(float(mean), layer, name) for name, means in gates.layers.items() for layer, mean in enumerate(means)]
    least, layer, name = min(cells)
    return f"pretrained share is largest in layer {layer}, {name.replace('_', ' ')}: {percent(1 - least)}"


def draw_heat(axes: "Axes", gates: Gates, *, most_labels: int = 40) -> None:
    """100 (1 - mean A) per layer (rows, the first at the top) and module (columns); the pooler is a cell below.

    A itself lies close to 1 nearly everywhere; its complement, the share of the pretrained weight, starts near 0 and
    makes the differences visible. A table of more than `most_labels` layers has colours only.
    """
    from matplotlib.patches import Rectangle

    names = list(gates.layers)
    table = 100 * (1 - np.array([gates.layers[name] for name in names]).T)  # [l, modules]
    singles = {name: 100 * (1 - mean) for name, mean in gates.single.items()}
    top = max([float(table.max()), *singles.values(), 1e-6])
    bottom, labelled = len(table), len(table) <= most_labels
    mesh = axes.imshow(table, cmap="YlGnBu", vmin=0.0, vmax=top, aspect="auto")
    digits = 1 if top >= 20 else 2 if top >= 0.2 else 3
    size = 11.0 if bottom <= 8 else 9.5 if bottom <= 14 else 8.0

    def write(column: float, row: float, value: float) -> None:
        color = "white" if value > 0.55 * top else INK
        axes.text(column, row, f"{value:.{digits}f}", color=color, ha="center", va="center", fontsize=size)

    for column, value in enumerate(singles.values()):
        axes.add_patch(
            Rectangle((column - 0.5, bottom), 1, 1, facecolor=mesh.to_rgba(np.array(value)), edgecolor="none")
        )
    if labelled:
        for (row, column), value in np.ndenumerate(table):
            write(float(column), float(row), float(value))
        for column, value in enumerate(singles.values()):
            write(float(column), bottom + 0.5, value)
    else:
        axes.figure.colorbar(mesh, ax=axes, shrink=0.9)
    ticks = [float(layer) for layer in range(0, bottom, 1 if labelled else 1 + bottom // 8)]
    labels = [f"{tick:.0f}" for tick in ticks]
    if singles:
        axes.set_ylim(bottom + 1, -0.5)
        ticks, labels = [*ticks, bottom + 0.5], [*labels, ", ".join(singles)]
    axes.set_yticks(ticks, labels)
    # Above the table: below it the pooler's cell would seem to belong to the first column.
    axes.xaxis.tick_top()
    axes.set_xticks(range(len(names)), [_SHORT.get(name, name.replace("_", "\n")) for name in names], fontsize=10)
    axes.set_ylabel("encoder layer")
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)


def draw_histogram(axes: "Axes", gates: Mapping[str, Gates], looks: Mapping[str, Look]) -> None:
    """Number of entries of A (log scale) over [0, 1] for each method, with the thresholds of a collapse."""
    edges = np.linspace(0.0, 1.0, 101)
    for method, each in gates.items():
        counts = each.counts.reshape(100, BINS // 100).sum(axis=1)
        axes.stairs(counts, edges, color=looks[method].color, linewidth=2.0, zorder=3)
        if len(gates) <= 2:
            axes.stairs(counts, edges, color=looks[method].color, fill=True, alpha=0.15, zorder=2)
    axes.set_yscale("log")
    axes.set_ylim(0.5, 60 * max(float(each.counts.reshape(100, -1).sum(axis=1).max()) for each in gates.values()))
    axes.set_xlim(-0.01, 1.01)
    axes.axvspan(0.0, 0.05, color="#D55E00", alpha=0.12, linewidth=0, zorder=0)
    for threshold in (0.05, 0.95):
        axes.axvline(threshold, color="#D55E00", linestyle="--", linewidth=1.4, zorder=4)
    note(axes, "below 0.05: nearly the\npretrained weight alone", 0.075, 0.97, va="top")
    note(
        axes,
        "above 0.95: nearly plain\nfine-tuning; a search\nstarts here by default",
        0.925,
        0.97,
        va="top",
        ha="right",
    )
    lowest = min(int(np.flatnonzero(each.counts)[0]) for each in gates.values()) / BINS
    if lowest > 0.8:
        _draw_zoom(axes.inset_axes((0.1, 0.14, 0.68, 0.56)), gates, looks, lowest)
    axes.set_xlabel("A: share of the task weight in the mixture")
    axes.set_ylabel("entries of A, all seeds (log)")


def _draw_zoom(axes: "Axes", gates: Mapping[str, Gates], looks: Mapping[str, Look], lowest: float) -> None:
    """The top of the range in finer bins: after a short search all of A is there and the rest of the panel is empty."""
    edges = np.linspace(0.0, 1.0, BINS + 1)
    for method, each in gates.items():
        axes.stairs(each.counts, edges, color=looks[method].color, linewidth=1.6)
    axes.set_yscale("log")
    axes.set_ylim(0.5, None)
    axes.set_xlim(lowest - 0.01, 1.001)
    axes.axvline(0.95, color="#D55E00", linestyle="--", linewidth=1.2)
    axes.set_title(
        f"the same from {lowest:.2f} to 1, in steps of {1 / BINS:g}", fontsize=9.5, fontweight="normal", pad=3
    )
    axes.tick_params(labelsize=9)


def histogram_verdict(gates: Gates) -> str:
    """How far alpha has moved from its start above 0.95, in one line."""
    low, high = gates.share(0.0, 0.05), gates.share(0.95, 1.0)
    if low > 0.9:
        return f"alpha has collapsed: {percent(low)} of A lies below 0.05"
    if high > 0.99:
        return f"alpha hardly moved: {percent(high)} of A lies above 0.95"
    return f"the search moved {percent(1 - high)} of A below 0.95"


def histogram_label(method: str, gates: Gates) -> str:
    """The figures behind the histogram of one method."""
    low, high = gates.share(0.0, 0.05), gates.share(0.95, 1.0)
    return f"{method}: {percent(low)} below 0.05, {percent(high)} above 0.95, mean {gates.mean:.3f}"


def percent(share: float) -> str:
    """ "13.5 %": three digits, but none that the float does not have near 0 and 100."""
    value = 100 * share
    if 99.95 <= value < 100:
        return "> 99.9 %"
    return f"{value:.3g} %" if value >= 0.01 else "0 %" if value <= 0 else "< 0.01 %"
