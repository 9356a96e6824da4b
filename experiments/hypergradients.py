"""Every estimator of the hypergradient against exact answers, and against a converged solve on a real model.

    python experiments/hypergradients.py --data FOLDER --output runs/hypergradients

1. Analytic problems in float64: relative error of the hypergradient against cost.
2. The model of the config, along a recorded search for every anchor: cosine, norm and response of each estimator's
   hypergradient against a reference (conjugate gradients on the damped Gauss-Newton system of the same batch), seconds
   and memory; then the loss of the validation split, on which alpha is fitted, and of the development split, which
   nothing is fitted on, after equally many outer steps and after equal seconds.

Writes comparison.csv, comparison.md and the figures frontier.png and cosine.png.
"""

import argparse
import csv
import sys
import time
from pathlib import Path

import jax

from agwm_jax import AgwmError, load_config
from agwm_jax.bench.analytic import analytic_rows
from agwm_jax.bench.figures import write_figures, write_markdown
from agwm_jax.bench.hypergradients import PRESETS, model_rows
from agwm_jax.bench.search import read_setting

COLUMNS = ("part", "problem", "estimator", "terms", "fb", "anchor", "step", "order", "quantity", "value")


def main() -> int:
    """Measure, then write the table and the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", type=Path, default=Path(__file__).parents[1] / "configs/stsb_300.yaml")
    parser.add_argument(
        "--data", type=Path, help="folder with train.jsonl and validation.jsonl (default: as the config)"
    )
    parser.add_argument("--preset", choices=PRESETS, default="default", help="full is for a GPU")
    parser.add_argument("--output", type=Path, default=Path("runs/hypergradients"))
    arguments, overrides = parser.parse_known_args()
    data = arguments.data
    files = (
        [w for s in ("train", "validation") for w in (f"--task.files.{s}", str(data / f"{s}.jsonl"))] if data else []
    )
    began = time.perf_counter()
    try:
        config = load_config(
            arguments.config, ["--data.max_length", "32", "--method.search.epochs", "3", *files, *overrides]
        )
        preset = PRESETS[arguments.preset]
        setting = read_setting(config, max(*preset.points, preset.outer_steps) + 1)
        arguments.output.mkdir(parents=True, exist_ok=True)
        rows = analytic_rows()
        print(f"analytic problems: {time.perf_counter() - began:.0f} s", flush=True)
        rows += model_rows(setting, preset)
    except AgwmError as error:
        print(f"hypergradients: {error}", file=sys.stderr)
        return 2
    with (arguments.output / "comparison.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    report = write_markdown(rows, arguments.output / "comparison.md")
    figures = write_figures(rows, arguments.output)
    print(f"\n{report}\n{time.perf_counter() - began:.0f} s on {jax.device_count()} x {jax.devices()[0].device_kind}")
    print("Written:", *(f"  {path}" for path in (arguments.output / "comparison.csv", *figures)), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
