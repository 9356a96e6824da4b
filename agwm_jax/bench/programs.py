"""The steps that are timed: any phase of any method on a model of a given shape, with random weights and texts."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from agwm_jax.bench.timing import Program, threads
from agwm_jax.core.types import Params
from agwm_jax.engine.lanes import each_lane
from agwm_jax.errors import AgwmError
from agwm_jax.methods.interface import METHODS, Context, Method, Setup
from agwm_jax.methods.training import Finetune
from agwm_jax.models.family import FAMILIES, Options, build_model, fresh_params
from agwm_jax.models.loss import batch_loss
from agwm_jax.models.model import Model

SHAPES: dict[str, tuple[str, int, int, int, int]] = {  # family, layers, width, heads, feed-forward width
    "minilm": ("bert", 6, 384, 12, 1536),
    "bert-base": ("bert", 12, 768, 12, 3072),
    "bert-large": ("bert", 24, 1024, 16, 4096),
    "roberta-base": ("roberta", 12, 768, 12, 3072),
}
LABELS = 2
_NEUMANN = {"name": "implicit", "solver": {"name": "neumann", "num_terms": 5, "step_size": 0.01}}

STEPS: dict[str, tuple[dict[str, Any], str, float]] = {
    # name: settings of the method, phase, forward-backward passes that it has to compute
    "plain step": ({"name": "vanilla"}, "finetune", 1),
    "finetune, alpha frozen": ({"name": "agwm"}, "finetune", 1),
    "search, first_order": ({"name": "agwm", "estimator": {"name": "first_order"}}, "search-0", 2),
    "search, finite_difference, rollback": (
        {"name": "agwm", "estimator": {"name": "finite_difference"}, "search": {"rollback": True}},
        "search-0",
        5,
    ),
    "search, unrolled 1": ({"name": "agwm", "estimator": {"name": "unrolled"}}, "search-0", 4),
    "search, neumann 1": (
        {"name": "agwm", "estimator": {**_NEUMANN, "solver": {**_NEUMANN["solver"], "num_terms": 1}}},  # type: ignore[dict-item]
        "search-0",
        5,
    ),
    "search, neumann 5": ({"name": "agwm", "estimator": _NEUMANN}, "search-0", 13),
    "search, neumann 5, differences": (
        {"name": "agwm", "estimator": {**_NEUMANN, "hvp": "finite_difference"}},
        "search-0",
        8,
    ),
    "search, neumann 5, Gauss-Newton": (
        {"name": "agwm", "estimator": {**_NEUMANN, "curvature": "gauss_newton"}},
        "search-0",
        12,
    ),
}
SIDE_BY_SIDE = ("finetune, alpha frozen", "search, unrolled 1")


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


def shape(name: str, *, batch: int, length: int, layers: int | None = None) -> Shape:
    """The shape of a checkpoint, without dropout; `layers` in place of its own."""
    family, own, width, heads, inner = SHAPES[name]
    values = {
        "vocab_size": 30522,
        "hidden_size": width,
        "num_hidden_layers": layers or own,
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
    params: Params = dict(shapes)
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
        finetune=Finetune(),
        batch_size=shape.batch,
        num_examples=5 * shape.batch,
        rng=lambda name: np.random.default_rng(0),
    )
    return Prepared(model, params, setup)


def method(prepared: Prepared, settings: Mapping[str, Any]) -> Method:
    """A method by its settings, as a config has them; searches go without rollback where they do not say."""
    section = METHODS[settings["name"]].value
    own = dict(settings)
    if "search" in section.model_fields:
        own["search"] = {"rollback": False, **settings.get("search", {})}
    return section.model_validate(own).build(prepared.setup)


def programs(shape: Shape, options: Options, *, seeds: int, only: Callable[[str], bool]) -> dict[str, Program]:
    """The steps of `STEPS` by name; those of `seeds` seeds side by side are left out where it is 0."""
    fused, plain = (prepare(shape, options._replace(fuse_attention=fuse)) for fuse in (options.fuse_attention, False))
    found = {}
    for name, (settings, phase, fb) in STEPS.items():
        if "difference" in name and jnp.dtype(options.dtype).itemsize < 4:
            continue  # refused: in so few bits a difference of gradients is rounding
        if only(name) or (seeds and name in SIDE_BY_SIDE):
            found[name] = _program(fused, plain, settings, phase, fb, shape)
    for single in SIDE_BY_SIDE if seeds else ():
        found[f"{seeds} seeds, {single}"] = _side_by_side(found[single], single, shape, seeds)
    return found


def _program(fused: Prepared, plain: Prepared, settings, phase_name: str, fb: float, shape: Shape) -> Program:
    key = jax.random.key(0)
    steps, state, context, data = [], None, None, None
    for prepared in (fused, plain):
        built = method(prepared, settings)
        (phase,) = (phase for phase in built.phases if phase.name == phase_name)

        def step(state, context, batches, phase=phase):
            return phase.step(state, context, batches, key, jnp.int32(0))

        steps.append(step)
        if state is None:
            initial = built.init(fused.params, key)
            context = Context(fused.params, initial, initial)
            state = jax.jit(phase.start)(context, key)
            rows = {name: plan[0].shape for name, plan in phase.plan.items()}
            data = {name: texts(number, rows[name], shape.length) for number, name in enumerate(sorted(rows))}
    return Program(steps[0], steps[1], state, context, data, fb)


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
