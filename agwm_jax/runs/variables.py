"""variables.safetensors: what a method learnt, by collection and path of the weight, with what it belongs to."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from agwm_jax.errors import AgwmError
from agwm_jax.methods.interface import Variables
from agwm_jax.methods.training import TASK
from agwm_jax.runs.folder import differences, whole_file
from agwm_jax.settings.config import Config, parse_config

FILE = "variables.safetensors"
FORMAT = "agwm_jax.variables.v1"


class Origin(NamedTuple):
    """What variables were trained with; they mean nothing with anything else."""

    method: Mapping[str, Any]
    """Settings of the method, as a config has them."""
    pretrained: str
    """`weights_digest` of the pretrained weights, the fresh head among them."""


def save_variables(
    folder: Path, learnt: Variables, origin: Origin, *, weights: Sequence[str], task: bool = True
) -> None:
    """Write a tensor named ``collection/path`` for every array, or ``collection/path/leaf`` for one of several.

    Args:
        folder: of the run.
        learnt: what the method learnt, on the host.
        origin: what it belongs to.
        weights: paths of all weights in the model's order, for tables that follow it.
        task: write the collection of trained weights too.
    """
    names = _names({name: tree for name, tree in learnt.items() if task or name != TASK})
    metadata = {
        "format": FORMAT,
        "method": json.dumps(origin.method),
        "pretrained": origin.pretrained,
        "weights": json.dumps(list(weights)),
        "complete": json.dumps(task),
    }
    path = folder / FILE
    try:
        with whole_file(path) as partial:
            # `ascontiguousarray` alone makes a vector of a number.
            tensors = {name: np.ascontiguousarray(x).reshape(np.shape(x)) for name, x in names.items()}
            save_file(tensors, partial, metadata=metadata)
    except SafetensorError as error:
        raise AgwmError(f"could not write {path}: {error}; free disk space and run the same command again.") from error


def load_variables(folder: Path, shapes: Variables, origin: Origin) -> Variables:
    """Read what `save_variables` wrote, strictly into `shapes`.

    Args:
        folder: of the run.
        shapes: `Method.learnt_shapes` of the method that is to use the variables.
        origin: what they must have been trained with.

    Raises:
        AgwmError: the file is missing, damaged or without task weights, it was trained with other settings of the
            method or from other pretrained weights, or its names and shapes are not those of the method.
    """
    path = folder / FILE
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            _check_origin(folder, metadata, origin)
            wanted = _names(shapes)
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
            faults = [f"{name} is missing" for name in wanted if name not in found]
            faults += [f"{name} is unknown" for name in found if name not in wanted]
            faults += [
                f"{name} is {list(found[name])}, expected {list(x.shape)}"
                for name, x in wanted.items()
                if name in found and found[name] != x.shape
            ]
            if faults:
                raise AgwmError(
                    f"{path} does not hold what its method learns: {'; '.join(faults[:5])}"
                    f"{'; ...' if len(faults) > 5 else ''}. Restore the file or train again."
                )
            return _fill(shapes, lambda name, x: file.get_tensor(name).astype(x.dtype, copy=False))
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, AgwmError):
            raise
        raise AgwmError(f"{path} cannot be read as safetensors: {error}; restore it or train again.") from error


def _check_origin(folder: Path, metadata: Mapping[str, str], origin: Origin) -> None:
    path = folder / FILE
    if metadata.get("format") != FORMAT:
        raise AgwmError(
            f"{path} has format {metadata.get('format')!r}, expected {FORMAT!r}: it is not of this library."
        )
    if not json.loads(metadata["complete"]):
        raise AgwmError(f"{folder} has no trained weights: the run was made with run.save_weights false.")
    method = _with_new_defaults(json.loads(metadata["method"]))
    changes = differences(method, dict(origin.method), "method")
    if changes:
        raise AgwmError(
            f"{folder} was trained with other settings of the method than its config.yaml has ("
            f"{'; '.join(changes)}): what was learnt means nothing with them. Restore config.yaml."
        )
    if metadata["pretrained"] != origin.pretrained:
        raise AgwmError(
            f"{folder} was trained from another checkpoint than the one that model.path now leads to: its weights mean "
            "nothing without it. Restore that checkpoint, say with --model PATH where it lies now, or pin "
            "model.revision when you train from a hub."
        )


def method_settings(config: Config) -> dict[str, Any]:
    """What of a config decides what the variables mean."""
    techniques = config.techniques.chosen
    beside = {"techniques": {each.name: each.model_dump(mode="json") for each in techniques}} if techniques else {}
    return {**config.method.model_dump(mode="json"), **beside}


def _with_new_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as an older version wrote them, with what it did not know at its default."""
    method = {name: value for name, value in settings.items() if name != "techniques"}
    try:
        return method_settings(parse_config({"method": method, "techniques": settings.get("techniques", {})}))
    except AgwmError:  # a setting that exists no longer: named as a difference
        return settings


def _names(variables: Variables) -> dict[str, Any]:
    found: dict[str, Any] = {}
    _fill(variables, lambda name, x: found.setdefault(name, x))
    return found


def _fill(variables: Variables, value: Callable[[str, Any], Any]) -> Variables:
    """The same structure with ``value(name, leaf)`` in place of every leaf."""

    def one(path: Any, leaf: Any) -> Any:
        return value(jax.tree_util.keystr(path, simple=True, separator="/"), leaf)

    return jax.tree_util.tree_map_with_path(one, variables)
