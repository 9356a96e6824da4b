"""Finished runs in use: scored, asked for predictions, exported; all of them by `Method.merge` and nothing else."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from agwm_jax.data.columns import read_labelled
from agwm_jax.data.draws import drawn
from agwm_jax.data.files import check_extension
from agwm_jax.data.predictions import read_texts, write_predictions
from agwm_jax.data.tasks import LabelScale, Task
from agwm_jax.errors import AgwmError
from agwm_jax.runs.build import build_method, check_length, read_model, recipe, rows_read, seeded
from agwm_jax.runs.fitted import DESCRIPTION, FittedModel, Predictions, Texts, load_exported, read_description
from agwm_jax.runs.folder import read_config, read_result, weights_digest
from agwm_jax.runs.variables import Origin, load_variables, method_settings
from agwm_jax.settings.schema import Config

Place = str | os.PathLike[str]


class Run(NamedTuple):
    """A finished run as its folder has it."""

    config: Config
    result: dict[str, Any]
    """The content of result.json."""
    model: FittedModel


def load_run(folder: Place, *, model: str | None = None) -> Run:
    """Read a finished run; its task comes without data.

    Args:
        folder: of the run.
        model: where its pretrained model lies now, if not at `model.path` any longer.

    Raises:
        AgwmError: no finished run, a damaged file, or another pretrained model than the run started from.
    """
    folder = Path(folder)
    config = read_config(folder)
    result = read_result(folder)
    if result is None:
        raise AgwmError(f"{folder} is not finished; run the same `agwm train` command again, it continues.")
    described = result["task_description"]
    lists = {name: tuple(described[name]) for name in ("label_names", "metrics")}
    task = Task(**{**described, **lists, "splits": {}})
    try:
        pretrained = read_model(config, task, path=model)
    except AgwmError as error:
        moved = (
            "" if model is not None else "; if the model has moved, say --model PATH with the place where it lies now"
        )
        raise AgwmError(f"the pretrained model of {folder} cannot be read: {str(error).rstrip('.')}{moved}.") from error
    how = recipe(config)
    check_length(pretrained, how.data)
    scale = result["label_scale"] and LabelScale(**result["label_scale"])
    own = seeded(pretrained, result["seed"], scale)
    size, others = result["train_size"], result.get("reads", {})
    rows = rows_read(list(others), {"train": size, **others})
    beside = {"rows": rows, "pair": task.pair}
    method = build_method(how, own, task.kind, seed=result["seed"], num_examples=size, **beside)
    shapes = method.learnt_shapes(own.params)
    learnt = load_variables(folder, shapes, Origin(method_settings(config), weights_digest(own.params)))
    params = jax.jit(method.merge)(own.params, jax.tree.map(jnp.asarray, learnt))
    columns = config.task.columns()[0]
    fitted = FittedModel(task, own, params, scale, how.data, model=method.model, text_columns=columns)
    return Run(config, result, fitted)


def evaluate(
    folder: Place, split: str | None = None, file: Place | None = None, *, model: str | None = None
) -> dict[str, Any]:
    """Score a finished run on a split of its task, or on a labelled file with the same columns.

    Args:
        folder: of the run.
        split: None: the one that the result reports.
        file: instead of a split.
        model: see `load_run`.

    Returns:
        ``{"task", "split", "n", "scores": {metric: value}, "groups": {group: {metric: value, "n": n}}}``.

    Raises:
        AgwmError: no finished run, no such split, a bad file.
    """
    run = load_run(folder, model=model)
    task = run.model.task
    if file is not None:
        texts, label = run.config.task.columns()
        name, separator = Path(file).name, run.config.task.separator
        rows = read_labelled(file, task, text_columns=texts, label_column=label, separator=separator)
    else:
        name = split or task.report_split
        whole, seed = run.config.task.load(), run.result["seed"]
        splits = drawn(whole, run.config.task.rows(whole, seed), seed=seed).splits
        if name not in splits:
            raise AgwmError(f"the task {task.name} has no split {name!r}: its splits are {', '.join(splits)}.")
        rows = splits[name]
    logits = run.model.logits(run.model.encode(rows, name))
    scores, groups = run.model.scores(rows, logits), run.model.group_scores(rows, logits)
    return {"task": task.name, "split": name, "n": len(logits), "scores": scores, "groups": groups}


def load_model(folder: Place, *, model: str | None = None) -> FittedModel:
    """What a folder holds that labels texts: a finished run, or an exported model.

    Raises:
        AgwmError: it is neither; see `load_run` and `load_exported`.
    """
    if not _is_exported(folder):
        return load_run(folder, model=model).model
    if model is not None:
        raise AgwmError(f"{folder} is an exported model, which holds all its weights: leave out --model.")
    return load_exported(folder)


def _is_exported(folder: Place) -> bool:
    return (Path(folder) / DESCRIPTION).exists()


def predict(folder: Place, texts: Texts, *, model: str | None = None) -> Predictions:
    """What a finished run or an exported model says of texts; see `FittedModel.predict` and `load_model`."""
    return load_model(folder, model=model).predict(texts)


def predict_file(
    folder: Path, input_file: Path, output_file: Path, *, model: str | None = None, separator: str | None = None
) -> int:
    """Label the texts of a file: its columns, then the prediction and, for classes, their probabilities.

    Args:
        folder: a finished run, or an exported model.
        input_file, output_file: their extensions give the formats.
        model: see `load_run`.
        separator: of a .csv file; None: as the run's task has it, else a comma.

    Returns:
        The number of rows written.

    Raises:
        AgwmError: no finished run and no exported model, a bad file.
    """
    check_extension(output_file)
    if output_file.exists():
        raise AgwmError(f"{output_file} exists; name another file, nothing is overwritten.")
    if _is_exported(folder):  # bad texts are refused before any weight is read
        columns = read_description(folder).text_columns
    else:
        source = read_config(folder).task
        columns, separator = source.columns()[0], separator or source.separator
    texts = read_texts(input_file, text_columns=columns, separator=separator or ",")
    fitted = load_model(folder, model=model)
    found = fitted.predict_split(texts.split, input_file.name)
    write_predictions(
        output_file,
        texts,
        predictions=found.labels,
        probabilities=found.probabilities,
        label_names=fitted.task.label_names,
    )
    return len(found.labels)


def export(run: Place, folder: Place, *, model: str | None = None) -> str | None:
    """Write the merged model as a Hugging Face folder.

    Returns:
        Why `transformers` would not give the same logits, or None where it does.

    Raises:
        AgwmError: no finished run, or `folder` holds files.
    """
    return load_run(run, model=model).model.save(folder)
