"""SetFit: its pairs, its loss against NumPy, and the head on what the pairs made of the features."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import BATCH, EXAMPLES, TOKENS, VOCAB, pretrained_weights, run, setup_of, tiny_model, training_set
from scipy.special import softmax
from sklearn.linear_model import LogisticRegressionCV

from agwm_jax.errors import AgwmError
from agwm_jax.methods.probe import Probe
from agwm_jax.methods.setfit import SetFit, contrastive_loss, cosine, draw_pairs
from agwm_jax.methods.training import mean_gradient

pytestmark = pytest.mark.usefixtures("quick_compilation")

LABELS = np.asarray(training_set()["labels"])


def rng():
    return np.random.default_rng(0)


def features_of(model, params, data) -> np.ndarray:
    return np.asarray(model.features(params, model.embed(params, data), data), np.float64)


def cosines(features):
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    return unit @ unit.T


def test_every_text_has_as_many_pairs_half_of_them_of_its_own_class():
    pairs = draw_pairs(LABELS, kind="classification", num_pairs=6, rng=rng())
    assert (pairs[:, 0] != pairs[:, 1]).all()
    alike = LABELS[pairs[:, 0]] == LABELS[pairs[:, 1]]
    for text in range(EXAMPLES):
        own = pairs[:, 0] == text
        assert (own.sum(), alike[own].sum()) == (6, 3)
    many = draw_pairs(np.array([0, 0, 0, 1, 1, 1]), kind="classification", num_pairs=60, rng=rng())
    assert {tuple(pair) for pair in many} == {(a, b) for a in range(6) for b in range(6) if a != b}


def test_a_regression_pairs_any_two_texts():
    pairs = draw_pairs(np.linspace(0, 1, 5), kind="regression", num_pairs=40, rng=rng())
    assert {tuple(pair) for pair in pairs} == {(a, b) for a in range(5) for b in range(5) if a != b}
    assert (np.bincount(pairs[:, 0]) == 40).all()


def test_the_plan_is_one_pass_over_all_pairs():
    setup = setup_of()
    plan = SetFit(num_pairs=4).build(setup).phases[0].plan["pair"]
    assert plan.shape == (EXAMPLES * 4 // BATCH, 2 * BATCH)
    found = plan.reshape(-1, 2, BATCH).swapaxes(1, 2).reshape(-1, 2)
    drawn = draw_pairs(LABELS, kind="classification", num_pairs=4, rng=setup.rng("pairs"))
    assert sorted(map(tuple, found)) == sorted(map(tuple, drawn))
    assert not np.array_equal(found, drawn)  # in an order of its own
    short = SetFit(num_pairs=2).build(setup_of(batch_size=3)).phases[0].plan["pair"]
    np.testing.assert_array_equal(short[-1] < 0, [False, False, True] * 2)  # both of a pair are padding, or none


@pytest.mark.parametrize("num_labels", [3, 1])
def test_the_loss_is_the_squared_distance_of_cosine_and_target(num_labels):
    setup, data = setup_of(num_labels=num_labels), training_set(num_labels)
    params = pretrained_weights(num_labels)
    rows = np.array([0, 1, 2, 3, 4, 9, 8, 7, 6, 5])
    weight = np.array([1, 1, 1, 1, 0] * 2, np.float32)
    batch = {**{name: x[rows] for name, x in data.items()}, "weight": jnp.asarray(weight)}
    first, second = rows[:4], rows[5:9]
    labels = np.asarray(data["labels"], np.float64)
    if num_labels == 1:
        target = 1 - abs(labels[first] - labels[second]) / (labels.max() - labels.min())
        assert 0 <= target.min() < target.max() < 1
    else:
        target = labels[first] == labels[second]
    cos = cosines(features_of(setup.model, params, data))[first, second]
    expected = np.mean((cos - target) ** 2)
    np.testing.assert_allclose(contrastive_loss(setup)(params, batch), expected, rtol=1e-5)


def test_a_batch_cut_into_parts_keeps_its_pairs():
    setup, params = setup_of(model=tiny_model(dropout=0)), pretrained_weights()
    rows = np.array([0, 1, 2, 3, 9, 8, 7, 6])
    batch = {**{name: x[rows] for name, x in training_set().items()}, "weight": jnp.ones(8)}
    loss = contrastive_loss(setup)
    whole, halves = (mean_gradient(loss, params, batch, parts=parts) for parts in (1, 2))
    chex.assert_trees_all_close(whole, halves, atol=1e-6)


def test_the_cosine_of_nothing_is_0_and_has_a_finite_gradient():
    a, b = jnp.array([[0.0, 0.0], [3.0, 4.0]]), jnp.array([[1.0, 0.0], [4.0, -3.0]])
    np.testing.assert_allclose(cosine(a, b), [0, 0], atol=1e-7)
    np.testing.assert_allclose(cosine(2 * b, b), [1, 1], rtol=1e-6)
    assert np.isfinite(jax.grad(lambda a: cosine(a, b).sum())(a)).all()


def task():
    """Texts whose class shows in one of their words."""
    chance = np.random.default_rng(4)
    labels = np.arange(EXAMPLES) % 2
    ids = chance.integers(2, VOCAB, (EXAMPLES, TOKENS))
    ids[:, 0] = labels
    return {"input_ids": jnp.asarray(ids, jnp.int32), "labels": jnp.asarray(labels, jnp.int32)}


def test_classes_are_drawn_together_and_the_head_is_scikit_learns_on_the_new_features():
    data, start = task(), pretrained_weights(2)
    labels = np.asarray(data["labels"])
    setup = setup_of(num_labels=2, model=tiny_model(dropout=0))._replace(labels=labels)
    trained = run(SetFit(learning_rate=2e-2).build(setup), start, jax.random.key(0), data=data)
    alike = labels[:, None] == labels
    gaps = []
    for params in (start, trained.weights):
        found = cosines(features_of(setup.model, params, data))
        gaps.append(found[alike].mean() - found[~alike].mean())
    assert gaps[1] > gaps[0] + 0.5
    assert trained.infos["contrast"]["loss"][-5:].mean() < 0.2 * trained.infos["contrast"]["loss"][:5].mean()
    features = features_of(setup.model, trained.weights, data)
    options = {"cv": 5, "Cs": np.logspace(-4, 4, 10), "scoring": "neg_log_loss", "max_iter": 1000}
    solution = LogisticRegressionCV(**options, l1_ratios=(0.0,), use_legacy_attributes=False).fit(features, labels)
    found = softmax(np.asarray(setup.model.apply(trained.weights, data), np.float64), axis=1)
    np.testing.assert_allclose(found, solution.predict_proba(features), atol=1e-4)


def test_the_pairs_train_all_but_the_classifier():
    """Not even weight decay moves it: what the pairs leave does not hold it."""
    contrast, head = SetFit().build(setup_of(frozen=("encoder.layers.norm.scale",))).phases
    shapes = SetFit().build(setup_of(frozen=("encoder.layers.norm.scale",))).learnt_shapes(pretrained_weights(), 1)
    assert set(shapes["task"]) == {
        path for path in pretrained_weights() if path != "encoder.layers.norm.scale" and "classifier" not in path
    }
    assert (contrast.name, head.name) == ("contrast", "features")


def test_without_pairs_it_is_probe_bit_for_bit():
    found = [run(m.build(setup_of()), pretrained_weights(), jax.random.key(0)) for m in (Probe(), SetFit(num_pairs=0))]
    chex.assert_trees_all_equal(found[0].weights, found[1].weights)


def test_pairs_that_do_not_exist_are_refused():
    labels = np.where(np.arange(EXAMPLES) == 4, 2, np.arange(EXAMPLES) % 2)
    with pytest.raises(AgwmError, match=r"class number 2 .* has one training text alone"):
        SetFit().build(setup_of()._replace(labels=labels))
    SetFit(num_pairs=0).build(setup_of()._replace(labels=labels))
    with pytest.raises(AgwmError, match="of one"):
        SetFit().build(setup_of()._replace(labels=np.zeros(EXAMPLES, int)))


def test_it_is_built_without_labels_where_a_finished_run_is_read():
    method = SetFit().build(setup_of()._replace(labels=None))
    shapes = method.learnt_shapes(pretrained_weights())
    chex.assert_trees_all_equal_shapes(shapes, SetFit().build(setup_of()).learnt_shapes(pretrained_weights()))
