"""A study: tasks x arms x grid x seeds as one plan of runs, which goes on where it was stopped, and one table."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from fnmatch import fnmatch
from pathlib import Path
from string import Template
from typing import Annotated, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from pydantic import Field, Strict, ValidationError, model_validator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from agwm_jax.errors import AgwmError, did_you_mean
from agwm_jax.orphans import PARENT
from agwm_jax.runs import folder as run_folder
from agwm_jax.section import Section, refuse
from agwm_jax.settings import Config, load_config, strict_yaml
from agwm_jax.settings.words import faults

Seeds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Strict(False)]
Settings = dict[str, Any]
TABLE, LOG = "results.parquet", "log.txt"
_NAME = r"^[\w.+-]+$"  # of a folder
_COLUMNS = ("task", "arm", "control", "seed", "tuning", "metric", "reported", "seconds", "device", "commit")


class Study(Section):
    """What is run: every arm on every task at every point of the grid, with all seeds.

    A text value of a setting may name a variable of the grid, or the task, as ``${rate}`` or ``${task}``.
    """

    tasks: dict[Annotated[str, Field(pattern=_NAME)], str] = Field(
        min_length=1, description="config file by name, relative to the study's file"
    )
    settings: Settings = Field(default={}, description="of all runs, by dotted path")
    arms: dict[Annotated[str, Field(pattern=_NAME)], Settings] = Field(
        min_length=1,
        description="what is compared: settings by name, which go over those of all runs; the method is the arm's own "
        "name where none is given",
    )
    grid: dict[Annotated[str, Field(pattern=r"^[a-z]\w*$")], list[Any]] = Field(
        default={}, description="values of each variable; all combinations are run"
    )
    seeds: Seeds = Field(min_length=1, description="of the runs that are reported")
    tuning_seeds: Seeds = Field(default=(), description="of runs that only choose among points of the grid")
    controls: dict[str, str] = Field(
        default={}, description="the arm that each arm is compared with; of those not named here the first arm"
    )

    @model_validator(mode="after")
    def _fits_together(self):
        unknown = next((n for pair in self.controls.items() for n in pair if n not in self.arms), None)
        taken = next((name for name in self.grid if name in _COLUMNS), None)
        twice = len({*self.seeds, *self.tuning_seeds}) < len(self.seeds) + len(self.tuning_seeds)
        refuse(
            (unknown is not None, f"controls: {unknown} is no arm{did_you_mean(unknown, self.arms)}"),
            (taken is not None, f"grid: {taken} is a column of the table of results; call the variable something else"),
            (twice, "seeds, tuning_seeds: one is given twice; what chooses a point must not be scored at it"),
        )
        return self

    def control(self, arm: str) -> str:
        """The arm that an arm is compared with; "" for the first."""
        first = next(iter(self.arms))
        return self.controls.get(arm, "" if arm == first else first)


class Cell(NamedTuple):
    """The runs of one process: one arm on one task at one point of the grid, with all seeds."""

    task: str
    arm: str
    point: Mapping[str, Any]
    words: tuple[str, ...]
    """Of `agwm train`, but for the output."""
    reported: tuple[int, ...]
    tuning: tuple[int, ...]
    control: str
    """The arm that it is compared with; "" for none."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of all its runs."""
        return (*self.reported, *self.tuning)

    @property
    def name(self) -> str:
        """``task/arm/rate=0.0001``, the folder of its runs too."""
        values = [f"{name}={str(value).replace(os.sep, '_')}" for name, value in self.point.items()]
        return "/".join([self.task, self.arm, *(["+".join(values)] if values else [])])


class Failure(NamedTuple):
    """A cell whose process ended with an error."""

    cell: Cell
    code: int
    log: Path


def read_study(path: Path) -> Study:
    """The study of a YAML file.

    Raises:
        AgwmError: no such file, not YAML, or no study; with all faults.
    """
    try:
        raw = strict_yaml.parse(path.read_text("utf-8-sig"))
        return Study.model_validate(raw)
    except OSError as error:
        raise AgwmError(f"{path}: {error.strerror}; expected the YAML file of a study") from None
    except (yaml.YAMLError, ValueError) as error:
        if not isinstance(error, ValidationError):
            raise AgwmError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
        found = faults(error, raw if isinstance(raw, dict) else {}, Study)
        raise AgwmError("\n  ".join([f"{path}: no study", *found])) from None


def plan(study: Study, folder: Path, overrides: Sequence[str] = ()) -> list[Cell]:
    """All cells, in the order of the file: tasks, then grid, then arms; each one's settings are checked.

    Args:
        study: what is run.
        folder: that the tasks' config files are relative to.
        overrides: settings of all runs, as `agwm train` takes them; they too may hold ``${task}``.

    Raises:
        AgwmError: a setting that does not exist, an unknown variable.
    """
    cells = []
    for task, values in itertools.product(study.tasks, itertools.product(*study.grid.values())):
        point = dict(zip(study.grid, values, strict=True))
        for arm, own in study.arms.items():
            given = {"method": arm, **study.settings, **own}
            words = [word for name, value in given.items() for word in (f"--{name}", _filled(value, task, point, arm))]
            words += [_filled(word, task, point, arm) for word in overrides]
            config = ("--config", str(folder / study.tasks[task]))
            cells.append(Cell(task, arm, point, (*config, *words), study.seeds, study.tuning_seeds, study.control(arm)))
    for cell in cells:
        _config(cell)
    return cells


def _config(cell: Cell) -> Config:
    _, file, *words = cell.words
    return load_config(file, words)


def select(cells: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
    """The cells that one of the patterns names, such as ``stsb/vanilla/*``; all without patterns.

    Raises:
        AgwmError: there are none.
    """
    kept = [cell for cell in cells if not only or any(fnmatch(cell.name, pattern) for pattern in only)]
    if not kept:
        raise AgwmError(f"--only {' '.join(only)}: no cell of the {len(cells)} is so named, such as {cells[0].name}")
    return kept


def _filled(value: Any, task: str, point: Mapping[str, Any], arm: str) -> str:
    """A setting as typed, with the variables that it names."""
    if not isinstance(value, str):
        return strict_yaml.one_line(value)
    known = {"task": task, **{name: strict_yaml.one_line(each) for name, each in point.items()}}
    template = Template(value)
    for name in template.get_identifiers():
        if name not in known:
            raise AgwmError(f"arm {arm}: ${{{name}}} is no variable of the grid{did_you_mean(name, known)}")
    return template.safe_substitute(known)


def sweep(cells: Sequence[Cell], output: Path, *, only: Sequence[str] = (), workers: int = 1) -> list[Failure]:
    """Run what is not finished, `workers` processes at once; those that failed. A failure does not stop the others.

    Writes ``output/results.parquet`` of all cells after every cell, and each process's text to ``log.txt`` of the
    cell's folder. Several workers on one accelerator share its memory evenly, unless XLA_PYTHON_CLIENT_MEM_FRACTION
    says otherwise.

    Args:
        cells: the whole plan.
        output: folder of their folders.
        only: see `select`.
        workers: processes at once.

    Raises:
        AgwmError: `only` names no cell, or `output` holds runs of a plan with other settings.
        KeyboardInterrupt: on SIGINT or SIGTERM, after the processes that were running have saved their state.
    """
    wanted = select(cells, only)
    for cell in cells:
        _refuse_other_settings(cell, output)
    left = [cell for cell in wanted if not _is_finished(cell, output)]
    failures: list[Failure] = []
    processes = _Processes()
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with (
        Progress(*columns, TextColumn("left"), TimeRemainingColumn()) as progress,
        ThreadPoolExecutor(workers) as pool,
        _terminated_as_interrupted(),
    ):
        bar = progress.add_task(left[0].name if left else "cells", total=len(wanted), completed=len(wanted) - len(left))
        running = {pool.submit(_run, cell, output, workers, processes): cell for cell in left}
        try:
            for done in as_completed(running):
                cell, code = running[done], done.result()
                if code:
                    failures.append(Failure(cell, code, output / cell.name / LOG))
                progress.update(bar, advance=1, description=f"{cell.name}{' FAILED' if code else ''}")
                write_table(cells, output)
        except KeyboardInterrupt:
            progress.console.print("stopping: the runs that are under way save their state first")
            processes.stop()
            pool.shutdown(cancel_futures=True)
            raise KeyboardInterrupt("interrupted; run the same command again to continue") from None
    write_table(cells, output)
    return failures


class _Processes:
    """Those that run now. Each is in a session of its own, so that Ctrl-C reaches it once: from here."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def run(self, command: Sequence[str], **options: Any) -> int:
        """The exit code; 0 without having started once they were stopped."""
        with self._lock:
            if self._stopped:
                return 0
            process = subprocess.Popen(command, start_new_session=True, **options)
            self._running.add(process)
        code = process.wait()
        with self._lock:
            self._running.discard(process)
        return code

    def stop(self) -> None:
        """Ask all to save and stop, and start no more."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.send_signal(signal.SIGINT)


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, as a cluster sends it before it ends a job, does what Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(cell: Cell, output: Path, workers: int, processes: _Processes) -> int:
    folder = output / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    # Several processes on one accelerator: none takes all of its memory before the others start.
    share = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.92 / workers:.3f}"}
    environment = {**(share if workers > 1 else {}), **os.environ, PARENT: str(os.getpid())}
    seeds = f"[{', '.join(map(str, cell.seeds))}]"
    command = [sys.executable, "-m", "agwm_jax", "train", *cell.words, "--output", str(folder), "--seeds", seeds]
    with (folder / LOG).open("w") as log:
        return processes.run(command, stdout=log, stderr=log, env=environment)


def _refuse_other_settings(cell: Cell, output: Path) -> None:
    """A study that was edited must not report the runs of what it was."""
    for seed in cell.seeds:
        folder = output / cell.name / f"seed-{seed}"
        if (folder / "config.yaml").exists():  # one seed speaks for all of a cell: they differ in nothing else
            config = _config(cell)
            run_folder.check(folder, config.model_copy(update={"run": config.run.model_copy(update={"seed": seed})}))
            return


def _is_finished(cell: Cell, output: Path) -> bool:
    return all(_result(cell, output, seed).exists() for seed in cell.seeds)


def _result(cell: Cell, output: Path, seed: int) -> Path:
    return output / cell.name / f"seed-{seed}" / "result.json"


def rows(cells: Sequence[Cell], output: Path) -> Iterator[dict[str, Any]]:
    """A row a finished run: where it stands in the study, scores in points, seconds, bytes."""
    for cell in cells:
        for seed in cell.seeds:
            file = _result(cell, output, seed)
            if not file.exists():
                continue
            result = json.loads(file.read_text())
            metric = result["metric"]
            yield {
                "task": cell.task,
                "arm": cell.arm,
                **cell.point,
                "control": cell.control,
                "seed": seed,
                "tuning": seed in cell.tuning,
                "metric": metric,
                **{split: 100 * scores[metric] for split, scores in result["scores"].items() if metric in scores},
                "reported": result["split"],
                "seconds": result["seconds"]["total"],
                "compile_seconds": result["seconds"].get("compile", 0.0),
                "peak_memory_bytes": result["peak_memory_bytes"],
                "device": result["device"],
                "commit": result["git_commit"] or "",
            }


def write_table(cells: Sequence[Cell], output: Path) -> Path | None:
    """All finished runs as one Parquet table; None where there is none yet."""
    found = list(rows(cells, output))
    if not found:
        return None
    names = dict.fromkeys(name for row in found for name in row)
    table = pa.Table.from_pylist([{name: row.get(name) for name in names} for row in found])
    table = table.replace_schema_metadata({"grid": " ".join(cells[0].point)})
    partial, path = output / f".{TABLE}", output / TABLE
    pq.write_table(table, partial)
    partial.replace(path)  # a reader finds a whole table or none
    return path
