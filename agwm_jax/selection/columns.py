"""Which columns of a table are the texts and the labels, where nobody says so."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from agwm_jax.data.columns import find_label_names, hint_at_scores
from agwm_jax.data.files import Table, check_columns
from agwm_jax.data.wording import listed
from agwm_jax.errors import AgwmError

_PAIRS = (
    ("text", "text_pair"),
    ("text_a", "text_b"),
    ("text1", "text2"),
    ("sentence1", "sentence2"),
    ("sentence", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "answer"),
    ("question", "sentence"),
    ("question", "passage"),
    ("query", "document"),
)
_TEXTS = ("text", "sentence", "content", "message", "body", "review", "comment", "tweet", "document", "question")
_LABELS = ("label", "labels", "class", "category", "intent", "topic", "target", "sentiment", "score", "rating", "y")


class Columns(NamedTuple):
    """What the columns of a labelled table are."""

    text: tuple[str, ...]
    """One, or two for pairs."""
    label: str
    kind: str
    """"classification" or "regression"."""


def guess_columns(table: Table, *, text: Sequence[str] = (), label: str | None = None) -> Columns:
    """The text and label columns by their names, else by what they hold: long texts, and few values that repeat.

    Args:
        table: of the file.
        text: the text columns where the user names them.
        label: the label column, likewise.

    Raises:
        AgwmError: no column, or more than one, looks like the texts or the labels; or a named one is missing.
    """
    names = list(table.columns)
    given = check_columns(names, [*text, *([label] if label else [])], table.source)
    text, label = tuple(given[: len(text)]), given[-1] if label else None
    label = label or _label(table, [name for name in names if name not in text])
    text = text or _text(table, [name for name in names if name != label])
    classes = find_label_names(table, label)
    kind = "regression" if hint_at_scores(classes) else "classification"
    if kind == "classification" and len(classes) > 2 and len(classes) > len(table.numbers) // 2:
        raise AgwmError(
            f"{table.source}: the column {label!r} holds {len(classes)} different values in {len(table.numbers)} rows, "
            "too many for classes; name the label column with --label."
        )
    return Columns(text, label, kind)


def _label(table: Table, names: Sequence[str]) -> str:
    known = _by_name(names, _LABELS)
    if known:
        return known[0]
    rows = len(table.numbers)
    few = [name for name in names if 2 <= len(set(map(str, table.columns[name]))) <= max(2, rows // 3)]
    if len(few) == 1:
        return few[0]
    found = f"{listed(few)} all could be" if few else "none looks like one"
    raise AgwmError(
        f"{table.source}: which column is the label? Its columns are {listed(list(table.columns))}; {found}. Name it "
        "with --label."
    )


def _text(table: Table, names: Sequence[str]) -> tuple[str, ...]:
    plain = {name.casefold(): name for name in names}
    for first, second in _PAIRS:
        if first in plain and second in plain:
            return plain[first], plain[second]
    texts = [name for name in names if all(isinstance(value, str | None) for value in table.columns[name])]
    known = _by_name(texts, _TEXTS)
    if known:
        return (known[0],)
    words = {name: _mean_words(table.columns[name]) for name in texts}
    best = max(words, key=lambda name: words[name], default=None)
    if best is None or words[best] < 2:
        raise AgwmError(
            f"{table.source}: which column holds the texts? Its columns are {listed(list(table.columns))}, and none "
            "has two words a row or more. Name it with --text."
        )
    return (best,)


def _by_name(names: Sequence[str], known: Sequence[str]) -> list[str]:
    plain = {name.casefold().strip(): name for name in names}
    return [plain[name] for name in known if name in plain]


def _mean_words(values: Sequence[Any]) -> float:
    return sum(len((value or "").split()) for value in values) / max(1, len(values))
