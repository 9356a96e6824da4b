"""From settings to what is trained: the task with its draw, the model, the method, and one seed's random streams."""

import math
import os
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from agwm_jax import metrics
from agwm_jax.core.types import Composite
from agwm_jax.data.columns import read_labelled
from agwm_jax.data.draws import Rows
from agwm_jax.data.encode import MULTIPLE, Draw, Encoded, EncodingReport, encode_draws
from agwm_jax.data.sources.base import file_digests
from agwm_jax.data.tasks import LabelScale, Task, class_weights
from agwm_jax.engine.group import Member
from agwm_jax.errors import AgwmError
from agwm_jax.methods.interface import Method, MethodSettings, Setup
from agwm_jax.methods.technique import Technique, compose
from agwm_jax.methods.training import Finetune
from agwm_jax.models.huggingface import Pretrained, check_regression, in_the_labels_unit, load_pretrained, with_head
from agwm_jax.models.loss import batch_loss
from agwm_jax.models.weights import matching
from agwm_jax.settings.schema import Config, Data, Loss


class Recipe(NamedTuple):
    """How a task is learnt, whatever its seed."""

    method: MethodSettings
    techniques: tuple[Technique, ...]
    finetune: Finetune
    data: Data
    loss: Loss
    frozen: str | None = None
    """Pattern of the paths that are never trained."""
    rows: Callable[[Task, int], Rows] | None = None
    """Rows of the training split by seed; None: all of them."""


class Prepared(NamedTuple):
    """Everything that training one seed needs, on the host; what seeds share is held once."""

    seed: int
    draw: Draw
    pretrained: Pretrained
    """With the seed's head."""
    method: Method
    rows: Mapping[str, range]
    """Of what the method reads beside the training set, in `table`."""
    loss: Loss

    @property
    def member(self) -> Member:
        """What the engine trains."""
        return Member(self.seed, self.method, self.pretrained.params, self.table, stream_key(self.seed, "dropout"))

    @property
    def table(self) -> Encoded:
        """The training set, and below it what else the method reads; as wide for every seed."""
        found = stacked({name: self.draw.encoded[name] for name in ("train", *self.rows)})
        weights = self.class_weights
        return found if weights is None else {**found, "weight": weights[found["labels"]]}

    @property
    def class_weights(self) -> np.ndarray | None:
        """What an example of each class counts, float32 [c]; None where all examples count alike."""
        if self.loss.class_weights is None:
            return None
        task, labels = self.draw.task, self.draw.encoded["train"]["labels"]
        return class_weights(labels, task.label_names, self.loss.class_weights)

    @property
    def train_size(self) -> int:
        """Number of training examples."""
        return len(self.draw.encoded["train"]["labels"])


def recipe(config: Config) -> Recipe:
    """What a config says of it."""
    techniques = config.techniques.chosen
    sections = (config.method, techniques, config.finetune, config.data, config.loss)
    return Recipe(*sections, config.model.frozen, config.task.rows)


def build(config: Config, seeds: Sequence[int] | None = None) -> tuple[Prepared, ...]:
    """What a config trains, by seed (None: `run.seed` alone).

    Raises:
        AgwmError: see `prepare`; the data or the model cannot be read.
    """
    task = config.task.load()
    texts, label = config.task.columns()
    own = {
        path: read_labelled(path, task, text_columns=texts, label_column=label, separator=config.task.separator)
        for path in files_read(config)
        if path not in task.splits
    }
    task = task._replace(splits={**task.splits, **own})
    pretrained = read_model(config, task)
    return prepare(task, pretrained, recipe(config), seeds=(config.run.seed,) if seeds is None else seeds)


def files_read(config: Config) -> tuple[str, ...]:
    """Labelled files that the method reads beside the task's splits."""
    return tuple(name for name in names_read(config.method, config.techniques.chosen) if os.path.isabs(name))


def digests(config: Config) -> dict[str, str]:
    """SHA-256 of the user's own files that a run reads, by path.

    Raises:
        AgwmError: a file is missing or cannot be read.
    """
    return {**config.task.digests(), **file_digests(files_read(config))}


def read_model(config: Config, task: Task, path: str | None = None) -> Pretrained:
    """The pretrained model of a config with a head for the task; `path` stands in for the configured checkpoint."""
    options = config.model.model_dump(exclude={"path", "frozen", "dtype", "unroll_layers"})
    return load_pretrained(
        path or config.model.path,
        num_labels=max(1, len(task.label_names)),
        label_names=task.label_names or None,
        dtype=jnp.dtype(config.model.dtype),
        unroll=config.model.unroll_layers,
        **options,
    )


def prepare(task: Task, pretrained: Pretrained, recipe: Recipe, *, seeds: Sequence[int]) -> tuple[Prepared, ...]:
    """Draws, heads, data orders and methods of several seeds; each is what it would be alone.

    Args:
        task: before any draw.
        pretrained: with a head of the task's size.
        recipe: how the task is learnt.
        seeds: one or more.

    Raises:
        AgwmError: a metric does not fit the task, a text of `data.max_length` tokens not the model, or the method's
            settings not the model, the task or the number of examples.
    """
    metrics.check(task.metrics, kind=task.kind, num_classes=len(task.label_names))
    check_length(pretrained, recipe.data)
    if task.kind == "regression":
        check_regression(pretrained.model)
        for name, value in recipe.loss:
            if value:
                raise AgwmError(f"loss.{name} is for classes, and {task.name} is a regression: leave it out.")
    draws = encode_draws(
        task,
        pretrained.tokenizer,
        seeds=seeds,
        rows=recipe.rows,
        max_length=recipe.data.max_length,
        pad_to=recipe.data.pad_to,
    )
    found = []
    for seed, draw in zip(seeds, draws, strict=True):
        own = seeded(pretrained, seed, draw.scale)
        size = len(draw.encoded["train"]["labels"])
        sizes = {name: len(split["labels"]) for name, split in draw.encoded.items()}
        rows = rows_read(names_read(recipe.method, recipe.techniques), sizes)
        beside = {"rows": rows, "labels": draw.encoded["train"]["labels"], "pair": task.pair}
        method = build_method(recipe, own, task.kind, seed=seed, num_examples=size, **beside)
        found.append(Prepared(seed, draw, own, method, rows, recipe.loss))
    for warning in truncations(found[0].draw.reports):
        warnings.warn(warning["message"], stacklevel=2)
    return tuple(found)


def names_read(method: MethodSettings, techniques: Sequence[MethodSettings]) -> tuple[str, ...]:
    """What a method and its techniques read beside the training set."""
    return tuple(dict.fromkeys(name for each in (method, *techniques) for name in each.reads))


def rows_read(names: Sequence[str], sizes: Mapping[str, int]) -> dict[str, range]:
    """Rows of these splits in a table that has the training set first; `sizes` are those of all splits.

    Raises:
        AgwmError: there is no such split.
    """
    found, first = {}, sizes["train"]
    for name in names:
        if name not in sizes:
            hint = ": task.train_size draws one" if name == "development" else ""
            raise AgwmError(
                f"the method reads the split {name!r}, which the task lacks (it has {', '.join(sizes)}){hint}."
            )
        found[name] = range(first, first + sizes[name])
        first += sizes[name]
    return found


def stacked(splits: Mapping[str, Encoded]) -> Encoded:
    """Splits one below the other, at the length of the first, or more where a text of another one needs it."""
    first, *others = splits
    width = splits[first]["input_ids"].shape[1]
    for name in others:
        mask = splits[name]["attention_mask"]
        # Which texts are drawn depends on the seed, and the width must not: seeds may share a program.
        longest = mask.shape[1] if name == "development" else int((mask * np.arange(1, mask.shape[1] + 1)).max())
        width = max(width, math.ceil(longest / MULTIPLE) * MULTIPLE)

    def fitted(column: np.ndarray) -> np.ndarray:
        missing = max(0, width - column.shape[1]) if column.ndim > 1 else 0
        return np.pad(column, ((0, 0), (0, missing)))[:, :width] if column.ndim > 1 else column

    return {name: np.concatenate([fitted(split[name]) for split in splits.values()]) for name in splits[first]}


def check_length(pretrained: Pretrained, data: Data) -> None:
    """Refuse texts that are longer than the model can read.

    Raises:
        AgwmError: saying how long they may be.
    """
    limit = pretrained.config.max_length
    if data.max_length > limit:
        raise AgwmError(
            f"data.max_length {data.max_length} is beyond the position table of {pretrained.source} ({limit}): set it "
            f"to {limit} or less."
        )


def seeded(pretrained: Pretrained, seed: int, scale: LabelScale | None) -> Pretrained:
    """The model with the head that a seed starts from; all other weights are shared.

    A fresh head is drawn; one that came with the checkpoint and gives scores in the user's unit is put into that of
    the training labels.
    """
    if scale is None or pretrained.head_initialised:
        return with_head(pretrained, seed=stream_seed(seed, "head"))
    inverse = (-scale.mean / scale.std, 1 / scale.std)
    return pretrained._replace(params=in_the_labels_unit(pretrained.params, pretrained.model, *inverse))


def build_setup(
    recipe: Recipe,
    pretrained: Pretrained,
    kind: str,
    *,
    seed: int,
    num_examples: int,
    rows: Mapping[str, range] = MappingProxyType({}),
    labels: np.ndarray | None = None,
    pair: bool = False,
) -> Setup:
    """What a method is built from; its data order follows from the seed alone, so that methods are paired by seed."""
    model, pattern = pretrained.model, recipe.frozen

    def loss(*, reverse_only: bool = False) -> Composite:
        smoothing = recipe.loss.label_smoothing
        return batch_loss(model.apply, kind, label_smoothing=smoothing, reverse_only=reverse_only)

    return Setup(
        model=model,
        loss=loss,
        criterion=loss().criterion,
        kind=kind,
        shapes={path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in pretrained.params.items()},
        frozen=() if pattern is None else matching(model.weights, pattern, setting="model.frozen"),
        finetune=recipe.finetune,
        batch_size=recipe.data.batch_size,
        num_examples=num_examples,
        rng=partial(stream_rng, seed),
        accumulate=recipe.data.accumulate,
        rows=rows,
        labels=labels,
        pair=pair,
    )


def build_method(recipe: Recipe, pretrained: Pretrained, kind: str, **of_seed: Any) -> Method:
    """The method for one seed, with its techniques; see `build_setup`."""
    return compose(recipe.method.build, recipe.techniques, build_setup(recipe, pretrained, kind, **of_seed))


def truncations(reports: Mapping[str, EncodingReport]) -> list[dict[str, str]]:
    """A warning for every split of which texts were cut."""
    sentences = (report.warning(f"split {split}") for split, report in reports.items())
    return [{"name": "texts_truncated", "message": sentence} for sentence in sentences if sentence]


def stream_seed(seed: int, name: str) -> int:
    """The seed of one use of randomness within a run; other uses do not shift it."""
    return zlib.crc32(f"{seed}/{name}".encode())


def stream_rng(seed: int, name: str) -> np.random.Generator:
    """A NumPy generator for one use of randomness."""
    return np.random.default_rng(stream_seed(seed, name))


def stream_key(seed: int, name: str) -> jax.Array:
    """A JAX key for one use of randomness."""
    return jax.random.key(stream_seed(seed, name))
