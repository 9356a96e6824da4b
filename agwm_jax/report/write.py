"""The report as a whole: figures, tables, warnings and the files they go to."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from agwm_jax.errors import AgwmError
from agwm_jax.report.comparisons import Collection, Comparison, collect
from agwm_jax.report.gates import Gates, mean_gates, read_gates
from agwm_jax.report.leverage import leverage, row, verdict
from agwm_jax.report.page import html_of, page
from agwm_jax.report.runs import ReportWarning, Run, read_records
from agwm_jax.report.spread import spread_warning
from agwm_jax.report.table import groups_table, interval_sentence, markdown_table, results_csv, results_table


class Report(NamedTuple):
    """What a report says and where it lies: Markdown text, files written (report.html first), warnings."""

    markdown: str
    files: list[Path]
    warnings: list[ReportWarning]


class ComparisonData(NamedTuple):
    """A comparison with what its figures need: metrics per method and run, gate statistics per method."""

    comparison: Comparison
    records: dict[str, list[list[dict[str, Any]]]]
    gates: dict[str, Gates]

    def searches(self, method: str) -> bool:
        """Whether the runs of `method` minimised a second loss, that of a validation split."""
        return any("outer_loss" in record for run in self.records[method] for record in run)


def write_report(runs: Iterable[Path], output: Path, *, baseline: str = "vanilla") -> Report:
    """Compares all finished runs under `runs`; writes report.md, report.html, results.csv and figures into `output`.

    Args:
        runs: run folders, or folders that hold them at any depth.
        output: folder of the report; made if it is not there, files of an earlier report are replaced.
        baseline: the method that the others are compared with, paired by seed.

    Returns:
        the text, the files and all warnings (odd folders and the method's failure signatures).

    Raises:
        AgwmError: no (finished) run, a run folder that cannot be read, or an output that cannot be written.
    """
    collection = collect(runs, baseline=baseline)
    output = Path(output)
    data = [_load(comparison) for comparison in collection.comparisons]
    warnings = [*collection.warnings, *(warning for each in data for warning in _warnings(each))]
    try:
        output.mkdir(parents=True, exist_ok=True)
        # Imported here: Matplotlib takes a while, and a command line that only trains should not wait for it.
        from agwm_jax.report.figures import write_figures

        figures = write_figures(data, collection.methods, output, baseline=baseline)
        markdown = _markdown(baseline, collection, data, figures, warnings)
        files = [output / "report.html", output / "report.md", output / "results.csv"]
        files[0].write_text(_html(markdown, collection, [path for _, path, _ in figures]), encoding="utf-8")
        files[1].write_text(markdown, encoding="utf-8")
        files[2].write_text(results_csv(collection), encoding="utf-8")
    except OSError as error:
        raise AgwmError(
            f"The report cannot be written to {output} ({error.strerror}): choose another folder."
        ) from error
    return Report(markdown, [*files, *(path for _, path, _ in figures)], warnings)


def _load(comparison: Comparison) -> ComparisonData:
    records = {method: [read_records(run) for run in runs] for method, runs in comparison.methods.items()}
    gates = {}
    for method, runs in comparison.methods.items():
        found = [each for run in runs if (each := read_gates(run)) is not None]
        if found:
            try:
                gates[method] = mean_gates(found)
            except (KeyError, ValueError) as error:
                folders = ", ".join(str(run.folder) for run in runs)
                raise AgwmError(
                    f"The alphas of {method} have different layers or modules ({folders}): report them apart."
                ) from error
    return ComparisonData(comparison, records, gates)


def _warnings(data: ComparisonData) -> list[ReportWarning]:
    """The failure signatures of a comparison, those of several runs under one name merged."""
    comparison = data.comparison
    seen: dict[tuple[str, str], list[tuple[Run, str]]] = {}
    for method, runs in comparison.methods.items():
        for run in runs:
            for name, message in run.warnings:
                seen.setdefault((method, name), []).append((run, message))
    merged = []
    for (method, name), hits in seen.items():
        who = ", ".join(str(run.seed) for run, _ in hits)
        total = len(comparison.methods[method])
        text = f"{comparison.title}: {method}, {len(hits)} of {total} runs (seed {who}): {hits[0][1]}"
        merged.append(ReportWarning(name, text))
    scores = {method: [run.score for run in runs] for method, runs in comparison.methods.items()}
    for method in comparison.methods:
        rival = comparison.rival(method)
        # Only a method that searches promises a smaller spread; controls are there to show what chance does.
        if rival is not None and not comparison.is_baseline(method) and data.searches(method):
            warning = spread_warning(method, scores[method], rival, scores[rival])
            if warning is not None:
                merged.append(ReportWarning(warning.name, f"{comparison.title}: {warning.message}"))
    return merged


def _markdown(
    baseline: str,
    collection: Collection,
    data: Sequence[ComparisonData],
    figures: Sequence[tuple[str, Path, Comparison | None]],
    warnings: Sequence[ReportWarning],
) -> str:
    lines = ["# Results", "", interval_sentence(baseline), ""]
    lines += [_image(title, path) for title, path, owner in figures if owner is None]
    for each in data:
        comparison = each.comparison
        lines += [
            f"## {comparison.title}",
            "",
            f"Metric: {comparison.metric} on the {comparison.split} split.",
            "",
            results_table(comparison),
        ]
        for key, values in comparison.differing.items():
            shown = ", ".join(f"{method} {value}" for method, value in values.items())
            lines += [f"The methods do not share `{key}`: {shown}.", ""]
        if table := groups_table(comparison):
            lines += ["### Scores by group", "", "Mean ± standard deviation over seeds.", "", table]
        lines += _leverage(each)
        lines += [_image(title, path) for title, path, owner in figures if owner is comparison]
    if warnings:
        lines += ["## Warnings", "", *(f"- **{warning.name}**: {warning.message}" for warning in warnings), ""]
    if collection.unfinished:
        lines += ["## Unfinished runs", "", "They count in no number above. Run the same command again to go on.", ""]
        lines += [f"- {run.folder} ({run.task}, {run.method}, seed {run.seed})" for run in collection.unfinished] + [""]
    return "\n".join(lines)


def _html(markdown: str, collection: Collection, figures: Sequence[Path]) -> str:
    """The same on one page with its figures inside, and all runs in a table that sorts."""
    runs = [
        (comparison, method, run)
        for comparison in collection.comparisons
        for method, runs in comparison.methods.items()
        for run in runs
    ]
    rows = [
        {
            "task": run.task,
            "method": method,
            "seed": run.seed,
            "metric": comparison.metric,
            "score": f"{100 * run.score:.2f}",
            "seconds": f"{run.result.get('seconds', {}).get('total', 0.0):.0f}",
            "warnings": len(run.warnings),
            "folder": str(run.folder),
        }
        for comparison, method, run in runs
    ]
    return page(
        "agwm_jax.report",
        "runs.html.j2",
        text=html_of(markdown, {path.name: path for path in figures}),
        rows=rows,
        places=list(dict.fromkeys(_where(run) for _, _, run in runs)),
    )


def _where(run: Run) -> str:
    """Device and versions of a run."""
    versions = ", ".join(f"{name} {version}" for name, version in run.result.get("versions", {}).items())
    return f"{run.result.get('device', 'unknown device')}: {versions or 'unknown versions'}"


def _leverage(data: ComparisonData) -> list[str]:
    """What the gates of a comparison did, in a table and in words; nothing where no method has one."""
    found = {
        method: leverage(gates, _start(data.comparison.methods[method][0]), data.records[method])
        for method, gates in data.gates.items()
    }
    if not found:
        return []
    rows = [
        {**row(method, each), "score": f"{_mean_score(data.comparison.methods[method]):.4f}"}
        for method, each in found.items()
    ]
    lines = ["### Did the gate matter?", "", markdown_table(rows)]
    lines += [f"- `{method}`: {verdict(each)}" for method, each in found.items()]
    return [
        *lines,
        "",
        "Losses are of the examples that alpha was fitted on, at the weights that the search left, and so flatter the "
        "learnt gate.",
        "",
    ]


def _mean_score(runs: Sequence[Run]) -> float:
    """Of the runs of one method."""
    return sum(run.score for run in runs) / len(runs)


def _start(run: Run) -> float:
    """Where A started."""
    return float(run.config.get("method.mixup.start", 1.0))


def _image(title: str, path: Path) -> str:
    return f"![{title}]({path.name})\n"
