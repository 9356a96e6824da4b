"""R-Drop, layer-wise rates and averages, each against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import LAYERS, batch_of, pretrained_weights, run, setup_of, training_set
from scipy.special import log_softmax
from three_weights import DATA, PRETRAINED, flat, gradient, setup, take_step

from agwm_jax.methods.divergence import noise_key
from agwm_jax.methods.ema import EMA
from agwm_jax.methods.interface import METHODS, Context
from agwm_jax.methods.llrd import Llrd
from agwm_jax.methods.r_drop import RDrop
from agwm_jax.methods.swa import SWA
from agwm_jax.methods.technique import compose
from agwm_jax.methods.training import plain_fine_tuning


@pytest.mark.parametrize("num_labels", [3, 1])
def test_r_drop_is_the_mean_of_two_losses_and_the_divergence_of_two_passes(num_labels):
    built, pretrained, key = setup_of(num_labels=num_labels), pretrained_weights(num_labels), jax.random.key(4)
    rows = np.array([3, 7, -1, 1])
    batch = batch_of(training_set(num_labels), rows, key)
    changed = RDrop(a=0.6).change_setup(built)
    found = changed.training_loss(reverse_only=True)(pretrained, batch)

    real, labels = rows >= 0, np.asarray(batch["labels"])
    logits = [np.asarray(built.model.apply(pretrained, batch, key=own), np.float64) for own in (key, noise_key(key))]
    assert np.abs(logits[0] - logits[1]).max() > 0.1  # two masks
    if num_labels == 1:
        losses = [(x[:, 0] - labels) ** 2 for x in logits]
        apart = 2 * (logits[0] - logits[1])[:, 0] ** 2 / 2
    else:
        logs = [log_softmax(x, axis=1) for x in logits]
        losses = [-log[np.arange(4), labels] for log in logs]
        apart = sum((np.exp(p) * (p - q)).sum(1) for p, q in (logs, logs[::-1]))
    each = (losses[0] + losses[1]) / 2 + 0.3 * apart
    np.testing.assert_allclose(found, each[real].mean(), rtol=1e-5)
    # What is validated is the plain loss.
    np.testing.assert_allclose(changed.loss(reverse_only=True)(pretrained, batch), losses[0][real].mean(), rtol=1e-5)


def test_the_second_mask_shares_no_key_with_the_first():
    key = jax.random.key(3)
    first = [jax.random.key_data(x).tolist() for x in jax.random.split(key)]
    second = [jax.random.key_data(x).tolist() for x in jax.random.split(noise_key(key))]
    assert not any(x in first for x in [*second, jax.random.key_data(noise_key(key)).tolist()])


def test_layer_wise_rates_fall_from_the_head_to_the_embeddings():
    built = setup_of(schedule="constant", warmup_fraction=0.0, eps=1.0, gradient_clip=None)
    context_of = [compose(plain_fine_tuning, techniques, built) for techniques in ((), (Llrd(decay=0.5),))]
    pretrained, key = pretrained_weights(), jax.random.key(0)
    moved = []
    for method in context_of:
        initial = method.init(pretrained, key)
        (phase,) = method.phases
        context = Context(pretrained, initial, initial)
        batch = batch_of(training_set(), phase.plan["train"][0], key)
        state, _ = jax.jit(phase.step)(phase.start(context, key), context, {"train": batch}, key, jnp.int32(0))
        moved.append({path: np.asarray(state.params["task"][path] - x) for path, x in pretrained.items()})
    factors = {
        "classifier.kernel": 1.0,
        "pooler.kernel": 1.0,
        "encoder.layers.query.kernel": np.array([0.25, 0.5])[:, None, None],
        "encoder.layers.query.bias": np.array([0.25, 0.5])[:, None],
        "embeddings.word.embedding": 0.5 ** (LAYERS + 1),
    }
    for path, factor in factors.items():
        np.testing.assert_allclose(moved[1][path], factor * moved[0][path], rtol=2e-3, atol=1e-7)


def weights_of_every_step(technique):
    """W after each step of plain fine-tuning and what the technique leaves, on the linear regression."""
    method = compose(plain_fine_tuning, (technique,), setup(eps=1.0, epochs=2))
    (phase,) = method.phases
    initial = method.init(PRETRAINED, jax.random.key(0))
    context = Context(PRETRAINED, initial, initial)
    state, step = phase.start(context, jax.random.key(0)), jax.jit(phase.step)
    w, m, v, seen = flat(PRETRAINED), np.zeros(5), np.zeros(5), []
    for t, rows in enumerate(phase.plan["train"], start=1):
        batch = batch_of({name: jnp.asarray(x) for name, x in DATA.items()}, rows, jax.random.key(0))
        state, _ = step(state, context, {"train": batch}, jax.random.key(0), jnp.int32(t - 1))
        g = gradient(w, rows)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        w = w - 0.01 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1.0)
        seen.append(w)
    return seen, flat(phase.finish(context, state)["task"])


@pytest.mark.parametrize("share", [0.5, 1.0, 0.34])
def test_the_average_is_the_mean_over_the_last_share_of_steps(share):
    seen, left = weights_of_every_step(SWA(share=share))
    last = seen[-max(1, int(share * len(seen))) :]
    assert 1 < len(last) <= len(seen)
    np.testing.assert_allclose(left, np.mean(last, axis=0), rtol=1e-5)


def test_the_exponential_average_forgets_by_its_decay():
    seen, left = weights_of_every_step(EMA(decay=0.7))
    mean = seen[0]
    for w in seen[1:]:
        mean = 0.7 * mean + 0.3 * w
    np.testing.assert_allclose(left, mean, rtol=1e-5)


def test_an_average_leaves_what_is_not_trained_as_it_was():
    settings = METHODS["frozen_alpha"].value.model_validate({"name": "frozen_alpha", "mixup": {"noise": 0.3}})
    pretrained, key = pretrained_weights(), jax.random.key(3)
    plain, averaged = (run(compose(settings.build, t, setup_of()), pretrained, key) for t in ((), (SWA(),)))
    for path, gate in plain.learnt["alpha"].items():
        np.testing.assert_array_equal(averaged.learnt["alpha"][path].left, gate.left)
    assert np.any(averaged.weights["pooler.kernel"] != plain.weights["pooler.kernel"])


def test_three_weights_take_a_step_through_a_technique():
    """The objective, the optimiser and the average of one phase at once."""
    method = compose(plain_fine_tuning, (Llrd(decay=0.5), SWA()), setup(eps=1.0))
    state, _, rows = take_step(method.phases[0], method.init(PRETRAINED, jax.random.key(0)))
    g = gradient(flat(PRETRAINED), rows)
    factor = np.array([0.25, 0.5, 0.5, 0.5, 1.0])  # embedding, layer 1, head
    np.testing.assert_allclose(
        flat(state.inner.params["task"]), flat(PRETRAINED) - 0.01 * factor * g / (abs(g) + 1), rtol=1e-5
    )
