"""A run that learnt nothing says so, and one that learnt something does not."""

import math

import numpy as np
import pytest

from agwm_jax.cli import _warn_of_learning
from agwm_jax.runs.learning import NAMES, guessing_loss, learning_warnings

CLASSES = ("no", "yes", "maybe")
LABELS = np.array([0] * 50 + [1] * 30 + [2] * 20)
ENTROPY = -sum(share * math.log(share) for share in (0.5, 0.3, 0.2))
RIGHT = np.eye(3)[LABELS]


def records(last: float, *, phase: str = "finetune"):
    return [{"phase": phase, "loss": loss} for loss in np.linspace(1.2, last, 20)]


def names(found):
    return [warning.name for warning in found]


def test_a_loss_like_that_of_guessing():
    unmoved = learning_warnings(records(0.99 * ENTROPY), (ENTROPY, 0.0), RIGHT, LABELS, CLASSES)
    assert names(unmoved) == ["training_hardly_moved"]
    assert f"guessing by the labels alone is {ENTROPY:.3f}" in unmoved[0].message
    # ln 3 = 1.099 would let this pass for learning: who guesses the commonest class has 1.030.
    assert names(learning_warnings(records(1.0), (ENTROPY, 0.0), RIGHT, LABELS, CLASSES)) == ["training_hardly_moved"]
    assert learning_warnings(records(0.5), (ENTROPY, 0.0), RIGHT, LABELS, CLASSES) == []
    assert learning_warnings(records(1.2, phase="search-0"), (ENTROPY, 0.0), RIGHT, LABELS, CLASSES) == []
    assert learning_warnings(records(1.2)[:5], (ENTROPY, 0.0), RIGHT, LABELS, CLASSES) == []


def test_one_class_for_all():
    same = np.tile([0.1, 0.9, 0.0], (100, 1))
    (found,) = learning_warnings(records(0.5), (ENTROPY, 0.0), same, LABELS, CLASSES)
    assert found.name == "one_class_predicted"
    assert "every one of the 100 texts that are scored is predicted as yes" in found.message
    assert learning_warnings(records(0.5), (ENTROPY, 0.0), same, np.ones(100), CLASSES) == []  # and all of them are yes


@pytest.mark.parametrize(("last", "expected"), [(0.97, ["training_hardly_moved"]), (0.5, [])])
def test_a_regression_is_held_against_the_spread_of_its_labels(last, expected):
    labels = np.array([-1.0, 1.0] * 20)
    guess = guessing_loss(labels, num_classes=0)
    assert names(learning_warnings(records(last), guess, np.zeros((40, 1)), labels, ())) == expected


def test_guessing_knows_what_a_class_counts_and_how_labels_are_smoothed():
    """With each class alike its best guess is one third for all, whatever their shares; smoothing moves it there."""
    weights = 1 / np.array([50.0, 30.0, 20.0])
    np.testing.assert_allclose(guessing_loss(LABELS, num_classes=3, weights=weights), [math.log(3), 0])
    smoothed = 0.7 * np.array([0.5, 0.3, 0.2]) + 0.1
    found = guessing_loss(LABELS, num_classes=3, label_smoothing=0.3)
    label = np.array([0.8, 0.1, 0.1])
    np.testing.assert_allclose(found, [-np.sum(x * np.log(x)) for x in (smoothed, label)])
    np.testing.assert_allclose(guessing_loss(np.array([0, 0, 1, 1]), num_classes=3)[0], math.log(2))  # one has no text


def test_a_smoothed_loss_near_its_least_has_moved():
    """With 80 % of every label spread, the least loss is close to that of guessing, and reaching it is learning."""
    guessing = guessing_loss(LABELS, num_classes=3, label_smoothing=0.8)
    assert guessing[1] > 0.95 * guessing[0]
    assert learning_warnings(records(guessing[1] + 1e-3), guessing, RIGHT, LABELS, CLASSES) == []
    unmoved = learning_warnings(records(guessing[0]), guessing, RIGHT, LABELS, CLASSES)
    assert names(unmoved) == ["training_hardly_moved"]


def test_the_command_line_says_it_once_for_all_seeds(capsys):
    hit = {"name": NAMES[0], "message": "nothing moved."}
    other = {"name": "texts_truncated", "message": "cut"}
    results = [{"seed": 0, "warnings": [hit]}, {"seed": 1, "warnings": [other]}, {"seed": 2, "warnings": [hit]}]
    _warn_of_learning(results)
    assert capsys.readouterr().err == "agwm: warning: seeds 0, 2, the first: nothing moved.\n"
    _warn_of_learning(results[:1])
    assert capsys.readouterr().err == "agwm: warning: nothing moved.\n"
