"""Every rule held to NumPy, on a problem of three encoder weights, an embedding and a head."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness import batch_of, pretrained_weights, setup_of, shapes_of, training_set
from three_weights import DATA, PRETRAINED, batch, by_path, flat, gradient, setup, take_step

from agwm_jax.core.types import LowRank
from agwm_jax.errors import AgwmError
from agwm_jax.methods.child_tuning_d import ChildTuningD
from agwm_jax.methods.interface import METHODS, Context
from agwm_jax.methods.l2_sp import L2SP
from agwm_jax.methods.lora import Lora
from agwm_jax.methods.mixout import Mixout, mixout
from agwm_jax.methods.subnetwork import top_share
from agwm_jax.methods.vanilla import Vanilla

W0 = flat(PRETRAINED)
MOVED = by_path(W0 + np.array([0.3, -0.2, 0.4, 0.1, -0.5]))


def as_task(weights) -> dict:
    return {"task": {path: jnp.asarray(weight, jnp.float32) for path, weight in weights.items()}}


def first_gradient(state):
    """What reached the optimiser, by path: Adam's first moment after one step is (1 - b1) of it."""
    return jax.tree.map(lambda moment: np.asarray(moment) / (1 - 0.9), optax.tree.get(state.opt_state, "mu"))


def assert_close(found, vector, tolerance=1e-5):
    np.testing.assert_allclose(flat(found), vector, rtol=tolerance, atol=tolerance)


def test_vanilla_takes_adamw_steps_whose_decay_follows_the_roles():
    (phase,) = Vanilla().build(setup(weight_decay=0.5, eps=1.0)).phases
    after, info, rows = take_step(phase, as_task(MOVED))
    g = gradient(flat(MOVED), rows)
    decaying = np.array([1, 1, 1, 0, 1])  # embedding, kernel and head's kernel, and not the bias
    assert_close(after.params["task"], flat(MOVED) - 0.01 * (g / (abs(g) + 1.0) + 0.5 * decaying * flat(MOVED)))
    residuals = DATA["x"][rows] @ flat(MOVED) - DATA["y"][rows]
    np.testing.assert_allclose(info["loss"], 0.5 * np.mean(residuals**2), rtol=1e-5)


def test_the_fisher_pass_keeps_the_weights_whose_mean_squared_gradient_is_largest():
    settings = setup(eps=1.0, gradient_clip=0.1)
    method = ChildTuningD(p=0.5).build(settings)
    fisher, finetune = method.phases
    initial = method.init(PRETRAINED, jax.random.key(0))
    context = Context(PRETRAINED, initial, initial)
    state = fisher.start(context, jax.random.key(0))
    read = jax.jit(fisher.step)
    rows_read = np.sort(fisher.plan["train"].ravel())
    np.testing.assert_array_equal(rows_read[rows_read >= 0], np.arange(10))  # each example once
    for step, rows in enumerate(fisher.plan["train"]):
        state, _ = read(state, context, {"train": batch(rows)}, jax.random.key(0), jnp.int32(step))
    learnt = jax.jit(fisher.finish)(context, state)

    expected = np.mean([gradient(W0, rows) ** 2 for rows in fisher.plan["train"]], axis=0)
    encoder = expected[1:4]
    np.testing.assert_allclose(state["encoder.query.kernel"].ravel(), encoder[:2], rtol=1e-5)
    np.testing.assert_allclose(state["encoder.query.bias"], encoder[2:], rtol=1e-5)
    kept = encoder >= np.quantile(encoder, 0.5)
    assert 0 < kept.sum() < 3
    assert learnt["mask"].keys() == {"encoder.query.kernel", "encoder.query.bias"}
    np.testing.assert_array_equal(learnt["mask"]["encoder.query.kernel"].ravel(), kept[:2])
    np.testing.assert_array_equal(learnt["mask"]["encoder.query.bias"], kept[2:])
    np.testing.assert_array_equal(flat(learnt["task"]), W0)  # it trains nothing

    after, _, rows = take_step(finetune, learnt, initial=initial)
    g = gradient(W0, rows) * [1, *kept, 1]
    g *= min(1, 0.1 / np.linalg.norm(g))  # the clip sees what the mask left
    assert_close(first_gradient(after)["task"], g)
    assert_close(after.params["task"], W0 - 0.01 * g / (abs(g) + 1.0))


@pytest.mark.parametrize("p", [1.0, 0.7, 0.5, 0.3, 0.04, 1e-6])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_the_share_on_top_is_that_of_numpys_quantile(p, dtype):
    rng = np.random.default_rng(0)
    scores = {"a": rng.random((2, 5, 3)) ** 8, "b": rng.random(7) * 1e-30, "c": np.repeat([0.0, 0.4, 0.4], 4)}
    scores = {path: jnp.asarray(x, dtype) for path, x in scores.items()}
    everything = np.concatenate([np.asarray(x, np.float64).ravel() for x in scores.values()])
    bound = np.quantile(everything, 1 - p)
    for path, mask in jax.jit(top_share, static_argnums=1)(scores, p).items():
        np.testing.assert_array_equal(mask, np.asarray(scores[path], np.float64) >= bound)


def test_mixout_puts_a_share_p_back_to_w0_and_its_mean_is_w():
    task, pretrained, p = jnp.linspace(1, 2, 40_000), jnp.linspace(-1, 3, 40_000), 0.7
    noisy = np.asarray(mixout(jax.random.key(0), task, pretrained, p), np.float64)
    scaled = (np.asarray(task, np.float64) - p * np.asarray(pretrained, np.float64)) / (1 - p)
    back = np.isclose(noisy, pretrained, rtol=0, atol=1e-7)
    np.testing.assert_allclose(noisy[~back], scaled[~back], rtol=1e-5, atol=1e-5)
    deviations = 4  # of the mean of 40,000 draws
    assert abs(back.mean() - p) < deviations * np.sqrt(p * (1 - p) / 40_000)
    spread = np.std(noisy - np.asarray(task, np.float64)) / np.sqrt(40_000)
    assert abs(np.mean(noisy - np.asarray(task, np.float64))) < deviations * spread


def test_mixouts_noise_is_on_the_chosen_roles_and_new_at_every_step():
    method = Mixout(p=0.5, roles=("kernel", "bias")).build(setup())
    (phase,) = method.phases
    found = [take_step(phase, as_task(MOVED), key=jax.random.key(seed)) for seed in range(8)]
    losses = {float(info["loss"]) for _, info, _ in found}
    # Three noisy weights have eight masks: the losses are among those, and more than one of them is met.
    masks = np.array(np.meshgrid(*[[0, 1]] * 3)).reshape(3, -1).T
    rows, moved = found[0][2], flat(MOVED)
    points = {}
    for mask in masks:
        noisy = moved.copy()
        noisy[1:4] = (mask * moved[1:4] + (1 - mask) * W0[1:4] - 0.5 * W0[1:4]) / 0.5
        points[tuple(mask)] = noisy
    values = {m: 0.5 * np.mean((DATA["x"][rows] @ point - DATA["y"][rows]) ** 2) for m, point in points.items()}
    assert len(losses) > 2
    for after, info, _ in found:
        mask = min(values, key=lambda m: abs(values[m] - info["loss"]))
        np.testing.assert_allclose(info["loss"], values[mask], rtol=1e-5)
        g = gradient(points[mask], rows) * [1, *(np.array(mask) / 0.5), 1]
        assert_close(first_gradient(after)["task"], g, 1e-4)
    merged = method.merge(PRETRAINED, as_task(MOVED))
    assert_close(merged, moved, 1e-6)  # evaluation sees W


def test_loras_merge_gradient_start_and_size():
    method = Lora(r=3, alpha=6.0, learning_rate=0.25).build(setup())
    (phase,) = method.phases
    initial = method.init(PRETRAINED, jax.random.key(0))
    factors = initial["lora"]["encoder.query.kernel"]
    assert factors.left.shape == (2, 3)
    assert factors.right.shape == (3, 1)
    assert not np.any(factors.right)
    assert np.all(abs(factors.left) <= 2**-0.5)
    assert np.any(factors.left)
    assert initial["task"].keys() == {"classifier.kernel"}

    left, right = np.array([[1.0, -2, 0.5], [0.0, 1, 3]]), np.array([[0.5], [1.0], [-1.0]])
    learnt = {**initial, "lora": {"encoder.query.kernel": LowRank(*map(jnp.asarray, (left, right)))}}
    learnt = jax.tree.map(lambda x: x.astype(jnp.float32), learnt)
    effective = {**by_path(W0), "encoder.query.kernel": by_path(W0)["encoder.query.kernel"] + 2 * left @ right}
    assert_close(method.merge(PRETRAINED, learnt), flat(effective), 1e-6)

    after, _, rows = take_step(phase, learnt)
    g = by_path(gradient(flat(effective), rows))
    found = first_gradient(after)
    of_factors, of_product = found["lora"]["encoder.query.kernel"], 2 * g["encoder.query.kernel"]
    np.testing.assert_allclose(of_factors.left, of_product @ right.T, rtol=1e-4)
    np.testing.assert_allclose(of_factors.right, left.T @ of_product, rtol=1e-4)
    np.testing.assert_allclose(found["task"]["classifier.kernel"], g["classifier.kernel"], rtol=1e-4)
    step = 0.25 * np.sign(g["classifier.kernel"])  # Adam's first, at LoRA's own rate
    np.testing.assert_allclose(after.params["task"]["classifier.kernel"], W0[4:, None] - step, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "factors", "whole"),
    [
        ({}, 2 * 2 * (6 + 6) * 8, 6 * 3 + 3),
        ({"targets": None, "r": 2}, (2 * 2 + 1) * (6 + 6) * 2, 6 * 3 + 3),
        ({"biases": True}, 2 * 2 * (6 + 6) * 8, 6 * 3 + 3 + 2 * 6 + 6),
    ],
)
def test_lora_trains_as_many_numbers_as_it_should(settings, factors, whole):
    variables = jax.eval_shape(Lora(**settings).build(setup_of()).init, shapes_of(), jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(variables["lora"])) == factors
    assert sum(x.size for x in jax.tree.leaves(variables["task"])) == whole


def test_targets_that_are_all_frozen_are_refused():
    with pytest.raises(AgwmError, match=r"method\.targets .*frozen"):
        Lora().build(setup(frozen=("encoder.query.kernel",)))
    with pytest.raises(AgwmError, match="frozen"):
        ChildTuningD().build(setup(frozen=("encoder.query.kernel", "encoder.query.bias")))


def test_the_penalty_of_l2_sp_pulls_to_w0_and_the_head_to_0():
    (phase,) = L2SP(strength=0.3, head_strength=0.7).build(setup()).phases
    after, info, rows = take_step(phase, as_task(MOVED))
    moved = flat(MOVED)
    g = gradient(moved, rows) + 0.3 * (moved - W0) * [1, 1, 1, 1, 0] + 0.7 * moved * [0, 0, 0, 0, 1]
    assert_close(first_gradient(after)["task"], g)
    squares = 0.5 * np.mean((DATA["x"][rows] @ moved - DATA["y"][rows]) ** 2)
    penalty = 0.15 * np.sum((moved - W0)[:4] ** 2) + 0.35 * moved[4] ** 2
    np.testing.assert_allclose(info["loss"], squares + penalty, rtol=1e-5)


@pytest.mark.parametrize("step", [0, 1])
def test_decoupled_l2_sp_pulls_by_the_learning_rate_of_the_step_alone(step):
    settings = setup(eps=1.0, warmup_fraction=0.5, epochs=2)  # six steps: rates 0, 1/3, 2/3 of the peak, ...
    (phase,) = L2SP(strength=0.3, head_strength=0.7, decoupled=True).build(settings).phases
    after, info, rows = take_step(phase, as_task(MOVED), step=step)
    moved = flat(MOVED)
    g = gradient(moved, rows)
    assert_close(first_gradient(after)["task"], g)
    pull = 0.3 * (moved - W0) * [1, 1, 1, 1, 0] + 0.7 * moved * [0, 0, 0, 0, 1]
    # A fresh optimiser counts from 0, where its own rate is still 0: what is left is the pull at the rate of this step.
    assert_close(after.params["task"], moved - 0.01 * step / 3 * pull, 1e-6)
    np.testing.assert_allclose(info["loss"], 0.5 * np.mean((DATA["x"][rows] @ moved - DATA["y"][rows]) ** 2), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("frozen_alpha", {"mixup": {"rank": 2, "noise": 0.3}}),
        ("frozen_alpha", {"mixup": {"complement": "factored", "noise": 0.3}}),
        ("joint", {"mixup": {"noise": 0.3}}),
        ("fixed_gate", {"gate": 0.3}),
        ("lora", {"targets": None}),
    ],
)
def test_training_within_the_models_layers_sees_the_merged_weights(name, settings):
    """Stacked kernels are computed layer by layer; the loss is that of what `merge` gives."""
    built = setup_of()
    method = METHODS[name].value.model_validate({"name": name, **settings}).build(built)
    pretrained = pretrained_weights()
    (phase,) = method.phases

    @jax.jit
    def losses(key):
        variables = method.init(pretrained, key)
        variables = jax.tree.map(lambda x: x + 0.2 * jnp.cos(jnp.arange(1.0 * x.size)).reshape(x.shape), variables)
        rows = batch_of(training_set(), phase.plan["train"][0], key)
        context = Context(pretrained, variables, variables)
        _, info = phase.step(phase.start(context, key), context, {"train": rows}, key, jnp.int32(0))
        merged = method.merge(pretrained, variables)
        return (
            info["loss"],
            built.loss(reverse_only=True)(merged, rows),
            built.loss(reverse_only=True)(pretrained, rows),
        )

    trained, merged, plain = losses(jax.random.key(0))
    np.testing.assert_allclose(trained, merged, rtol=1e-6)
    assert abs(merged - plain) > 1e-3
