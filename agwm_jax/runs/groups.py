"""Which seeds of a run go side by side, and where the checkpoints lie that they share."""

import json
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from agwm_jax.engine.checkpoint import remove_checkpoints
from agwm_jax.errors import AgwmError
from agwm_jax.runs.folder import write_text

Group = tuple[int, ...]
"""Seeds in the order of their lanes."""


def checkpoint_folder(output: Path, folders: Mapping[int, Path], group: Group) -> Path:
    """Of a seed alone in its run folder, of several beside their run folders, by the first."""
    return folders[group[0]] / "checkpoints" if len(group) == 1 else output / f"checkpoints-{group[0]}"


def note(folder: Path, group: Group) -> None:
    """Write down beside its checkpoints what seeds a group has; `plan_groups` reads it."""
    if len(group) > 1:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "seeds.json", json.dumps(group))


def remove_left_over(output: Path, folders: Iterable[Path]) -> None:
    """Remove checkpoints of seeds that all have a result: a process was killed between writing that and removing them.

    Args:
        output: folder of the run folders.
        folders: run folders.
    """
    for path in output.glob("checkpoints-*/seeds.json"):
        if all((output / f"seed-{seed}" / "result.json").exists() for seed in json.loads(path.read_text())):
            shutil.rmtree(path.parent, ignore_errors=True)
    for folder in folders:
        if (folder / "result.json").exists() and (folder / "checkpoints").is_dir():
            remove_checkpoints(folder / "checkpoints")


def plan_groups(
    output: Path, folders: Mapping[int, Path], *, finished: Collection[int], at_once: int, mesh_seed: int
) -> list[Group]:
    """Groups to train: those that were stopped, as they were; of the other seeds as many as go at once.

    Args:
        output: folder of the run folders, where groups have their checkpoints.
        folders: run folder of every seed.
        finished: seeds that have a result; a group goes on with them while another of its seeds has none.
        at_once: most seeds of a group.
        mesh_seed: size of the mesh's axis `seed`.

    Raises:
        AgwmError: a group was stopped that has seeds beside these or more than go at once, or `mesh_seed` does not
            divide one.
    """
    left = [seed for seed in folders if seed not in finished]
    stopped = []
    for folder, group in _stopped(output):
        if not set(group).intersection(left):
            continue
        words = f"{folder} holds checkpoints of seeds {list(group)}, stopped side by side"
        others = [seed for seed in group if seed not in folders]
        if others:
            raise AgwmError(
                f"{words}, and run.seeds lacks {others}: name them too, or remove that folder to start anew."
            )
        if len(group) > at_once:
            raise AgwmError(
                f"{words}, and run.vectorize or the memory here allows {at_once} at once: continue with run.vectorize "
                "auto on the devices where it was started, or remove that folder to start anew."
            )
        stopped.append(group)
    taken = {seed for group in stopped for seed in group}
    alone = [seed for seed in left if seed not in taken and _has_steps(folders[seed] / "checkpoints")]
    rest = [seed for seed in left if seed not in taken and seed not in alone]
    chunks = [tuple(rest[first : first + at_once]) for first in range(0, len(rest), at_once)]
    groups = [*stopped, *((seed,) for seed in alone), *chunks]
    for group in groups:
        if len(group) % mesh_seed:
            raise AgwmError(
                f"mesh.seed {mesh_seed} does not divide the seeds {list(group)}, which are left to go side by side: "
                "say mesh.seed 1."
            )
    return groups


def _stopped(output: Path) -> list[tuple[Path, Group]]:
    found: list[tuple[Path, Group]] = []
    for path in sorted(output.glob("checkpoints-*/seeds.json")):
        if _has_steps(path.parent):
            found.append((path.parent, tuple(json.loads(path.read_text()))))
    return found


def _has_steps(folder: Path) -> bool:
    return any(path.is_dir() and path.name.isdigit() for path in folder.glob("*"))
