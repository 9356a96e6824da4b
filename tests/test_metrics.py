"""Metrics: against figures worked out by hand, and where the definition has a hole."""

import numpy as np
import pytest

from agwm_jax import metrics
from agwm_jax.errors import AgwmError


def logits_of(predictions, num_classes):
    return np.eye(num_classes)[predictions] * 3 - 1


# Class 1: 3 true positives, 1 false positive, 2 false negatives; 4 true negatives.
LABELS = np.array([1, 1, 1, 1, 1, 0, 0, 0, 0, 0])
PREDICTIONS = np.array([1, 1, 1, 0, 0, 1, 0, 0, 0, 0])


def test_two_classes():
    got = metrics.compute(("accuracy", "f1", "macro_f1", "matthews"), logits_of(PREDICTIONS, 2), LABELS)
    assert list(got) == ["accuracy", "f1", "macro_f1", "matthews"]
    assert got["accuracy"] == pytest.approx(0.7)
    assert got["f1"] == pytest.approx(6 / 9)
    assert got["macro_f1"] == pytest.approx((6 / 9 + 8 / 11) / 2)
    assert got["matthews"] == pytest.approx((3 * 4 - 1 * 2) / np.sqrt(4 * 5 * 5 * 6))


def test_f1_is_of_class_1():
    got = metrics.compute(("f1",), logits_of(1 - PREDICTIONS, 2), 1 - LABELS)
    assert got["f1"] == pytest.approx(8 / 11)


def test_three_classes():
    labels, predictions = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 1, 1, 1, 2, 0])
    got = metrics.compute(("macro_f1",), logits_of(predictions, 3), labels)
    assert got["macro_f1"] == pytest.approx((1 / 2 + 4 / 5 + 2 / 3) / 3)


def test_regression():
    logits, labels = np.array([[1.0], [2.0], [3.0], [10.0]]), np.array([1.0, 2.0, 4.0, 3.0])
    got = metrics.compute(("spearman", "pearson"), logits, labels)
    assert got["spearman"] == pytest.approx(0.8)
    x, y = logits[:, 0] - 4, labels - 2.5
    assert got["pearson"] == pytest.approx((x @ y) / np.sqrt((x @ x) * (y @ y)))


@pytest.mark.parametrize("prediction", [0, 1])
def test_one_predicted_class(prediction):
    logits = logits_of(np.full(10, prediction), 2)
    got = metrics.compute(("matthews", "f1", "accuracy"), logits, LABELS)
    assert got == {"matthews": 0.0, "f1": pytest.approx(2 / 3 if prediction else 0.0), "accuracy": 0.5}
    assert metrics.compute(("matthews",), logits, np.full(10, prediction)) == {"matthews": 0.0}


@pytest.mark.parametrize("constant", [0.0, 2.5, 0.1])
def test_constant_scores(constant):
    labels = np.array([1.0, 2.0, 3.0])
    wobble = np.full((3, 1), constant) + constant * np.array([[0.0], [1e-16], [2e-16]])
    for logits in (np.full((3, 1), constant), wobble):
        assert metrics.compute(("spearman", "pearson"), logits, labels) == {"spearman": 0.0, "pearson": 0.0}
    assert metrics.compute(("pearson",), labels[:, None], np.full(3, constant)) == {"pearson": 0.0}
    assert metrics.compute(("pearson",), np.ones((1, 1)), np.ones(1)) == {"pearson": 0.0}


@pytest.mark.parametrize(
    ("names", "logits", "labels", "message"),
    [
        (("accuracy",), np.array([[0.0, 1.0], [np.nan, 0.0], [np.inf, 0.0]]), np.array([0, 1, 1]), "2 of 3.*example 1"),
        (("acuracy",), np.zeros((2, 2)), np.array([0, 1]), "there is no metric 'acuracy'; did you mean accuracy"),
        (("pearson",), np.zeros((2, 2)), np.array([0, 1]), "no metric for classification"),
        (("accuracy",), np.zeros((2, 1)), np.array([0.0, 1.0]), "no metric for regression"),
        (
            ("f1",),
            np.zeros((2, 3)),
            np.array([0, 1]),
            "'f1' needs 2 classes, the task has 3: take accuracy, macro_f1, matthews",
        ),
        (("accuracy",), np.zeros((0, 2)), np.array([], int), "no examples"),
    ],
)
def test_errors(names, logits, labels, message):
    with pytest.raises(AgwmError, match=message):
        metrics.compute(names, logits, labels)
