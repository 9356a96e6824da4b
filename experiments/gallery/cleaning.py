"""Data hyper-cleaning: digits of which some labels are wrong, and a learnt weight for each example.

Command: python experiments/gallery/cleaning.py
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats
from sklearn.datasets import load_digits

from agwm_jax import Problem, bilevel, hypergrad, inner_steps
from agwm_jax.bench.gallery import Solved, above, run
from agwm_jax.core.inner import InnerState

OUTER_STEPS = 400
CLEAN = 200  # examples of the validation set, whose labels are right


def clean(share: float):
    """Learn the weights; their values, which labels were wrong, and test accuracies by what was trained on."""
    rng = np.random.default_rng(0)
    x, truth = load_digits(return_X_y=True)
    order = rng.permutation(len(x))
    x, truth = x[order] / 16, truth[order]
    labels = truth.copy()
    wrong = np.zeros(len(x), bool)
    wrong[: int(1000 * share)] = True  # of the 1000 training examples
    labels[wrong] = (truth[wrong] + rng.integers(1, 10, wrong.sum())) % 10
    train, validation, test = slice(1000), slice(1000, 1000 + CLEAN), slice(1200, None)

    def losses(w, part, labels=labels):
        logits = x[part] @ w["kernel"] + w["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels[part]))

    def decay(w):
        return 1e-3 * jnp.sum(w["kernel"] ** 2)

    problem = Problem(
        lambda w, o, _: jnp.mean(jax.nn.sigmoid(o) * losses(w, train)) + decay(w),
        lambda w, o, _: jnp.mean(losses(w, validation)),
    )
    start = {"kernel": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}
    tx = optax.sgd(0.5, momentum=0.9)
    solver = bilevel(problem, hypergrad.unrolled(), inner_tx=tx, outer_tx=optax.adam(0.1), num_steps=5)
    state = solver.init(start, jnp.zeros(1000))
    state, _ = jax.jit(lambda s: jax.lax.scan(lambda s, _: (solver.step(s)[0], None), s, length=OUTER_STEPS))(state)
    learnt = np.asarray(jax.nn.sigmoid(state.outer))

    def accuracy(weights, parts=train):
        """Of a new training to the end with fixed weights."""

        def loss(w, o, _):
            return jnp.sum(weights * losses(w, parts)) / np.sum(weights) + decay(w)

        fit = jax.jit(lambda w: inner_steps(loss, tx, InnerState(w, tx.init(w)), None, jnp.zeros(1000))[0].params)
        w = fit(start)
        return 100 * float(np.mean(np.argmax(x[test] @ w["kernel"] + w["bias"], 1) == truth[test]))

    return (
        learnt,
        wrong[train],
        {
            "all labels": accuracy(np.ones(1000)),
            "learnt weights": accuracy(learnt),
            "the validation set alone": accuracy(np.ones(CLEAN), validation),
            "all labels and the validation set": accuracy(np.ones(1000 + CLEAN), slice(1000 + CLEAN)),
            "oracle: right labels alone": accuracy(1.0 - wrong[train]),
        },
    )


def solve() -> Solved:
    """At 30 % and 50 % of wrong labels."""
    answers, found = [], {}
    for share in (0.3, 0.5):
        weights, wrong, accuracies = found[share] = clean(share)
        name = f"{share:.0%} wrong"
        for control in ("all labels", "all labels and the validation set"):
            quantity = f"{name}: test accuracy of the learnt weights"
            answers.append(above(quantity, accuracies["learnt weights"], accuracies[control], control))
        bound = accuracies["oracle: right labels alone"] - 3
        answers.append(
            above(f"{name}: the same", accuracies["learnt weights"], bound, "three points less than the oracle")
        )
        # Area under the ROC curve: how often a right label weighs more than a wrong one.
        rank = scipy.stats.mannwhitneyu(weights[~wrong], weights[wrong]).statistic / (wrong.sum() * (~wrong).sum())
        answers.append(above(f"{name}: a right label weighs more than a wrong one", rank, 0.95, "share of pairs"))
        print(name, {k: round(v, 1) for k, v in accuracies.items()})

    def draw(figure):
        for axes, (share, (weights, wrong, accuracies)) in zip(figure.subplots(1, 2), found.items(), strict=True):
            bins = np.linspace(0, 1, 26)
            axes.hist([weights[~wrong], weights[wrong]], bins, label=["label right", "label wrong"], stacked=True)
            text = "\n".join(f"{value:.1f} {name}" for name, value in accuracies.items())
            axes.text(0.5, 0.97, f"test accuracy\n{text}", transform=axes.transAxes, fontsize=8, ha="center", va="top")
            axes.set(title=f"{share:.0%} of the labels wrong", xlabel="learnt weight of an example")
        figure.axes[0].set_ylabel("examples")
        figure.axes[1].legend(fontsize=8, loc="center")

    return Solved(answers, "Examples with wrong labels lose their weight", draw)


if __name__ == "__main__":
    sys.exit(run("cleaning", __doc__, solve))
