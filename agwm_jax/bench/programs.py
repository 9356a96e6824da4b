"""The steps that are timed: any phase of any method on a model of a given shape, with random weights and texts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from agwm_jax.bench.timing import Program, threads
from agwm_jax.core.types import Params
from agwm_jax.engine.lanes import each_lane
from agwm_jax.errors import AgwmError
from agwm_jax.methods.interface import METHODS, Context, Method, Phase, Setup
from agwm_jax.methods.optimizers import OptimizerSettings
from agwm_jax.methods.training import Finetune
from agwm_jax.models.family import FAMILIES, Options, build_model, fresh_params
from agwm_jax.models.loss import batch_loss
from agwm_jax.models.model import Model

LABELS = 2


class TimedStep(NamedTuple):
    """What is timed: one step of one phase of a method."""

    settings: Mapping[str, Any]
    """Of the method, as a config has them."""
    phase: str
    fb: float
    """Forward-backward passes of one batch that it has to compute."""
    differences: bool = False
    """Whether it subtracts gradients, which is refused in less than float32."""


class Shape(NamedTuple):
    """What is benchmarked."""

    family: str
    config: Any
    """Of the family, without dropout."""
    batch: int
    length: int

    @property
    def pass_flops(self) -> int:
        """Operations of one forward and backward pass, from shapes: matrix products alone, none twice."""
        width, inner = self.config.hidden_size, self.config.intermediate_size
        of_token = 2 * (4 * width**2 + 2 * width * inner) + 4 * self.length * width
        head = 2 * (width**2 + width * LABELS)
        return 3 * self.batch * (self.config.num_hidden_layers * self.length * of_token + head)


def shape(
    family: str, layers: int, width: int, heads: int, inner: int, *, batch: int, length: int, vocabulary: int = 30522
) -> Shape:
    """Of a family's model without dropout, and of its batches."""
    values = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "max_position_embeddings": max(514, length + 2),
    }
    return Shape(family, FAMILIES[family].value().read_config(values).with_dropout(0.0), batch, length)


class Prepared(NamedTuple):
    """A model of a shape, and what its methods are built from."""

    model: Model
    params: Params
    setup: Setup


def prepare(shape: Shape, options: Options, *, abstract: bool = False) -> Prepared:
    """The model with fresh weights, or with shapes in their place, and the setup of its methods.

    The training set is just large enough for a batch of either part of a search.
    """
    model, shapes = build_model(FAMILIES[shape.family].value(), shape.config, num_labels=LABELS, options=options)
    params: Any = dict(shapes)
    if not abstract:
        params = {k: jnp.asarray(x) for k, x in fresh_params(model.weights, shapes, seed=0, scale=0.02).items()}

    def loss(*, reverse_only: bool = False):
        return batch_loss(model.apply, "classification", reverse_only=reverse_only)

    setup = Setup(
        model=model,
        loss=loss,
        criterion=loss().criterion,
        kind="classification",
        shapes=shapes,
        frozen=(),
        finetune=Finetune(optimizer=OptimizerSettings(gradient_clip=None)),  # as PyTorch's step, which has none
        batch_size=shape.batch,
        num_examples=5 * shape.batch,
        rng=lambda name: np.random.default_rng(0),
    )
    return Prepared(model, params, setup)


def method(prepared: Prepared, settings: Mapping[str, Any]) -> Method:
    """A method by its settings; searches go without rollback and clip where they do not say."""
    section = METHODS[settings["name"]].value
    own = dict(settings)
    if "search" in section.model_fields:
        plain = {"rollback": False, "inner": {"gradient_clip": None}}
        own["search"] = {**plain, **settings.get("search", {})}
    return section.model_validate(own).build(prepared.setup)


def programs(
    shape: Shape,
    options: Options,
    steps: Mapping[str, TimedStep],
    *,
    seeds: int = 0,
    side_by_side: Sequence[str] = (),
) -> dict[str, Program]:
    """The steps by name, and those of `side_by_side` once more for `seeds` seeds at once."""
    fused, plain = (prepare(shape, options._replace(fuse_attention=fuse)) for fuse in (options.fuse_attention, False))
    narrow = jnp.dtype(options.dtype).itemsize < 4
    found = {
        name: _program(fused, plain, step, shape) for name, step in steps.items() if not (narrow and step.differences)
    }
    for single in side_by_side if seeds else ():
        found[f"{seeds} seeds, {single}"] = _side_by_side(found[single], single, shape, seeds)
    return found


def _program(fused: Prepared, plain: Prepared, timed: TimedStep, shape: Shape) -> Program:
    key = jax.random.key(0)
    built = [method(prepared, timed.settings) for prepared in (fused, plain)]
    phase, counted = (next(phase for phase in each.phases if phase.name == timed.phase) for each in built)

    def step_of(phase: Phase):
        return lambda state, context, batches: phase.step(state, context, batches, key, jnp.int32(0))

    initial = built[0].init(fused.params, key)
    context = Context(fused.params, initial, initial)
    state = jax.device_get(jax.jit(phase.start)(context, key))
    plans = enumerate(sorted(phase.plan.items()))
    data = {name: texts(number, plan[0].shape, shape.length) for number, (name, plan) in plans}
    return Program(step_of(phase), step_of(counted), state, context, data, float(timed.fb))


def _side_by_side(one: Program, single: str, shape: Shape, seeds: int) -> Program:
    """Lanes as the training loop has them: what nothing changes is shared, states are stacked, batches differ."""

    def lanes(step):
        return each_lane(step, (0, None, 0), seeds)

    own = [
        {name: texts(7 * seed + number, batch["weight"].shape, shape.length) for number, (name, batch) in pairs}
        for seed in range(seeds)
        for pairs in [enumerate(one.data.items())]
    ]
    state = jax.eval_shape(lambda state: _stacked([state] * seeds), one.state)
    return Program(lanes(one.step), lanes(one.counted), state, one.context, _stacked(own), seeds * one.fb, single)


def _stacked(trees):
    return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)


def texts(seed: int, rows: tuple[int, ...], length: int) -> dict[str, jax.Array]:
    """Random texts of `length` tokens with labels, for batches of a shape ``[*k, b]``."""
    rng = np.random.default_rng(seed)
    return {
        "input_ids": jnp.asarray(rng.integers(1000, 30000, (*rows, length)), jnp.int32),
        "token_type_ids": jnp.zeros((*rows, length), jnp.int32),
        "attention_mask": jnp.ones((*rows, length), jnp.int32),
        "labels": jnp.asarray(rng.integers(0, LABELS, rows), jnp.int32),
        "weight": jnp.ones(rows),
    }


def torch_step(shape: Shape) -> Callable[[], None]:
    """The plain step in eager PyTorch: the model of `transformers` and torch's AdamW.

    Raises:
        AgwmError: PyTorch is not installed.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise AgwmError(f"--torch needs PyTorch beside the product ({error}): pip install torch.") from None
    torch.set_num_threads(threads())
    torch.manual_seed(0)
    stem = next(iter(FAMILIES[shape.family].value().model_types.values()))
    values = {k: v for k, v in shape.config.to_dict().items() if k != "classifier_dropout"}
    model = getattr(transformers, f"{stem}ForSequenceClassification")(
        getattr(transformers, f"{stem}Config")(**values, num_labels=LABELS)
    )
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0)
    batch = {k: v for k, v in texts(0, (shape.batch,), shape.length).items() if k != "weight"}
    data = {k: torch.from_numpy(np.array(v)).long() for k, v in batch.items()}

    def step() -> None:
        optimizer.zero_grad()
        model(**data).loss.backward()
        optimizer.step()

    return step
