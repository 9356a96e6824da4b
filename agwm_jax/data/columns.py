"""From a table with the user's column names and labels to a data set with columns text, text_pair, label and group."""

import difflib
import math
from collections.abc import Sequence
from typing import Any

import datasets

from agwm_jax.data.files import Table
from agwm_jax.errors import AgwmError


def check_columns(table_columns: Sequence[str], wanted: Sequence[str], source: str) -> None:
    """Raise unless every wanted column is there; the error lists those there and the nearest name."""
    for name in wanted:
        if name not in table_columns:
            near = difflib.get_close_matches(name, table_columns, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise AgwmError(
                f"{source} has no column {name!r}: its columns are {', '.join(map(repr, table_columns))}{hint}"
            )


def check_text_columns(text_columns: str | Sequence[str]) -> tuple[str, ...]:
    """One or two different column names as a tuple."""
    names = (text_columns,) if isinstance(text_columns, str) else tuple(text_columns)
    if len(names) not in (1, 2) or len(set(names)) != len(names):
        raise AgwmError(
            f"text_columns is {list(names)}: give one column (single sentences) or two different ones (pairs)."
        )
    return names


def texts(table: Table, text_columns: Sequence[str]) -> dict[str, list[str]]:
    """The columns text and, for pairs, text_pair; every value a string."""
    for column in text_columns:
        for row, value in enumerate(table.columns[column]):
            if value is None:
                raise AgwmError(f"{table.place(row)}: no text in column {column!r}; fill it in or leave the row out.")
            if not isinstance(value, str):
                raise AgwmError(f"{table.place(row)}: column {column!r} holds {value!r}, a text was expected.")
            try:
                value.encode()
            except UnicodeEncodeError:
                raise AgwmError(
                    f"{table.place(row)}: column {column!r} holds half of a character (a lone surrogate); repair it."
                ) from None
    return dict(zip(("text", "text_pair"), (table.columns[name] for name in text_columns), strict=False))


def _integer(value: Any) -> int | None:
    """The value as an integer if it is one, also as text or as a float (pandas makes floats of integers)."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if isinstance(value, str):
        try:
            return _integer(float(value))
        except ValueError:
            return None
    return None


def _name(value: Any) -> str:
    number = _integer(value) if isinstance(value, int | float) else None
    return value if isinstance(value, str) else str(value if number is None else number)


def _present(table: Table, column: str) -> list[Any]:
    for row, value in enumerate(table.columns[column]):
        if value is None or (isinstance(value, float) and math.isnan(value)):
            raise AgwmError(f"{table.place(row)}: no label in column {column!r}; fill it in or leave the row out.")
        if not isinstance(value, str | int | float):
            raise AgwmError(f"{table.place(row)}: the label is {value!r}, a number or a text was expected.")
    return table.columns[column]


def find_label_names(table: Table, column: str) -> tuple[str, ...]:
    """The class names that the column's type gives, or the distinct labels: integers by value, others by name."""
    if column in table.class_names:
        return table.class_names[column]
    values = _present(table, column)
    numbers = {number for number in map(_integer, values) if number is not None}
    if all(_integer(value) is not None for value in values):
        return tuple(str(number) for number in sorted(numbers))
    return tuple(sorted({_name(value) for value in values}))


def class_labels(table: Table, column: str, label_names: Sequence[str]) -> list[int]:
    """Class numbers: a label that is one of the names, or else the number of a name.

    Where all names are integers themselves ("1", "2"), a label is always a name, never a position.
    """
    positions = {name: index for index, name in enumerate(label_names)}
    by_name_only = all(_integer(name) is not None for name in label_names) and column not in table.class_names
    if by_name_only:
        positions = {str(_integer(name)): index for name, index in positions.items()}
    labels = []
    for row, value in enumerate(_present(table, column)):
        number = _integer(value)
        if by_name_only and number is not None:
            index = positions.get(str(number))
        else:
            index = positions.get(_name(value))
            if index is None and not by_name_only and number is not None and 0 <= number < len(label_names):
                index = number
        if index is None:
            raise AgwmError(
                f"{table.place(row)}: the label {value!r} is none of the {len(label_names)} classes "
                f"({', '.join(label_names[:20])}{', ...' if len(label_names) > 20 else ''})."
            )
        labels.append(index)
    return labels


def scores(table: Table, column: str) -> list[float]:
    """Regression labels as finite floats."""
    labels = []
    for row, value in enumerate(_present(table, column)):
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise AgwmError(f"{table.place(row)}: the label {value!r} is not a finite number, as regression needs.")
        labels.append(number)
    return labels


def labelled(
    table: Table, text_columns: Sequence[str], label_column: str, *, kind: str, label_names: Sequence[str]
) -> datasets.Dataset:
    """A data set with columns text, (text_pair) and label."""
    if kind == "regression":
        labels: list[Any] = scores(table, label_column)
    else:
        labels = class_labels(table, label_column, label_names)
    return datasets.Dataset.from_dict({**texts(table, text_columns), "label": labels})


def normalise(
    tables: dict[str, Table],
    *,
    text_columns: Sequence[str],
    label_column: str,
    kind: str,
    label_names: Sequence[str] | None,
    group_column: str | None,
) -> tuple[dict[str, datasets.Dataset], tuple[str, ...]]:
    """Data sets with columns text, (text_pair), label, (group), and the class names (none for regression).

    Raises:
      AgwmError: a column is missing, a text or label is missing or unusable, or the training labels are all the same.
    """
    for table in tables.values():
        wanted = [*text_columns, label_column, *([group_column] if group_column else [])]
        check_columns(list(table.columns), wanted, table.source)
    names: tuple[str, ...] = ()
    if kind == "classification":
        names = tuple(label_names) if label_names else find_label_names(tables["train"], label_column)
        if len(set(names)) != len(names):
            raise AgwmError(f"label_names holds a name twice: {', '.join(names)}.")
    splits = {}
    for split, table in tables.items():
        splits[split] = labelled(table, text_columns, label_column, kind=kind, label_names=names)
        if group_column:
            splits[split] = splits[split].add_column("group", [str(value) for value in table.columns[group_column]])
    check_training_labels(splits["train"]["label"], kind, names, tables["train"].source)
    return splits, names


def check_training_labels(labels: Sequence[int | float], kind: str, label_names: Sequence[str], source: str) -> None:
    """Raise where there is nothing to learn: one class, or one score, only."""
    distinct = set(labels)
    if len(distinct) == 1:
        only = distinct.pop()
        if kind == "regression":
            raise AgwmError(
                f"{source}: all {len(labels)} training labels are {only}; two different scores or more are needed."
            )
        raise AgwmError(
            f"{source}: all {len(labels)} training rows are of the class {label_names[int(only)]!r}; "
            "rows of two classes or more are needed."
        )
