"""What every estimator must do inside a bi-level step, whatever it computes: one compiled run serves most checks."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from agwm_jax import bilevel, init_alpha, project_alpha
from tests.core.problems import ESTIMATORS, network

INNER_STEPS = 2
SEEDS = 3


def make_step(net, estimator, *, compute="float32"):
    """A step that takes W0 as an argument, as the documentation advises."""

    def solver(frozen):
        return bilevel(
            net.problem(frozen, compute=compute),
            estimator,
            inner_tx=optax.adamw(0.02, eps_root=1e-8),
            outer_tx=optax.adamw(0.01),
            project=project_alpha,
        )

    def init(seed):
        alpha = init_alpha(jax.random.key(seed), net.partition, noise=0.1)
        return solver(net.partition.frozen).init(jax.tree.map(jnp.copy, net.partition.task), alpha)

    def step(frozen, state, inner_batches, outer_batch):
        return solver(frozen).step(state, inner_batches, outer_batch)

    return init, step


def batches(net, index):
    return net.batches(index, INNER_STEPS), net.batches(1000 + index)


class Run(NamedTuple):
    net: Any
    init: Any
    step: Any
    states: list
    infos: list
    traces: int


@pytest.fixture(scope="module", params=ESTIMATORS)
def run(request) -> Run:
    """Ten jitted steps with a donated state, on data that lies on the device, with transfers forbidden."""
    net = network()
    init, step = make_step(net, ESTIMATORS[request.param])
    traces = []

    def counted(frozen, state, inner_batches, outer_batch):
        traces.append(None)
        return step(frozen, state, inner_batches, outer_batch)

    jitted = jax.jit(counted, donate_argnums=1)
    state = init(0)
    data = [batches(net, index) for index in range(10)]
    states, infos = [jax.tree.map(np.array, state)], []
    for pair in data:
        with jax.transfer_guard("disallow"):
            donated, (state, info) = state, jitted(net.partition.frozen, state, *pair)
        assert all(x.is_deleted() for x in jax.tree.leaves((donated.inner.params, donated.outer)))
        states.append(jax.tree.map(np.array, state))
        infos.append({name: float(value) for name, value in info.items()})
    return Run(net, init, step, states, infos, len(traces))


def test_one_trace_serves_ten_steps(run):
    assert run.traces == 1


def test_a_step_calls_nothing_on_the_host(run):
    # The transfer guard of the run sees what goes in with a call, not what a program does inside.
    jaxpr = jax.make_jaxpr(run.step)(run.net.partition.frozen, run.init(0), *batches(run.net, 0))
    assert "callback" not in str(jaxpr)


def test_state_keeps_structure_shapes_and_dtypes(run):
    def spec(state):
        return jax.tree.map(lambda x: (x.shape, x.dtype), state)

    assert all(spec(state) == spec(run.states[0]) for state in run.states)
    assert {x.dtype for x in jax.tree.leaves((run.states[-1].inner.params, run.states[-1].outer))} == {
        np.dtype("float32")
    }


def test_info_holds_finite_scalars(run):
    assert {"inner_loss", "outer_loss", "hypergradient_norm"} <= run.infos[0].keys()
    for info in run.infos:
        assert info.keys() == run.infos[0].keys()
        assert np.all(np.isfinite(list(info.values())))
        assert info["hypergradient_norm"] > 0


def test_both_variables_move_and_alpha_stays_in_the_unit_interval(run):
    for before, after in zip(run.states, run.states[1:], strict=False):
        assert not np.array_equal(before.inner.params["first.kernel"], after.inner.params["first.kernel"])
        assert not np.array_equal(before.outer["first.kernel"].left, after.outer["first.kernel"].left)
        assert all(x.min() >= 0 and x.max() <= 1 for x in jax.tree.leaves(after.outer))


def test_vmap_over_seeds_equals_a_loop(run):
    start = [run.init(seed) for seed in range(SEEDS)]
    data = [batches(run.net, index) for index in range(SEEDS)]

    def stack(trees):
        return jax.tree.map(lambda *x: jnp.stack(x), *trees)

    mapped = jax.jit(jax.vmap(run.step, in_axes=(None, 0, 0, 0)))
    state, info = mapped(run.net.partition.frozen, stack(start), *stack(data))
    assert info["outer_loss"].shape == (SEEDS,)
    assert len({float(x) for x in info["outer_loss"]}) == SEEDS
    # The first lane is the first step of the run.
    jax.tree.map(
        lambda lane, single: np.testing.assert_allclose(lane[0], single, rtol=1e-4, atol=1e-6),
        (state.inner.params, state.outer, info),
        (run.states[1].inner.params, run.states[1].outer, run.infos[0]),
    )


def test_sharded_data_gives_the_single_device_result(run):
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))

    def place(tree, spec):
        return jax.device_put(tree, NamedSharding(mesh, spec))

    def shard(batch, *lead):
        return {
            name: place(x, PartitionSpec() if name == "key" else PartitionSpec(*lead, "data"))
            for name, x in batch.items()
        }

    inner_batches, outer_batch = batches(run.net, 0)
    inner_batches, outer_batch = shard(inner_batches, None), shard(outer_batch)
    assert inner_batches["x"].addressable_shards[0].data.shape == (INNER_STEPS, 4, 4)
    frozen, state = place((run.net.partition.frozen, run.init(0)), PartitionSpec())
    state, info = jax.jit(run.step)(frozen, state, inner_batches, outer_batch)
    weight = state.inner.params["first.kernel"]
    assert weight.sharding.device_set == set(mesh.devices.flat)
    assert weight.sharding.is_fully_replicated
    jax.tree.map(
        lambda sharded, single: np.testing.assert_allclose(sharded, single, rtol=1e-4, atol=1e-6),
        (state.inner.params, state.outer, info),
        (run.states[1].inner.params, run.states[1].outer, run.infos[0]),
    )


def test_bfloat16_losses_keep_float32_states(run, request):
    init, step = make_step(run.net, ESTIMATORS[request.node.callspec.params["run"]], compute="bfloat16")
    state, info = jax.jit(step)(run.net.partition.frozen, init(0), *batches(run.net, 0))
    for x, expected in zip(jax.tree.leaves(state), jax.tree.leaves(run.states[1]), strict=True):
        assert (x.shape, x.dtype) == (expected.shape, expected.dtype)
        assert jnp.all(jnp.isfinite(x))
    assert all(value.dtype == jnp.float32 for value in info.values())
    # An exact solve of this indefinite system enlarges the rounding of H: its residual grows from 1e-6 to 0.08.
    solved = request.node.callspec.params["run"] == "dense"
    for name, tolerance in (
        ("inner_loss", 0.005),
        ("outer_loss", 0.005),
        ("hypergradient_norm", 0.15 if solved else 0.02),
    ):
        assert float(info[name]) == pytest.approx(run.infos[0][name], rel=tolerance), name
    assert float(info["outer_loss"]) != run.infos[0]["outer_loss"]  # it did compute in bfloat16
