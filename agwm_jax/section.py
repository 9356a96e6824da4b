"""A group of settings, a choice between registered groups, and what their checks are made of."""

import inspect
import os
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_type_hints

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PydanticSchemaGenerationError,
    Strict,
    TypeAdapter,
    create_model,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError, PydanticUndefined, core_schema

from agwm_jax.errors import AgwmError
from agwm_jax.registry import Registry


class Section(BaseModel):
    """A group of settings: frozen, no unknown keys, no conversion between types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _keep_the_rest_of_a_default(cls, value: Any) -> Any:
        """A section given in part leaves what the field's default says of the rest."""
        if not isinstance(value, dict):
            return value
        defaults = {
            name: field.default for name, field in cls.model_fields.items() if isinstance(value.get(name), dict)
        }
        said = {n: d.model_dump(exclude_unset=True) for n, d in defaults.items() if isinstance(d, Section)}
        return {**value, **{name: {**rest, **value[name]} for name, rest in said.items()}}


def refuse(*cases: tuple[bool, str]) -> None:
    """Raise the cases that hold, faults between settings; each text starts with the name of the one to change."""
    faults = [text for holds, text in cases if holds]
    if faults:
        raise PydanticCustomError("cross_field", "{text}", {"text": "\n".join(faults)})


def _compiles(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"not a regular expression ({error})") from None
    return value


# YAML has lists and no tuples, so a list is let in where a tuple is kept (a frozen setting must be hashable).
Names = Annotated[tuple[str, ...], Strict(False)]
Pattern = Annotated[str, AfterValidator(_compiles)]


class Located:
    """Marks a text as a path: relative to the config that says it (an override: to the working directory).

    `load_config` makes it absolute, so that it is found from anywhere. With `or_name` the text may be a name instead:
    it is a path where it starts as one (``./``, ``../``, ``~``, ``/``) or where such a folder exists. Texts of `words`
    are no paths.
    """

    def __init__(self, *, or_name: bool = False, words: tuple[str, ...] = ()):
        """A path and nothing else by default."""
        self.or_name, self.words = or_name, words

    def absolute(self, text: str, folder: Path) -> str:
        """The text, or the absolute path that it means in a config of `folder`."""
        path = os.path.abspath(folder / os.path.expanduser(text))
        says_so = text.startswith(("./", "../", "~", "/")) or text in (".", "..")
        is_path = text not in ("", *self.words) and (says_so or not self.or_name or os.path.isdir(path))
        return path if is_path else text


FilePath = Annotated[str, Field(min_length=1), Located()]
FolderOrName = Annotated[str, Field(min_length=1), Located(or_name=True)]


class Choice:
    """A field that holds the settings of one registered thing, which one of its keys chooses.

    Used as ``Annotated[Any, Choice(REGISTRY, default="...")]``. What may be chosen is looked up when settings are
    read, so that things registered from outside the package can be chosen too. A registered factory that is no
    `Section` gets one made of its signature and docstring (`section_of`). The name alone stands for the thing with all
    its defaults.
    """

    def __init__(self, registry: Registry[Any], *, default: str | None = None, key: str = "name"):
        """`default` is chosen where `key` is left out; without one it is required."""
        self.registry, self.default, self.key = registry, default, key

    def section(self, name: str) -> type[Section]:
        """The settings of one thing that may be chosen."""
        value = self.registry[name].value
        return value if isinstance(value, type) and issubclass(value, Section) else section_of(value, name, self.key)

    def chosen(self, value: Any) -> str | None:
        """The name that a raw value chooses; None: none, or one that does not exist."""
        name = value.get(self.key, self.default) if isinstance(value, dict) else value
        return str(name) if isinstance(name, str) and name in self.registry else None

    def validate(self, value: Any) -> Section:
        """The settings out of a mapping or a name; pydantic puts the field's path before what is wrong in it."""
        if isinstance(value, Section):
            return value
        value = {self.key: value} if isinstance(value, str) else value
        if not isinstance(value, dict):
            raise PydanticCustomError("choice_type", "not a section")
        name = self.chosen(value)
        if name is None:
            raise PydanticCustomError("choice_name", "unknown", {"given": value.get(self.key)})
        return self.section(name).model_validate({**value, self.key: name})

    def __get_pydantic_core_schema__(self, source, handler):
        """For pydantic."""
        del source, handler
        return core_schema.no_info_plain_validator_function(
            self.validate,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda section, info: section.model_dump(mode=info.mode), info_arg=True
            ),
        )


class Several:
    """A field that holds the settings of any number of registered things, a mapping by name; a list of names is short.

    Used as ``Annotated[Any, Several(REGISTRY, base)]``; as with `Choice` they are looked up when settings are read.
    The value is a section with one field a thing, None where it was not named; its ``chosen`` are those that were.
    """

    def __init__(self, registry: Registry[Any], base: type[Section]):
        """Those of the registry that are a `base`."""
        self.registry, self.base = registry, base

    def section(self) -> type[Section]:
        """The section of all that there are."""
        values = {entry.name: entry for entry in self.registry.entries() if issubclass(entry.value, self.base)}
        return _several(tuple((name, entry.value, entry.summary) for name, entry in values.items()))

    def validate(self, value: Any) -> Section:
        """The section out of a mapping, a list of names or one name."""
        if isinstance(value, _Several):
            return value
        names = [value] if isinstance(value, str) else value
        if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names):
            value = {name: {} for name in names}
        if not isinstance(value, dict):
            raise PydanticCustomError("several_type", "not a section")
        return self.section().model_validate({name: {} if x in (None, True) else x for name, x in value.items()})

    def __get_pydantic_core_schema__(self, source, handler):
        """For pydantic."""
        del source, handler
        return core_schema.no_info_plain_validator_function(
            self.validate,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda section, info: {each.name: each.model_dump(mode=info.mode) for each in section.chosen},
                info_arg=True,
            ),
        )


class _Several(Section):
    """What `Several.section` makes."""

    @property
    def chosen(self) -> tuple[Any, ...]:
        """Those that were named, sorted by name."""
        found = (getattr(self, name) for name in type(self).model_fields)
        return tuple(each for each in found if each is not None)


@cache
def _several(things: tuple[tuple[str, type[Section], str], ...]) -> type[Section]:
    fields: dict[str, Any] = {
        name: (value | None, Field(default=None, description=text)) for name, value, text in things
    }
    return create_model("several", __base__=_Several, **fields)


def marks(field: FieldInfo, kind: type) -> Iterator[Any]:
    """What a field's annotation carries of a kind (`Choice`, `Located`, a section), at any depth of it."""
    parts: list[Any] = [*field.metadata, field.annotation]
    while parts:
        part = parts.pop(0)
        if isinstance(part, kind) or (isinstance(part, type) and issubclass(part, kind)):
            yield part
        parts.extend([*getattr(part, "__metadata__", ()), *get_args(part)])


def inside(field: FieldInfo | None, value: Any) -> type[Section] | None:
    """The section that a field with this raw value holds; None: it holds no section, or one that does not exist."""
    if field is None:
        return None
    several = next(marks(field, Several), None)
    if several is not None:
        return several.section()
    choice = next(marks(field, Choice), None)
    if choice is not None:
        name = choice.chosen(value)
        return None if name is None else choice.section(name)
    return next(marks(field, Section), None)


@cache
def section_of(factory: Callable[..., Any], name: str, key: str = "name") -> type[Section]:
    """Settings with the parameters of a factory: their types, defaults and docstring entries.

    A parameter whose annotation carries a `Registry` (``Annotated[LinearSolver, SOLVERS]``) is a choice from it; its
    default, if any, is a name. One that no config can write, such as a function or an array, is left to its default.
    The settings' ``build()`` calls the factory; reading them does too, so that what it refuses is refused then.

    Raises:
        AgwmError: a parameter that no config can write has no default.
    """
    hints = get_type_hints(factory, include_extras=True)
    words = _parameter_words(factory)
    fields: dict[str, Any] = {key: (Literal[name], Field(default=name, description="which one"))}
    for parameter in inspect.signature(factory).parameters.values():
        annotation = hints.get(parameter.name, Any)
        default: Any = PydanticUndefined if parameter.default is parameter.empty else parameter.default
        registry = next((x for x in getattr(annotation, "__metadata__", ()) if isinstance(x, Registry)), None)
        if registry is not None:
            chosen = None if default is PydanticUndefined else default
            annotation = Annotated[Any, Choice(registry, default=chosen)]
            default = PydanticUndefined if chosen is None else {}
        elif not _writable(annotation):
            if default is PydanticUndefined:
                raise AgwmError(
                    f"{name}({parameter.name}): no config can write {annotation}; give the parameter a default, "
                    "or annotate it with a registry to choose from."
                )
            continue
        fields[parameter.name] = (annotation, Field(default=default, description=words.get(parameter.name, "")))
    section: Any = create_model(f"{name}_settings", __base__=_Derived, __doc__=factory.__doc__, **fields)
    section.factory, section.key = staticmethod(factory), key
    return section


class _Derived(Section):
    """What `section_of` makes."""

    factory: ClassVar[Callable[..., Any]]
    key: ClassVar[str]

    def build(self, **unwritten: Any) -> Any:
        """What the factory makes of these settings.

        Args:
            unwritten: arguments that no config can write; those that the factory does not take are left out.
        """
        takes = inspect.signature(type(self).factory).parameters
        values = {name: value for name, value in unwritten.items() if name in takes}
        values |= {name: getattr(self, name) for name in type(self).model_fields if name != self.key}
        return type(self).factory(**{n: v.build() if isinstance(v, _Derived) else v for n, v in values.items()})

    @model_validator(mode="after")
    def _accepted_by_the_factory(self):
        self.build()  # an AgwmError is a ValueError, which pydantic puts into its report
        return self


def _writable(annotation: Any) -> bool:
    """Whether YAML can hold values of a type."""
    if annotation is Any or "Callable" in repr(annotation):
        return False
    try:
        TypeAdapter(annotation)
    except PydanticSchemaGenerationError:
        return False
    return True


def _parameter_words(factory: Callable[..., Any]) -> dict[str, str]:
    """The entries of a docstring's ``Args:`` by parameter."""
    doc = inspect.getdoc(factory) or ""
    found = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", doc, re.DOTALL | re.MULTILINE)
    if not found:
        return {}
    entries = re.split(r"^ {2,4}(?=\w)", found.group(1), flags=re.MULTILINE)
    pairs = (entry.partition(":") for entry in entries if ":" in entry)
    return {name.strip(): " ".join(text.replace("`", "").split()).rstrip(".") for name, _, text in pairs}
