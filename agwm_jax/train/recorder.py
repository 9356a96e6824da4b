"""What a run tells while it runs: metrics.jsonl, TensorBoard events and the progress bars."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from tensorboardX import SummaryWriter

from agwm_jax.diagnostics import search_warnings


class Recorder:
    """Writes the records of one run; a context manager.

    Args:
        folder: the run folder.
        resume_step: global step to continue from; later records, left by a process that died, are dropped.
        tensorboard: write event files too.
        progress: show bars.
    """

    def __init__(self, folder: Path, *, resume_step: int, tensorboard: bool, progress: bool):
        """Open the files of `folder`."""
        path = folder / "metrics.jsonl"
        self.records: list[dict[str, Any]] = _records_before(path, resume_step)
        path.write_text("".join(json.dumps(record) + "\n" for record in self.records))
        self._file = path.open("a")
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step) if tensorboard else None
        self.console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[losses]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not progress,
        )
        self._bars: dict[str, TaskID] = {}
        self._warned: set[tuple[str, str]] = set()

    def __enter__(self):
        """Show the bars."""
        self._progress.start()
        return self

    def __exit__(self, *exception):
        """Close the files, whatever happened."""
        self._progress.stop()
        self._file.close()
        if self._events is not None:
            self._events.close()

    def begin(self, phase: str, *, step: int, num_steps: int) -> None:
        """A phase starts, or continues at `step`."""
        self._bars[phase] = self._progress.add_task(phase, total=num_steps, completed=step, losses="compiling")

    def say(self, text: str) -> None:
        """A line above the bars."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def chunk(
        self, phase: str, infos: Sequence[Mapping[str, float]], *, step: int, num_steps: int, offset: int
    ) -> None:
        """Record steps `step`, `step` + 1, ... of a phase whose first step is the run's `offset`-th."""
        for i, info in enumerate(infos, start=step):
            values = {name: value if math.isfinite(value) else None for name, value in info.items()}
            record = {"phase": phase, "step": i, "num_steps": num_steps, "global_step": offset + i, **values}
            self.records.append(record)
            self._file.write(json.dumps(record) + "\n")
            if self._events is not None:
                for name, value in info.items():
                    self._events.add_scalar(f"{phase.split('-')[0]}/{name}", value, offset + i)
        self._file.flush()
        last = infos[-1]
        losses = f"loss {last['loss']:.4f}" + (f"  outer {last['outer_loss']:.4f}" if "outer_loss" in last else "")
        self._progress.update(self._bars[phase], completed=step + len(infos), losses=losses)
        self._warn(phase)

    def _warn(self, phase: str) -> None:
        """Name a failure signature the first time that a phase shows it."""
        for warning in search_warnings([record for record in self.records if record["phase"] == phase]):
            if (phase, warning.name) not in self._warned:
                self._warned.add((phase, warning.name))
                self.say(f"warning: {warning.message} [{warning.name}]")


def _records_before(path: Path, global_step: int) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # the line that a killed process was writing
            break
        if record["global_step"] < global_step:
            records.append(record)
    return records
