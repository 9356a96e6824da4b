"""What can be typed after `agwm`: every command with its options, and their help."""

import argparse
from pathlib import Path
from typing import Any

REGISTRIES = {
    "methods": ("agwm_jax.methods.interface", "METHODS"),
    "estimators": ("agwm_jax.core.estimators.base", "ESTIMATORS"),
    "solvers": ("agwm_jax.core.solvers.base", "SOLVERS"),
    "families": ("agwm_jax.models.family", "FAMILIES"),
    "tasks": ("agwm_jax.data.sources.base", "TASK_SOURCES"),
    "metrics": ("agwm_jax.metrics", "METRICS"),
}
"""What `agwm list` lists: module and name of the registry of each kind."""
TRAIN_HELP = """\
usage: agwm train [--config FILE] [--SECTION.SETTING VALUE ...] [--coordinator ADDRESS]

Train as the settings say: the config file's, changed by those given here; without either, the defaults.
A run that was interrupted continues when the same command is given again.

options:
  --config FILE            settings as YAML, by section
  --seed N                 short for --run.seed
  --seeds '[0, 1, 2]'      short for --run.seeds: several runs, one a seed
  --output FOLDER          short for --run.output
  --model PATH             short for --model.path: minilm, bert-tiny, a folder, or a hub id
  --method NAME            short for --method.name; `agwm list methods` says which there are
  --debug                  show the traceback of an error

sections of settings, given as --section.setting VALUE, where VALUE is written as in YAML (2e-5, true, null, '[0, 1]'):
{sections}

Relative paths in a config are relative to it, those given here to the working directory.
`agwm settings` lists all settings with their defaults, `agwm settings learning rate` those that these words are about.

several processes, as on several hosts, are one run when each gets the same command and --coordinator:
  --coordinator auto       as SLURM (srun agwm train ... --coordinator auto), Open MPI or a TPU pod says
  --coordinator HOST:PORT --num-processes N --process-id I
                           by hand; process 0 runs on HOST
--mesh.data all then takes the devices of all of them; the run folder must be one that all can reach.
"""

_OPTIONS: Any = {"allow_abbrev": False}


def parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of `agwm`, and those of its commands by name."""
    parser = argparse.ArgumentParser(
        prog="agwm",
        description="Fine-tune a pretrained encoder on few examples by attention-guided weights mixup.",
        epilog="Exit codes: 0 done, 1 unexpected error, 2 a mistake in the command, settings or data, 130 Ctrl-C. "
        "--debug, with any command, shows the traceback of an error.",
        **_OPTIONS,
    )
    group = parser.add_subparsers(dest="command", metavar="COMMAND")
    _train(group)
    _compare(group)
    _sweep(group)
    _listings(group)
    _finished(group)
    _report(group)
    return parser, group.choices


def _train(group: Any) -> None:
    train = group.add_parser(
        "train", help="train as a config says, or continue the same run", add_help=False, **_OPTIONS
    )
    train.add_argument("--config", type=Path)
    train.add_argument("--coordinator")
    train.add_argument("--num-processes", type=int)
    train.add_argument("--process-id", type=int)
    train.add_argument("-h", "--help", action="store_true")


def _compare(group: Any) -> None:
    compare = group.add_parser(
        "compare",
        help="find the method for one labelled file, and train it",
        description="Cross-validate a few methods on one labelled file, recommend one, train it on all of the file. "
        "The same command goes on where it was stopped. Settings given as of `agwm train` hold for all methods, "
        "--NAME.setting for the method of that name.",
        **_OPTIONS,
    )
    compare.add_argument("file", metavar="FILE", type=Path, help="labelled texts: .csv, .tsv, .jsonl or .parquet")
    compare.add_argument(
        "--encoder", default="minilm", help="pretrained model: a folder, or a hub id (default: minilm)"
    )
    compare.add_argument(
        "--text", nargs="+", default=[], metavar="COLUMN", help="text column, or two (default: guessed)"
    )
    compare.add_argument("--label", metavar="COLUMN", help="label column (default: guessed)")
    compare.add_argument("--group", metavar="COLUMN", help="rows with the same value here stay in one fold")
    compare.add_argument(
        "--test", type=Path, metavar="FILE", help="labelled file that the final model is scored on once"
    )
    compare.add_argument("--methods", nargs="+", metavar="NAME", help="default: probe vanilla lp_ft agwm")
    compare.add_argument("--all", action="store_true", help="all methods; takes hours")
    compare.add_argument("--folds", type=int, default=5, help="of the cross-validation (default: 5)")
    compare.add_argument(
        "--budget",
        metavar="TIME",
        default="10min",
        help="about how long: 90s, 10min, 2h, none; fewer folds, rates and methods where it is short (default: 10min)",
    )
    compare.add_argument("--separator", default=",", help="between the fields of a .csv file (default: a comma)")
    compare.add_argument("--output", type=Path, default=Path("runs/compare"), help="folder (default: runs/compare)")


def _sweep(group: Any) -> None:
    sweep = group.add_parser(
        "sweep",
        help="run a study: tasks x arms x grid x seeds, or what is left of it",
        description="Run a study, or what is left of it. Settings given as of `agwm train` hold for all of its runs; "
        "${task} in a value is the task's name.",
        **_OPTIONS,
    )
    sweep.add_argument("study", metavar="STUDY", type=Path, help="YAML file: tasks, arms, grid, settings, seeds")
    sweep.add_argument("--output", type=Path, default=Path("runs/study"), help="folder of runs and results.parquet")
    sweep.add_argument("--workers", type=int, default=1, help="processes at once (default: 1)")
    sweep.add_argument("--only", nargs="+", default=[], metavar="TASK/ARM/POINT", help="patterns of what to run")
    sweep.add_argument("--dry-run", action="store_true", help="check the settings and list what would run")


def _listings(group: Any) -> None:
    """Settings, and what can be chosen."""
    settings = group.add_parser("settings", help="list the settings of train", **_OPTIONS)
    settings.add_argument(
        "words", metavar="PATTERN", nargs="*", help="regular expressions, all of which a setting is to match"
    )

    listing = group.add_parser("list", help="list what can be chosen, by kind", **_OPTIONS)
    listing.add_argument("kind", nargs="?", choices=REGISTRIES, help="what to list, with cost and paper")
    group.add_parser("methods", help="list the methods, with what each costs and its paper", **_OPTIONS)


def _finished(group: Any) -> None:
    """What is done with a finished run."""
    evaluate = group.add_parser("eval", help="score a finished run", **_OPTIONS)
    predict = group.add_parser("predict", help="label the texts of a file", **_OPTIONS)
    export = group.add_parser("export", help="write a Hugging Face folder with what was learnt merged in", **_OPTIONS)
    for command in (evaluate, predict, export):
        command.add_argument("run", metavar="RUN", type=Path, help="run folder (predict: or an exported model)")
        command.add_argument("--model", metavar="PATH", help="where the pretrained model is now, if it has moved")
    evaluate.add_argument("--split", help="split of the run's task (default: the one its result reports)")
    evaluate.add_argument("--file", type=Path, help="labelled file with the columns of the task, instead of a split")
    predict.add_argument("input", metavar="INPUT", type=Path, help="file with the text columns of the run's task")
    predict.add_argument("output", metavar="OUTPUT", type=Path, help="file for the labels and probabilities")
    predict.add_argument(
        "--separator", help="between the fields of a .csv file (default: as the run's task has it, else a comma)"
    )
    export.add_argument("folder", metavar="FOLDER", type=Path, help="folder to write")


def _report(group: Any) -> None:
    report = group.add_parser("report", help="tables and plots of finished runs", **_OPTIONS)
    report.add_argument(
        "runs",
        metavar="RUNS",
        type=Path,
        nargs="+",
        help="run folders, or folders of them; or the results.parquet of a study",
    )
    report.add_argument("--output", type=Path, default=Path("report"), help="folder of the report (default: report)")
    report.add_argument(
        "--baseline", default="vanilla", help="method that the others are compared with (default: vanilla)"
    )
