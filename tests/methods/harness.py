"""A tiny model, a setup and a loop of plain jitted calls, which run any method without the engine."""

import zlib
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from agwm_jax.core.deferred import materialise
from agwm_jax.methods.interface import Context, Method, Setup
from agwm_jax.methods.training import Finetune
from agwm_jax.models.loss import batch_loss
from agwm_jax.models.model import Model
from agwm_jax.models.weights import Weight

VOCAB, WIDTH, HEADS, LAYERS, TOKENS, EXAMPLES, BATCH = 11, 6, 2, 2, 3, 10, 4

STACKED_KERNEL = Weight("kernel", ("layers", "width", "heads"))
STACKED_BIAS = Weight("bias", ("layers", "heads"))


def weights_of() -> dict[str, Weight]:
    """Metadata of the tiny model, in its order."""
    return {
        "embeddings.word.embedding": Weight("embedding", ("vocab", "width"), 0),
        "encoder.layers.query.kernel": STACKED_KERNEL,
        "encoder.layers.query.bias": STACKED_BIAS,
        "encoder.layers.value.kernel": STACKED_KERNEL,
        "encoder.layers.norm.scale": Weight("norm", ("layers", "vector")),
        "pooler.kernel": Weight("kernel", ("width", "width"), LAYERS + 1),
        "pooler.bias": Weight("bias", ("vector",), LAYERS + 1),
        "classifier.kernel": Weight("head", ("width", "classes"), LAYERS + 1),
        "classifier.bias": Weight("head", ("classes",), LAYERS + 1),
    }


def shapes_of(num_labels: int = 3, width: int = WIDTH) -> dict[str, jax.ShapeDtypeStruct]:
    """Of the tiny model's weights."""
    sizes = {"layers": LAYERS, "vocab": VOCAB, "classes": num_labels}
    return {
        path: jax.ShapeDtypeStruct(tuple(sizes.get(axis, width) for axis in weight.axes), jnp.float32)
        for path, weight in weights_of().items()
    }


def tiny_model(*, dropout: float = 0.1, dtype: Any = jnp.float32) -> Model:
    """Two scanned gated layers over embeddings, a pooler and a head; all of the roles, in a few hundred weights."""

    def drop(x, key):
        if key is None or dropout == 0:
            return x
        return jnp.where(jax.random.bernoulli(key, 1 - dropout, x.shape), x / (1 - dropout), 0).astype(x.dtype)

    def embed(params, batch):
        return params["embeddings.word.embedding"][batch["input_ids"]].astype(dtype)

    def features(params, embedded, batch, *, key=None, reverse_only=False):
        del batch, reverse_only
        prefix = "encoder.layers."
        stacked = {path.removeprefix(prefix): w for path, w in params.items() if path.startswith(prefix)}
        keys = jax.random.split(jax.random.key(0) if key is None else key, LAYERS)

        def layer(x, per_layer):
            w, layer_key = {path: w.astype(dtype) for path, w in materialise(per_layer[0]).items()}, per_layer[1]
            gate = jnp.tanh(jnp.einsum("btd,de->bte", x, w["query.kernel"]) + w["query.bias"][None, None])
            value = jnp.einsum("btd,de->bte", x, w["value.kernel"])
            x = x + drop(gate * value, None if key is None else layer_key)
            return x * w["norm.scale"][None, None], None

        x, _ = jax.lax.scan(layer, embedded, (stacked, keys))
        pooled = x.mean(1).astype(jnp.float32)
        return jnp.tanh(pooled @ params["pooler.kernel"] + params["pooler.bias"][None])

    def logits(params, features, *, key=None):
        return drop(features, key) @ params["classifier.kernel"] + params["classifier.bias"][None]

    return Model(embed, features, logits, weights_of(), num_heads=HEADS)


def pretrained_weights(num_labels: int = 3, seed: int = 0) -> dict[str, jax.Array]:
    """Random weights, large enough that no gradient is tiny."""
    rng = np.random.default_rng(seed)
    return {
        path: jnp.asarray(rng.normal(0, 0.7, spec.shape) + (path.endswith("scale")), spec.dtype)
        for path, spec in shapes_of(num_labels).items()
    }


def training_set(num_labels: int = 3) -> dict[str, jax.Array]:
    """Ten random texts of three tokens."""
    rng = np.random.default_rng(5)
    labels = rng.normal(size=EXAMPLES) if num_labels == 1 else rng.integers(0, num_labels, EXAMPLES)
    return {
        "input_ids": jnp.asarray(rng.integers(0, VOCAB, (EXAMPLES, TOKENS)), jnp.int32),
        "labels": jnp.asarray(labels, jnp.float32 if num_labels == 1 else jnp.int32),
    }


def setup_of(
    *,
    model: Model | None = None,
    num_labels: int = 3,
    frozen: tuple[str, ...] = (),
    epochs: int = 2,
    accumulate: int = 1,
    batch_size: int = BATCH,
    **optimizer: Any,
) -> Setup:
    """Of a run on the tiny model; the rates are large, so that a few steps show a difference."""
    model = tiny_model() if model is None else model
    kind = "regression" if num_labels == 1 else "classification"

    def loss(*, reverse_only=False):
        return batch_loss(model.apply, kind, reverse_only=reverse_only)

    return Setup(
        model=model,
        loss=loss,
        criterion=loss().criterion,
        kind=kind,
        shapes=shapes_of(num_labels),
        frozen=frozen,
        finetune=Finetune.model_validate(
            {"epochs": epochs, "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.1, **optimizer}}
        ),
        batch_size=batch_size,
        num_examples=EXAMPLES,
        rng=lambda use: np.random.default_rng(zlib.crc32(use.encode())),
        accumulate=accumulate,
        # What a method reads beside the training set may as well be of it.
        rows={"development": range(EXAMPLES - 5, EXAMPLES)},
        labels=np.asarray(training_set(num_labels)["labels"]),
        pair=True,
    )


class Trained(NamedTuple):
    """What a run leaves."""

    learnt: dict[str, Any]
    weights: dict[str, jax.Array]
    """Merged."""
    infos: dict[str, dict[str, np.ndarray]]
    """By phase: every entry of the steps' infos, ``[steps]`` (or ``[steps, members]``)."""

    @property
    def losses(self) -> np.ndarray:
        """Of the last phase."""
        return list(self.infos.values())[-1]["loss"]


def batch_of(data, rows, key):
    """As the engine cuts batches: padding is row 0 with weight 0."""
    real = rows >= 0
    batch = {name: column[jnp.where(real, rows, 0)] for name, column in data.items()}
    keys = jax.random.split(key, rows.shape[:-1]) if rows.ndim > 1 else key
    return {**batch, "weight": real.astype(jnp.float32) * batch.get("weight", 1), "key": keys}


def phase_key(key, name: str):
    """Of the seed and the phase's name alone."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)


def abstract_step(phase, variables, *, tokens: int = TOKENS, width: int = WIDTH) -> tuple:
    """Arguments of a phase's step as shapes: state, context, batches, key and number of the step."""
    spec, key = jax.ShapeDtypeStruct, jax.eval_shape(lambda: jax.random.key(0))
    columns = {"input_ids": ((tokens,), jnp.int32), "labels": ((), jnp.int32)}
    batches = {}
    for name, plan in phase.plan.items():
        rows = plan.shape[1:]
        batches[name] = {column: spec((*rows, *shape), dtype) for column, (shape, dtype) in columns.items()}
        batches[name] |= {"weight": spec(rows, jnp.float32), "key": spec(rows[:-1], key.dtype)}
    context = Context(shapes_of(width=width), variables, variables)
    return jax.eval_shape(phase.start, context, key), context, batches, key, spec((), jnp.int32)


def trace_step(phase, variables) -> tuple:
    """Shapes of a phase's state before and after a step."""
    arguments = abstract_step(phase, variables)
    return arguments[0], jax.eval_shape(phase.step, *arguments)[0]


class Runner:
    """Runs all phases of a method; a step is traced once for all of its steps and runs, and its state donated.

    With `members`, what is run has a leading axis of seeds and every function is mapped over it.
    """

    def __init__(self, method: Method, *, data=None, members: bool = False):
        chex.clear_trace_counter()
        self._method, self._data = method, training_set() if data is None else data
        self._lift = jax.vmap if members else (lambda fn: fn)
        self._compiled: dict[Any, Any] = {}

    def run(self, pretrained, key, *, max_steps: int | None = None) -> Trained:
        """The method's run from these weights, its chance from this key."""
        initial = learnt = self._call(self._method.init, pretrained, key)
        infos: dict[str, Any] = {}
        for stage in self._method.stages:
            before, states = learnt, []
            for phase in stage:
                context = Context(pretrained, initial, before)
                own_key = self._lift(partial(phase_key, name=phase.name))(key)
                state, infos[phase.name] = self._run_phase(phase, context, own_key, max_steps)
                states.append(state)
            for phase, state in zip(stage, states, strict=True):
                learnt = self._call(phase.finish, Context(pretrained, initial, learnt), state)
        return Trained(learnt, self._call(self._method.merge, pretrained, learnt), infos)

    def _run_phase(self, phase, context, own_key, max_steps):
        # Copied, because the state is donated and its leaves may be those of the context.
        state = jax.tree.map(jnp.copy, self._call(phase.start, context, own_key))
        specs = jax.eval_shape(lambda: state)
        infos = []
        for index in range(phase.num_steps)[:max_steps]:
            rows = {name: plan[index] for name, plan in phase.plan.items()}
            state, info = self._step(phase)(state, context, own_key, rows, np.int32(index))
            infos.append(info)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, specs)
        return state, jax.tree.map(lambda *x: np.stack(x), *infos)

    def _call(self, fn, *args):
        if fn not in self._compiled:
            self._compiled[fn] = jax.jit(self._lift(fn))
        return self._compiled[fn](*args)

    def _step(self, phase):
        if phase.step in self._compiled:
            return self._compiled[phase.step]

        def step(state, context, own_key, rows, index):
            def alone(state, context, own_key):
                step_key, dropout_key = jax.random.split(jax.random.fold_in(own_key, index))
                named = zip(rows.items(), jax.random.split(dropout_key, len(rows)), strict=True)
                batches = {name: batch_of(self._data, row, row_key) for (name, row), row_key in named}
                return phase.step(state, context, batches, step_key, index)

            return self._lift(alone)(state, context, own_key)

        step.__name__ = f"step_{len(self._compiled)}"  # chex counts by name
        self._compiled[phase.step] = jax.jit(chex.assert_max_traces(step, n=1), donate_argnums=0)
        return self._compiled[phase.step]


def run(method: Method, pretrained, key, **options: Any) -> Trained:
    """One run of a method; options as of `Runner`."""
    return Runner(method, **options).run(pretrained, key)
