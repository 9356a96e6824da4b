"""What every estimator must do inside a bi-level step, whatever it computes: one compiled run serves most checks.

Shared by two test files, each over one half of the estimators, so that two workers share the work.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from agwm_jax import bilevel, init_alpha, partition, project_alpha
from tests.core.problems import ESTIMATORS, network

INNER_STEPS = 2
SEEDS = 3

BFLOAT16_TOLERANCE = {
    # A solve of this indefinite system enlarges the rounding of H: an exact one's residual grows from 1e-6 to 0.08.
    "dense": 0.15,
    "conjugate_gradient": 0.15,
    # A difference of gradients over a step of 1e-3 or 1e-2 is, in bfloat16, a difference of roundings.
    "unrolled_finite_difference": np.inf,
    "neumann_finite_difference": np.inf,
    "finite_difference": np.inf,
    "finite_difference_preconditioned": np.inf,
}
"""Of the hypergradient's norm, where it is not 0.02."""


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
    name: str
    net: Any
    init: Any
    step: Any
    jitted: Any
    states: list
    infos: list
    traces: int


def ten_steps(name) -> Run:
    """Ten jitted steps with a donated state, on data that lies on the device, with transfers forbidden."""
    net = network()
    init, step = make_step(net, ESTIMATORS[name])
    traces = []

    def counted(frozen, state, inner_batches, outer_batch):
        traces.append(None)
        return step(frozen, state, inner_batches, outer_batch)

    jitted = jax.jit(counted, donate_argnums=1)
    state = init(0)
    data = [batches(net, index) for index in range(10)]
    states, infos = [host(state)], []
    for pair in data:
        with jax.transfer_guard("disallow"):
            donated, (state, info) = state, jitted(net.partition.frozen, state, *pair)
        assert all(x.is_deleted() for x in jax.tree.leaves((donated.inner.params, donated.outer, donated.estimator)))
        states.append(host(state))
        infos.append({name: float(value) for name, value in info.items()})
    return Run(name, net, init, step, jitted, states, infos, len(traces))


def host(state):
    """A copy in NumPy: states are plain numbers, which is what a checkpoint can hold."""
    return jax.tree.map(np.array, state)


def close(run, actual, expected):
    """To rounding, in whatever order a program sums."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), actual, expected)


class Conformance:
    """The checks; a test file gives the fixture `run`."""

    def test_one_trace_serves_ten_steps(self, run):
        assert run.traces == 1

    def test_a_step_calls_nothing_on_the_host(self, run):
        # The transfer guard of the run sees what goes in with a call, not what a program does inside.
        jaxpr = jax.make_jaxpr(run.step)(run.net.partition.frozen, run.init(0), *batches(run.net, 0))
        assert "callback" not in str(jaxpr)

    def test_state_keeps_structure_shapes_and_dtypes(self, run):
        def spec(state):
            return jax.tree.map(lambda x: (x.shape, x.dtype), state)

        assert all(spec(state) == spec(run.states[0]) for state in run.states)
        assert {x.dtype for x in jax.tree.leaves((run.states[-1].inner.params, run.states[-1].outer))} == {
            np.dtype("float32")
        }

    @pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float64", "float64")])
    def test_variables_of_other_dtypes_keep_them(self, run, dtypes):
        kernels, others = dtypes
        with jax.enable_x64("float64" in dtypes):
            weights = {
                name: w.astype(kernels if name == "first.kernel" else others)
                for name, w in run.net.partition.task.items()
            }
            net = run.net._replace(partition=partition(weights, mixed=r".*kernel"))
            init, step = make_step(net, ESTIMATORS[run.name])
            state = jax.eval_shape(init, 0)
            after, _ = jax.eval_shape(step, net.partition.frozen, state, *batches(net, 0))
        assert after == state
        assert state.inner.params["first.kernel"].dtype == kernels
        assert state.inner.params["first.bias"].dtype == others

    def test_info_holds_finite_scalars(self, run):
        assert {"inner_loss", "outer_loss", "hypergradient_norm"} <= run.infos[0].keys()
        for info in run.infos:
            assert info.keys() == run.infos[0].keys()
            assert np.all(np.isfinite(list(info.values())))
            assert info["hypergradient_norm"] > 0

    def test_both_variables_move_and_alpha_stays_in_the_unit_interval(self, run):
        for before, after in zip(run.states, run.states[1:], strict=False):
            assert not np.array_equal(before.inner.params["first.kernel"], after.inner.params["first.kernel"])
            assert not np.array_equal(before.outer["first.kernel"].left, after.outer["first.kernel"].left)
            assert all(x.min() >= 0 and x.max() <= 1 for x in jax.tree.leaves(after.outer))

    def test_vmap_over_seeds_equals_a_loop(self, run):
        start = [run.init(seed) for seed in range(SEEDS)]
        data = [batches(run.net, index) for index in range(SEEDS)]

        def stack(trees):
            return jax.tree.map(lambda *x: jnp.stack(x), *trees)

        mapped = jax.jit(jax.vmap(run.step, in_axes=(None, 0, 0, 0)))
        state, info = mapped(run.net.partition.frozen, stack(start), *stack(data))
        assert info["outer_loss"].shape == (SEEDS,)
        assert len({float(x) for x in info["outer_loss"]}) == SEEDS
        lanes = [run.jitted(run.net.partition.frozen, run.init(seed), *data[seed]) for seed in range(SEEDS)]
        close(run, (state.inner.params, state.outer, info), stack([(s.inner.params, s.outer, i) for s, i in lanes]))

    def test_sharded_data_gives_the_single_device_result(self, run):
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
        close(
            run,
            (state.inner.params, state.outer, info),
            (run.states[1].inner.params, run.states[1].outer, run.infos[0]),
        )

    def test_bfloat16_losses_keep_float32_states(self, run):
        init, step = make_step(run.net, ESTIMATORS[run.name], compute="bfloat16")
        state, info = jax.jit(step)(run.net.partition.frozen, init(0), *batches(run.net, 0))
        state = host(state)
        assert [(x.shape, x.dtype) for x in jax.tree.leaves(state)] == [
            (x.shape, x.dtype) for x in jax.tree.leaves(run.states[1])
        ]
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((state, info)))
        assert all(value.dtype == jnp.float32 for value in info.values())
        for name in ("inner_loss", "outer_loss"):
            assert float(info[name]) == pytest.approx(run.infos[0][name], rel=0.005), name
        assert float(info["outer_loss"]) != run.infos[0]["outer_loss"]  # it did compute in bfloat16
        norm = "hypergradient_norm"
        assert float(info[norm]) == pytest.approx(run.infos[0][norm], rel=BFLOAT16_TOLERANCE.get(run.name, 0.02))
