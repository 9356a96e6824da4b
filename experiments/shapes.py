"""Models, states and compiled lanes of shapes alone: what is asked about memory needs no weights and no data."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from agwm_jax.core.partition import Partition, Structure, partition
from agwm_jax.data.encode import Encoded
from agwm_jax.data.tasks import Task
from agwm_jax.engine.lanes import Group, Lanes, Member, Program, Stacked, rounds
from agwm_jax.engine.sharding import Placement, place
from agwm_jax.methods.interface import Weights
from agwm_jax.models.bert import BertClassifier, BertConfig
from agwm_jax.models.functional import functionalize
from agwm_jax.models.huggingface import Pretrained
from agwm_jax.runs.build import Built, build_method
from agwm_jax.settings.config import Config

TASK = Task("shapes", "classification", ("no", "yes"), False, ("accuracy",), "validation", {})


class Compiled(NamedTuple):
    """The lanes of one phase, compiled."""

    lanes: Lanes
    state: Any
    """Shapes, with their placement."""
    program: Program

    @property
    def temporaries(self) -> int:
        """Bytes on one device, as the compiler counts them."""
        return self.program.advance.memory_analysis().temp_size_in_bytes  # type: ignore[attr-defined]


def bert(layers: int, width: int, heads: int, inner: int, *, vocabulary: int = 30522, length: int = 512) -> BertConfig:
    """A BERT of the usual dropout."""
    return BertConfig(vocabulary, width, layers, heads, inner, max_position_embeddings=length)


def build_shapes(config: Config, model: BertConfig, *, length: int) -> Built:
    """As `agwm_jax.runs.build.build`, of shapes; texts of `length` tokens, just enough for a batch of either split."""
    options = config.model

    def module() -> BertClassifier:
        dtype = jnp.dtype(options.dtype)
        rate = model.with_dropout(options.dropout)
        return BertClassifier(rate, num_labels=2, dtype=dtype, unroll=options.unroll_layers, rngs=nnx.Rngs(0))

    apply, params = functionalize(nnx.eval_shape(module))
    mixed: tuple[str, ...] = ()

    def split(params):
        nonlocal mixed
        parts = partition(params, mixed=config.mixup.mixed, frozen=config.mixup.frozen)
        mixed = parts.mixed
        return parts.frozen, parts.task

    frozen, task = jax.eval_shape(split, params)
    pretrained = Pretrained(apply, params, None, model, TASK.label_names, "cls", True, {}, "shapes")
    examples = 5 * config.data.batch_size
    method = build_method(config, TASK, pretrained, mixed, num_examples=examples)
    parts = Partition(frozen, task, mixed, Structure(None, (), {}))
    alpha = jax.eval_shape(lambda key: method.init_alpha(key, parts), jax.random.key(0))
    ids, labels = np.zeros((examples, length), np.int32), np.zeros(examples, np.int32)
    encoded = {"train": Encoded(ids, ids, np.ones_like(ids), labels)}
    return Built(TASK, encoded, {}, pretrained, method, frozen, Weights(task, alpha), jax.random.key(0))


def compile_phase(built: Built, placement: Placement, *, number: int = 0, seeds: int = 1, splits: int = 1) -> Compiled:
    """The phase of a round, for seeds (and, of its first round, splits) side by side; what differs by seed is alpha."""
    with jax.set_mesh(placement.mesh):
        group = _group(built, placement, seeds)
        round_ = rounds(built.method, together=splits > 1)[number]
        carry = jax.tree.map(lambda x: jax.ShapeDtypeStruct((seeds, *x.shape), x.dtype), built.initial)
        lanes = Lanes(group, round_, carry if number else None)
        where = placement.of_tree(lanes.state_shape, group.weights, lanes=True)
        state = _shapes(lanes.state_shape, where)
        return Compiled(lanes, state, lanes.compile(state, 1))


def _group(built: Built, placement: Placement, seeds: int) -> Group:
    data = dict(built.encoded["train"]._asdict())
    members = [Member(i, built.method, built.frozen, built.initial, data, built.key) for i in range(seeds)]
    weights = {path: x.shape for path, x in (*built.frozen.items(), *built.initial.task.items())}

    def put(tree, own) -> Stacked:
        stacked = jax.tree.map(
            lambda x, o: jax.ShapeDtypeStruct((seeds, *x.shape) if o else x.shape, x.dtype), tree, own
        )
        return Stacked(_shapes(stacked, placement.of_tree(stacked, weights, own)), own)

    shared = jax.tree.map(lambda _: False, built.frozen)
    own = Weights(*(jax.tree.map(lambda _, o=o: o, tree) for tree, o in zip(built.initial, (False, True), strict=True)))
    columns = place(data, jax.tree.map(lambda _: placement.replicated, data))
    return Group(members, placement, weights, put(built.frozen, shared), put(built.initial, own), columns, (0,) * seeds)


def _shapes(tree, shardings):
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
