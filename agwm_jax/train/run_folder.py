"""A run's folder: who owns it, and the files that outlive the run."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from agwm_jax.config import Config, config_fingerprint, dump_config, load_config
from agwm_jax.core.types import Alpha, LowRank, Params
from agwm_jax.errors import AgwmError
from agwm_jax.methods.phase import Weights

ALPHA_FORMAT = "agwm_jax.alpha.v1"


def check(folder: Path, config: Config) -> None:
    """Refuse a folder that holds a run of another configuration, or files that are no run: nothing is overwritten.

    Raises:
        AgwmError: saying which settings differ.
    """
    saved = folder / "config.yaml"
    if saved.exists():
        theirs = load_config(saved)
        if config_fingerprint(theirs) != config_fingerprint(config):
            changes = "; ".join(_differences(theirs.model_dump(mode="json"), config.model_dump(mode="json")))
            raise AgwmError(
                f"{folder} holds a run of another config ({changes}); choose another --run.output or remove the folder."
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise AgwmError(f"{folder} is not empty and is no run folder; choose another --run.output.")


def claim(folder: Path, config: Config) -> None:
    """Make `folder` the folder of this run."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.yaml").exists():
        write_text(folder / "config.yaml", dump_config(config))


def read_config(folder: Path) -> Config:
    """The configuration of a run.

    Raises:
        AgwmError: no run folder.
    """
    if not (folder / "config.yaml").is_file():
        raise AgwmError(f"{folder} is no run folder (it has no config.yaml); expected the --run.output of a training.")
    return load_config(folder / "config.yaml")


def read_result(folder: Path) -> dict[str, Any] | None:
    """The result of a finished run, or None."""
    path = folder / "result.json"
    return json.loads(path.read_text()) if path.exists() else None


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    """The last file a run writes: it marks the run as finished."""
    write_text(folder / "result.json", json.dumps(result, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def save_weights(folder: Path, weights: Weights, *, complement: str, rank: int | str, task: bool) -> None:
    """Write alpha.safetensors (where the method has an alpha) and, with `task`, task.safetensors."""
    if weights.alpha:
        tensors = {}
        for path, factors in weights.alpha.items():
            named = factors._asdict() if isinstance(factors, LowRank) else {"full": factors}
            tensors.update({f"{path}.{name}": np.asarray(x) for name, x in named.items()})
        metadata = {"format": ALPHA_FORMAT, "complement": complement, "rank": str(rank)}
        _save(folder / "alpha.safetensors", tensors, metadata)
    if task:
        _save(
            folder / "task.safetensors", {path: np.asarray(x) for path, x in weights.task.items()}, {"format": "flax"}
        )


def load_weights(folder: Path, *, complement: str) -> Weights:
    """The weights that a run learnt; an alpha is only mixed by the rule that it was trained with.

    Raises:
        AgwmError: the run is not finished or kept no weights, a file is damaged, or alpha was trained with another
            complement.
    """
    if not (folder / "task.safetensors").exists():
        state = "was made with run.save_weights false" if read_result(folder) else "is not finished: run it again first"
        raise AgwmError(f"{folder} has no trained weights (task.safetensors): the run {state}.")
    alpha = load_alpha(folder / "alpha.safetensors", complement=complement) if _has_alpha(folder) else {}
    return Weights(_load(folder / "task.safetensors")[0], alpha)


def load_alpha(path: Path, *, complement: str) -> Alpha:
    """Alpha from a file that `save_weights` wrote.

    Raises:
        AgwmError: no such file, no alpha, or one trained with another complement.
    """
    tensors, metadata = _load(path)
    if metadata.get("format") != ALPHA_FORMAT:
        raise AgwmError(
            f"{path} is no alpha of this library (format {metadata.get('format')!r}, expected {ALPHA_FORMAT!r})."
        )
    if metadata["complement"] != complement:
        raise AgwmError(
            f"{path} was trained with complement={metadata['complement']!r} and must not be mixed with {complement!r}."
        )
    alpha: Alpha = {}
    for name, value in tensors.items():
        weight, kind = name.rsplit(".", 1)
        if kind == "full":
            alpha[weight] = value
        elif kind == "left":
            alpha[weight] = LowRank(value, tensors[f"{weight}.right"])
    return alpha


def _has_alpha(folder: Path) -> bool:
    return (folder / "alpha.safetensors").exists()


def _save(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, partial, metadata=metadata)
    except SafetensorError as error:
        raise AgwmError(f"could not write {path}: {error}; free disk space and run the same command again.") from error
    os.replace(partial, path)


def _load(path: Path) -> tuple[Params, dict[str, str]]:
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: jnp.asarray(file.get_tensor(name)) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, FileNotFoundError) as error:
        raise AgwmError(f"{path} cannot be read as safetensors: {error}; restore it or train again.") from error


def _differences(theirs: Any, ours: Any, path: str = "") -> list[str]:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        names = [name for name in {**theirs, **ours} if path or name != "run"]
        found = [_differences(theirs.get(name), ours.get(name), f"{path}.{name}".strip(".")) for name in names]
        if not path:
            found.append(_differences(theirs["run"]["seed"], ours["run"]["seed"], "run.seed"))
        return [line for lines in found for line in lines]
    return [] if theirs == ours else [f"{path} is {theirs!r} there and {ours!r} here"]
