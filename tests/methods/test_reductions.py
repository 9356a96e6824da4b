"""Methods that reduce to another one give its bits: same seed, same order of the data, same dropout."""

import chex
import jax
import numpy as np
import pytest
from harness import pretrained_weights, run, setup_of, tiny_model, training_set

from agwm_jax.methods.interface import METHODS, Context

PRETRAINED = pretrained_weights()


def train(name, **settings):
    method = METHODS[name].value.model_validate({"name": name, **settings}).build(setup_of())
    return run(method, PRETRAINED, jax.random.key(3))


@pytest.fixture(scope="module")
def vanilla():
    return train("vanilla")


SEARCH = {"epochs": 1, "validation_fraction": 0.4}
ROWS = {
    "l2_sp at strength 0": ("l2_sp", {"strength": 0.0, "head_strength": 0.0}),
    "l2_sp, decoupled, at strength 0": ("l2_sp", {"strength": 0.0, "head_strength": 0.0, "decoupled": True}),
    "mixout at p 0": ("mixout", {"p": 0.0, "roles": ["kernel", "bias", "norm", "embedding"]}),
    "child_tuning_d at p 1": ("child_tuning_d", {"p": 1.0}),
    "llrd at decay 1": ("llrd", {"decay": 1.0}),
    "swa over one step": ("swa", {"share": 0.01}),
    "ema at decay 0": ("ema", {"decay": 0.0}),
    "wise_ft at a 1": ("wise_ft", {"a": 1.0}),
    "frozen_alpha at A 1": ("frozen_alpha", {"mixup": {"noise": 0.0}}),
    "agwm whose search leaves A 1 and W0": (
        "agwm",
        {"mixup": {"noise": 0.0}, "search": {**SEARCH, "average": "alpha", "outer": {"learning_rate": 1e-30}}},
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_a_row_is_vanilla_bit_for_bit(row, vanilla):
    name, settings = ROWS[row]
    trained = train(name, **settings)
    np.testing.assert_array_equal(trained.losses, vanilla.losses)
    for path, weight in vanilla.weights.items():
        np.testing.assert_array_equal(trained.weights[path], weight)


def test_r_drop_at_a_0_is_vanilla_bit_for_bit_where_both_passes_are_alike():
    still = setup_of(model=tiny_model(dropout=0))
    found = [
        run(METHODS[name].value.model_validate({"name": name, **settings}).build(still), PRETRAINED, jax.random.key(3))
        for name, settings in (("vanilla", {}), ("r_drop", {"a": 0.0}))
    ]
    chex.assert_trees_all_equal(found[0].weights, found[1].weights)
    np.testing.assert_array_equal(found[0].losses, found[1].losses)


def test_lora_starts_at_the_pretrained_logits_bit_for_bit():
    setup = setup_of()
    method = METHODS["lora"].value(targets=None).build(setup)
    merged = method.merge(PRETRAINED, method.init(PRETRAINED, jax.random.key(0)))
    batch = training_set()
    np.testing.assert_array_equal(setup.model.apply(merged, batch), setup.model.apply(PRETRAINED, batch))


def test_the_result_of_searches_is_their_mean():
    settings = {"name": "agwm", "search": {**SEARCH, "num_splits": 3}}
    method = METHODS["agwm"].value.model_validate(settings).build(setup_of())
    initial = learnt = method.init(PRETRAINED, jax.random.key(0))
    left = []
    for index, phase in enumerate(method.stages[0]):
        context = Context(PRETRAINED, initial, learnt)
        state = phase.start(context, jax.random.key(index))
        state = state._replace(inner=jax.tree.map(lambda x, index=index: x + index, state.inner))
        left.append((state.inner.params, state.outer))
        learnt = phase.finish(context, state)
    mean = jax.tree.map(lambda *x: np.mean(x, axis=0), *left)
    chex.assert_trees_all_close((learnt["task"], learnt["alpha"]), mean, atol=1e-6)
    assert not np.array_equal(*(jax.tree.leaves(alpha)[0] for _, alpha in left[:2]))  # a start of its own in each
