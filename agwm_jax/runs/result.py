"""What result.json holds: scores, costs, and what a reader needs to trust or to use them."""

import importlib.metadata
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from agwm_jax.data.tasks import Task
from agwm_jax.runs.fitting import Result
from agwm_jax.settings.schema import Config

_PACKAGES = ("agwm-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "numpy")


def describe(
    config: Config, found: Result, *, train_size: int, reads: Mapping[str, int], data: Mapping[str, str]
) -> dict[str, Any]:
    """Everything that is worth keeping of a finished run, as JSON takes it.

    Args:
        config: of the run.
        found: what the run learnt.
        train_size: number of its training examples.
        reads: number of examples of what else the method reads, by name.
        data: `TaskSource.digests` of the user's files that it read.
    """
    task, scale = found.model.task, found.model.scale
    metric, split = task.metrics[0], task.report_split
    seconds = {**found.seconds, "total": sum(found.seconds.values())}
    return {
        "task": task.name,
        "model": config.model.path,
        "method": "+".join([config.method.name, *(each.name for each in config.techniques.chosen)]),
        "seed": found.seed,
        "train_size": train_size,
        "reads": dict(reads),
        "metric": metric,
        "split": split,
        "score": found.scores[split][metric],
        "scores": found.scores,
        "groups": found.groups,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "peak_memory_bytes": _peak_memory(),
        "num_parameters": {
            name: sum(x.size for x in jax.tree.leaves(collection)) for name, collection in found.learnt.items()
        },
        # What is needed to use the model where the training data are not.
        "task_description": _description(task),
        "label_scale": scale and scale._asdict(),
        "data": dict(data),
        "versions": {"python": platform.python_version(), **_versions()},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind} ({jax.default_backend()})",
        "git_commit": _git_commit(),
        "warnings": found.warnings,
    }


def _description(task: Task) -> dict[str, Any]:
    fields = {name: value for name, value in task._asdict().items() if name != "splits"}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


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
