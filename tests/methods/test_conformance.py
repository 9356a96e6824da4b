"""What the engine relies on, of every registered method."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import Runner, pretrained_weights, setup_of, shapes_of, tiny_model, trace_step, training_set
from short_settings import section

from agwm_jax.methods.interface import METHODS

pytestmark = pytest.mark.usefixtures("quick_compilation")


# What some methods are not: these rules are turned round for them.
WITHOUT_CLASSES = {"zero_shot"}
WITHOUT_TRAINING = {"zero_shot"}
PHASES_WITHOUT_LOSS = {"features"}  # they read, and minimise nothing


def labels_of(name):
    """Size of the head that a method is tried with."""
    return 1 if name in WITHOUT_CLASSES else 3


def build(name, setup):
    return METHODS[name].value.model_validate(section(name)).build(setup)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_runs_alone_and_mapped_over_seeds(name):
    """Beside what the harness asserts: a state keeps its shapes, one trace of a step, a donated state."""
    frozen = ("embeddings.word.embedding", "encoder.layers.norm.scale", "pooler.kernel")
    setup = setup_of(num_labels=1, frozen=frozen, accumulate=2, epochs=1)
    method, data = build(name, setup), training_set(num_labels=1)
    starts, keys = [pretrained_weights(1, seed) for seed in (0, 1)], jax.random.split(jax.random.key(7))
    before = jax.tree.map(np.array, starts)

    runner = Runner(method, data=data)
    alone = [runner.run(pretrained, key) for pretrained, key in zip(starts, keys, strict=True)]
    chex.assert_trees_all_equal(starts, before)  # not one of W0's buffers was donated
    for trained, start in zip(alone, starts, strict=True):
        chex.assert_tree_all_finite(jax.tree.leaves((trained.learnt, trained.weights, trained.infos)))
        for phase in method.phases:
            infos = trained.infos[phase.name]
            assert all(len(values) == phase.num_steps for values in infos.values())
            assert ("loss" in infos) == (phase.name not in PHASES_WITHOUT_LOSS)
        chex.assert_trees_all_equal_shapes_and_dtypes(trained.weights, start)
        chex.assert_trees_all_equal_shapes_and_dtypes(trained.learnt, method.learnt_shapes(start))
        assert all(set(collection) <= set(setup.trainable) for collection in trained.learnt.values())
        assert {path for path in frozen if np.array_equal(trained.weights[path], start[path])} == set(frozen)
        changed = any(np.any(trained.weights[path] != start[path]) for path in start)
        assert changed == bool(method.phases) == (name not in WITHOUT_TRAINING)

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
    together = Runner(method, data=data, members=True).run(stacked, keys)
    for index, trained in enumerate(alone):
        mine = jax.tree.map(lambda x, index=index: x[index], (together.learnt, together.weights))
        chex.assert_trees_all_close(mine, (trained.learnt, trained.weights), atol=2e-5)
        for phase, infos in trained.infos.items():
            if "loss" in infos:
                chex.assert_trees_all_close(together.infos[phase]["loss"][:, index], infos["loss"], atol=2e-5)


@pytest.mark.parametrize("name", METHODS)
def test_weights_and_moments_stay_float32_where_the_model_computes_in_bfloat16(name):
    method = build(name, setup_of(model=tiny_model(dtype=jnp.bfloat16), num_labels=labels_of(name)))
    for number, phase in enumerate(method.phases):
        state, after = trace_step(phase, method.learnt_shapes(shapes_of(), number))
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
        assert not any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(after))


@pytest.mark.parametrize("name", METHODS)
def test_what_a_phase_leaves_is_known_before_it_runs(name):
    """The engine reserves room for what later phases get, and a run can be taken up between any two of them."""
    method, shapes = build(name, setup_of(num_labels=labels_of(name))), shapes_of(labels_of(name))
    variables = jax.eval_shape(method.init, shapes, jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(variables, method.learnt_shapes(shapes, 0))
    for number in range(len(method.phases) + 1):
        merged = jax.eval_shape(method.merge, shapes, {**variables, **method.learnt_shapes(shapes, number)})
        chex.assert_trees_all_equal_shapes_and_dtypes(merged, shapes)
    for stage in method.stages:  # phases of a stage run side by side in one program
        assert len({phase.step for phase in stage}) == 1
        assert len({tuple((name, plan.shape) for name, plan in phase.plan.items()) for phase in stage}) == 1
    assert len({phase.name for phase in method.phases}) == len(method.phases)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_what_it_is(name):
    entry = METHODS[name]
    assert entry.facts["cost"]
    assert entry.facts["paper"]
    assert "Cost" in entry.value.__doc__
    assert "Source" in entry.value.__doc__
    assert entry.value.model_fields["name"].default == name
    assert all(field.description for field in entry.value.model_fields.values())
