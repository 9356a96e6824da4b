"""Problems whose hypergradient is known, and the error of every estimator on them against its cost."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from agwm_jax.core.bilevel import hypergradient
from agwm_jax.core.estimators.base import Estimator
from agwm_jax.core.inner import InnerState, inner_steps
from agwm_jax.core.mixup import mixup_problem
from agwm_jax.core.partition import partition
from agwm_jax.core.types import Problem

Curve = tuple[str, int, float, list[Estimator]]
"""``(name, terms, cost in fb beyond the look-ahead, estimators)``; of several the median error is taken."""

INNER_STEPS = 100  # that solve the inner problem


class Analytic(NamedTuple):
    """A bi-level problem with where it is solved and how."""

    problem: Problem
    start: Any
    outer: Any
    step_size: float
    """Of gradient descent on the inner problem: 1 / (largest eigenvalue)."""
    rank: int
    """Number of inner entries, the largest rank of a sketch."""


def logistic_regression() -> Analytic:
    """L2 strength of each of 20 features (its logarithm) by the loss of a validation set; 500 examples either side."""
    n, d = 500, 20
    rng = np.random.default_rng(0)
    truth = rng.normal(size=d) * (rng.random(d) < 0.5)
    x, x_val = rng.normal(size=(2, n, d))
    y, y_val = (np.sign(features @ truth + rng.normal(size=n)) for features in (x, x_val))

    def inner_loss(w, log_l2, _):
        return jnp.mean(jax.nn.softplus(-y * (x @ w))) + 0.5 * jnp.sum(jnp.exp(log_l2) * w**2)

    def outer_loss(w, log_l2, _):
        return jnp.mean(jax.nn.softplus(-y_val * (x_val @ w)))

    outer = np.full(d, np.log(0.02)) + 0.5 * rng.normal(size=d)
    largest = np.linalg.eigvalsh(x.T @ x / (4 * n)).max() + np.exp(outer).max()
    return Analytic(Problem(inner_loss, outer_loss), np.zeros(d), outer, 1 / largest, d)


def anchored_mixup() -> Analytic:
    """Weight mixup of a linear model with squared loss and an anchor, alpha of rank 1."""
    n, shape, anchor = 60, (10, 2), 0.1
    rng = np.random.default_rng(0)
    pretrained = rng.normal(size=shape)
    sets = []
    for _ in range(2):
        x = rng.normal(size=(n, shape[0]))
        sets.append((x, x @ (pretrained + 0.5 * rng.normal(size=shape)) + 0.3 * rng.normal(size=(n, shape[1]))))
    train, validation = sets

    def loss(params, batch):
        return 0.5 * jnp.sum((batch[0] @ params["w"] - batch[1]) ** 2) / n

    frozen = {"w": jnp.asarray(pretrained)}
    mixed = mixup_problem(loss, partition(frozen, mixed=("w",)), anchor=anchor)
    problem = Problem(
        lambda w, alpha, _: mixed.inner_loss(w, {"w": alpha}, train),
        lambda w, alpha, _: mixed.outer_loss(w, {"w": alpha}, validation),
    )
    alpha = jnp.asarray(rng.uniform(0.5, 1, shape))
    largest = np.linalg.eigvalsh(train[0].T @ train[0] / n).max() + anchor
    return Analytic(problem, frozen, alpha, 1 / largest, alpha.size)


PROBLEMS: dict[str, Callable[[], Analytic]] = {
    "logistic regression": logistic_regression,
    "anchored mixup": anchored_mixup,
}


def analytic_rows(curves: Callable[[Analytic], Iterator[Curve]], exact: Estimator) -> list[dict[str, Any]]:
    """Relative error of every estimator after the inner problem is solved by gradient descent, in float64.

    Args:
        curves: what is compared on a problem.
        exact: an estimator that is exact at a solution.
    """
    rows = []
    with jax.enable_x64(True):
        for name, make in PROBLEMS.items():
            case = make()
            start, outer = jax.tree.map(jnp.asarray, (case.start, case.outer))
            tx = optax.sgd(case.step_size)
            far, _ = inner_steps(
                case.problem.inner_loss, tx, InnerState(start, tx.init(start)), outer, jnp.zeros(10000)
            )
            truth = _estimate(case, exact, far.params, outer, 1)
            for label, terms, cost, estimators in curves(case):
                found = [_estimate(case, estimator, start, outer, INNER_STEPS) for estimator in estimators]
                errors = [np.linalg.norm(each - truth) / np.linalg.norm(truth) for each in found]
                row = {"part": "analytic", "problem": name, "estimator": label, "terms": terms, "fb": cost}
                rows.append({**row, "quantity": "relative error", "value": float(np.median(errors))})
    return rows


def _estimate(case: Analytic, estimator: Estimator, start, outer, num_steps: int) -> np.ndarray:
    @jax.jit
    def run(start, outer):
        batches, tx = jnp.zeros(num_steps), optax.sgd(case.step_size)
        found = hypergradient(case.problem, estimator, start, outer, batches, jnp.zeros(()), inner_tx=tx)
        return found.hypergradient

    return np.asarray(ravel_pytree(run(start, outer))[0])
