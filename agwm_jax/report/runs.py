"""Run folders: what a run was told to do, how it ended, and what it wrote on the way."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from agwm_jax.errors import AgwmError

# What else than phases result.json times.
_NO_PHASE = ("prepare", "compile", "checkpoint", "evaluate", "total")
# Sections that the configs of version 0.3 have and later ones lack.
_OLD_SECTIONS = ("mixup", "search", "hypergradient")


class ReportWarning(NamedTuple):
    """Something worth a look: a short fixed `name` to search for, and a `message` that says what was seen."""

    name: str
    message: str


class Run(NamedTuple):
    """One run folder: its settings and, when it is finished, its result."""

    folder: Path
    config: dict[str, str]
    method: str
    task: str
    seed: int
    result: dict[str, Any]
    """Of result.json; empty where the run is not finished."""

    @property
    def score(self) -> float:
        """Main-metric score on the reported split (NaN when the run ended without one)."""
        score = self.result.get("score")
        return math.nan if score is None else score

    @property
    def train_size(self) -> str:
        """Number of training examples as text, or "all"."""
        size = self.result.get("train_size", self.config.get("task.train_size"))
        return "all" if size in (None, "None") else str(size)

    @property
    def model(self) -> str:
        """Name of the pretrained model."""
        return self.result.get("model", self.config.get("model.path", "?"))

    @property
    def seconds(self) -> dict[str, float]:
        """By phase, those of one kind (search-0, search-1, ...) summed, in the order in which they were trained."""
        found: dict[str, float] = {}
        for key, value in self.result.get("seconds", {}).items():
            if key not in _NO_PHASE:
                kind = phase_kind(key)
                found[kind] = found.get(kind, 0.0) + value
        return found

    @property
    def warnings(self) -> list[ReportWarning]:
        """What the run itself warned of."""
        return [ReportWarning(one["name"], one["message"]) for one in self.result.get("warnings", [])]

    def groups(self) -> dict[str, float]:
        """Accuracy (or the first metric there is) of each group of the reported split."""
        found = {}
        for group, values in self.result.get("groups", {}).get(self.result.get("split"), {}).items():
            metrics = {key: value for key, value in values.items() if key != "n"}
            if metrics:
                found[group] = metrics.get("accuracy", next(iter(metrics.values())))
        return found


def phase_kind(phase: str) -> str:
    """What several phases of one kind have in common: "search" of "search-0"."""
    return phase.split("-")[0]


def read_run(folder: Path) -> Run | ReportWarning:
    """Reads config.yaml and, if it is there, result.json; or says why the folder is none of a run of this version."""
    path = folder / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise AgwmError(
            f"{path}{line} cannot be read as YAML ({_short(error)}): restore it or remove the folder."
        ) from error
    config = config if isinstance(config, Mapping) else {}
    old = next((section for section in _OLD_SECTIONS if section in config), None)
    if old is not None:
        text = f"{folder} is a run of version 0.3 (its config.yaml has a section {old}): report it with that version."
        return ReportWarning("run_of_another_version", text)
    flat = _flatten(config)
    method = flat.get("method.name")
    # The generated task has no name of its own, only a source.
    names = (flat.get(key, "None") for key in ("task.name", "task.path", "task.source"))
    task = next((name for name in names if name != "None"), None)
    if not method or not task:
        text = f"{folder}: its config.yaml names no method and task, so it is no run; the folder is left out."
        return ReportWarning("not_a_run", text)
    result, path = {}, folder / "result.json"
    if path.exists():
        result = _load_json(path, _read(path))
        if not isinstance(result, dict):
            raise AgwmError(f"{path} holds a {type(result).__name__}, a mapping was expected: remove the file.")
    seed = int(result.get("seed", flat.get("run.seed", 0)))
    return Run(folder, flat, result.get("method", method), result.get("task", task), seed, result)


def read_records(run: Run) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl; of a step that a resumed run wrote twice, the last. Phases in the order in
    which they began. Empty when there is no such file.

    Raises:
        AgwmError: a line that is not a JSON object, with file and line number.
    """
    path = run.folder / "metrics.jsonl"
    if not path.exists():
        return []
    records: dict[tuple[str, int], dict[str, Any]] = {}
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        record = _load_json(path, line, first_line=number)
        if not isinstance(record, dict) or "phase" not in record or not isinstance(record.get("step"), int):
            raise AgwmError(
                f"{path}, line {number}: an object with `phase` and a whole `step` was expected: remove the line."
            )
        records[record["phase"], record["step"]] = record
    order = {phase: number for number, phase in enumerate(dict.fromkeys(phase for phase, _ in records))}
    return sorted(records.values(), key=lambda record: (order[record["phase"]], record["step"]))


def _flatten(value: Mapping[Any, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, child in value.items():
        path = f"{prefix}{key}"
        if isinstance(child, Mapping):
            flat.update(_flatten(child, f"{path}."))
        else:
            flat[path] = str(child)
    return flat


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AgwmError(f"{path} cannot be read ({_short(error)}): restore it or remove the run folder.") from error


def _load_json(path: Path, text: str, *, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise AgwmError(
            f"{path}, line {line}, column {error.colno}: not valid JSON ({error.msg}). The file is damaged or "
            "was cut off: remove the run folder or train it again."
        ) from error


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
