"""One file in, an answer out: what is in it, which method to take and how sure that is, and the trained model."""

import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from agwm_jax.data.files import read_table, write_table
from agwm_jax.data.tasks import Task
from agwm_jax.errors import AgwmError
from agwm_jax.models.huggingface import Pretrained
from agwm_jax.runs import folder as run_folder
from agwm_jax.runs.build import read_model
from agwm_jax.runs.compare import settings_of
from agwm_jax.runs.fitted import FittedModel, load_exported
from agwm_jax.runs.fitting import fit
from agwm_jax.selection import pages
from agwm_jax.selection.columns import Columns, guess_columns
from agwm_jax.selection.findings import findings
from agwm_jax.selection.rounds import CONFIG, Rounds, Tell
from agwm_jax.selection.trials import METHODS_TRIED, check_methods
from agwm_jax.selection.verdict import Calibration, Scored, at_the_edge, calibrate, recommend, score, sentences
from agwm_jax.settings import Config, dump_config, load_config, strict_yaml

MODEL, ANSWER = "model", "compare.json"


class Comparison(NamedTuple):
    """What `compare` found out."""

    columns: Columns
    task: Task
    """The whole file, and the test file where there is one."""
    findings: list[str]
    """On the data, in sentences."""
    scored: list[Scored]
    """Every method, in the order of trial."""
    recommended: Scored
    sentences: list[str]
    """The recommendation and what can be said of the other methods."""
    notes: list[str]
    """What was left out, and why."""
    rows: np.ndarray
    """Of the file, of the texts in `Scored.logits`."""
    calibration: Calibration | None
    """Of the recommended method on held-out texts; None for a regression."""
    model: FittedModel
    """The recommended method, trained on the whole file."""
    test_scores: dict[str, float]
    """Of `model` on the test file; empty without one."""
    warnings: list[str]
    """Of the final training."""
    encoder: str
    settings: Config
    """Of the final training."""

    def __repr__(self) -> str:
        return f"<Comparison: {' '.join(self.sentences)}>"

    def _repr_markdown_(self) -> str:
        """What a notebook shows."""
        return pages.summary(self)


def compare(
    data: str | os.PathLike[str] | tuple[Sequence[Any], Sequence[Any]],
    encoder: str = "minilm",
    *,
    output: str | os.PathLike[str] = "runs/compare",
    text: Sequence[str] = (),
    label: str | None = None,
    group: str | None = None,
    test: str | os.PathLike[str] | None = None,
    methods: Sequence[str] = METHODS_TRIED,
    folds: int = 5,
    budget: float | None = None,
    separator: str = ",",
    settings: Sequence[str] = (),
    tell: Tell = print,
) -> Comparison:
    """Cross-validate a few methods on one labelled file, recommend one, and train it on the whole file.

    Every method is tried at the same few learning rates, on the same folds. Writes into `output`: ``model`` (a Hugging
    Face folder with a model card), ``report.html``, ``report.md``, ``compare.json`` and ``runs`` (a run folder a
    method, rate and fold). The same call goes on where an earlier one stopped.

    Args:
        data: a labelled file, or (texts, labels) in memory, texts in pairs where the task has pairs.
        encoder: as `load_pretrained` takes it.
        output: folder of what is written.
        text: its text columns; empty: guessed.
        label: its label column; None: guessed.
        group: column whose rows are not parted by a fold, such as the author of a text.
        test: labelled file with the same columns, scored once by the final model.
        methods: names of methods.
        folds: of the cross-validation.
        budget: seconds; fewer folds and rates are tried where it is short. None: all.
        separator: of .csv files.
        settings: of all runs, as `agwm train` takes them; ``--NAME.setting`` is for the method of that name alone.
        tell: is given every line that a user wants to see on the way.

    Raises:
        AgwmError: the file cannot be used, settings are wrong, or no method could be trained.
        KeyboardInterrupt: stopped; what is finished is kept.
    """
    began, output = time.monotonic(), Path(output)
    check_methods(methods)
    if output.exists() and not (output / CONFIG).exists() and any(output.iterdir()):
        raise AgwmError(f"{output} is not empty and holds no comparison; choose another --output.")
    file = _file(data, output)
    table = read_table(file, separator=separator)
    columns = guess_columns(table, text=text, label=label)
    raw = _config(file, columns, encoder, output, group=group, test=test, folds=folds, separator=separator)
    config = _with_settings(raw, output, settings)
    task = config.task.load()
    pretrained = read_model(config, task)
    seeds = range(folds)
    rows = [config.task.rows(task, seed) for seed in seeds]
    found = findings(task, pretrained.tokenizer, max_length=config.data.max_length, folds=folds)
    tell(f"{file}: texts in {' and '.join(columns.text)}, labels in {columns.label} ({columns.kind})")
    for sentence in found:
        tell(f"  {sentence}")
    rounds = Rounds(config, output, settings, methods, rows, task, pretrained.config.hidden_size, tell)
    rounds.run(began, budget)
    held = [rows[seed]["validation"] for seed in rounds.seeds]
    labels = [np.asarray(task.splits["train"]["label"])[each] for each in held]
    scored = [score(name, tried, labels, task.metrics) for name, tried in rounds.tried.items() if tried]
    if not scored:
        raise AgwmError(f"no method could be trained: {' '.join(rounds.notes)}")
    metric = task.metrics[0]
    best = recommend(scored, metric)
    said = sentences(scored, best, metric, guessing=_guessing(np.concatenate(labels), metric))
    rounds.notes += at_the_edge(best, rounds.factors)
    if len(rounds.seeds) == 2 and max(each.trials for each in scored) > 1:
        rounds.notes.append(
            "With two folds the learning rate of each is chosen by the other one alone, and much of that is luck: give "
            "five folds for scores to go by."
        )
    tell("\n" + pages.table(scored, task.metrics))
    for sentence in said:
        tell(sentence)
    calibration = calibrate(best.logits, np.concatenate(labels)) if task.kind == "classification" else None
    final = rounds.config(best.method, best.factor)
    before = _finished_before(output, best)
    if before is None:
        tell(f"training {best.method} on all {len(task.splits['train'])} texts")
        temperature = 1.0 if calibration is None else calibration.temperature
        trained = _fit(pretrained, task, final, temperature=temperature, text_columns=columns.text)
    comparison = Comparison(
        columns=columns,
        task=task,
        findings=found,
        scored=scored,
        recommended=best,
        sentences=said,
        notes=rounds.notes,
        rows=np.concatenate(held),
        calibration=calibration,
        encoder=encoder,
        settings=final,
        **(before or trained)._asdict(),
    )
    _write(comparison, output, anew=before is None)
    tell(f"model: {output / MODEL}{'' if before is None else ' (as it was)'}")
    return comparison


def _guessing(labels: np.ndarray, metric: str) -> float | None:
    """Accuracy of always the commonest class."""
    return None if metric != "accuracy" else float(np.bincount(labels).max() / len(labels))


def _file(data: Any, output: Path) -> Path:
    """The file of data in memory; that of a path is there already."""
    if isinstance(data, str | os.PathLike):
        return Path(data).absolute()
    texts, labels = data
    if len(texts) != len(labels):
        raise AgwmError(f"data have {len(texts)} texts and {len(labels)} labels: give one label for each text.")
    paired = bool(len(texts)) and not isinstance(texts[0], str)
    columns = dict(zip(("text", "text_pair"), map(list, zip(*texts, strict=True)), strict=True)) if paired else None
    output.mkdir(parents=True, exist_ok=True)
    file = output.absolute() / "data.jsonl"
    plain = [value.item() if hasattr(value, "item") else value for value in labels]
    write_table(file, {**(columns or {"text": list(texts)}), "label": plain})
    return file


def _config(
    file: Path,
    columns: Columns,
    encoder: str,
    output: Path,
    *,
    group: str | None,
    test: Any,
    folds: int,
    separator: str,
) -> dict[str, Any]:
    task = {
        "source": "file",
        "name": file.stem,
        "file": str(file),
        "test": None if test is None else str(Path(test).absolute()),
        "text_columns": list(columns.text),
        "label_column": columns.label,
        "kind": columns.kind,
        "group_column": group,
        "folds": folds,
        **({"separator": separator} if separator != "," else {}),
    }
    run = {"save_weights": False, "tensorboard": False, "checkpoint_minutes": None, "output": str(output.absolute())}
    return {"task": task, "model": {"path": encoder}, "data": {"pad_to": 0.95}, "method": "vanilla", "run": run}


def _with_settings(raw: dict[str, Any], output: Path, settings: Sequence[str]) -> Config:
    """The config of all runs, written to the folder; a folder of another comparison is refused."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / CONFIG
    text = strict_yaml.dump(raw)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise AgwmError(
            f"{output} holds another comparison (see {path}); choose another --output or remove the folder."
        )
    run_folder.write_text(path, text)
    return load_config(path, settings_of("vanilla", settings))


class _Final(NamedTuple):
    """What training on the whole file gave: these fields of `Comparison`."""

    model: FittedModel
    test_scores: dict[str, float]
    warnings: list[str]


def _finished_before(output: Path, best: Scored) -> _Final | None:
    """The final model of an earlier call that recommended the same."""
    path = output / ANSWER
    if not path.exists() or not (output / MODEL).exists():
        return None
    said = json.loads(path.read_text(encoding="utf-8"))
    if said["recommended"] != pages.recommended(best):
        return None
    return _Final(load_exported(output / MODEL), said["test_scores"], said["warnings"])


def _fit(pretrained: Pretrained, task: Task, settings: Config, *, temperature: float, text_columns: Any) -> _Final:
    """The recommended method on the whole file, as it was trained on the folds."""
    result = fit(
        pretrained,
        settings.method,
        task,
        finetune=settings.finetune.model_dump(mode="json"),
        data=settings.data.model_dump(mode="json"),
        loss=settings.loss.model_dump(mode="json"),
        techniques={each.name: each.model_dump(mode="json", exclude={"name"}) for each in settings.techniques.chosen},
        frozen=settings.model.frozen,
    )
    model = result.model._replace(temperature=temperature, text_columns=text_columns)
    # What is cut is among the findings.
    warnings = [each["message"] for each in result.warnings if each["name"] != "texts_truncated"]
    return _Final(model, result.scores.get("test", {}), warnings)


def _write(comparison: Comparison, output: Path, *, anew: bool) -> None:
    """The model, if it is new, its card, the answer and the reports; the answer last, for it says that the model is."""
    folder, card = output / MODEL, pages.card(comparison)
    if anew:
        if folder.exists():
            shutil.rmtree(folder)
        beside = {"README.md": card, "training.yaml": dump_config(comparison.settings)}
        comparison.model.save(folder, beside=beside)
    else:
        run_folder.write_text(folder / "README.md", card)  # other methods may have been tried since
    pages.write(comparison, output)
    run_folder.write_text(output / ANSWER, json.dumps(pages.answer(comparison), indent=2) + "\n")
