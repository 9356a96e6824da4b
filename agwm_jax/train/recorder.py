"""What a run tells while it runs: metrics.jsonl, TensorBoard events and the progress bars."""

import json
import math
import time
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
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from agwm_jax.diagnostics import search_warnings
from agwm_jax.train.run_folder import write_text


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
        write_text(path, "".join(json.dumps(record) + "\n" for record in self.records))
        self._file = path.open("a")
        self._events = _open_events(folder / "tensorboard", resume_step) if tensorboard else None
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
        self._phase: list[dict[str, Any]] = []
        self._warned: set[str] = set()

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
        self._phase = [record for record in self.records if record["phase"] == phase]
        self._warned = set()
        self._next_look = 0.0
        self._bars[phase] = self._progress.add_task(phase, total=num_steps, completed=step, losses="compiling")

    def say(self, text: str) -> None:
        """A line above the bars."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def chunk(
        self, phase: str, infos: Sequence[Mapping[str, float]], *, step: int, num_steps: int, offset: int
    ) -> None:
        """Record steps `step`, `step` + 1, ... of a phase whose first step is the run's `offset`-th."""
        for i, info in enumerate(infos, start=step):
            values = {name: value if math.isfinite(value) else None for name, value in info.items()}
            record = {"phase": phase, "step": i, "num_steps": num_steps, "global_step": offset + i, **values}
            self.records.append(record)
            self._phase.append(record)
            self._file.write(json.dumps(record) + "\n")
            if self._events is not None:
                for name, value in info.items():
                    summary = scalar(f"{phase.split('-')[0]}/{name}", value)
                    self._events.write_event(Event(wall_time=time.time(), step=offset + i, summary=summary))
        self._file.flush()
        if self._events is not None:
            self._events.flush()
        last = infos[-1]
        losses = f"loss {last['loss']:.4f}" + (f"  outer {last['outer_loss']:.4f}" if "outer_loss" in last else "")
        self._progress.update(self._bars[phase], completed=step + len(infos), losses=losses)
        if phase.startswith("search"):
            self._warn(last_chunk=step + len(infos) == num_steps)

    def _warn(self, *, last_chunk: bool) -> None:
        """Name a failure signature the first time that a search shows it."""
        # Looking costs a pass over the records: at growing distances, so that a long search costs a few passes in all.
        if len(self._phase) < self._next_look and not last_chunk:
            return
        self._next_look = 1.2 * len(self._phase)
        for warning in search_warnings(self._phase):
            if warning.name not in self._warned:
                self._warned.add(warning.name)
                self.say(f"warning: {warning.message} [{warning.name}]")


def _open_events(folder: Path, resume_step: int) -> EventsWriter:
    # Written by this thread: a summary writer has one of its own, which dies of a full disk, and the run then hangs.
    folder.mkdir(exist_ok=True)
    writer = EventsWriter(str(folder / "events"))
    writer.write_event(Event(wall_time=time.time(), step=resume_step, session_log=SessionLog(status=SessionLog.START)))
    return writer


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
