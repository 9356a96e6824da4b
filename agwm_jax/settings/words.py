"""The settings in words: the list of all of them, and the report of what is wrong with given ones."""

import difflib
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import annotated_types
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from agwm_jax.settings.schema import Config, Section
from agwm_jax.settings.strict_yaml import one_line

_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}


class Setting(NamedTuple):
    """One setting: its full path, what it may be, its default as YAML, and the choice it depends on ("" for none)."""

    path: str
    allowed: str
    default: str
    description: str
    needs: str
    is_text: bool


def all_settings(section: type[Section] = Config, prefix: str = "", needs: str = "") -> Iterator[Setting]:
    """Every setting below a section, each kind of task and estimator included."""
    for name, field in section.model_fields.items():
        kinds = sections(field)
        for kind in kinds:
            choice = f"{prefix}{name}.{field.discriminator}={tag_of(kind, field)}" if field.discriminator else needs
            yield from all_settings(kind, f"{prefix}{name}.", choice)
        if not kinds:
            default = "required" if field.is_required() else one_line(field.default)
            is_text = set(get_args(field.annotation) or (field.annotation,)) <= {str, type(None)}
            yield Setting(prefix + name, _allowed(field), default, field.description or "", needs, is_text)


def sections(field: FieldInfo) -> list[type[Section]]:
    """The sections a field may hold: one, several where a choice is made, none for a plain setting."""
    options = get_args(field.annotation) or (field.annotation,)
    return [option for option in options if isinstance(option, type) and issubclass(option, Section)]


def tag_of(section: type[Section], field: FieldInfo) -> str:
    """What a choice between kinds of a section is called in a config: the value of its discriminator."""
    return get_args(section.model_fields[str(field.discriminator)].annotation)[0]


def _allowed(field: FieldInfo) -> str:
    """What a field may hold, in words."""
    kinds = sections(field)
    if field.discriminator:
        return f"settings with {field.discriminator}: " + ", ".join(tag_of(kind, field) for kind in kinds)
    return _in_words(field.annotation, field.metadata)


def _in_words(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type with its bounds, in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _in_words(arguments[0], [*arguments[1:], *metadata])
    if origin in (Union, types.UnionType):
        return " or ".join(_in_words(option, () if option is type(None) else metadata) for option in arguments)
    if origin is Literal:
        return "one of " + ", ".join(arguments) if len(arguments) > 1 else arguments[0]
    if origin is tuple:
        if get_origin(arguments[0]) is Literal:
            return f"a list from {', '.join(get_args(arguments[0]))}, like [a, b]"
        return "a list of texts, like [a, b]" if arguments[0] is str else "a list of whole numbers, like [0, 1]"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "a section with " + ", ".join(annotation.model_fields)
    signs = {annotated_types.Ge: ">= {0.ge}", annotated_types.Gt: "> {0.gt}", annotated_types.Le: "<= {0.le}"}
    signs |= {annotated_types.Lt: "< {0.lt}"}
    flat = [part for item in metadata for part in getattr(item, "metadata", [item])]
    bounds = " and ".join(signs[type(item)].format(item) for item in flat if type(item) in signs)
    return f"{_WORDS[annotation]} {bounds}".rstrip()


def faults(error: ValidationError) -> list[str]:
    """Everything that is wrong: full path, what was got, what is allowed, the nearest known name; one line each."""
    entries = error.errors()
    places = [entry["loc"] for entry in entries]
    # A list with a wrong item is reported for the item and once more as a whole.
    inner = [e for e in entries if not any(p[: len(e["loc"])] == e["loc"] and len(p) > len(e["loc"]) for p in places)]
    return [line for entry in inner for line in _fault(entry)]


def _fault(entry: Any) -> list[str]:
    """One entry of a pydantic report, in the words of a config."""
    path, field, section, kind = _locate(entry["loc"])
    if entry["type"] == "cross_field":
        return [f"{path}.{line}" if path else line for line in entry["ctx"]["text"].split("\n")]
    if entry["type"] == "value_error":
        return [f"{path}: got {got(entry['input'])}: {entry['ctx']['error']}"]
    if field is None:
        return [_unknown(path, section, kind)]
    if entry["type"] == "missing":
        return [f"{path}: missing; it is required{f' with {kind}' if kind else ''}; allowed: {_allowed(field)}"]
    if entry["type"] == "union_tag_invalid":
        path, tag = f"{path}.{field.discriminator}", entry["input"].get(field.discriminator)
        allowed = [tag_of(option, field) for option in sections(field)]
        return [f"{path}: got {got(tag)}; allowed: one of {', '.join(allowed)}{_nearest(tag, allowed)}"]
    allowed = list(get_args(field.annotation)) if get_origin(field.annotation) is Literal else []
    return [f"{path}: got {got(entry['input'])}; allowed: {_allowed(field)}{_nearest(entry['input'], allowed)}"]


def _locate(location: Sequence[int | str]) -> tuple[str, FieldInfo | None, type[Section], str]:
    """Path of a fault, its field (None: unknown), the section around it, and the choice made on the way there."""
    path, field, kind = "", None, ""
    section: type[Section] = Config
    inside: list[type[Section]] = [Config]
    for item in location:
        if len(inside) > 1 and field is not None:  # pydantic names the chosen kind; a user did not write it there
            section = next(option for option in inside if tag_of(option, field) == item)
            kind, inside = f"{path}.{field.discriminator}: {item}", [section]
        elif isinstance(item, int):
            path += f"[{item}]"
        elif not inside:
            path, field = f"{path}.{item}", None
        else:
            section = inside[0]
            path, field = f"{path}.{item}" if path else str(item), section.model_fields.get(str(item))
            inside = sections(field) if field else []
    return path, field, section, kind


def _unknown(path: str, section: type[Section], kind: str) -> str:
    """A setting that does not exist: the nearest one here, or where the name exists elsewhere."""
    folder, _, name = path.rpartition(".")
    near = difflib.get_close_matches(name, section.model_fields, n=1)
    settings = list(all_settings())
    leaf = next(iter(difflib.get_close_matches(name, [setting.path.split(".")[-1] for setting in settings], n=1)), name)
    elsewhere = [setting for setting in settings if setting.path.endswith(f".{leaf}")]
    same = list(dict.fromkeys(s.path + (f" (with {s.needs})" if s.path == path else "") for s in elsewhere))
    exactly = [text for text in same if text.startswith(f"{path} (")]  # right but for the kind that was not chosen
    hint = ""
    if exactly:
        hint = f"; did you mean {' or '.join(exactly)}?"
    elif near:
        hint = f"; did you mean {folder}.{near[0]}?" if folder else f"; did you mean {near[0]}?"
    elif same:
        hint = f"; did you mean {' or '.join(same[:3])}?"
    here = f" with {kind}" if kind else ""
    return f"{path}: unknown setting{here}{hint or '.'} Known here: {', '.join(section.model_fields)}"


def _nearest(value: Any, allowed: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(value), allowed, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def got(value: Any) -> str:
    """A value with its type, short enough for a sentence."""
    if value is None:
        return "nothing (null)"
    text = one_line(value) if isinstance(value, (bool, int, float, list, dict)) else repr(value)
    kind = (_WORDS | {list: "a list", dict: "a section"}).get(type(value), type(value).__name__)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({kind})"
