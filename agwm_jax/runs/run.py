"""One run from a config to a result: build, fit, score, and write what outlives it."""

import contextlib
import hashlib
import shutil
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from agwm_jax.core.mixup import mix
from agwm_jax.engine import processes
from agwm_jax.engine.checkpoint import Checkpoints
from agwm_jax.engine.lanes import Member
from agwm_jax.engine.loop import Interrupted, Layout, fit
from agwm_jax.engine.memory import build_placement, choose
from agwm_jax.engine.sharding import SEED, Placement, check_model, gather_to_main, place
from agwm_jax.errors import AgwmError, Diverged
from agwm_jax.methods.interface import Weights
from agwm_jax.runs import folder as run_folder
from agwm_jax.runs.build import Built, build_seeds
from agwm_jax.runs.evaluate import export_run, predict_logits, text_columns
from agwm_jax.runs.groups import checkpoint_folder, note, plan_groups
from agwm_jax.runs.recorder import Recorders
from agwm_jax.runs.result import describe
from agwm_jax.settings.config import Config, seed_configs
from agwm_jax.settings.hypergradient import Implicit, Penalty


def train(config: Config, *, progress: bool = True) -> dict[str, Any]:
    """`train_seeds` of a config with one seed; its result."""
    return train_seeds(config, progress=progress)[0]


def train_seeds(config: Config, *, progress: bool = True) -> list[dict[str, Any]]:
    """Train as `config` says, or continue the same run where it stopped; a finished seed is not run again.

    Args:
        config: the settings; ``config.run.output`` is the run folder, or with ``run.seeds`` the folder of them.
        progress: show progress bars.

    Returns:
        The content of every seed's result.json: scores by split and metric, seconds by phase, versions, device,
        warnings.

    Raises:
        Diverged: the loss of some seeds is not finite; the results of the others are written all the same.
        AgwmError: bad settings or data, a folder of another run, a mesh or a memory that does not fit.
        Interrupted: Ctrl-C; the state is saved.
    """
    configs = seed_configs(config)
    folders = [Path(one.run.output) for one in configs]
    for folder, one in zip(folders, configs, strict=True):
        run_folder.check(folder, one)
    diverged: dict[int, str] = {}
    try:
        if any(run_folder.read_result(folder) is None for folder in folders):
            diverged = _train(config, configs, progress=progress)
        processes.wait_for_all("the results are written")
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


def _export(folders: Sequence[Path]) -> None:
    for folder in folders:
        deviation = export_run(folder, folder / "export")
        if deviation is not None:
            warnings.warn(f"exported, but transformers will not give the same logits: {deviation}", stacklevel=3)


def _train(config: Config, configs: Sequence[Config], *, progress: bool) -> dict[int, str]:
    """Train the seeds that have no result, in as few groups as `run.vectorize` allows; what happened to those that
    diverged.
    """
    _set_compilation_cache(config.run.compilation_cache)
    _warn_about_identifiability(config)
    began = time.perf_counter()
    placement = build_placement(config)
    with _on_the_host():
        built = build_seeds(configs)
    check_model(
        placement,
        num_heads=built[0].pretrained.config.num_attention_heads,
        intermediate_size=built[0].pretrained.config.intermediate_size,
        batch_size=config.data.batch_size,
    )
    side_by_side = choose(config, built[0], placement, num_seeds=len(configs))
    seeds = {one.run.seed: _Seed(one, own) for one, own in zip(configs, built, strict=True)}
    folders = {number: seed.folder for number, seed in seeds.items()}
    groups = plan_groups(
        Path(config.run.output),
        folders,
        finished=[number for number, folder in folders.items() if run_folder.read_result(folder) is not None],
        at_once=side_by_side.seeds,
        mesh_seed=placement.mesh.shape[SEED],
    )
    prepared = (time.perf_counter() - began) / sum(map(len, groups))
    diverged: dict[int, str] = {}
    for group in groups:
        where = checkpoint_folder(Path(config.run.output), folders, group)
        layout = Layout(placement, side_by_side.splits > 1)
        try:
            members = [seeds[number] for number in group]
            diverged |= _train_group(config, members, where, layout, prepared=prepared, progress=progress)
        except Diverged as error:
            diverged |= dict.fromkeys(group, str(error))
    return diverged


def _on_the_host() -> contextlib.AbstractContextManager:
    """Weights go to the devices when it is known which part goes where: they may be too large for one."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError as error:
        raise AgwmError(
            "JAX_PLATFORMS leaves out the CPU, where weights are read before they go to the devices: unset it, or name "
            "cpu too (JAX_PLATFORMS=cuda,cpu)."
        ) from error


class _Seed(NamedTuple):
    config: Config
    built: Built

    @property
    def folder(self) -> Path:
        return Path(self.config.run.output)

    @property
    def is_finished(self) -> bool:
        return run_folder.read_result(self.folder) is not None


def _train_group(
    config: Config, group: Sequence[_Seed], where: Path, layout: Layout, *, prepared: float, progress: bool
) -> dict[int, str]:
    """Train seeds side by side, their checkpoints in `where`, and write what outlives them; what happened to those that
    diverged.
    """
    digests = [run_folder.weights_digest(seed.built.pretrained.params) for seed in group]
    left = [number for number, seed in enumerate(group) if not seed.is_finished]
    # Not before: settings or data that are refused leave no folder behind.
    with contextlib.ExitStack() as stack:
        _claim(stack, group, where)
        checkpoints = stack.enter_context(
            contextlib.closing(
                Checkpoints(
                    where,
                    keep=config.run.keep_checkpoints,
                    fingerprint=f"{' '.join(digests)} {_data_fingerprint([seed.built for seed in group])}",
                )
            )
        )
        begun = checkpoints.position()
        if begun is not None and config.run.vectorize == "auto":  # what was begun goes on as it was
            layout = layout._replace(together=begun.together)
        recorders = Recorders(
            [seed.folder for seed in group],
            [f"seed {seed.config.run.seed}" if len(group) > 1 else "" for seed in group],
            tensorboard=config.run.tensorboard,
            progress=progress,
            active=processes.is_main(),
        )
        outcome = fit(
            [_member(seed) for seed in group],
            layout=layout,
            checkpoints=checkpoints,
            recorders=recorders,
            chunk_steps=config.run.chunk_steps,
            checkpoint_steps=config.run.checkpoint_steps,
        )
        seconds = {"prepare": prepared, **{name: value / len(group) for name, value in outcome.seconds.items()}}
        for number, (seed, digest, weights) in enumerate(zip(group, digests, outcome.weights, strict=True)):
            if weights is not None and number in left:
                _write(seed, digest, weights, layout, seconds, recorders, number)
        checkpoints.delete()
    if len(group) > 1 and processes.is_main():
        shutil.rmtree(where, ignore_errors=True)
    return {group[number].config.run.seed: sentence for number, sentence in outcome.diverged.items()}


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


def _member(seed: _Seed) -> Member:
    built = seed.built
    data = text_columns(built.encoded["train"])
    return Member(seed.config.run.seed, built.method, built.frozen, built.initial, data, built.key)


def _write(
    seed: _Seed,
    digest: str,
    weights: Weights,
    layout: Layout,
    seconds: dict[str, float],
    recorders: Recorders,
    number: int,
) -> None:
    """Score what one seed learnt, and write its weights and, last, its result."""
    config, built = seed.config, seed.built
    began = time.perf_counter()
    logits = _logits(config, built, weights, layout.placement)
    host = gather_to_main(weights, layout.placement)
    if not processes.is_main():
        return
    seconds = {**seconds, "evaluate": time.perf_counter() - began}
    run_folder.save_weights(
        seed.folder,
        host,
        complement=config.mixup.complement,
        rank=config.mixup.rank,
        pretrained=digest,
        task=config.run.save_weights,
    )
    side_by_side = {"seeds": len(recorders.names), "splits": config.search.num_splits if layout.together else 1}
    result = describe(config, built, host, logits, seconds, recorders.records(number))
    run_folder.write_result(seed.folder, {**result, "mesh": layout.placement.describe(), "side_by_side": side_by_side})


def _logits(config: Config, built: Built, weights: Weights, placement: Placement) -> dict[str, np.ndarray]:
    """Of every split but the training split."""
    shapes = {path: x.shape for path, x in built.pretrained.params.items()}
    frozen = place(built.frozen, placement.of_tree(built.frozen, shapes))
    with jax.set_mesh(placement.mesh):
        params = _mixed(frozen, *weights, complement=config.mixup.complement)
        return {
            split: predict_logits(
                built.pretrained.apply, params, encoded, batch_size=config.data.eval_batch_size, placement=placement
            )
            for split, encoded in built.encoded.items()
            if split != "train"
        }


_mixed = jax.jit(mix, static_argnames="complement")  # compiled once for all seeds


def _set_compilation_cache(folder: str | None) -> None:
    if folder is not None:  # null leaves what the user has set for JAX itself
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))


def _warn_about_identifiability(config: Config) -> None:
    if (
        config.method.name == "agwm"
        and isinstance(config.hypergradient, Implicit | Penalty)
        and config.search.anchor == 0
    ):
        warnings.warn(
            f"hypergradient.estimator {config.hypergradient.estimator} with search.anchor 0: without an anchor the "
            "task weights can undo alpha, the exact hypergradient at the inner optimum is zero, and a better solve "
            "comes closer to zero; set search.anchor, for example to 0.1.",
            stacklevel=3,
        )


def _data_fingerprint(built: Sequence[Built]) -> str:
    """What the row numbers of the plans refer to, and the plans."""
    digest = hashlib.sha256()
    for one in built:
        for column in one.encoded["train"]:
            if isinstance(column, np.ndarray):
                digest.update(np.ascontiguousarray(column).tobytes())
        for phase in one.method.phases:
            for name in sorted(phase.plan):
                digest.update(np.ascontiguousarray(phase.plan[name]).tobytes())
    return digest.hexdigest()
