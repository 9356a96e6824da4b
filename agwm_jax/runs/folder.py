"""A run's folder: who owns it, and the files that outlive the run."""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from agwm_jax.errors import AgwmError
from agwm_jax.settings.config import Config, deciding_settings, dump_config, load_config


def check(folder: Path, config: Config) -> None:
    """Refuse a folder that holds a run of another configuration, or files that are no run: nothing is overwritten.

    Raises:
        AgwmError: saying which settings differ.
    """
    saved = folder / "config.yaml"
    if saved.exists():
        theirs = read_config(folder)
        changes = differences(deciding_settings(theirs), deciding_settings(config), "")
        if changes:
            raise AgwmError(
                f"{folder} holds a run of another config ({'; '.join(changes)}); choose another --run.output or remove "
                "the folder."
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
        AgwmError: no run folder, or one of version 0.3.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise AgwmError(f"{folder} is no run folder (it has no config.yaml); expected the --run.output of a training.")
    return load_config(path)


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


def write_logits(folder: Path, logits: Mapping[str, np.ndarray]) -> None:
    """What the model said of every split that it is scored on, in the order of its rows: ``logits.safetensors``."""
    from safetensors.numpy import save_file

    with whole_file(folder / "logits.safetensors") as partial:
        save_file({split: np.ascontiguousarray(each) for split, each in logits.items()}, partial)


def read_logits(folder: Path) -> dict[str, np.ndarray]:
    """See `write_logits`.

    Raises:
        AgwmError: there are none (a run of a version before 0.8), or the file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = folder / "logits.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise AgwmError(f"{path} cannot be read ({error}); remove the folder and run the same command again.") from None


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name to write to in place of `path`, which then appears whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def weights_digest(params: Mapping[str, Any]) -> str:
    """SHA-256 of weights by path: tells whether a checkpoint is the one that a run started from."""
    digest = hashlib.sha256()
    for path in sorted(params):
        digest.update(path.encode())
        digest.update(np.ascontiguousarray(params[path]).tobytes())
    return digest.hexdigest()


def differences(theirs: Any, ours: Any, path: str) -> list[str]:
    """Where two nested mappings differ, as parts of a sentence."""
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        names = {**theirs, **ours}
        return [x for name in names for x in differences(theirs.get(name), ours.get(name), f"{path}.{name}".strip("."))]
    return [] if theirs == ours else [f"{path} is {theirs!r} there and {ours!r} here"]
