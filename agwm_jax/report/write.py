"""The report as a whole: figures, tables, warnings and the files they go to."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from agwm_jax.errors import AgwmError
from agwm_jax.methods.search_warnings import MethodWarning, search_warnings, spread_warnings
from agwm_jax.report.gates import Gates, mean_gates, read_gates
from agwm_jax.report.groups import BASELINE, CONTROL, Collection, Group, collect
from agwm_jax.report.runs import Run, read_records
from agwm_jax.report.style import private_matplotlib
from agwm_jax.report.table import groups_table, interval_sentence, results_csv, results_table


class Report(NamedTuple):
    """What a report says and where it lies: Markdown text, files written (report.md first), warnings."""

    markdown: str
    files: list[Path]
    warnings: list[MethodWarning]


class GroupData(NamedTuple):
    """A group with what its figures need: metrics per method and run, alpha statistics per method."""

    group: Group
    records: dict[str, list[list[dict[str, Any]]]]
    gates: dict[str, Gates]


def write_report(runs: Iterable[Path], output: Path) -> Report:
    """Compares all finished runs under `runs` and writes report.md, results.csv and figures into `output`.

    Args:
        runs: run folders, or folders that hold them at any depth.
        output: folder of the report; made if it is not there, files of an earlier report are replaced.

    Returns:
        the text, the files and all warnings (odd folders and the method's failure signatures).

    Raises:
        AgwmError: no (finished) run, a run folder that cannot be read, or an output that cannot be written.
    """
    collection = collect(runs)
    output = Path(output)
    data = [_load(group) for group in collection.groups]
    warnings = [*collection.warnings, *(warning for each in data for warning in _group_warnings(each))]
    try:
        output.mkdir(parents=True, exist_ok=True)
        with private_matplotlib():
            # Imported here: Matplotlib takes a while, and a command line that only trains should not wait for it.
            from agwm_jax.report.figures import write_figures

            figures = write_figures(data, collection.methods, output)
        markdown = _markdown(collection, data, figures, warnings)
        files = [output / "report.md", output / "results.csv"]
        files[0].write_text(markdown, encoding="utf-8")
        files[1].write_text(results_csv(collection), encoding="utf-8")
    except OSError as error:
        raise AgwmError(
            f"The report cannot be written to {output} ({error.strerror}): choose another folder."
        ) from error
    return Report(markdown, [*files, *(path for _, path, _ in figures)], warnings)


def _load(group: Group) -> GroupData:
    records = {method: [read_records(run) for run in runs] for method, runs in group.methods.items()}
    gates = {}
    for method, runs in group.methods.items():
        found = [each for run in runs if (each := read_gates(run)) is not None]
        if found:
            try:
                gates[method] = mean_gates(found)
            except (KeyError, ValueError) as error:
                folders = ", ".join(str(run.folder) for run in runs)
                raise AgwmError(
                    f"The alphas of {method} have different layers or modules ({folders}): report them apart."
                ) from error
    return GroupData(group, records, gates)


def _group_warnings(data: GroupData) -> list[MethodWarning]:
    """The failure signatures of a group, those of several runs under one name merged."""
    seen: dict[tuple[str, str], list[tuple[Run, str]]] = {}
    for method, runs in data.group.methods.items():
        for run, records in zip(runs, data.records[method], strict=True):
            for name, message in _run_warnings(run, records):
                seen.setdefault((method, name), []).append((run, message))
    merged = []
    for (method, name), hits in seen.items():
        who = ", ".join(str(run.seed) for run, _ in hits)
        total = len(data.group.methods[method])
        text = f"{data.group.title}: {method}, {len(hits)} of {total} runs (seed {who}): {hits[0][1]}"
        merged.append(MethodWarning(name, text))
    scores = {method: [run.score for run in runs] for method, runs in data.group.methods.items()}
    for method in data.group.methods:
        baseline = data.group.baseline(method)
        # The control is there to show what chance does; only a method that searches promises a smaller spread.
        if baseline not in (None, method) and data.group.methods[method][0].method not in (BASELINE, CONTROL):
            pair = {baseline: scores[baseline], method: scores[method]}
            merged += [
                MethodWarning(warning.name, f"{data.group.title}: {warning.message}")
                for warning in spread_warnings(pair, baseline=baseline)
            ]
    return merged


def _run_warnings(run: Run, records: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    found = {warning.name: warning.message for warning in search_warnings(records)}
    for warning in (run.result or {}).get("warnings") or []:
        if isinstance(warning, dict) and "name" in warning:
            found.setdefault(str(warning["name"]), str(warning.get("message", "")))
    return list(found.items())


def _markdown(
    collection: Collection,
    data: Sequence[GroupData],
    figures: Sequence[tuple[str, Path, Group | None]],
    warnings: Sequence[MethodWarning],
) -> str:
    lines = ["# Results", "", interval_sentence(), ""]
    lines += [_image(title, path) for title, path, group in figures if group is None]
    for each in data:
        group = each.group
        lines += [
            f"## {group.title}",
            "",
            f"Metric: {group.metric} on the {group.split} split.",
            "",
            results_table(group),
        ]
        for key, values in group.differing.items():
            shown = ", ".join(f"{method} {value}" for method, value in values.items())
            lines += [f"The methods do not share `{key}`: {shown}.", ""]
        if table := groups_table(group):
            lines += ["### Scores by group", "", "Mean ± standard deviation over seeds.", "", table]
        lines += [_image(title, path) for title, path, owner in figures if owner is group]
    if warnings:
        lines += ["## Warnings", "", *(f"- **{warning.name}**: {warning.message}" for warning in warnings), ""]
    if collection.unfinished:
        lines += ["## Unfinished runs", "", "They count in no number above. Run the same command again to go on.", ""]
        lines += [f"- {run.folder} ({run.task}, {run.method}, seed {run.seed})" for run in collection.unfinished] + [""]
    return "\n".join(lines)


def _image(title: str, path: Path) -> str:
    return f"![{title}]({path.name})\n"
