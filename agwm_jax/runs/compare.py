"""Several methods over several seeds on one task: a process a method, a run folder a method and seed."""

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from agwm_jax.methods.interface import METHODS
from agwm_jax.settings import load_config

_MISTAKE = 2  # exit code of `agwm train` where some seeds diverged


def compare(
    config: Path,
    methods: Sequence[str],
    seeds: Sequence[int],
    output: Path,
    overrides: Sequence[str] = (),
    *,
    equal_passes: bool = False,
) -> list[Path]:
    """Train every method with all seeds, or what is left of it; the run folders of those that did not diverge.

    Every method is a process of its own, so that its peak memory is its own; its seeds go side by side as far as the
    memory takes them. A comparison that was stopped goes on where it was when it is called again.

    Args:
        config: YAML file of the task and the settings.
        methods: names of methods.
        seeds: of the runs.
        output: folder of the run folders, ``output/METHOD/seed-N``.
        overrides: settings for all of them, ``["--finetune.epochs", "5"]``; ``--NAME.setting`` is
            ``--method.setting`` for the method of that name alone.
        equal_passes: methods that pass over the training set less often than others train for as many epochs more, so
            that all see it equally often.

    Raises:
        AgwmError: bad settings.
        SystemExit: a run failed or was interrupted; with its exit code.
    """
    own = {method: [*settings_of(method, overrides), "--method", method] for method in methods}
    extra: dict[str, list[str]] = {method: [] for method in methods}
    if equal_passes:
        configs = {method: load_config(config, words) for method, words in own.items()}
        passes = {method: one.finetune.epochs + one.method.extra_passes for method, one in configs.items()}
        for method, one in configs.items():
            extra[method] = ["--finetune.epochs", str(max(passes.values()) - one.method.extra_passes)]
    listed = ", ".join(map(str, seeds))
    for number, method in enumerate(methods, start=1):
        print(f"[{number}/{len(methods)}] {method}, seeds {listed}", flush=True)
        where = ["--seeds", f"[{listed}]", "--output", str(output / method)]
        code = _train(["--config", str(config), *own[method], *extra[method], *where])
        some_diverged = code == _MISTAKE and any((output / method).glob("seed-*/result.json"))
        if code and not some_diverged:  # else the other methods are worth comparing all the same
            raise SystemExit(code)
    folders = [output / method / f"seed-{seed}" for seed in seeds for method in methods]
    return [folder for folder in folders if (folder / "result.json").exists()]


def settings_of(method: str, overrides: Sequence[str]) -> list[str]:
    """The overrides that are for all methods, and those for this one."""
    kept: list[str] = []
    rest = list(overrides)
    while rest:
        word = rest.pop(0)
        values = [word] if "=" in word or not rest else [word, rest.pop(0)]
        name = word.removeprefix("--").split(".")[0]
        if name == method:
            kept += [f"--method.{word.removeprefix('--').split('.', 1)[-1]}", *values[1:]]
        elif name not in METHODS:
            kept += values
    return kept


def _train(arguments: Sequence[str]) -> int:
    child = subprocess.Popen([sys.executable, "-m", "agwm_jax", "train", *arguments])
    # Ctrl-C reaches the child too, which saves its state and says how to continue: wait for that.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return child.wait()
    finally:
        signal.signal(signal.SIGINT, before)
