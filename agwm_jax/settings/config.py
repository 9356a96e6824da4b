"""Settings from and to YAML and the command line.

pydantic-settings, tyro and jsonargparse were tried on a small schema with a nested choice. pydantic-settings finds no
choice as soon as one setting of the default one is given ("Unable to extract tag using discriminator 'name'"); tyro
makes a choice a subcommand, so that ``--method.noise 1`` is unknown without ``method:agwm``, and refuses ``[0, 1]``;
jsonargparse takes every form that is needed, but answers one misspelt method with ten lines, a report for each
alternative by its class. YAML as all three read it takes `no` for false. What is left to do by hand is to put one
mapping over another (`_overlay`); pydantic and PyYAML do the rest.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from agwm_jax.errors import AgwmError
from agwm_jax.section import Choice, Located, Section, inside, marks
from agwm_jax.settings import strict_yaml
from agwm_jax.settings.schema import Config, Run
from agwm_jax.settings.words import alternatives, faults, got, is_text

_SHORT = {"seed": "run.seed", "seeds": "run.seeds", "output": "run.output", "model": "model.path"}
# Of `run` only the seed changes a result; the rest says where it goes and how often it is saved. The mesh only says
# which device computes what.
_WITHOUT_EFFECT: Any = {"run": set(Run.model_fields) - {"seed"}, "mesh": True}
_ITSELF = ""  # among the overrides of parts of a section: an override of the section itself
_MOVED = {
    "mixup": "method.mixup (but frozen: model.frozen)",
    "search": "method.search",
    "hypergradient": "method.estimator (its estimator is name; neumann, conjugate_gradient, nystrom and "
    "gradient_descent are a solver of implicit)",
}


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Settings from a YAML file (None: the defaults), changed by overrides such as `["--run.seed", "3"]`.

    Relative paths of data files and of model folders are relative to the config file, or where they come from an
    override, to the working directory; the result holds them absolute.

    Raises:
        AgwmError: all faults at once, each with its full path, what was got, what is allowed, the nearest known name.
    """
    raw: dict = {}
    if path is not None:
        _overlay(raw, _read(Path(path)), Config, Path(path).parent)
    _overlay(raw, _parse(overrides), Config, Path())
    where = " and ".join([str(path)] * (path is not None) + ["the command line"] * bool(overrides))
    moved = [f"{old} is now {new}" for old, new in _MOVED.items() if old in raw]
    if moved:
        raise AgwmError(
            f"{where}: settings of version 0.3: {'; '.join(moved)}; `agwm settings` lists all that there are. Use a "
            "run of that version with agwm-jax 0.3, or train again in a new folder"
        )
    return parse_config(raw, where)


def parse_config(raw: Mapping[Any, Any], where: str = "the settings") -> Config:
    """Settings out of nested mappings, as a YAML file has them; `where` is what an error calls them.

    Raises:
        AgwmError: see `load_config`.
    """
    try:
        return Config.model_validate(dict(raw))
    except ValidationError as error:
        found = faults(error, dict(raw))
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


def deciding_settings(config: Config) -> dict[str, Any]:
    """Every setting that can change the result, as JSON has it; folders, caches and checkpoints do not."""
    return config.model_dump(mode="json", exclude=_WITHOUT_EFFECT)


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


class _Typed(str):
    """A value of the command line; what it means depends on the setting that it is for."""

    def read(self, field: Any) -> Any:
        """YAML, except that a text setting takes the characters as they stand (a pattern, a name of digits)."""
        try:
            parsed = strict_yaml.parse(str(self))
        except (yaml.YAMLError, ValueError, RecursionError):
            return str(self)
        if field is None or inside(field, {}) or any(marks(field, Choice)) or not is_text(field):
            return parsed
        return None if parsed is None and type(None) in alternatives(field.annotation) else str(self)


def _parse(tokens: Sequence[str]) -> dict:
    """Overrides as nested sections of `_Typed` values."""
    said: dict = {}
    rest = list(tokens)
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
        name = name if name in Config.model_fields and value.startswith("{") else _SHORT.get(name, name)
        *parents, last = name.split(".")
        section = said
        for parent in parents:
            inner = section.setdefault(parent, {})
            section[parent] = section = inner if isinstance(inner, dict) else {_ITSELF: inner}
        if isinstance(section.get(last), dict):
            section = section[last]
            last = _ITSELF
        section[last] = _Typed(value)
    return said


def _overlay(into: dict, said: dict, section: type[Section] | None, folder: Path) -> None:
    """Put settings over others, with the types and paths that the sections give them.

    Args:
        into: changed in place. A section is merged in; one that chooses another thing drops what that does not know.
        said: of one config file, or of the command line.
        section: of both; None where it does not exist.
        folder: that paths in `said` are relative to.
    """
    for key, value in said.items():
        field = section.model_fields.get(key) if section is not None and isinstance(key, str) else None
        choice = next(marks(field, Choice), None) if field is not None else None
        value = _whole(value, field, choice)
        before = into.get(key)
        before = dict(before) if isinstance(before, dict) else {}
        if isinstance(value, dict):
            holds = inside(field, {**before, **value})
            if choice is not None and holds is not None and value.get(choice.key) not in (None, choice.chosen(before)):
                before = {name: kept for name, kept in before.items() if name in holds.model_fields}
            _overlay(before, value, holds, folder)
            into[key] = before
        elif value is not None or (choice is None and inside(field, {}) is None):  # else: every line is commented out
            into[key] = _located(field, value, folder)


def _whole(value: Any, field: Any, choice: Choice | None) -> Any:
    """A value as a config would say it: what is given of a section by parts and as one text is put together."""
    parts = value if isinstance(value, dict) else {}
    if _ITSELF in parts:
        value = parts[_ITSELF]
        parts = {key: part for key, part in parts.items() if key != _ITSELF}
    value = value.read(field) if isinstance(value, _Typed) else value
    if choice is not None and isinstance(value, str):
        value = {choice.key: value}
    return {**value, **parts} if isinstance(value, dict) else value


def _located(field: Any, value: Any, folder: Path) -> Any:
    """A value whose paths are absolute."""
    mark = next(marks(field, Located), None) if field is not None else None
    if mark is None or not isinstance(value, str | list):
        return value
    if isinstance(value, list):
        return [_located(field, item, folder) for item in value]
    return mark.absolute(value, folder)
