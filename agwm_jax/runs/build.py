"""From settings to objects: task, model, method, optimisers."""

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from agwm_jax import metrics
from agwm_jax.core import estimators as hypergrad
from agwm_jax.core import linear_solve
from agwm_jax.core.partition import partition
from agwm_jax.core.types import Params
from agwm_jax.data.agreement import agreement_task
from agwm_jax.data.encode import Encoded, EncodingReport, encode_tasks
from agwm_jax.data.plan import epoch_plan, search_plan, split_indices
from agwm_jax.data.tasks import Task, drop_leaked, glue_task, glue_text_columns, hub_task, local_task, low_resource
from agwm_jax.errors import AgwmError
from agwm_jax.methods import Method, Weights, agwm, frozen_alpha, vanilla
from agwm_jax.models.huggingface import Pretrained, load_pretrained, with_head
from agwm_jax.models.loss import batch_loss
from agwm_jax.settings.config import Config
from agwm_jax.settings.hypergradient import (
    ConjugateGradient,
    GradientDescent,
    Implicit,
    Iteration,
    Neumann,
    Nystrom,
    Unrolled,
)
from agwm_jax.settings.schema import OptimizerConfig


class Built(NamedTuple):
    """Everything that the run of one seed needs."""

    task: Task
    encoded: dict[str, Encoded]
    encoding: dict[str, EncodingReport]
    pretrained: Pretrained
    method: Method
    frozen: Params
    initial: Weights
    key: jax.Array


def build(config: Config) -> Built:
    """Data, model, method and start of a run."""
    return build_seeds((config,))[0]


def build_seeds(configs: Sequence[Config]) -> tuple[Built, ...]:
    """The same for configs that differ in `run.seed` only; what the seeds share is read and held once."""
    whole = _read_task(configs[0])
    tasks = [_draw(whole, config) for config in configs]
    metrics.check(whole.metrics, kind=whole.kind, num_classes=len(whole.label_names))
    pretrained = build_model(configs[0], whole)
    encodings = build_encodings(configs[0], tasks, pretrained)
    parts = partition(pretrained.params, mixed=configs[0].mixup.mixed, frozen=configs[0].mixup.frozen)
    found = []
    for config, task, (encoded, encoding) in zip(configs, tasks, encodings, strict=True):
        own = with_head(pretrained, seed=stream_seed(config, "head"))
        head = {path: x for path, x in own.params.items() if x is not pretrained.params[path]}
        frozen, weights = ({path: head.get(path, x) for path, x in p.items()} for p in (parts.frozen, parts.task))
        method = build_method(config, task, own, parts.mixed, num_examples=len(encoded["train"].labels))
        alpha = method.init_alpha(stream_key(config, "alpha"), parts)
        key = stream_key(config, "dropout")
        found.append(Built(task, encoded, encoding, own, method, frozen, Weights(weights, alpha), key))
    return tuple(found)


def build_task(config: Config) -> Task:
    """The task with its training draw."""
    return _draw(_read_task(config), config)


def _draw(task: Task, config: Config) -> Task:
    size = config.task.train_size
    return task if size is None else low_resource(task, train_size=size, seed=config.run.seed)


def _read_task(config: Config) -> Task:
    source = config.task
    if source.source == "agreement":
        return agreement_task(
            seed=source.seed,
            train_size=source.pool_size,
            validation_size=source.validation_size,
            test_size=source.test_size,
        )
    if source.source == "glue":
        return glue_task(source.name, revision=source.revision)
    columns: dict[str, Any] = {
        "text_columns": source.text_columns,
        "label_column": source.label_column,
        "kind": source.kind,
        "label_names": source.label_names,
        "group_column": source.group_column,
        "metrics": source.metrics,
        "report_split": source.report_split,
    }
    if source.source == "hub":
        splits = {ours: theirs for ours, theirs in source.splits.model_dump().items() if theirs is not None}
        return hub_task(source.path, source.name, revision=source.revision, splits=splits, **columns)
    files = {split: file for split, file in source.files.model_dump().items() if file is not None}
    task = local_task(files, name=source.name, **columns)
    return drop_leaked(task) if source.drop_leaked else task


def text_and_label_columns(config: Config) -> tuple[tuple[str, ...], str]:
    """What the text columns and the label column are called in files for this task."""
    source = config.task
    if source.source == "agreement":
        return ("text",), "label"
    if source.source == "glue":
        return glue_text_columns(source.name), "label"
    return source.text_columns, source.label_column


def build_model(config: Config, task: Task, path: str | None = None) -> Pretrained:
    """The pretrained model with a head for the task; `path` stands in for the configured checkpoint."""
    model = config.model
    return load_pretrained(
        path or model.path,
        num_labels=max(1, len(task.label_names)),
        dtype=jnp.dtype(model.dtype),
        pooling=model.pooling,
        dropout=model.dropout,
        seed=stream_seed(config, "head"),
        revision=model.revision,
        unroll=model.unroll_layers,
        fuse_attention=model.fuse_attention,
    )


def build_encodings(
    config: Config, tasks: Sequence[Task], pretrained: Pretrained
) -> list[tuple[dict[str, Encoded], dict[str, EncodingReport]]]:
    """All splits of every draw of the task as token ids, and what was cut or padded."""
    limit = pretrained.config.max_position_embeddings
    if config.data.max_length > limit:
        raise AgwmError(
            f"data.max_length {config.data.max_length} is beyond the position table of {config.model.path} ({limit}): "
            f"set it to {limit} or less."
        )
    return encode_tasks(tasks, pretrained.tokenizer, max_length=config.data.max_length, pad_to=config.data.pad_to)


def build_method(
    config: Config, task: Task, pretrained: Pretrained, mixed: tuple[str, ...], *, num_examples: int
) -> Method:
    """The fine-tuning method; its data order follows from the seed alone, so that methods are paired by seed."""
    loss = batch_loss(pretrained.apply, task.kind, reverse_only=True)
    size = config.data.batch_size
    plan = {
        "train": epoch_plan(
            np.arange(num_examples), batch_size=size, epochs=config.finetune.epochs, rng=stream_rng(config, "finetune")
        )
    }
    tx = build_optimizer(config.finetune.optimizer, num_steps=len(plan["train"]))
    mixup = config.mixup
    if config.method.name == "vanilla":
        return vanilla(loss, plan, tx=tx)
    start: dict[str, Any] = {"rank": mixup.rank, "noise": mixup.noise, "complement": mixup.complement}
    if config.method.name == "frozen_alpha":
        return frozen_alpha(loss, plan, tx=tx, **start)

    search = config.search
    plans = []
    for index in range(search.num_splits):
        rng = stream_rng(config, f"search-{index}")
        train, validation = split_indices(num_examples, validation_fraction=search.validation_fraction, rng=rng)
        inner, outer = search_plan(
            train, validation, batch_size=size, inner_steps=search.inner_steps, epochs=search.epochs, rng=rng
        )
        plans.append({"inner": inner, "outer": outer})
    steps, inner_steps = plans[0]["inner"].shape[:2]
    return agwm(
        batch_loss(pretrained.apply, task.kind, reverse_only=not _takes_products(config)),
        plans,
        plan,
        hypergrad=build_hypergradient(config),
        inner_tx=build_optimizer(search.inner, num_steps=steps * inner_steps),
        outer_tx=build_optimizer(search.outer, num_steps=steps),
        finetune_tx=tx,
        mixed=mixed,
        finetune_loss=loss,
        anchor=search.anchor,
        rollback=search.rollback,
        average=search.average,
        **start,
    )


def _takes_products(config: Config) -> bool:
    """Whether the estimator differentiates the model in forward mode; differences of gradients do not."""
    choice = config.hypergradient
    return isinstance(choice, Unrolled | Implicit) and choice.hvp != "finite_difference"


def build_hypergradient(config: Config) -> hypergrad.Hypergradient:
    """The estimator of alpha's hypergradient."""
    choice = config.hypergradient
    if choice.estimator == "first_order":
        return hypergrad.first_order()
    if choice.estimator == "unrolled":
        return hypergrad.unrolled(num_steps=choice.num_steps, hvp=choice.hvp)
    if choice.estimator == "finite_difference":
        return hypergrad.finite_difference(
            radius=choice.radius, step_size=choice.step_size, precondition=choice.precondition
        )
    if choice.estimator == "penalty":
        return hypergrad.penalty(weight=choice.weight, growth=choice.growth)
    resample = choice.resample if isinstance(choice, Iteration) else False
    return hypergrad.implicit(_build_solver(choice), hvp=choice.hvp, curvature=choice.curvature, resample=resample)


def _build_solver(choice: Implicit) -> linear_solve.LinearSolver:
    if isinstance(choice, Neumann):
        return linear_solve.neumann(
            num_terms=choice.num_terms, step_size=choice.step_size, power_iterations=choice.power_iterations
        )
    if isinstance(choice, GradientDescent):
        return linear_solve.gradient_descent(
            num_steps=choice.num_steps, step_size=choice.step_size, power_iterations=choice.power_iterations
        )
    if isinstance(choice, ConjugateGradient):
        return linear_solve.conjugate_gradient(
            num_steps=choice.num_steps, damping=choice.damping, warm_start=choice.warm_start
        )
    assert isinstance(choice, Nystrom)
    # One sketch for all seeds: several of them share one program.
    return linear_solve.nystrom(rank=choice.rank, rho=choice.rho)


def build_optimizer(config: OptimizerConfig, *, num_steps: int) -> optax.GradientTransformation:
    """AdamW with warm-up and decay over `num_steps`, after a clip of the gradient's global norm."""
    warmup = int(config.warmup_fraction * num_steps)
    decay = {
        "linear": lambda: optax.schedules.linear_schedule(config.learning_rate, 0.0, num_steps - warmup),
        "cosine": lambda: optax.schedules.cosine_decay_schedule(config.learning_rate, max(1, num_steps - warmup)),
        "constant": lambda: optax.schedules.constant_schedule(config.learning_rate),
    }[config.schedule]()
    schedule = optax.schedules.join_schedules(
        [optax.schedules.linear_schedule(0.0, config.learning_rate, warmup), decay], [warmup]
    )
    adamw = optax.adamw(
        schedule,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        # The square root has no derivative at 0, where a weight without gradient sits (a word that is in no batch), and
        # `unrolled` differentiates through it. The size of eps^2 leaves the update as it is.
        eps_root=config.eps**2,
        weight_decay=config.weight_decay,
        mask=_decayed,
    )
    return optax.chain(optax.clip_by_global_norm(config.gradient_clip), adamw) if config.gradient_clip else adamw


def _decayed(params):
    """Which weights decay: all but biases and layer norms."""
    return {path: not path.endswith("bias") and "norm" not in path for path in params}


def stream_seed(config: Config, name: str) -> int:
    """A seed for one use of randomness: another use, or another method, does not shift it."""
    return zlib.crc32(f"{config.run.seed}/{name}".encode())


def stream_rng(config: Config, name: str) -> np.random.Generator:
    """A NumPy generator for one use of randomness."""
    return np.random.default_rng(stream_seed(config, name))


def stream_key(config: Config, name: str) -> jax.Array:
    """A JAX key for one use of randomness."""
    return jax.random.key(stream_seed(config, name))
