"""Scores that no text helped to choose, the one-standard-error rule, how many texts are needed, calibration."""

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from agwm_jax.selection.verdict import (
    Trial,
    at_the_edge,
    calibrate,
    confusion,
    difference,
    per_class,
    recommend,
    score,
    sentences,
    texts_needed,
)

N = 400


def logits_of(predictions, classes=2):
    return np.eye(classes)[predictions].astype(np.float32)


def scored(name, right, *, seconds=1.0, n=N):
    """A method that is right on these texts of n; every label is 1."""
    logits = logits_of(np.isin(np.arange(n), right).astype(int))
    folds = np.split(np.arange(n), 4)
    labels = [np.ones(len(rows), int) for rows in folds]
    parts = tuple(logits[rows] for rows in folds)
    trial = Trial(1.0, parts, tuple(float(part.argmax(1).mean()) for part in parts), seconds)
    return score(name, [trial], labels, ["accuracy"])


def test_a_fold_is_scored_at_the_rate_that_the_other_folds_choose():
    labels = [np.array([0, 1, 1, 0])] * 3
    right, wrong = (logits_of(x) for x in (labels[0], 1 - labels[0]))
    low = Trial(1.0, (wrong, right, right), (0.0, 1.0, 1.0), 1.0)
    high = Trial(3.0, (right, right, wrong), (1.0, 1.0, 0.0), 2.0)
    found = score("m", [low, high], labels, ["accuracy"])
    # Fold 0: the others say 1.0 of low and 0.5 of high. Fold 2: 0.5 and 1.0. Fold 1: even, so the first.
    assert found.by_fold == (0.0, 1.0, 0.0)
    assert found.scores == {"accuracy": pytest.approx(1 / 3)}
    np.testing.assert_array_equal(found.logits, np.concatenate([wrong, right, wrong]))
    assert (found.factor, found.seconds, found.trials) == (1.0, 1.0, 2)  # over all folds they are even


def test_the_interval_of_an_accuracy_is_that_of_a_share():
    found = scored("m", range(300))
    half = 1.96 * np.sqrt(0.75 * 0.25 / N)
    assert found.interval == pytest.approx((0.75 - half, 0.75 + half), abs=0.01)
    assert scored("m", range(300)).interval == found.interval


def test_the_quickest_within_one_standard_error_of_the_best_is_recommended():
    slow = scored("slow", range(300), seconds=60)
    near = scored("near", range(4, 301), seconds=2)  # wrong on four, right on one: three texts less
    far = scored("far", range(20, 300), seconds=1)  # wrong on twenty
    gap = difference(slow, near, "accuracy")
    assert gap.mean == pytest.approx(3 / N)
    assert gap.error == pytest.approx(np.sqrt(5 / N - (3 / N) ** 2) / np.sqrt(N), rel=0.1)
    assert recommend([slow, near, far], "accuracy") is slow  # 3 texts are 1.35 standard errors
    nearer = scored("nearer", range(2, 301), seconds=2)  # 1 text, 0.58 standard errors
    assert recommend([slow, nearer, far], "accuracy") is nearer
    assert recommend([far], "accuracy") is far


def test_what_is_said_of_methods_that_can_and_cannot_be_told_apart():
    best = scored("best", range(300), seconds=1)
    same, far = scored("same", range(3, 302), seconds=9), scored("far", range(60, 300), seconds=1)
    first, of_same, of_far = sentences([best, same, far], best, "accuracy")
    assert first.startswith("Take best: accuracy 75.0 (")
    assert "on 400 held-out texts, 1 s a training" in first
    assert of_same.startswith("same and best cannot be told apart with 400 texts (-0.2 points, ")
    assert "more held-out texts would be needed to see a difference of 1 point" in of_same
    assert of_far.startswith("far is worse than best on such texts (-15.0 points, ")
    quick = scored("quick", range(1, 300), seconds=0.5)
    said, *_ = sentences([best, quick], quick, "accuracy")
    assert "best scored 0.2 points more, which is within one standard error" in said
    assert "takes 1 s" in said


def test_the_texts_that_are_needed_to_see_one_point():
    first, second = scored("a", range(300)), scored("b", range(20, 320))
    gap = difference(first, second, "accuracy")
    # They differ on a tenth of the texts: a variance of 0.1 a text, and 2.8 standard errors for a power of 80 %.
    assert texts_needed(gap, N) == pytest.approx(0.1 * (2.8 / 0.01) ** 2, rel=0.15)
    same = difference(first, first, "accuracy")
    assert texts_needed(same, N) == 0
    assert not same.told_apart


def test_the_temperature_undoes_a_known_sharpening():
    rng = np.random.default_rng(0)
    true = rng.normal(size=(20_000, 3)) * 1.5
    labels = np.array([rng.choice(3, p=p) for p in softmax(true, axis=1)])
    found = calibrate(3 * true, labels)
    assert found.temperature == pytest.approx(3, rel=0.05)
    assert found.error_before > 0.1
    assert found.error_after < 0.015
    assert sum(count for *_, count in found.bins) == len(labels)
    sure = softmax(3 * true / found.temperature, axis=1)
    for wanted, least, share in found.thresholds:
        answered = sure.max(1) >= least
        assert np.mean(sure.argmax(1)[answered] == labels[answered]) >= wanted - 1e-9
        assert answered.mean() == pytest.approx(share)
    assert [wanted for wanted, *_ in found.thresholds] == [0.9, 0.95, 0.99]


def test_the_threshold_is_the_lowest_that_gives_the_precision_on_enough_texts():
    # Sure to unsure: 30 right answers, one wrong, 20 right, then wrong ones. Of the first 51 texts 98 % are right.
    right = np.array([True] * 30 + [False] + [True] * 20 + [False] * 9)
    sure = np.linspace(4, 0.1, len(right))
    logits = np.stack([np.zeros(len(right)), sure], axis=1)
    found = {wanted: share for wanted, _, share in calibrate(logits, right.astype(int)).thresholds}
    # 0.9: 50 of the first 55 are right, and 50 of 56 are not enough.
    assert found == {0.9: pytest.approx(55 / 60), 0.95: pytest.approx(52 / 60), 0.99: pytest.approx(30 / 60)}
    few = calibrate(logits[:19], right[:19].astype(int))
    assert few.thresholds == []


def test_a_precision_that_no_confidence_gives_is_left_out():
    logits, labels = np.array([[2.0, 0], [1.0, 0]]), np.array([1, 1])
    assert calibrate(logits, labels).thresholds == []


def test_confusion_and_scores_of_classes_are_scikit_learns():
    rng = np.random.default_rng(1)
    labels, predictions = rng.integers(0, 4, 200), rng.integers(0, 3, 200)  # class 3 is never predicted
    table = confusion(logits_of(predictions, 4), labels)
    np.testing.assert_array_equal(table, confusion_matrix(labels, predictions))
    precision, recall, _, support = precision_recall_fscore_support(labels, predictions, zero_division=np.nan)
    np.testing.assert_allclose(per_class(table), np.stack([precision, recall, support], axis=1))
    assert np.isnan(per_class(table)[3][0])


def test_a_rate_at_the_edge_of_what_was_tried_is_named():
    def said(factor, trials=3):
        return at_the_edge(scored("vanilla", np.arange(9))._replace(factor=factor, trials=trials), (5.0, 15.0, 5 / 3))

    assert said(5.0) == []
    assert said(15.0)[0].startswith("The best learning rate of vanilla is the largest that was tried (15 times the")
    assert "is the smallest that was tried (1.67 times the default): a smaller one may be better" in said(5 / 3)[0]
    assert said(15.0, trials=1) == []  # nothing is known of the others, and a note says so already
    assert at_the_edge(scored("vanilla", np.arange(9))._replace(factor=5.0, trials=1), (5.0,)) == []


def test_what_is_no_better_than_guessing_says_so():
    found = scored("m", range(300))
    assert "not surely better than always guessing" in sentences([found], found, "accuracy", guessing=0.72)[1]
    assert len(sentences([found], found, "accuracy", guessing=0.6)) == 1
