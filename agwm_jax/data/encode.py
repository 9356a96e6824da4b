"""From texts to padded arrays of token ids: every split at one length, which no draw changes."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np
from jaxtyping import Int

from agwm_jax.data.draws import Rows, drawn
from agwm_jax.data.hub import quietly
from agwm_jax.data.tasks import LabelScale, Task, label_scale
from agwm_jax.errors import AgwmError

MULTIPLE = 8  # lengths are rounded up to it: few distinct shapes to compile, and aligned ones

Encoded = dict[str, np.ndarray]
"""Columns of a tokenised split: ``input_ids``, ``attention_mask`` and what else the tokenizer gives or the model asks
for, int32 [n, t]; ``labels`` [n], int32 class numbers or float32 scores, standardised where there is a scale, 0 where
the split has none."""


class EncodingReport(NamedTuple):
    """What padding and truncation did to a split.

    Attributes:
      length: t, tokens per example after padding.
      longest: tokens of the longest example before truncation.
      truncated: how many examples had more than `length` tokens and were cut.
      examples: n.
    """

    length: int
    longest: int
    truncated: int
    examples: int

    def warning(self, what: str) -> str | None:
        """A sentence about the share of texts that were cut, None where none was; `what` names the split or file."""
        if not self.truncated:
            return None
        return (
            f"{self.truncated} of {self.examples} texts of {what} ({self.truncated / self.examples:.0%}) were cut to "
            f"{self.length} tokens, the longest has {self.longest}: raise data.max_length or data.pad_to."
        )


class Draw(NamedTuple):
    """What one seed trains and is scored on.

    Attributes:
      task: with the seed's training draw.
      encoded: columns by split; what draws share is one object in all of them.
      reports: by split.
      scale: of the labels in `encoded`, None for a classification; `task` has them in the user's unit.
    """

    task: Task
    encoded: dict[str, Encoded]
    reports: dict[str, EncodingReport]
    scale: LabelScale | None


class _Tokens(NamedTuple):
    """A split, tokenised and not yet cut or padded."""

    split: datasets.Dataset
    ids: datasets.Dataset
    lengths: Int[np.ndarray, "n"]
    tokenizer: Any
    inputs: tuple[str, ...]


def _tokenise(split: datasets.Dataset, tokenizer: Any, inputs: Sequence[str], cut: int | None = None) -> _Tokens:
    names = [name for name in ("text", "text_pair") if name in split.column_names]
    options: dict[str, Any] = {} if cut is None else {"truncation": True, "max_length": cut}
    if "token_type_ids" in inputs:
        options["return_token_type_ids"] = True

    def tokens(*texts: list[str]) -> dict[str, list[list[int]]]:
        found = tokenizer(*texts, padding=False, verbose=False, return_attention_mask=False, **options)
        return {name: found[name] for name in found if name != "attention_mask"}

    with quietly():
        # The fingerprint names a cache file, of which there is none here; making one would pickle the tokenizer.
        ids = split.map(
            tokens,
            batched=True,
            input_columns=names,
            remove_columns=split.column_names,
            keep_in_memory=True,
            new_fingerprint="tokens",
        ).with_format("numpy")
    lengths = np.fromiter(map(len, ids["input_ids"]), np.int64, len(ids))
    return _Tokens(split, ids, lengths, tokenizer, tuple(inputs))


def _checked(split: datasets.Dataset, tokenizer: Any, inputs: Sequence[str], max_length: int) -> _Tokens:
    if not len(split):
        raise AgwmError("There are no examples to tokenise.")
    if tokenizer.pad_token_id is None:
        raise AgwmError("The tokenizer has no padding token: set pad_token in tokenizer_config.json.")
    special = tokenizer.num_special_tokens_to_add(pair="text_pair" in split.column_names)
    if max_length <= special:
        raise AgwmError(f"max_length is {max_length}, of which special tokens take {special}: give more.")
    return _tokenise(split, tokenizer, inputs)


def _length(lengths: np.ndarray, *, max_length: int, pad_to: str | float = "longest") -> int:
    if pad_to == "longest":
        wanted = int(lengths.max())
    elif isinstance(pad_to, int | float) and not isinstance(pad_to, bool) and 0 < pad_to <= 1:
        wanted = int(np.quantile(lengths, pad_to, method="inverted_cdf"))
    else:
        raise AgwmError(f"pad_to is {pad_to!r}: give 'longest' or a share of the examples in (0, 1], such as 0.95.")
    return min(math.ceil(wanted / MULTIPLE) * MULTIPLE, max_length)


def _pad(tokens: _Tokens, length: int, rows: np.ndarray | None = None) -> tuple[Encoded, EncodingReport]:
    """Rows of a split (None: all) as arrays [n, length] without labels."""
    rows = np.arange(len(tokens.lengths)) if rows is None else rows
    lengths = tokens.lengths[rows]
    mask = np.arange(length) < lengths[:, None]
    arrays = {"attention_mask": mask.astype(np.int32)}
    long = np.flatnonzero(lengths > length)
    # The tokenizer cuts them: the longer text of a pair first, special tokens never.
    cut = _tokenise(tokens.split.select(rows[long]), tokens.tokenizer, tokens.inputs, length).ids if long.size else {}
    for name in dict.fromkeys([*tokens.ids.column_names, *tokens.inputs]):
        padding = tokens.tokenizer.pad_token_id if name == "input_ids" else 0
        arrays[name] = np.full(mask.shape, padding, np.int32)
        if name in tokens.ids.column_names:
            ids = list(tokens.ids.select(rows)[name])
            for place, short in zip(long, cut[name] if long.size else (), strict=True):
                ids[place] = short
            arrays[name][mask] = np.concatenate(ids)
    return arrays, EncodingReport(length, int(lengths.max()), long.size, len(rows))


def _labels(split: datasets.Dataset, kind: str, scale: LabelScale | None) -> np.ndarray:
    dtype = np.float32 if kind == "regression" else np.int32
    if "label" not in split.column_names:
        return np.zeros(len(split), dtype)
    labels = np.asarray(split["label"])
    return labels.astype(dtype) if scale is None else scale.standardise(labels)


def encode(
    split: datasets.Dataset,
    tokenizer: Any,
    *,
    max_length: int = 128,
    pad_to: str | float = "longest",
    kind: str = "classification",
    scale: LabelScale | None = None,
    inputs: Sequence[str] = (),
) -> tuple[Encoded, EncodingReport]:
    """Tokenise a split and pad (or cut) all examples to one length.

    The length is that of the longest example, or a quantile of the lengths, rounded up to a multiple of 8, at most
    max_length. Of a pair that is too long, the longer text is cut first; special tokens are kept.

    Args:
      split: columns text, optionally text_pair and label.
      tokenizer: a Hugging Face tokenizer.
      max_length: tokens, special tokens included.
      kind: labels are int32 for classification, float32 for regression.
      scale: standardises the labels of a regression.
      inputs: columns that the model asks for; what the tokenizer does not give is 0.

    Returns:
      The arrays, and how many examples were cut.

    Raises:
      AgwmError: no examples, no padding token, max_length too small for the special tokens, or pad_to out of range.
    """
    tokens = _checked(split, tokenizer, inputs, max_length)
    columns, report = _pad(tokens, _length(tokens.lengths, max_length=max_length, pad_to=pad_to))
    return {**columns, "labels": _labels(split, kind, scale)}, report


def encode_draws(
    whole: Task,
    tokenizer: Any,
    *,
    seeds: Sequence[int],
    rows: Callable[[Task, int], Rows] | None = None,
    max_length: int = 128,
    pad_to: str | float = "longest",
    inputs: Sequence[str] = (),
) -> list[Draw]:
    """The draws of a task by several seeds, tokenised at lengths that do not depend on which seeds there are.

    Training texts are padded to the length that `pad_to` gives for *all* training texts, before any draw. All other
    splits share the length of the longest of their texts, and of the texts that a scored split is drawn from: one
    compiled evaluation serves them all, and only max_length ever cuts an example that is scored.

    Args:
      whole: the task before any draw; each split is tokenised once.
      seeds: one draw each.
      rows: of the training split by seed, such as `low_resource_rows` and `fold_rows`; None trains on everything.
      max_length, pad_to, inputs: see `encode`.

    Raises:
      AgwmError: see `encode` and `rows`.
    """
    tokens = {name: _checked(split, tokenizer, inputs, max_length) for name, split in whole.splits.items()}
    parts = [{} if rows is None else rows(whole, seed) for seed in seeds]
    pool = tokens.pop("train")
    length = _length(pool.lengths, max_length=max_length, pad_to=pad_to)
    scored = [each.lengths for each in tokens.values()] + ([pool.lengths] if any(parts) else [])
    scored_length = _length(np.concatenate(scored), max_length=max_length) if scored else length
    shared = {name: _pad(each, scored_length) for name, each in tokens.items()}
    if not all(parts):
        shared["train"] = _pad(pool, length)

    draws = []
    for seed, part in zip(seeds, parts, strict=True):
        task = drawn(whole, part, seed=seed)
        own = {name: _pad(pool, length if name == "train" else scored_length, each) for name, each in part.items()}
        scale = label_scale(task)
        encoded, reports = {}, {}
        for name, (columns, report) in (shared | own).items():
            encoded[name] = {**columns, "labels": _labels(task.splits[name], task.kind, scale)}
            reports[name] = report
        draws.append(Draw(task, encoded, reports, scale))
    return draws
