"""The loss of a batch, held to its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agwm_jax.models.loss import batch_loss

LOGITS = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32))
LABELS = jnp.array([0, 2, 1, 1, 0])
LOG_P = np.asarray(jax.nn.log_softmax(LOGITS))


def loss(weight, **settings):
    function = batch_loss(lambda params, batch, *, key: params["logits"], "classification", **settings)
    return float(function({"logits": LOGITS}, {"labels": LABELS, "weight": jnp.asarray(weight, jnp.float32)}))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
def test_smoothed_labels_are_those_of_optax(smoothing):
    targets = optax.smooth_labels(jax.nn.one_hot(LABELS, 3), smoothing)
    expected = optax.softmax_cross_entropy(LOGITS, targets)
    np.testing.assert_allclose(loss(np.ones(5), label_smoothing=smoothing), expected.mean(), rtol=1e-6)
    weight = np.array([2.0, 0.5, 1.0, 1.0, 0.0])
    weighted = np.sum(weight * np.asarray(expected)) / weight.sum()
    np.testing.assert_allclose(loss(weight, label_smoothing=smoothing), weighted, rtol=1e-6)


def test_an_example_that_counts_twice_stands_there_twice():
    each = -LOG_P[np.arange(5), LABELS]
    np.testing.assert_allclose(loss([2, 1, 1, 1, 2]), np.mean(each[[0, 0, 1, 2, 3, 4, 4]]), rtol=1e-6)
