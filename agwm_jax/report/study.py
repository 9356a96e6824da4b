"""The report of a study: every arm against its control, at the point that its tuning seeds chose and at all others."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from agwm_jax.errors import AgwmError
from agwm_jax.report.statistics import bootstrap_t, detectable, holm, mean_and_std, sign_flip
from agwm_jax.report.style import headline, looks, save
from agwm_jax.report.table import markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Point = tuple[tuple[str, Any], ...]
"""Values of the grid's variables, by name."""
GRID = "grid"
"""Key of the table's metadata: names of the grid's variables, separated by spaces."""


class Cell(NamedTuple):
    """One arm at one point on one task."""

    task: str
    arm: str
    point: Point
    control: str
    """The arm that it is compared with; "" for none."""
    scores: dict[int, float]
    """By seed, in points; of the reported split."""
    development: float
    """Mean over the tuning seeds, or where there are none over all; NaN without a development split."""
    seconds: float
    """Mean over seeds, without compiling."""


class Compared(NamedTuple):
    """A cell against its control, paired by seed."""

    cell: Cell
    differences: np.ndarray

    @property
    def text(self) -> str:
        """``+0.4 [-0.2, +1.1]``; no interval of too few pairs."""
        if not len(self.differences):
            return "-"
        low, high = bootstrap_t(self.differences)
        interval = "" if math.isnan(low) else f" [{low:+.1f}, {high:+.1f}]"
        return f"{self.differences.mean():+.1f}{interval}"


def read_cells(path: Path) -> list[Cell]:
    """What `agwm sweep` left of a study.

    Raises:
        AgwmError: no such table.
    """
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise AgwmError(f"{path}: {error}; expected the results.parquet of `agwm sweep`") from None
    metadata = table.schema.metadata or {}
    if GRID.encode() not in metadata:
        raise AgwmError(f"{path} is no table of `agwm sweep`: it does not say what its grid is")
    grid = metadata[GRID.encode()].decode().split()
    found: dict[tuple[str, str, Point], list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        point = tuple((name, row[name]) for name in grid)
        found.setdefault((row["task"], row["arm"], point), []).append(row)
    return [_cell(*key, rows) for key, rows in found.items()]


def _cell(task: str, arm: str, point: Point, rows: Sequence[dict[str, Any]]) -> Cell:
    reported = [row for row in rows if not row["tuning"]]
    choosing = [row.get("development") for row in rows if row["tuning"]] or [row.get("development") for row in rows]
    known = [score for score in choosing if score is not None]
    scores = {row["seed"]: row[row["reported"]] for row in reported}
    seconds = [row["seconds"] - row["compile_seconds"] for row in rows]
    development = float(np.mean(known)) if known else math.nan
    return Cell(task, arm, point, rows[0]["control"] or "", scores, development, float(np.mean(seconds)))


def chosen(cells: Sequence[Cell]) -> dict[tuple[str, str], Cell]:
    """By task and arm the cell with the best development score; of equals the first."""
    best: dict[tuple[str, str], Cell] = {}
    for cell in cells:
        key = cell.task, cell.arm
        if key not in best or cell.development > best[key].development:
            best[key] = cell
    return best


def against(cell: Cell, control: Cell | None) -> Compared:
    """Differences over the seeds that both have, in the order of seeds."""
    common = sorted(set(cell.scores) & set(control.scores)) if control is not None else []
    own = control.scores if control is not None else {}
    return Compared(cell, np.array([cell.scores[seed] - own[seed] for seed in common]))


def write_study_report(path: Path, output: Path) -> str:
    """Writes study.md and study.png; the text.

    Raises:
        AgwmError: see `read_cells`; an output that cannot be written.
    """
    cells = read_cells(path)
    text = markdown(cells)
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "study.md").write_text(text, encoding="utf-8")
    except OSError as error:
        raise AgwmError(f"the report cannot be written to {output} ({error.strerror}): choose another folder") from None
    write_figure(cells, output / "study.png")
    return text


def markdown(cells: Sequence[Cell]) -> str:
    """Both tables of every task, and what they say."""
    best = chosen(cells)
    parts = []
    for task in dict.fromkeys(cell.task for cell in cells):
        own = [cell for (of, _), cell in best.items() if of == task]
        parts += [f"## {task}\n", "At the point that the development scores chose:\n", _chosen_table(own)]
        points = list(dict.fromkeys(cell.point for cell in cells if cell.task == task))
        if len(points) > 1:
            parts += ["At every point, and the difference to the control at the same point:\n"]
            parts += [_points_table([cell for cell in cells if cell.task == task], points)]
    return "\n".join([*parts, _SENTENCE])


def _chosen_table(cells: Sequence[Cell]) -> str:
    arms = {cell.arm: cell for cell in cells}
    compared = {arm: against(cell, arms.get(cell.control)) for arm, cell in arms.items()}
    tested = {arm: sign_flip(each.differences) for arm, each in compared.items() if len(each.differences) > 1}
    corrected = holm(tested)
    rows = []
    for arm, cell in arms.items():
        differences = compared[arm].differences
        row = {"arm": f"`{arm}`", "point": _words(cell.point), "score": mean_and_std([*cell.scores.values()])}
        row |= {"n": str(len(cell.scores)), "s a seed": f"{cell.seconds:.1f}"}
        if cell.control:
            row |= {"control": f"`{cell.control}`", "difference": compared[arm].text}
        if arm in corrected:
            seen = detectable(float(np.std(differences, ddof=1)), len(differences))
            row |= {"p (Holm)": f"{corrected[arm]:.3f}", "could be seen": f"{seen:.1f}"}
        rows.append({name: cell for name, cell in row.items() if cell})
    return markdown_table(rows)


def _points_table(cells: Sequence[Cell], points: Sequence[Point]) -> str:
    by = {(cell.arm, cell.point): cell for cell in cells}
    rows = []
    for arm in dict.fromkeys(cell.arm for cell in cells):
        row = {"arm": f"`{arm}`"}
        for point in points:
            cell = by.get((arm, point))
            if cell is not None and cell.scores:
                compared = against(cell, by.get((cell.control, point)))
                difference = f" ({compared.differences.mean():+.1f})" if len(compared.differences) else ""
                row[_words(point)] = f"{np.mean([*cell.scores.values()]):.1f}{difference}"
        rows.append(row)
    return markdown_table(rows)


def _words(point: Point) -> str:
    return ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in point)


_SENTENCE = (
    "Scores are in points, mean and standard deviation over the n reported seeds. A difference is paired by seed; the "
    "brackets hold its 95 % bootstrap-t interval. p is of the exact sign-flip test over the pairs, corrected by Holm "
    "for all rows of its table. *Could be seen*: the difference that a paired t-test would find with a power of 80 %, "
    "from the spread of these pairs. Seconds are without compiling, the share of one seed where several go at once.\n"
)


def write_figure(cells: Sequence[Cell], path: Path) -> Path:
    """Mean and range of every arm at every point, a panel a task."""
    arms = list(dict.fromkeys(cell.arm for cell in cells))
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    look = looks(arms, baseline=arms[0])

    def draw(figure: "Figure") -> None:
        headline(figure, "Score by arm (mean and range over seeds)")
        for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
            points = list(dict.fromkeys(cell.point for cell in cells if cell.task == task))
            for number, arm in enumerate(arms):
                own = [cell for cell in cells if (cell.task, cell.arm) == (task, arm) and cell.scores]
                # Side by side, so that ranges do not hide each other.
                x = [points.index(cell.point) + 0.6 * (number / max(1, len(arms) - 1) - 0.5) for cell in own]
                means = [float(np.mean([*cell.scores.values()])) for cell in own]
                low = [mean - min(cell.scores.values()) for mean, cell in zip(means, own, strict=True)]
                high = [max(cell.scores.values()) - mean for mean, cell in zip(means, own, strict=True)]
                color, marker = look[arm]
                axes.errorbar(
                    x, means, yerr=[low, high], color=color, marker=marker, linestyle="", elinewidth=0.8, label=arm
                )
            axes.set_xticks(range(len(points)), [_words(point) or "-" for point in points])
            axes.set_title(task)
            axes.set_ylabel("score, points")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)

    return save(path, 4.8, draw, width=max(6.0, 4.5 * len(tasks)))
