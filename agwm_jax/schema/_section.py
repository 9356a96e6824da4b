"""A group of settings, and what its checks are made of."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Strict
from pydantic_core import PydanticCustomError, ValidationError

# YAML has lists and no tuples, so a list is let in where a tuple is kept (a frozen setting must be hashable).
Names = Annotated[tuple[str, ...], Strict(False)]


class Section(BaseModel):
    """A group of settings: frozen, no unknown keys, no conversion between types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)


def one_fault(value: Any, handler) -> Any:
    """Turn pydantic's one-error-per-alternative of a union into a single error."""
    try:
        return handler(value)
    except ValidationError:
        raise PydanticCustomError("no_alternative", "no alternative fits") from None


def default_tag(name: str, tag: str) -> BeforeValidator:
    """Let a section that does not choose its kind have the default kind."""
    return BeforeValidator(lambda v: {name: tag, **v} if isinstance(v, dict) and name not in v else v)


def refuse(*cases: tuple[bool, str]) -> None:
    """Raise the cases that hold, faults between settings; each text starts with the name of the one to change."""
    faults = [text for holds, text in cases if holds]
    if faults:
        raise PydanticCustomError("cross_field", "{text}", {"text": "\n".join(faults)})
