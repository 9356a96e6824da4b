"""Checkpoints of a run in progress: written with Orbax beside the training, verified before they are trusted."""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import orbax.checkpoint as ocp

from agwm_jax.engine import processes
from agwm_jax.engine.processes import first_line
from agwm_jax.errors import AgwmError

log = logging.getLogger(__name__)


class Position(NamedTuple):
    """Where a group stands; with the seeds it determines the data order and every random number still to come."""

    stage: int
    step: int
    seconds: dict[str, float]
    """Spent so far, by stage."""
    seeds: list[int]
    """Of the members."""
    together: bool
    """See `Layout.together`."""
    diverged: dict[str, str]
    """What happened to each member that was given up, by its place (a string, as JSON has it)."""


class Checkpoints:
    """The checkpoints of one group, a folder and a record each; one without its record was cut short.

    The record is written last: the position, and a digest of every file, for Orbax notices a torn file but not a
    flipped bit (orbax-checkpoint 0.12 restored a damaged array without a word). Older ones are removed after that, so a
    crash at any moment leaves one that is whole.

    Args:
        folder: where they lie.
        keep: how many, the newest.
        fingerprint: names the data and the model that positions refer to.
    """

    def __init__(self, folder: Path, *, keep: int, fingerprint: str):
        """Open `folder`, which is made where it is not there."""
        self._folder, self._keep, self._fingerprint = folder.absolute(), keep, fingerprint
        self._folder.mkdir(parents=True, exist_ok=True)
        self._open = contextlib.ExitStack()
        self._arrays = self._open.enter_context(contextlib.closing(ocp.StandardCheckpointer()))
        self._plain = self._open.enter_context(_plainly_named(self._folder))
        self._writing: threading.Thread | None = None
        self._failure: Exception | None = None

    def save(self, step: int, position: Position, state: Any) -> None:
        """Begin to write `state` (a pytree of arrays) as the checkpoint of a step; its arrays may change at once.

        Waits for the one before, if that is still being written.

        Raises:
            AgwmError: the disk is full or cannot be written, now or for the one before; earlier checkpoints stay.
        """
        self.wait()
        if processes.any_of(step in self._steps()):
            return
        try:
            self._arrays.save(self._plain / str(step), state, force=True)
        except Exception as error:  # Orbax and TensorStore raise what they like for a failed write
            raise self._not_written(error) from error
        content = {"fingerprint": self._fingerprint, **position._asdict()}
        self._writing = threading.Thread(target=self._complete, args=(step, content), name="checkpoint")
        self._writing.start()

    def _complete(self, step: int, content: dict[str, Any]) -> None:
        """Wait for the arrays, write the record, remove what is older than `keep`."""
        try:
            self._arrays.wait_until_finished()
            if processes.is_main():
                record = self._record(step).with_suffix(".part")
                record.write_text(json.dumps({**content, "digests": self._digest(step)}))
                record.replace(self._record(step))
                for stale in self._steps()[: -self._keep]:
                    self._remove(stale)
                _remove_unless(whole=self._steps(), folder=self._folder)
        except Exception as error:  # told by `wait`, in the thread that asks
            self._failure = error

    def wait(self) -> None:
        """Until what is being written is whole.

        Raises:
            AgwmError: it could not be written; earlier checkpoints stay.
        """
        self._join()
        self._tell()

    def _join(self) -> None:
        # Together, by the devices: they notice at once that a process is lost, what Orbax waits for in a minute.
        while self._writing is not None and processes.any_of(self._writing.is_alive()):
            self._writing.join(0.2)
        self._writing = None

    def _tell(self) -> None:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise self._not_written(failure) from failure

    def _not_written(self, error: Exception) -> AgwmError:
        return processes.lost(error) or AgwmError(
            f"could not write a checkpoint to {self._folder} ({first_line(error)}); earlier checkpoints are kept: "
            "free disk space or choose another --run.output, then run the same command to continue."
        )

    def restore(self, template: Callable[[Position], Any], expected: Position) -> tuple[Position, Any] | None:
        """The newest checkpoint that is whole, or None; damaged ones are removed.

        Args:
            template: ``template(position) -> pytree of ShapeDtypeStruct`` with shardings, as `state` was when saved
                there; the mesh may be another one.
            expected: names the seeds, and whether phases of a stage go side by side.

        Raises:
            AgwmError: the checkpoint belongs to other data, to other seeds or phases, or is whole but cannot be read;
                nothing is removed then.
        """
        newest = self._newest()
        if newest is None:
            return None
        step, fingerprint, position = newest
        if (position.seeds, position.together) != (expected.seeds, expected.together):
            raise AgwmError(
                f"the checkpoints in {self._folder} are of {_lanes(position)}, this run would train "
                f"{_lanes(expected)}; continue with run.vectorize auto, which keeps to what was begun, or remove that "
                "folder to start anew."
            )
        if fingerprint != self._fingerprint:
            raise AgwmError(
                f"the checkpoints in {self._folder} were made with other training data or another pretrained model: "
                "one of them changed since; restore it, or choose another --run.output to start anew."
            )
        try:
            return position, self._arrays.restore(self._plain / str(step), template(position))
        except AgwmError:
            raise
        except Exception as error:  # Orbax raises what it likes
            raise processes.lost(error) or self._unreadable(step, error) from error

    def position(self) -> Position | None:
        """Of the newest checkpoint that is whole, or None; damaged ones are removed."""
        newest = self._newest()
        return None if newest is None else newest[2]

    def _newest(self) -> tuple[int, str, Position] | None:
        """Step, fingerprint and position of the newest that is whole."""
        self.wait()
        for step in reversed(self._steps()):
            # All processes look before one of them removes anything.
            if not processes.any_of(not self._is_whole(step)):
                content = json.loads(self._record(step).read_text())
                fingerprint = content.pop("fingerprint")
                del content["digests"]
                try:
                    return step, fingerprint, Position(**content)
                except TypeError as error:
                    raise self._unreadable(step, error) from error
            log.warning(
                "checkpoint %s is damaged: a file differs from what was written. It is removed, falling back to "
                "the one before, or to the start where there is none.",
                self._folder / str(step),
            )
            if processes.is_main():
                self._remove(step)
        return None

    def _unreadable(self, step: int, error: Exception) -> AgwmError:
        return AgwmError(
            f"checkpoint {self._folder / str(step)} is whole but cannot be read ({first_line(error)}); was it written "
            "by another version? Continue with that version, or choose another --run.output."
        )

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint."""
        self.wait()
        return max(self._steps(), default=None)

    def delete(self) -> None:
        """Remove all checkpoints: the group is finished."""
        self.wait()
        if processes.is_main():
            remove_checkpoints(self._folder)

    def close(self) -> None:
        """Release the folder, after what is being written; where a process is lost, nothing is waited for."""
        self._join()
        try:
            self._tell()
        finally:
            self._open.close()

    def _steps(self) -> list[int]:
        """Of all that have a record, in order."""
        return sorted(int(path.name.split(".")[0]) for path in self._folder.iterdir() if path.name.endswith(_RECORD))

    def _record(self, step: int) -> Path:
        return self._folder / f"{step}{_RECORD}"

    def _remove(self, step: int) -> None:
        self._record(step).unlink(missing_ok=True)
        shutil.rmtree(self._folder / str(step), ignore_errors=True)

    def _is_whole(self, step: int) -> bool:
        try:
            return json.loads(self._record(step).read_text())["digests"] == self._digest(step)
        except (FileNotFoundError, ValueError, KeyError):
            return False

    def _digest(self, step: int) -> dict[str, str]:
        root = self._folder / str(step)
        digests = {}
        for path in sorted(p for p in root.rglob("*") if p.is_file()):
            with path.open("rb") as file:
                digests[str(path.relative_to(root))] = hashlib.file_digest(file, "sha256").hexdigest()
        return digests


_RECORD = ".checkpoint.json"


@contextlib.contextmanager
def _plainly_named(folder: Path):
    """A way to a folder without the signs that Orbax takes for a pattern when it looks for its own files there."""
    if not set("[]?*{}").intersection(str(folder)):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="agwm-") as name:
        link = Path(name) / "checkpoints"
        os.symlink(folder, link, target_is_directory=True)
        yield link


def _lanes(position: Position) -> str:
    seeds = "seed " + str(position.seeds[0]) if len(position.seeds) == 1 else f"seeds {position.seeds} side by side"
    return seeds + (", all splits at once" if position.together else "")


def remove_checkpoints(folder: Path) -> None:
    """Remove all checkpoints of a folder, whole or not, and the folder unless something else lies there."""
    for record in folder.glob(f"*{_RECORD}"):
        record.unlink()  # first, so that nothing half removed counts as whole
    _remove_unless(whole=(), folder=folder)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _remove_unless(*, whole: Collection[int], folder: Path) -> None:
    """Remove what has no record: a process that was killed while it wrote has left it."""
    for path in folder.iterdir():
        step = path.name.split(".")[0]
        if step.isdigit() and int(step) not in whole:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
