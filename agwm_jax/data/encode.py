"""From texts to padded arrays of token ids, all examples of a split at one length."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np
from jaxtyping import Float32, Int32

from agwm_jax.data.tasks import Task
from agwm_jax.errors import AgwmError

MULTIPLE = 8  # lengths are rounded up to it: few distinct shapes to compile, and aligned ones


class Encoded(NamedTuple):
    """A tokenised split; `labels` are 0 where the split has none."""

    input_ids: Int32[np.ndarray, "n t"]
    token_type_ids: Int32[np.ndarray, "n t"]
    attention_mask: Int32[np.ndarray, "n t"]
    labels: Int32[np.ndarray, "n"] | Float32[np.ndarray, "n"]


class EncodingReport(NamedTuple):
    """What padding and truncation did to a split.

    Attributes:
      length: t, tokens per example after padding.
      longest: tokens of the longest example before truncation.
      limit: tokens that longer examples were cut to.
      truncated: how many were.
      examples: n.
      padding: share of the n * t tokens that is padding.
    """

    length: int
    longest: int
    limit: int
    truncated: int
    examples: int
    padding: float


def _token_lists(split: datasets.Dataset, tokenizer: Any, limit: int | None) -> dict[str, list[list[int]]]:
    names = [name for name in ("text", "text_pair") if name in split.column_names]
    options = {} if limit is None else {"truncation": True, "max_length": limit}
    tokens = tokenizer(*(list(split[name]) for name in names), padding=False, verbose=False, **options)
    return {key: tokens[key] for key in ("input_ids", "token_type_ids") if key in tokens}


def _pad_length(lengths: np.ndarray, *, max_length: int, pad_to: str | float) -> int:
    if pad_to == "longest":
        wanted = int(lengths.max())
    elif isinstance(pad_to, int | float) and not isinstance(pad_to, bool) and 0 < pad_to <= 1:
        wanted = int(np.quantile(lengths, pad_to, method="inverted_cdf"))
    else:
        raise AgwmError(f"pad_to is {pad_to!r}: give 'longest' or a share of the examples in (0, 1], such as 0.95.")
    return min(math.ceil(wanted / MULTIPLE) * MULTIPLE, max_length)


def encode(
    split: datasets.Dataset,
    tokenizer: Any,
    *,
    max_length: int = 128,
    pad_to: str | float = "longest",
    kind: str = "classification",
) -> tuple[Encoded, EncodingReport]:
    """Tokenise a split and pad (or cut) all examples to one length.

    The length is that of the longest example, or a quantile of the lengths, rounded up to a multiple of 8, at most
    max_length. Of a pair that is too long, the longer text is cut first; special tokens are kept.

    Args:
      split: columns text, optionally text_pair and label.
      tokenizer: a Hugging Face tokenizer.
      max_length: tokens, special tokens included.
      kind: labels are int32 for classification, float32 for regression.

    Returns:
      The arrays, and how many examples were cut.

    Raises:
      AgwmError: no examples, no padding token, max_length too small for the special tokens, or pad_to out of range.
    """
    n = len(split)
    if not n:
        raise AgwmError("There are no examples to tokenise.")
    if tokenizer.pad_token_id is None:
        raise AgwmError("The tokenizer has no padding token: set pad_token in tokenizer_config.json.")
    special = tokenizer.num_special_tokens_to_add(pair="text_pair" in split.column_names)
    if max_length <= special:
        raise AgwmError(f"max_length is {max_length}, of which special tokens take {special}: give more.")
    columns = _token_lists(split, tokenizer, None)
    lengths = np.array([len(ids) for ids in columns["input_ids"]])
    longest, length = int(lengths.max()), _pad_length(lengths, max_length=max_length, pad_to=pad_to)
    long = np.flatnonzero(lengths > length)
    if long.size:
        for key, cut in _token_lists(split.select(long), tokenizer, length).items():
            for row, ids in zip(long, cut, strict=True):
                columns[key][row] = ids
    arrays = {
        "input_ids": np.full((n, length), tokenizer.pad_token_id, np.int32),
        "token_type_ids": np.zeros((n, length), np.int32),
    }
    mask = np.arange(length) < lengths[:, None]
    for key, rows in columns.items():
        arrays[key][mask] = np.concatenate([np.asarray(ids, np.int32) for ids in rows])
    dtype = np.float32 if kind == "regression" else np.int32
    labels = np.asarray(split["label"], dtype) if "label" in split.column_names else np.zeros(n, dtype)
    encoded = Encoded(attention_mask=mask.astype(np.int32), labels=labels, **arrays)
    return encoded, EncodingReport(length, longest, length, int(long.size), n, float(1 - mask.mean()))


def encode_task(
    task: Task, tokenizer: Any, *, max_length: int = 128, pad_to: str | float = "longest"
) -> tuple[dict[str, Encoded], dict[str, EncodingReport]]:
    """Tokenise all splits of a task: training at the length `pad_to` gives, all others at one common length.

    The common length is that of the longest example of these splits, so that one compiled evaluation serves them all,
    and no quantile of the training lengths ever cuts an example that is scored; only max_length does.

    Raises:
      AgwmError: see `encode`.
    """
    return encode_tasks([task], tokenizer, max_length=max_length, pad_to=pad_to)[0]


def encode_tasks(
    tasks: Sequence[Task], tokenizer: Any, *, max_length: int = 128, pad_to: str | float = "longest"
) -> list[tuple[dict[str, Encoded], dict[str, EncodingReport]]]:
    """`encode_task` of several draws of one task, all at the lengths of the longest: then one program serves them all.

    A split that several draws share is tokenised once.

    Raises:
      AgwmError: see `encode`.
    """
    options: dict[str, Any] = {"max_length": max_length, "kind": tasks[0].kind}
    done: dict[int, tuple[Encoded, EncodingReport]] = {}
    for task in tasks:
        for name, split in task.splits.items():
            if id(split) not in done:
                length = {"pad_to": pad_to if name == "train" else "longest"}
                done[id(split)] = encode(split, tokenizer, **(options | length))

    def longest(train: bool) -> int:
        chosen = (split for task in tasks for name, split in task.splits.items() if (name == "train") == train)
        return max((done[id(split)][1].length for split in chosen), default=0)

    lengths = {True: longest(True), False: longest(False)}
    wide = {
        (id(split), name == "train"): _widen(*done[id(split)], lengths[name == "train"], tokenizer.pad_token_id)
        for task in tasks
        for name, split in task.splits.items()
    }
    found = [{name: wide[id(split), name == "train"] for name, split in task.splits.items()} for task in tasks]
    return [
        ({name: pair[0] for name, pair in splits.items()}, {name: pair[1] for name, pair in splits.items()})
        for splits in found
    ]


def _widen(encoded: Encoded, report: EncodingReport, length: int, pad_token_id: int) -> tuple[Encoded, EncodingReport]:
    if length == report.length:
        return encoded, report
    width = ((0, 0), (0, length - report.length))
    padding = float(1 - encoded.attention_mask.sum() / (report.examples * length))
    return encoded._replace(
        input_ids=np.pad(encoded.input_ids, width, constant_values=pad_token_id),
        token_type_ids=np.pad(encoded.token_type_ids, width),
        attention_mask=np.pad(encoded.attention_mask, width),
    ), report._replace(length=length, padding=padding)
