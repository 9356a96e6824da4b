"""One file in, an answer out: what is in it, which method to take and how sure that is, and the trained model."""

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from agwm_jax.data.draws import Rows
from agwm_jax.data.files import read_table, write_table
from agwm_jax.data.tasks import Task
from agwm_jax.errors import AgwmError
from agwm_jax.methods.interface import METHODS
from agwm_jax.models.huggingface import Pretrained
from agwm_jax.runs import folder as run_folder
from agwm_jax.runs.build import digests, read_model
from agwm_jax.runs.compare import settings_of
from agwm_jax.runs.fitted import FittedModel, load_exported
from agwm_jax.runs.fitting import Result, fit
from agwm_jax.runs.run import refuse_changed_data
from agwm_jax.runs.sweep import LOG, Cell, sweep
from agwm_jax.selection import pages
from agwm_jax.selection.columns import Columns, guess_columns
from agwm_jax.selection.findings import findings
from agwm_jax.selection.trials import METHODS_TRIED, check_methods, factors, passes, rates
from agwm_jax.selection.verdict import Calibration, Scored, Trial, calibrate, recommend, score, sentences
from agwm_jax.settings import Config, dump_config, load_config, strict_yaml

CONFIG, RUNS, MODEL, ANSWER = "compare.yaml", "runs", "model", "compare.json"
_FEW_FOLDS = 3
_START = 25.0
"""Seconds that a process takes to start and compile, about; for what is left to be tried."""
Tell = Callable[[str], None]


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
    """The recommended method, trained on the whole file; in `pages.card` too."""
    test_scores: dict[str, float]
    """Of `model` on the test file; empty without one."""
    warnings: list[str]
    """Of the final training."""
    encoder: str
    settings: Config
    """Of the final training."""


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
    trials = _Trials(config, output, settings, methods, rows, task, pretrained, tell)
    trials.run(began, budget)
    held = trials.seeds
    labels = [np.asarray(task.splits["train"]["label"])[rows[seed]["validation"]] for seed in held]
    scored = [score(name, tried, labels, task.metrics) for name, tried in trials.tried.items() if tried]
    if not scored:
        raise AgwmError(f"no method could be trained: {' '.join(trials.notes)}")
    metric = task.metrics[0]
    best = recommend(scored, metric)
    calibration = calibrate(best.logits, np.concatenate(labels)) if task.kind == "classification" else None
    said = sentences(scored, best, metric, guessing=_guessing(np.concatenate(labels), metric))
    tell("\n" + pages.table(scored, task.metrics))
    for sentence in said:
        tell(sentence)
    final = trials.config(best.method, best.factor)
    comparison = Comparison(
        columns=columns,
        task=task,
        findings=found,
        scored=scored,
        recommended=best,
        sentences=said,
        notes=trials.notes,
        rows=np.concatenate([rows[seed]["validation"] for seed in held]),
        calibration=calibration,
        model=FittedModel(task, pretrained, {}, None, final.data),  # until it is trained
        test_scores={},
        warnings=[],
        encoder=encoder,
        settings=final,
    )
    comparison = _trained(comparison, output, tell)
    pages.write(comparison, output)
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


class _Trials:
    """All trainings of a comparison, in the order in which they are worth their time."""

    def __init__(
        self,
        config: Config,
        output: Path,
        settings: Sequence[str],
        methods: Sequence[str],
        rows: Sequence[Rows],
        task: Task,
        pretrained: Pretrained,
        tell: Tell,
    ):
        self.base, self.output, self.settings, self.tell = config, output, settings, tell
        self.factors = factors(pretrained.config.hidden_size)
        self.passes = passes(len(rows[0]["train"]), config.data.batch_size)
        self.metric, self.seeds = task.metrics[0], tuple(range(len(rows)))
        self.cells = {(name, x): self._cell(name, x, self.seeds) for x in self.factors for name in methods}
        self.tried: dict[str, list[Trial]] = {name: [] for name in methods}
        self.data = digests(config)
        self.notes: list[str] = []
        self.failed: list[str] = []

    def words(self, method: str, factor: float) -> list[str]:
        """Settings of a method at a rate; all methods pass over the training texts equally often."""
        own, given = ["--method", method, *rates(method, factor)], settings_of(method, self.settings)
        extra = load_config(self.output / CONFIG, [*own, *given]).method.extra_passes
        return [*own, "--finetune.epochs", str(max(1, self.passes - extra)), *given]

    def config(self, method: str, factor: float) -> Config:
        """See `words`."""
        return load_config(self.output / CONFIG, self.words(method, factor))

    def _cell(self, method: str, factor: float, seeds: Sequence[int]) -> Cell:
        words = ("--config", str(self.output / CONFIG), *self.words(method, factor))
        return Cell(self.base.task.name, method, {"rate": f"{factor:.3g}x"}, words, tuple(seeds), (), "vanilla")

    def run(self, began: float, budget: float | None) -> None:
        """Try every method at the first rate, then at the next ones as far as the time goes; equally often for all.

        A method without a rate is tried once.
        """
        ends = None if budget is None else began + budget
        if ends is not None:
            self._fit_folds(ends)
        for number, factor in enumerate(self.factors):
            round_began = time.monotonic()
            methods = [name for name in self.tried if number == 0 or METHODS[name].value.has_rate]
            if not methods:
                break
            for place, method in enumerate(methods):
                # The first round may leave methods out; a later one is whole or not begun.
                if number == 0 and place > 1 and ends is not None and time.monotonic() + self._next() > ends:
                    self.notes.append(
                        f"The time was too short for {', '.join(methods[place:])}. A longer --budget goes on from here."
                    )
                    break
                self._try(method, factor)
            spent = time.monotonic() - round_began
            if ends is not None and number + 1 < len(self.factors) and time.monotonic() + spent + self._final() > ends:
                others = " and ".join(f"{x:.3g}" for x in self.factors[number + 1 :])
                self.notes.append(
                    f"The time was too short for other learning rates ({others} times the default). A longer --budget "
                    "goes on from here."
                )
                break
        for name in self.failed:
            self.notes.append(f"{name} failed; its log says why.")

    def _fit_folds(self, ends: float) -> None:
        """Hold out fewer folds where all of them would take longer than there is time for."""
        pilot = next((name for name in self.tried if METHODS[name].value.has_rate), None)
        if pilot is None:
            return
        first = self._cell(pilot, self.factors[0], (0,))
        sweep([first], self.output / RUNS)
        result = run_folder.read_result(self.output / RUNS / first.name / "seed-0")
        if result is None:  # it fails again in its turn, and is told then
            return
        once, folds = _seconds(result), len(self.seeds)

        def expected(count: int) -> float:
            return time.monotonic() + len(self.tried) * (_START + count * once) + _START + once

        count = next((k for k in range(folds, _FEW_FOLDS, -1) if expected(k) <= ends), min(folds, _FEW_FOLDS))
        if count < folds:
            self.notes.append(
                f"The time was too short to hold out all {folds} folds: the scores are of {count} of them."
            )
            self.seeds = self.seeds[:count]
            self.cells = {key: self._cell(*key, self.seeds) for key in self.cells}

    def _next(self) -> float:
        """Seconds that the next method and the final training will take, about."""
        return _START + len(self.seeds) * self._longest() + self._final()

    def _final(self) -> float:
        """Seconds that the training on everything will take, about."""
        return _START + 1.25 * self._longest()

    def _longest(self) -> float:
        return max((trial.seconds for tried in self.tried.values() for trial in tried), default=0.0)

    def _try(self, method: str, factor: float) -> None:
        cell = self.cells[method, factor]
        folders = [self.output / RUNS / cell.name / f"seed-{seed}" for seed in self.seeds]
        for folder in folders:
            refuse_changed_data(folder, self.data)
        sweep(list(self.cells.values()), self.output / RUNS, only=[cell.name])
        results = [result for folder in folders if (result := run_folder.read_result(folder)) is not None]
        if len(results) < len(folders):  # a fold diverged, or the process failed
            self.failed.append(cell.name)
            self.tell(f"{cell.name} failed: see {self.output / RUNS / cell.name / LOG}")
            return
        scores = tuple(result["scores"]["validation"][self.metric] for result in results)
        logits = tuple(run_folder.read_logits(folder)["validation"] for folder in folders)
        seconds = float(np.mean([_seconds(result) for result in results]))
        self.tried[method].append(Trial(factor, logits, scores, seconds))
        rate = f" at {factor:.3g} times its rate" if METHODS[method].value.has_rate else ""
        mean = f"{100 * np.mean(scores):.1f} (mean of {len(scores)} folds, {seconds:.0f} s each)"
        self.tell(f"{method}{rate}: {self.metric} {mean}")


def _seconds(result: Mapping[str, Any]) -> float:
    """Of a run, without compiling."""
    return result["seconds"]["total"] - result["seconds"].get("compile", 0.0)


def _trained(comparison: Comparison, output: Path, tell: Tell) -> Comparison:
    """Train what is recommended on the whole file and save it, or read it where that was done."""
    folder, before = output / MODEL, _read_answer(output / ANSWER)
    if folder.exists() and before is not None and before["recommended"] == pages.answer(comparison)["recommended"]:
        tell(f"model: {folder} (as it was)")
        comparison = comparison._replace(
            model=load_exported(folder), test_scores=before["test_scores"], warnings=before["warnings"]
        )
        run_folder.write_text(folder / "README.md", pages.card(comparison))  # other methods may have been tried since
        _write_answer(comparison, output)
        return comparison
    task, best = comparison.task, comparison.recommended
    tell(f"training {best.method} on all {len(task.splits['train'])} texts")
    result = fit_final(comparison)
    temperature = 1.0 if comparison.calibration is None else comparison.calibration.temperature
    model = result.model._replace(temperature=temperature, text_columns=comparison.columns.text)
    comparison = comparison._replace(
        model=model,
        test_scores=result.scores.get("test", {}),
        # What is cut is among the findings.
        warnings=[warning["message"] for warning in result.warnings if warning["name"] != "texts_truncated"],
    )
    if folder.exists():
        shutil.rmtree(folder)
    model.save(folder, beside={"README.md": pages.card(comparison), "training.yaml": dump_config(comparison.settings)})
    _write_answer(comparison, output)
    tell(f"model: {folder}")
    return comparison


def fit_final(comparison: Comparison) -> Result:
    """The recommended method on the whole file, as it was trained on the folds."""
    settings = comparison.settings
    return fit(
        comparison.model.pretrained,
        settings.method,
        comparison.task,
        finetune=settings.finetune.model_dump(mode="json"),
        data=settings.data.model_dump(mode="json"),
        techniques={each.name: each.model_dump(mode="json", exclude={"name"}) for each in settings.techniques.chosen},
        frozen=settings.model.frozen,
    )


def _write_answer(comparison: Comparison, output: Path) -> None:
    run_folder.write_text(output / ANSWER, json.dumps(pages.answer(comparison), indent=2) + "\n")


def _read_answer(path: Path) -> Mapping[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
