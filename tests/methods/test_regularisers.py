"""Rules that noise, distance and choice of weights put on fine-tuning, held to NumPy, and how they go together."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness import LAYERS, Runner, batch_of, pretrained_weights, run, setup_of, tiny_model, training_set
from three_weights import DATA, PRETRAINED, by_path, flat, gradient, setup, take_step

from agwm_jax.errors import AgwmError
from agwm_jax.methods.agwm import Agwm
from agwm_jax.methods.child_tuning_f import ChildTuningF
from agwm_jax.methods.frozen_alpha import FrozenAlpha
from agwm_jax.methods.interface import METHODS, Context
from agwm_jax.methods.layers import count_layers, from_the_top
from agwm_jax.methods.llrd import Llrd
from agwm_jax.methods.lora import Lora
from agwm_jax.methods.r3f import R3F
from agwm_jax.methods.r_drop import RDrop
from agwm_jax.methods.recadam import RecAdam
from agwm_jax.methods.reinit import Reinit
from agwm_jax.methods.sam import SAM
from agwm_jax.methods.smart import Smart
from agwm_jax.methods.spd import SPD
from agwm_jax.methods.swa import SWA
from agwm_jax.methods.technique import check_techniques, compose
from agwm_jax.methods.top_k import TopK
from agwm_jax.methods.vanilla import Vanilla
from agwm_jax.models.model import Model
from tests.models.small_models import SMALL, build

pytestmark = pytest.mark.usefixtures("quick_compilation")

W0 = flat(PRETRAINED)
MOVED = by_path(W0 + np.array([0.3, -0.2, 0.4, 0.1, -0.5]))
KEY = jax.random.key(3)


def as_task(weights) -> dict:
    return {"task": {path: jnp.asarray(weight, jnp.float32) for path, weight in weights.items()}}


def first_gradient(state):
    return jax.tree.map(lambda moment: np.asarray(moment) / (1 - 0.9), optax.tree.get(state.opt_state, "mu"))


def assert_close(found, vector, tolerance=1e-5):
    np.testing.assert_allclose(flat(found), vector, rtol=tolerance, atol=tolerance)


# The models that show what noise a technique puts on the word embeddings, of four texts, three tokens, two numbers.
B, T, D = 4, 3, 2
SHOWN = {"input_ids": jnp.zeros((B, T), jnp.int32), "labels": jnp.zeros(B), "x": jnp.array([1.0, 10.0, 0.1, 3.0])}
SHOWN["weight"] = jnp.array([1.0, 1.0, 1.0, 0.0])


def showing_model() -> Model:
    """Its logits are the numbers that it gets in place of word embeddings, which are 0."""
    return Model(
        embed=lambda params, batch: jnp.zeros((B, T, D)) * params["a"],
        features=lambda params, embedded, batch, *, key=None, reverse_only=False: embedded.reshape(B, T * D),
        logits=lambda params, features, *, key=None: features,
        weights={},
    )


def linear_model() -> Model:
    """``x * a . e``, x of the text, a the only weight."""
    return Model(
        embed=lambda params, batch: jnp.ones((B, T, D)),
        features=lambda params, embedded, batch, *, key=None, reverse_only=False: (
            batch["x"][:, None] * (embedded * params["a"][None]).reshape(B, T * D)
        ),
        logits=lambda params, features, *, key=None: features.sum(1, keepdims=True),
        weights={},
    )


def objective_of(technique, model, **options):
    return technique.change_setup(setup_of(model=model, **options)).training_loss(reverse_only=True)


def symmetric_kl(first, second) -> np.ndarray:
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in np.asarray([first, second], np.float64))
    return np.sum(p * np.log(p / q) + q * np.log(q / p), -1)


@pytest.mark.parametrize(("noise", "spread"), [("uniform", 0.1 / np.sqrt(3)), ("normal", 0.1)])
def test_the_noise_of_r3f_has_its_size_and_is_new_at_every_step(noise, spread):
    outputs = jax.jit(jax.vmap(objective_of(R3F(eps=0.1, noise=noise), showing_model()).outputs, (None, 0)))
    keyed = {**{name: jnp.stack([x] * 500) for name, x in SHOWN.items()}, "key": jax.random.split(KEY, 500)}
    plain, z = (np.asarray(x, np.float64) for x in outputs({"a": 1.0}, keyed))
    assert not plain.any()
    assert len(np.unique(z)) > 0.99 * z.size
    np.testing.assert_allclose(z.std(), spread, rtol=0.04)
    assert abs(z.mean()) < 4 * spread / np.sqrt(z.size)
    assert (abs(z).max() <= 0.1) == (noise == "uniform")


def test_r3f_adds_the_symmetric_divergence_of_real_examples():
    model, weights = tiny_model(dropout=0), pretrained_weights()
    technique = R3F(weight=0.7, eps=0.3)
    loss = objective_of(technique, model)
    batch = batch_of(training_set(), np.array([3, 1, -1, 7]), KEY)
    logits, noisy = loss.outputs(weights, batch)
    np.testing.assert_array_equal(logits, model.apply(weights, batch))
    each = symmetric_kl(logits, noisy)
    plain = setup_of(model=model).loss(reverse_only=True)(weights, batch)
    assert each.min() > 1e-4
    np.testing.assert_allclose(loss(weights, batch), plain + 0.7 * each[[0, 1, 3]].mean(), rtol=1e-5)

    regression = objective_of(technique, model, num_labels=1)
    one = pretrained_weights(1)
    batch = batch_of(training_set(1), np.array([3, 1, -1, 7]), KEY)
    first, second = (np.asarray(x, np.float64)[[0, 1, 3], 0] for x in regression.outputs(one, batch))
    expected = np.mean((first - np.asarray(batch["labels"])[[0, 1, 3]]) ** 2) + 0.7 * np.mean((first - second) ** 2)
    np.testing.assert_allclose(regression(one, batch), expected, rtol=1e-5)


@pytest.mark.parametrize("technique", [R3F(eps=1e-6), Smart(eps=1e-6, step=1e-6)])
def test_both_passes_have_the_dropout_of_vanilla(technique):
    model, weights = tiny_model(dropout=0.5), pretrained_weights()
    batch = batch_of(training_set(), np.arange(4), KEY)
    logits, noisy = objective_of(technique, model).outputs(weights, batch)
    plain = model.apply(weights, batch, key=batch["key"])
    np.testing.assert_array_equal(logits, plain)
    np.testing.assert_allclose(noisy, plain, atol=1e-4)
    assert np.any(noisy != plain)
    assert np.abs(plain - model.apply(weights, batch)).max() > 0.1


@pytest.mark.parametrize("technique", [R3F(eps=0.1), Smart(eps=0.1)])
def test_a_batch_without_a_key_has_no_noise(technique):
    model, weights = tiny_model(), pretrained_weights()
    batch = {**training_set(), "weight": jnp.ones(10)}
    plain = setup_of(model=model).loss(reverse_only=True)(weights, batch)
    np.testing.assert_array_equal(objective_of(technique, model)(weights, batch), plain)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("technique", [R3F(eps=0.1), Smart(eps=0.1, step=0.1)])
def test_padding_has_no_effect(technique, pooling):
    """Neither what stands there nor the noise on it: a text's loss is that of the text alone."""
    model, weights = build(SMALL["gelu"], pooling=pooling)
    loss = jax.jit(objective_of(technique, model))
    rng = np.random.default_rng(0)
    mask = np.arange(9) < np.array([[9], [4], [1]])
    first, second = (jnp.asarray(np.where(mask, 7, rng.integers(0, 50, (3, 9))), jnp.int32) for _ in range(2))
    batch = {"attention_mask": jnp.asarray(mask, jnp.int32), "labels": jnp.array([0, 2, 1]), "weight": jnp.ones(3)}
    found = [loss(weights, {**batch, "input_ids": ids, "key": KEY}) for ids in (first, second)]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)
    plain = setup_of(model=model).loss(reverse_only=True)(weights, {**batch, "input_ids": first, "key": KEY})
    assert found[0] > plain + 1e-4


@pytest.mark.parametrize("radius", [None, 1e-3])
def test_smart_climbs_once_example_by_example_and_holds_z_constant(radius):
    """Of a linear model the gradient in z is a multiple of a, however large x is; padding rows have none."""
    a = np.array([[0.3, -1.0], [2.0, 0.5], [-0.4, 0.7]])
    technique = Smart(weight=0.5, eps=1e-5, step=1e-2, radius=radius)
    loss = objective_of(technique, linear_model(), num_labels=1)
    params, batch = {"a": jnp.asarray(a, jnp.float32)}, {**SHOWN, "key": KEY}
    z = 1e-2 * a / np.abs(a).max()
    z = z if radius is None else np.clip(z, -radius, radius)
    x = np.asarray(SHOWN["x"], np.float64)
    first, second = (np.asarray(out, np.float64)[:3, 0] for out in loss.outputs(params, batch))
    np.testing.assert_allclose(abs(second - first), x[:3] * np.sum(a * z), rtol=5e-3)

    still = objective_of(technique.model_copy(update={"step": 0.0}), linear_model(), num_labels=1)
    start = np.subtract(*still.outputs(params, batch)[::-1])[:3, 0]
    np.testing.assert_array_equal(np.sign(second - first), np.sign(start))  # uphill: farther from f(e), not nearer
    labels = jax.lax.stop_gradient(linear_model().apply(params, batch)[:, 0])  # here the plain loss has no gradient
    of_term = 0.5 * np.mean(x[:3] ** 2) * 2 * np.sum(a * z) * z
    found = jax.grad(loss)(params, {**batch, "labels": labels})["a"]
    np.testing.assert_allclose(found, of_term, rtol=3e-2, atol=5e-3 * np.abs(of_term).max())


def test_smart_starts_from_normal_noise_and_bears_a_gradient_of_0():
    """Where the ascent has no gradient, as of the padding row, z is z0."""
    outputs = jax.jit(jax.vmap(objective_of(Smart(eps=0.1, step=5.0), showing_model()).outputs, (None, 0)))
    keyed = {**{name: jnp.stack([x] * 500) for name, x in SHOWN.items()}, "key": jax.random.split(KEY, 500)}
    z = np.asarray(outputs({"a": 1.0}, keyed)[1], np.float64)
    start, moved = z[:, 3], z[:, :3]
    np.testing.assert_allclose(start.std(), 0.1, rtol=0.04)
    np.testing.assert_allclose(abs(moved).max(-1), 5, atol=0.5)


def test_sam_takes_the_gradient_uphill_and_records_the_loss_at_w():
    (phase,) = SAM(rho=0.3).build(setup(eps=1.0, gradient_clip=0.5)).phases
    after, info, rows = take_step(phase, as_task(MOVED))
    moved = flat(MOVED)
    g = gradient(moved, rows)
    uphill = gradient(moved + 0.3 * g / np.linalg.norm(g), rows)
    assert np.abs(uphill - g).max() > 0.1
    uphill *= min(1, 0.5 / np.linalg.norm(uphill))
    assert_close(first_gradient(after)["task"], uphill)
    assert_close(after.params["task"], moved - 0.01 * uphill / (abs(uphill) + 1))
    np.testing.assert_allclose(info["loss"], 0.5 * np.mean((DATA["x"][rows] @ moved - DATA["y"][rows]) ** 2), rtol=1e-5)


def test_sam_bears_a_gradient_of_0():
    trained = as_task(MOVED)

    def at_its_minimum(w):
        return sum(jnp.sum((x - y) ** 2) for x, y in zip(*map(jax.tree.leaves, (w, trained)), strict=True))

    differentiate = SAM(rho=0.3).hooks(setup(), num_steps=3).differentiate
    found = differentiate(jax.value_and_grad(at_its_minimum), trained)
    chex.assert_trees_all_equal(found, (jnp.zeros(()), jax.tree.map(jnp.zeros_like, trained)))


def test_child_tuning_f_masks_every_weight_before_the_clip():
    (phase,) = ChildTuningF(p=0.4).build(setup(eps=1.0, gradient_clip=0.7)).phases
    patterns = set()
    for seed in range(12):
        after, _, rows = take_step(phase, as_task(MOVED), key=jax.random.key(seed))
        reached = flat(first_gradient(after)["task"])
        kept = reached != 0
        g = gradient(flat(MOVED), rows) * kept / 0.4
        assert_close(by_path(reached), g * min(1, 0.7 / max(np.linalg.norm(g), 1e-9)))
        patterns.add(tuple(kept))
    assert len(patterns) > 6
    assert {0, 1} == set(np.array(list(patterns)).min(0)) | set(np.array(list(patterns)).max(0))
    assert np.all(np.array(list(patterns)).max(0) != np.array(list(patterns)).min(0))  # embedding and head as well


def test_child_tuning_f_keeps_a_share_p_and_the_mean():
    hooks = ChildTuningF(p=0.3).hooks(setup(), num_steps=3)
    g = {"task": {"a": jnp.ones(20_000), "b": jnp.ones(20_000)}, "lora": jnp.ones(3)}
    masked = hooks.gradient(g, Context({}, {}, {}), KEY)
    a, b = (np.asarray(masked["task"][name], np.float64) for name in "ab")
    np.testing.assert_allclose(np.unique(a), [0, 1 / 0.3], rtol=1e-6)
    assert abs(np.mean([a, b]) - 1) < 4 * np.sqrt(0.3 * 0.7 / 40_000) / 0.3
    assert abs(np.mean((a > 0) & (b > 0)) - 0.09) < 0.01  # each leaf has a mask of its own


def test_recadam_fades_the_step_in_and_the_pull_out():
    technique = RecAdam(gamma=40.0, k=0.5, t0=2.0)
    (phase,) = technique.build(setup(eps=1.0, weight_decay=0.5, epochs=2)).phases
    for step in (0, 1, 4):
        after, _, rows = take_step(phase, as_task(MOVED), step=step)
        moved = flat(MOVED)
        g = gradient(moved, rows)
        adam = 0.01 * (g / (abs(g) + 1) + 0.5 * np.array([1, 1, 1, 0, 1]) * moved)
        faded = 1 / (1 + np.exp(-0.5 * (step + 1 - 2.0)))
        expected = moved - faded * adam - 0.01 * (1 - faded) * 40 * (moved - W0)
        expected[4] = moved[4] - adam[4]  # the head has no pretrained value
        assert_close(after.params["task"], expected)


def test_the_pull_of_recadam_follows_the_schedule_of_the_rate():
    settings = setup(warmup_fraction=0.5, epochs=2)  # six steps: rates 0, 1/3, 2/3 of the peak, ...
    (phase,) = RecAdam(gamma=40.0, k=0.5, t0=2.0).build(settings).phases
    after, _, _ = take_step(phase, as_task(MOVED), step=1)
    # A fresh optimiser counts from 0, where its own rate is still 0: what is left is the pull at the rate of this step.
    pull = 0.01 / 3 * 0.5 * 40 * (flat(MOVED) - W0) * [1, 1, 1, 1, 0]
    assert_close(after.params["task"], flat(MOVED) - pull, 1e-6)


def test_recadam_and_spd_at_next_to_nothing_are_vanilla_to_rounding():
    """At nothing they leave the sums out, so that the bits are the same."""
    plain = run(Vanilla().build(setup_of()), pretrained_weights(), KEY)
    for technique in (RecAdam(gamma=100.0, k=1.0, t0=-15.9), SPD(strength=1e-12)):
        assert technique.hooks(setup_of(), num_steps=6).update is not None
        found = run(technique.build(setup_of()), pretrained_weights(), KEY)
        chex.assert_trees_all_close(found.weights, plain.weights, atol=1e-5)


def test_a_pull_beyond_w0_is_refused():
    with pytest.raises(
        AgwmError, match=r"recadam\.gamma: got 5000 at a learning rate of 0\.01.*at most 1 / rate = 100"
    ):
        RecAdam().build(setup())
    RecAdam(gamma=100.0).build(setup())


def test_spd_projects_what_leads_away_against_the_gradient():
    rng = np.random.default_rng(2)
    tensors = ("encoder.query.kernel", "encoder.query.bias", "embeddings.scale")
    update = jax.jit(SPD(strength=0.8).hooks(setup(), num_steps=3).update)
    context = Context(PRETRAINED, {}, {})
    cases = {"pulled": 0, "towards W0": 0, "with the gradient": 0}
    for _ in range(20):
        trained, grads, updates = (by_path(x) for x in rng.normal(size=(3, 5)))
        found = update(as_task(updates), as_task(grads), context, as_task(trained), jnp.int32(0))["task"]
        for path in tensors:
            before = trained[path] - np.asarray(PRETRAINED[path], np.float64)
            after = before + updates[path]
            added = np.linalg.norm(after) - np.linalg.norm(before)
            expected = updates[path]
            if np.sum(grads[path] * before) > 0 and added > 0:
                expected = expected - 0.8 * added / np.linalg.norm(after) * after
                cases["pulled"] += 1
            else:
                cases["towards W0" if added <= 0 else "with the gradient"] += 1
            np.testing.assert_allclose(found[path], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found["classifier.kernel"], updates["classifier.kernel"], rtol=1e-6)
    assert min(cases.values()) > 5


def test_spd_treats_each_layer_of_a_stacked_weight_by_itself_and_bears_w0():
    path, rng = "encoder.layers.query.kernel", np.random.default_rng(1)
    pretrained = pretrained_weights()
    hooks = SPD().hooks(setup_of(), num_steps=3)
    moved, grads = rng.normal(size=(2, LAYERS, 6, 6))
    grads[0], grads[1] = moved[0], -moved[1]
    trained = {"task": {path: pretrained[path] + jnp.asarray(moved, jnp.float32)}}
    updates, grads = ({"task": {path: jnp.asarray(x, jnp.float32)}} for x in (0.1 * moved, grads))
    found = hooks.update(updates, grads, Context(pretrained, {}, {}), trained, jnp.int32(0))["task"][path]
    np.testing.assert_allclose(found[0], 0, atol=1e-5)  # back onto the ball
    np.testing.assert_allclose(found[1], 0.1 * moved[1], rtol=1e-5)
    back = {"task": {path: pretrained[path] - trained["task"][path]}}  # exactly onto W0
    towards = jax.tree.map(jnp.negative, back)
    found = hooks.update(back, towards, Context(pretrained, {}, {}), trained, jnp.int32(0))
    chex.assert_trees_all_equal(found, back)
    still = {"task": {path: pretrained[path]}}
    zero = {"task": {path: jnp.zeros_like(pretrained[path])}}
    found = hooks.update(zero, grads, Context(pretrained, {}, {}), still, jnp.int32(0))
    chex.assert_trees_all_equal(found, zero)


def test_spd_holds_a_run_nearer_to_w0():
    start, far = pretrained_weights(), []
    settings = setup_of(epochs=6, learning_rate=0.05, weight_decay=0.0)
    for method in (Vanilla(), SPD()):
        weights = run(method.build(settings), start, KEY).weights
        far.append(
            sum(float(jnp.sum((weights[path] - start[path]) ** 2)) for path in start if "classifier" not in path)
        )
    assert far[1] < 0.98 * far[0]


def small_bert(**options):
    """Two layers, with a pooler, norms with scale and bias, and its setup."""
    model, weights = build(SMALL["gelu"])
    shapes = {path: jax.ShapeDtypeStruct(w.shape, w.dtype) for path, w in weights.items()}
    return setup_of(model=model, **options)._replace(shapes=shapes), jax.tree.map(jnp.asarray, weights)


def test_reinit_redraws_the_top_layers_and_the_pooler_alone():
    setup, pretrained = small_bert()
    found = Reinit(layers=1, initializer_range=0.5).build(setup).init(pretrained, KEY)["task"]
    assert found.keys() == pretrained.keys()
    kernels = []
    for path, weight in setup.model.weights.items():
        new, old = found[path], pretrained[path]
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
        if weight.is_stacked:
            np.testing.assert_array_equal(new[0], old[0])
            new, old = new[1], old[1]
        elif not path.startswith("pooler"):
            np.testing.assert_array_equal(new, old)
            continue
        if weight.role == "kernel":
            kernels.append(np.asarray(new).ravel() / 0.5)
        else:
            np.testing.assert_array_equal(new, 1.0 if path.endswith("scale") else 0.0)
    drawn = np.concatenate(kernels)
    assert len(np.unique(drawn)) > 0.99 * drawn.size  # no two kernels alike
    assert abs(drawn.mean()) < 4 / np.sqrt(drawn.size)
    np.testing.assert_allclose(drawn.std(), 1, rtol=4 / np.sqrt(2 * drawn.size))
    again = Reinit(layers=1, initializer_range=0.5).build(setup).init(pretrained, jax.random.key(4))["task"]
    assert np.all(again["pooler.kernel"] != found["pooler.kernel"])


@pytest.mark.parametrize(("layers", "pooler"), [(0, True), (1, False), (2, False)])
def test_reinit_has_its_two_parts(layers, pooler):
    setup, pretrained = small_bert(frozen=("encoder.layers.key.kernel",))
    found = Reinit(layers=layers, pooler=pooler).build(setup).init(pretrained, KEY)["task"]
    assert "encoder.layers.key.kernel" not in found  # frozen weights keep their values
    changed = {path for path in found if np.any(found[path] != pretrained[path])}
    of_layers = {path for path in found if setup.model.weights[path].is_stacked}
    assert changed == (of_layers if layers else set()) | ({"pooler.kernel", "pooler.bias"} if pooler else set())
    kept = found["encoder.layers.query.kernel"] == pretrained["encoder.layers.query.kernel"]
    assert [bool(layer.all()) for layer in kept] == [True] * (2 - layers) + [False] * layers


def test_reinit_leaves_the_methods_own_start_as_it_is():
    settings, pretrained = setup_of(), pretrained_weights()
    build_method = FrozenAlpha().build
    plain = build_method(settings).init(pretrained, KEY)
    found = compose(build_method, (Reinit(layers=2),), settings).init(pretrained, KEY)
    chex.assert_trees_all_equal(found["alpha"], plain["alpha"])
    assert np.any(found["task"]["encoder.layers.query.kernel"] != plain["task"]["encoder.layers.query.kernel"])


def test_more_layers_than_there_are_are_refused():
    with pytest.raises(AgwmError, match=r"reinit\.layers: got 3 layers, and the model has 2"):
        Reinit(layers=3).build(setup_of())
    with pytest.raises(AgwmError, match=r"top_k\.k: got 3 layers, and the model has 2"):
        TopK().build(setup_of())
    with pytest.raises(AgwmError, match=r"top_k\.embeddings: .* 1 layers that are not.*all"):
        TopK(k=1, embeddings=True).build(setup_of())


def test_layers_are_counted_where_none_is_stacked():
    found = setup()
    assert count_layers(found) == 1
    depths = {path: int(depth) for path, depth in from_the_top(found).items()}
    assert list(depths.values()) == [2, 1, 1, 0]


def test_top_k_moves_the_top_alone():
    start = pretrained_weights()
    top = run(TopK(k=1).build(setup_of()), start, KEY)
    assert "embeddings.word.embedding" not in top.learnt["task"]  # no gradient is computed
    for path, weight in top.weights.items():
        if path.startswith("encoder"):
            np.testing.assert_array_equal(weight[0], start[path][0])
            assert np.any(weight[1] != start[path][1])
        else:
            assert np.any(weight != start[path]) == ("embedding" not in path)
    head = run(TopK(k=0).build(setup_of()), start, KEY)
    assert {path.split(".")[0] for path in head.learnt["task"]} == {"pooler", "classifier"}
    everything = run(TopK(k="all").build(setup_of()), start, KEY)
    assert everything.learnt["task"].keys() == start.keys() - {"embeddings.word.embedding"}
    assert all(np.any(everything.weights[path][0] != start[path][0]) for path in start if path.startswith("encoder"))


def test_the_clip_sees_the_trained_layers_alone():
    """Of two stacked layers the lower one's gradient is gone before the clip, and its moments stay 0."""
    start = pretrained_weights()
    settings = setup_of(gradient_clip=1e-3, model=tiny_model(dropout=0))
    (phase,) = TopK(k=1).build(settings).phases
    initial = TopK(k=1).build(settings).init(start, KEY)
    rows = phase.plan["train"][0]
    context, batch = Context(start, initial, initial), batch_of(training_set(), rows, KEY)
    after, _ = jax.jit(phase.step)(phase.start(context, KEY), context, {"train": batch}, KEY, jnp.int32(0))
    mu = first_gradient(after)["task"]
    np.testing.assert_allclose(np.sqrt(sum(np.sum(g**2) for g in mu.values())), 1e-3, rtol=1e-5)
    for path, g in mu.items():
        if path.startswith("encoder"):
            assert not g[0].any()
            assert g[1].any()


def test_llrd_scales_the_factors_of_lora():
    """Adam's first step is the rate times the sign; lora's right factors have the only gradient at its start."""
    settings = setup_of(
        schedule="constant", warmup_fraction=0.0, weight_decay=0.0, gradient_clip=None, model=tiny_model(dropout=0)
    )
    check_techniques(Lora(), (Llrd(),))
    method = compose(Lora(learning_rate=0.2).build, (Llrd(decay=0.5),), settings)
    start = pretrained_weights()
    initial = method.init(start, KEY)
    found = Runner(method).run(start, KEY, max_steps=1).learnt
    for factors in found["lora"].values():
        np.testing.assert_allclose(np.abs(factors.right).max((1, 2)), 0.2 * np.array([0.5**2, 0.5]), rtol=1e-3)
    moved = np.abs(found["task"]["classifier.kernel"] - initial["task"]["classifier.kernel"])
    np.testing.assert_allclose(moved.max(), 0.2, rtol=1e-3)


@pytest.mark.parametrize("technique", [RDrop(a=3.0), Smart(weight=3.0, eps=0.1, step=0.5)])
def test_a_search_minimises_the_techniques_objective_and_validates_by_the_plain_loss(technique):
    settings, start = setup_of(model=tiny_model(dropout=0.3)), pretrained_weights()
    search = {"epochs": 1, "validation_fraction": 0.4, "inner": {"learning_rate": 1e-30}}
    chosen = Agwm.model_validate({"name": "agwm", "mixup": {"noise": 0.0}, "search": search})
    check_techniques(chosen, (technique,))
    method = compose(chosen.build, (technique,), settings)
    initial, phase = method.init(start, KEY), method.phases[0]
    context = Context(start, initial, initial)
    inner, outer = (batch_of(training_set(), phase.plan[name][0], KEY) for name in ("inner", "outer"))
    batches = {"inner": inner, "outer": outer}
    _, info = jax.jit(phase.step)(phase.start(context, KEY), context, batches, KEY, jnp.int32(0))  # at W0, where A is 1

    inner = jax.tree.map(lambda x: x[0], inner)
    losses = [loss(reverse_only=True) for loss in (technique.change_setup(settings).training_loss, settings.loss)]
    objective, plain = ([loss(start, batch) for batch in (inner, outer)] for loss in losses)
    np.testing.assert_allclose([info["loss"], info["outer_loss"]], [objective[0], plain[1]], rtol=1e-5)
    assert np.abs(np.subtract(objective, plain)).min() > 1e-2


def test_swa_after_agwm_averages_its_last_phase():
    settings, start = setup_of(), pretrained_weights()
    chosen = Agwm.model_validate({"name": "agwm", "search": {"epochs": 1, "validation_fraction": 0.4}})
    check_techniques(chosen, (SWA(),))
    method = chosen.build(settings)
    (last,) = method.stages[-1]
    assert last.num_steps == 6
    cut = last._replace(plan={name: rows[:5] for name, rows in last.plan.items()})
    runs = {
        "swa": SWA(share=0.34).change_method(method, settings),
        "five steps": method._replace(stages=(method.stages[0], (cut,))),
        "six steps": method,
    }
    runner, left = Runner(method), {}
    for name, one in runs.items():  # by one runner, so that the search is compiled once
        runner._method = one
        left[name] = runner.run(start, KEY).learnt
    mean = jax.tree.map(lambda x, y: (x + y) / 2, left["five steps"]["task"], left["six steps"]["task"])
    chex.assert_trees_all_close(left["swa"]["task"], mean, atol=1e-6)
    chex.assert_trees_all_equal(left["swa"]["alpha"], left["six steps"]["alpha"])
    assert np.any(left["five steps"]["task"]["pooler.kernel"] != left["six steps"]["task"]["pooler.kernel"])


PAIRS = {"sam": {}, "child_tuning_f": {}, "top_k": {"k": 1}}


@pytest.mark.parametrize("name", PAIRS)
def test_what_changes_the_gradient_goes_with_lora(name):
    technique = METHODS[name].value.model_validate({"name": name, **PAIRS[name]})
    check_techniques(Lora(), (technique,))
    found = Runner(compose(Lora().build, (technique,), setup_of())).run(pretrained_weights(), KEY)
    chex.assert_tree_all_finite(jax.tree.leaves(found.learnt))
    rights = [np.abs(factors.right).max((1, 2)) > 0 for factors in found.learnt["lora"].values()]
    assert {tuple(moved) for moved in rights} == {(name != "top_k", True)}
