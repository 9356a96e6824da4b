"""Runs with folders: several seeds of one config trained or continued, and written down."""

import contextlib
import hashlib
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from agwm_jax.engine import processes
from agwm_jax.engine.checkpoint import Checkpoints
from agwm_jax.engine.group import Layout
from agwm_jax.engine.lanes import Programs
from agwm_jax.engine.loop import Interrupted, fit
from agwm_jax.engine.memory import choose
from agwm_jax.engine.sharding import SEED, check_model, gather_to_main, make_placement
from agwm_jax.errors import AgwmError, Diverged
from agwm_jax.methods.interface import Variables
from agwm_jax.runs import folder as run_folder
from agwm_jax.runs.build import Prepared, build, digests
from agwm_jax.runs.finished import export
from agwm_jax.runs.fitting import Merge, conclude, merger
from agwm_jax.runs.groups import checkpoint_folder, note, plan_groups, remove_left_over
from agwm_jax.runs.recorder import Recorder, Told
from agwm_jax.runs.result import describe
from agwm_jax.runs.variables import Origin, method_settings, save_variables
from agwm_jax.settings import Config, seed_configs, use_deterministic_kernels


def train(config: Config, *, progress: bool = True) -> dict[str, Any]:
    """`train_seeds` of a config with one seed; its result."""
    return train_seeds(config, progress=progress)[0]


def train_seeds(config: Config, *, progress: bool = True) -> list[dict[str, Any]]:
    """Train as `config` says, or continue the same run where it stopped; a finished seed is not run again.

    Args:
        config: the settings; ``config.run.output`` is the run folder, or with ``run.seeds`` the folder of them.
        progress: show a progress bar.

    Returns:
        The content of every seed's result.json: scores by split and metric, seconds by phase, versions, device,
        warnings.

    Raises:
        Diverged: a number of some seeds is not finite; the results of the others are written all the same.
        AgwmError: bad settings or data, data that changed since a seed was finished, a folder of another run, or a mesh
            that does not fit.
        Interrupted: Ctrl-C; the state is saved.
    """
    if config.run.deterministic:
        use_deterministic_kernels()
    configs = seed_configs(config)
    folders = [Path(one.run.output) for one in configs]
    for folder, one in zip(folders, configs, strict=True):
        run_folder.check(folder, one)
    data = digests(config)
    for folder in folders:
        refuse_changed_data(folder, data)
    diverged: dict[int, str] = {}
    try:
        if any(run_folder.read_result(folder) is None for folder in folders):
            diverged = _Training(config, configs, data, progress=progress).run()
        processes.wait_for_all("the results are written")
        if processes.is_main():
            remove_left_over(Path(config.run.output), folders)
        results = [result for folder in folders if (result := run_folder.read_result(folder)) is not None]
        if config.run.export and processes.is_main():
            finished = [folder for folder in folders if (folder / "result.json").exists()]
            _export([folder for folder in finished if not (folder / "export").exists()])
    except Interrupted:
        raise
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; run the same command again to continue in {config.run.output}") from None
    except RuntimeError as error:
        lost = processes.lost(error)
        if lost is None:
            raise
        raise lost from error
    if diverged and len(configs) == 1:
        raise Diverged(*diverged.values())
    if diverged:
        each = " ".join(f"seed {seed}: {sentence}" for seed, sentence in diverged.items())
        raise Diverged(f"{len(diverged)} of {len(configs)} seeds diverged, the results of the others stand. {each}")
    return results


def refuse_changed_data(folder: Path, data: Mapping[str, str]) -> None:
    """Refuse to hand out a result of files that have changed since."""
    result = run_folder.read_result(folder)
    changed = [path for path, digest in ((result or {}).get("data") or {}).items() if data.get(path) != digest]
    if changed:
        raise AgwmError(
            f"{folder} is finished, and {', '.join(changed)} changed since: its result is of the data as they were. "
            "To train on what is there now, choose another --run.output or remove that folder; to keep the result, "
            "restore the data."
        )


def _export(folders: Sequence[Path]) -> None:
    for folder in folders:
        deviation = export(folder, folder / "export")
        if deviation is not None:
            warnings.warn(f"exported, but transformers will not give the same logits: {deviation}", stacklevel=3)


class _Seed(NamedTuple):
    config: Config
    prepared: Prepared

    @property
    def folder(self) -> Path:
        return Path(self.config.run.output)

    @property
    def is_finished(self) -> bool:
        return run_folder.read_result(self.folder) is not None

    @property
    def origin(self) -> Origin:
        digest = run_folder.weights_digest(self.prepared.pretrained.params)
        return Origin(method_settings(self.config), digest)


class _Training:
    """The seeds of a config that have no result, trained in as few groups as `run.vectorize` allows."""

    def __init__(self, config: Config, configs: Sequence[Config], data: Mapping[str, str], *, progress: bool):
        _set_compilation_cache(config.run.compilation_cache)
        self.config, self.data, self.progress = config, data, progress
        mesh = config.mesh
        self.placement = make_placement(
            seed=mesh.seed, data=mesh.data, model=mesh.model, fully_sharded=mesh.fully_sharded
        )
        began = time.perf_counter()
        with _on_the_host():
            prepared = build(config, [one.run.seed for one in configs])
        self.weights = prepared[0].pretrained.model.weights
        shapes = {path: x.shape for path, x in prepared[0].pretrained.params.items()}
        check_model(self.placement, self.weights, shapes, batch_size=config.data.batch_size)
        self.seeds = {one.run.seed: _Seed(one, own) for one, own in zip(configs, prepared, strict=True)}
        self.prepare_seconds, self.compile_seconds = time.perf_counter() - began, 0.0
        self.programs = Programs()
        self.merge: Merge | None = None

    def run(self) -> dict[int, str]:
        """What happened to the seeds that diverged."""
        output, folders = Path(self.config.run.output), {number: seed.folder for number, seed in self.seeds.items()}
        choice = choose(
            [seed.prepared.member for seed in self.seeds.values()],
            weights=self.weights,
            placement=self.placement,
            vectorize=self.config.run.vectorize,
            chunk_steps=self.config.run.chunk_steps,
            programs=self.programs,
        )
        if choice.advice is not None:
            warnings.warn(choice.advice, stacklevel=4)
        groups = plan_groups(
            output,
            folders,
            finished=[number for number, seed in self.seeds.items() if seed.is_finished],
            at_once=choice.num_members,
            mesh_seed=self.placement.mesh.shape[SEED],
        )
        count = sum(map(len, groups))
        self.prepare_seconds /= count
        self.compile_seconds = sum(program.seconds for program in self.programs.compiled.values()) / count
        diverged: dict[int, str] = {}
        for group in groups:
            where = checkpoint_folder(output, folders, group)
            try:
                diverged |= self._group([self.seeds[number] for number in group], where, choice.together)
            except Diverged as error:
                diverged |= dict.fromkeys(group, str(error))
        return diverged

    def _group(self, group: Sequence[_Seed], where: Path, together: bool) -> dict[int, str]:
        """Train seeds side by side, their checkpoints in `where`, and write what outlives them."""
        config = self.config
        members = [seed.prepared.member for seed in group]
        left = [number for number, seed in enumerate(group) if not seed.is_finished]
        origins = [seed.origin for seed in group]
        fingerprint = _fingerprint(origins, [seed.prepared for seed in group])
        # Not before: settings or data that are refused leave no folder behind.
        with contextlib.ExitStack() as stack:
            _claim(stack, group, where)
            checkpoints = stack.enter_context(
                contextlib.closing(Checkpoints(where, keep=config.run.keep_checkpoints, fingerprint=fingerprint))
            )
            minutes = config.run.checkpoint_minutes
            begun = checkpoints.position() if minutes is not None else None
            if begun is not None and config.run.vectorize == "auto":  # what was begun goes on as it was
                together = begun.together
            names = [f"seed {seed.config.run.seed}" if len(group) > 1 else "" for seed in group]
            told = [Told(seed.folder, name, seed.prepared.method) for seed, name in zip(group, names, strict=True)]
            recorder = stack.enter_context(
                Recorder(told, tensorboard=config.run.tensorboard, progress=self.progress, active=processes.is_main())
            )
            outcome = fit(
                members,
                weights=self.weights,
                layout=Layout(self.placement, together),
                observer=recorder,
                checkpoints=checkpoints if minutes is not None else None,
                chunk_steps=config.run.chunk_steps,
                checkpoint_minutes=minutes or 0.0,
                programs=self.programs,
            )
            spent = {name: value / len(group) for name, value in outcome.seconds.items()}
            spent["compile"] = spent.get("compile", 0.0) + self.compile_seconds
            widest = max(map(len, members[0].method.stages), default=1)
            beside = {"seeds": len(group), "phases": widest if together else 1}
            for number in left:
                learnt = outcome.learnt[number]
                if learnt is not None:
                    seconds = {"prepare": self.prepare_seconds, **spent}
                    self._write(group[number], learnt, origins[number], recorder.records(number), seconds, beside)
            checkpoints.delete()
        if len(group) > 1 and processes.is_main():
            shutil.rmtree(where, ignore_errors=True)
        return {group[number].config.run.seed: sentence for number, sentence in outcome.diverged.items()}

    def _write(
        self,
        seed: _Seed,
        learnt: Variables,
        origin: Origin,
        records: Sequence[dict[str, Any]],
        seconds: dict[str, float],
        beside: dict[str, int],
    ) -> None:
        """Score what one seed learnt, and write its variables and, last, its result."""
        config, prepared = seed.config, seed.prepared
        began = time.perf_counter()
        self.merge = self.merge or merger(prepared, learnt, self.placement)
        found = conclude(prepared, learnt, self.merge, config.data, self.placement, records, seconds)
        host = gather_to_main(learnt, self.placement)
        if not processes.is_main():
            return
        found.seconds["evaluate"] = time.perf_counter() - began
        weights = list(self.weights)
        save_variables(seed.folder, host, origin, weights=weights, task=config.run.save_weights)
        run_folder.write_logits(seed.folder, found.logits)
        sizes = {name: len(rows) for name, rows in prepared.rows.items()}
        result = describe(config, found, train_size=prepared.train_size, reads=sizes, data=self.data)
        run_folder.write_result(seed.folder, {**result, "mesh": self.placement.describe(), "side_by_side": beside})


def _on_the_host() -> contextlib.AbstractContextManager:
    """Weights go to the devices when it is known which part goes where: they may be too large for one."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError as error:
        raise AgwmError(
            "JAX_PLATFORMS leaves out the CPU, where weights are read before they go to the devices: unset it, or name "
            "cpu too (JAX_PLATFORMS=cuda,cpu)."
        ) from error


def _claim(stack: contextlib.ExitStack, group: Sequence[_Seed], where: Path) -> None:
    """Lock every folder of a group; the main process does, and all hear of it where it cannot.

    Raises:
        AgwmError: another run has one, or a process does not see what the main process made.
    """
    refused = None
    try:
        if processes.is_main():
            for seed in group:
                stack.enter_context(run_folder.claimed(seed.folder, seed.config))
            note(where, tuple(seed.config.run.seed for seed in group))
    except AgwmError as error:
        refused = error
    processes.fail_together(refused)
    folder = group[0].folder
    if not processes.all_see(folder / "config.yaml"):
        raise AgwmError(
            f"a process does not see {folder}, which process 0 made: all of them write and read checkpoints there, so "
            "--run.output must lie on a file system that the hosts share."
        )


def _set_compilation_cache(folder: str | None) -> None:
    if folder is not None:  # null leaves what the user has set for JAX itself
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))


def _fingerprint(origins: Sequence[Origin], prepared: Sequence[Prepared]) -> str:
    """The pretrained weights, what the row numbers of the plans refer to, and the plans."""
    digest = hashlib.sha256()
    for origin, one in zip(origins, prepared, strict=True):
        digest.update(origin.pretrained.encode())
        for name, column in sorted(one.member.data.items()):
            digest.update(name.encode() + np.ascontiguousarray(column).tobytes())
        for phase in one.method.phases:
            for name in sorted(phase.plan):
                digest.update(np.ascontiguousarray(phase.plan[name]).tobytes())
    return digest.hexdigest()
