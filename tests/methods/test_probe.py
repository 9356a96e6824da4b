"""Heads fitted to frozen features: held to scikit-learn on features taken elsewhere, and to the problem they solve."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import BATCH, EXAMPLES, pretrained_weights, run, setup_of, tiny_model, training_set, weights_of
from scipy.special import softmax
from sklearn.linear_model import LogisticRegressionCV, RidgeCV

from agwm_jax.engine.group import Layout, Member
from agwm_jax.engine.loop import fit
from agwm_jax.engine.observer import InMemory
from agwm_jax.engine.sharding import make_placement
from agwm_jax.errors import AgwmError
from agwm_jax.methods.interface import Context
from agwm_jax.methods.lp_ft import LPFT
from agwm_jax.methods.probe import Probe, fit_head, head_inputs
from agwm_jax.methods.vanilla import Vanilla
from agwm_jax.models.family import FAMILIES, build_model

pytestmark = pytest.mark.usefixtures("quick_compilation")

SPLITS = {"cv": 3, "Cs": np.logspace(-4, 4, 10), "scoring": "neg_log_loss", "max_iter": 1000}
QUIET = {"l1_ratios": (0.0,), "use_legacy_attributes": False}


def features_of(model, params, data) -> np.ndarray:
    return np.asarray(model.features(params, model.embed(params, data), data), np.float64)


@pytest.mark.parametrize("num_labels", [3, 2])
def test_the_head_has_the_probabilities_of_scikit_learn(num_labels):
    setup, data, start = setup_of(num_labels=num_labels), training_set(num_labels), pretrained_weights(num_labels)
    trained = run(Probe().build(setup), start, jax.random.key(0), data=data)
    features = features_of(setup.model, start, data)
    smallest = np.bincount(data["labels"]).min()
    expected = LogisticRegressionCV(**{**SPLITS, "cv": min(5, smallest)}, **QUIET).fit(features, data["labels"])
    found = softmax(np.asarray(setup.model.apply(trained.weights, data), np.float64), axis=1)
    np.testing.assert_allclose(found, expected.predict_proba(features), atol=1e-5)
    assert found.std() > 1e-3
    unchanged = [path for path in start if np.array_equal(trained.weights[path], start[path])]
    assert unchanged == [path for path in start if not path.startswith("classifier")]
    assert trained.learnt["task"].keys() == {"classifier.kernel", "classifier.bias"}


def test_examples_count_as_their_weight_says():
    """As scikit-learn's ``sample_weight`` does; 24 texts of the same features, a third of which count three times."""
    rng = np.random.default_rng(4)
    labels, weight = np.array([0, 1, 2] * 8), np.array([3.0, 1.0, 1.0] * 8)
    features = rng.normal(size=(24, 4)) + labels[:, None]
    kernel, bias = fit_head(features, labels, weight, kind="classification", num_classes=3, folds=5)
    expected = LogisticRegressionCV(**{**SPLITS, "cv": 5}, **QUIET).fit(features, labels, sample_weight=weight)
    found = softmax(features @ kernel + bias, axis=1)
    np.testing.assert_allclose(found, expected.predict_proba(features), atol=1e-6)
    plain = fit_head(features, labels, np.ones(24), kind="classification", num_classes=3, folds=5)
    assert found[:, 0].mean() > softmax(features @ plain[0] + plain[1], axis=1)[:, 0].mean() + 0.05


def test_a_run_with_weights_is_the_fit_with_weights():
    setup, start, weight = setup_of(), pretrained_weights(), jnp.linspace(0.5, 4, len(training_set()["labels"]))
    data = {**training_set(), "weight": weight}
    trained = run(Probe().build(setup), start, jax.random.key(0), data=data)
    features, labels = features_of(setup.model, start, data), np.asarray(data["labels"])
    kernel, _ = fit_head(features, labels, np.asarray(weight), kind="classification", num_classes=3, folds=5)
    np.testing.assert_allclose(trained.weights["classifier.kernel"], kernel, rtol=1e-3, atol=1e-5)


def test_a_regression_has_the_scores_of_scikit_learns_ridge():
    setup, data, start = setup_of(num_labels=1), training_set(1), pretrained_weights(1)
    trained = run(Probe().build(setup), start, jax.random.key(0), data=data)
    features = features_of(setup.model, start, data)
    expected = RidgeCV(alphas=np.logspace(-4, 4, 10)).fit(features, data["labels"]).predict(features)
    np.testing.assert_allclose(setup.model.apply(trained.weights, data)[:, 0], expected, atol=1e-5)


def test_the_features_are_those_that_reach_the_last_layer_of_a_classifier_of_two():
    values = {"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    family = FAMILIES["roberta"].value()
    config = family.read_config({**values, "intermediate_size": 8, "max_position_embeddings": 16})
    model, shapes = build_model(family, config, num_labels=3)
    rng = np.random.default_rng(0)
    params = {
        path: jnp.asarray(rng.normal(0, 0.5, x.shape) + path.endswith("scale"), x.dtype) for path, x in shapes.items()
    }
    ids = rng.integers(2, 40, (EXAMPLES, 5)).astype(np.int32)
    data = {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": np.arange(EXAMPLES, dtype=np.int32) % 3}
    data = jax.tree.map(jnp.asarray, data)
    pooled = features_of(model, params, data)
    dense = {name: np.asarray(params[f"classifier_dense.{name}"], np.float64) for name in ("kernel", "bias")}
    expected = np.tanh(pooled @ dense["kernel"] + dense["bias"])
    np.testing.assert_allclose(head_inputs(model, params, data), expected, atol=1e-5)

    setup = setup_of(model=model)._replace(shapes=shapes, labels=np.asarray(data["labels"]))
    trained = run(Probe().build(setup), params, jax.random.key(0), data=data)
    solution = LogisticRegressionCV(**SPLITS, **QUIET).fit(expected, data["labels"])
    found = softmax(np.asarray(model.apply(trained.weights, data), np.float64), axis=1)
    np.testing.assert_allclose(found, solution.predict_proba(expected), atol=1e-4)
    assert trained.learnt["task"].keys() == {"classifier.kernel", "classifier.bias"}


def stationary(features, labels, kernel, bias, c):
    """Gradient of ``|W|^2 / 2 + C sum_i loss_i`` in kernel and bias, by NumPy."""
    error = softmax(features @ kernel + bias, axis=1) - np.eye(kernel.shape[1])[labels]
    return kernel + c * features.T @ error, c * error.sum(0)


def test_a_class_with_one_example_has_c_1_and_the_solution_is_stationary():
    rng = np.random.default_rng(1)
    features, labels = rng.normal(size=(20, 4)), np.array([0] * 10 + [1] * 9 + [2])
    kernel, bias = fit_head(features, labels, np.ones(len(labels)), kind="classification", num_classes=3, folds=5)
    for gradient in stationary(features, labels, kernel, bias, 1.0):
        np.testing.assert_allclose(gradient, 0, atol=1e-3)


def test_fewer_examples_than_folds_make_fewer_folds_and_repeat_to_the_bit():
    rng = np.random.default_rng(2)
    labels = np.array([0, 1] * 2 + [0] * 20)
    features = rng.normal(size=(24, 4)) + labels[:, None]
    found = [
        fit_head(features, labels, np.ones(len(labels)), kind="classification", num_classes=2, folds=5)
        for _ in range(2)
    ]
    chex.assert_trees_all_equal(*found)
    expected = LogisticRegressionCV(**{**SPLITS, "cv": 2}, **QUIET).fit(features, labels)
    probabilities = softmax(features @ found[0][0] + found[0][1], axis=1)
    np.testing.assert_allclose(probabilities, expected.predict_proba(features), rtol=1e-6)


def test_a_class_without_examples_is_never_predicted():
    rng = np.random.default_rng(3)
    features, labels = rng.normal(size=(20, 4)), np.array([0, 3] * 10)
    kernel, bias = fit_head(features, labels, np.ones(len(labels)), kind="classification", num_classes=4, folds=5)
    probabilities = softmax(features @ kernel + bias, axis=1)
    assert probabilities[:, [1, 2]].max() < 1e-30
    assert abs(probabilities[:, 0] - probabilities[:, 3]).max() > 1e-6


def test_what_is_not_finite_stays_so_and_stops_nobody_else():
    kernel, bias = fit_head(
        np.full((6, 2), np.nan), np.arange(6) % 2, np.ones(6), kind="classification", num_classes=2, folds=5
    )
    assert np.isnan(kernel).all()
    assert np.isnan(bias).all()


def members():
    """Two seeds with heads and examples of their own."""
    model, found = tiny_model(), []
    for seed in (0, 1):
        data = {name: np.roll(np.asarray(x), 3 * seed, axis=0) for name, x in training_set().items()}
        data["labels"] = (data["labels"] + seed) % 3
        setup = setup_of(model=model)._replace(labels=data["labels"])
        pretrained = jax.tree.map(np.asarray, pretrained_weights())
        pretrained["classifier.kernel"] = np.asarray(pretrained_weights(seed=seed)["classifier.kernel"])
        found.append(Member(seed, Probe().build(setup), pretrained, data, jax.random.key(seed)))
    return found


@pytest.mark.parametrize("mesh", [{"seed": 1, "data": 2}, {"seed": 2, "data": 1}, {"seed": 2, "data": 2}])
def test_seeds_side_by_side_on_a_mesh_have_the_heads_that_they_have_alone(mesh):
    def learnt(some, **axes):
        placement = make_placement(**{"seed": 1, "data": 1, "model": 1, "fully_sharded": False, **axes})
        outcome = fit(some, weights=weights_of(), layout=Layout(placement), observer=InMemory(len(some)))
        return jax.device_get(outcome.learnt)

    alone = [learnt([member])[0] for member in members()]
    chex.assert_trees_all_close(learnt(members(), **mesh), alone, atol=1e-5)
    assert np.abs(alone[0]["task"]["classifier.kernel"] - alone[1]["task"]["classifier.kernel"]).max() > 1e-3


def test_the_features_are_read_in_order_and_padding_is_left_out():
    (phase,) = Probe().build(setup_of()).phases
    np.testing.assert_array_equal(phase.plan["train"].ravel()[:EXAMPLES], np.arange(EXAMPLES))
    assert phase.plan["train"].shape == (3, BATCH)  # two rows of padding


def test_lp_ft_is_vanilla_from_the_head_of_probe_bit_for_bit():
    setup, start, key = setup_of(), pretrained_weights(), jax.random.key(3)
    probe = run(Probe().build(setup), start, key)
    vanilla = run(Vanilla().build(setup), probe.weights, key)
    trained = run(LPFT().build(setup), start, key)
    np.testing.assert_array_equal(trained.losses, vanilla.losses)
    chex.assert_trees_all_equal(trained.weights, vanilla.weights)
    assert not np.array_equal(trained.losses, run(Vanilla().build(setup), start, key).losses)


def test_a_start_of_another_technique_is_what_is_probed():
    """The features are of the weights that came before, not of the checkpoint's."""
    setup, start = setup_of(), pretrained_weights()
    (phase,) = Probe().build(setup).phases
    moved = {"encoder.layers.value.kernel": start["encoder.layers.value.kernel"] + 1.0}
    context = Context(start, {"task": {}}, {"task": moved})
    batch = {**{name: x[:BATCH] for name, x in training_set().items()}, "weight": jnp.ones(BATCH)}
    state, _ = jax.jit(phase.step)(
        phase.start(context, jax.random.key(0)), context, {"train": batch}, jax.random.key(0), 0
    )
    expected = features_of(setup.model, {**start, **moved}, training_set())[:BATCH]
    np.testing.assert_allclose(state.features[:BATCH], expected, atol=1e-5)


@pytest.mark.parametrize("method", [Probe(), LPFT()])
def test_what_cannot_be_fitted_is_refused(method):
    with pytest.raises(AgwmError, match=r"model\.frozen holds classifier\.bias"):
        method.build(setup_of(frozen=("classifier.bias",)))
    with pytest.raises(AgwmError, match="of one class"):
        method.build(setup_of()._replace(labels=np.zeros(EXAMPLES, np.int32)))
