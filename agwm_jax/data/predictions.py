"""Texts to label in, the same rows with their predictions out."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np

from agwm_jax.data import columns
from agwm_jax.data.files import read_table, write_table
from agwm_jax.errors import AgwmError


class Texts(NamedTuple):
    """Texts to label.

    Attributes:
      split: a data set with columns text and, for pairs, text_pair.
      columns: all columns of the file as they were, for `write_predictions`.
    """

    split: datasets.Dataset
    columns: dict[str, list[Any]]


def read_texts(file: str | os.PathLike[str], *, text_columns: Sequence[str], separator: str = ",") -> Texts:
    """Texts to label from a file; all its columns are kept for `write_predictions`.

    Raises:
      AgwmError: see `files.read_table`; a column or a text is missing.
    """
    table = read_table(file, separator=separator)
    return Texts(datasets.Dataset.from_dict(columns.texts(table, text_columns)), table.columns)


def write_predictions(
    file: str | os.PathLike[str],
    texts: Texts,
    *,
    predictions: Sequence[str] | Sequence[float],
    probabilities: Any = None,
    label_names: Sequence[str] = (),
) -> None:
    """Write the columns read by `read_texts`, then `prediction` and a column `probability_<class>` for each class.

    Args:
      file: the extension gives the format.
      predictions: [n] class names, or scores for regression.
      probabilities: [n, c], None for regression.

    Raises:
      AgwmError: a column of this name is in the file already, or the file cannot be written.
    """
    added: dict[str, list[Any]] = {"prediction": list(np.asarray(predictions).tolist())}
    if probabilities is not None:
        for name, column in zip(label_names, np.asarray(probabilities, np.float64).T, strict=True):
            added[f"probability_{name}"] = [round(value, 6) for value in column.tolist()]
    taken = [name for name in added if name in texts.columns]
    if taken:
        raise AgwmError(
            f"The texts already have the column {', '.join(map(repr, taken))}: rename it, it would be overwritten."
        )
    write_table(file, {**texts.columns, **added})
