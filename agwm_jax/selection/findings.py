"""What is in a labelled data set that decides how far a score on it can be trusted, in sentences."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from agwm_jax.data.tasks import Task
from agwm_jax.data.wording import normal_form, quoted

_SHOWN = 12
_RARE = 10
"""Texts of a class, below which its score says little."""


def findings(task: Task, tokenizer: Any, *, max_length: int, folds: int) -> list[str]:
    """Sentences on size, classes, repeated and contradictory texts, lengths and unknown tokens of the training split.

    Args:
        task: before any draw.
        tokenizer: of the model.
        max_length: tokens that a text is cut to.
        folds: of the cross-validation.
    """
    split = task.splits["train"]
    labels = np.asarray(split["label"])
    columns = [split[name] for name in ("text", "text_pair") if name in split.column_names]
    texts = [tuple(row) for row in zip(*columns, strict=True)]
    found = _labels(task, labels, folds)
    found += _repeats(task, texts, labels)
    found += _tokens(texts, tokenizer, max_length)
    if "group" in split.column_names:
        found.append(f"{len(set(split['group']))} groups, each of which stays in one fold.")
    return found


def _labels(task: Task, labels: np.ndarray, folds: int) -> list[str]:
    if task.kind == "regression":
        low, mean, high = float(labels.min()), float(labels.mean()), float(labels.max())
        return [f"{len(labels)} texts with scores from {low:g} to {high:g}, mean {mean:.3g}."]
    counts = {name: int(np.sum(labels == index)) for index, name in enumerate(task.label_names)}
    ranked = sorted(counts, key=lambda name: -counts[name])
    listed = ", ".join(f"{name} {counts[name]}" for name in ranked[:_SHOWN])
    more = f" and {len(ranked) - _SHOWN} more" if len(ranked) > _SHOWN else ""
    share = counts[ranked[0]] / len(labels)
    found = [
        f"{len(labels)} texts of {len(counts)} classes: {listed}{more}.",
        f"Always guessing {quoted(ranked[0])} would be right for {share:.1%}.",
    ]
    rare = [name for name in ranked if counts[name] < _RARE]
    if rare:
        named = ", ".join(f"{name} ({counts[name]})" for name in rare[:_SHOWN])
        some = f"; with fewer than {folds} it is not in every fold" if counts[rare[-1]] < folds else ""
        found.append(f"Fewer than {_RARE} texts: {named}. What is learnt of such a class is luck{some}.")
    if counts[ranked[0]] > 3 * counts[ranked[-1]]:
        found.append(
            "The classes are uneven: read macro_f1, in which each counts alike, beside accuracy; `--loss.class_weights "
            "balanced` trains for it."
        )
    return found


def _repeats(task: Task, texts: Sequence[tuple[str, ...]], labels: np.ndarray) -> list[str]:
    plain = [tuple(" ".join(normal_form(part).lower().split()) for part in text) for text in texts]
    counts = Counter(plain)
    repeated = {text for text, count in counts.items() if count > 1}
    if not repeated:
        return []
    extra = sum(counts[text] - 1 for text in repeated)
    found = [f"{_texts(extra)} another one (case and spaces aside); copies of a text stay in one fold."]
    said: dict[tuple[str, ...], set[Any]] = {}
    for text, label in zip(plain, labels.tolist(), strict=True):
        said.setdefault(text, set()).add(label)
    torn = [text for text in repeated if len(said[text]) > 1]
    if torn:
        example = quoted(torn[0][0])
        names = sorted(said[torn[0]])
        what = [task.label_names[int(index)] for index in names] if task.label_names else names
        found.append(
            f"{len(torn)} texts have more than one label, such as {example} ({' and '.join(map(str, what))}): correct "
            "them, no method can be right on both."
        )
    return found


def _texts(count: int) -> str:
    return "1 text repeats" if count == 1 else f"{count} texts repeat"


def _tokens(texts: Sequence[tuple[str, ...]], tokenizer: Any, max_length: int) -> list[str]:
    ids = tokenizer(*(list(column) for column in zip(*texts, strict=True)), padding=False, verbose=False)["input_ids"]
    lengths = np.array([len(each) for each in ids])
    cut = int(np.sum(lengths > max_length))
    said = f"; {cut} ({cut / len(lengths):.0%}) are cut to {max_length}" if cut else ""
    found = [
        f"Texts have {lengths.min()} to {lengths.max()} tokens, half of them {np.median(lengths):.0f} or fewer{said}."
    ]
    unknown = tokenizer.unk_token_id
    if unknown is not None:
        share = sum(each.count(unknown) for each in ids) / lengths.sum()
        if share > 0.01:
            found.append(
                f"{share:.0%} of the tokens are unknown to the tokenizer: is the model for this language and script?"
            )
    return found
