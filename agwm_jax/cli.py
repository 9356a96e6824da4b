"""The command line: what is typed becomes one call of the library, what goes wrong one sentence and an exit code."""

import argparse
import contextlib
import importlib
import os
import re
import statistics
import sys
import textwrap
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from agwm_jax.errors import AgwmError
from agwm_jax.explain import UNEXPECTED, explain

_REGISTRIES = {
    "methods": ("agwm_jax.methods.interface", "METHODS"),
    "estimators": ("agwm_jax.core.estimators.base", "ESTIMATORS"),
    "solvers": ("agwm_jax.core.solvers.base", "SOLVERS"),
    "families": ("agwm_jax.models.family", "FAMILIES"),
    "tasks": ("agwm_jax.data.sources.base", "TASK_SOURCES"),
    "metrics": ("agwm_jax.metrics", "METRICS"),
}
_TRAIN_HELP = """\
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

OK, INTERRUPTED = 0, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command (default: what was typed) and return its exit code: 0 done, 1 a bug, 2 a mistake, 130 Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    with contextlib.suppress(AttributeError):  # a stream of another kind, as in a notebook, can print everything
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    code = _guarded(arguments)
    processes = sys.modules.get("agwm_jax.engine.processes")
    if code != OK and processes is not None:
        processes.leave(code)  # one of several processes: the others may wait for it
    return code


def _guarded(arguments: list[str]) -> int:
    """Run one command; whatever goes wrong becomes one sentence."""
    debug = "--debug" in arguments
    try:
        with warnings.catch_warnings():
            if not debug:
                warnings.showwarning = _show_warning
            return _run([argument for argument in arguments if argument != "--debug"])
    except KeyboardInterrupt as interrupt:
        print(f"agwm: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # What read our output has closed it (`agwm report ... | head`): nothing is wrong, and nothing more can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNEXPECTED
    except Exception as error:
        if debug:
            traceback.print_exc()
        text, code = explain(error)
        print(f"agwm: {text}", file=sys.stderr)
        return code


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """A warning is one sentence for the user, not a place in our code."""
    print(f"agwm: warning: {message}", file=sys.stderr)


def _run(arguments: Sequence[str]) -> int:
    parser, commands = _parsers()
    parsed, rest = parser.parse_known_args(arguments)
    if parsed.command is None:
        parser.print_help()
        return OK
    if rest and parsed.command not in ("train", "sweep", "compare"):
        commands[parsed.command].error(f"unrecognized arguments: {' '.join(rest)}")
    return globals()[f"_{parsed.command}"](parsed, rest)


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    options: Any = {"allow_abbrev": False}
    parser = argparse.ArgumentParser(
        prog="agwm",
        description="Fine-tune a pretrained encoder on few examples by attention-guided weights mixup.",
        epilog="Exit codes: 0 done, 1 unexpected error, 2 a mistake in the command, settings or data, 130 Ctrl-C. "
        "--debug, with any command, shows the traceback of an error.",
        **options,
    )
    group = parser.add_subparsers(dest="command", metavar="COMMAND")

    train = group.add_parser(
        "train", help="train as a config says, or continue the same run", add_help=False, **options
    )
    train.add_argument("--config", type=Path)
    train.add_argument("--coordinator")
    train.add_argument("--num-processes", type=int)
    train.add_argument("--process-id", type=int)
    train.add_argument("-h", "--help", action="store_true")

    compare = group.add_parser(
        "compare",
        help="find the method for one labelled file, and train it",
        description="Cross-validate a few methods on one labelled file, recommend one, train it on all of the file. "
        "The same command goes on where it was stopped. Settings given as of `agwm train` hold for all methods, "
        "--NAME.setting for the method of that name.",
        **options,
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

    sweep = group.add_parser(
        "sweep",
        help="run a study: tasks x arms x grid x seeds, or what is left of it",
        description="Run a study, or what is left of it. Settings given as of `agwm train` hold for all of its runs; "
        "${task} in a value is the task's name.",
        **options,
    )
    sweep.add_argument("study", metavar="STUDY", type=Path, help="YAML file: tasks, arms, grid, settings, seeds")
    sweep.add_argument("--output", type=Path, default=Path("runs/study"), help="folder of runs and results.parquet")
    sweep.add_argument("--workers", type=int, default=1, help="processes at once (default: 1)")
    sweep.add_argument("--only", nargs="+", default=[], metavar="TASK/ARM/POINT", help="patterns of what to run")
    sweep.add_argument("--dry-run", action="store_true", help="check the settings and list what would run")

    settings = group.add_parser("settings", help="list the settings of train", **options)
    settings.add_argument(
        "words", metavar="PATTERN", nargs="*", help="regular expressions, all of which a setting is to match"
    )

    listing = group.add_parser("list", help="list what can be chosen, by kind", **options)
    listing.add_argument("kind", nargs="?", choices=_REGISTRIES, help="what to list, with cost and paper")
    group.add_parser("methods", help="list the methods, with what each costs and its paper", **options)

    evaluate = group.add_parser("eval", help="score a finished run", **options)
    predict = group.add_parser("predict", help="label the texts of a file", **options)
    export = group.add_parser("export", help="write a Hugging Face folder with what was learnt merged in", **options)
    for command in (evaluate, predict, export):
        command.add_argument("run", metavar="RUN", type=Path, help="run folder (predict: or an exported model)")
        command.add_argument("--model", metavar="PATH", help="where the pretrained model is now, if it has moved")
    evaluate.add_argument("--split", help="split of the run's task (default: the one its result reports)")
    evaluate.add_argument("--file", type=Path, help="labelled file with the columns of the task, instead of a split")
    predict.add_argument("input", metavar="INPUT", type=Path, help="file with the text columns of the run's task")
    predict.add_argument("output", metavar="OUTPUT", type=Path, help="file for the labels and probabilities")
    export.add_argument("folder", metavar="FOLDER", type=Path, help="folder to write")

    report = group.add_parser("report", help="tables and plots of finished runs", **options)
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
    return parser, group.choices


# Each command imports what it needs, so that `agwm --help` and a typing error answer at once.


def _train(parsed: argparse.Namespace, overrides: list[str]) -> int:
    from agwm_jax.settings import Config, load_config, use_deterministic_kernels

    if parsed.help:
        sections = (f"  {name:<23}  {field.description}" for name, field in Config.model_fields.items())
        print(_TRAIN_HELP.format(sections="\n".join(sections)), end="")
        return OK
    config = load_config(parsed.config, overrides)
    if config.run.deterministic:
        use_deterministic_kernels()
    _connect(parsed)
    from agwm_jax.engine import processes
    from agwm_jax.runs.run import train_seeds

    results = train_seeds(config)
    if not processes.is_main():  # which speaks for all
        return OK
    what = f"{results[0]['task']}: {results[0]['metric']} on {results[0]['split']}"
    scores = [result["score"] for result in results]
    if config.run.seeds is None:
        print(f"{what} = {scores[0]:.4f}")
    else:
        spread = f" +- {statistics.stdev(scores):.4f}" if len(scores) > 1 else ""
        each = ", ".join(f"{result['seed']}: {result['score']:.4f}" for result in results)
        print(f"{what} = {statistics.mean(scores):.4f}{spread} (by seed {each})")
    print(f"run folder: {config.run.output}")
    _warn_of_learning(results)
    return OK


def _warn_of_learning(results: list[dict[str, Any]]) -> None:
    """Last, where it is read: what says that a score means nothing; of several seeds once."""
    from agwm_jax.runs.learning import NAMES

    for name in NAMES:
        hit = {r["seed"]: w["message"] for r in results for w in r.get("warnings", []) if w["name"] == name}
        if hit:
            seeds = f"seeds {', '.join(map(str, hit))}, the first: " if len(results) > 1 else ""
            print(f"agwm: warning: {seeds}{next(iter(hit.values()))}", file=sys.stderr)


def _compare(parsed: argparse.Namespace, settings: list[str]) -> int:
    from agwm_jax.selection.trials import METHODS_TRIED, all_methods, seconds_of

    if parsed.all and parsed.methods:
        raise AgwmError("--all and --methods exclude each other: try all, or those that are named")
    budget = None if parsed.budget == "none" else seconds_of(parsed.budget)
    from agwm_jax.selection.compare import MODEL, compare

    compare(
        parsed.file,
        parsed.encoder,
        output=parsed.output,
        text=parsed.text,
        label=parsed.label,
        group=parsed.group,
        test=parsed.test,
        methods=all_methods() if parsed.all else parsed.methods or METHODS_TRIED,
        folds=parsed.folds,
        budget=budget,
        separator=parsed.separator,
        settings=settings,
    )
    print(f"report: {parsed.output / 'report.html'}")
    print(f"label texts: agwm predict {parsed.output / MODEL} TEXTS.csv LABELLED.csv")
    return OK


def _sweep(parsed: argparse.Namespace, overrides: list[str]) -> int:
    from agwm_jax.runs.sweep import TABLE, plan, read_study, select, sweep

    if parsed.workers < 1:
        raise AgwmError(f"--workers: got {parsed.workers}; allowed: 1 or more")
    cells = plan(read_study(parsed.study), parsed.study.parent, overrides)
    chosen = select(cells, parsed.only)
    if parsed.dry_run:
        print("\n".join([*(cell.name for cell in chosen), f"{len(chosen)} cells of {len(cells[0].seeds)} seeds"]))
        return OK
    failures = sweep(cells, parsed.output, only=parsed.only, workers=parsed.workers)
    print(f"results: {parsed.output / TABLE}")
    if not failures:
        return OK
    listed = "".join(f"\n  {failure.cell.name} (exit code {failure.code}): {failure.log}" for failure in failures)
    raise AgwmError(f"{len(failures)} of {len(chosen)} cells failed; the same command tries them again:{listed}")


def _connect(parsed: argparse.Namespace) -> None:
    """Join the other processes of the run, where it has any; before anything asks for a device."""
    if parsed.coordinator is None:
        if parsed.num_processes is not None or parsed.process_id is not None:
            raise AgwmError("--num-processes and --process-id need --coordinator HOST:PORT, the address of process 0")
        if "JAX_COORDINATOR_ADDRESS" not in os.environ:
            return
    from agwm_jax.engine import processes

    # An address in the environment comes with the rest in the environment, or from the cluster.
    by_hand = parsed.num_processes is not None or parsed.process_id is not None
    address = parsed.coordinator or (os.environ["JAX_COORDINATOR_ADDRESS"] if by_hand else "auto")
    processes.connect(processes.Launch(address, parsed.num_processes, parsed.process_id))


def _eval(parsed: argparse.Namespace, _: list[str]) -> int:
    if parsed.split is not None and parsed.file is not None:
        raise AgwmError("--split and --file exclude each other: score a split of the run's task, or a file")
    from agwm_jax.runs.finished import evaluate

    print("\n".join(_table(evaluate(parsed.run, parsed.split, parsed.file, model=parsed.model))))
    return OK


def _predict(parsed: argparse.Namespace, _: list[str]) -> int:
    from agwm_jax.runs.finished import predict_file

    count = predict_file(parsed.run, parsed.input, parsed.output, model=parsed.model)
    print(f"{count} predictions: {parsed.output}")
    return OK


def _report(parsed: argparse.Namespace, _: list[str]) -> int:
    if [path.suffix for path in parsed.runs] == [".parquet"]:
        from agwm_jax.report.study import write_study_report

        print(f"{write_study_report(parsed.runs[0], parsed.output)}\nreport: {parsed.output / 'study.md'}")
        return OK
    from agwm_jax.report import write_report

    report = write_report(parsed.runs, parsed.output, baseline=parsed.baseline)
    print(f"{report.markdown}\nreport: {report.files[0]}")
    return OK


def _export(parsed: argparse.Namespace, _: list[str]) -> int:
    from agwm_jax.runs.finished import export

    deviation = export(parsed.run, parsed.folder, model=parsed.model)
    print(f"exported: {parsed.folder}")
    if deviation is not None:
        warnings.warn(f"transformers will not give the same logits: {deviation}", stacklevel=1)
    return OK


def _settings(parsed: argparse.Namespace, _: list[str]) -> int:
    from agwm_jax.settings import all_settings

    try:
        patterns = [re.compile(word, re.IGNORECASE) for word in parsed.words]
    except re.error as error:
        raise AgwmError(f"{' '.join(parsed.words)}: not a regular expression ({error})") from None
    found = [s for s in all_settings() if all(pattern.search(" ".join(s)) for pattern in patterns)]
    if not found:
        raise AgwmError(f"no setting is about {' '.join(parsed.words)}; `agwm settings` without a pattern lists all")
    heading = ""
    for setting in found:
        if heading != (heading := f"with {setting.needs}" if setting.needs else "always"):
            print(f"\n{heading}:")
        print(f"  --{setting.path} ({setting.default})")
        text = f"{setting.description}; {setting.allowed}"
        print(textwrap.fill(text, 120, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False))
    return OK


def _list(parsed: argparse.Namespace, _: list[str]) -> int:
    for kind in [parsed.kind] if parsed.kind else _REGISTRIES:
        module, name = _REGISTRIES[kind]
        registry = getattr(importlib.import_module(module), name)
        if not parsed.kind:
            print(textwrap.fill(f"{kind}: {', '.join(registry)}", 120, subsequent_indent="  "))
            continue
        for entry in registry.entries():
            facts = [f"{name}: {fact}" for name, fact in entry.facts.items() if isinstance(fact, str | int)]
            text = " ".join([entry.summary, *([f"({'; '.join(facts)})"] if facts else [])])
            print(textwrap.fill(text, 120, initial_indent=f"{entry.name:<24}", subsequent_indent=" " * 24))
    return OK


def _methods(_: argparse.Namespace, __: list[str]) -> int:
    from agwm_jax.methods.interface import METHODS
    from agwm_jax.methods.technique import Technique

    print("cost: forward-backwards of a training step; +: goes together with other methods (--techniques '[NAME]')\n")
    for entry in METHODS.entries():
        name = f"{entry.name}{' +' if issubclass(entry.value, Technique) else ''}"
        text = f"{entry.summary} (cost {entry.facts['cost']}; {entry.facts['paper']})"
        print(textwrap.fill(text, 120, initial_indent=f"{name:<24}", subsequent_indent=" " * 24))
    return OK


def _table(value: dict[str, Any]) -> Iterator[str]:
    """One line an entry of a nested dict, its keys joined by dots."""
    lines = list(_flatten(value))
    width = max((len(name) for name, _ in lines), default=0)
    for name, entry in lines:
        yield f"{name:<{width}}  {f'{entry:.4f}' if isinstance(entry, float) else entry}"


def _flatten(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, entry in value.items():
        if isinstance(entry, dict):
            yield from _flatten(entry, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", entry
