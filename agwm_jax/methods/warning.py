"""What a failure signature of a method is; free of jax, so that a report may read it."""

from typing import NamedTuple


class MethodWarning(NamedTuple):
    """A failure signature: a short fixed `name` to search for, a `message` that says what was seen and what to do."""

    name: str
    message: str
