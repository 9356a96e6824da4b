"""The exceptions that stand for a user's mistake, and the hint at the nearest name in their sentences."""

import difflib
from collections.abc import Iterable


class AgwmError(ValueError):
    """A mistake the user can fix; its text says what is wrong, where, what was expected and how to put it right.

    The command line prints the text alone and ends with exit code 2; it never shows a traceback for it.
    """


class Diverged(AgwmError):
    """A loss is not finite any longer: of a run, of all that went side by side, or of some seeds."""


def nearest(value: object, known: Iterable[str]) -> str | None:
    """The known name that `value` is most like, if it is like one."""
    return next(iter(difflib.get_close_matches(str(value), list(known), n=1)), None)


def did_you_mean(value: object, known: Iterable[str]) -> str:
    """The end of a sentence: ``; did you mean X?`` with the nearest known name, or nothing."""
    name = nearest(value, known)
    return f"; did you mean {name}?" if name else ""
