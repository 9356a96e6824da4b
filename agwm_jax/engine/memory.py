"""What a run needs of a device's memory, before anything is compiled, and what fits side by side."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from agwm_jax.engine import processes
from agwm_jax.engine.sharding import DATA, MODEL, SEED, Placement, bytes_per_device, make_placement
from agwm_jax.engine.step_memory import temporaries
from agwm_jax.errors import AgwmError
from agwm_jax.methods.interface import Phase
from agwm_jax.runs.build import Built
from agwm_jax.settings.config import Config

USABLE = 0.9
"""Share of a device's memory that a run may take by this estimate, which is itself some per cent off."""
_PROCESS = 600_000_000  # bytes of Python with jax, datasets and transformers, on a CPU taken from the same memory
_PRODUCTS = ("linearize", "jvp", "finite_difference")  # dearest first


class SideBySide(NamedTuple):
    """How many runs go at once."""

    seeds: int
    splits: int


ALONE = SideBySide(1, 1)


class Memory(NamedTuple):
    """Bytes that one device holds at the peak of a run."""

    weights: int
    """Pretrained weights W0 and the start of W, which all runs share, and every seed's start of alpha."""
    data: int
    """Training sets."""
    carry: int
    """What earlier phases learnt."""
    state: int
    """Task weights, alpha, optimisers and what the estimator carries."""
    temporaries: int
    """Of one step."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def build_placement(config: Config) -> Placement:
    """The mesh of a config over the devices here."""
    mesh = config.mesh
    return make_placement(seed=mesh.seed, data=mesh.data, model=mesh.model, fully_sharded=mesh.fully_sharded)


def estimate(
    config: Config,
    built: Built,
    placement: Placement,
    side_by_side: SideBySide = ALONE,
    *,
    platform: str | None = None,
) -> Memory:
    """The peak of the phase that needs most; from shapes alone, nothing is compiled.

    Exact but for the temporaries, see `agwm_jax.engine.step_memory`. Lanes (seeds x splits in the search, seeds in the
    finetune) multiply state and temporaries, for one vmap holds all of them; the mesh's axis `seed` divides them.

    Args:
        config: the settings; `built` may be of others, as long as the shapes of weights and states are the same.
        built: of one seed; leaves may be shapes.
        placement: where weights lie.
        side_by_side: what goes at once.
        platform: "cpu", or any other for an accelerator; None: that of the mesh.
    """
    axes, (seeds, splits) = placement.mesh.shape, side_by_side
    shapes = {path: x.shape for path, x in (*built.frozen.items(), *built.initial.task.items())}

    def held(tree) -> int:
        return bytes_per_device(tree, placement.of_tree(tree, shapes))

    alphas = held(built.initial.alpha) * seeds // axes[SEED]
    weights = held(built.frozen) + held(built.initial.task) + alphas
    rows = sum(column.nbytes for column in built.encoded["train"]) * (1 if config.task.train_size is None else seeds)
    found = []
    for number, stage in enumerate(built.method.stages):
        searches = "inner" in stage[0].plan
        lanes = -(-seeds * (splits if searches else 1) // axes[SEED])
        # A round that follows another holds what that one learnt, and so do searches that go one after the other.
        follows = number > 0 or (splits == 1 and len(stage) > 1)
        carry = held(built.initial) * seeds // axes[SEED] if follows else 0
        state = held(_state(stage[0], built)) * lanes
        step = temporaries(config, built, placement, searches=searches, platform=platform) * lanes
        plan = sum(np.asarray(x).nbytes for x in stage[0].plan.values()) * lanes
        found.append(Memory(weights, rows + plan, carry, state, step))
    return max(found, key=lambda memory: memory.total)


def _state(phase: Phase, built: Built):
    return jax.eval_shape(phase.start, built.frozen, built.initial, built.initial)


def limit(built: Built, placement: Placement) -> int:
    """Bytes of a device, the least over processes; on a CPU its share of the memory, less what the process needs.

    That is as much at every start of a run, whatever else runs: a run that is continued must choose what it chose.
    """
    devices = placement.mesh.local_devices
    found = (devices[0].memory_stats() or {}).get("bytes_limit")
    if found is None:
        physical = min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), _container_limit())
        host = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((built.pretrained.params, built.initial.task)))
        found = int(max(0, physical - _PROCESS - host)) // len(devices)
    if not processes.several():
        return int(found)
    mebibytes = np.array(found >> 20, np.int32)  # arrays of JAX hold 32 bits, too few for bytes
    return int(np.min(multihost_utils.process_allgather(mebibytes))) << 20


def _container_limit() -> float:
    try:
        return int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # no Linux, no such group, or "max"
        return float("inf")


def choose(config: Config, built: Built, placement: Placement, *, num_seeds: int) -> SideBySide:
    """What goes side by side: as `run.vectorize` says; ``auto``: most lanes that fit, by groups of seeds if need be.

    Raises:
        AgwmError: `mesh.seed` does not divide the seeds, or what was asked for, or one run alone, does not fit.
    """
    wanted = list(_candidates(config, placement, num_seeds))
    available = int(USABLE * limit(built, placement))
    for side_by_side in wanted:
        if estimate(config, built, placement, side_by_side).total <= available:
            return side_by_side
    raise AgwmError(_refusal(config, built, placement, wanted[-1], available, num_seeds))


def _candidates(config: Config, placement: Placement, num_seeds: int) -> Iterator[SideBySide]:
    """Most lanes first; the seeds of every one are a multiple of `mesh.seed`."""
    splits = config.search.num_splits if config.method.name == "agwm" else 1
    mode, across = config.run.vectorize, placement.mesh.shape[SEED]
    at_once = num_seeds if mode in ("auto", "all", "seeds") else 1
    if at_once % across:
        what = f"the {at_once} seeds" if at_once > 1 else "one seed, all"
        raise AgwmError(
            f"mesh.seed {across} does not divide {what} that run.vectorize {mode} puts side by side: say mesh.seed 1, "
            f"or give a number of seeds that is a multiple of {across} and run.vectorize auto."
        )
    if mode != "auto":
        yield SideBySide(at_once, splits if mode in ("all", "splits") else 1)
        return
    pairs = {SideBySide(s, p) for s in range(across, num_seeds + 1, across) for p in (1, splits)}
    yield from sorted(pairs, key=lambda pair: (pair.seeds * pair.splits, pair.seeds), reverse=True)


def _refusal(
    config: Config, built: Built, placement: Placement, side: SideBySide, available: int, num_seeds: int
) -> str:
    """What is needed, what there is, and the changes after which it would fit, one of each setting."""
    needed = estimate(config, built, placement, side).total
    what = "one run alone" if side.seeds * side.splits == 1 else f"{_counted(side)} side by side"
    found: dict[str, str] = {}
    for words, changed, where, smaller in _remedies(config, placement, side, num_seeds):
        setting = words.split()[0]
        if setting not in found:
            total = estimate(changed, built, where, smaller).total
            if total <= int(USABLE * limit(built, where)):
                found[setting] = f"{words} ({_gb(total)})"
    advice = f"would fit: {', '.join(found.values())}" if found else _nothing_helps(config, built, placement, available)
    return f"{what} would need {_gb(needed)} of a device, {_gb(available)} can be used; {advice}."


def _nothing_helps(config: Config, built: Built, placement: Placement, available: int) -> str:
    """The least that one run needs, with all that saves memory at once."""
    axes = placement.mesh.shape
    smallest, where = _changed(config, "data", batch_size=axes[DATA]), placement
    together = ["a batch of 1" if axes[DATA] == 1 else f"data.batch_size {axes[DATA]}"]
    if axes[DATA] > 1:
        where = placement._replace(fully_sharded=True)
        together.append("mesh.fully_sharded")
    alone = SideBySide(axes[SEED], 1)
    hvp = getattr(config.hypergradient, "hvp", None)
    ways = {way: _changed(smallest, "hypergradient", hvp=way) for way in _PRODUCTS} if hvp else {"": smallest}
    totals = {way: estimate(changed, built, where, alone).total for way, changed in ways.items()}
    best = min(totals, key=totals.__getitem__)
    together += [f"hypergradient.hvp {best}"] if hvp else []
    words, least = " with ".join(together[:1] + [" and ".join(together[1:])] * (len(together) > 1)), totals[best]
    if least <= available:
        return f"no one change is enough, but {words} is ({_gb(least)})"
    return (
        f"even {words} needs {_gb(least)}: spread it over more devices (mesh.data, mesh.model), or take a smaller model"
    )


def _remedies(
    config: Config, placement: Placement, side: SideBySide, num_seeds: int
) -> Iterator[tuple[str, Config, Placement, SideBySide]]:
    """Changes that save memory, the mildest first; those of one setting begin with one word."""
    one = SideBySide(placement.mesh.shape[SEED], 1)
    if side != one:
        auto = _changed(config, "run", vectorize="auto")
        for fewer in _candidates(auto, placement, num_seeds) if not num_seeds % one.seeds else ():
            if fewer != ALONE and fewer.seeds * fewer.splits < side.seeds * side.splits:
                yield f"run.vectorize auto with {_counted(fewer)} at once", auto, placement, fewer
        if one == ALONE:
            yield "run.vectorize none", _changed(config, "run", vectorize="none"), placement, one
    data = placement.mesh.shape[DATA]
    if data > 1 and not placement.fully_sharded:
        words = f"mesh.fully_sharded true on these {placement.mesh.size} devices"
        yield words, config, placement._replace(fully_sharded=True), side
    others, rest = divmod(jax.device_count(), placement.mesh.size // data)
    if others > data and not rest and config.data.batch_size % others == 0:
        sizes = {"seed": placement.mesh.shape[SEED], "model": placement.mesh.shape[MODEL]}
        words = f"mesh.data {others} with mesh.fully_sharded true on the {jax.device_count()} devices here"
        yield words, config, make_placement(**sizes, data=others, fully_sharded=True), side
    hvp: Any = getattr(config.hypergradient, "hvp", None)
    for cheaper in _PRODUCTS[_PRODUCTS.index(hvp) + 1 :] if hvp else ():
        changed = _changed(config, "hypergradient", hvp=cheaper)
        yield f"hypergradient.hvp {cheaper}", changed, placement, side
    for batch in range(config.data.batch_size - data, 0, -data):
        yield f"data.batch_size {batch}", _changed(config, "data", batch_size=batch), placement, side


def _changed(config: Config, section: str, **values: Any) -> Config:
    old = getattr(config, section)
    return config.model_copy(update={section: old.model_copy(update=values)})


def _counted(side: SideBySide) -> str:
    parts = [(side.seeds, "seed"), (side.splits, "split")]
    return " x ".join(f"{n} {name}s" for n, name in parts if n > 1) or "one run"


def _gb(number: int) -> str:
    return f"{number / 1e9:.0f} GB" if number >= 1e11 else f"{number / 1e9:.3g} GB"
