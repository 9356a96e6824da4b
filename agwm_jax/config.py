"""Settings from and to YAML and the command line: loading, dumping, fingerprint, and the report of what is wrong."""

import difflib
import hashlib
import json
import os
import re
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Union, get_args, get_origin

import annotated_types
import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from agwm_jax.errors import AgwmError
from agwm_jax.schema import Config as Config
from agwm_jax.schema import Run, Section

_ALIASES = {"seed": "run.seed", "output": "run.output", "model": "model.path", "method": "method.name"}
# Of `run` only the seed changes a result; the rest says where it goes and how often it is saved.
_OUTSIDE_FINGERPRINT = {"run": set(Run.model_fields) - {"seed"}}
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


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of YAML 1.2: 2e-5 is a number, `no` and 1:30 are texts; a key given twice is refused."""

    yaml_implicit_resolvers: ClassVar[dict] = {}

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                fault = f"the key {key} is given twice"
                raise yaml.constructor.ConstructorError(None, None, fault, key_node.start_mark)
            seen.add(key if isinstance(key, str) else None)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes a text exactly where `_Loader` would read it as something else."""

    yaml_implicit_resolvers: ClassVar[dict] = {}

    def ignore_aliases(self, data):
        return True


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?((\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|\.(inf|nan))", list("-+.0123456789")),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Settings from a YAML file (None: the defaults), changed by overrides such as `["--run.seed", "3"]`.

    Paths of data files, and model folders that start with `.`, are relative to the config file, or where they come from
    an override, to the working directory; the result holds them absolute.

    Raises:
        AgwmError: all faults at once, each with its full path, what was got, what is allowed, the nearest known name.
    """
    raw = {} if path is None else _read(Path(path))
    _make_absolute(raw, Path(path).parent if path is not None else Path())
    for name, value in _parse_overrides(overrides):
        _apply(raw, name, value)
    try:
        return Config.model_validate(_without_empty_sections(raw))
    except ValidationError as error:
        entries = error.errors()
    places = [entry["loc"] for entry in entries]
    inner = [e for e in entries if not any(p[: len(e["loc"])] == e["loc"] and len(p) > len(e["loc"]) for p in places)]
    faults = [line for entry in inner for line in _fault(entry)]
    where = " and ".join([str(path)] * (path is not None) + ["the command line"] * bool(overrides))
    if len(faults) == 1:
        raise AgwmError(f"{where}: {faults[0]}")
    raise AgwmError("\n  ".join([f"{where}: {len(faults)} faults", *faults]))


def dump_config(config: Config) -> str:
    """All settings as YAML; loading it gives an equal config."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def config_fingerprint(config: Config) -> str:
    """SHA-256 (hexadecimal) of every setting that can change the result; folders, caches and checkpoints do not."""
    settings = config.model_dump(mode="json", exclude=_OUTSIDE_FINGERPRINT)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def all_settings(section: type[Section] = Config, prefix: str = "", needs: str = "") -> Iterator[Setting]:
    """Every setting below a section, each kind of task and estimator included."""
    for name, field in section.model_fields.items():
        kinds = _sections(field)
        for kind in kinds:
            choice = f"{prefix}{name}.{field.discriminator}={_tag_of(kind, field)}" if field.discriminator else needs
            yield from all_settings(kind, f"{prefix}{name}.", choice)
        if not kinds:
            default = "required" if field.is_required() else _as_yaml(field.default)
            is_text = set(get_args(field.annotation) or (field.annotation,)) <= {str, type(None)}
            yield Setting(prefix + name, _allowed(field), default, field.description or "", needs, is_text)


def _sections(field: FieldInfo) -> list[type[Section]]:
    """The sections a field may hold: one, several where a choice is made, none for a plain setting."""
    options = get_args(field.annotation) or (field.annotation,)
    return [option for option in options if isinstance(option, type) and issubclass(option, Section)]


def _tag_of(section: type[Section], field: FieldInfo) -> str:
    return get_args(section.model_fields[str(field.discriminator)].annotation)[0]


def _allowed(field: FieldInfo) -> str:
    """What a field may hold, in words."""
    kinds = _sections(field)
    if field.discriminator:
        return f"settings with {field.discriminator}: " + ", ".join(_tag_of(kind, field) for kind in kinds)
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
        items = f" from {', '.join(get_args(arguments[0]))}" if get_origin(arguments[0]) is Literal else " of texts"
        return f"a list{items}, like [a, b]"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "a section with " + ", ".join(annotation.model_fields)
    signs = {annotated_types.Ge: ">= {0.ge}", annotated_types.Gt: "> {0.gt}", annotated_types.Le: "<= {0.le}"}
    signs |= {annotated_types.Lt: "< {0.lt}"}
    flat = [part for item in metadata for part in getattr(item, "metadata", [item])]
    bounds = " and ".join(signs[type(item)].format(item) for item in flat if type(item) in signs)
    return f"{_WORDS[annotation]} {bounds}".rstrip()


def _as_yaml(value: Any) -> str:
    """A value on one line, as one would write it in a config."""
    value = list(value) if isinstance(value, tuple) else value
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def _read(path: Path) -> dict:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise AgwmError(f"{path}: no such config file") from None
    except IsADirectoryError:
        raise AgwmError(f"{path}: a folder, not a config file; name the YAML file in it") from None
    except UnicodeDecodeError as error:
        raise AgwmError(f"{path}: not UTF-8 text (byte {error.start}); a config is a YAML file in UTF-8") from None
    try:
        raw = yaml.load(text, _Loader)  # noqa: S506 (_Loader is a SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise AgwmError(f"{path}:{place}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise AgwmError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw or {}, dict):
        raise AgwmError(
            f"{path}: got {_got(raw)}; allowed: a mapping with the sections {', '.join(Config.model_fields)}"
        )
    return raw or {}


def _parse_overrides(tokens: Sequence[str]) -> list[tuple[str, Any]]:
    """Pairs (path, value), those that choose a kind of task or estimator first."""
    pairs, rest = [], list(tokens)
    while rest:
        token = rest.pop(0)
        name, equals, value = token.removeprefix("--").partition("=")
        if not token.startswith("--") or not name:
            raise AgwmError(f"{token}: not a setting; settings are given as --section.name value")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise AgwmError(f"--{name}: its value is missing; write --{name} VALUE, or --{name}=VALUE")
            value = rest.pop(0)
        name = name.replace("-", "_")
        is_section = value.startswith("{")
        name = name if is_section else _ALIASES.get(name, name)
        pairs.append((name, _parse_value(name, value)))
    choices = {f"{name}.{field.discriminator}" for name, field in Config.model_fields.items() if field.discriminator}
    return sorted(pairs, key=lambda pair: pair[0] not in choices)


def _parse_value(name: str, value: str) -> Any:
    """YAML, except that a text setting takes the characters as they stand (a regular expression, a name of digits)."""
    try:
        parsed = yaml.load(value, _Loader)  # noqa: S506 (_Loader is a SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return value
    found = [setting for setting in all_settings() if setting.path == name]
    nullable = any("null" in setting.allowed for setting in found)
    takes_text = bool(found) and all(setting.is_text for setting in found)
    return value if takes_text and not (parsed is None and nullable) else parsed


def _apply(raw: dict, name: str, value: Any) -> None:
    """Set one override; a section is merged in, and another kind of task or estimator drops what it does not know."""
    *sections, last = name.split(".")
    change = {last: value}
    for section in reversed(sections):
        change = {section: change}
    _make_absolute(change, Path())
    field = Config.model_fields.get(sections[0]) if len(sections) == 1 else None
    if field is not None and field.discriminator == last and isinstance(raw.get(sections[0]), dict):
        known = {key for kind in _sections(field) if _tag_of(kind, field) == value for key in kind.model_fields}
        raw[sections[0]] = {key: kept for key, kept in raw[sections[0]].items() if key in known or not known}
    _merge(raw, change)


def _merge(into: dict, change: dict) -> None:
    for key, value in change.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _make_absolute(raw: dict, folder: Path) -> None:
    """Let the data files, and a model folder that is given as a path, be found from anywhere."""
    task, model = raw.get("task"), raw.get("model")
    files = task.get("files") if isinstance(task, dict) else None
    for key, value in files.items() if isinstance(files, dict) else ():
        if isinstance(value, str) and value:
            files[key] = os.path.abspath(folder / Path(value).expanduser())
    if isinstance(model, dict):
        path = model.get("path")
        if isinstance(path, str) and path.startswith((".", "~", "/")):
            model["path"] = os.path.abspath(folder / Path(path).expanduser())


def _without_empty_sections(raw: dict, section: type[Section] = Config) -> dict:
    """Read a section whose every line is commented out as one with the defaults."""
    kept = {}
    for key, value in raw.items():
        field = section.model_fields.get(key) if isinstance(key, str) else None
        kinds = _sections(field) if field else []
        if kinds and value is None:
            continue
        kept[key] = _without_empty_sections(value, kinds[0]) if len(kinds) == 1 and isinstance(value, dict) else value
    return kept


def _fault(entry: Any) -> list[str]:
    """One entry of a pydantic report, in the words of a config."""
    path, field, section, kind = _locate(entry["loc"])
    if entry["type"] == "cross_field":
        return [f"{path}.{line}" if path else line for line in entry["ctx"]["text"].split("\n")]
    if entry["type"] == "value_error":
        return [f"{path}: got {_got(entry['input'])}: {entry['ctx']['error']}"]
    if field is None:
        return [_unknown(path, section, kind)]
    if entry["type"] == "missing":
        return [f"{path}: missing; it is required{f' with {kind}' if kind else ''}; allowed: {_allowed(field)}"]
    if entry["type"] == "union_tag_invalid":
        path, got = f"{path}.{field.discriminator}", entry["input"].get(field.discriminator)
        allowed = [_tag_of(option, field) for option in _sections(field)]
        return [f"{path}: got {_got(got)}; allowed: one of {', '.join(allowed)}{_nearest(got, allowed)}"]
    allowed = list(get_args(field.annotation)) if get_origin(field.annotation) is Literal else []
    return [f"{path}: got {_got(entry['input'])}; allowed: {_allowed(field)}{_nearest(entry['input'], allowed)}"]


def _locate(location: Sequence[int | str]) -> tuple[str, FieldInfo | None, type[Section], str]:
    """Path of a fault, its field (None: unknown), the section around it, and the choice made on the way there."""
    path, field, kind = "", None, ""
    section: type[Section] = Config
    inside: list[type[Section]] = [Config]
    for item in location:
        if len(inside) > 1 and field is not None:  # pydantic names the chosen kind; a user did not write it there
            section = next(option for option in inside if _tag_of(option, field) == item)
            kind, inside = f"{path}.{field.discriminator}: {item}", [section]
        elif isinstance(item, int):
            path += f"[{item}]"
        elif not inside:
            path, field = f"{path}.{item}", None
        else:
            section = inside[0]
            path, field = f"{path}.{item}" if path else str(item), section.model_fields.get(str(item))
            inside = _sections(field) if field else []
    return path, field, section, kind


def _unknown(path: str, section: type[Section], kind: str) -> str:
    """A setting that does not exist: the nearest one here, or where the name exists elsewhere."""
    folder, _, name = path.rpartition(".")
    near = difflib.get_close_matches(name, section.model_fields, n=1)
    settings = list(all_settings())
    leaf = next(iter(difflib.get_close_matches(name, [setting.path.split(".")[-1] for setting in settings], n=1)), name)
    elsewhere = [setting for setting in settings if setting.path.endswith(f".{leaf}")]
    same = list(dict.fromkeys(s.path + (f" (with {s.needs})" if s.path == path else "") for s in elsewhere))
    hint = ""
    if near:
        hint = f"; did you mean {folder}.{near[0]}?" if folder else f"; did you mean {near[0]}?"
    elif same:
        hint = f"; did you mean {' or '.join(same[:3])}?"
    here = f" with {kind}" if kind else ""
    return f"{path}: unknown setting{here}{hint or '.'} Known here: {', '.join(section.model_fields)}"


def _nearest(value: Any, allowed: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(value), allowed, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _got(value: Any) -> str:
    """A value with its type, short enough for a sentence."""
    if value is None:
        return "nothing (null)"
    text = _as_yaml(value) if isinstance(value, (bool, int, float, list, dict)) else repr(value)
    kind = (_WORDS | {list: "a list", dict: "a section"}).get(type(value), type(value).__name__)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({kind})"
