"""Several methods over several seeds on one task: a run folder a method and seed, then the report.

    python experiments/compare_methods.py --config configs/agreement.yaml --methods vanilla agwm --seeds 0 1

Settings after the named options go to every run (`--finetune.epochs 5`), those with a method's name to that method
(`--agwm.search.epochs 5`). With --equal-passes every method sees the training set equally often. A comparison that was
stopped continues where it was when the same command is given again.
"""

import argparse
import sys
from pathlib import Path

from agwm_jax import METHODS, AgwmError
from agwm_jax.report import write_report
from agwm_jax.runs.compare import compare


def main() -> int:
    """Train what is not trained yet, then write the report; the exit code is 2 where a seed diverged."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the task and the settings")
    parser.add_argument("--methods", nargs="+", default=["vanilla", "frozen_alpha", "agwm"], help=", ".join(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--output", type=Path, default=Path("runs/comparison"), help="folder of the run folders")
    parser.add_argument("--equal-passes", action="store_true", help="as many passes over the data for every method")
    arguments, settings = parser.parse_known_args()
    try:
        folders = compare(
            arguments.config,
            arguments.methods,
            arguments.seeds,
            arguments.output,
            settings,
            equal_passes=arguments.equal_passes,
        )
        report = write_report(folders, arguments.output / "report")
    except AgwmError as error:
        print(f"compare_methods: {error}", file=sys.stderr)
        return 2
    print(f"\n{report.markdown}")
    print("Written:", *(f"  {path}" for path in report.files), sep="\n")
    return 0 if len(folders) == len(arguments.methods) * len(arguments.seeds) else 2


if __name__ == "__main__":
    sys.exit(main())
