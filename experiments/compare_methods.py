"""Several methods over several seeds on one task: one run folder each, then the report.

    python experiments/compare_methods.py --config configs/agreement.yaml --methods vanilla agwm --seeds 0 1

With --equal-passes the methods without a search train for `search.epochs` more, so that every method sees the training
set equally often. Settings after the named options go to every run (`--finetune.epochs 5`). A comparison that was
stopped continues where it was when the same command is given again. Every run is a process of its own, so that its peak
memory is its own.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from agwm_jax.config import load_config
from agwm_jax.errors import AgwmError
from agwm_jax.report import write_report


def main() -> int:
    """Train what is not trained yet, then write the report; the exit code of the first run that fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", required=True, help="YAML file of the task and the settings")
    parser.add_argument("--methods", nargs="+", default=["vanilla", "frozen_alpha", "agwm"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--output", type=Path, default=Path("runs/comparison"), help="folder of the run folders")
    parser.add_argument("--equal-passes", action="store_true", help="give methods without a search its epochs too")
    parser.add_argument("--report", type=Path, help="folder of tables and plots (default: OUTPUT/report)")
    arguments, settings = parser.parse_known_args()

    try:
        config = load_config(arguments.config, settings)
    except AgwmError as error:
        print(error, file=sys.stderr)
        return 2
    all_passes = ["--finetune.epochs", str(config.finetune.epochs + config.search.epochs)]

    pairs = [(seed, method) for seed in arguments.seeds for method in arguments.methods]
    for number, (seed, method) in enumerate(pairs, start=1):
        folder = arguments.output / method / f"seed-{seed}"
        print(f"[{number}/{len(pairs)}] {method}, seed {seed}", flush=True)
        run = ["--method", method, "--seed", str(seed), "--output", str(folder)]
        command = [sys.executable, "-m", "agwm_jax", "train", "--config", arguments.config, *run, *settings]
        if arguments.equal_passes and method != "agwm":
            command += all_passes
        code = subprocess.run(command).returncode
        if code:
            return code
    try:
        report = write_report(
            [arguments.output / method for method in arguments.methods], arguments.report or arguments.output / "report"
        )
    except AgwmError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"\n{report.markdown}")
    print("Written:", *(f"  {path}" for path in report.files), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
