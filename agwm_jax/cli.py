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
from typing import Any

from agwm_jax.arguments import REGISTRIES, TRAIN_HELP, parsers
from agwm_jax.errors import AgwmError
from agwm_jax.explain import UNEXPECTED, explain
from agwm_jax.orphans import end_with_parent

OK, INTERRUPTED = 0, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command (default: what was typed) and return its exit code: 0 done, 1 a bug, 2 a mistake, 130 Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    end_with_parent()
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
    parser, commands = parsers()
    parsed, rest = parser.parse_known_args(arguments)
    if parsed.command is None:
        parser.print_help()
        return OK
    if rest and parsed.command not in ("train", "sweep", "compare"):
        commands[parsed.command].error(f"unrecognized arguments: {' '.join(rest)}")
    return globals()[f"_{parsed.command}"](parsed, rest)


# Each command imports what it needs, so that `agwm --help` and a typing error answer at once.


def _train(parsed: argparse.Namespace, overrides: list[str]) -> int:
    from agwm_jax.settings import Config, load_config, use_deterministic_kernels

    if parsed.help:
        sections = (f"  {name:<23}  {field.description}" for name, field in Config.model_fields.items())
        print(TRAIN_HELP.format(sections="\n".join(sections)), end="")
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

    separator = parsed.separator
    count = predict_file(parsed.run, parsed.input, parsed.output, model=parsed.model, separator=separator)
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
    for kind in [parsed.kind] if parsed.kind else REGISTRIES:
        module, name = REGISTRIES[kind]
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
