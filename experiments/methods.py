"""All methods at equal passes on tasks of 300 texts: score, spread, counted cost, seconds and memory; docs/methods.md.

    python experiments/methods.py --data FOLDER --output runs/methods
    python experiments/methods.py --data FOLDER --output runs/methods --tasks stsb --methods vanilla lora --seeds 0

FOLDER holds the tasks' folders, each with train.jsonl and validation.jsonl. Every method runs at each factor of its own
default learning rate; the factor with the best mean development score is reported, and nothing else is tuned. What was
trained before is read again. Writes methods.csv, methods.md and methods.png.
"""

import argparse
import csv
import sys
from pathlib import Path

from agwm_jax import METHODS, AgwmError, load_config
from agwm_jax.bench.methods import counted, markdown, plain_step, read_row, write_figure
from agwm_jax.runs.build import build
from agwm_jax.runs.compare import compare
from agwm_jax.selection.trials import rates

CONFIGS = Path(__file__).parents[1] / "configs"
TASKS = ("stsb", "ag_news")


def main() -> int:
    """Train what is not trained yet, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--output", type=Path, default=Path("runs/methods"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--passes", type=int, default=5, help="over the training set, of every method")
    parser.add_argument(
        "--held-out", type=int, help="score about so many rows of the validation file, evenly spaced; default: all"
    )
    parser.add_argument("--factors", nargs="+", type=float, default=[5.0, 15.0], help="of the default learning rates")
    arguments, settings = parser.parse_known_args()
    rows = []
    for task in arguments.tasks:
        config = CONFIGS / f"{task}_300.yaml"
        splits = {split: arguments.data / task / f"{split}.jsonl" for split in ("train", "validation")}
        if arguments.held_out:
            splits["validation"] = _every_nth(splits["validation"], arguments.held_out, arguments.output / task)
        files = [word for split, path in splits.items() for word in (f"--task.files.{split}", str(path))]
        words = [*files, "--run.save_weights", "false", *settings]
        unit = plain_step(config, words)
        for method in arguments.methods:
            runs = {}
            try:
                passes = load_config(config, [*words, "--method", method]).method.extra_passes
                epochs = ["--finetune.epochs", str(max(1, arguments.passes - passes))]
                cost = counted(build(load_config(config, [*words, *epochs, "--method", method]))[0], unit)
                for factor in arguments.factors:
                    own = [*words, *epochs, *rates(method, factor)]
                    where = arguments.output / task / f"{factor:g}"
                    runs[factor] = compare(config, [method], arguments.seeds, where, own)
            except AgwmError as error:  # such as one that needs classes, on a regression
                print(f"{task}, {method}: {error}", file=sys.stderr)
                continue
            row = read_row(task, method, runs, {method: cost})
            rows += [] if row is None else [row]
            _write(arguments.output, rows)
    print(markdown(rows))
    return 0


def _every_nth(file: Path, count: int, folder: Path) -> Path:
    rows = file.read_text().splitlines(keepends=True)  # neighbours are alike, so not the first ones
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file.name).write_text("".join(rows[:: max(1, len(rows) // count)]))
    return folder / file.name


def _write(output: Path, rows) -> None:
    output.mkdir(parents=True, exist_ok=True)
    with (output / "methods.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(rows[0]._fields)
        writer.writerows([*row[:3], " ".join(f"{score:.2f}" for score in row.scores), *row[4:]] for row in rows)
    (output / "methods.md").write_text(markdown(rows))
    write_figure(rows, output / "methods.png")


if __name__ == "__main__":
    sys.exit(main())
