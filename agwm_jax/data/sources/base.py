"""What a source of tasks is, where they are registered, and what those that read tables have in common.

Settings are read without the libraries that read data: a source imports those in its `load`.
"""

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Strict, model_validator

from agwm_jax import metrics
from agwm_jax.data.tasks import Task, check_training_labels
from agwm_jax.data.wording import label_text, listed, normal_form
from agwm_jax.errors import AgwmError
from agwm_jax.registry import Registry
from agwm_jax.section import Names, Section, refuse

if TYPE_CHECKING:
    from agwm_jax.data.draws import Rows
    from agwm_jax.data.files import Table


class TaskSource(Section):
    """The base of a source's settings; the file that holds them registers them in `TASK_SOURCES`."""

    source: str
    train_size: int | None = Field(
        default=None,
        ge=2,
        description="low-resource draw: this many training examples by run.seed, null for all of them",
    )
    separator: Literal[",", ";", "\t", "|"] = Field(
        default=",", description="what stands between the fields of .csv files"
    )

    def load(self) -> Task:
        """The whole task, before any draw.

        Raises:
            AgwmError: the data are missing or unusable.
        """
        raise TypeError(f"{type(self).__name__} defines no load()")

    def rows(self, task: Task, seed: int) -> "Rows":
        """The rows of the training split that a seed draws; empty where it trains on all of them.

        Raises:
            AgwmError: there are too few.
        """
        from agwm_jax.data.draws import low_resource_rows

        return {} if self.train_size is None else low_resource_rows(task, seed, train_size=self.train_size)

    def columns(self) -> tuple[tuple[str, ...], str]:
        """What the text columns and the label column are called in files for this task."""
        return ("text",), "label"

    def data_files(self) -> tuple[str, ...]:
        """The user's own files that `load` reads."""
        return ()

    def digests(self) -> dict[str, str]:
        """SHA-256 of the user's own files that `load` reads, by path: a corrected file has another.

        Raises:
            AgwmError: a file is missing or cannot be read.
        """
        return file_digests(self.data_files())


def file_digests(paths: Iterable[str]) -> dict[str, str]:
    """SHA-256 of files, by path.

    Raises:
        AgwmError: a file is missing or cannot be read.
    """
    found = {}
    for path in paths:
        try:
            with open(path, "rb") as file:
                found[path] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise AgwmError(f"{path} cannot be read: {error.strerror}.") from None
    return found


TASK_SOURCES: Registry[type[TaskSource]] = Registry("task source", "task_sources", "agwm_jax.data.sources")


def _texts(value: Any) -> Any:
    """Class names as texts: YAML reads true, 1 and 1.5 as such, and so may a label be written in the data."""
    if not isinstance(value, list | tuple):
        return value
    return tuple(label_text(x) if isinstance(x, bool | int | float) else x for x in value)


class TableSource(TaskSource):
    """What sources of tables have in common: which column is what."""

    text_columns: Names = Field(
        default=("text",), min_length=1, max_length=2, description="the text column, or two for pairs"
    )
    label_column: str = Field(default="label", min_length=1, description="column of the class or the score")
    kind: Literal["classification", "regression"] = Field(default="classification", description="what the label is")
    label_names: Annotated[tuple[str, ...], Strict(False), BeforeValidator(_texts)] | None = Field(
        default=None, min_length=2, description="class names in order; null: as the data says"
    )
    group_column: str | None = Field(default=None, description="column to break the scores down by")
    metrics: Names | None = Field(
        default=None,
        min_length=1,
        description="scores, main one first; null: accuracy and macro_f1, or spearman and pearson",
    )
    report_split: Literal["validation", "test"] = Field(
        default="validation", description="split whose score is the result"
    )

    @model_validator(mode="after")
    def _kind_fits(self):
        names = [normal_form(name) for name in self.label_names or ()]
        twice = {name for name in names if names.count(name) > 1}
        refuse(
            (self.kind == "regression" and bool(names), "label_names: a regression has no classes; remove it"),
            (bool(twice), f"label_names: holds {listed(twice)} more than once"),
            (len(set(self.text_columns)) < len(self.text_columns), "text_columns: a pair needs two different columns"),
        )
        try:
            metrics.check(self.metrics or (), kind=self.kind)
        except AgwmError as error:
            refuse((True, f"metrics: {error}"))
        return self

    def columns(self) -> tuple[tuple[str, ...], str]:
        return self.text_columns, self.label_column

    def task(self, name: str, tables: "Mapping[str, Table]") -> Task:
        """The task that tables hold, "train" and the reported split among them.

        Raises:
            AgwmError: a column is missing, a text or a label is missing or unusable (with its line), or all training
                labels are the same.
        """
        from agwm_jax.data.columns import find_label_names, hint_at_scores, labelled
        from agwm_jax.data.files import check_columns

        train, names = tables["train"], self.label_names or ()
        if self.kind == "classification" and not names:
            (column,) = check_columns(list(train.columns), (self.label_column,), train.source)
            names = find_label_names(train, column)
        splits = {}
        for split, table in tables.items():
            rows = labelled(table, self.text_columns, self.label_column, kind=self.kind, label_names=names)
            if self.group_column:
                (column,) = check_columns(list(table.columns), (self.group_column,), table.source)
                rows = rows.add_column("group", [normal_form(str(value)) for value in table.columns[column]])
            splits[split] = rows
        check_training_labels(splits["train"]["label"], self.kind, names, train.source)
        if not self.label_names and hint_at_scores(names):
            warnings.warn(f"{train.source}: {len(names)} classes{hint_at_scores(names)}.", stacklevel=2)
        default = ("accuracy", "macro_f1") if self.kind == "classification" else ("spearman", "pearson")
        pair = len(self.text_columns) == 2
        return Task(name, self.kind, names, pair, self.metrics or default, self.report_split, splits)


def files_below(folder: str) -> tuple[str, ...]:
    """All files of a folder, sorted."""
    return tuple(str(path) for path in sorted(Path(folder).rglob("*")) if path.is_file())
