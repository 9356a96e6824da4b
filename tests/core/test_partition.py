"""The split of weights by path, and its way back to the user's own structure."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from agwm_jax import AgwmError, init_alpha, mix, partition, project_alpha


@dataclasses.dataclass
class Dense:
    """What an Equinox module is to jax: a node whose leaves may be arrays, functions and numbers."""

    weight: jax.Array
    bias: jax.Array | None
    activation: Callable
    groups: int
    name: str


@dataclasses.dataclass
class Stack:
    layers: list[Dense]
    scale: Any


jax.tree_util.register_dataclass(Dense, ["weight", "bias", "activation", "groups"], ["name"])
jax.tree_util.register_dataclass(Stack, ["layers", "scale"], [])


class Flax(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(3, 2, rngs=rngs), nnx.Linear(2, 3, rngs=rngs)])
        self.dropout = nnx.Dropout(0.1, rngs=rngs)


def nested_dict():
    return {
        "encoder": {"dense": {"kernel": jnp.arange(6.0).reshape(3, 2), "bias": jnp.ones(2)}},
        "mlp/~/linear_0": {"w": jnp.full((2, 3), 2.0), "steps": jnp.int32(7)},
    }


def module():
    def layer(name):
        return Dense(jnp.arange(6.0).reshape(3, 2), None, jax.nn.gelu, 2, name)

    return Stack([layer("a"), layer("b")], jnp.ones(3))


def nnx_state():
    return nnx.state(Flax(nnx.Rngs(0)))


STRUCTURES = {
    "nested dict": (nested_dict, r"encoder.*kernel|.*\.w", ("encoder.dense.kernel", "mlp/~/linear_0.w")),
    "nnx state": (nnx_state, r".*kernel", ("layers.0.kernel", "layers.1.kernel")),
    "registered dataclass": (module, r"layers\.\d+\.weight", ("layers.0.weight", "layers.1.weight")),
    "tuple": (lambda: (jnp.ones((2, 2)), [jnp.zeros(3)]), "0", ("0",)),
}


@pytest.mark.parametrize(("make", "pattern", "paths"), STRUCTURES.values(), ids=STRUCTURES)
def test_round_trip_of_any_pytree(make, pattern, paths):
    params = make()
    parts = partition(params, mixed=pattern)
    assert parts.mixed == paths
    assert set(parts.frozen) == set(paths)
    assert set(paths) <= set(parts.task)

    alpha = init_alpha(jax.random.key(0), parts)
    moved = {path: w + 1 for path, w in parts.task.items()}
    zero = jax.tree.map(jnp.zeros_like, alpha)
    for gates, expected in ((zero, {**moved, **parts.frozen}), ({}, moved)):
        rebuilt = mix(parts, moved, gates)
        assert jax.tree.structure(rebuilt) == jax.tree.structure(params)
        again = partition(rebuilt, mixed=pattern).task
        assert again.keys() == expected.keys()
        for path, w in again.items():
            np.testing.assert_array_equal(w, expected[path], err_msg=path)
    # What is no weight comes back as the same object.
    static = [leaf for leaf in jax.tree.leaves(params) if not _is_float(leaf)]
    returned = [leaf for leaf in jax.tree.leaves(rebuilt) if not _is_float(leaf)]
    assert len(static) == len(returned)
    assert all(a is b for a, b in zip(static, returned, strict=True))


def _is_float(leaf):
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def test_a_rebuilt_nnx_state_runs():
    model = Flax(nnx.Rngs(0))
    graph, state = nnx.split(model)
    parts = partition(state, mixed=r".*kernel")
    moved = {path: w + 1 for path, w in parts.task.items()}
    x = jnp.ones((1, 3))
    merged = nnx.merge(graph, mix(parts, moved, {}))
    kernel = model.layers[0].kernel[...]
    np.testing.assert_allclose(merged.layers[0](x), x @ (kernel + 1) + 1, rtol=1e-6)


def test_a_rebuilt_module_keeps_its_functions_and_metadata():
    parts = partition(module(), mixed=r".*weight")
    rebuilt = jax.jit(lambda task: mix(parts, task, {}).layers[1].weight)(parts.task)
    np.testing.assert_array_equal(rebuilt, module().layers[1].weight)
    whole = parts.structure.unflatten(parts.task)
    assert isinstance(whole, Stack)
    assert (whole.layers[0].activation, whole.layers[1].groups, whole.layers[1].name) == (jax.nn.gelu, 2, "b")


def test_roles():
    params = {
        "embed": jnp.ones((4, 2)),
        "kernel": jnp.ones((2, 2)),
        "bias": jnp.ones(2),
        "half": jnp.ones(2, "bfloat16"),
    }
    parts = partition(params, mixed="kernel", frozen="emb.*")
    assert sorted(parts.frozen) == ["embed", "kernel"]
    assert sorted(parts.task) == ["bias", "half", "kernel"]
    assert parts.mixed == ("kernel",)
    assert parts.task["half"].dtype == jnp.bfloat16
    # A pattern must match the whole path.
    with pytest.raises(AgwmError, match="matches none"):
        partition(params, mixed="kern")


def test_donating_the_task_weights_deletes_nothing_of_the_user():
    params = nested_dict()
    parts = partition(params, mixed=r".*kernel")
    step = jax.jit(lambda task: jax.tree.map(lambda w: w + 1, task), donate_argnums=0)
    task = parts.task
    step(step(task))
    assert all(w.is_deleted() for w in task.values())  # else this test shows nothing
    assert not any(w.is_deleted() for w in jax.tree.leaves((parts.frozen, params)))
    np.testing.assert_array_equal(parts.frozen["encoder.dense.kernel"], jnp.arange(6.0).reshape(3, 2))


def test_under_tracing_nothing_is_computed():
    """The program of a loss through the partition has no copy, and none of the weights that the loss leaves alone."""

    def total(weights):
        parts = partition(weights, mixed=("kernel",), frozen="embed")
        return jnp.sum(mix(parts, parts.task, init_alpha(jax.random.key(0), parts, noise=0.0))["bias"])

    weights = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "embed": jnp.ones((4, 2))}
    text = str(jax.make_jaxpr(lambda weights: partition(weights, mixed=("kernel",), frozen="embed").task)(weights))
    assert "copy" not in text
    assert float(jax.jit(total)(weights)) == 2
    shapes = {path: jax.ShapeDtypeStruct(w.shape, w.dtype) for path, w in weights.items()}
    assert partition(shapes, mixed="kernel").mixed == ("kernel",)


@pytest.mark.parametrize(
    ("params", "kwargs", "message"),
    [
        ({"a": {"w": 1.0}, "b": "text"}, {"mixed": ".*"}, "no floating-point array to train"),
        (
            {"dense.kernel": "k"},
            {"mixed": "dense.kernle"},
            r"'dense.kernle' matches none .* whole path, such as 'dense.kernel'",
        ),
        ({"kernel": "k"}, {"mixed": "("}, r"`mixed` = '\(' is not a regular expression: missing \)"),
        ({"kernel": "k"}, {"mixed": "kernel", "frozen": "x"}, "`frozen` = 'x' matches none of the 1 weights"),
        ({"kernel": "k"}, {"mixed": "k.*", "frozen": "kernel"}, "`mixed` and `frozen` both match 'kernel'"),
        ({"w": "b"}, {"mixed": ".*"}, r"`mixed` matches 'w' of shape \(2,\), which is no kernel: .* two axes or more"),
        # Stacked over layers, these have two axes too.
        ({"layers.bias": "k"}, {"mixed": ".*"}, r"`mixed` matches 'layers.bias' of shape \(2, 2\), which is no kernel"),
        (
            {"norm": {"scale": "k"}},
            {"mixed": ".*"},
            "`mixed` matches 'norm.scale' .* only a list of paths may name a bias",
        ),
        ({"kernel": "k", "bias": "b"}, {"mixed": ("bias",)}, "`mixed` matches 'bias' .* is no kernel"),
        ({"kernel": "k"}, {"mixed": ("kernel", "kernal")}, "`mixed` lists 'kernal', which is none of the 1 weights"),
        ({"kernel": "k"}, {"mixed": (), "frozen": ["x"]}, "`frozen` lists 'x', which is none of the 1 weights"),
        ({"a.b": "k", "a": {"b": "k"}}, {"mixed": ".*"}, "two leaves have the same path: 'a.b'"),
    ],
)
def test_refuses(params, kwargs, message):
    arrays = {"k": jnp.ones((2, 2)), "b": jnp.ones(2)}
    params = jax.tree.map(lambda leaf: arrays.get(leaf, leaf), params)
    with pytest.raises(AgwmError, match=message):
        partition(params, **kwargs)


def test_listed_paths_are_taken_as_they_are():
    weights = {"layers.bias": jnp.ones((2, 2)), "kernel": jnp.ones((2, 2)), "a": jnp.ones(1)}
    parts = partition(weights, mixed=["layers.bias", "kernel"], frozen=("a",))
    assert parts.mixed == ("kernel", "layers.bias")  # in the order of the weights
    assert (sorted(parts.frozen), sorted(parts.task)) == (["a", "kernel", "layers.bias"], ["kernel", "layers.bias"])
    assert partition(weights, mixed=()).mixed == ()


def test_unflatten_names_what_is_missing():
    parts = partition({f"w{i}": jnp.ones((2, 2)) for i in range(9)}, mixed="w0")
    with pytest.raises(
        AgwmError, match=r"no weight for 'w1', 'w2', 'w3', 'w4', 'w5' and 3 more; pass what `mix` returned"
    ):
        parts.structure.unflatten(parts.frozen)


def test_integers_are_no_weights_even_where_the_pattern_matches():
    parts = partition({"kernel": jnp.ones((2, 2)), "kernel_ids": jnp.ones((2, 2), "int32")}, mixed="kernel.*")
    assert parts.mixed == ("kernel",)
    alpha = project_alpha(init_alpha(jax.random.key(0), parts))
    whole = mix(parts, parts.task, alpha)
    assert whole["kernel_ids"].dtype == "int32"


def test_a_weight_may_be_called_value():
    weights = {name: jnp.ones((2, 2)) for name in ("query", "key", "value")}
    assert partition({"attention": weights}, mixed=r"attention\.(query|key|value)").mixed == (
        "attention.key",
        "attention.query",
        "attention.value",
    )


class WithStatistics(nnx.Module):
    def __init__(self, rngs):
        self.layer, self.norm = nnx.Linear(3, 2, rngs=rngs), nnx.BatchNorm(2, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


def test_nnx_variables_that_are_no_parameters_are_carried_along():
    state = nnx.state(WithStatistics(nnx.Rngs(0)))
    parts = partition(state, mixed=".*kernel")
    assert set(parts.task) == {"layer.kernel", "layer.bias", "norm.scale", "norm.bias"}
    rebuilt = mix(parts, {path: x + 1 for path, x in parts.task.items()}, {})
    for name in ("mean", "var"):
        np.testing.assert_array_equal(rebuilt["norm"][name][...], state["norm"][name][...])


def test_static_arrays_are_carried_along():
    params = {"params": {"kernel": jnp.ones((2, 2))}, "batch_stats": {"mean": jnp.zeros(2)}}
    parts = partition(params, mixed=".*kernel", static=r"batch_stats\..*")
    assert set(parts.task) == {"params.kernel"}
    rebuilt = mix(parts, {"params.kernel": jnp.zeros((2, 2))}, {})
    assert rebuilt["batch_stats"]["mean"] is params["batch_stats"]["mean"]
    assert not rebuilt["params"]["kernel"].any()
    with pytest.raises(AgwmError, match="`static` = 'stats' matches none of the 2 weights"):
        partition(params, mixed=".*kernel", static="stats")


def test_a_tied_array_would_be_trained_apart():
    table = jnp.ones((4, 2))
    params = {"embed": {"table": table}, "head": {"kernel": table}}
    with pytest.raises(AgwmError, match=r"'embed.table' and 'head.kernel' are one array, and would be trained apart"):
        partition(params, mixed="head.*")
    assert partition(params, mixed="head.*", static="embed.*").mixed == ("head.kernel",)


KERNELS = {
    "query": jnp.ones((6, 2, 3)),
    "out": jnp.ones((2, 3, 6)),
    "conv": jnp.ones((3, 3, 2, 4)),
    "dense": jnp.ones((5, 6, 2)),
}
AXES = {"query": "ioo", "out": "iio", "conv": "iiio"}


def test_axes_say_which_are_input_and_which_output():
    """Of Flax's attention and convolutions; a gate of rank 1 is then an outer product of inputs and outputs."""
    parts = partition(KERNELS, mixed=".*", axes=AXES)
    assert parts.axes == {"query": "ioo", "out": "iio", "conv": "iiio", "dense": "lio"}
    alpha = init_alpha(jax.random.key(0), parts, start=0.5)
    shapes = {path: (factors.left.shape, factors.right.shape) for path, factors in alpha.items()}
    assert shapes == {
        "conv": ((18, 1), (1, 4)),
        "dense": ((5, 6, 1), (5, 1, 2)),
        "out": ((6, 1), (1, 6)),
        "query": ((6, 1), (1, 6)),
    }
    mixed = mix(parts, {path: jnp.zeros_like(w) for path, w in KERNELS.items()}, alpha)
    for path, kernel in KERNELS.items():
        gate = np.asarray(alpha[path].left) * np.asarray(alpha[path].right)
        np.testing.assert_allclose(mixed[path], 1 - gate.reshape(kernel.shape), rtol=1e-6)
    rows = init_alpha(jax.random.key(0), parts, gate="row", start=0.5)
    assert rows["conv"].shape == (18, 1)
    assert mix(parts, parts.task, rows)["conv"].shape == (3, 3, 2, 4)


@pytest.mark.parametrize("letters", ["io", "oii", "lll", "iii", "abc"])
def test_axes_that_make_no_matrix(letters):
    with pytest.raises(
        AgwmError, match=rf"'query' of shape \(6, 2, 3\) has axes '{letters}'; expected a letter for each"
    ):
        partition(KERNELS, mixed=".*", axes={"query": letters})
