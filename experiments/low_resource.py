"""The low-resource table: 300 training examples, learning rate tuned for plain fine-tuning, then every method at it.

    python experiments/low_resource.py --data FOLDER --output runs/low_resource

FOLDER holds cola, rte, stsb and citation_intent, each with train.jsonl and validation.jsonl (citation_intent also
test.jsonl). For each task the learning rate is that of the best mean score of plain fine-tuning on the development
split over two seeds; no method is tuned after that, and all make equally many passes over the training set.
"""

import argparse
import json
import sys
from pathlib import Path

from agwm_jax import AgwmError
from agwm_jax.report import write_report
from agwm_jax.runs.compare import compare

TASKS = ("stsb", "citation_intent", "rte", "cola")
CONFIGS = Path(__file__).parents[1] / "configs"


def main() -> int:
    """Tune, run and report; continues where it was stopped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--output", type=Path, default=Path("runs/low_resource"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--methods", nargs="+", default=["vanilla", "frozen_alpha", "agwm"])
    parser.add_argument("--learning-rates", nargs="+", default=["1e-4", "3e-4"])
    parser.add_argument("--tuning-seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    arguments, settings = parser.parse_known_args()
    folders = []
    try:
        for task in arguments.tasks:
            config = CONFIGS / f"{task}_300.yaml"
            common = [*_files(arguments.data / task), "--run.save_weights", "false", *settings]

            def run(methods, seeds, rate, name, config=config, common=common) -> list[Path]:
                rates = ["--finetune.optimizer.learning_rate", rate, "--agwm.search.inner.learning_rate", rate]
                return compare(config, methods, seeds, arguments.output / name, [*common, *rates], equal_passes=True)

            everything = ["vanilla", *(method for method in arguments.methods if method != "vanilla")]
            scores = {}
            for rate in arguments.learning_rates:
                runs = run(["vanilla"], arguments.tuning_seeds, rate, f"{task}/tune-{rate}")
                scores[rate] = sum(map(_development_score, runs)) / len(runs)
            best = max(scores, key=scores.__getitem__)
            print(f"{task}: development score by learning rate {scores}, chosen {best}", flush=True)
            folders += run(everything, arguments.seeds, best, f"{task}/rate-{best}")
        report = write_report(folders, arguments.output / "report")
    except AgwmError as error:
        print(f"low_resource: {error}", file=sys.stderr)
        return 2
    print(f"\n{report.markdown}")
    return 0


def _files(folder: Path) -> list[str]:
    found = [split for split in ("train", "validation", "test") if (folder / f"{split}.jsonl").exists()]
    # STS-B has a test split with labels too; its validation split is the one that GLUE reports.
    wanted = [split for split in found if split != "test" or folder.name == "citation_intent"]
    return [word for split in wanted for word in (f"--task.files.{split}", str(folder / f"{split}.jsonl"))]


def _development_score(run: Path) -> float:
    result = json.loads((run / "result.json").read_text())
    return result["scores"]["development"][result["metric"]]


if __name__ == "__main__":
    sys.exit(main())
