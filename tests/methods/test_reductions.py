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
    "r3f at weight 0": ("r3f", {"weight": 0.0, "eps": 0.1}),
    "r3f, normal, at weight 0": ("r3f", {"weight": 0.0, "eps": 0.1, "noise": "normal"}),
    "smart at weight 0": ("smart", {"weight": 0.0, "eps": 0.1, "step": 0.1}),
    "sam at rho 0": ("sam", {"rho": 0.0}),
    "reinit of nothing": ("reinit", {"layers": 0, "pooler": False}),
    "top_k of all, with embeddings": ("top_k", {"k": "all", "embeddings": True}),
    "top_k of as many layers as there are, with embeddings": ("top_k", {"k": 2, "embeddings": True}),
    "spd at strength 0": ("spd", {"strength": 0.0}),
    "recadam long after t0": ("recadam", {"gamma": 100.0, "t0": -10_000.0}),
    "child_tuning_f at p 1": ("child_tuning_f", {"p": 1.0}),
    "wise_ft at a 1": ("wise_ft", {"a": 1.0}),
    "frozen_alpha at A 1": ("frozen_alpha", {"mixup": {"noise": 0.0}}),
    "fixed_gate at A 1": ("fixed_gate", {"gate": 1.0}),
    "gradient_importance at p 1": ("gradient_importance", {"p": 1.0}),
    "gradient_importance, lowest, at p 1": ("gradient_importance", {"p": 1.0, "keep": "lowest"}),
    "gradient_importance, random, at p 1": ("gradient_importance", {"p": 1.0, "keep": "random"}),
    "dps at p 0": ("dps", {"p": 0.0, "update_ratio": 0.2}),
    "dps, mix, at p 0": ("dps", {"p": 0.0, "update_ratio": 0.2, "stages": "mix"}),
    "learned_gates held at 1": ("learned_gates", {"log_alpha": 30.0, "penalty": 0.0}),
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


@pytest.mark.parametrize(
    ("name", "settings", "num_splits", "rollback"),
    [("restart", {}, 1, False), ("restart", {}, 1, True), ("soup", {"num_splits": 3}, 3, True)],
)
def test_restart_and_soup_are_agwm_at_a_gate_of_1(name, settings, num_splits, rollback):
    """Losses of W in every stage and the last weights, to the bit: the same splits, order, dropout and updates."""
    search = {"epochs": 2, "validation_fraction": 0.4, "inner": {"learning_rate": 3e-2}}
    first = {"epochs": 2, "validation_fraction": 0.4, "optimizer": {"learning_rate": 3e-2}}
    still = {"rollback": rollback, "outer": {"learning_rate": 1e-30}, "num_splits": num_splits, "leverage": False}
    agwm = train("agwm", mixup={"noise": 0.0}, search={**search, **still})
    control = train(name, first=first, **settings)
    assert control.infos.keys() == agwm.infos.keys()
    for phase, infos in agwm.infos.items():
        np.testing.assert_array_equal(control.infos[phase]["loss"], infos["loss"], err_msg=phase)
    for path, weight in agwm.weights.items():
        np.testing.assert_array_equal(control.weights[path], weight, err_msg=path)


def test_soup_of_one_run_is_restart():
    first = {"epochs": 1, "validation_fraction": 0.4}
    restart, soup = train("restart", first=first), train("soup", num_splits=1, first=first)
    np.testing.assert_array_equal(soup.losses, restart.losses)
    chex.assert_trees_all_equal(soup.weights, restart.weights)


def test_joint_is_frozen_alpha_bit_for_bit_where_alpha_does_not_move():
    mixup = {"noise": 0.3, "rank": 2}
    frozen = train("frozen_alpha", mixup=mixup)
    joint = train("joint", mixup=mixup, outer={"learning_rate": 1e-30})
    np.testing.assert_array_equal(joint.losses, frozen.losses)
    chex.assert_trees_all_equal(joint.learnt, frozen.learnt)
    assert not np.array_equal(train("joint", mixup=mixup).losses, frozen.losses)


def test_fixed_gate_at_a_0_leaves_the_pretrained_logits_bit_for_bit():
    setup = setup_of(frozen=("classifier.kernel", "classifier.bias"))
    method = METHODS["fixed_gate"].value(gate=0.0).build(setup)
    trained, batch = run(method, PRETRAINED, jax.random.key(0)), training_set()
    chex.assert_trees_all_equal(trained.weights, PRETRAINED)
    np.testing.assert_array_equal(setup.model.apply(trained.weights, batch), setup.model.apply(PRETRAINED, batch))
    assert any(np.any(weight != PRETRAINED[path]) for path, weight in trained.learnt["task"].items())  # they decay


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
