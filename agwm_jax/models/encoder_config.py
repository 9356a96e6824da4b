"""The configuration of encoders of BERT's layout: sizes and rates as in config.json, all faults in one message."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

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

_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_COUNTS = (*_SIZES, "max_position_embeddings", "type_vocab_size")
_RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
_POSITIVE = ("initializer_range", "layer_norm_eps")
_REFUSED = ("is_decoder", "add_cross_attention")


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Shape and rates of an encoder; names and meaning as in Hugging Face's config.json of a BERT."""

    file_names: ClassVar[Mapping[str, str]] = {}
    """Names that a family has for these in config.json, where they are others."""
    lacks: ClassVar[frozenset[str]] = frozenset()
    """What a family's config.json does not have: the default holds. Without `type_vocab_size` there are no types."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None  # None: as hidden_dropout_prob
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        refuse(self.faults(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "EncoderConfig":
        """Take what this model needs from the values of a config.json.

        Args:
            values: the parsed file; keys without a bearing on the forward pass are left alone.

        Raises:
            AgwmError: a size is missing or not usable, or the file asks for a variant that is not built here
                (decoder, cross attention, relative positions). All faults are in the one message.
        """
        values = {**values, **{ours: values[theirs] for ours, theirs in cls.file_names.items() if theirs in values}}
        missing = [name for name in _SIZES if name not in values]
        faults = [f"{cls.file_names.get(name, name)} is missing" for name in missing]
        faults += [f"{name} is true, which is not supported" for name in _REFUSED if values.get(name)]
        position = values.get("position_embedding_type", "absolute")
        if position not in ("absolute", None):
            faults.append(f"position_embedding_type is {position!r}, only 'absolute' is supported")
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        used: dict[str, Any] = {
            k: default if k in cls.lacks else values.get(k, default) for k, default in defaults.items()
        }
        faults += cls.faults({name: value for name, value in used.items() if name not in missing})
        refuse(faults)
        return cls(**used)

    @classmethod
    def faults(cls, values: Mapping[str, Any]) -> list[str]:
        """What is wrong with values, of which some may be missing; a family adds its own."""
        values = {
            k: x for k, x in values.items() if k not in cls.lacks and (k != "classifier_dropout" or x is not None)
        }
        faults = [
            f"{cls.file_names.get(name, name)} is {values[name]!r}, expected {expected}"
            for names, fits, expected in (
                (_COUNTS, lambda x: is_whole(x, at_least=1), "a whole number of at least 1"),
                (_RATES, lambda x: is_number(x) and 0 <= x < 1, "a number in [0, 1)"),
                (_POSITIVE, lambda x: is_number(x) and x > 0, "a number above 0"),
            )
            for name in names
            if name in values and not fits(values[name])
        ]
        if not isinstance(values["hidden_act"], str) or values["hidden_act"] not in ACTIVATIONS:
            name = cls.file_names.get("hidden_act", "hidden_act")
            faults.append(f"{name} is {values['hidden_act']!r}, known are {', '.join(ACTIVATIONS)}")
        width, heads = values.get("hidden_size", 0), values.get("num_attention_heads", 0)
        if is_whole(width, at_least=1) and is_whole(heads, at_least=1) and width % heads:
            names = [cls.file_names.get(name, name) for name in ("hidden_size", "num_attention_heads")]
            faults.append(f"{names[0]} {width} is not a multiple of {names[1]} {heads}")
        return faults

    @property
    def max_length(self) -> int:
        """Longest text in tokens."""
        return self.max_position_embeddings

    @property
    def embedding_width(self) -> int:
        """Of the tables; where it is not the hidden width, a dense layer leads from one to the other."""
        return self.hidden_size

    @property
    def projects(self) -> bool:
        """Whether there is that layer."""
        return self.embedding_width != self.hidden_size

    @property
    def feed_forward_dropout(self) -> float:
        """Rate after the feed-forward part of a layer."""
        return self.hidden_dropout_prob

    @property
    def depth(self) -> int:
        """Layers that have weights of their own; they are applied `turns` times."""
        return self.num_hidden_layers

    @property
    def turns(self) -> int:
        """How often the layers are applied, one after the other."""
        return 1

    @property
    def has_types(self) -> bool:
        """Whether there is a table of token types."""
        return "type_vocab_size" not in self.lacks

    @property
    def has_positions(self) -> bool:
        """Whether there is a table of positions."""
        return True

    @property
    def head_dropout(self) -> float:
        """Rate before the layers of the classifier."""
        return self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout

    def with_dropout(self, rate: float | None) -> "EncoderConfig":
        """The same configuration with all three dropout rates set to `rate`; None changes nothing."""
        if rate is None:
            return self
        return dataclasses.replace(
            self, hidden_dropout_prob=rate, attention_probs_dropout_prob=rate, classifier_dropout=rate
        )

    def with_attention_dropout(self, rate: float) -> "EncoderConfig":
        """The same configuration with the rate of attention's probabilities alone set; at 0 fused attention serves."""
        return dataclasses.replace(self, attention_probs_dropout_prob=rate)

    def to_dict(self) -> dict[str, Any]:
        """As config.json has it."""
        values = dataclasses.asdict(self)
        return {self.file_names.get(k, k): x for k, x in values.items() if x is not None and k not in self.lacks}


@dataclasses.dataclass(frozen=True)
class NarrowEmbeddingsConfig(EncoderConfig):
    """Of encoders whose tables may be narrower than the hidden state."""

    embedding_size: int = 128

    @classmethod
    def faults(cls, values: Mapping[str, Any]) -> list[str]:
        """What is wrong with values."""
        faults, size = super().faults(values), values["embedding_size"]
        if not is_whole(size, at_least=1):
            faults.append(f"embedding_size is {size!r}, expected a whole number of at least 1")
        return faults

    @property
    def embedding_width(self) -> int:
        """Of the tables."""
        return self.embedding_size


@dataclasses.dataclass(frozen=True)
class PaddedPositionsConfig(EncoderConfig):
    """Of encoders whose positions count real tokens, on from the row of padding."""

    pad_token_id: int = 1

    @classmethod
    def faults(cls, values: Mapping[str, Any]) -> list[str]:
        """What is wrong with values."""
        faults, padding = super().faults(values), values["pad_token_id"]
        if not is_whole(padding, at_least=0):
            return [*faults, f"pad_token_id is {padding!r}, expected a whole number of at least 0"]
        for name, least in (("vocab_size", padding + 1), ("max_position_embeddings", padding + 2)):
            if is_whole(values.get(name), at_least=1) and values[name] < least:
                faults.append(f"{name} is {values[name]}, expected at least {least} for pad_token_id {padding}")
        return faults

    @property
    def max_length(self) -> int:
        """Longest text in tokens."""
        return self.max_position_embeddings - self.pad_token_id - 1


def is_whole(value: Any, *, at_least: int) -> bool:
    """Whether it is an integer of at least that, and not a truth value."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def is_number(value: Any) -> bool:
    """Whether it is a number, and not a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def refuse(faults: list[str]) -> None:
    """Raise all of them in one message, if there are any."""
    if faults:
        raise AgwmError("The model's configuration is not usable: " + "; ".join(faults) + ".")
