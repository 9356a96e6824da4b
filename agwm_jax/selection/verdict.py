"""What cross-validated predictions say: scores with intervals, which method to take, and how far to believe it."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Num
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from agwm_jax import metrics

RESAMPLES = 1000
_BINS = 10
_MIN_ANSWERED = 20
_Z = 1.96 + 0.84
"""A difference of so many standard errors is found by a two-sided 5 % test with a power of 80 %."""


class Trial(NamedTuple):
    """A method at one learning rate: what it says of the texts that each fold held out."""

    factor: float
    logits: tuple[Float[np.ndarray, "_ c"], ...]
    """By fold; of a regression the scores."""
    scores: tuple[float, ...]
    """By fold, of the main metric."""
    seconds: float
    """Of a training, without compiling; a mean over the folds."""


class Scored(NamedTuple):
    """A method with the learning rate that was chosen for it."""

    method: str
    factor: float
    """Of the default rates, the best one over all folds: that of the final model."""
    logits: Float[np.ndarray, "n c"]
    """Of every held-out text, each from the rate that the other folds chose."""
    scores: dict[str, float]
    """By metric, over all held-out texts together."""
    resampled: Float[np.ndarray, "r"]
    """The main metric of texts drawn with replacement, the same texts for all methods."""
    by_fold: tuple[float, ...]
    seconds: float
    trials: int

    @property
    def interval(self) -> tuple[float, float]:
        """Of the main metric, 95 %."""
        low, high = np.quantile(self.resampled, [0.025, 0.975])
        return float(low), float(high)


class Difference(NamedTuple):
    """Of the main metric of two methods on the same texts: first less second."""

    mean: float
    error: float
    """Standard error by resampling texts."""
    low: float
    high: float

    @property
    def told_apart(self) -> bool:
        """Whether the 95 % interval leaves out zero."""
        return self.low > 0 or self.high < 0


def score(method: str, trials: Sequence[Trial], labels: Sequence[np.ndarray], names: Sequence[str]) -> Scored:
    """One method over all folds.

    The rate of a fold is the one with the best mean over the *other* folds: no fold's own score chooses its rate.

    Args:
        method: its name.
        trials: one a rate, in the order of trial; of equal ones the first is taken.
        labels: by fold, of the held-out texts.
        names: of the metrics, the main one first.
    """
    table = np.array([trial.scores for trial in trials])
    others = (table.sum(1, keepdims=True) - table) / max(1, table.shape[1] - 1) if table.shape[1] > 1 else table
    chosen = others.argmax(0)
    logits = np.concatenate([trials[at].logits[fold] for fold, at in enumerate(chosen)])
    truth = np.concatenate(labels)
    rng = np.random.default_rng(0)
    draws = (rng.integers(len(truth), size=len(truth)) for _ in range(RESAMPLES))
    resampled = np.array([metrics.compute(names[:1], logits[rows], truth[rows])[names[0]] for rows in draws])
    best = trials[int(table.mean(1).argmax())]
    by_fold = tuple(float(table[at, fold]) for fold, at in enumerate(chosen))
    found = metrics.compute(names, logits, truth)
    return Scored(method, best.factor, logits, found, resampled, by_fold, best.seconds, len(trials))


def difference(first: Scored, second: Scored, metric: str) -> Difference:
    """First less second, on the same texts."""
    drawn = first.resampled - second.resampled
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Difference(
        first.scores[metric] - second.scores[metric], float(np.std(drawn, ddof=1)), float(low), float(high)
    )


def recommend(found: Sequence[Scored], metric: str) -> Scored:
    """The quickest method that is within one standard error of the best (Breiman et al. 1984, the 1-SE rule)."""
    best = max(found, key=lambda each: each.scores[metric])
    for each in sorted(found, key=lambda each: each.seconds):
        gap = difference(best, each, metric)
        if gap.mean <= gap.error:
            return each
    return best


def at_the_edge(chosen: Scored, factors: Sequence[float]) -> list[str]:
    """A sentence where the chosen rate is the largest or the smallest of all, so that the best may lie beyond."""
    ends = {max(factors): ("largest", "larger"), min(factors): ("smallest", "smaller")}
    if chosen.trials < len(factors) or len(ends) < 2 or chosen.factor not in ends:
        return []
    which, way = ends[chosen.factor]
    return [
        f"The best learning rate of {chosen.method} is the {which} that was tried ({chosen.factor:.3g} times the "
        f"default): a {way} one may be better still."
    ]


def texts_needed(gap: Difference, n: int, *, size: float = 0.01) -> int:
    """Held-out texts with which a difference of `size` is found four times in five; `gap` was measured on n."""
    return math.ceil(n * (_Z * gap.error / size) ** 2)


def sentences(found: Sequence[Scored], chosen: Scored, metric: str, *, guessing: float | None = None) -> list[str]:
    """The recommendation and what can be said of every other method beside it, in points of the metric.

    Args:
        found: all methods.
        chosen: the recommended one.
        metric: the main one.
        guessing: its value for always the commonest class; None where that means nothing.
    """
    n = len(chosen.logits)
    best = max(found, key=lambda each: each.scores[metric])
    low, high = chosen.interval
    said = (
        f"Take {chosen.method}: {metric} {100 * chosen.scores[metric]:.1f} ({100 * low:.1f} to {100 * high:.1f}) on "
        f"{n} held-out texts, {chosen.seconds:.0f} s a training."
    )
    if best is not chosen:
        gap = difference(best, chosen, metric)
        said += (
            f" {best.method} scored {100 * gap.mean:.1f} points more, which is within one standard error "
            f"({100 * gap.error:.1f}), and takes {best.seconds:.0f} s."
        )
    lines = [said]
    if guessing is not None and low <= guessing:
        lines.append(
            f"That is not surely better than always guessing the commonest class ({100 * guessing:.1f}): more texts, "
            "or a larger encoder, are needed before anything is built on it."
        )
    for each in found:
        if each is chosen:
            continue
        gap = difference(each, chosen, metric)
        figures = f"{100 * gap.mean:+.1f} points, {100 * gap.low:+.1f} to {100 * gap.high:+.1f}"
        if gap.told_apart:
            word = "better" if gap.mean > 0 else "worse"
            lines.append(f"{each.method} is {word} than {chosen.method} on such texts ({figures}).")
            continue
        needed = texts_needed(gap, n) - n
        more = (
            f"about {_round(needed)} more held-out texts would be needed to see a difference of 1 point"
            if needed > 0
            else "a difference of 1 point would have been seen"
        )
        lines.append(f"{each.method} and {chosen.method} cannot be told apart with {n} texts ({figures}); {more}.")
    return lines


def _round(count: int) -> str:
    digits = max(0, len(str(count)) - 2)
    return f"{round(count, -digits):,}"


class Calibration(NamedTuple):
    """How far the probabilities of held-out texts can be taken at their word."""

    temperature: float
    """That logits are divided by."""
    error_before: float
    """Expected calibration error: mean distance between confidence and accuracy over ten bins (Guo et al. 2017)."""
    error_after: float
    bins: list[tuple[float, float, int]]
    """Mean confidence, accuracy and number of texts, with the temperature; bins without texts are left out."""
    thresholds: list[tuple[float, float, float]]
    """Precision asked for, least confidence that gives it, and the share of texts that are then answered."""


def calibrate(logits: Float[np.ndarray, "n c"], labels: Int[np.ndarray, "n"]) -> Calibration:
    """The temperature that minimises the log-loss (Guo et al. 2017, arXiv 1706.04599), and what it changes."""
    logits = logits.astype(np.float64)

    def loss(log_temperature: float) -> float:
        return -float(np.mean(log_softmax(logits / math.exp(log_temperature), axis=1)[np.arange(len(labels)), labels]))

    temperature = math.exp(minimize_scalar(loss, bounds=(math.log(0.05), math.log(20.0)), method="bounded").x)
    before, _ = _reliability(softmax(logits, axis=1), labels)
    probabilities = softmax(logits / temperature, axis=1)
    after, bins = _reliability(probabilities, labels)
    thresholds = [
        (wanted, *found) for wanted in (0.9, 0.95, 0.99) if (found := _threshold(probabilities, labels, wanted))
    ]
    return Calibration(temperature, before, after, bins, thresholds)


def _reliability(
    probabilities: Float[np.ndarray, "n c"], labels: Int[np.ndarray, "n"]
) -> tuple[float, list[tuple[float, float, int]]]:
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    where = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    bins = [
        (float(confidence[where == bin].mean()), float(right[where == bin].mean()), int((where == bin).sum()))
        for bin in range(_BINS)
        if (where == bin).any()
    ]
    return sum(abs(sure - true) * count for sure, true, count in bins) / len(labels), bins


def _threshold(
    probabilities: Float[np.ndarray, "n c"], labels: Num[np.ndarray, "n"], wanted: float
) -> tuple[float, float] | None:
    """Least confidence from which on the share of right answers is as wanted, with the share of texts there."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    order = np.argsort(-confidence, kind="stable")
    precision = np.cumsum(right[order]) / np.arange(1, len(order) + 1)
    # Of a few texts the share of right answers says little, and the longest lucky run would be taken.
    enough = np.flatnonzero((precision >= wanted) & (np.arange(1, len(order) + 1) >= _MIN_ANSWERED))
    if not enough.size:
        return None
    return float(confidence[order][enough[-1]]), float((enough[-1] + 1) / len(order))


def confusion(logits: Float[np.ndarray, "n c"], labels: Int[np.ndarray, "n"]) -> Int[np.ndarray, "c c"]:
    """Texts by true class (rows) and predicted class (columns)."""
    size = logits.shape[1]
    return np.bincount(labels * size + logits.argmax(1), minlength=size * size).reshape(size, size)


def per_class(table: Int[np.ndarray, "c c"]) -> list[tuple[float, float, int]]:
    """Precision, recall and number of texts of every class, of `confusion`; NaN where a class was never predicted."""
    with np.errstate(invalid="ignore", divide="ignore"):
        precision, recall = np.diag(table) / table.sum(0), np.diag(table) / table.sum(1)
    return [(float(p), float(r), int(n)) for p, r, n in zip(precision, recall, table.sum(1), strict=True)]
