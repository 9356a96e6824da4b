"""Several methods over several seeds on one task: a run folder a method and seed, then the report.

    python experiments/compare_methods.py --config configs/agreement.yaml --methods vanilla agwm --seeds 0 1

With --equal-passes the methods without a search train for `search.epochs` more, so that every method sees the training
set equally often. Settings after the named options go to every run (`--finetune.epochs 5`). A comparison that was
stopped continues where it was when the same command is given again. The seeds of a method go side by side as far as the
memory takes them (`--run.vectorize none`: one after the other); every method is a process of its own, so that its peak
memory is its own.
"""

import argparse
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from agwm_jax.cli import MISTAKE, OK
from agwm_jax.errors import AgwmError
from agwm_jax.report import write_report
from agwm_jax.settings.config import load_config

METHODS = ("vanilla", "frozen_alpha", "agwm")


def main() -> int:
    """Train what is not trained yet, then write the report; the exit code of what failed, 2 where seeds diverged."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the task and the settings")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--output", type=Path, default=Path("runs/comparison"), help="folder of the run folders")
    parser.add_argument("--equal-passes", action="store_true", help="give methods without a search its epochs too")
    parser.add_argument("--report", type=Path, help="folder of tables and plots (default: OUTPUT/report)")
    arguments, settings = parser.parse_known_args()
    try:
        folders = run_all(
            arguments.config,
            arguments.methods,
            arguments.seeds,
            arguments.output,
            settings,
            equal_passes=arguments.equal_passes,
        )
        report = write_report(folders, arguments.report or arguments.output / "report")
    except AgwmError as error:
        print(f"compare_methods: {error}", file=sys.stderr)
        return 2
    print(f"\n{report.markdown}")
    print("Written:", *(f"  {path}" for path in report.files), sep="\n")
    return OK if len(folders) == len(arguments.methods) * len(arguments.seeds) else MISTAKE


def run_all(
    config: Path,
    methods: Sequence[str],
    seeds: Sequence[int],
    output: Path,
    settings: Sequence[str],
    *,
    equal_passes: bool,
) -> list[Path]:
    """Run every method with all seeds, or what is left of it; the run folders of those that did not diverge.

    Raises:
        AgwmError: bad settings.
        SystemExit: a run failed or was interrupted; with its exit code.
    """
    defaults = load_config(config, settings)
    all_passes = ["--finetune.epochs", str(defaults.finetune.epochs + defaults.search.epochs)]
    listed = ", ".join(map(str, seeds))
    for number, method in enumerate(methods, start=1):
        print(f"[{number}/{len(methods)}] {method}, seeds {listed}", flush=True)
        passes = all_passes if equal_passes and method != "agwm" else []
        own = ["--method", method, "--seeds", f"[{listed}]", "--output", str(output / method)]
        code = _train(["--config", str(config), *settings, *passes, *own])
        some_diverged = code == MISTAKE and any((output / method).glob("seed-*/result.json"))
        if code and not some_diverged:  # else the other methods are worth comparing all the same
            raise SystemExit(code)
    folders = [output / method / f"seed-{seed}" for seed in seeds for method in methods]
    return [folder for folder in folders if (folder / "result.json").exists()]


def _train(arguments: Sequence[str]) -> int:
    child = subprocess.Popen([sys.executable, "-m", "agwm_jax", "train", *arguments])
    # Ctrl-C reaches the child too, which saves its state and says how to continue: wait for that.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return child.wait()
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    sys.exit(main())
