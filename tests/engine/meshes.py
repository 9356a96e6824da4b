"""A small BERT in a bi-level search: on one device, and on any mesh as the engine lays it there."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from agwm_jax import bilevel, init_alpha, mixup_problem, partition, project_alpha
from agwm_jax.engine.batches import step_batches
from agwm_jax.engine.group import each_lane
from agwm_jax.engine.sharding import make_placement, place
from agwm_jax.models.bert import BertConfig
from agwm_jax.models.family import FAMILIES, build_model
from agwm_jax.models.layers import dropout
from agwm_jax.models.loss import batch_loss
from agwm_jax.models.weights import of_role

# All different, so that a shape in a compiled program says what it is; what a mesh cuts is a multiple of 8.
L, B, T, D, F, VOCABULARY, POSITIONS = 3, 8, 12, 32, 48, 104, 24
H = 8
CONFIG = BertConfig(
    vocab_size=VOCABULARY,
    hidden_size=D,
    num_hidden_layers=L,
    num_attention_heads=H,
    intermediate_size=F,
    max_position_embeddings=POSITIONS,
).with_dropout(0.1)
STEPS, EXAMPLES = 2, 20


class Search(NamedTuple):
    """A model, and which of its weights are searched how."""

    apply: Any
    weights: Any
    """What is known of each weight."""
    pretrained: Any
    mixed: tuple[str, ...]
    frozen: tuple[str, ...] | None = None
    inner_steps: int = 1
    rollback: bool = False

    @property
    def shapes(self):
        return {path: x.shape for path, x in self.pretrained.items()}

    def partition(self, pretrained):
        return partition(pretrained, mixed=self.mixed, frozen=self.frozen)

    def solver(self, pretrained, estimator):
        loss = batch_loss(self.apply, "classification")
        return bilevel(
            mixup_problem(loss, self.partition(pretrained), anchor=0.1),
            estimator,
            inner_tx=optax.adamw(1e-2, eps_root=1e-6),  # else Adam's first step is the sign of a gradient of rounding
            outer_tx=optax.sgd(0.1, momentum=0.0),  # whose state is the hypergradient
            project=project_alpha,
            rollback=self.rollback,
        )

    def start(self, estimator, lane):
        """A state of the host; lanes differ in task weights and alpha."""
        rng, parts = np.random.default_rng(lane), self.partition(self.pretrained)
        task = {path: x + 0.05 * rng.normal(size=x.shape).astype(np.float32) for path, x in parts.task.items()}
        alpha = init_alpha(jax.random.key(lane), parts, noise=0.1)
        return self.solver(self.pretrained, estimator).init(task, alpha)

    def step(self, estimator):
        def step(state, pretrained, data, rows, key, step):
            own = jax.random.fold_in(jax.random.wrap_key_data(key), step)
            batches = step_batches(data, rows, own, step)
            return self.solver(pretrained, estimator).step(state, batches["inner"], batches["outer"])

        return step

    def rows(self, lane):
        """Rows of every step's batches; the last batch of all is short."""
        rng = np.random.default_rng(100 + lane)
        inner = [rng.permutation(EXAMPLES)[:B] for _ in range(STEPS * self.inner_steps)]
        outer = np.stack([rng.permutation(EXAMPLES)[:B] for _ in range(STEPS)])
        outer[-1, -3:] = -1
        inner = np.stack(inner).reshape(STEPS, self.inner_steps, B)
        return {"inner": inner.astype(np.int32), "outer": outer.astype(np.int32)}


def _weights(shapes):
    """Large enough that attention is far from even."""
    rng = np.random.default_rng(1)
    noise = {path: 0.2 * rng.normal(size=shape) for path, shape in sorted(shapes.items())}
    return {path: jnp.asarray(x + path.endswith("scale"), jnp.float32) for path, x in noise.items()}


@functools.cache
def bert(*, rollback: bool = False) -> Search:
    """The model of real runs; all of its weights are trained, and dropout is everywhere."""
    model, shapes = build_model(FAMILIES["bert"].value(), CONFIG, num_labels=2)
    pretrained = _weights({path: x.shape for path, x in shapes.items()})
    return Search(model.apply, model.weights, pretrained, of_role(model.weights, "kernel"), rollback=rollback)


@functools.cache
def attention(*, inner_steps: int = 1, rollback: bool = False) -> Search:
    """The least that has heads: it compiles in a third of the time of `bert`."""

    def apply(params, batch, *, key):
        query, output = (params[f"encoder.layers.{name}.kernel"] for name in ("query", "attention_output"))
        x = params["embeddings.word.embedding"][batch["input_ids"]]

        def layer(x, weights):
            query, output, key = weights
            heads = (x @ query).reshape(*x.shape[:2], H, D // H)
            scores = jnp.einsum("bqhe,bkhe->bhqk", heads, heads)
            scores = jnp.where(batch["attention_mask"][:, None, None] != 0, scores, -1e9)
            kept = dropout(jax.nn.softmax(scores, axis=-1), 0.1, key)
            return jnp.tanh(x + jnp.einsum("bhqk,bkhe->bqhe", kept, heads).reshape(x.shape) @ output), None

        x = jax.lax.scan(layer, x, (query, output, jax.random.split(key, L)))[0]
        return jnp.tanh(x[:, 0] @ params["pooler.kernel"]) @ params["classifier.kernel"]

    mixed = ("encoder.layers.query.kernel", "encoder.layers.attention_output.kernel", "pooler.kernel")
    table = "embeddings.word.embedding"
    paths = (*mixed, "classifier.kernel", table)
    weights = {path: bert().weights[path] for path in paths}
    pretrained = _weights({path: bert().shapes[path] for path in paths})
    return Search(apply, weights, pretrained, mixed, (table,), inner_steps, rollback)


def examples():
    """A training set of texts of all lengths."""
    rng = np.random.default_rng(0)
    mask = np.arange(T)[None] < rng.integers(4, T + 1, (EXAMPLES, 1))
    return {
        "input_ids": (rng.integers(1, VOCABULARY, mask.shape) * mask).astype(np.int32),
        "token_type_ids": (rng.integers(0, 2, mask.shape) * mask).astype(np.int32),
        "attention_mask": mask.astype(np.int32),
        "labels": rng.integers(0, 2, EXAMPLES).astype(np.int32),
    }


def keys(lanes):
    return np.stack([jax.random.key_data(jax.random.key(7 + lane)) for lane in lanes])


class Result(NamedTuple):
    """The state after the steps and the infos of all of them, on the host."""

    state: Any
    infos: list
    program: str
    """The compiled step, as text."""

    @property
    def hypergradient(self):
        """Of the last step."""
        return self.state.outer_opt_state[0].trace


def compiled(step, arguments, **options):
    return jax.jit(step, **options).lower(*arguments).compile()


def on_one_device(search, estimator, lanes=1) -> list[Result]:
    """The plain step, without a mesh; lanes one by one."""
    program, results = None, []
    for lane in range(lanes):
        state, infos = search.start(estimator, lane), []
        given = search.pretrained, examples(), search.rows(lane), keys([lane])[0]
        program = program or compiled(search.step(estimator), (state, *given, 0))
        for step in range(STEPS):
            state, info = program(state, *given, step)
            infos.append(info)
        results.append(Result(*jax.device_get((state, infos)), program.as_text()))
    return results


def stacked(trees):
    return jax.tree.map(lambda *xs: np.stack([np.asarray(x) for x in xs]), *trees)


def on_mesh(search, estimator, *, seed=1, data=1, model=1, fully_sharded=False) -> list[Result]:
    """One result a lane, of which there are as many as the axis `seed` is long."""
    placement = make_placement(seed=seed, data=data, model=model, fully_sharded=fully_sharded)
    lanes = range(seed)
    state = stacked([search.start(estimator, lane) for lane in lanes])
    rows = stacked([search.rows(lane) for lane in lanes])
    with jax.set_mesh(placement.mesh):
        state = place(state, placement.of_tree(state, search.weights, search.shapes, lanes=True))
        where = placement.of_tree(search.pretrained, search.weights, search.shapes)
        pretrained = place(search.pretrained, where)
        table = place(examples(), jax.tree.map(lambda _: placement.replicated, examples()))
        rows = place(rows, {name: placement.of_rows(x.ndim) for name, x in rows.items()})
        key = place(keys(lanes), NamedSharding(placement.mesh, PartitionSpec("seed")))
        step = each_lane(search.step(estimator), (0, None, None, 0, 0, None), seed)
        shardings = jax.tree.map(lambda x: x.sharding, state)
        program = compiled(
            step,
            (state, pretrained, table, rows, key, 0),
            donate_argnums=0,
            out_shardings=(shardings, placement.replicated),
        )
        infos = []
        for number in range(STEPS):
            state, info = program(state, pretrained, table, rows, key, number)
            infos.append(info)
    state, infos = jax.device_get((state, infos))
    each = [jax.tree.map(lambda x, lane=lane: x[lane], (state, infos)) for lane in lanes]
    return [Result(*one, program.as_text()) for one in each]


TOLERANCE = 1e-5


def assert_equal(found: Result, expected: Result):
    """Losses and weights to 1e-5, the hypergradient to 1e-5 of its norm."""
    assert found.infos[0].keys() == expected.infos[0].keys()
    for ours, theirs in zip(found.infos, expected.infos, strict=True):
        for name in ("inner_loss", "outer_loss", "hypergradient_norm"):
            _close(ours[name], theirs[name], 1, name)
    _all_close(found.hypergradient, expected.hypergradient, expected.infos[-1]["hypergradient_norm"])
    _all_close(found.state.inner.params, expected.state.inner.params, 1)
    _all_close(found.state.outer, expected.state.outer, 1)


def _all_close(found, expected, scale):
    def compare(path, a, b):
        _close(a, b, scale, jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(compare, found, expected)


def _close(found, expected, scale, name):
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE * scale, err_msg=name)
