"""What a task is, and where tasks come from: GLUE, any hub data set, local files; low-resource draws of them."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np

from agwm_jax.data import columns
from agwm_jax.data.files import Table, read_table
from agwm_jax.data.predictions import read_texts as read_texts
from agwm_jax.data.predictions import write_predictions as write_predictions
from agwm_jax.errors import AgwmError


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
    splits: dict[str, datasets.Dataset]


class _Glue(NamedTuple):
    text_columns: tuple[str, ...]
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]


_GLUE = {
    "cola": _Glue(("sentence",), ("unacceptable", "acceptable"), ("matthews", "accuracy")),
    "sst2": _Glue(("sentence",), ("negative", "positive"), ("accuracy",)),
    "mrpc": _Glue(("sentence1", "sentence2"), ("not_equivalent", "equivalent"), ("f1", "accuracy")),
    "stsb": _Glue(("sentence1", "sentence2"), (), ("spearman", "pearson")),
    "qqp": _Glue(("question1", "question2"), ("not_duplicate", "duplicate"), ("f1", "accuracy")),
    "mnli": _Glue(("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), ("accuracy",)),
    "qnli": _Glue(("question", "sentence"), ("entailment", "not_entailment"), ("accuracy",)),
    "rte": _Glue(("sentence1", "sentence2"), ("entailment", "not_entailment"), ("accuracy",)),
    "wnli": _Glue(("sentence1", "sentence2"), ("not_entailment", "entailment"), ("accuracy",)),
}
GLUE_TASKS = tuple(_GLUE)


def glue_text_columns(name: str) -> tuple[str, ...]:
    """What the text columns of a GLUE task are called."""
    if name not in _GLUE:
        raise AgwmError(f"{name!r} is not a GLUE task: there are {', '.join(_GLUE)}.")
    return _GLUE[name].text_columns


def glue_task(name: str, *, revision: str | None = None) -> Task:
    """A GLUE task from the hub; its validation split is reported, for the labels of its test split are secret.

    MNLI's matched validation split is "validation", the other one "validation_mismatched".

    Raises:
      AgwmError: unknown name, no network.

    Source: GLUE (arXiv 1804.07461), hub data set nyu-mll/glue.
    """
    text_columns, spec = glue_text_columns(name), _GLUE[name]
    splits = {"train": "train", "validation": "validation"}
    if name == "mnli":
        splits |= {"validation": "validation_matched", "validation_mismatched": "validation_mismatched"}
    task = hub_task(
        "nyu-mll/glue",
        name,
        text_columns=text_columns,
        label_column="label",
        label_names=spec.label_names or None,
        kind="classification" if spec.label_names else "regression",
        metrics=spec.metrics,
        splits=splits,
        report_split="validation",
        revision=revision,
    )
    return task._replace(name=name)


def _load_hub(path: str, name: str | None, revision: str | None) -> dict[str, datasets.Dataset]:
    what = f"The data set {path}" + (f" ({name})" if name else "")
    try:
        if Path(path).is_dir():  # nothing of a local folder is worth a copy in the user's cache
            with tempfile.TemporaryDirectory() as cache:
                loaded = datasets.load_dataset(path, name, cache_dir=cache, keep_in_memory=True)
        else:
            loaded = datasets.load_dataset(path, name, revision=revision)
    except ConnectionError as error:
        raise AgwmError(
            f"{what} is not in the local cache and the hub cannot be reached: connect to the network once "
            "(later runs use the cache), or give local files."
        ) from error
    except datasets.exceptions.DatasetNotFoundError as error:
        raise AgwmError(
            f"{what} is not on the hub at this name and revision, or needs a login (`hf auth login`)."
        ) from error
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise AgwmError(f"{what} cannot be loaded: {reason[:500]}") from error
    return dict(loaded)


def hub_task(
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    text_columns: str | Sequence[str],
    label_column: str = "label",
    kind: str = "classification",
    label_names: Sequence[str] | None = None,
    group_column: str | None = None,
    metrics: Sequence[str] | None = None,
    splits: Mapping[str, str] | None = None,
    report_split: str | None = None,
    revision: str | None = None,
) -> Task:
    """Any data set of the hub, or a local folder in the hub's layout, by a column mapping.

    Args:
      path, name, revision: as for `datasets.load_dataset`; name is the configuration. Code of a data set is never run.
      text_columns: one column, or two for pairs.
      label_names: the classes by number; default: those of the label column's type, else the sorted training labels.
      splits: our split name -> theirs. Default: train, validation and test as far as they are there; a test split whose
        labels are all -1 (kept secret) is left out.
      report_split: default test if it is there, else validation.

    Raises:
      AgwmError: no network, no such data set, configuration, split or column; labels that do not fit (with the row).
    """
    path, text_columns = os.fspath(path), columns.check_text_columns(text_columns)
    loaded = _load_hub(path, name, revision)
    mapping = splits or {split: split for split in ("train", "validation", "test") if split in loaded}
    tables = {}
    for ours, theirs in mapping.items():
        if theirs not in loaded:
            raise AgwmError(f"The data set {path} has no split {theirs!r}: its splits are {', '.join(loaded)}.")
        source = f"{path}, split {theirs}"
        wanted = [*text_columns, label_column, *([group_column] if group_column else [])]
        columns.check_columns(loaded[theirs].column_names, wanted, source)
        rows = loaded[theirs].select_columns(list(dict.fromkeys(wanted)))
        kinds = {key: kind for key, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)}
        class_names = {key: tuple(kind.names) for key, kind in kinds.items()}
        table = Table(source, "row", range(1, len(rows) + 1), rows.to_dict(), class_names)
        if splits is None and ours == "test" and set(table.columns[label_column]) == {-1}:
            continue
        tables[ours] = table
    return _task(
        Path(path).name if name is None else f"{Path(path).name}-{name}",
        tables,
        text_columns=text_columns,
        label_column=label_column,
        kind=kind,
        label_names=label_names,
        group_column=group_column,
        metrics=metrics,
        report_split=report_split,
    )


def local_task(
    files: Mapping[str, str | os.PathLike[str]],
    *,
    name: str = "local",
    text_columns: str | Sequence[str],
    label_column: str = "label",
    kind: str = "classification",
    label_names: Sequence[str] | None = None,
    group_column: str | None = None,
    metrics: Sequence[str] | None = None,
    report_split: str | None = None,
) -> Task:
    """A task from local files, the format by the extension: .jsonl, .csv, .tsv, .parquet (see `files.read_table`).

    The files are read anew at every call and nothing is cached, so an edited file is never mistaken for its old self.

    Args:
      files: split name -> file; "train", and "validation" or "test".
      text_columns: one column, or two for pairs.
      label_names: the classes by number. A label in a file is one of these names, or its number. Default: the distinct
        training labels, integers sorted by value, others by name.
      metrics: default accuracy and macro_f1, for regression spearman and pearson.
      report_split: default test if there is one, else validation.

    Raises:
      AgwmError: see `files.read_table`; two splits in one file; missing column, text or label; unknown label.
    """
    text_columns = columns.check_text_columns(text_columns)
    resolved: dict[Path, str] = {}
    for split, file in files.items():
        first = resolved.setdefault(Path(file).resolve(), split)
        if first != split:
            raise AgwmError(f"The splits {first!r} and {split!r} are the same file, {file}: scores would mean nothing.")
    return _task(
        name,
        {split: read_table(file) for split, file in files.items()},
        text_columns=text_columns,
        label_column=label_column,
        kind=kind,
        label_names=label_names,
        group_column=group_column,
        metrics=metrics,
        report_split=report_split,
    )


def read_labelled(
    file: str | os.PathLike[str], task: Task, *, text_columns: str | Sequence[str], label_column: str = "label"
) -> datasets.Dataset:
    """A labelled file as one more split of a task, with the task's classes, whatever labels it holds.

    Raises:
      AgwmError: see `local_task`.
    """
    names, table = columns.check_text_columns(text_columns), read_table(file)
    columns.check_columns(list(table.columns), [*names, label_column], table.source)
    return columns.labelled(table, names, label_column, kind=task.kind, label_names=task.label_names)


def _task(
    name: str,
    tables: dict[str, Table],
    *,
    text_columns: tuple[str, ...],
    kind: str,
    metrics: Sequence[str] | None,
    report_split: str | None,
    **options: Any,
) -> Task:
    if kind not in ("classification", "regression"):
        raise AgwmError(f"kind is {kind!r}: give classification or regression.")
    report = report_split or ("test" if "test" in tables else "validation")
    for split in ("train", report):
        if split not in tables:
            raise AgwmError(f"The task {name} has no {split!r} split: it has {', '.join(tables) or 'none'}.")
    if report == "train":
        raise AgwmError("report_split is 'train': a score on the training split would mean nothing.")
    splits, label_names = columns.normalise(tables, text_columns=text_columns, kind=kind, **options)
    default = ("accuracy", "macro_f1") if kind == "classification" else ("spearman", "pearson")
    return Task(name, kind, label_names, len(text_columns) == 2, tuple(metrics or default), report, splits)


def low_resource(task: Task, *, train_size: int, seed: int) -> Task:
    """The task with `train_size` training examples drawn at random, and a split "development" of a sixth as many.

    Both are drawn without replacement from the training split, the same for the same seed; the other splits stay whole.

    Raises:
      AgwmError: the training split is too small for both, or the draw has one class only.
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
    train = task.splits["train"].select(order[:train_size])
    development = task.splits["train"].select(order[train_size : train_size + development_size])
    source = f"{task.name}, draw of {train_size} training examples by seed {seed}"
    columns.check_training_labels(train["label"], task.kind, task.label_names, source)
    return task._replace(splits={**task.splits, "train": train, "development": development})


def drop_leaked(task: Task) -> Task:
    """The task without the training examples whose text occurs in another split, lower-cased, whitespace collapsed.

    Raises:
      AgwmError: nothing, or one class only, would be left.
    """

    def texts(split: datasets.Dataset) -> list[tuple[str, ...]]:
        names = [name for name in ("text", "text_pair") if name in split.column_names]
        return list(zip(*([" ".join(text.lower().split()) for text in split[name]] for name in names), strict=True))

    held_out = {text for name, split in task.splits.items() if name != "train" for text in texts(split)}
    train = task.splits["train"]
    kept = [index for index, text in enumerate(texts(train)) if text not in held_out]
    if not kept:
        raise AgwmError(f"Every training text of {task.name} occurs in another split: nothing is left to train on.")
    train = train.select(kept)
    columns.check_training_labels(train["label"], task.kind, task.label_names, f"{task.name} without leaked examples")
    return task._replace(splits={**task.splits, "train": train})
