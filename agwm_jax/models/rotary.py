"""Rotary positions: the angles that queries and keys are turned by, as config.json asks for them."""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

Kind = Literal["default", "linear", "llama3"]


class Rope(NamedTuple):
    """Settings of rotary positions."""

    theta: float
    """Base of the frequencies ``theta^(-2i / e)``."""
    kind: str = "default"
    """``linear``: all frequencies over `factor`; ``llama3``: slow ones over `factor`, fast ones as they are."""
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def to_dict(self) -> dict[str, Any]:
        """As ``rope_parameters`` has it."""
        values: dict[str, Any] = {"rope_type": self.kind, "rope_theta": self.theta}
        if self.kind != "default":
            values["factor"] = self.factor
        if self.kind == "llama3":
            values |= {name: getattr(self, name) for name in self._fields[3:]}
        return values


def read_rope(values: Mapping[str, Any], default_theta: float) -> tuple[Rope, list[str]]:
    """What config.json says, in today's form (`rope_parameters`) or the older one (`rope_theta`, `rope_scaling`), and
    what is wrong with it."""
    given = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        return Rope(default_theta), [f"rope_parameters is {given!r}, expected an object"]
    kind = given.get("rope_type", given.get("type", "default"))
    numbers: dict[str, Any] = {"theta": given.get("rope_theta", values.get("rope_theta", default_theta))}
    if kind != "default":
        names = Rope._fields[2:] if kind == "llama3" else ("factor",)
        numbers |= {name: given.get(name, Rope._field_defaults[name]) for name in names}
    faults = [
        f"rope_parameters: {name} is {x!r}, expected a number above 0"
        for name, x in numbers.items()
        if isinstance(x, bool) or not isinstance(x, int | float) or not x > 0
    ]
    if kind not in get_args(Kind):
        faults.append(f"rope_parameters: rope_type is {kind!r}, known are {', '.join(get_args(Kind))}")
    if given.get("partial_rotary_factor", 1) != 1:
        faults.append("rope_parameters: partial_rotary_factor is not supported")
    return Rope(kind=kind, **numbers), faults


def turns(
    rope: Rope, length: int, width: int, dtype: DTypeLike
) -> tuple[Float[np.ndarray, "t e"], Float[np.ndarray, "t e"]]:
    """Cosine and sine of the angle of every position and component of a head.

    Frequencies and angles are rounded to `dtype` as they are by other implementations, so that far positions are the
    same there and here. Source: Su et al., arXiv 2104.09864; ``llama3`` as in Hugging Face's modeling_rope_utils.

    Args:
        rope: settings.
        length: t.
        width: e, of a head; even.
        dtype: of the result.
    """
    kind = np.dtype(dtype)
    frequencies = 1.0 / rope.theta ** (np.arange(0, width, 2, dtype=np.float64) / width)
    if rope.kind == "linear":
        frequencies = frequencies / rope.factor
    if rope.kind == "llama3":
        waves, span = 2 * math.pi / frequencies, rope.original_max_position_embeddings
        slow, fast = waves > span / rope.low_freq_factor, waves < span / rope.high_freq_factor
        share = (span / waves - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        between = (1 - share) * frequencies / rope.factor + share * frequencies
        frequencies = np.where(slow, frequencies / rope.factor, np.where(fast, frequencies, between))
    angles = np.arange(length, dtype=kind)[:, None] * frequencies.astype(kind)[None]
    both = np.concatenate([angles, angles], axis=-1).astype(np.float64)
    return np.cos(both).astype(kind), np.sin(both).astype(kind)


def turn(x: Float[Array, "b t h e"], cosine: Float[Array, "t e"], sine: Float[Array, "t e"]) -> Float[Array, "b t h e"]:
    """The heads turned by the angles of their positions; component i makes a plane with component i + e/2."""
    wide = x.astype(cosine.dtype)
    first, second = jnp.split(wide, 2, axis=-1)
    across = jnp.concatenate([-second, first], axis=-1)
    return (wide * cosine[None, :, None] + across * sine[None, :, None]).astype(x.dtype)
