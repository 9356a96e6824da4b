"""A run's folder: who owns it, and the files that outlive the run."""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from agwm_jax.core.types import Alpha, LowRank, Params
from agwm_jax.errors import AgwmError
from agwm_jax.methods.interface import Weights
from agwm_jax.settings.config import Config, config_fingerprint, dump_config, load_config

ALPHA_FORMAT = "agwm_jax.alpha.v1"
TASK_FORMAT = "agwm_jax.task.v1"


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
    if folder.exists() and any(not path.name.endswith(".partial") for path in folder.iterdir()):
        raise AgwmError(f"{folder} is not empty and is no run folder; choose another --run.output.")


@contextlib.contextmanager
def claimed(folder: Path, config: Config) -> Iterator[None]:
    """Make `folder` the folder of this run, and of this process as long as the context lasts.

    Raises:
        AgwmError: another process is running it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.yaml").exists():
        write_text(folder / "config.yaml", dump_config(config))
    with (folder / "config.yaml").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AgwmError(
                f"another process is running {folder}; wait for it or choose another --run.output. Processes that "
                "belong to one run are started with --coordinator."
            ) from None
        yield


def read_config(folder: Path) -> Config:
    """The configuration of a run.

    Raises:
        AgwmError: no run folder.
    """
    if not (folder / "config.yaml").is_file():
        raise AgwmError(f"{folder} is no run folder (it has no config.yaml); expected the --run.output of a training.")
    return load_config(folder / "config.yaml")


def read_result(folder: Path) -> dict[str, Any] | None:
    """The result of a finished run, or None.

    Raises:
        AgwmError: the file is damaged.
    """
    path = folder / "result.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError as error:
        raise AgwmError(f"{path} is no JSON ({error}); remove it and run the same command again.") from error


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    """The last file a run writes: it marks the run as finished."""
    write_text(folder / "result.json", json.dumps(result, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with _whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def weights_digest(params: Mapping[str, jax.Array]) -> str:
    """SHA-256 of weights by path: tells whether a checkpoint is the one that a run started from."""
    digest = hashlib.sha256()
    for path in sorted(params):
        digest.update(path.encode())
        digest.update(np.ascontiguousarray(params[path]).tobytes())
    return digest.hexdigest()


def save_weights(
    folder: Path, weights: Weights, *, complement: str, rank: int | str, pretrained: str, task: bool
) -> None:
    """Write alpha.safetensors (where the method has an alpha) and, with `task`, task.safetensors.

    Args:
        folder: of the run.
        weights: what the method learnt.
        complement, rank: of the mixture.
        pretrained: `weights_digest` of the checkpoint that both belong to.
        task: write the task weights too.
    """
    if weights.alpha:
        tensors = {}
        for path, factors in weights.alpha.items():
            named = factors._asdict() if isinstance(factors, LowRank) else {"full": factors}
            tensors.update({f"{path}.{name}": np.asarray(x) for name, x in named.items()})
        metadata = {"format": ALPHA_FORMAT, "complement": complement, "rank": str(rank), "pretrained": pretrained}
        _save(folder / "alpha.safetensors", tensors, metadata)
    if task:
        metadata = {"format": TASK_FORMAT, "gates": str(len(weights.alpha)), "pretrained": pretrained}
        _save(folder / "task.safetensors", {path: np.asarray(x) for path, x in weights.task.items()}, metadata)


def load_weights(folder: Path, *, complement: str, pretrained: str) -> Weights:
    """The weights that a run learnt; an alpha is only mixed by the rule, and into the W0, that it was trained with.

    Raises:
        AgwmError: the run is not finished or kept no weights, a file is damaged or missing, or the weights were trained
            with another complement or from another checkpoint.
    """
    if not (folder / "task.safetensors").exists():
        state = "was made with run.save_weights false" if read_result(folder) else "is not finished: run it again first"
        raise AgwmError(f"{folder} has no trained weights (task.safetensors): the run {state}.")
    task, metadata = _load(folder / "task.safetensors")
    if metadata.get("pretrained") != pretrained:
        raise AgwmError(
            f"{folder} was trained from another checkpoint than the one that model.path now leads to: its weights mean "
            "nothing without it. Restore that checkpoint, or pin model.revision when you train from a hub."
        )
    has_alpha = metadata.get("gates") != "0"
    return Weights(task, load_alpha(folder / "alpha.safetensors", complement=complement) if has_alpha else {})


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


def _save(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    try:
        with _whole(path) as partial:
            save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, partial, metadata=metadata)
    except SafetensorError as error:
        raise AgwmError(f"could not write {path}: {error}; free disk space and run the same command again.") from error


def _load(path: Path) -> tuple[Params, dict[str, str]]:
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: jnp.asarray(file.get_tensor(name)) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, FileNotFoundError) as error:
        raise AgwmError(f"{path} cannot be read as safetensors: {error}; restore it or train again.") from error


def _differences(theirs: Any, ours: Any, path: str = "") -> list[str]:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        names = [name for name in {**theirs, **ours} if path or name not in ("run", "mesh")]
        found = [_differences(theirs.get(name), ours.get(name), f"{path}.{name}".strip(".")) for name in names]
        if not path:
            found.append(_differences(theirs["run"]["seed"], ours["run"]["seed"], "run.seed"))
        return [line for lines in found for line in lines]
    return [] if theirs == ours else [f"{path} is {theirs!r} there and {ours!r} here"]
