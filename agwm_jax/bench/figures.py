"""The table and the figures of experiments/hypergradients.py, from its rows alone."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from agwm_jax.report.style import INK, Look, headline, looks, save
from agwm_jax.report.table import markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]


def write_markdown(rows: Sequence[Row], path: Path) -> str:
    """Two tables: what each estimator costs and agrees with, and what each leads to."""
    points = [row for row in rows if row["part"] == "points"]
    anchors = sorted({row["anchor"] for row in points})
    compared = []
    for name in _names(rows, "cost"):
        cost = {r["quantity"]: r["value"] for r in rows if r["part"] == "cost" and r["estimator"] == name}
        own = [row for row in points if row["estimator"] == name]
        line = {"estimator": name, "fb": f"{cost['fb']:.1f}", "s": f"{cost['seconds']:.2f}"}
        line["GB"] = f"{cost['bytes'] / 1e9:.2f}"
        for quantity in ("cosine", "response cosine"):
            for anchor in anchors:
                line[f"{quantity}, anchor {anchor:g}"] = _median(own, quantity, anchor)
        for quantity, short in (("response to direct", "response / direct"), ("residual", "residual")):
            line[f"{short}, anchor {anchors[-1]:g}"] = _median(own, quantity, anchors[-1])
        compared.append(line)
    searched = []
    quantities = sorted({row["quantity"] for row in rows if row["part"] == "search"})
    for name in _names(rows, "search"):
        line = {"estimator": name}
        own = [row for row in rows if row["part"] == "search" and row["estimator"] == name]
        for quantity in quantities:
            found = [row for row in own if row["quantity"] == quantity]
            line[f"{quantity} (steps)"] = f"{_mean(r['value'] for r in found)} ({found[0]['step']})"
        searched.append(line)
    text = f"{markdown_table(compared)}\n{_reading(points, anchors)}\n{markdown_table(searched)}"
    path.write_text(text)
    return text


def _names(rows: Sequence[Row], part: str) -> list[str]:
    return list(dict.fromkeys(row["estimator"] for row in rows if row["part"] == part))


def _reading(points: Sequence[Row], anchors: Sequence[float]) -> str:
    reference = [row for row in points if row["estimator"] == "reference"]
    solved = max(row["value"] for row in reference if row["quantity"] == "damped_residual")
    left = ", ".join(f"{_median(reference, 'residual', anchor)} at anchor {anchor:g}" for anchor in anchors)
    ratio = ", ".join(f"{_median(reference, 'response to direct', anchor)} at anchor {anchor:g}" for anchor in anchors)
    return (
        "Medians over the points; GB: temporaries and new state. The reference: conjugate gradients on the damped "
        f"Gauss-Newton system of the same batch, solved to a residual of {solved:.1g} by its recursion; without "
        f"the damping its solution leaves a residual of {left}: that share of the outer gradient lies where the batch "
        "has little or no curvature, so that the damping decides the response there. The rows marked GN share the "
        f"matrix of the reference but for the damping. Its response is {ratio} times the direct term. At anchor 0 "
        "the exact answer at the inner optimum is zero: a cosine there is agreement, not accuracy.\n"
    )


def write_figures(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Error against cost, and cosines over the search."""
    names = [row["estimator"] for row in rows if row["part"] == "cost" and row["quantity"] == "fb"]
    height = 2.0 + 0.34 * len(names)
    return [
        save(folder / "frontier.png", 5.2, lambda figure: _frontier(figure, rows), width=13.0),
        save(folder / "cosine.png", height, lambda figure: _heat(figure, rows, names), width=13.0),
    ]


def _frontier(figure: "Figure", rows: Sequence[Row]) -> None:
    analytic = [row for row in rows if row["part"] == "analytic"]
    problems = list(dict.fromkeys(row["problem"] for row in analytic))
    names = list(dict.fromkeys(_family(row["estimator"]) for row in rows if row["part"] in ("analytic", "cost")))
    look = looks(names, baseline=names[0])
    panels = figure.subplots(1, len(problems) + 1)
    for axes, problem in zip(panels, problems, strict=False):
        curves = defaultdict(list)
        for row in analytic:
            if row["problem"] == problem:
                curves[row["estimator"]].append((row["fb"], max(row["value"], 1e-9)))
        for name, curve in curves.items():
            own = look[_family(name)]
            line = "none" if name == "penalty" else ":" if "differences" in name else "-"
            label = f"{name} (weights 1 to 1000)" if name == "penalty" else name
            axes.plot(*zip(*curve, strict=True), color=own.color, marker=own.marker, ls=line, ms=5, lw=1.4, label=label)
        axes.set(xscale="log", yscale="log", title=problem, xlabel="cost beyond the look-ahead (fb)")
    panels[0].set_ylabel("relative error to the exact hypergradient")
    panels[0].legend(fontsize=8, loc="lower left")
    _model_panel(panels[-1], rows, look)
    headline(figure, "What a hypergradient costs and how close it comes")


def _model_panel(axes: Any, rows: Sequence[Row], look: dict[str, Look]) -> None:
    points = [row for row in rows if row["part"] == "points"]
    anchor = max(row["anchor"] for row in points)
    placed = []
    for row in (row for row in rows if row["part"] == "cost" and row["quantity"] == "fb"):
        found = [r for r in points if r["estimator"] == row["estimator"] and r["anchor"] == anchor]
        cosines = [r["value"] for r in found if r["quantity"] == "response cosine"]
        if cosines:
            placed.append((float(np.median(cosines)), row["value"], row["estimator"], look[_family(row["estimator"])]))
    right, low = 1.15 * max(fb for _, fb, _, _ in placed), -np.inf
    for cosine, fb, name, own in sorted(placed, key=lambda each: each[:3]):
        low = max(cosine, low + 0.05)  # names stand in a column, none upon another
        axes.plot([fb, right], [cosine, low], color=own.color, lw=0.6)
        axes.plot(fb, cosine, color=own.color, marker=own.marker, ms=7)
        axes.annotate(name, (right, low), xytext=(3, -3), textcoords="offset points", fontsize=8, color=INK)
    axes.axhline(0, color=INK, lw=0.6)
    axes.set(title=f"real model, anchor {anchor:g}", xlabel="cost of an outer step (fb)", xlim=(0, 2.1 * right))
    axes.set_xticks([tick for tick in axes.get_xticks() if tick <= right])
    axes.set_ylabel("cosine of the response with the reference")


def _heat(figure: "Figure", rows: Sequence[Row], names: Sequence[str]) -> None:
    points = [row for row in rows if row["part"] == "points"]
    anchors, steps = (sorted({row[key] for row in points}) for key in ("anchor", "step"))
    cells = [(anchor, quantity) for anchor in anchors for quantity in ("cosine", "response cosine")]
    panels = figure.subplots(1, len(cells), sharey=True)
    for axes, (anchor, quantity) in zip(panels, cells, strict=True):
        value = {
            (row["estimator"], row["step"]): row["value"]
            for row in points
            if row["anchor"] == anchor and row["quantity"] == quantity
        }
        grid = np.array([[value.get((name, step), np.nan) for step in steps] for name in names])
        axes.imshow(grid, vmin=-1, vmax=1, cmap="RdBu", aspect="auto")
        for i, j in np.argwhere(np.isfinite(grid)):
            ink = "white" if abs(grid[i, j]) > 0.7 else INK
            axes.text(j, i, f"{grid[i, j]:.2f}", ha="center", va="center", fontsize=8.5, color=ink)
        what = "whole" if quantity == "cosine" else "response alone"
        axes.set(title=f"{what}, anchor {anchor:g}", xlabel="outer step of the search")
        axes.set_xticks(range(len(steps)), steps)
        axes.set_yticks(range(len(names)), names)
        axes.grid(False)
    headline(figure, "Cosine of each hypergradient with the reference (1, blue: same direction; -1, red: opposite)")


def _family(estimator: str) -> str:
    return estimator.partition(",")[0].partition(" ")[0]


def _median(rows: Iterable[Row], quantity: str, anchor: float) -> str:
    found = [row["value"] for row in rows if row["quantity"] == quantity and row["anchor"] == anchor]
    return f"{np.median(found):.2g}" if found else "-"


def _mean(values: Iterable[float]) -> str:
    found = list(values)
    spread = f" ± {np.std(found, ddof=1):.3f}" if len(found) > 1 else ""
    return f"{np.mean(found):.3f}{spread}"
