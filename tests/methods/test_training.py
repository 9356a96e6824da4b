"""The phase that most methods share: gradients of a batch's parts, decay by role, schedules."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness import abstract_step, pretrained_weights, run, setup_of, shapes_of, tiny_model, weights_of

from agwm_jax.errors import AgwmError
from agwm_jax.methods.interface import METHODS
from agwm_jax.methods.optimizers import OptimizerSettings, adamw_of_transformers, decay_mask, schedule
from agwm_jax.methods.training import mean_gradient
from agwm_jax.methods.vanilla import Vanilla
from agwm_jax.models.weights import decays


def squares(w, batch):
    return jnp.sum(batch["weight"] * (batch["x"] @ w - batch["y"]) ** 2) / jnp.sum(batch["weight"])


@pytest.mark.parametrize("parts", [2, 3, 6])
@pytest.mark.parametrize("real", [6, 4, 1])
def test_parts_of_a_batch_give_the_gradient_of_the_whole(parts, real):
    """Padding stands last, so that with few real rows some parts hold nothing else; theirs is no NaN."""
    rng = np.random.default_rng(0)
    batch = {"x": rng.normal(size=(6, 4)), "y": rng.normal(size=6), "weight": 1.0 * (np.arange(6) < real)}
    batch = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), batch)
    w = jnp.asarray(rng.normal(size=4), jnp.float32)
    value, grads = mean_gradient(squares, w, batch, parts=parts)
    x, y = np.asarray(batch["x"], np.float64)[:real], np.asarray(batch["y"], np.float64)[:real]
    residual = x @ np.asarray(w, np.float64) - y
    np.testing.assert_allclose(value, np.mean(residual**2), rtol=1e-6)
    np.testing.assert_allclose(grads, 2 * x.T @ residual / real, rtol=2e-5, atol=1e-6)


def test_each_part_draws_dropout_of_its_own():
    key = jax.random.key(4)
    batch = {"x": jnp.zeros((4, 1)), "weight": jnp.ones(4), "key": key}
    value, _ = mean_gradient(lambda w, part: w * jax.random.uniform(part["key"]), jnp.ones(()), batch, parts=4)
    np.testing.assert_allclose(value, np.mean([jax.random.uniform(k) for k in jax.random.split(key, 4)]), rtol=1e-6)


def test_only_one_parts_activations_live_at_a_time():
    """The loss of a part sees b / parts rows, and all rows are seen once."""
    seen = []

    def loss(w, part):
        seen.append(part["x"].shape)
        return jnp.sum(w * part["x"] * part["weight"]) / jnp.sum(part["weight"])

    batch = {"x": jnp.arange(6.0), "weight": jnp.ones(6)}
    value, _ = mean_gradient(loss, jnp.ones(()), batch, parts=3)
    assert set(seen) == {(2,)}
    np.testing.assert_allclose(value, 2.5)


def test_a_run_in_parts_is_the_run_of_whole_batches():
    """Without dropout, to rounding; the last batch of a pass has two rows of four."""
    pretrained, key, model = pretrained_weights(), jax.random.key(0), tiny_model(dropout=0)
    whole = run(Vanilla().build(setup_of(model=model)), pretrained, key)
    parts = run(Vanilla().build(setup_of(model=model, accumulate=4)), pretrained, key)
    np.testing.assert_allclose(parts.losses, whole.losses, rtol=1e-5)
    chex.assert_trees_all_close(parts.weights, whole.weights, atol=1e-4)


def test_parts_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(AgwmError, match="batch of 4 examples cannot be cut into 3"):
        Vanilla().build(setup_of(accumulate=3))


def test_matrices_and_tables_decay_in_every_collection():
    weights = weights_of()
    tree = {"task": dict.fromkeys(weights, 0), "lora": {"encoder.layers.query.kernel": (0, 0)}, "other": {"x": 0}}
    mask = decay_mask(decays(weights))(tree)
    decaying = {path for path, decides in mask["task"].items() if decides}
    assert decaying == {
        "embeddings.word.embedding",
        "encoder.layers.query.kernel",
        "encoder.layers.value.kernel",
        "pooler.kernel",
        "classifier.kernel",
    }
    assert mask["lora"]["encoder.layers.query.kernel"] == (True, True)
    assert mask["other"]["x"] is False


@pytest.mark.parametrize(
    ("name", "last"), [("linear", 1 / 8), ("cosine", 0.5 * (1 + np.cos(np.pi * 7 / 8))), ("constant", 1.0)]
)
def test_a_schedule_warms_up_and_then_decays_to_0(name, last):
    rate = schedule(OptimizerSettings(learning_rate=1.0, schedule=name, warmup_fraction=0.2), num_steps=10)
    np.testing.assert_allclose([rate(step) for step in (0, 1, 2, 9)], [0, 0.5, 1, last], atol=1e-6)


@pytest.mark.parametrize("variant", ["adamw", "transformers_4_24"])
def test_a_rate_in_the_state_is_the_rate(variant):
    """The steps of the same optimiser at a constant of the program, bit for bit."""
    settings = OptimizerSettings(learning_rate=3e-3, variant=variant, warmup_fraction=0.3)
    params = {"encoder.query.kernel": jnp.arange(6.0).reshape(2, 3)}
    weights = {path: weight for path, weight in weights_of().items() if path.endswith("query.kernel")}
    params = dict.fromkeys(weights, params["encoder.query.kernel"])
    held = settings.build(num_steps=10, weights=weights)
    adamw = {"adamw": optax.adamw, "transformers_4_24": adamw_of_transformers}[variant]
    options = {"b1": settings.b1, "b2": settings.b2, "eps": settings.eps, "weight_decay": settings.weight_decay}
    rate = schedule(settings, num_steps=10)
    plain = optax.chain(optax.clip_by_global_norm(1.0), adamw(rate, **options, mask=decay_mask(decays(weights))))
    states = [tx.init(params) for tx in (held, plain)]
    for step in range(10):
        grads = jax.tree.map(lambda w, step=step: jnp.sin(w + step), params)
        (ours, states[0]), (theirs, states[1]) = (
            tx.update(grads, state, params) for tx, state in zip((held, plain), states, strict=True)
        )
        chex.assert_trees_all_equal(ours, theirs)
        params = optax.apply_updates(params, ours)


@pytest.mark.parametrize("name", ["vanilla", "agwm", "lora"])
def test_runs_at_several_rates_share_one_program(name):
    """What is compiled for a phase does not hold its learning rates."""

    def programs(rate) -> list[str]:
        section = {
            "name": name,
            **({"search": {"validation_fraction": 0.4, "inner": {"learning_rate": rate}}} if name == "agwm" else {}),
        }
        section |= {"learning_rate": rate} if name == "lora" else {}
        method = METHODS[name].value.model_validate(section).build(setup_of(learning_rate=rate))
        shapes = shapes_of()
        return [
            jax.jit(phase.step).lower(*abstract_step(phase, method.learnt_shapes(shapes, number))).as_text()
            for number, phase in enumerate(method.phases)
        ]

    assert programs(1e-3) == programs(2e-2)
