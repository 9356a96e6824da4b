"""How many runs go side by side, by what the compiler says their program needs of a device's memory."""

import math
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from agwm_jax.engine import needs, processes
from agwm_jax.engine.group import Group, Layout, Member
from agwm_jax.engine.lanes import Lanes, Programs
from agwm_jax.engine.sharding import SEED, Placement, bytes_per_device
from agwm_jax.errors import AgwmError
from agwm_jax.models.weights import Weights

USABLE = 0.9
"""Share of a device's memory that runs side by side are chosen for: allocation leaves gaps."""
_PROCESS = 600_000_000  # bytes of Python with jax, datasets and transformers, on a CPU taken from the same memory


class Choice(NamedTuple):
    """What goes side by side."""

    num_members: int
    """Most members of a group."""
    together: bool
    """See `Layout.together`."""
    num_bytes: int
    """Of one device, at the peak; 0 where the backend does not count."""
    advice: str | None
    """A sentence where that is more than the device has."""


class _Candidate(NamedTuple):
    num_members: int
    together: bool
    lanes: int
    """Of the stage that has most."""


def choose(
    members: Sequence[Member],
    *,
    weights: Weights,
    placement: Placement,
    vectorize: str,
    chunk_steps: int,
    programs: Programs,
) -> Choice:
    """Compile for as many lanes as are wanted, and for fewer while they do not fit; nothing is refused.

    The program that is chosen stays in `programs`, for `fit` to run.

    Args:
        members: all seeds of a config.
        weights: of the model.
        placement: where weights lie.
        vectorize: what is wanted side by side: all, seeds, splits (the phases of a stage), none; auto: most that fit.
        chunk_steps: as `fit` gets it.
        programs: what `fit` gets.

    Raises:
        AgwmError: the mesh's axis `seed` does not divide the number of seeds.
    """
    candidates = _candidates(members, placement.mesh.shape[SEED], vectorize)
    available = limit(members, placement)
    while True:
        candidate, candidates = candidates[0], candidates[1:]
        try:
            own, shared = _num_bytes(members, candidate, weights, placement, chunk_steps, programs)
        except jax.errors.JaxRuntimeError as error:  # some backends refuse to compile what they cannot hold
            if "RESOURCE_EXHAUSTED" not in str(error) or not candidates:
                raise
            candidates = candidates[len(candidates) // 2 :]
            continue
        if own + shared <= USABLE * available or not candidates:
            return Choice(*candidate[:2], own + shared, _advice(candidate, own + shared, available))
        # Lanes are alike: what the others would need is known well enough to compile few of them.
        fits = [c for c in candidates if shared + own * c.lanes / candidate.lanes <= USABLE * available]
        candidates = fits or candidates[-1:]


def _candidates(members: Sequence[Member], across: int, vectorize: str) -> list[_Candidate]:
    """Most lanes first; the members of every one are a multiple of the mesh's axis `seed`."""
    widest = max((len(stage) for stage in members[0].method.stages), default=1)
    at_once = len(members) if vectorize in ("auto", "all", "seeds") else 1
    if at_once % across:
        what = f"the {at_once} seeds" if at_once > 1 else "one seed, all"
        raise AgwmError(
            f"mesh.seed {across} does not divide {what} that run.vectorize {vectorize} puts side by side: say "
            f"mesh.seed 1, or give a number of seeds that is a multiple of {across} and run.vectorize auto."
        )
    if vectorize != "auto":
        together = widest > 1 and vectorize in ("all", "splits")
        return [_Candidate(at_once, together, at_once * (widest if together else 1))]
    found = [
        _Candidate(number, together, number * (widest if together else 1))
        for number in range(across, at_once + 1, across)
        for together in ((False, True) if widest > 1 else (False,))
    ]
    return sorted(found, key=lambda one: (one.lanes, one.num_members), reverse=True)


def _num_bytes(
    members: Sequence[Member],
    candidate: _Candidate,
    weights: Weights,
    placement: Placement,
    chunk_steps: int,
    programs: Programs,
) -> tuple[int, int]:
    """Bytes of one device at the peak: of the lanes, and of what they share."""
    layout = Layout(placement, candidate.together)
    with jax.set_mesh(placement.mesh):
        group = Group(members[: candidate.num_members], layout, weights, programs.needs.get(layout))
        programs.needs[layout] = group.needs
        found = [stage_bytes(group, number, programs, chunk_steps) for number in range(len(group.stages))]
    total, shared = max(found, default=(0, 0))
    return total - shared, shared


def stage_bytes(group: Group, number: int, programs: Programs, chunk_steps: int) -> tuple[int, int]:
    """Bytes of one device while a stage runs, compiled for shapes: all, and what the members share."""
    lanes = Lanes(group, number)
    held = group.needs.held(number, started=True)
    beside = _held(group, held - group.needs.stages[number].step)
    return lanes.compile(programs, chunk_steps).num_bytes + beside, _held(group, held & group.shared)


def _held(group: Group, keys: Collection[needs.Key]) -> int:
    arrays = [group.arrays[key] for key in keys]
    return bytes_per_device(arrays, [x.sharding for x in arrays])


def limit(members: Sequence[Member], placement: Placement) -> int:
    """Bytes of a device, the least over processes; on a CPU its share of the memory, less what the process needs.

    That is as much at every start of a run, whatever else runs: a run that is continued must choose what it chose.
    """
    devices = placement.mesh.local_devices
    found = (devices[0].memory_stats() or {}).get("bytes_limit")
    if found is None:
        physical = min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), _container_limit())
        arrays = [x for member in members for x in jax.tree.leaves((member.pretrained, member.data))]
        host = {id(x): x.nbytes for x in arrays}
        found = int(max(0, physical - _PROCESS - sum(host.values()))) // len(devices)
    # In mebibytes: what processes exchange holds 32 bits, too few for bytes.
    return -processes.most(-(int(found) >> 20)) << 20


def _container_limit() -> float:
    try:
        return int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # no Linux, no such group, or "max"
        return math.inf


def _advice(candidate: _Candidate, num_bytes: int, available: int) -> str | None:
    if num_bytes <= available:
        return None
    alone = candidate.lanes == 1
    what = "one run alone needs" if alone else f"{candidate.lanes} runs side by side need"
    remedy = "take a smaller data.batch_size, or more devices (mesh.data with"
    return (
        f"{what} {_gb(num_bytes)} of a device by the compiler's count, and {_gb(available)} are there; if it fails, "
        + ("" if alone else "say run.vectorize auto, ")
        + f"{remedy} mesh.fully_sharded, or mesh.model)."
    )


def _gb(number: int) -> str:
    return f"{number / 1e9:.0f} GB" if number >= 1e11 else f"{number / 1e9:.3g} GB"
