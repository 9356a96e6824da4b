"""Whether a learnt gate mattered: how far it moved, and what the validation parts lose without it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from agwm_jax.report.gates import Gates

PHASE = "leverage"
"""Its name in the records; it reads, and trains nothing."""
MOVED = 0.01  # a mean change of A below it is that of its random start
MATTERS = 0.01  # share of the loss, below which a difference is called none


class Leverage(NamedTuple):
    """Means over the seeds of a method."""

    travelled: float
    """Mean distance of A from where it started."""
    at_a_bound: float
    """Share of the entries of A at 0 or at 1, to 0.001."""
    agreement: float
    """Mean correlation of A between splits; NaN for one split."""
    learnt: float
    """Loss on the examples that alpha was fitted on, with the learnt gate; NaN for a run without a search."""
    opened: float
    """The same with A = 1."""
    number: float
    """The same with the best single number."""
    best: float
    """That number."""


def leverage(gates: Gates, start: float, records: Sequence[Sequence[Mapping[str, Any]]]) -> Leverage:
    """Of the runs of one method.

    Args:
        gates: of `mean_gates`.
        start: where A started.
        records: metrics of every run.
    """
    last = [own[-1] for run in records if (own := [record for record in run if record["phase"] == PHASE])]
    splits = any(str(record["phase"]) == "search-1" for run in records for record in run)
    centres = (np.arange(len(gates.counts)) + 0.5) / len(gates.counts)
    travelled = float(np.average(abs(centres - start), weights=gates.counts))
    return Leverage(
        travelled,
        gates.share(0.0, 0.001) + gates.share(0.999, 1.0),
        _mean(last, "alpha_agreement") if splits else math.nan,
        _mean(last, "validation_loss"),
        _mean(last, "open_loss"),
        _mean(last, "number_loss"),
        _mean(last, "best_number"),
    )


def _mean(records: Sequence[Mapping[str, Any]], key: str) -> float:
    values = [float(record[key]) for record in records if record.get(key) is not None]
    return float(np.mean(values)) if values else math.nan


def verdict(found: Leverage) -> str:
    """In words, whether the gate mattered."""
    moved = f"A moved by {found.travelled:.3f} in the mean"
    if math.isnan(found.learnt):
        return f"The gate was not fitted on examples of its own: {moved}."
    lower = (found.opened - found.learnt) / abs(found.opened)
    lower_than_number = (found.number - found.learnt) / abs(found.number)
    losses = f"the validation parts lose {found.learnt:.4f} with it and {found.opened:.4f} with A = 1"
    if lower < MATTERS:
        room = f"; A = {found.best:g} everywhere would give {found.number:.4f}" if lower_than_number <= -MATTERS else ""
        return f"The gate did not matter here: {moved}, and {losses}{room}."
    if lower_than_number < MATTERS:
        return (
            f"One number would have done: {moved}, and {losses}, but A = {found.best:g} everywhere gives "
            f"{found.number:.4f}."
        )
    return f"The gate did matter on the examples that it was fitted on: {moved}, and {losses}."


def row(method: str, found: Leverage) -> dict[str, str]:
    """One line of the table."""

    def shown(value: float, digits: int = 4) -> str:
        return "-" if math.isnan(value) else f"{value:.{digits}f}"

    return {
        "method": method,
        "mean change of A": shown(found.travelled, 3),
        "A at 0 or 1": f"{100 * found.at_a_bound:.1f} %",
        "agreement of splits": shown(found.agreement, 2),
        "loss, learnt gate": shown(found.learnt),
        "loss, A = 1": shown(found.opened),
        "loss, best number (A)": "-" if math.isnan(found.number) else f"{found.number:.4f} ({found.best:g})",
    }
