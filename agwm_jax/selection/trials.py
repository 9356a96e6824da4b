"""What is tried: every method at the same few learning rates, its passes by the size of the data."""

import math
import re
from collections.abc import Sequence

from agwm_jax.errors import AgwmError
from agwm_jax.methods.interface import METHODS

BASE_RATE = 2e-5
"""The default of `finetune.optimizer`; a factor multiplies it, and each method's own rate alike."""
METHODS_TRIED = ("probe", "vanilla", "lp_ft", "agwm")
_MIN_STEPS = 60
_WIDTHS = (1.0, 3.0, 1 / 3)
_UNITS = {"": 1, "s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600}


def rates(method: str, factor: float) -> list[str]:
    """Overrides that multiply every learning rate of model weights by a factor."""
    fields = METHODS[method].value.model_fields
    words = ["--finetune.optimizer.learning_rate", repr(BASE_RATE * factor)]
    if "learning_rate" in fields:
        words += ["--method.learning_rate", repr(fields["learning_rate"].default * factor)]
    first = {"search": "search.inner", "first": "first.optimizer"}
    for name in first.keys() & fields.keys():
        words += [f"--method.{first[name]}.learning_rate", repr(BASE_RATE * factor)]
    return words


def factors(hidden_size: int) -> tuple[float, ...]:
    """Of the default rates, in the order of trial: smaller encoders want larger rates.

    At 384 they are 5, 15 and 1.7 (peak rates of 1e-4, 3e-4 and 3.3e-5), and in inverse proportion to the width.
    """
    return tuple(5 * 384 / hidden_size * width for width in _WIDTHS)


def passes(num_examples: int, batch_size: int) -> int:
    """Over the training set: five (three from 2,000 examples on), and not fewer than 60 steps in all."""
    steps = math.ceil(num_examples / batch_size)
    return max(5 if num_examples < 2000 else 3, math.ceil(_MIN_STEPS / steps))


def all_methods() -> tuple[str, ...]:
    """Names of all methods that can be compared on folds by their default settings."""
    return tuple(name for name in METHODS if _trains(name) and not METHODS[name].value().reads)


def check_methods(names: Sequence[str]) -> None:
    """Raise AgwmError where one is unknown, given twice, or trains nothing that could be exported."""
    for name in names:
        if not _trains(name):
            raise AgwmError(f"--methods: {name} trains nothing, so there is no model of its own; leave it out")
    if len(set(names)) < len(names):
        raise AgwmError(f"--methods {' '.join(names)}: one is given twice")


def _trains(name: str) -> bool:
    return METHODS[name].facts["cost"] != "0"


def seconds_of(text: str) -> float:
    """A duration such as 90s, 10min, 1.5h, or seconds as a number.

    Raises:
        AgwmError: it is none.
    """
    found = re.fullmatch(r"\s*([0-9]+\.?[0-9]*)\s*([a-z]*)\s*", text)
    if found is None or found[2] not in _UNITS or not float(found[1]):
        raise AgwmError(f"--budget: got {text!r}; allowed: a time such as 90s, 10min or 1h, or none")
    return float(found[1]) * _UNITS[found[2]]
