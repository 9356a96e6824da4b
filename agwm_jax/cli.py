"""The command line: what is typed becomes one call of the library, what goes wrong one sentence and an exit code."""

import argparse
import errno
import os
import statistics
import sys
import textwrap
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from agwm_jax.errors import AgwmError

_TRAIN_USAGE = "agwm train [--config FILE] [--nested.setting VALUE ...] [--coordinator ADDRESS] [--debug]"

OK, UNEXPECTED, MISTAKE, INTERRUPTED = 0, 1, 2, 130

_DISK_FAULTS = {
    errno.ENOSPC: "the disk is full; free some space and run the same command again, it continues where it was saved",
    errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
    errno.EROFS: "the disk is read-only; choose another folder with --output",
    errno.EACCES: "no permission; choose another folder or change its permissions",
    errno.EPERM: "not permitted; choose another folder or change its permissions",
    errno.ENOENT: "no such file or folder",
    errno.EEXIST: "exists already",
    errno.ENOTDIR: "a part of this path is a file, not a folder",
    errno.EISDIR: "a folder, where a file is needed",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command (default: what was typed) and return its exit code: 0 done, 1 a bug, 2 a mistake, 130 Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
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
        text, code = _explain(error)
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
    if rest and parsed.command != "train":
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
        "train",
        help="train as a config says, or continue the same run",
        usage=_TRAIN_USAGE,
        add_help=False,
        **options,
    )
    train.add_argument("--config", type=Path)
    train.add_argument("--coordinator")
    train.add_argument("--num-processes", type=int)
    train.add_argument("--process-id", type=int)
    train.add_argument("-h", "--help", action="store_true")

    evaluate = group.add_parser("eval", help="score a finished run", **options)
    evaluate.add_argument("run", metavar="RUN", type=Path, help="run folder")
    evaluate.add_argument("--split", help="split of the run's task (default: the one its result reports)")
    evaluate.add_argument("--file", type=Path, help="labelled file with the columns of the task, instead of a split")

    predict = group.add_parser("predict", help="label the texts of a file", **options)
    predict.add_argument("run", metavar="RUN", type=Path, help="run folder")
    predict.add_argument("input", metavar="INPUT", type=Path, help="file with the text columns of the run's task")
    predict.add_argument("output", metavar="OUTPUT", type=Path, help="file for the labels and probabilities")

    report = group.add_parser("report", help="tables and plots of finished runs", **options)
    report.add_argument("runs", metavar="RUNS", type=Path, nargs="+", help="run folders, or folders of them")
    report.add_argument("--output", type=Path, default=Path("report"), help="folder of the report (default: report)")

    export = group.add_parser("export", help="write a Hugging Face folder with alpha merged in", **options)
    export.add_argument("run", metavar="RUN", type=Path, help="run folder")
    export.add_argument("folder", metavar="FOLDER", type=Path, help="folder to write")
    return parser, group.choices


# Each command imports what it needs, so that `agwm --help` and a typing error answer at once.


def _train(parsed: argparse.Namespace, overrides: list[str]) -> int:
    if parsed.help:
        print("\n".join(_train_help()))
        return OK
    from agwm_jax.settings.config import load_config

    config = load_config(parsed.config, overrides)
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
        spread = f" ± {statistics.stdev(scores):.4f}" if len(scores) > 1 else ""
        each = ", ".join(f"{result['seed']}: {result['score']:.4f}" for result in results)
        print(f"{what} = {statistics.mean(scores):.4f}{spread} (by seed {each})")
    print(f"run folder: {config.run.output}")
    return OK


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
    from agwm_jax.runs.evaluate import evaluate_run

    print("\n".join(_table(evaluate_run(parsed.run, parsed.split, parsed.file))))
    return OK


def _predict(parsed: argparse.Namespace, _: list[str]) -> int:
    from agwm_jax.runs.evaluate import predict_run

    count = predict_run(parsed.run, parsed.input, parsed.output)
    print(f"{count} predictions: {parsed.output}")
    return OK


def _report(parsed: argparse.Namespace, _: list[str]) -> int:
    from agwm_jax.report import write_report

    report = write_report(parsed.runs, parsed.output)
    print(f"{report.markdown}\nreport: {report.files[0]}")
    return OK


def _export(parsed: argparse.Namespace, _: list[str]) -> int:
    from agwm_jax.runs.evaluate import export_run

    deviation = export_run(parsed.run, parsed.folder)
    print(f"exported: {parsed.folder}")
    if deviation is not None:
        warnings.warn(f"transformers will not give the same logits: {deviation}", stacklevel=1)
    return OK


def _train_help() -> Iterator[str]:
    from agwm_jax.settings.words import all_settings

    yield f"usage: {_TRAIN_USAGE}"
    yield ""
    yield "Train as the settings say: the config file's, changed by those given here; without either, the defaults."
    yield "A run that was interrupted continues when the same command is given again."
    yield "Short: --seed (run.seed), --seeds (run.seeds), --output (run.output), --model (model.path),"
    yield "--method (method.name)."
    yield ""
    yield "Several processes, as on several hosts, are one run when each gets the same command and --coordinator:"
    yield "  --coordinator auto: as SLURM (srun agwm train ... --coordinator auto), Open MPI or a TPU pod says"
    yield "  --coordinator HOST:PORT --num-processes N --process-id I: process 0 runs on HOST"
    yield "mesh.data all then takes the devices of all of them; the run folder must be one that all can reach."
    section, shown = "", set()
    for setting in all_settings():
        heading = setting.path.split(".")[0] + (f", with {setting.needs}" if setting.needs else "")
        if setting.needs.split("=")[0] == setting.path:
            continue  # the choice itself: the heading says it
        if heading != section:
            section = heading
            yield from ("", f"{heading}:")
        yield f"  --{setting.path} ({setting.default})"
        if setting.path not in shown or setting.needs:
            text = f"{setting.description}; {setting.allowed}"
            yield from textwrap.wrap(text, 120, initial_indent=" " * 6, subsequent_indent=" " * 6)
        shown.add(setting.path)


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


def _explain(error: Exception) -> tuple[str, int]:
    """The sentence and the exit code for an error that reached the command line."""
    for cause in _causes(error):
        if isinstance(cause, AgwmError):
            return str(cause), MISTAKE
    for cause in _causes(error):
        if isinstance(cause, OSError):
            place = f"{cause.filename}: " if cause.filename else ""
            reason = _DISK_FAULTS.get(cause.errno or 0) or cause.strerror or " ".join(str(cause).split())
            return f"{place}{reason}", MISTAKE
        # The checkpoint library reports a full disk from C++, as a text in another kind of exception.
        if "No space left on device" in str(cause):
            return _DISK_FAULTS[errno.ENOSPC], MISTAKE
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return "out of memory; say --run.vectorize none, or lower --data.batch_size or --data.max_length", MISTAKE
    missing = getattr(error, "name", None)
    if isinstance(error, ModuleNotFoundError) and missing and not missing.startswith("agwm_jax"):
        return f"the package {missing} is not installed; pip install 'agwm-jax[train]'", MISTAKE
    first_line = next(iter(str(error).strip().splitlines()), "no message")
    return f"unexpected {type(error).__name__}: {first_line}; run again with --debug to see where", UNEXPECTED


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__
