"""Draws of a task, the unit of its labels, and training without leaked texts."""

import datasets
import numpy as np
import pytest

from agwm_jax.data.agreement import agreement_task
from agwm_jax.data.draws import drawn, low_resource_rows
from agwm_jax.data.tasks import LabelScale, Task, drop_leaked, label_scale
from agwm_jax.errors import AgwmError


def task_of(labels, kind="classification", label_names=("0", "1"), **texts):
    """A task from training labels; texts by split, for pairs two lists."""
    splits = {}
    for split, given in {"train": [f"train {i}" for i in range(len(labels))], "validation": ["v"], **texts}.items():
        first, *second = given if isinstance(given, tuple) else (given,)
        columns = {"text": first, **({"text_pair": second[0]} if second else {})}
        splits[split] = datasets.Dataset.from_dict({**columns, "label": (labels * len(first))[: len(first)]})
    return Task("t", kind, label_names, False, ("accuracy",), "validation", splits)


def low_resource(task, *, train_size, seed):
    return drawn(task, low_resource_rows(task, seed, train_size=train_size), seed=seed)


def test_low_resource_draw():
    task = agreement_task(train_size=400, validation_size=16, test_size=16)
    draw = low_resource(task, train_size=300, seed=3)
    train, development = draw.splits["train"]["text"], draw.splits["development"]["text"]
    assert (len(train), len(development)) == (300, 50)
    assert len({*train, *development}) == 350
    assert {*train, *development} <= set(task.splits["train"]["text"])
    assert draw.splits["test"] is task.splits["test"]
    assert list(low_resource(task, train_size=300, seed=3).splits["train"]["text"]) == list(train)
    assert set(low_resource(task, train_size=300, seed=4).splits["train"]["text"]) != set(train)


def test_low_resource_too_large(tmp_path):
    task = agreement_task(train_size=350, validation_size=16, test_size=16)
    assert len(low_resource(task, train_size=300, seed=0).splits["development"]) == 50
    with pytest.raises(
        AgwmError, match=r"train_size 301 .* development split of 50 need 351 .* has 350: give train_size 300"
    ):
        low_resource(task, train_size=301, seed=0)
    with pytest.raises(AgwmError, match="train_size is 0"):
        low_resource(task, train_size=0, seed=0)
    one_sided = task_of([0] * 99 + [1])
    with pytest.raises(AgwmError, match=r"draw of 2 training examples by seed 0.*class '0'"):
        low_resource(one_sided, train_size=2, seed=0)


def test_a_draw_that_leaves_a_class_empty_says_so():
    task = task_of([0, 1] * 50 + [2], label_names=("no", "yes", "rarely"))
    with pytest.warns(UserWarning, match=r"t, draw of 12 .* seed 1: no training row is of the class 'rarely'"):
        low_resource(task, train_size=12, seed=1)


def test_drop_leaked():
    task = task_of([0, 1, 0, 0], train=["A  b", "c", "d", "n\u00e9"], validation=["a b"], test=["D ", "ne\u0301 "])
    task = task._replace(splits={**task.splits, "train": task.splits["train"].add_item({"text": "e", "label": 0})})
    assert list(drop_leaked(task).splits["train"]["text"]) == ["c", "e"]
    assert list(drop_leaked(task).splits["test"]["text"]) == ["D ", "ne\u0301 "]
    everything = task._replace(splits={**task.splits, "test": task.splits["train"]})
    with pytest.raises(AgwmError, match="nothing is left"):
        drop_leaked(everything)


def test_a_pair_leaks_only_as_a_pair():
    task = task_of([0, 1, 0], train=(["a"] * 3, ["x", "y", "z"]), validation=(["a"] * 3, ["X", "w", "w"]))
    assert list(drop_leaked(task).splits["train"]["text_pair"]) == ["y", "z"]


def test_the_scale_of_labels_is_that_of_the_drawn_training_labels():
    assert label_scale(task_of([0, 1])) is None
    labels = [1.0, 4.0, 2.5, 0.0, 5.0, 3.5, 2.0, 4.5]
    task = task_of(labels, kind="regression", label_names=())
    scale = label_scale(task)
    assert scale == LabelScale(2.8125, pytest.approx(np.std(labels)))
    standard = scale.standardise(np.array(labels))
    assert standard.dtype == np.float32
    np.testing.assert_allclose([standard.mean(), standard.std()], [0.0, 1.0], atol=1e-6)
    np.testing.assert_allclose(scale.undo(standard[:, None])[:, 0], labels, atol=1e-6)
    drawn = low_resource(task, train_size=4, seed=1)
    mean = np.mean(drawn.splits["train"]["label"])
    assert mean != scale.mean
    assert label_scale(drawn).mean == pytest.approx(mean)
