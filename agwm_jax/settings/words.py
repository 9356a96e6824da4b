"""The settings in words: the list of all of them, and the report of what is wrong with given ones."""

import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import annotated_types
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from agwm_jax.errors import did_you_mean, nearest
from agwm_jax.section import Choice, Section, Several, inside, marks
from agwm_jax.settings.schema import Config
from agwm_jax.settings.strict_yaml import one_line

_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}


class Setting(NamedTuple):
    """One setting."""

    path: str
    allowed: str
    """What it may be, in words."""
    default: str
    """As YAML; "required" where there is none."""
    description: str
    needs: str
    """The choices it depends on, such as "method.name=agwm"; "" for none."""


def all_settings(
    section: type[Section] = Config, prefix: str = "", needs: str = "", defaults: Any = None, skip: str = ""
) -> Iterator[Setting]:
    """Every setting of a section, those of all that may be chosen included."""
    for name, field in section.model_fields.items():
        path, default = f"{prefix}{name}", getattr(defaults, name, field.default)
        choice, holds = next(marks(field, Choice), None), inside(field, {})
        if holds is not None and any(marks(field, Several)):
            names = ", ".join(holds.model_fields)
            yield Setting(path, f"a section with any of {names}, or a list", "{}", field.description or "", needs)
            yield from all_settings(holds, f"{path}.", needs, skip="name")
        elif choice is not None:
            names = f"one of {', '.join(choice.registry)}"
            chosen = choice.chosen(default) or "required"
            yield Setting(f"{path}.{choice.key}", names, chosen, field.description or "", needs)
            for option in choice.registry:
                on = f"{path}.{choice.key}={option}"
                both = f"{needs}, {on}" if needs else on
                yield from all_settings(choice.section(option), f"{path}.", both, skip=choice.key)
        elif holds is not None:
            yield from all_settings(holds, f"{path}.", needs, default, skip=skip)
        elif name != skip:
            shown = "required" if field.is_required() else one_line(default)
            yield Setting(path, _allowed(field), shown, field.description or "", needs)


def is_text(field: FieldInfo) -> bool:
    """Whether a setting holds a text, or null, and nothing else."""
    return set(alternatives(field.annotation)) <= {str, type(None)}


def alternatives(annotation: Any) -> Iterator[Any]:
    """The types of a union, or the one type that it is, without what is annotated."""
    if get_origin(annotation) in (Union, types.UnionType):
        for option in get_args(annotation):
            yield from alternatives(option)
    else:
        yield get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _allowed(field: FieldInfo) -> str:
    """What a field may hold, in words."""
    choice = next(marks(field, Choice), None)
    if choice is not None:
        return f"settings with {choice.key}: {', '.join(choice.registry)}"
    several = next(marks(field, Several), None)
    if several is not None:
        return f"a section with any of {', '.join(several.section().model_fields)}, or a list of them"
    return _in_words(field.annotation, field.metadata)


def _in_words(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type with its bounds, in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _in_words(arguments[0], [*arguments[1:], *metadata])
    if origin in (Union, types.UnionType):
        return " or ".join(_in_words(option, () if option is type(None) else metadata) for option in arguments)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments)) if len(arguments) > 1 else str(arguments[0])
    if origin is tuple:
        if get_origin(arguments[0]) is Literal:
            return f"a list from {', '.join(get_args(arguments[0]))}, like [a, b]"
        example = {str: "texts, like [a, b]", int: "whole numbers, like [0, 1]", float: "numbers, like [0, 0.5]"}
        return f"a list of {example.get(next(alternatives(arguments[0])), 'values')}"
    if origin is dict:
        return f"{_in_words(arguments[1]).replace('a number', 'numbers')} by name, like " + "{a: 0.5, b: 2}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "a section with " + ", ".join(annotation.model_fields)
    signs = {annotated_types.Ge: ">= {0.ge}", annotated_types.Gt: "> {0.gt}", annotated_types.Le: "<= {0.le}"}
    signs |= {annotated_types.Lt: "< {0.lt}"}
    flat = [part for item in metadata for part in getattr(item, "metadata", [item])]
    bounds = " and ".join(signs[type(item)].format(item) for item in flat if type(item) in signs)
    return f"{_WORDS.get(annotation, str(annotation))} {bounds}".rstrip()


def faults(error: ValidationError, raw: dict, whole: type[Section] = Config) -> list[str]:
    """Everything that is wrong with raw settings: full path, what was got, what is allowed, the nearest known name.

    Args:
        error: of reading them as a `whole`.
        raw: as a file has them.
        whole: the outermost section.
    """
    entries = error.errors()
    places = [entry["loc"] for entry in entries]
    # A list with a wrong item is reported for the item and once more as a whole; a union once for each alternative.
    inner = [e for e in entries if not any(p[: len(e["loc"])] == e["loc"] and len(p) > len(e["loc"]) for p in places)]
    deepest: dict[str, list[Any]] = {}  # of a union the alternative that got furthest
    for entry in inner:
        path = _locate(entry["loc"], raw, whole)[0]
        known = deepest.get(path, [])
        if not known or len(entry["loc"]) >= len(known[0]["loc"]):
            same = known if known and len(entry["loc"]) == len(known[0]["loc"]) else []
            deepest[path] = [*same, entry]
    told = [entry for found in deepest.values() for entry in found]
    return list(dict.fromkeys(line for entry in told for line in _fault(entry, raw, whole)))


def _fault(entry: Any, raw: dict, whole: type[Section]) -> list[str]:
    """One entry of a pydantic report, in the words of a config."""
    path, field, section, chosen = _locate(entry["loc"], raw, whole)
    value, kind = entry["input"], entry["type"]
    if kind == "cross_field":
        return [f"{path}.{line}".lstrip(".") for line in entry["ctx"]["text"].split("\n")]
    if kind == "value_error":
        got_it = "" if isinstance(value, dict | Section) else f" got {got(value)}:"
        return [f"{path}:{got_it} {entry['ctx']['error']}".removeprefix(": ")]
    if field is None:
        return [_unknown(path, section, chosen, whole)]
    if kind == "choice_name":
        choice = next(marks(field, Choice))
        name = value if isinstance(value, str) else value.get(choice.key)
        says = "missing" if name is None else f"got {got(name)}"
        elsewhere = (f"; did you mean {s.needs}?" for s in all_settings() if s.needs.endswith(f"={name}"))
        hint = did_you_mean(name, choice.registry) or next(elsewhere, "")
        return [f"{path}.{choice.key}: {says}; allowed: one of {', '.join(choice.registry)}{hint}"]
    if kind == "missing":
        return [f"{path}: missing; it is required{f' with {chosen}' if chosen else ''}; allowed: {_allowed(field)}"]
    texts = [text for option in alternatives(field.annotation) for text in get_args(option) if isinstance(text, str)]
    return [f"{path}: got {got(value)}; allowed: {_allowed(field)}{did_you_mean(value, texts)}"]


def _locate(
    location: Sequence[int | str], raw: Any, whole: type[Section]
) -> tuple[str, FieldInfo | None, type[Section], str]:
    """Path of a fault, its field (None: unknown), the section around it, and the choice made on the way there."""
    path, chosen = "", ""
    field: FieldInfo | None = None
    section: type[Section] = whole
    holds: type[Section] | None = whole
    for item in location:
        if isinstance(item, int) and holds is None:
            path += f"[{item}]"
        elif holds is not None:
            section, path = holds, f"{path}.{item}".lstrip(".")
            field = section.model_fields.get(str(item))
            raw = raw.get(item, {}) if isinstance(raw, dict) else {}
            holds = inside(field, raw)
            choice = next(marks(field, Choice), None) if field else None
            if choice is not None and holds is not None:
                chosen = f"{path}.{choice.key}: {choice.chosen(raw)}"
        # What is left are the alternatives of a union, which pydantic names and a user does not write.
    return path, field, section, chosen


def _unknown(path: str, section: type[Section], chosen: str, whole: type[Section]) -> str:
    """A setting that does not exist: the nearest one here, or where the name exists elsewhere."""
    folder, _, name = path.rpartition(".")
    settings = list(all_settings(whole))
    # Right but for what was not chosen; else of that name further in; else near to one of this section; else elsewhere.
    found = [_with(path, s.needs) for s in settings if f"{s.path}.".startswith(f"{path}.")][:1]
    if found == [path]:  # it exists: "run.seed: 1" is one line of a file
        found = [f"{folder}: {{{name}: ...}}"]
    found = found or [_with(s.path, s.needs) for s in settings if folder and _is_in(s.path, folder, name)]
    near = nearest(name, section.model_fields)
    if not found and near:
        found = [f"{folder}.{near}".lstrip(".")]
    elif not found:
        name = nearest(name, {part for s in settings for part in s.path.split(".")}) or name
        found = [
            s.path[: f"{s.path}.".index(f".{name}.") + 1 + len(name)] for s in settings if _is_in(s.path, "", name)
        ]
    hint = f"; did you mean {' or '.join(list(dict.fromkeys(found))[:3])}?" if found else "."
    here = f" with {chosen}" if chosen else ""
    return f"{path}: unknown setting{here}{hint} Known here: {', '.join(section.model_fields)}"


def _with(path: str, needs: str) -> str:
    return f"{path} (with {needs})" if needs else path


def _is_in(path: str, folder: str, name: str) -> bool:
    """Whether a setting's path leads through a part of that name inside a folder of settings."""
    return path.startswith(folder) and f".{name}." in f"{path[len(folder) :]}."


def got(value: Any) -> str:
    """A value with its type, short enough for a sentence."""
    if value is None:
        return "nothing (null)"
    text = one_line(value) if isinstance(value, (bool, int, float, list, dict)) else repr(value)
    kind = (_WORDS | {list: "a list", dict: "a section"}).get(type(value), type(value).__name__)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({kind})"
