"""Folds: every row held out once, classes even, copies and groups together, as many trained on by every seed."""

from collections import Counter

import datasets
import numpy as np
import pytest

from agwm_jax import AgwmError
from agwm_jax.data.draws import drawn, fold_rows
from agwm_jax.data.tasks import Task


def task_of(texts, labels, kind="classification", **columns):
    names = tuple(map(str, range(max(labels) + 1))) if kind == "classification" else ()
    split = datasets.Dataset.from_dict({"text": texts, "label": labels, **columns})
    return Task("t", kind, names, "text_pair" in columns, ("accuracy",), "validation", {"train": split})


def folds_of(task, folds, *, first=0):
    return [fold_rows(task, first + fold, folds=folds) for fold in range(folds)]


def test_every_row_is_held_out_once_by_each_shuffle():
    task = task_of([f"text {i}" for i in range(53)], [0, 1, 1] * 17 + [0, 1])
    for first in (0, 5):
        parts = folds_of(task, 5, first=first)
        assert sorted(np.concatenate([part["validation"] for part in parts])) == list(range(53))
        assert {len(part["train"]) for part in parts} == {53 - 11}  # one size for all, that of the largest fold's rest
        for part in parts:
            assert len(set(part["train"])) == 42
            assert not set(part["train"]) & set(part["validation"])
    shuffles = [{frozenset(part["validation"]) for part in folds_of(task, 5, first=first)} for first in (0, 5)]
    assert shuffles[0] != shuffles[1]
    np.testing.assert_array_equal(fold_rows(task, 3, folds=5)["train"], fold_rows(task, 3, folds=5)["train"])


def test_classes_are_as_even_as_they_can_be():
    labels = [0] * 40 + [1] * 10 + [2] * 5
    for part in folds_of(task_of([f"text {i}" for i in range(55)], labels), 5):
        assert Counter(np.array(labels)[part["validation"]].tolist()) == {0: 8, 1: 2, 2: 1}


def test_a_class_with_fewer_texts_than_folds_is_no_error():
    parts = folds_of(task_of([f"text {i}" for i in range(30)], [0] * 14 + [1] * 14 + [2] * 2), 5)
    assert sum(28 in part["validation"] for part in parts) == 1


def test_the_scores_of_a_regression_are_spread_over_the_folds():
    labels = np.linspace(0, 1, 50)
    parts = folds_of(task_of([f"text {i}" for i in range(50)], labels.tolist(), "regression"), 5)
    means = [labels[part["validation"]].mean() for part in parts]
    assert np.ptp(means) < 0.1


def test_copies_of_a_text_are_never_parted():
    texts = [f"Text  number {i % 20}" if i < 20 else f"text number {i % 20}" for i in range(40)]
    for part in folds_of(task_of(texts, [0, 1] * 20), 4):
        assert not {row % 20 for row in part["train"]} & {row % 20 for row in part["validation"]}
    pairs = task_of(["same"] * 40, [0, 1] * 20, text_pair=[f"other {i}" for i in range(40)])
    assert {len(part["validation"]) for part in folds_of(pairs, 4)} == {10}


def test_groups_are_never_parted():
    groups = [f"author {i % 7}" for i in range(42)]
    task = task_of([f"text {i}" for i in range(42)], [0, 1] * 21, group=groups)
    for part in folds_of(task, 3):
        assert not {row % 7 for row in part["train"]} & {row % 7 for row in part["validation"]}
    with pytest.raises(AgwmError, match="t has 7 groups, which 8 folds cannot share"):
        fold_rows(task, 0, folds=8)


def test_a_drawn_task_has_the_rows_and_keeps_its_other_splits():
    task = task_of([f"text {i}" for i in range(20)], [0, 1] * 10)
    task = task._replace(splits={**task.splits, "test": task.splits["train"]})
    rows = fold_rows(task, 1, folds=4)
    found = drawn(task, rows, seed=1)
    assert list(found.splits["validation"]["text"]) == [f"text {i}" for i in rows["validation"]]
    assert list(found.splits["train"]["text"]) == [f"text {i}" for i in rows["train"]]
    assert found.splits["test"] is task.splits["test"]
    assert drawn(task, {}, seed=1) is task
