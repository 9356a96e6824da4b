"""How values stand in a sentence, and the one form in which names and texts are compared."""

import unicodedata
from collections.abc import Collection


def normal_form(text: str) -> str:
    """The text with every accented letter as one character, which is how texts are compared."""
    return unicodedata.normalize("NFC", text)


def label_text(value: str | int | float) -> str:
    """A label as a text: as it stands in a file without types; elsewhere ``true``, ``3`` (also for 3.0), ``2.5``."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():  # pandas makes floats of integers
        value = int(value)
    return str(value)


def quoted(value: object, limit: int = 60) -> str:
    """A value for a sentence: in quotes where it is a text, cut where it is long."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 4]} ...{text[-1]}"


def listed(values: Collection[object], limit: int = 240) -> str:
    """Values for a sentence, as many as fit."""
    words, length = [], 0
    for value in values:
        words.append(quoted(value))
        length += len(words[-1]) + 2
        if length > limit and len(words) < len(values):
            return f"{', '.join(words)}, ... ({len(values)} in all)"
    return ", ".join(words)
