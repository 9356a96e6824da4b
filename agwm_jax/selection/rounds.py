"""The trainings of a comparison: every method on every fold at the same rates, in rounds, as far as the time goes."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agwm_jax.data.draws import Rows
from agwm_jax.data.tasks import Task
from agwm_jax.errors import AgwmError
from agwm_jax.methods.interface import METHODS
from agwm_jax.runs import folder as run_folder
from agwm_jax.runs.build import digests
from agwm_jax.runs.compare import settings_of
from agwm_jax.runs.run import refuse_changed_data
from agwm_jax.runs.sweep import LOG, Cell, sweep
from agwm_jax.selection.trials import factors, passes, rates
from agwm_jax.selection.verdict import Trial
from agwm_jax.settings import Config, load_config

CONFIG, RUNS = "compare.yaml", "runs"
"""In the folder of a comparison: the settings that all its runs share, and the folder of the runs."""
_FEW_FOLDS = 3
_START = 25.0
"""Seconds that a process takes to start and compile, about; for what is left to be tried."""
Tell = Callable[[str], None]


class Rounds:
    """All trainings of a comparison, in the order in which they are worth their time."""

    def __init__(
        self,
        config: Config,
        output: Path,
        settings: Sequence[str],
        methods: Sequence[str],
        rows: Sequence[Rows],
        task: Task,
        hidden_size: int,
        tell: Tell,
    ):
        """Check the settings of every run; nothing is trained yet.

        Raises:
            AgwmError: a setting is wrong, or a method needs a split that folds do not have.
        """
        self.base, self.output, self.settings, self.tell = config, output, settings, tell
        self.factors = factors(hidden_size)
        self.passes = passes(len(rows[0]["train"]), config.data.batch_size)
        self.metric, self.seeds = task.metrics[0], tuple(range(len(rows)))
        for name in methods:
            lacking = set(self.config(name, self.factors[0]).method.reads) & {"development"}
            if lacking:
                raise AgwmError(f"{name} reads a development split, which the folds of one file lack: leave it out.")
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
        self.notes += self.failed

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
        fewest = time.monotonic() + 2 * (_START + count * once) + _START + once
        if fewest > ends:
            self.tell(
                f"One training takes {once:.0f} s: even two methods on {count} folds will take about "
                f"{(fewest - ends) / 60:.0f} minutes more than the budget. A smaller file or encoder is faster."
            )
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
            log = self.output / RUNS / cell.name / LOG
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            said = [line for line in lines if line.startswith("agwm: ") and not line.startswith("agwm: warning")]
            why = said[-1].removeprefix("agwm: ") if said else f"see {log}."
            self.failed.append(f"{method} failed{self._rate(method, factor)}: {why}")
            self.tell(self.failed[-1])
            return
        scores = tuple(result["scores"]["validation"][self.metric] for result in results)
        logits = tuple(run_folder.read_logits(folder)["validation"] for folder in folders)
        seconds = float(np.mean([_seconds(result) for result in results]))
        self.tried[method].append(Trial(factor, logits, scores, seconds))
        mean = f"{100 * np.mean(scores):.1f} (mean of {len(scores)} folds, {seconds:.0f} s each)"
        self.tell(f"{method}{self._rate(method, factor)}: {self.metric} {mean}")

    def _rate(self, method: str, factor: float) -> str:
        return f" at {factor:.3g} times its rate" if METHODS[method].value.has_rate else ""


def _seconds(result: Mapping[str, Any]) -> float:
    """Of a run, without compiling."""
    return result["seconds"]["total"] - result["seconds"].get("compile", 0.0)
