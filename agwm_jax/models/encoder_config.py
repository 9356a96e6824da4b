"""The configuration of encoders of BERT's layout: sizes and rates as in config.json, all faults in one message."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from agwm_jax.models.config import SIZES, LayeredConfig, find_faults, is_whole, refuse

_COUNTS = (*SIZES, "max_position_embeddings", "type_vocab_size")
_RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
_POSITIVE = ("initializer_range", "layer_norm_eps")
_REFUSED = ("is_decoder", "add_cross_attention")


@dataclasses.dataclass(frozen=True)
class EncoderConfig(LayeredConfig):
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
        missing = [name for name in SIZES if name not in values]
        faults = [f"{cls.file_names.get(name, name)} is missing" for name in missing] + cls.refused(values)
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        used: dict[str, Any] = {
            k: default if k in cls.lacks else values.get(k, default) for k, default in defaults.items()
        }
        faults += cls.faults({name: value for name, value in used.items() if name not in missing})
        refuse(faults)
        return cls(**used)

    @classmethod
    def refused(cls, values: Mapping[str, Any]) -> list[str]:
        """Variants that config.json asks for and that are not built here; a family adds its own."""
        faults = [f"{name} is true, which is not supported" for name in _REFUSED if values.get(name)]
        position = values.get("position_embedding_type", "absolute")
        if position not in ("absolute", None):
            faults.append(f"position_embedding_type is {position!r}, only 'absolute' is supported")
        return faults

    @classmethod
    def faults(cls, values: Mapping[str, Any]) -> list[str]:
        """What is wrong with values, of which some may be missing; a family adds its own."""
        values = {
            k: x for k, x in values.items() if k not in cls.lacks and (k != "classifier_dropout" or x is not None)
        }
        faults = find_faults(
            values,
            counts=_COUNTS,
            rates=_RATES,
            positive=_POSITIVE,
            activations=("hidden_act",),
            names=cls.file_names,
        )
        width, heads = values.get("hidden_size", 0), values.get("num_attention_heads", 0)
        if is_whole(width, at_least=1) and is_whole(heads, at_least=1) and width % heads:
            names = [cls.file_names.get(name, name) for name in ("hidden_size", "num_attention_heads")]
            faults.append(f"{names[0]} {width} is not a multiple of {names[1]} {heads}")
        return faults

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
        return super().faults(values) + find_faults(values, counts=("embedding_size",))

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
