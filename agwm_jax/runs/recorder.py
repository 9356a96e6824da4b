"""What a run tells while it runs: metrics.jsonl, TensorBoard events, warnings and the progress bar."""

import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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

from agwm_jax.engine.observer import Observer, records_of
from agwm_jax.methods.interface import Method, MethodWarning, Phase
from agwm_jax.runs.folder import write_text


class Told(NamedTuple):
    """A member of a group as the user is told of it."""

    folder: Path
    """Its run folder."""
    name: str
    """How a line calls it; "" for a run that is alone."""
    method: Method


class _Files:
    """Writes the records of one member."""

    def __init__(self, told: Told, *, lies_before: Callable[[str, int], bool], tensorboard: bool):
        path = told.folder / "metrics.jsonl"
        self.records = _records_before(path, lies_before)
        write_text(path, "".join(json.dumps(record) + "\n" for record in self.records))
        self._file = path.open("a", encoding="utf-8")
        self._events = _open_events(told.folder / "tensorboard", len(self.records)) if tensorboard else None
        self._method = told.method
        self._of_phase: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for record in self.records:
            self._of_phase[record["phase"]].append(record)
        self._warned: dict[str, set[str]] = defaultdict(set)
        self._next_look: dict[str, float] = defaultdict(float)

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()

    def add(self, phase: str, infos: Sequence[Mapping[str, float]], records: Sequence[dict[str, Any]]) -> None:
        self.records += records
        self._of_phase[phase] += records
        self._file.write("".join(json.dumps(record) + "\n" for record in records))
        self._file.flush()
        if self._events is None:
            return
        for info, record in zip(infos, records, strict=True):
            for key, value in info.items():
                summary = scalar(f"{phase.split('-')[0]}/{key}", value)
                self._events.write_event(Event(wall_time=time.time(), step=record["global_step"], summary=summary))
        self._events.flush()

    def new_warnings(self, phase: str, *, last_chunk: bool) -> list[MethodWarning]:
        """The failure signatures that a phase shows for the first time."""
        # Looking costs a pass over the records: at growing distances, so that a long search costs a few passes in all.
        records, warned = self._of_phase[phase], self._warned[phase]
        if len(records) < self._next_look[phase] and not last_chunk:
            return []
        self._next_look[phase] = 1.2 * len(records)
        found = [warning for warning in self._method.warnings(records) if warning.name not in warned]
        warned |= {warning.name for warning in found}
        return found


class Recorder(Observer):
    """The observer that writes run folders and shows a bar; a context manager.

    Args:
        members: of the group.
        tensorboard: write event files too.
        progress: show the bar.
        active: whether this process is the one that writes and tells.
    """

    def __init__(self, members: Sequence[Told], *, tensorboard: bool, progress: bool, active: bool = True):
        self._members, self._tensorboard, self._active = members, tensorboard, active
        self._files: list[_Files] = []
        self._given_up: set[int] = set()
        self._console = Console(stderr=True, quiet=not active)
        self._progress = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[losses]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not progress or not active,
        )
        self._bar: TaskID | None = None
        self._last: dict[tuple[int, str], Mapping[str, float]] = {}

    def __enter__(self) -> "Recorder":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the files, whatever happened."""
        self._progress.stop()
        for files in self._files:
            files.close()

    def records(self, member: int) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl of a member."""
        return self._files[member].records if self._files else []

    def resume(self, lies_before: Callable[[str, int], bool]) -> None:
        """Open the files; steps that an earlier process took and that are taken again are dropped."""
        if self._active:
            options: dict[str, Any] = {"lies_before": lies_before, "tensorboard": self._tensorboard}
            self._files = [_Files(told, **options) for told in self._members]

    def begin(self, stage: str, *, step: int, num_steps: int) -> None:
        """Show a bar for the stage."""
        self._last = {}
        self._bar = self._progress.add_task(stage, total=num_steps, completed=step, losses="compiling")

    def chunk(self, member: int, phase: Phase, infos: Sequence[Mapping[str, float]], *, step: int, offset: int) -> None:
        """Write the records, and name a failure signature the first time that a phase shows it."""
        self._last[member, phase.name] = infos[-1]
        self._show(step + len(infos))
        if not self._active:
            return
        files = self._files[member]
        files.add(phase.name, infos, records_of(phase, infos, step=step, offset=offset))
        for warning in files.new_warnings(phase.name, last_chunk=step + len(infos) == phase.num_steps):
            self._say_of(member, f"warning: {warning.message} [{warning.name}]")

    def give_up(self, member: int, sentence: str) -> None:
        """A member diverged; where others go on, say so."""
        self._given_up.add(member)
        self._last = {key: info for key, info in self._last.items() if key[0] != member}
        if len(self._given_up) < len(self._members):
            self._say_of(member, f"given up, the others go on: {sentence}")

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _say_of(self, member: int, text: str) -> None:
        name = self._members[member].name
        self.say(f"{name}: {text}" if name else text)

    def _show(self, completed: int) -> None:
        """Bring the bar up to date: the mean over all that run at once."""
        if self._bar is None:
            return
        means = {}
        for name in ("loss", "outer_loss"):
            values = [info[name] for info in self._last.values() if name in info]
            means[name] = f"{sum(values) / len(values):.4f}" if values else ""
        losses = f"loss {means['loss']}" + (f"  outer {means['outer_loss']}" if means["outer_loss"] else "")
        self._progress.update(self._bar, completed=completed, losses=losses)


def _open_events(folder: Path, resume_step: int) -> EventsWriter:
    # Written by this thread: a summary writer has one of its own, which dies of a full disk, and the run then hangs.
    folder.mkdir(exist_ok=True)
    writer = EventsWriter(str(folder / "events"))
    writer.write_event(Event(wall_time=time.time(), step=resume_step, session_log=SessionLog(status=SessionLog.START)))
    return writer


def _records_before(path: Path, lies_before: Callable[[str, int], bool]) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # the line that a killed process was writing
            break
        if lies_before(record["phase"], record["step"]):
            records.append(record)
    return records
