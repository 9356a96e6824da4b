"""Which rows one seed trains and is scored on: a low-resource draw, or a fold of a cross-validation."""

import warnings
from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

from agwm_jax.data.tasks import Task, check_training_labels
from agwm_jax.data.wording import normal_form
from agwm_jax.errors import AgwmError

Rows = Mapping[str, Int[np.ndarray, "_"]]
"""Rows of the training split by the split that they become, "train" among them; empty: everything trains."""

_BINS = 5  # of a regression's scores, so that every fold has low and high ones


def drawn(task: Task, rows: Rows, *, seed: int) -> Task:
    """The task with its training split cut into those that `rows` names; the other splits stay whole.

    Raises:
      AgwmError: the training rows are of one class.
    """
    if not rows:
        return task
    found = {name: task.splits["train"].select(each) for name, each in rows.items()}
    source = f"{task.name}, draw of {len(rows['train'])} training examples by seed {seed}"
    check_training_labels(found["train"]["label"], task.kind, task.label_names, source)
    return task._replace(splits={**task.splits, **found})


def low_resource_rows(task: Task, seed: int, *, train_size: int) -> Rows:
    """`train_size` training rows drawn at random, and rows of a split "development" of a sixth as many.

    Both are drawn without replacement, the same for the same seed.

    Raises:
      AgwmError: the training split is too small for both.
    """
    development_size = max(1, train_size // 6)
    available = len(task.splits["train"])
    if train_size < 1:
        raise AgwmError(f"train_size is {train_size}: give 1 or more.")
    if train_size + development_size > available:
        raise AgwmError(
            f"train_size {train_size} and a development split of {development_size} need "
            f"{train_size + development_size} examples, the training split of {task.name} has {available}: give "
            f"train_size {available * 6 // 7} or less."
        )
    order = np.random.default_rng(seed).permutation(available)
    return {"train": order[:train_size], "development": order[train_size : train_size + development_size]}


def fold_rows(task: Task, seed: int, *, folds: int, held_out: str = "validation") -> Rows:
    """The fold that a seed holds out: seed s has fold ``s % folds`` of shuffle ``s // folds``.

    So seeds 0 to folds - 1 hold out every row once, and the next ones do so by another shuffle. Folds are stratified by
    class (by fifths of a regression's scores). Rows of one group, or with the same text, share a fold. All folds of a
    shuffle train on equally many rows: a fold that is smaller than the largest leaves some out of its training.

    Raises:
      AgwmError: there are fewer different texts, or groups, than folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    split = task.splits["train"]
    labels = np.asarray(split["label"])
    if task.kind == "regression":
        labels = np.searchsorted(np.quantile(labels, np.arange(1, _BINS) / _BINS), labels)
    groups = _groups(task)
    distinct, what = len(np.unique(groups)), "groups" if "group" in split.column_names else "different texts"
    if distinct < folds:
        raise AgwmError(f"{task.name} has {distinct} {what}, which {folds} folds cannot share: give fewer folds.")
    chooser = StratifiedKFold if distinct == len(groups) else StratifiedGroupKFold
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a class with fewer texts than folds is not in all of them
        parts = list(chooser(folds, shuffle=True, random_state=seed // folds).split(labels, labels, groups))
    size = len(labels) - max(len(part) for _, part in parts)
    train, held = parts[seed % folds]
    kept = np.random.default_rng(seed).permutation(train)[:size]
    return {"train": kept, held_out: np.sort(held)}


def _groups(task: Task) -> Int[np.ndarray, "n"]:
    """A number for every training row; rows that must not be parted share it."""
    split = task.splits["train"]
    names = [name for name in ("text", "text_pair") if name in split.column_names]
    names = ["group"] if "group" in split.column_names else names
    columns = ([" ".join(normal_form(value).lower().split()) for value in split[name]] for name in names)
    numbers: dict[tuple[str, ...], int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in zip(*columns, strict=True)])
