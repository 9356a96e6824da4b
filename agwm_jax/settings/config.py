"""Settings from and to YAML and the command line."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from agwm_jax.errors import AgwmError
from agwm_jax.settings import strict_yaml
from agwm_jax.settings.schema import Config as Config
from agwm_jax.settings.schema import Run, Section
from agwm_jax.settings.words import all_settings, faults, got, sections, tag_of

_ALIASES = {
    "seed": "run.seed",
    "seeds": "run.seeds",
    "output": "run.output",
    "model": "model.path",
    "method": "method.name",
}
# Of `run` only the seed changes a result; the rest says where it goes and how often it is saved. The mesh only says
# which device computes what.
_OUTSIDE_FINGERPRINT: Any = {"run": set(Run.model_fields) - {"seed"}, "mesh": True}


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
        found = faults(error)
    where = " and ".join([str(path)] * (path is not None) + ["the command line"] * bool(overrides))
    if len(found) == 1:
        raise AgwmError(f"{where}: {found[0]}")
    raise AgwmError("\n  ".join([f"{where}: {len(found)} faults", *found]))


def dump_config(config: Config) -> str:
    """All settings as YAML; loading it gives an equal config."""
    return strict_yaml.dump(config.model_dump(mode="json"))


def seed_configs(config: Config) -> tuple[Config, ...]:
    """The config of every seed, as if it were run alone; `run.seeds` go to folders of their own in `run.output`."""
    if config.run.seeds is None:
        return (config,)
    alone = [
        {"seed": seed, "seeds": None, "output": os.path.join(config.run.output, f"seed-{seed}")}
        for seed in config.run.seeds
    ]
    return tuple(config.model_copy(update={"run": config.run.model_copy(update=update)}) for update in alone)


def config_fingerprint(config: Config) -> str:
    """SHA-256 (hexadecimal) of every setting that can change the result; folders, caches and checkpoints do not."""
    settings = config.model_dump(mode="json", exclude=_OUTSIDE_FINGERPRINT)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


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
        raw = strict_yaml.parse(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise AgwmError(f"{path}:{place}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise AgwmError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw or {}, dict):
        raise AgwmError(
            f"{path}: got {got(raw)}; allowed: a mapping with the sections {', '.join(Config.model_fields)}"
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
        parsed = strict_yaml.parse(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        return value
    found = [setting for setting in all_settings() if setting.path == name]
    nullable = any("null" in setting.allowed for setting in found)
    takes_text = bool(found) and all(setting.is_text for setting in found)
    return value if takes_text and not (parsed is None and nullable) else parsed


def _apply(raw: dict, name: str, value: Any) -> None:
    """Set one override; a section is merged in, and another kind of task or estimator drops what it does not know."""
    *parents, last = name.split(".")
    change = {last: value}
    for parent in reversed(parents):
        change = {parent: change}
    _make_absolute(change, Path())
    field = Config.model_fields.get(parents[0]) if len(parents) == 1 else None
    before = raw.get(parents[0]) if parents else None
    if field is not None and field.discriminator == last and isinstance(before, dict):
        known = {key for kind in sections(field) if tag_of(kind, field) == value for key in kind.model_fields}
        raw[parents[0]] = {key: kept for key, kept in before.items() if key in known or not known}
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
    found = [(files, name, value) for name, value in files.items()] if isinstance(files, dict) else []
    if isinstance(model, dict) and str(model.get("path")).startswith((".", "~", "/")):
        found.append((model, "path", model["path"]))
    for section, name, value in found:
        if isinstance(value, str) and value:
            section[name] = os.path.abspath(folder / os.path.expanduser(value))


def _without_empty_sections(raw: dict, section: type[Section] = Config) -> dict:
    """Read a section whose every line is commented out as one with the defaults."""
    kept = {}
    for key, value in raw.items():
        field = section.model_fields.get(key) if isinstance(key, str) else None
        kinds = sections(field) if field else []
        if kinds and value is None:
            continue
        kept[key] = _without_empty_sections(value, kinds[0]) if len(kinds) == 1 and isinstance(value, dict) else value
    return kept
