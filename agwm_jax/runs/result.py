"""What result.json holds: scores, costs, and what a reader needs to trust or to use them."""

import importlib.metadata
import platform
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from agwm_jax.data.tasks import Task
from agwm_jax.methods.interface import Weights
from agwm_jax.methods.search_warnings import search_warnings
from agwm_jax.runs.build import Built
from agwm_jax.runs.evaluate import scores
from agwm_jax.settings.config import Config

_PACKAGES = ("agwm-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "numpy")


def describe(
    config: Config,
    built: Built,
    weights: Weights,
    logits: dict[str, np.ndarray],
    seconds: dict[str, float],
    records: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Everything that is worth keeping of a finished run, as JSON takes it.

    Args:
        config, built: of the run.
        weights: what it learnt.
        logits: of every split but the training split.
        seconds: by phase.
        records: lines of metrics.jsonl.
    """
    by_split, groups = {}, {}
    for split, found in logits.items():
        by_split[split], groups[split] = scores(built.task, split, found)
    seconds = {**seconds, "total": sum(seconds.values())}
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
            "message": f"{report.truncated} of {report.examples} texts of split {split} were cut to {report.limit} "
            f"tokens (the longest has {report.longest}): raise data.max_length or data.pad_to.",
        }
        for split, report in built.encoding.items()
        if report.truncated
    ]


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
