"""Checkpoints of a run in progress, written with Orbax and verified before they are trusted."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from agwm_jax.engine import processes
from agwm_jax.errors import AgwmError

log = logging.getLogger(__name__)


class Position(NamedTuple):
    """Where a run stands; with the seed it determines the data order and every random number still to come."""

    round: int
    step: int
    seconds: dict[str, float]
    """Spent so far, by phase."""
    seeds: list[int]
    """Of the runs that go side by side."""
    together: bool
    """Whether the searches on different splits do."""
    diverged: dict[str, str]
    """What happened to each that was given up, by its place among the seeds (a string, as JSON has it)."""


class Checkpoints:
    """The checkpoints of one run folder, newest last.

    Orbax notices a torn file but not a flipped bit (orbax-checkpoint 0.12 restored a damaged array without a word), so
    a digest of every file is kept beside the step and compared before restoring.
    """

    def __init__(self, folder: Path, *, keep: int, fingerprint: str):
        """Open `folder`; `keep` newest are retained; `fingerprint` names the data that the positions refer to."""
        self._folder = folder.absolute()
        self._fingerprint = fingerprint
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def save(self, global_step: int, position: Position, state: Any) -> None:
        """Write `state` (a pytree of arrays) as the checkpoint of `global_step`.

        Raises:
            AgwmError: the disk is full or cannot be written; earlier checkpoints stay.
        """
        if global_step in self._manager.all_steps():
            return
        content = {"fingerprint": self._fingerprint, **position._asdict()}
        try:
            self._manager.save(
                global_step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(content)),
            )
            if processes.is_main():
                self._digests(global_step).write_text(json.dumps(self._digest(global_step)))
        except Exception as error:  # Orbax and TensorStore raise what they like for a failed write
            raise processes.lost(error) or AgwmError(
                f"could not write a checkpoint to {self._folder} ({_first_line(error)}); earlier checkpoints are kept: "
                "free disk space or choose another --run.output, then run the same command to continue."
            ) from error
        if processes.is_main():
            for stale in self._folder.glob("*.sha256.json"):
                if int(stale.name.split(".")[0]) not in self._manager.all_steps():
                    stale.unlink()

    def restore(self, template, expected: Position) -> tuple[Position, Any] | None:
        """The newest checkpoint that is whole, or None; damaged ones are removed.

        Args:
            template: ``template(position) -> pytree of ShapeDtypeStruct`` with shardings, as `state` was when saved
                there; the mesh may be another one.
            expected: names the seeds, and whether splits go side by side.

        Raises:
            AgwmError: the checkpoint belongs to other data, to other seeds or splits, or is whole but cannot be read;
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
        args = ocp.args.Composite(state=ocp.args.StandardRestore(template(position)))
        return position, self._read(step, args)["state"]

    def position(self) -> Position | None:
        """Of the newest checkpoint that is whole, or None; damaged ones are removed."""
        newest = self._newest()
        return None if newest is None else newest[2]

    def _newest(self) -> tuple[int, str, Position] | None:
        """Global step, fingerprint and position of the newest that is whole."""
        for step in sorted(self._manager.all_steps(), reverse=True):
            # All processes look before one of them removes anything.
            if not processes.any_of(not self._is_whole(step)):
                content = dict(self._read(step, ocp.args.Composite(position=ocp.args.JsonRestore()))["position"])
                fingerprint = content.pop("fingerprint")
                try:
                    return step, fingerprint, Position(**content)
                except TypeError as error:
                    raise self._unreadable(step, error) from error
            log.warning(
                "checkpoint %s is damaged: a file differs from what was written. It is removed, falling back to "
                "the one before, or to the start where there is none.",
                self._folder / str(step),
            )
            self._manager.delete(step)
        return None

    def _read(self, step: int, args: Any) -> Any:
        try:
            return self._manager.restore(step, args=args)
        except Exception as error:  # Orbax raises what it likes
            raise processes.lost(error) or self._unreadable(step, error) from error

    def _unreadable(self, step: int, error: Exception) -> AgwmError:
        return AgwmError(
            f"checkpoint {self._folder / str(step)} is whole but cannot be read ({_first_line(error)}); was it written "
            "by another version? Continue with that version, or choose another --run.output."
        )

    @property
    def latest(self) -> int | None:
        """Global step of the newest checkpoint."""
        return self._manager.latest_step()

    def delete(self) -> None:
        """Remove all checkpoints: the run is finished."""
        for step in self._manager.all_steps():
            self._manager.delete(step)
            if processes.is_main():
                self._digests(step).unlink(missing_ok=True)

    def close(self) -> None:
        """Release the folder."""
        self._manager.close()

    def _is_whole(self, step: int) -> bool:
        try:
            return json.loads(self._digests(step).read_text()) == self._digest(step)
        except (FileNotFoundError, ValueError):
            return False

    def _digests(self, step: int) -> Path:
        return self._folder / f"{step}.sha256.json"

    def _digest(self, step: int) -> dict[str, str]:
        root = self._folder / str(step)
        digests = {}
        for path in sorted(p for p in root.rglob("*") if p.is_file()):
            with path.open("rb") as file:
                digests[str(path.relative_to(root))] = hashlib.file_digest(file, "sha256").hexdigest()
        return digests


def abstract(tree, shardings):
    """Shapes, dtypes and placement of a pytree: what Orbax needs to restore it, on whatever mesh it was saved."""
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings)


def _lanes(position: Position) -> str:
    seeds = "seed " + str(position.seeds[0]) if len(position.seeds) == 1 else f"seeds {position.seeds} side by side"
    return seeds + (", all splits at once" if position.together else "")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
