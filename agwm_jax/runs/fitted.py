"""A fine-tuned model: what scores, labels texts and is saved, whether it was just trained or read from a run folder."""

import contextlib
import json
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy.special import softmax

from agwm_jax import metrics
from agwm_jax.core.types import Batch, Params
from agwm_jax.data.encode import MULTIPLE, Encoded, encode
from agwm_jax.data.plan import evaluation_plan
from agwm_jax.data.tasks import LabelScale, Task
from agwm_jax.engine.sharding import Placement, place
from agwm_jax.errors import AgwmError
from agwm_jax.models.huggingface import Pretrained, load_pretrained, save_pretrained, transformers_compatible
from agwm_jax.models.model import Effective, Model
from agwm_jax.settings.schema import Data

if TYPE_CHECKING:
    import datasets

DESCRIPTION, FORMAT = "agwm.json", 1
"""Of an exported folder: the file that says what the model is for, and its format."""
Texts = Sequence[str] | Sequence[tuple[str, str]]
"""Single texts, or pairs for a task of pairs."""


class Predictions(NamedTuple):
    """What a model says of texts, in their order."""

    labels: list[str] | list[float]
    """Names of classes, or scores in the user's unit."""
    probabilities: Float[np.ndarray, "n c"] | None
    """Of the classes in the order of the task; None for a regression."""


class FittedModel(NamedTuple):
    """A model with the weights that a method learnt merged in."""

    task: Task
    """Its splits need not be there."""
    pretrained: Pretrained
    """What it was fine-tuned from."""
    params: Params
    """All weights of the forward pass, by path."""
    scale: LabelScale | None
    """The unit that a regression was trained in."""
    data: Data
    """Lengths and batches."""
    placement: Placement | None = None
    """Of `params`; None: on one device."""
    model: Model | None = None
    """`Method.model`: what evaluates, where it is not that of `pretrained`; its outputs are the scores."""
    temperature: float = 1.0
    """That logits of classes are divided by before they are made probabilities."""
    text_columns: tuple[str, ...] = ("text", "text_pair")
    """Of files to label; the second for pairs alone."""

    def logits(self, encoded: Encoded) -> Float[np.ndarray, "n c"]:
        """Of every example of an encoded split; of a regression the score in the user's unit."""
        with contextlib.nullcontext() if self.placement is None else jax.set_mesh(self.placement.mesh):
            found = predict_logits(
                (self.model or self.pretrained.model).apply,
                self.params,
                encoded,
                batch_size=self.data.eval_batch_size,
                placement=self.placement,
            )
        return found if self.scale is None or self.model is not None else self.scale.undo(found)

    def encode(self, split: "datasets.Dataset", what: str) -> Encoded:
        """Texts as token ids; a warning says how many of `what` were cut."""
        encoded, report = encode(split, self.pretrained.tokenizer, max_length=self.data.max_length, kind=self.task.kind)
        sentence = report.warning(what)
        if sentence is not None:
            warnings.warn(sentence, stacklevel=3)
        return encoded

    def predict(self, texts: Texts) -> Predictions:
        """The class of every text with the probabilities of all classes, or its score.

        Args:
            texts: n of them, single or in pairs as the task has them.

        Raises:
            AgwmError: no texts, or not as the task has them.
        """
        return self.predict_split(_split_of(texts, pair=self.task.pair), "the call")

    def predict_split(self, split: "datasets.Dataset", what: str) -> Predictions:
        """`predict` for a data set with the columns text and, for pairs, text_pair; a warning calls it `what`."""
        logits = self.logits(self.encode(split, what))
        if self.task.kind == "regression":
            return Predictions([float(x) for x in logits[:, 0]], None)
        names = [self.task.label_names[i] for i in logits.argmax(1)]
        return Predictions(names, softmax(logits.astype(np.float64) / self.temperature, axis=1))

    def scores(self, split: "datasets.Dataset", logits: Float[np.ndarray, "n c"]) -> dict[str, float]:
        """The task's metrics on a labelled split."""
        return metrics.compute(self.task.metrics, logits, np.asarray(split["label"]))

    def group_scores(self, split: "datasets.Dataset", logits: Float[np.ndarray, "n c"]) -> dict[str, dict[str, float]]:
        """Accuracy (of a regression the main metric) and ``n`` for every group of a split; empty without groups."""
        if "group" not in split.column_names:
            return {}
        names, labels = np.asarray(split["group"]), np.asarray(split["label"])
        metric = "accuracy" if self.task.kind == "classification" else self.task.metrics[0]
        groups = {}
        for group in sorted(set(names.tolist())):
            rows = names == group
            groups[group] = {**metrics.compute([metric], logits[rows], labels[rows]), "n": int(rows.sum())}
        return groups

    def save(self, folder: str | os.PathLike[str], *, beside: Mapping[str, str] = MappingProxyType({})) -> str | None:
        """Write a Hugging Face folder: config, tokenizer, weights with the head; a regression gives the user's unit.

        Its ``agwm.json`` says what `agwm_jax.load_exported` needs beside them. Texts longer than `data.max_length` are
        cut there by other libraries too. Probabilities of other libraries are those of temperature 1.

        Args:
            folder: must not exist or be empty.
            beside: further text files, content by name.

        Returns:
            Why `transformers` would not give the same logits, or None where it does.

        Raises:
            AgwmError: `folder` holds files, or cannot be written; or what evaluates is no plain model.
        """
        if self.model is not None:
            raise AgwmError(
                "this method does not score with the model's head, so a saved Hugging Face folder would not give its "
                "scores: keep the run folder and predict from there, and leave out run.export."
            )
        save_pretrained(
            folder,
            self.params,
            self.pretrained,
            label_names=self.task.label_names or ("score",),
            label_scale=self.scale,
            max_length=self.data.max_length,
            beside={DESCRIPTION: json.dumps(self._description(), indent=2, ensure_ascii=False) + "\n", **beside},
        )
        return transformers_compatible(self.pretrained)

    def _description(self) -> dict[str, Any]:
        task = {name: value for name, value in self.task._asdict().items() if name != "splits"}
        columns = self.text_columns[: 2 if self.task.pair else 1]
        reading = {"max_length": self.data.max_length, "temperature": self.temperature, "text_columns": columns}
        return {"format": FORMAT, "task": task, **reading}


class Description(NamedTuple):
    """What the agwm.json of an exported folder says."""

    task: Task
    """Its splits are not there."""
    max_length: int
    temperature: float
    text_columns: tuple[str, ...]


def read_description(folder: str | os.PathLike[str]) -> Description:
    """What an exported folder is for.

    Raises:
        AgwmError: there is none, it is damaged, or a newer version wrote it.
    """
    path = Path(folder) / DESCRIPTION
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        version = said["format"]
        if version == FORMAT:
            described = said["task"]
            lists = {name: tuple(described[name]) for name in ("label_names", "metrics")}
            task = Task(**{**described, **lists, "splits": {}})
            return Description(
                task, int(said["max_length"]), float(said["temperature"]), tuple(map(str, said["text_columns"]))
            )
    except FileNotFoundError:
        raise AgwmError(f"{folder} is no exported model (it has no {DESCRIPTION}).") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise AgwmError(f"{path} cannot be read ({error}): export the model again.") from None
    raise AgwmError(f"{path} has format {version}, this version of agwm_jax reads {FORMAT}: install a newer one.")


def load_exported(folder: str | os.PathLike[str]) -> FittedModel:
    """Read a folder that `FittedModel.save`, `agwm export` or `agwm compare` wrote.

    Raises:
        AgwmError: it is no such folder, a file of it is damaged, or a newer version wrote it.
    """
    said = read_description(folder)
    names = said.task.label_names
    pretrained = load_pretrained(folder, num_labels=max(1, len(names)), label_names=names or None)
    if pretrained.head_initialised:
        raise AgwmError(f"{folder} holds no classifier for {', '.join(names) or 'scores'}: export it again.")
    params: Params = {path: jnp.asarray(x) for path, x in pretrained.params.items()}
    return FittedModel(
        said.task,
        pretrained,
        params,
        None,
        Data(max_length=said.max_length),
        temperature=said.temperature,
        text_columns=said.text_columns,
    )


def _split_of(texts: Texts, *, pair: bool) -> "datasets.Dataset":
    import datasets

    if isinstance(texts, str) or not len(texts):
        raise AgwmError(f"texts are {texts!r}: give a list of one text or more.")
    wanted = "a pair of texts (first, second)" if pair else "a text"
    for row, text in enumerate(texts):
        fits = isinstance(text, str) if not pair else _is_pair(text)
        if not fits:
            raise AgwmError(f"text {row} is {text!r}, expected {wanted}, as the task has them.")
    if not pair:
        return datasets.Dataset.from_dict({"text": list(texts)})
    first, second = zip(*texts, strict=True)
    return datasets.Dataset.from_dict({"text": list(first), "text_pair": list(second)})


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(text, str) for text in value)


def predict_logits(
    apply: Callable[..., jax.Array],
    params: Effective,
    encoded: Encoded,
    *,
    batch_size: int,
    placement: Placement | None = None,
) -> Float[np.ndarray, "n c"]:
    """Logits of every example of a split, in its order, without dropout; on a mesh, where the weights lie on one.

    Texts of like length share a batch, which is cut to one of a few lengths.

    Args:
        apply: of a `Model`: ``apply(params, batch, reverse_only=True) -> logits [b, c]``.
        params: by path.
        encoded: the split, n examples padded to t tokens.
        batch_size: b; every program has this many rows, whatever the split, so that splits of one length share it.
        placement: of the weights; every process then asks for the same logits.
    """
    columns = {name: column for name, column in encoded.items() if name != "labels"}
    mask = encoded["attention_mask"]
    padded = mask.shape[1]
    last_real = (mask * np.arange(1, padded + 1)).max(axis=1)
    order = np.argsort(last_real, kind="stable")
    logits = []
    for places in evaluation_plan(len(order), batch_size=batch_size):
        rows = order[np.maximum(places, 0)]
        length = min(x for x in program_lengths(padded) if x >= last_real[rows].max())
        batch = {name: x[rows, :length] for name, x in columns.items()}
        if placement is not None:
            batch = place(batch, jax.tree.map(lambda x: placement.of_batch(x.shape), batch))
        logits.append(_batch_logits(apply, placement and placement.replicated, params, batch))
    by_length = np.concatenate([np.asarray(x) for x in logits])[: len(order)]
    found = np.empty_like(by_length)
    found[order] = by_length
    return found


def program_lengths(padded: int) -> set[int]:
    """The lengths in tokens that batches of a split are cut to, each a program to compile: all, a half, a quarter.

    On a CPU padding costs more than two more programs; elsewhere a split of a few thousand texts takes less time than
    compiling one, and is not cut.
    """
    parts = (1, 2, 4) if jax.default_backend() == "cpu" else (1,)
    return {min(padded, math.ceil(padded / part / MULTIPLE) * MULTIPLE) for part in parts}


@partial(jax.jit, static_argnums=(0, 1))
def _batch_logits(apply: Callable[..., jax.Array], where, params: Effective, batch: Batch) -> jax.Array:
    logits = apply(params, batch, reverse_only=True)
    return logits if where is None else jax.lax.with_sharding_constraint(logits, where)
