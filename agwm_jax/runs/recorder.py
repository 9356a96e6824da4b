"""What a run tells while it runs: metrics.jsonl, TensorBoard events and the progress bars."""

import functools
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
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

from agwm_jax.engine.lanes import Round
from agwm_jax.methods.interface import Phase
from agwm_jax.methods.search_warnings import search_warnings
from agwm_jax.runs.folder import write_text


class Recorder:
    """Writes the records of one seed.

    Args:
        folder: the run folder.
        keep: which records of an earlier process stay, ``keep(phase, step)``; the others are of steps that are taken
            again.
        tensorboard: write event files too.
        say: tells the user.
    """

    def __init__(
        self, folder: Path, *, keep: Callable[[str, int], bool], tensorboard: bool, say: Callable[[str], None]
    ):
        """Open the files of `folder`."""
        path = folder / "metrics.jsonl"
        self.records: list[dict[str, Any]] = _records_before(path, keep)
        write_text(path, "".join(json.dumps(record) + "\n" for record in self.records))
        self._file = path.open("a")
        self._events = _open_events(folder / "tensorboard", len(self.records)) if tensorboard else None
        self._say = say
        self._of_phase: dict[str, list[dict[str, Any]]] = {}
        for record in self.records:
            self._of_phase.setdefault(record["phase"], []).append(record)
        self._warned: dict[str, set[str]] = defaultdict(set)
        self._next_look: dict[str, float] = defaultdict(float)

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._events is not None:
            self._events.close()

    def chunk(self, phase: Phase, infos: Sequence[Mapping[str, float]], *, step: int, offset: int) -> None:
        """Record steps `step`, `step` + 1, ... of a phase whose first step is the run's `offset`-th."""
        name, own = phase.name, self._of_phase.setdefault(phase.name, [])
        for i, info in enumerate(infos, start=step):
            values = {key: value if math.isfinite(value) else None for key, value in info.items()}
            record = {"phase": name, "step": i, "num_steps": phase.num_steps, "global_step": offset + i, **values}
            self.records.append(record)
            own.append(record)
            self._file.write(json.dumps(record) + "\n")
            if self._events is not None:
                for key, value in info.items():
                    summary = scalar(f"{name.split('-')[0]}/{key}", value)
                    self._events.write_event(Event(wall_time=time.time(), step=offset + i, summary=summary))
        self._file.flush()
        if self._events is not None:
            self._events.flush()
        if name.startswith("search"):
            self._warn(name, last_chunk=step + len(infos) == phase.num_steps)

    def _warn(self, phase: str, *, last_chunk: bool) -> None:
        """Name a failure signature the first time that a search shows it."""
        # Looking costs a pass over the records: at growing distances, so that a long search costs a few passes in all.
        records, warned = self._of_phase[phase], self._warned[phase]
        if len(records) < self._next_look[phase] and not last_chunk:
            return
        self._next_look[phase] = 1.2 * len(records)
        for warning in search_warnings(records):
            if warning.name not in warned:
                warned.add(warning.name)
                self._say(f"warning: {warning.message} [{warning.name}]")


class Recorders:
    """What a group of runs tells: a `Recorder` a member, and one display; a context manager.

    Args:
        folders: run folder of each member.
        names: how the display calls each member; "" for a run that is alone.
        tensorboard: write event files too.
        progress: show bars.
        active: whether this process is the one that writes and tells; the others only keep count of who diverged.
    """

    def __init__(
        self, folders: Sequence[Path], names: Sequence[str], *, tensorboard: bool, progress: bool, active: bool = True
    ):
        """Nothing is opened yet."""
        self.diverged: dict[int, str] = {}
        """What happened to members that are given up."""
        self.names, self._folders, self._tensorboard, self._active = names, folders, tensorboard, active
        self._recorders: list[Recorder] = []
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

    def __enter__(self):
        """Show the bars."""
        self._progress.start()
        return self

    def __exit__(self, *exception):
        """Close the files, whatever happened."""
        self._progress.stop()
        for recorder in self._recorders:
            recorder.close()

    def open(self, keep: Callable[[str, int], bool]) -> None:
        """Open the files; see `Recorder`."""
        if self._active:
            for folder, name in zip(self._folders, self.names, strict=True):
                say = functools.partial(self._say_of, name)
                self._recorders.append(Recorder(folder, keep=keep, tensorboard=self._tensorboard, say=say))

    def records(self, member: int) -> list[dict[str, Any]]:
        """The records of a member."""
        return self._recorders[member].records

    def say(self, text: str) -> None:
        """A line above the bars."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _say_of(self, name: str, text: str) -> None:
        self.say(f"{name}: {text}" if name else text)

    def begin(self, round_: Round, *, step: int) -> None:
        """Phases start, or continue at `step`."""
        self._last = {}
        self._bar = self._progress.add_task(round_.name, total=round_.num_steps, completed=step, losses="compiling")

    def chunk(self, member: int, phase: Phase, infos: Sequence[Mapping[str, float]], *, step: int, offset: int) -> None:
        """See `Recorder.chunk`; what comes after a member was given up is not kept."""
        if member not in self.diverged:
            self._last[member, phase.name] = infos[-1]
            if self._active:
                self._recorders[member].chunk(phase, infos, step=step, offset=offset)

    def give_up(self, member: int, sentence: str) -> None:
        """A member diverged; the others go on."""
        self.diverged[member] = sentence
        self._last = {key: info for key, info in self._last.items() if key[0] != member}
        if len(self.diverged) < len(self._folders):
            self._say_of(self.names[member], f"given up, the others go on: {sentence}")

    def show(self, completed: int) -> None:
        """Bring the bar up to date: the mean over all that run at once."""
        if self._bar is None or not self._last:
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


def _records_before(path: Path, keep: Callable[[str, int], bool]) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # the line that a killed process was writing
            break
        if keep(record["phase"], record["step"]):
            records.append(record)
    return records
