"""Scores and predictions of a model, and of a finished run."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy.special import softmax

from agwm_jax import metrics
from agwm_jax.core.mixup import mix
from agwm_jax.core.partition import partition
from agwm_jax.core.types import Batch, Params
from agwm_jax.data.encode import MULTIPLE, Encoded, encode
from agwm_jax.data.files import check_extension
from agwm_jax.data.plan import evaluation_plan
from agwm_jax.data.predictions import read_texts, write_predictions
from agwm_jax.data.tasks import Task, read_labelled
from agwm_jax.engine.sharding import Placement, place
from agwm_jax.errors import AgwmError
from agwm_jax.models.huggingface import Pretrained, save_pretrained, transformers_compatible
from agwm_jax.runs.build import build_model, build_task, text_and_label_columns
from agwm_jax.runs.folder import load_weights, read_config, read_result, weights_digest
from agwm_jax.settings.config import Config


def text_columns(encoded: Encoded) -> dict[str, np.ndarray]:
    """The columns of a split by name."""
    return dict(encoded._asdict())


def columns_on_device(encoded: Encoded) -> dict[str, jax.Array]:
    """The columns of a split as device arrays."""
    return {name: jnp.asarray(column) for name, column in text_columns(encoded).items()}


def predict_logits(
    apply: Callable[..., jax.Array],
    params: Params,
    encoded: Encoded,
    *,
    batch_size: int,
    placement: Placement | None = None,
) -> Float[np.ndarray, "n c"]:
    """Logits of every example of a split, in its order, without dropout; on a mesh, where the weights lie on one.

    Texts of like length share a batch, which is cut to one of a few lengths.

    Args:
        apply: of `load_pretrained`: ``apply(params, batch, reverse_only=True) -> logits [b, c]``.
        params: by path.
        encoded: the split, n examples padded to t tokens.
        batch_size: b; every program has this many rows, whatever the split, so that splits of one length share it.
        placement: of the weights; every process then asks for the same logits.
    """
    columns = {name: column for name, column in text_columns(encoded).items() if name != "labels"}
    padded = encoded.attention_mask.shape[1]
    last_real = (encoded.attention_mask * np.arange(1, padded + 1)).max(axis=1)
    order = np.argsort(last_real, kind="stable")
    logits = []
    for places in evaluation_plan(len(order), batch_size=batch_size):
        rows = order[np.maximum(places, 0)]
        length = min(x for x in program_lengths(padded) if x >= last_real[rows].max())
        batch = {name: x[rows, :length] for name, x in columns.items()}
        if placement is not None:
            batch = place(batch, jax.tree.map(lambda x: placement.of_batch(x.shape), batch))
        logits.append(_batch_logits(apply, placement and placement.replicated, params, batch))
    by_length = np.concatenate([np.asarray(x) for x in logits])[: len(order)]
    found = np.empty_like(by_length)
    found[order] = by_length
    return found


def program_lengths(padded: int) -> set[int]:
    """The lengths in tokens that batches of a split are cut to, each a program to compile: all, a half, a quarter.

    On a CPU padding costs more than two more programs; elsewhere a split of a few thousand texts takes less time than
    compiling one, and is not cut.
    """
    parts = (1, 2, 4) if jax.default_backend() == "cpu" else (1,)
    return {min(padded, math.ceil(padded / part / MULTIPLE) * MULTIPLE) for part in parts}


@partial(jax.jit, static_argnums=(0, 1))
def _batch_logits(apply: Callable[..., jax.Array], where, params: Params, batch: Batch) -> jax.Array:
    logits = apply(params, batch, reverse_only=True)
    return logits if where is None else jax.lax.with_sharding_constraint(logits, where)


def scores(task: Task, name: str, logits: np.ndarray) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Metrics of one split, and of its groups where the split has a column `group`."""
    split = task.splits[name]
    labels = np.asarray(split["label"])
    overall = metrics.compute(task.metrics, logits, labels)
    groups = {}
    if "group" in split.column_names:
        names = np.asarray(split["group"])
        metric = "accuracy" if task.kind == "classification" else task.metrics[0]
        for group in sorted(set(names.tolist())):
            rows = names == group
            groups[group] = {**metrics.compute([metric], logits[rows], labels[rows]), "n": int(rows.sum())}
    return overall, groups


def load_run(folder: Path) -> tuple[Config, Task, Pretrained, Params]:
    """A finished run: config, task (without its data), and the pretrained model with the weights ``mix(W0, W, alpha)``.

    Raises:
        AgwmError: no finished run, a damaged file, or model.path leads to another checkpoint than it did.
    """
    config = read_config(folder)
    result = read_result(folder)
    if result is None:
        raise AgwmError(f"{folder} is not finished; run the same `agwm train` command again, it continues.")
    task = Task(**{**result["task_description"], "splits": {}})
    task = task._replace(label_names=tuple(task.label_names), metrics=tuple(task.metrics))
    pretrained = build_model(config, task)
    parts = partition(pretrained.params, mixed=config.mixup.mixed, frozen=config.mixup.frozen)
    digest = weights_digest(pretrained.params)
    weights = load_weights(folder, complement=config.mixup.complement, pretrained=digest)
    return config, task, pretrained, mix(parts.frozen, weights.task, weights.alpha, complement=config.mixup.complement)


def evaluate_run(run: Path, split: str | None = None, file: Path | None = None) -> dict[str, Any]:
    """Score a finished run on a split of its task, or on a labelled file with the same columns.

    Returns:
        ``{"task", "split", "n", "scores": {metric: value}, "groups": {group: {metric: value, "n": n}}}``.

    Raises:
        AgwmError: no finished run, no such split, a bad file.
    """
    config, task, pretrained, params = load_run(run)
    name = split or task.report_split
    if file is None:
        task = task._replace(splits=build_task(config).splits)
    else:
        text_columns, label_column = text_and_label_columns(config)
        labelled = read_labelled(file, task, text_columns=text_columns, label_column=label_column)
        name = file.name
        task = task._replace(splits={name: labelled})
    if name not in task.splits:
        raise AgwmError(f"the task {task.name} has no split {name!r}: its splits are {', '.join(task.splits)}.")
    logits = _logits(config, task, pretrained, params, task.splits[name])
    overall, groups = scores(task, name, logits)
    return {"task": task.name, "split": name, "n": len(logits), "scores": overall, "groups": groups}


def predict_run(run: Path, input_file: Path, output_file: Path) -> int:
    """Label the texts of a file: its columns, then the prediction and, for classes, their probabilities.

    Returns:
        The number of rows written.

    Raises:
        AgwmError: no finished run, a bad file.
    """
    check_extension(output_file)
    if output_file.exists():
        raise AgwmError(f"{output_file} exists; name another file, nothing is overwritten.")
    texts = read_texts(input_file, text_columns=text_and_label_columns(read_config(run))[0])
    config, task, pretrained, params = load_run(run)
    logits = _logits(config, task, pretrained, params, texts.split)
    if task.kind == "regression":
        write_predictions(output_file, texts, predictions=[float(x) for x in logits[:, 0]])
    else:
        write_predictions(
            output_file,
            texts,
            predictions=[task.label_names[i] for i in logits.argmax(1)],
            probabilities=softmax(logits.astype(np.float64), axis=1),
            label_names=task.label_names,
        )
    return len(logits)


def export_run(run: Path, folder: Path) -> str | None:
    """Write the merged model as a Hugging Face folder.

    Returns:
        Why `transformers` would not give the same logits, or None where it does.

    Raises:
        AgwmError: no finished run, or `folder` holds files.
    """
    _, task, pretrained, params = load_run(run)
    save_pretrained(folder, params, pretrained, label_names=task.label_names or None)
    return transformers_compatible(pretrained)


def _logits(config: Config, task: Task, pretrained: Pretrained, params: Params, split) -> np.ndarray:
    encoded, _ = encode(split, pretrained.tokenizer, max_length=config.data.max_length, kind=task.kind)
    return predict_logits(pretrained.apply, params, encoded, batch_size=config.data.eval_batch_size)
