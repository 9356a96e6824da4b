"""The failure signatures of a bi-level search: how each shows in the metrics, what it means and what to change."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from agwm_jax.methods.warning import MethodWarning

# A finished phase must have this many steps before its first and last quarter are compared: with fewer, a quarter is
# one or two batches and the comparison is noise.
MIN_STEPS = 12


def search_warnings(
    records: Sequence[Mapping[str, Any]],
    *,
    collapsed_share: float = 0.9,
    unmoved_share: float = 0.99,
    unmoved_change: float = 1e-3,
    vanished_norm: float = 1e-8,
    diverged_share: float = 0.1,
) -> list[MethodWarning]:
    """Failure signatures in the metrics of one run, while it runs or after.

    Works on what is there: a signature whose keys are absent is not looked for, and what needs a whole search (alpha
    unmoved, loss not falling) waits for the last step of its phase.

    Args:
        records: lines of metrics.jsonl in the order they were written; phases other than "search..." are ignored.
        collapsed_share: alpha has collapsed when this share of A lies below 0.05.
        unmoved_share: alpha can count as unmoved when this share of A lies above 0.95.
        unmoved_change: and when mean and standard deviation of A changed by less than this over the search.
        vanished_norm: a hypergradient norm below this counts as zero.
        diverged_share: the solve of an implicit estimator has diverged when its residual is above 1, that of no
            solution at all, at more than this share of the steps, and at three of them.

    Returns:
        at most one warning a name: alpha_collapsed, alpha_unmoved, validation_loss_not_falling,
        hypergradient_vanished, hypergradient_not_finite, linear_solve_diverged; empty for a run without a search.
    """
    phases = _phases(records)
    found = {
        "hypergradient_not_finite": [_not_finite(phase) for phase in phases.values()],
        "linear_solve_diverged": [_solve_diverged(phase, diverged_share) for phase in phases.values()],
        "hypergradient_vanished": [_vanished(phase, vanished_norm) for phase in phases.values()],
        "alpha_collapsed": [_collapsed(phase, collapsed_share) for phase in phases.values()],
        "alpha_unmoved": [_unmoved(phase, unmoved_share, unmoved_change) for phase in phases.values()],
        "validation_loss_not_falling": [_not_falling(phase) for phase in phases.values()],
    }
    warnings = []
    for name, details in found.items():
        hit = [(phase, detail) for phase, detail in zip(phases, details, strict=True) if detail]
        if hit:
            where = ", ".join(phase for phase, _ in hit)
            warnings.append(MethodWarning(name, f"{where}: {hit[0][1]} {_REMEDIES[name]}"))
    return warnings


_REMEDIES = {
    "alpha_collapsed": "The model is little more than the pretrained one: lower method.search.outer.learning_rate or "
    "method.search.epochs.",
    "alpha_unmoved": "What follows is plain fine-tuning: raise method.search.outer.learning_rate or "
    "method.search.epochs, and check that the hypergradient is not zero.",
    "validation_loss_not_falling": "The search does not learn what the validation split asks for: change "
    "method.search.inner.learning_rate, raise method.search.epochs, or raise method.search.validation_fraction.",
    "hypergradient_vanished": "Alpha gets no signal: where method.search.anchor is 0 the exact hypergradient is zero, "
    "so set it above 0 (0.1 is a start) or use a truncated estimator.",
    "linear_solve_diverged": "Lower method.estimator.solver.step_size (or set it to auto), raise "
    "method.estimator.solver.damping or rho, take method.estimator.curvature gauss_newton, or set method.search.anchor "
    "above 0.",
    "hypergradient_not_finite": "The linear solve or the loss has diverged: lower "
    "method.estimator.solver.step_size, or method.search.inner.learning_rate.",
}


def _phases(records: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    phases: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        phase = str(record.get("phase", ""))
        if phase.startswith("search"):
            phases.setdefault(phase, []).append(record)
    return phases


def _values(phase: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    # JSON has no NaN, so a writer may have put null: it counts as "not finite", not as "not recorded".
    return np.array([math.nan if record[key] is None else float(record[key]) for record in phase if key in record])


def _complete(phase: Sequence[Mapping[str, Any]]) -> bool:
    steps = phase[-1].get("num_steps")
    # >= num_steps - 1 holds for the last step whether steps are counted from 0 or from 1.
    return len(phase) >= MIN_STEPS and (steps is None or int(phase[-1].get("step", 0)) >= int(steps) - 1)


def _not_finite(phase: Sequence[Mapping[str, Any]]) -> str:
    for key, words in (("hypergradient_norm", "the hypergradient"), ("outer_loss", "the validation-split loss")):
        bad = [record for record in phase if key in record and not np.all(np.isfinite(_values([record], key)))]
        if bad:
            return (
                f"{words} is not finite at {len(bad)} of {len(phase)} steps, first at step {bad[0].get('step', '?')}."
            )
    return ""


def _vanished(phase: Sequence[Mapping[str, Any]], tiny: float) -> str:
    norms = _finite(_values(phase, "hypergradient_norm"))
    # The first is exactly zero: there W is still W0, and whatever alpha is, their mixture is the same.
    share = float(np.mean(norms < tiny)) if len(norms) >= MIN_STEPS else 0.0
    return f"the hypergradient norm is below {tiny:g} at {share:.0%} of the steps." if share > 0.5 else ""


def _solve_diverged(phase: Sequence[Mapping[str, Any]], limit: float) -> str:
    residuals = _values(phase, "residual")
    diverged = int(np.sum(~(residuals <= 1)))  # not finite counts too
    if diverged < 3 or diverged <= limit * len(residuals):
        return ""
    largest = np.max(_finite(residuals), initial=0.0)
    return (
        f"the linear solve of the hypergradient is worse than none: its residual is above 1 at {diverged} of "
        f"{len(residuals)} steps (largest finite one {largest:.3g}). It diverges, or was carried over from batches "
        "that differ too much."
    )


def _collapsed(phase: Sequence[Mapping[str, Any]], limit: float) -> str:
    below, above = _finite(_values(phase, "alpha_below")), _finite(_values(phase, "alpha_above"))
    if not len(below) or below[-1] < limit:
        return ""
    rest = f" and {above[-1]:.1%} above 0.95" if len(above) else ""
    return f"alpha has collapsed: {below[-1]:.1%} of A lies below 0.05{rest}."


def _unmoved(phase: Sequence[Mapping[str, Any]], share: float, tolerance: float) -> str:
    above, mean, spread = (_finite(_values(phase, key)) for key in ("alpha_above", "alpha_mean", "alpha_std"))
    if not _complete(phase) or not len(above) or len(mean) < 2 or above[-1] < share:
        return ""
    change = max(abs(float(series[-1] - series[0])) if len(series) else 0.0 for series in (mean, spread))
    if change >= tolerance:
        return ""
    return f"alpha is where it started: {above[-1]:.1%} of A lies above 0.95 and its mean changed by {change:.1e}."


def _not_falling(phase: Sequence[Mapping[str, Any]]) -> str:
    losses = _values(phase, "outer_loss")
    if not _complete(phase) or len(losses) < MIN_STEPS or not np.all(np.isfinite(losses)):
        return ""
    quarter = len(losses) // 4
    first, last = float(np.mean(losses[:quarter])), float(np.mean(losses[-quarter:]))
    if last < first:
        return ""
    return f"the validation-split loss does not fall: {first:.4f} over the first quarter of the steps, then {last:.4f}."


def _finite(values: Any) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    return array[np.isfinite(array)]
