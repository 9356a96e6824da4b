"""What configurations of all families share: usable values of config.json, and their faults in one message."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from agwm_jax.errors import AgwmError
from agwm_jax.models.layers import gelu

# Names as in Hugging Face's config.json. BERT's "gelu" is the exact one (erf), the other two the tanh approximation.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}

SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
"""What every config.json must say."""


class LayeredConfig:
    """What the library reads of the configuration of a model whose layers are stacked."""

    num_hidden_layers: int
    max_position_embeddings: int

    @property
    def max_length(self) -> int:
        """Longest text in tokens."""
        return self.max_position_embeddings

    @property
    def depth(self) -> int:
        """Layers that have weights of their own; they are applied `turns` times."""
        return self.num_hidden_layers

    @property
    def turns(self) -> int:
        """How often the layers are applied, one after the other."""
        return 1


def find_faults(
    values: Mapping[str, Any],
    *,
    counts: Iterable[str] = (),
    rates: Iterable[str] = (),
    positive: Iterable[str] = (),
    activations: Iterable[str] = (),
    names: Mapping[str, str] | None = None,
) -> list[str]:
    """What is wrong with values; those that are not there are not looked at.

    Args:
        values: by name.
        counts: names of whole numbers of at least 1.
        rates: of numbers in [0, 1).
        positive: of numbers above 0.
        activations: of keys of `ACTIVATIONS`.
        names: what a name is called in the file, where that is another.
    """
    kinds: tuple[tuple[Iterable[str], Callable[[Any], bool], str], ...] = (
        (counts, lambda x: is_whole(x, at_least=1), "expected a whole number of at least 1"),
        (rates, lambda x: is_number(x) and 0 <= x < 1, "expected a number in [0, 1)"),
        (positive, lambda x: is_number(x) and x > 0, "expected a number above 0"),
        (activations, lambda x: isinstance(x, str) and x in ACTIVATIONS, f"known are {', '.join(ACTIVATIONS)}"),
    )
    return [
        f"{(names or {}).get(name, name)} is {values[name]!r}, {expected}"
        for found, fits, expected in kinds
        for name in found
        if name in values and not fits(values[name])
    ]


def is_whole(value: Any, *, at_least: int) -> bool:
    """Whether it is an integer of at least that, and not a truth value."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def is_number(value: Any) -> bool:
    """Whether it is a number, and not a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def refuse(faults: list[str]) -> None:
    """Raise all of them in one message, if there are any.

    Raises:
        AgwmError: there are.
    """
    if faults:
        raise AgwmError("The model's configuration is not usable: " + "; ".join(faults) + ".")
