"""A task out of texts and labels that are in memory already."""

from collections.abc import Iterable, Mapping
from typing import Any

from agwm_jax.data.files import Table
from agwm_jax.data.sources.base import TableSource
from agwm_jax.data.tasks import Task
from agwm_jax.errors import AgwmError


def as_task(data: Any) -> Task:
    """The task that `data` stands for.

    Args:
        data: a `Task`; or ``(texts, labels)``, the training split; or a mapping from "train" and the names of other
            splits to such pairs. Texts are strings, or pairs of strings. Labels are numbers or names of classes; where
            they are floats, the task is a regression.

    Raises:
        AgwmError: no training split, not one label for each text, or an unusable text or label (with its row).
    """
    if isinstance(data, Task):
        return data
    splits = data if isinstance(data, Mapping) else {"train": data}
    if "train" not in splits:
        raise AgwmError(f"the data have the splits {', '.join(map(str, splits)) or 'none'}: give one named train.")
    tables = {name: _table(name, split) for name, split in splits.items()}
    labels = tables["train"].columns["label"]
    regression = bool(labels) and all(isinstance(label, float) for label in labels)
    names = ("text", "text_pair") if "text_pair" in tables["train"].columns else ("text",)
    layout = TableSource(
        source="memory",
        text_columns=names,
        kind="regression" if regression else "classification",
        report_split="test" if "test" in splits else "validation",
    )
    return layout.task("memory", tables)


def _table(name: str, split: Any) -> Table:
    try:
        texts, labels = (_plain(column) for column in split)
    except (TypeError, ValueError):
        raise AgwmError(f"split {name} is no pair (texts, labels), one label for each text.") from None
    if len(texts) != len(labels):
        raise AgwmError(f"split {name} has {len(texts)} texts and {len(labels)} labels: give one label for each text.")
    pair = bool(texts) and not isinstance(texts[0], str)
    columns: dict[str, list[Any]] = {"text": texts, "label": labels}
    if pair:
        odd = [row for row, text in enumerate(texts) if not isinstance(text, list | tuple) or len(text) != 2]
        if odd:
            raise AgwmError(
                f"split {name}, row {odd[0] + 1}: {texts[odd[0]]!r} is no pair of texts, as the first row is."
            )
        columns |= {"text": [text[0] for text in texts], "text_pair": [text[1] for text in texts]}
    return Table(f"split {name}", "row", range(1, len(texts) + 1), columns, {})


def _plain(column: Iterable[Any]) -> list[Any]:
    """Values of a column without the types of NumPy."""
    return [value.item() if hasattr(value, "item") else value for value in column]
