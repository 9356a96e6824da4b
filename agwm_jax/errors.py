"""The one exception that stands for a user's mistake."""


class AgwmError(ValueError):
    """A mistake the user can fix; its text says what is wrong, where, what was expected and how to put it right.

    The command line prints the text alone and ends with exit code 2; it never shows a traceback for it.
    """


class Diverged(AgwmError):
    """A loss is not finite any longer: of a run, of all that went side by side, or of some seeds."""
