"""From a table with the user's column names and labels to a data set with columns text, text_pair, label and group."""

import math
import os
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import datasets

from agwm_jax.data.files import Table, check_columns, read_table
from agwm_jax.data.tasks import Task
from agwm_jax.data.wording import label_text, listed, normal_form, quoted
from agwm_jax.errors import AgwmError

# Narrower than int() and float(), which take underscores and the digits of other scripts.
_INTEGER = re.compile(r"-?[0-9]+")
_INDEX = re.compile(r"0|[1-9][0-9]*")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_MANY_DECIMALS = 10


def texts(table: Table, text_columns: Sequence[str]) -> dict[str, list[str]]:
    """The columns text and, for pairs, text_pair; every value a string."""
    found = check_columns(list(table.columns), text_columns, table.source)
    for column in found:
        for row, value in enumerate(table.columns[column]):
            if value is None:
                raise AgwmError(f"{table.place(row)}: no text in column {column!r}; fill it in or leave the row out.")
            if not isinstance(value, str):
                raise AgwmError(f"{table.place(row)}: column {column!r} holds {quoted(value)}, a text was expected.")
            try:
                value.encode()
            except UnicodeEncodeError:
                raise AgwmError(
                    f"{table.place(row)}: column {column!r} holds half of a character (a lone surrogate); repair it."
                ) from None
    return dict(zip(("text", "text_pair"), (table.columns[name] for name in found), strict=False))


def _present(table: Table, column: str) -> list[Any]:
    for row, value in enumerate(table.columns[column]):
        if value is None or (isinstance(value, float) and math.isnan(value)):
            raise AgwmError(f"{table.place(row)}: no label in column {column!r}; fill it in or leave the row out.")
        if not isinstance(value, str | int | float):
            raise AgwmError(f"{table.place(row)}: the label is {quoted(value)}, a number or a text was expected.")
    return table.columns[column]


def find_label_names(table: Table, column: str) -> tuple[str, ...]:
    """The class names that the column's type gives, or the distinct labels: integers by value, others by name.

    A label of a file without types is the text that stands there ("0110" is not "110"); one text in two Unicode forms
    is one class. Names that differ in spaces or case alone are warned about.
    """
    if column in table.class_names:
        return table.class_names[column]
    found: dict[str, str] = {}
    for text in map(label_text, _present(table, column)):
        found.setdefault(normal_form(text), text)
    integers = all(map(_INTEGER.fullmatch, found))
    names = tuple(found[form] for form in sorted(found, key=lambda form: (int(form) if integers else 0, form)))
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(_plain(name), []).append(name)
    for group in alike.values():
        if len(group) > 1:
            warnings.warn(
                f"{table.source}: the classes {listed(group)} differ in spaces or case alone; are they one?",
                stacklevel=2,
            )
    return names


def _plain(text: str) -> str:
    return " ".join(normal_form(text).split()).casefold()


def _class_of(table: Table, column: str, label_names: Sequence[str]) -> Callable[[Any], int | None]:
    """``class_of(label) -> number``: of the class of that name, or else the label itself where it may be a number.

    Where all names are integers themselves ("1", "2"), a label is always a name, never a number. A column whose type
    names its classes holds numbers of those names.
    """
    own = table.class_names.get(column)
    by_name = {normal_form(name): index for index, name in enumerate(label_names)}
    booleans = {name.lower(): index for name, index in by_name.items() if name.lower() in ("true", "false")}
    numbered = own is not None or not all(map(_INTEGER.fullmatch, by_name))

    def class_of(value: Any) -> int | None:
        number = int(value) if _INDEX.fullmatch(label_text(value)) or isinstance(value, bool) else None
        if own is not None and number is not None:
            value = own[number] if 0 <= number < len(own) else value
        text = normal_form(label_text(value))
        if text in by_name:
            return by_name[text]
        if text.lower() in booleans:  # JSON writes true, Python True
            return booleans[text.lower()]
        return number if numbered and number is not None and 0 <= number < len(label_names) else None

    return class_of


def class_labels(table: Table, column: str, label_names: Sequence[str]) -> list[int]:
    """Class numbers of a column's labels.

    Raises:
      AgwmError: a label is none of the classes.
    """
    class_of = _class_of(table, column, label_names)
    labels = []
    for row, value in enumerate(_present(table, column)):
        index = class_of(value)
        if index is None:
            alike = [name for name in label_names if _plain(name) == _plain(label_text(value))]
            hint = f"; {listed(alike)} differs in spaces or case alone" if alike else hint_at_scores(label_names)
            raise AgwmError(
                f"{table.place(row)}: the label {quoted(value)} is none of the {len(label_names)} classes "
                f"({listed(label_names)}){hint}."
            )
        labels.append(index)
    return labels


def hint_at_scores(label_names: Sequence[str]) -> str:
    """What to add where many classes are decimal numbers."""
    numbers = all(map(_NUMBER.fullmatch, label_names)) and not all(map(_INTEGER.fullmatch, label_names))
    if not numbers or len(label_names) <= _MANY_DECIMALS:
        return ""
    return "; these are decimal numbers: set task.kind to regression if they are scores"


def scores(table: Table, column: str) -> list[float]:
    """Regression labels as finite floats."""
    labels = []
    for row, value in enumerate(_present(table, column)):
        if not _NUMBER.fullmatch(label_text(value).strip()):
            raise AgwmError(
                f"{table.place(row)}: the label {quoted(value)} is no finite number (such as 2.5), as regression needs."
            )
        labels.append(float(value))
    return labels


def labelled(
    table: Table, text_columns: Sequence[str], label_column: str, *, kind: str, label_names: Sequence[str]
) -> datasets.Dataset:
    """A data set with columns text, (text_pair) and label."""
    (column,) = check_columns(list(table.columns), (label_column,), table.source)
    labels: list[Any] = scores(table, column) if kind == "regression" else class_labels(table, column, label_names)
    return datasets.Dataset.from_dict({**texts(table, text_columns), "label": labels})


def read_labelled(
    file: str | os.PathLike[str],
    task: Task,
    *,
    text_columns: Sequence[str],
    label_column: str = "label",
    separator: str = ",",
) -> datasets.Dataset:
    """A labelled file as one more split of a task, with the task's classes, whatever labels it holds.

    Raises:
      AgwmError: see `files.read_table`; a column, text or label is missing, a label is none of the classes.
    """
    table = read_table(file, separator=separator)
    return labelled(table, text_columns, label_column, kind=task.kind, label_names=task.label_names)
