"""What every estimator must do inside a bi-level step, whatever it computes: one compiled run serves most checks.

Shared by two test files, each over one half of the estimators, so that two workers share the work.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from agwm_jax import AgwmError, bilevel, init_alpha, partition, project_alpha
from tests.core.problems import ALL, DIFFERENCES, network
from tests.core.tf32 import in_tf32

INNER_STEPS = 2
SEEDS = 3
STEPS = 10

# A solve of this indefinite system enlarges the rounding of H: an exact one's residual grows from 1e-6 to 0.08.
SOLVES = {"implicit dense", "implicit conjugate_gradient"}


def make_step(net, estimator, *, compute="float32"):
    """A step that takes W0 as an argument, as the documentation advises; its state keeps the hypergradient."""

    def solver(weights):
        return bilevel(
            net.problem(weights, compute=compute),
            estimator,
            inner_tx=optax.adamw(0.02),
            outer_tx=optax.chain(optax.trace(0.0), optax.adamw(0.01)),
            project=project_alpha,
        )

    def init(seed):
        alpha = init_alpha(jax.random.key(seed), net.partition, noise=0.1)
        return solver(net.params).init(net.partition.task, alpha)

    def step(weights, state, inner_batches, outer_batch):
        return solver(weights).step(state, inner_batches, outer_batch)

    return init, step


def hypergradient(state):
    """Of the step that led to this state."""
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.outer_opt_state[0].trace)])


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


def ten_steps(name) -> Run:
    """Jitted steps with a donated state and no transfers, all by one trace."""
    net = network()
    init, step = make_step(net, ALL[name])
    chex.clear_trace_counter()
    jitted = jax.jit(chex.assert_max_traces(step, n=1), donate_argnums=1)
    state = init(0)
    data = [batches(net, index) for index in range(STEPS)]
    states, infos = [host(state)], []
    for pair in data:
        with jax.transfer_guard("disallow"):
            donated, (state, info) = state, jitted(net.params, state, *pair)
        assert all(x.is_deleted() for x in jax.tree.leaves((donated.inner.params, donated.outer, donated.estimator)))
        states.append(host(state))
        infos.append({name: float(value) for name, value in info.items()})
    assert not any(w.is_deleted() for w in net.params.values())
    return Run(name, net, init, step, jitted, states, infos)


def host(state):
    """A copy in NumPy: states are plain numbers, which is what a checkpoint can hold."""
    return jax.tree.map(np.array, state)


class Conformance:
    """The checks; a test file gives the fixture `run`."""

    def test_a_step_calls_nothing_on_the_host(self, run):
        # The transfer guard of the run sees what goes in with a call, not what a program does inside.
        jaxpr = jax.make_jaxpr(run.step)(run.net.params, run.init(0), *batches(run.net, 0))
        assert "callback" not in str(jaxpr)

    def test_state_keeps_structure_shapes_and_dtypes(self, run):
        chex.assert_trees_all_equal_shapes_and_dtypes(*run.states)
        chex.assert_type(jax.tree.leaves((run.states[-1].inner.params, run.states[-1].outer)), jnp.float32)

    @pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float64", "float64")])
    def test_variables_of_other_dtypes_keep_them(self, run, dtypes):
        kernels, others = dtypes
        with jax.enable_x64("float64" in dtypes):
            weights = {
                name: w.astype(kernels if name == "first.kernel" else others) for name, w in run.net.params.items()
            }
            net = run.net._replace(params=weights, partition=partition(weights, mixed=r".*kernel"))
            init, step = make_step(net, ALL[run.name])
            state = jax.eval_shape(init, 0)
            if kernels == "bfloat16" and run.name in DIFFERENCES:
                with pytest.raises(AgwmError, match=r"subtracts gradients .* computes in bfloat16"):
                    jax.eval_shape(step, weights, state, *batches(net, 0))
                return
            after, _ = jax.eval_shape(step, weights, state, *batches(net, 0))
        assert after == state
        assert state.inner.params["first.kernel"].dtype == kernels
        assert state.inner.params["first.bias"].dtype == others
        assert {x.dtype for x in jax.tree.leaves(state.outer)} == {
            np.dtype("float64" if "float64" in dtypes else "float32")
        }

    def test_info_holds_finite_scalars(self, run):
        assert {"inner_loss", "outer_loss", "hypergradient_norm"} <= run.infos[0].keys()
        for state, info in zip(run.states[1:], run.infos, strict=True):
            assert info.keys() == run.infos[0].keys()
            chex.assert_tree_all_finite(info)
            assert info["hypergradient_norm"] == pytest.approx(np.linalg.norm(hypergradient(state)), rel=1e-5)

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
        state, info = mapped(run.net.params, stack(start), *stack(data))
        assert len({float(x) for x in info["outer_loss"]}) == SEEDS
        lanes = [run.jitted(run.net.params, run.init(seed), *data[seed]) for seed in range(SEEDS)]
        expected = stack([(s.inner.params, s.outer, i) for s, i in lanes])
        chex.assert_trees_all_close((state.inner.params, state.outer, info), expected, rtol=1e-4, atol=1e-6)

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
        weights, state = place((run.net.params, run.init(0)), PartitionSpec())
        state, info = jax.jit(run.step)(weights, state, inner_batches, outer_batch)
        weight = state.inner.params["first.kernel"]
        assert weight.sharding.device_set == set(mesh.devices.flat)
        assert weight.sharding.is_fully_replicated
        chex.assert_trees_all_close(
            (state.inner.params, state.outer, info),
            (run.states[1].inner.params, run.states[1].outer, run.infos[0]),
            rtol=1e-4,
            atol=1e-6,
        )

    def last_step(self, run, step):
        """The last step of the run taken anew, from the state that it started from."""
        state = jax.tree.map(jnp.asarray, run.states[-2])
        return jax.jit(step)(run.net.params, state, *batches(run.net, STEPS - 1))

    def test_tf32_gives_nearly_the_hypergradient_of_float32(self, run):
        state, _ = self.last_step(run, in_tf32(run.step))
        found, expected = hypergradient(state), hypergradient(run.states[-1])
        assert not np.array_equal(found, expected)  # it was emulated
        tolerance = 0.1 if run.name in SOLVES else 0.005
        assert np.linalg.norm(found - expected) < tolerance * np.linalg.norm(expected)

    def test_bfloat16_losses_keep_float32_states(self, run):
        _, step = make_step(run.net, ALL[run.name], compute="bfloat16")
        if run.name in DIFFERENCES:
            with pytest.raises(AgwmError, match=r"subtracts gradients .* computes in bfloat16"):
                self.last_step(run, step)
            return
        state, info = self.last_step(run, step)
        chex.assert_trees_all_equal_shapes_and_dtypes(host(state), run.states[-1])
        chex.assert_tree_all_finite((state.inner, state.outer, info))
        chex.assert_type(list(info.values()), jnp.float32)
        for name in ("inner_loss", "outer_loss"):
            assert float(info[name]) == pytest.approx(run.infos[-1][name], rel=0.01), name
        found, expected = hypergradient(state), hypergradient(run.states[-1])
        assert not np.array_equal(found, expected)
        tolerance = 0.3 if run.name in SOLVES else 0.05
        assert np.linalg.norm(found - expected) < tolerance * np.linalg.norm(expected)
