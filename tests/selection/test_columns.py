"""Which column is what, guessed as a person would, or asked for in a sentence."""

import pytest

from agwm_jax import AgwmError
from agwm_jax.data.files import Table
from agwm_jax.selection.columns import Columns, guess_columns

LONG = [f"This is the text of ticket number {i}." for i in range(12)]
FEW = ["red", "blue", "green"] * 4
NUMBERS = [f"T-{i}" for i in range(12)]


def table(**columns):
    return Table("f.csv", "line", range(2, 14), columns, {})


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"text": LONG, "label": FEW}, Columns(("text",), "label", "classification")),
        ({"id": NUMBERS, "Body": LONG, "Category": FEW}, Columns(("Body",), "Category", "classification")),
        (
            {"id": NUMBERS, "what they wrote": LONG, "queue": FEW},
            Columns(("what they wrote",), "queue", "classification"),
        ),
        (
            {"premise": LONG, "hypothesis": LONG[::-1], "gold": FEW},
            Columns(("premise", "hypothesis"), "gold", "classification"),
        ),
        (
            {"text": LONG, "score": [f"{i / 4:.2f}" for i in range(1, 13)]},
            Columns(("text",), "score", "regression"),
        ),
        ({"text": LONG, "stars": ["1", "2", "3"] * 4}, Columns(("text",), "stars", "classification")),
    ],
)
def test_guesses(columns, expected):
    assert guess_columns(table(**columns)) == expected


def test_what_is_named_is_taken():
    columns = {"subject": LONG, "body": LONG[::-1], "label": FEW, "team": FEW[::-1]}
    assert guess_columns(table(**columns)) == Columns(("body",), "label", "classification")
    named = guess_columns(table(**columns), text=["subject", "body"], label="team")
    assert named == Columns(("subject", "body"), "team", "classification")
    with pytest.raises(AgwmError, match=r"f.csv has no column 'bodyy'.* did you mean 'body'"):
        guess_columns(table(**columns), text=["bodyy"])


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"body": LONG, "a": FEW, "b": FEW}, r"which column is the label\? .*'a', 'b' all could be"),
        ({"body": LONG, "id": NUMBERS}, r"which column is the label\? .*none looks like one"),
        ({"id": NUMBERS, "label": FEW}, r"which column holds the texts\?.* none has two words"),
        ({"text": LONG, "label": NUMBERS}, "'label' holds 12 different values in 12 rows, too many for classes"),
    ],
)
def test_what_cannot_be_guessed_is_asked_for(columns, sentence):
    with pytest.raises(AgwmError, match=sentence):
        guess_columns(table(**columns))
