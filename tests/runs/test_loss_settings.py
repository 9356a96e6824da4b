"""Class weights and smoothed labels in whole runs."""

import json

import chex
import numpy as np
import pytest
from tiny import words

from agwm_jax import fit, load_pretrained
from agwm_jax.data.tasks import class_weights
from agwm_jax.errors import AgwmError
from agwm_jax.runs.run import train
from agwm_jax.settings import load_config

NOUNS, WORDS = ("key", "author", "book", "letter"), ("here", "there", "near", "far")
TEXTS = [f"the {noun} is {word}" for noun in NOUNS for word in WORDS]
LABELS = ["rare" if "key" in text else "common" for text in TEXTS]
TWICE = [[0, 0] if label == "rare" else [0] for label in LABELS]
FINETUNE = {"epochs": 3, "optimizer": {"learning_rate": 1e-3}}


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return load_pretrained(tiny_checkpoint, num_labels=2, dropout=0.0)


@pytest.fixture(scope="module")
def fitted(model):
    def fitted(texts=TEXTS, labels=LABELS, method="vanilla", **loss):
        data = {"batch_size": len(texts), "max_length": 16}
        return fit(model, method, (texts, labels), finetune=FINETUNE, data=data, loss=loss)

    return fitted


def test_a_class_that_counts_twice_is_there_twice(fitted):
    """In batches that hold all texts, without dropout: the same steps but for the order of the sums."""
    weighted = fitted(class_weights={"rare": 2})
    texts, labels = ([x for x, times in zip(all_, TWICE, strict=True) for _ in times] for all_ in (TEXTS, LABELS))
    doubled, plain = fitted(texts, labels), fitted()
    np.testing.assert_allclose(*([r["loss"] for r in each.records] for each in (weighted, doubled)), rtol=1e-5)
    # A key's bias has no gradient (softmax does not see it): Adam makes steps of the rounding there.
    left, right = ({p: x for p, x in each.weights.items() if "key.bias" not in p} for each in (weighted, doubled))
    chex.assert_trees_all_close(left, right, atol=2e-5)
    apart = np.abs(weighted.weights["classifier.kernel"] - plain.weights["classifier.kernel"]).max()
    assert apart > 2e-4


def test_balanced_weights_are_numbers_one_could_give(fitted):
    given = fitted(class_weights={"rare": 16 / (2 * 4), "common": 16 / (2 * 12)})
    chex.assert_trees_all_equal(dict(fitted(class_weights="balanced").weights), dict(given.weights))


def test_balanced_as_in_scikit_learn():
    labels = np.array([0] * 6 + [2] * 3 + [3])
    found = class_weights(labels, ("a", "b", "c", "d"), "balanced")
    np.testing.assert_allclose(found[[0, 2, 3]], [10 / 18, 10 / 9, 10 / 3], rtol=1e-6)
    np.testing.assert_allclose(found[labels].mean(), 1, rtol=1e-6)


def test_smoothing_keeps_the_loss_up(fitted):
    """At any logits a smoothed loss is not below the entropy of its targets."""
    smoothed, targets = fitted(label_smoothing=0.5), np.array([0.75, 0.25])
    entropy = -np.sum(targets * np.log(targets))
    assert min(record["loss"] for record in smoothed.records) > entropy
    assert not np.array_equal(smoothed.weights["classifier.kernel"], fitted().weights["classifier.kernel"])


def test_what_does_not_fit_the_task(fitted, tiny_checkpoint):
    with pytest.raises(AgwmError, match=r"class_weights: 'rar' is none of the classes .*; did you mean 'rare'"):
        fitted(class_weights={"rar": 2})
    scores = load_pretrained(tiny_checkpoint, num_labels=1)
    with pytest.raises(AgwmError, match=r"loss.label_smoothing is for classes, and .* is a regression: leave it out"):
        fit(
            scores,
            "vanilla",
            (TEXTS, np.linspace(0, 1, 16).tolist()),
            data={"max_length": 16},
            loss={"label_smoothing": 0.1},
        )


def test_seeds_side_by_side_through_a_search_in_parts(settings, tmp_path):
    """The weights of texts go wherever the texts go: into lanes, both splits of the search, and parts of a batch."""
    chosen = {**settings, "run.tensorboard": "false", "loss.class_weights": "{acceptable: 5}", "data.accumulate": 2}
    both = {**chosen, "run.seeds": "[0, 1]", "run.output": str(tmp_path / "both")}
    train(load_config(None, words(both, "agwm")), progress=False)
    alone = {**chosen, "run.seed": 1, "run.output": str(tmp_path / "alone")}
    expected = train(load_config(None, words(alone, "agwm")), progress=False)
    found = json.loads((tmp_path / "both" / "seed-1" / "result.json").read_text())
    assert found["scores"] == expected["scores"]
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / where / "metrics.jsonl").read_text().splitlines()]
        for where in ("both/seed-1", "alone")
    ]
    np.testing.assert_allclose(*losses, rtol=2e-4)
