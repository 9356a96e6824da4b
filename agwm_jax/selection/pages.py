"""What a comparison is told in: a table for the terminal, report.md and report.html, a model card, compare.json."""

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import softmax

from agwm_jax import __version__
from agwm_jax.methods.interface import METHODS
from agwm_jax.report.page import page
from agwm_jax.runs import folder as run_folder
from agwm_jax.selection.verdict import Scored, confusion, per_class

if TYPE_CHECKING:
    from agwm_jax.selection.compare import Comparison

_HARDEST = 20


def table(scored: Sequence[Scored], names: Sequence[str]) -> str:
    """All methods, best first: main metric with interval, other metrics, seconds, trials; Markdown."""
    heads = ["method", f"{names[0]} (95 %)", *names[1:], "s a training", "rates tried"]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for each in sorted(scored, key=lambda each: -each.scores[names[0]]):
        low, high = each.interval
        main = f"{100 * each.scores[names[0]]:.1f} ({100 * low:.1f} to {100 * high:.1f})"
        others = [f"{100 * each.scores[name]:.1f}" for name in names[1:]]
        lines.append([each.method, main, *others, f"{each.seconds:.0f}", str(each.trials)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def recommended(best: Scored) -> dict[str, Any]:
    """What was recommended, as JSON has it: tells whether a later call recommends the same."""
    return {"method": best.method, "rate_factor": best.factor, "scores": best.scores}


def answer(comparison: "Comparison") -> dict[str, Any]:
    """What was found, as JSON has it."""
    calibration = comparison.calibration
    methods = {
        each.method: {
            "scores": each.scores,
            "interval": each.interval,
            "by_fold": each.by_fold,
            "rate_factor": each.factor,
            "seconds": each.seconds,
            "trials": each.trials,
        }
        for each in comparison.scored
    }
    return {
        "recommended": recommended(comparison.recommended),
        "sentences": comparison.sentences,
        "notes": comparison.notes,
        "findings": comparison.findings,
        "columns": comparison.columns._asdict(),
        "methods": methods,
        "calibration": calibration and calibration._asdict(),
        "test_scores": comparison.test_scores,
        "warnings": comparison.warnings,
        "encoder": comparison.encoder,
        "version": __version__,
    }


def write(comparison: "Comparison", output: Path) -> None:
    """report.md and report.html."""
    run_folder.write_text(output / "report.md", _markdown(comparison))
    run_folder.write_text(output / "report.html", _html(comparison))


def summary(comparison: "Comparison") -> str:
    """The recommendation, the table, and what can be said of the others; Markdown."""
    first, *others = [*comparison.sentences, *comparison.notes]
    lines = [f"**{first}**", "", table(comparison.scored, comparison.task.metrics), *(f"- {each}" for each in others)]
    return "\n".join(lines) + "\n"


def card(comparison: "Comparison") -> str:
    """README.md of the model's folder: what it is for, what it was made of, how good it is, where not to trust it."""
    task, best, names = comparison.task, comparison.recommended, comparison.task.metrics
    what = f"the classes {', '.join(task.label_names)}" if task.label_names else f"the score {comparison.columns.label}"
    head = [
        "---",
        "library_name: agwm_jax",
        "pipeline_tag: text-classification",
        f"base_model: {comparison.encoder}",
        "---",
    ]
    test = [f"Test file: {_scores(comparison.test_scores)}.", ""] if comparison.test_scores else []
    return "\n".join(
        [
            *head,
            f"# {task.name}",
            "",
            f"Gives a text {what}. Made from `{comparison.encoder}` by `{best.method}` with "
            f"{len(task.splits['train'])} labelled texts, on {datetime.date.today().isoformat()}.",
            "",
            "    agwm predict THIS_FOLDER texts.csv labelled.csv",
            "",
            "## How good it is",
            "",
            f"Cross-validated on {len(best.logits)} held-out texts: {_scores(best.scores)}; {names[0]} "
            f"{100 * best.interval[0]:.1f} to {100 * best.interval[1]:.1f} (95 %, by resampling texts). The model here "
            "was trained on all texts, after that.",
            "",
            *test,
            *_calibration_lines(comparison),
            "## Limits",
            "",
            "The scores hold for texts like those of the file. The interval says how far the score may move with other "
            "texts of the same kind, not with another source, language or time. Labels were taken as they are.",
            "",
            *(f"- {sentence}" for sentence in (*comparison.findings, *comparison.warnings)),
            "",
            "## All that was tried",
            "",
            table(comparison.scored, names),
            *(f"- {sentence}" for sentence in (*comparison.sentences, *comparison.notes)),
            "",
            f"Settings: `training.yaml`. agwm_jax {__version__}.",
            "",
        ]
    )


def _scores(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {100 * value:.1f}" for name, value in scores.items())


def _calibration_lines(comparison: "Comparison") -> list[str]:
    found = comparison.calibration
    if found is None:
        return []
    lines = [
        f"Confidence: off by {100 * found.error_before:.1f} points on average as trained, by "
        f"{100 * found.error_after:.1f} with the temperature {found.temperature:.2f}, which `agwm predict` uses (both "
        "on held-out texts, to which the temperature was fitted).",
        "",
    ]
    for wanted, least, share in found.thresholds:
        lines.append(
            f"- {wanted:.0%} of the answers with a confidence of {least:.2f} or more were right: {share:.0%} of texts."
        )
    return [*lines, ""]


def _markdown(comparison: "Comparison") -> str:
    sections = [
        f"# {comparison.task.name}: which method",
        "",
        *comparison.sentences[:1],
        "",
        table(comparison.scored, comparison.task.metrics),
        *(f"- {sentence}" for sentence in (*comparison.sentences[1:], *comparison.notes)),
        "",
        "Each score is over all held-out texts together; the rate of a fold was chosen by the other folds. Intervals "
        "are by resampling texts: they say nothing of the luck of a training. The best of several methods is chosen by "
        "these same scores, so its own is a little too good.",
        "",
        *([f"Final model on the test file: {_scores(comparison.test_scores)}.", ""] if comparison.test_scores else []),
        "## The data",
        "",
        *(f"- {sentence}" for sentence in comparison.findings),
        "",
        "## Confidence",
        "",
        *(_calibration_lines(comparison) or ["A regression has none.", ""]),
    ]
    return "\n".join(sections)


def _html(comparison: "Comparison") -> str:
    """One page that needs no network; texts and labels of the user are escaped."""
    best, task = comparison.recommended, comparison.task
    labels = np.asarray(task.splits["train"]["label"])[comparison.rows]
    classes = None
    if task.label_names:
        counts = confusion(best.logits, labels)
        classes = {"confusion": counts.tolist(), "names": task.label_names, "most": max(1, int(counts.max()))}
        classes["scores"] = list(zip(task.label_names, per_class(counts), strict=True))
    return page(
        "agwm_jax.selection",
        "comparison.html.j2",
        comparison=comparison,
        best=best,
        task=task,
        metrics=task.metrics,
        rows=sorted(comparison.scored, key=lambda each: -each.scores[task.metrics[0]]),
        rated={each.method for each in comparison.scored if METHODS[each.method].value.has_rate},
        span=_span(comparison.scored),
        classes=classes,
        hardest=_hardest(comparison, labels),
        groups=_groups(comparison, labels),
        scores=_scores,
        version=__version__,
        today=datetime.date.today().isoformat(),
        settings=json.dumps(comparison.settings.model_dump(mode="json"), indent=2),
    )


def _span(scored: Sequence[Scored]) -> tuple[float, float]:
    """Of the axis that all intervals are drawn on, in points."""
    low, high = (np.array([each.interval[side] for each in scored]) * 100 for side in (0, 1))
    pad = max(1.0, 0.05 * float(high.max() - low.min()))
    return float(low.min()) - pad, float(high.max()) + pad


def _hardest(comparison: "Comparison", labels: np.ndarray) -> list[dict[str, Any]]:
    """Held-out texts that the model was most wrong about, with the row of the file (counted from 1)."""
    task, logits = comparison.task, comparison.recommended.logits
    split = task.splits["train"]
    if comparison.calibration is not None:
        sure = softmax(logits.astype(np.float64) / comparison.calibration.temperature, axis=1)
        given = sure[np.arange(len(labels)), labels]
        wrong = np.flatnonzero(logits.argmax(1) != labels)
        order = wrong[np.argsort(given[wrong], kind="stable")]
        said = [f"{task.label_names[i]} ({sure[at, i]:.0%})" for at, i in enumerate(logits.argmax(1))]
        truth = [task.label_names[i] for i in labels]
    else:
        order = np.argsort(-np.abs(logits[:, 0] - labels), kind="stable")
        said, truth = [f"{x:.3g}" for x in logits[:, 0]], [f"{x:.3g}" for x in labels]
    chosen = order[:_HARDEST]
    texts = split.select(comparison.rows[chosen])
    columns = [texts[name] for name in ("text", "text_pair") if name in split.column_names]
    shown = [" | ".join(parts) for parts in zip(*columns, strict=True)]
    return [
        {"row": int(comparison.rows[at]) + 1, "text": text[:400], "label": truth[at], "said": said[at]}
        for at, text in zip(chosen, shown, strict=True)
    ]


def _groups(comparison: "Comparison", labels: np.ndarray) -> list[tuple[str, int, float]]:
    """Number of held-out texts and share of right answers of every group, worst first; empty without groups."""
    split = comparison.task.splits["train"]
    if "group" not in split.column_names or comparison.calibration is None:
        return []
    names, right = np.asarray(split["group"])[comparison.rows], comparison.recommended.logits.argmax(1) == labels
    found = [
        (str(name), int((names == name).sum()), float(right[names == name].mean())) for name in set(names.tolist())
    ]
    return sorted(found, key=lambda row: row[2])
