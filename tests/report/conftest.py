"""Synthetic run folders that look like real ones: several methods, seeds and splits, with a gate that has moved."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

MODULES = ("query", "key", "value", "attention_output", "intermediate", "output")
WEIGHTS = [*(f"encoder.layers.{module}.kernel" for module in MODULES), "pooler.kernel"]
METHOD_SETTINGS: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "frozen_alpha": {"mixup": {"rank": 1}},
    "agwm": {"mixup": {"rank": 1}, "search": {"anchor": 0.0}},
}
PHENOMENA = ("subject_verb", "reflexive", "determiner_noun", "polarity")


def alpha_tensors(
    rng: np.random.Generator, *, moved: float, rank: int | str = 1, layers: int = 6, width: int = 48
) -> dict[str, np.ndarray]:
    """Factors near 1 of which later layers and value-like modules were lowered by about `moved`."""
    tensors = {}
    for index, module in enumerate((*MODULES, "pooler")):
        d_in, d_out = (4 * width if module == "output" else width), (4 * width if module == "intermediate" else width)
        shape: tuple[int, ...] = () if module == "pooler" else (layers,)
        depth = np.linspace(0.3, 1.0, layers).reshape(-1, 1, 1) if shape else 0.5
        push = moved * depth * (0.5 + 0.25 * index)
        path = "pooler.kernel" if module == "pooler" else f"encoder.layers.{module}.kernel"
        if rank == "full":
            full = (
                1
                + 0.005 * rng.standard_normal((*shape, d_in, d_out))
                - push * rng.exponential(size=(*shape, d_in, d_out))
            )
            tensors[f"alpha/{path}"] = np.clip(full, 0, 1).astype(np.float32)
            continue
        left = 1 + 0.005 * rng.standard_normal((*shape, d_in, rank)) - push * rng.exponential(size=(*shape, d_in, rank))
        right = (
            1 + 0.005 * rng.standard_normal((*shape, rank, d_out)) - push * rng.exponential(size=(*shape, rank, d_out))
        )
        tensors[f"alpha/{path}/left"] = np.clip(left, 0, 1).astype(np.float32)
        tensors[f"alpha/{path}/right"] = np.clip(right, 0, 1).astype(np.float32)
    return tensors


def phase_lines(
    phase: str, steps: int, rng: np.random.Generator, *, start: float, end: float, search: bool
) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl whose losses fall from `start` to `end` with the noise of a small batch."""
    lines = []
    for step in range(steps):
        done = step / max(1, steps - 1)
        loss = end + (start - end) * (1 - done) ** 1.5
        line: dict[str, Any] = {
            "phase": phase,
            "step": step,
            "num_steps": steps,
            "loss": loss + 0.06 * rng.standard_normal(),
        }
        if search:
            line |= {
                "outer_loss": loss + 0.05 + 0.06 * rng.standard_normal(),
                "hypergradient_norm": 0.02 * rng.exponential(),
            }
            line |= {
                "alpha_mean": 0.996 - 0.03 * done,
                "alpha_std": 0.004 + 0.02 * done,
                "alpha_below": 0.0,
                "alpha_above": 1 - 0.2 * done,
            }
        lines.append(line)
    return lines


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """Function that writes a finished run folder and returns it; keyword arguments override parts of it."""

    def write(
        method: str = "vanilla",
        seed: int = 0,
        score: float = 0.7,
        *,
        root: Path | None = None,
        name: str | None = None,
        task: str = "agreement",
        metric: str = "accuracy",
        train_size: int = 300,
        num_splits: int = 1,
        steps: int = 45,
        moved: float = 0.04,
        groups: bool = False,
        finished: bool = True,
        settings: dict[str, Any] | None = None,
        result: dict[str, Any] | None = None,
        **alpha: Any,
    ) -> Path:
        folder = (root or tmp_path / "runs") / (name or f"{task}-{method}-{seed}")
        folder.mkdir(parents=True)
        rng = np.random.default_rng([seed, len(method), len(task)])
        config: dict[str, Any] = {
            "task": {"source": task, "train_size": train_size},
            "model": {"path": "minilm"},
            "method": {"name": method, **METHOD_SETTINGS[method]},
            "finetune": {"epochs": 3, "optimizer": {"learning_rate": 1e-4}},
            "run": {"seed": seed, "output": str(folder)},
        }
        for section, values in (settings or {}).items():
            config.setdefault(section, {}).update(values)
        (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        lines: list[dict[str, Any]] = []
        if method == "agwm":
            for split in range(num_splits):
                lines += phase_lines(f"search-{split}", steps, rng, start=0.69, end=0.45, search=True)
            lines += phase_lines("finetune", steps, rng, start=0.45, end=0.22, search=False)
        else:
            lines += phase_lines("finetune", steps, rng, start=0.7, end=0.3, search=False)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        tensors = {"task/pooler.bias": np.zeros(4, np.float32)}
        if method != "vanilla":
            tensors |= alpha_tensors(rng, moved=moved if method == "agwm" else 0.0, **alpha)
        save_file(tensors, folder / "variables.safetensors", metadata={"weights": json.dumps(WEIGHTS)})
        if not finished:
            return folder
        seconds = {"search-0": 31.5, "finetune": 12.25, "compile": 8.0, "evaluate": 3.0, "total": 55.5}
        if method != "agwm":
            del seconds["search-0"]
        content: dict[str, Any] = {
            "task": task,
            "model": "minilm",
            "method": method,
            "seed": seed,
            "train_size": train_size,
            "metric": metric,
            "split": "test",
            "score": score,
            "scores": {"validation": {metric: score + 0.01}, "test": {metric: score}},
            "groups": {"test": {p: {"accuracy": score + 0.05 * i, "n": 250} for i, p in enumerate(PHENOMENA)}}
            if groups
            else {},
            "seconds": seconds,
            "peak_memory_bytes": 3 * 2**29,
            "versions": {"jax": "0.0.0"},
            "device": "cpu",
            "git_commit": "abc",
            "num_parameters": {"task": 10, "alpha": 2},
            "warnings": [],
        }
        (folder / "result.json").write_text(json.dumps(content | (result or {})), encoding="utf-8")
        return folder

    return write
