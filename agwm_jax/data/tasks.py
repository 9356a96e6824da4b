"""What a task is, the unit of its labels, and training without leaked texts."""

import difflib
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int, Num

from agwm_jax.data.wording import listed, normal_form, quoted
from agwm_jax.errors import AgwmError

if TYPE_CHECKING:
    import datasets  # takes a second; settings are read without it


class Task(NamedTuple):
    """A labelled text task.

    Attributes:
      name: for result.json and tables.
      kind: "classification" (labels are class numbers) or "regression" (labels are floats).
      label_names: the classes by number; empty for regression.
      pair: whether every example is two texts.
      metrics: names for `agwm_jax.metrics.compute`, the main one first.
      report_split: the split whose score is reported, "validation" or "test".
      splits: data sets with columns text, text_pair (if pair), label and optionally group; "train" is always there.
    """

    name: str
    kind: str
    label_names: tuple[str, ...]
    pair: bool
    metrics: tuple[str, ...]
    report_split: str
    splits: "dict[str, datasets.Dataset]"


class LabelScale(NamedTuple):
    """The unit that a regression is trained in: labels less their mean, divided by their standard deviation.

    A fresh head starts at 0, so that raw labels, whose mean is not, spend the first steps on that offset. Of a head
    with kernel K and bias b, ``K * std`` and ``b * std + mean`` give scores in the user's unit.
    """

    mean: float
    std: float

    def standardise(self, labels: Num[np.ndarray, "n"]) -> Float32[np.ndarray, "n"]:
        """Labels in the unit of training."""
        return ((np.asarray(labels, np.float64) - self.mean) / self.std).astype(np.float32)

    def undo(self, outputs: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        """What a model trained on standardised labels gives, in the user's unit; float64."""
        return np.asarray(outputs, np.float64) * self.std + self.mean


def label_scale(task: Task) -> LabelScale | None:
    """Mean and standard deviation of the (drawn) training labels; None for a classification."""
    if task.kind != "regression":
        return None
    labels = np.asarray(task.splits["train"]["label"], np.float64)
    return LabelScale(float(labels.mean()), float(labels.std()))


def class_weights(
    labels: Int[np.ndarray, "n"], label_names: Sequence[str], weights: Literal["balanced"] | Mapping[str, float]
) -> Float32[np.ndarray, "c"]:
    """What an example of each class counts in the loss.

    Args:
      labels: class numbers of the training set.
      label_names: of the c classes.
      weights: "balanced", ``n / (c n_k)`` of a class with n_k examples, over the c classes that have any (as
        scikit-learn); or numbers by class name, 1 for the others.

    Raises:
      AgwmError: a name is none of the classes.
    """
    if weights == "balanced":
        counts = np.bincount(labels, minlength=len(label_names))
        return (len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1))).astype(np.float32)
    numbers = {normal_form(name): index for index, name in enumerate(label_names)}
    found = np.ones(len(label_names), np.float32)
    for name, weight in weights.items():
        if normal_form(name) not in numbers:
            near = difflib.get_close_matches(name, label_names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise AgwmError(f"loss.class_weights: {name!r} is none of the classes {listed(label_names)}{hint}")
        found[numbers[normal_form(name)]] = weight
    return found


def drop_leaked(task: Task) -> Task:
    """The task without the training examples whose text occurs in another split, lower-cased, whitespace collapsed.

    Raises:
      AgwmError: nothing, or one class only, would be left.
    """

    def texts(name: str) -> list[tuple[str, ...]]:
        split = task.splits[name]
        names = [name for name in ("text", "text_pair") if name in split.column_names]
        plain = ([" ".join(normal_form(text).lower().split()) for text in split[name]] for name in names)
        return list(zip(*plain, strict=True))

    held_out = {text for name in task.splits if name != "train" for text in texts(name)}
    kept = [index for index, text in enumerate(texts("train")) if text not in held_out]
    if not kept:
        raise AgwmError(f"Every training text of {task.name} occurs in another split: nothing is left to train on.")
    train = task.splits["train"].select(kept)
    check_training_labels(train["label"], task.kind, task.label_names, f"{task.name} without leaked examples")
    return task._replace(splits={**task.splits, "train": train})


def check_training_labels(labels: Sequence[int | float], kind: str, label_names: Sequence[str], source: str) -> None:
    """Raise where there is nothing to learn (one class, or one score, only); warn where a class has no example."""
    distinct = set(labels)
    if len(distinct) == 1:
        only = distinct.pop()
        if kind == "regression":
            raise AgwmError(
                f"{source}: all {len(labels)} training labels are {only}; two different scores or more are needed."
            )
        raise AgwmError(
            f"{source}: all {len(labels)} training rows are of the class {quoted(label_names[int(only)])}; "
            "rows of two classes or more are needed."
        )
    unseen = [name for index, name in enumerate(label_names) if index not in distinct]
    if unseen:
        warnings.warn(
            f"{source}: no training row is of the class {listed(unseen)}, which cannot be learnt so; draw more rows "
            "(task.train_size), add some, or leave the class out.",
            stacklevel=2,
        )
