"""Where every array lies on a mesh, what devices hold and exchange, and that a step on it is the same step."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from agwm_jax import LowRank
from agwm_jax.engine.sharding import (
    Placement,
    bytes_per_device,
    check_model,
    gather_to_main,
    make_placement,
    place,
)
from agwm_jax.errors import AgwmError
from tests.core.problems import ALL
from tests.engine.meshes import (
    POSITIONS,
    VOCABULARY,
    B,
    D,
    F,
    L,
    T,
    assert_equal,
    attention,
    bert,
    on_mesh,
    on_one_device,
)

KINDS = ("attention_output", "intermediate", "key", "output", "query", "value")
KERNELS = [f"encoder.layers.{kind}.kernel" for kind in KINDS]


def placement(data=1, model=1, *, seed=1, fully_sharded=False) -> Placement:
    return make_placement(seed=seed, data=data, model=model, fully_sharded=fully_sharded)


# --- the same step ---------------------------------------------------------------------------------------------------


@functools.cache
def alone(name):
    return on_one_device(bert(rollback=name == "unrolled"), ALL[name])[0]


@functools.cache
def sharded(name, data, model, fully_sharded):
    """Cached, for some tests look at its numbers and others at its program."""
    search, mesh = bert(rollback=name == "unrolled"), {"data": data, "model": model, "fully_sharded": fully_sharded}
    return on_mesh(search, ALL[name], **mesh)[0]


@pytest.mark.parametrize(
    ("name", "data", "model", "fully_sharded"),
    [
        ("first_order", 2, 4, False),
        ("first_order", 1, 8, False),
        ("first_order", 8, 1, True),
        ("unrolled", 8, 1, True),
        ("unrolled", 4, 2, True),
    ],
)
def test_a_step_of_bert_is_the_single_device_step(name, data, model, fully_sharded):
    assert_equal(sharded(name, data, model, fully_sharded), alone(name))


def test_a_step_of_bert_moves_all_that_is_compared():
    before, after = bert().start(ALL["unrolled"], 0), alone("unrolled").state
    for path, x in before.inner.params.items():
        if path != "encoder.layers.key.bias":  # the softmax does not feel it: its gradient is rounding
            assert np.abs(x - after.inner.params[path]).max() > 1e-4, path
    for path, x in before.outer.items():
        assert np.abs(x.left - after.outer[path].left).max() > 1e-4, path
        assert np.abs(x.right - after.outer[path].right).max() > 1e-4, path


def test_lanes_on_a_mesh_of_all_axes_equal_the_lanes_one_by_one():
    one_by_one = on_one_device(attention(), ALL["unrolled"], lanes=2)
    assert abs(one_by_one[0].infos[0]["outer_loss"] - one_by_one[1].infos[0]["outer_loss"]) > 1e-2
    together = on_mesh(attention(), ALL["unrolled"], seed=2, data=2, model=2)
    for found, expected in zip(together, one_by_one, strict=True):
        assert_equal(found, expected)


# --- what devices exchange -------------------------------------------------------------------------------------------

LAYER_KERNELS = {(D, D), (D, F)}
STACKED_KERNELS = {(L, *kernel) for kernel in LAYER_KERNELS}
TABLES = {(D, VOCABULARY), (POSITIONS, D)}  # the third has two rows, fewer than a lookup of any batch


def shapes_in(program, operation=r"[\w-]+"):
    """Shapes that operations of a program produce: axes of one entry left out, the others in order of size."""
    found = set()
    for line in program.splitlines():
        if result := re.search(rf" = (.*?) {operation}\(", line):
            for dims in re.findall(r"\w+\[([\d,]*)\]", result[1]):
                found.add(tuple(sorted(int(n) for n in dims.split(",") if n and n != "1")))
    return found


GATHER = "all-gather(?:-start)?"


def test_shapes_are_read_from_a_program():
    program = """
        %a = f32[1,48,32]{1,2,0} all-gather(%x), channel_id=1, dimensions={1}
        %b = (f32[4,32]{1,0}, f32[32,32]{1,0}) all-gather-start(f32[4,32]{1,0} %y), channel_id=2
        ROOT %c = (f32[5]{0}, s32[]) all-gather(%u, %v), channel_id=3
        %all-gather.1 = f32[7,9]{1,0} all-reduce(%a), channel_id=4
    """
    assert shapes_in(program, GATHER) == {(32, 48), (4, 32), (32, 32), (5,), ()}
    assert shapes_in(program) == shapes_in(program, GATHER) | {(7, 9)}


@pytest.mark.parametrize("name", ["first_order", "unrolled"])
def test_fully_sharded_weights_are_gathered_layer_by_layer(name):
    program = sharded(name, 8, 1, True).program
    gathered = shapes_in(program, GATHER)
    assert gathered >= LAYER_KERNELS
    assert not gathered & (STACKED_KERNELS | TABLES)
    # Nor do the examples of all devices come to a part of the weights.
    assert not [shape for shape in gathered if np.prod(shape) > D * F]
    assert not shapes_in(program) & (STACKED_KERNELS | TABLES), "however it came there"


def test_a_model_cut_over_devices_gathers_nothing_of_a_weights_size():
    gathered = shapes_in(sharded("first_order", 1, 8, False).program, GATHER)
    assert not [shape for shape in gathered if np.prod(shape) >= D * D]


# --- what devices hold -----------------------------------------------------------------------------------------------


def state_on(placement, name="conjugate_gradient warm"):
    """A state of a search whose estimator carries a tree of weights too."""
    state = bert().start(ALL[name], 0)
    return place(state, placement.of_tree(state, bert().weights, bert().shapes))


def held(x):
    """Bytes of an array on each device, and that all devices hold as many."""
    sizes = {shard.data.nbytes for shard in x.addressable_shards}
    assert len(x.addressable_shards) == x.sharding.mesh.size
    assert len(sizes) == 1
    return sizes.pop()


def trees_of_weights(state):
    (moments, *_), carried = state.inner.opt_state, state.estimator
    return {"weights": state.inner.params, "mu": moments.mu, "nu": moments.nu, "carried by the estimator": carried}


@pytest.mark.parametrize(("data", "model", "fully_sharded"), [(8, 1, False), (1, 8, False), (8, 1, True), (4, 2, True)])
def test_kernels_and_all_that_optimisers_keep_of_them_shrink_with_the_mesh(data, model, fully_sharded):
    state = state_on(placement(data, model, fully_sharded=fully_sharded))
    data = data if fully_sharded else 1
    for name, tree in trees_of_weights(state).items():
        for path in KERNELS:
            assert held(tree[path]) * data * model == tree[path].nbytes, (name, path)
        for path in (
            "pooler.kernel",
            *(f"embeddings.{table}.embedding" for table in ("word", "position", "token_type")),
        ):
            assert held(tree[path]) * data == tree[path].nbytes, (name, path)
    gates = {"alpha": state.outer, "its momentum": state.outer_opt_state[0].trace}
    for name, tree in gates.items():
        for path in KERNELS:
            columns = not path.endswith("output.kernel")
            inputs, outputs = (data, model) if columns else (model, data)
            assert held(tree[path].left) * inputs == tree[path].left.nbytes, (name, path)
            assert held(tree[path].right) * outputs == tree[path].right.nbytes, (name, path)
    for leaf in (state.inner.opt_state[0].count, state.inner.params["classifier.bias"]):
        assert leaf.sharding.is_fully_replicated
        assert held(leaf) == leaf.nbytes


def test_a_state_takes_less_of_each_device_on_a_larger_mesh():
    everywhere = state_on(placement(8, 1))
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(everywhere))
    whole = bytes_per_device(everywhere)
    for where, most in ((placement(1, 8), 0.35), (placement(8, 1, fully_sharded=True), 0.2)):
        state = state_on(where)
        assert sum(held(x) for x in jax.tree.leaves(state)) == bytes_per_device(state) < most * whole


def test_bytes_of_shapes_are_those_of_arrays():
    where = placement(4, 2, fully_sharded=True)
    state = state_on(where)
    shapes = jax.eval_shape(lambda: bert().start(ALL["conjugate_gradient warm"], 0))
    shardings = where.of_tree(shapes, bert().weights, bert().shapes)
    assert bytes_per_device(shapes, shardings) == bytes_per_device(state)
    one = jax.ShapeDtypeStruct((4, 6), jnp.bfloat16)
    assert bytes_per_device([one], [where.of_batch((4, 6))]) == 6 * 2


# --- where arrays lie ------------------------------------------------------------------------------------------------

BY_WIDTH, WHOLE = (None, "data"), (None,)
COLUMNS, ROWS = (None, "data", "model"), (None, "model", "data")
EXPECTED = {
    "classifier.bias": WHOLE,
    "classifier.kernel": ("data", None),
    "embeddings.norm.bias": WHOLE,
    "embeddings.norm.scale": WHOLE,
    "embeddings.position.embedding": BY_WIDTH,
    "embeddings.token_type.embedding": BY_WIDTH,
    "embeddings.word.embedding": BY_WIDTH,
    "encoder.layers.attention_norm.bias": (None, None),
    "encoder.layers.attention_norm.scale": (None, None),
    "encoder.layers.attention_output.bias": (None, None),
    "encoder.layers.attention_output.kernel": ROWS,
    "encoder.layers.intermediate.bias": (None, "model"),
    "encoder.layers.intermediate.kernel": COLUMNS,
    "encoder.layers.key.bias": (None, "model"),
    "encoder.layers.key.kernel": COLUMNS,
    "encoder.layers.output.bias": (None, None),
    "encoder.layers.output.kernel": ROWS,
    "encoder.layers.output_norm.bias": (None, None),
    "encoder.layers.output_norm.scale": (None, None),
    "encoder.layers.query.bias": (None, "model"),
    "encoder.layers.query.kernel": COLUMNS,
    "encoder.layers.value.bias": (None, "model"),
    "encoder.layers.value.kernel": COLUMNS,
    "pooler.bias": WHOLE,
    "pooler.kernel": ("data", None),
}
"""Of every weight where weights are fully sharded; else they are whole over `data`."""


@pytest.mark.parametrize("fully_sharded", [False, True])
def test_every_weight_of_a_classifier_has_its_place(fully_sharded):
    where = placement(2, 4, fully_sharded=fully_sharded)
    kept = {"model", "data"} if fully_sharded else {"model"}
    expected = {path: tuple(axis if axis in kept else None for axis in spec) for path, spec in EXPECTED.items()}
    assert {
        path: where.of_weight(bert().weights[path].axes, shape) for path, shape in bert().shapes.items()
    } == expected


def test_an_axis_without_a_rule_or_that_the_mesh_does_not_divide_lies_whole():
    where = placement(4, 2, fully_sharded=True)
    assert where.of_weight(("layers", "vector"), (8, 8)) == (None, None)
    assert where.of_weight(("vocab", "width"), (8, 30)) == (None, None)
    assert where.of_weight(("layers", "width", "heads"), (3, 30, 8)) == (None, None, "model")
    assert where.of_weight(("width", "width"), (8, 8)) == ("data", None), "no mesh axis twice"
    assert where.of_weight(("unheard", "mlp"), (8, 8)) == (None, "model")


def specs(placement, tree, lanes=False):
    shardings = placement.of_tree(tree, bert().weights, bert().shapes, lanes)
    assert all(x.mesh == placement.mesh for x in jax.tree.leaves(shardings))
    return jax.tree.map(lambda x: x.spec, shardings)


def test_a_leaf_belongs_to_the_innermost_weight_on_the_way_to_it():
    where = placement(4, 2, fully_sharded=True)
    kernel, gates = jnp.zeros((L, F, D)), LowRank(jnp.zeros((L, F, 2)), jnp.zeros((L, 2, D)))
    path = "encoder.layers.output.kernel"
    tree = {
        "pooler.kernel": {path: kernel},
        "unknown": {"nested": [{path: gates}]},
        "gate": {path: (kernel,)},
        "several": {path: jnp.zeros((3, L, F, D))},
        "other shape": {path: jnp.zeros(F)},
        "low rank": {path: {"a": jnp.zeros((L, F, 4)), "b": jnp.zeros((L, 4, D))}},
        "count": jnp.zeros((), jnp.int32),
        "vector": jnp.zeros(8),
    }
    assert specs(where, tree) == {
        "pooler.kernel": {path: PartitionSpec(None, "model", "data")},
        "unknown": {
            "nested": [
                {path: LowRank(PartitionSpec(None, "model", None), PartitionSpec(None, None, "data"))},
            ]
        },
        "gate": {path: (PartitionSpec(None, "model", "data"),)},
        "several": {path: PartitionSpec(None, None, "model", "data")},
        "other shape": {path: PartitionSpec(None)},
        "low rank": {
            path: {"a": PartitionSpec(None, "model", None), "b": PartitionSpec(None, None, "data")},
        },
        "count": PartitionSpec(),
        "vector": PartitionSpec(None),
    }


def test_lanes_lie_along_the_axis_of_seeds():
    where = placement(2, 2, seed=2)
    kernel, path = jnp.zeros((2, L, D, D)), "encoder.layers.query.kernel"
    gates = LowRank(jnp.zeros((2, L, D, 1)), jnp.zeros((2, L, 1, D)))
    assert specs(where, {path: kernel, "count": jnp.zeros(2)}, lanes=True) == {
        path: PartitionSpec("seed", None, None, "model"),
        "count": PartitionSpec("seed"),
    }
    assert specs(where, {path: gates}, lanes=True)[path] == (
        PartitionSpec("seed", None, None, None),
        PartitionSpec("seed", None, None, "model"),
    )
    some = {path: kernel[0], "count": jnp.zeros(2)}
    assert specs(where, some, lanes={path: False, "count": True}) == {
        path: PartitionSpec(None, None, "model"),
        "count": PartitionSpec("seed"),
    }


def test_batches_and_their_rows_are_cut_over_data():
    where = placement(4, 2)
    assert where.of_rows(3).spec == PartitionSpec("seed", None, "data")
    assert where.of_rows(4).spec == PartitionSpec("seed", None, None, "data")
    assert where.of_batch((8, T)).spec == PartitionSpec("data")
    assert where.of_batch((6, T)).spec == PartitionSpec(None)
    assert where.replicated.spec == PartitionSpec()


def test_arrays_go_to_the_devices_and_come_back():
    where = placement(2, 2, seed=2, fully_sharded=True)
    rng = np.random.default_rng(0)
    tree = {
        "encoder.layers.query.kernel": rng.normal(size=(2, L, D, D)).astype(np.float32),
        "ids": rng.integers(0, 9, (2, 5)).astype(np.int32),
        "flags": np.array([True, False]),
        "halves": jnp.asarray(rng.normal(size=(2, 3)), jnp.bfloat16),
        "counts": np.arange(2, dtype=np.uint32),
    }
    placed = place(tree, where.of_tree(tree, bert().weights, bert().shapes, lanes=True))
    assert placed["encoder.layers.query.kernel"].addressable_shards[0].data.shape == (1, L, D // 2, D // 2)
    assert {len(x.addressable_shards) for x in jax.tree.leaves(placed)} == {8}
    back = gather_to_main(placed, where)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(back))
    for name, x in tree.items():
        assert back[name].dtype == x.dtype
        np.testing.assert_array_equal(back[name], x)


def test_only_the_main_process_gets_the_arrays(monkeypatch):
    where = placement(8, 1)
    placed = place(np.arange(8), where.of_batch((8,)))
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert gather_to_main(placed, where) is None


# --- meshes ----------------------------------------------------------------------------------------------------------


def test_a_mesh_takes_the_first_devices_or_all():
    assert dict(placement(2, 2).mesh.shape) == {"seed": 1, "data": 2, "model": 2}
    assert list(placement(2, 2).mesh.devices.flat) == jax.devices()[:4]
    assert dict(placement("all", 2, seed=2).mesh.shape) == {"seed": 2, "data": 2, "model": 2}
    assert dict(placement("all").mesh.shape) == {"seed": 1, "data": 8, "model": 1}


def test_a_mesh_is_described_by_its_axes():
    assert placement().describe() == placement(fully_sharded=True).describe() == ""
    assert placement(4, 2).describe() == "data 4 x model 2"
    assert placement(2, 2, seed=2, fully_sharded=True).describe() == "seed 2 x data 2 x model 2, fully sharded"


def refusal(call, *args, **kwargs):
    """The message, which is one sentence."""
    with pytest.raises(AgwmError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert message.endswith(".")
    assert ". " not in message
    return message


def test_a_mesh_of_more_devices_than_there_are_is_refused():
    assert refusal(placement, 8, 2) == (
        "mesh: seed 1 x data 8 x model 2 needs 16 devices, 8 here: lower one, or say mesh.data all; on a CPU, "
        "XLA_FLAGS=--xla_force_host_platform_device_count=16 makes as many out of one."
    )


@pytest.mark.parametrize(("seed", "model"), [(3, 1), (1, 5), (2, 8)])
def test_axes_that_do_not_divide_the_devices_are_refused_where_data_takes_the_rest(seed, model):
    assert refusal(placement, "all", model, seed=seed) == (
        f"mesh: seed {seed} x model {model} does not divide the 8 devices here; choose numbers whose product divides 8."
    )


def test_a_mesh_of_some_devices_of_several_processes_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert refusal(placement, 2, 2) == (
        "mesh: seed 1 x data 2 x model 2 takes 4 devices of the 8 of 2 processes: a run over several processes takes "
        "all; say mesh.data all."
    )
    assert placement(4, 2).mesh.size == 8


def test_a_model_or_batch_that_the_mesh_does_not_divide_is_refused():
    where, weights = placement(2, 4), {path: bert().weights[path] for path in KERNELS}
    shapes = {path: bert().shapes[path] for path in KERNELS}
    check_model(where, weights, shapes, batch_size=6)
    odd = {**shapes, KERNELS[1]: (L, D, 42)}
    assert refusal(check_model, where, weights, odd, batch_size=6) == (
        "mesh.model 4 does not divide the model's axis mlp (42 in encoder.layers.intermediate.kernel): choose one of "
        "1, 2."
    )
    assert refusal(check_model, where, weights, shapes, batch_size=5) == (
        "mesh.data 2 does not divide data.batch_size 5: choose a batch of 6, or a mesh.data that divides 5."
    )


def test_shapes_of_these_tests_cannot_be_taken_for_another():
    assert len({L, B, T, D, F, VOCABULARY, POSITIONS}) == 7
