"""One run from a config to a result: build, fit, score, and write what outlives it."""

import hashlib
import importlib.metadata
import platform
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np

from agwm_jax.build import Built, build
from agwm_jax.config import Config
from agwm_jax.core.mixup import mix
from agwm_jax.data.tasks import Task
from agwm_jax.diagnostics import search_warnings
from agwm_jax.methods.phase import Weights
from agwm_jax.schema.hypergradient import Implicit, Penalty
from agwm_jax.train import run_folder
from agwm_jax.train.checkpoint import Checkpoints
from agwm_jax.train.evaluate import columns_on_device, export_run, predict_logits, scores
from agwm_jax.train.loop import Interrupted, fit
from agwm_jax.train.recorder import Recorder

_PACKAGES = ("agwm-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "numpy")


def train(config: Config, *, progress: bool = True) -> dict[str, Any]:
    """Train as `config` says, or continue the same run where it stopped; a finished run is not run again.

    Args:
        config: the settings; ``config.run.output`` is the run folder.
        progress: show progress bars.

    Returns:
        The content of result.json: scores by split and metric, seconds by phase, versions, device, warnings.

    Raises:
        AgwmError: bad settings or data, a folder of another run, a loss that is not finite.
        Interrupted: Ctrl-C; the state is saved.
    """
    folder = Path(config.run.output)
    run_folder.check(folder, config)
    try:
        result = run_folder.read_result(folder) or _train(config, folder, progress=progress)
        if config.run.export and not (folder / "export").exists():
            deviation = export_run(folder, folder / "export")
            if deviation is not None:
                warnings.warn(f"exported, but transformers will not give the same logits: {deviation}", stacklevel=2)
    except Interrupted:
        raise
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; run the same command again to continue in {folder}") from None
    return result


def _train(config: Config, folder: Path, *, progress: bool) -> dict[str, Any]:
    _set_compilation_cache(config.run.compilation_cache)
    _warn_about_identifiability(config)
    began = time.perf_counter()
    built = build(config)
    digest = run_folder.weights_digest(built.pretrained.params)
    prepared = time.perf_counter() - began
    # Not before: settings or data that are refused leave no folder behind.
    with run_folder.claimed(folder, config):
        checkpoints = Checkpoints(
            folder / "checkpoints",
            keep=config.run.keep_checkpoints,
            fingerprint=f"{digest} {_data_fingerprint(built)}",
        )
        try:
            weights, seconds, records = fit(
                built.method,
                frozen=built.frozen,
                initial=built.initial,
                data=columns_on_device(built.encoded["train"]),
                key=built.key,
                checkpoints=checkpoints,
                make_recorder=lambda step: Recorder(
                    folder, resume_step=step, tensorboard=config.run.tensorboard, progress=progress
                ),
                chunk_steps=config.run.chunk_steps,
                checkpoint_steps=config.run.checkpoint_steps,
            )
            result = _result(config, built, weights, {"prepare": prepared, **seconds}, records)
            run_folder.save_weights(
                folder,
                weights,
                complement=config.mixup.complement,
                rank=config.mixup.rank,
                pretrained=digest,
                task=config.run.save_weights,
            )
            run_folder.write_result(folder, result)
            checkpoints.delete()
        finally:
            checkpoints.close()
    return result


def _result(
    config: Config, built: Built, weights: Weights, seconds: dict[str, float], records: list[dict[str, Any]]
) -> dict[str, Any]:
    began = time.perf_counter()
    params = mix(built.frozen, weights.task, weights.alpha, complement=config.mixup.complement)
    by_split, groups = {}, {}
    for split in built.task.splits:
        if split == "train":
            continue
        logits = predict_logits(
            built.pretrained.apply, params, built.encoded[split], batch_size=config.data.eval_batch_size
        )
        by_split[split], groups[split] = scores(built.task, split, logits)
    seconds = {**seconds, "evaluate": time.perf_counter() - began}
    seconds["total"] = sum(seconds.values())
    metric, split = built.task.metrics[0], built.task.report_split
    return {
        "task": built.task.name,
        "model": config.model.path,
        "method": config.method.name,
        "seed": config.run.seed,
        "train_size": len(built.encoded["train"].labels),
        "metric": metric,
        "split": split,
        "score": by_split[split][metric],
        "scores": by_split,
        "groups": {name: found for name, found in groups.items() if found},
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "peak_memory_bytes": _peak_memory(),
        "num_parameters": {
            "task": sum(x.size for x in weights.task.values()),
            "alpha": sum(x.size for x in jax.tree.leaves(weights.alpha)),
        },
        # What is needed to use the model where the training data are not.
        "task_description": _description(built.task),
        "versions": {"python": platform.python_version(), **_versions()},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind} ({jax.default_backend()})",
        "git_commit": _git_commit(),
        "warnings": [*_truncations(built), *(warning._asdict() for warning in search_warnings(records))],
    }


def _description(task: Task) -> dict[str, Any]:
    fields = {name: value for name, value in task._asdict().items() if name != "splits"}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


def _truncations(built: Built) -> list[dict[str, str]]:
    return [
        {
            "name": "texts_truncated",
            "message": f"{report.truncated} of {report.examples} texts of split {split} were cut to {report.length} "
            f"tokens (the longest has {report.longest}): raise data.max_length or data.pad_to.",
        }
        for split, report in built.encoding.items()
        if report.truncated
    ]


def _set_compilation_cache(folder: str | None) -> None:
    if folder is not None:  # null leaves what the user has set for JAX itself
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))


def _warn_about_identifiability(config: Config) -> None:
    if (
        config.method.name == "agwm"
        and isinstance(config.hypergradient, Implicit | Penalty)
        and config.search.anchor == 0
    ):
        warnings.warn(
            f"hypergradient.estimator {config.hypergradient.estimator} with search.anchor 0: without an anchor the "
            "task weights can undo alpha, the exact hypergradient at the inner optimum is zero, and a better solve "
            "comes closer to zero; set search.anchor, for example to 0.1.",
            stacklevel=3,
        )


def _data_fingerprint(built: Built) -> str:
    """What the row numbers of the plans refer to, and the plans."""
    digest = hashlib.sha256()
    for column in built.encoded["train"]:
        if isinstance(column, np.ndarray):
            digest.update(np.ascontiguousarray(column).tobytes())
    for phase in built.method.phases:
        for name in sorted(phase.plan):
            digest.update(np.ascontiguousarray(phase.plan[name]).tobytes())
    return digest.hexdigest()


def _peak_memory() -> int:
    """Peak bytes of the device where it counts them, of the process on a CPU."""
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
            continue
    return found


def _git_commit() -> str | None:
    """Commit of the checkout that this package is imported from; None for an installed package."""
    where = Path(__file__).resolve().parents[2]
    if not (where / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(where), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
