"""A group of settings, a choice between registered groups, and what their checks are made of."""

import inspect
import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, Strict, create_model, model_validator
from pydantic_core import PydanticCustomError, ValidationError, core_schema

from agwm_jax.errors import AgwmError
from agwm_jax.registry import Registry

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


def refuse(*cases: tuple[bool, str]) -> None:
    """Raise the cases that hold, faults between settings; each text starts with the name of the one to change."""
    faults = [text for holds, text in cases if holds]
    if faults:
        raise PydanticCustomError("cross_field", "{text}", {"text": "\n".join(faults)})


class Located:
    """Marks a text as a path: relative to the config that says it (an override: to the working directory).

    `load_config` makes it absolute, so that it is found from anywhere. With `or_name` the text may be a name instead: it is
    a path where it starts as one (``./``, ``../``, ``~``, ``/``) or where such a folder exists.
    """

    def __init__(self, *, or_name: bool = False):
        """A path and nothing else by default."""
        self.or_name = or_name

    def absolute(self, text: str, folder: Path) -> str:
        """The text, or the absolute path that it means in a config of `folder`."""
        path = os.path.abspath(folder / os.path.expanduser(text))
        says_so = text.startswith(("./", "../", "~", "/")) or text in (".", "..")
        return path if text and (says_so or not self.or_name or os.path.isdir(path)) else text


FilePath = Annotated[str, Field(min_length=1), Located()]
FolderOrName = Annotated[str, Field(min_length=1), Located(or_name=True)]


class Choice:
    """A field that holds the settings of one registered thing, which the key ``name`` chooses.

    Used as ``Annotated[Section, Choice(REGISTRY, default="...")]``. What may be chosen is looked up when settings are
    read, so that things registered from outside the package can be chosen too. A registered factory that is no
    `Section` gets one made of its signature and docstring (`section_of`).
    """

    def __init__(self, registry: Registry[Any], *, default: str):
        """`default` is chosen where ``name`` is left out."""
        self.registry, self.default = registry, default

    def sections(self) -> dict[str, type[Section]]:
        """The settings of everything that may be chosen, by name."""
        return {name: self.section(name) for name in self.registry}

    def section(self, name: str) -> type[Section]:
        """The settings of one of them."""
        value = self.registry[name].value
        return value if isinstance(value, type) and issubclass(value, Section) else section_of(value, name)

    def validate(self, value: Any) -> Section:
        """The settings out of a mapping; pydantic puts the field's path before what is wrong in it."""
        if isinstance(value, Section):
            return value
        if not isinstance(value, dict):
            raise PydanticCustomError("choice_type", "a section", {})
        name = value.get("name", self.default)
        if name not in self.registry:
            raise PydanticCustomError("choice_unknown", "unknown", {"got": name, "allowed": list(self.registry)})
        return self.section(name).model_validate({**value, "name": name})

    def __get_pydantic_core_schema__(self, source, handler):
        """For pydantic."""
        del source, handler
        return core_schema.no_info_plain_validator_function(
            self.validate,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda section, info: section.model_dump(mode=info.mode), info_arg=True
            ),
        )


@cache
def section_of(factory: Callable[..., Any], name: str) -> type[Section]:
    """Settings with the keyword-only parameters of a factory: their types, defaults and docstring entries.

    A parameter whose annotation carries a `Registry` (``Annotated[LinearSolver, SOLVERS]``) is a choice from it. The
    settings' ``build()`` calls the factory; reading them does too, so that what it refuses is refused then.
    """
    hints = get_type_hints(factory, include_extras=True)
    words = _parameter_words(factory)
    fields: dict[str, Any] = {"name": (Literal[name], Field(description="which one"))}  # type: ignore[valid-type]
    for parameter in inspect.signature(factory).parameters.values():
        annotation, default = hints[parameter.name], parameter.default
        registry = next((x for x in getattr(annotation, "__metadata__", ()) if isinstance(x, Registry)), None)
        if registry is not None:
            chosen = next(iter(registry)) if default is parameter.empty else default
            annotation, default = Annotated[Section, Choice(registry, default=chosen)], {}
        options: dict[str, Any] = {} if default is parameter.empty else {"default": default}
        fields[parameter.name] = (annotation, Field(description=words.get(parameter.name, ""), **options))
    section: Any = create_model(f"{name}_settings", __base__=_Derived, __doc__=factory.__doc__, **fields)
    section.factory = staticmethod(factory)
    return section


class _Derived(Section):
    """What `section_of` makes."""

    factory: ClassVar[Callable[..., Any]]

    def build(self) -> Any:
        """What the factory makes of these settings."""
        values = {name: getattr(self, name) for name in type(self).model_fields if name != "name"}
        return type(self).factory(**{n: v.build() if isinstance(v, _Derived) else v for n, v in values.items()})

    @model_validator(mode="after")
    def _accepted_by_the_factory(self):
        try:
            self.build()
        except AgwmError as error:
            raise PydanticCustomError("factory", "{text}", {"text": str(error)}) from None
        return self


def _parameter_words(factory: Callable[..., Any]) -> dict[str, str]:
    """The entries of a docstring's ``Args:`` by parameter."""
    doc = inspect.getdoc(factory) or ""
    found = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", doc, re.DOTALL | re.MULTILINE)
    if not found:
        return {}
    entries = re.split(r"^    (?=\w)", found.group(1), flags=re.MULTILINE)
    pairs = (entry.partition(":") for entry in entries if ":" in entry)
    return {name.strip(): " ".join(text.split()).rstrip(".") for name, _, text in pairs}
