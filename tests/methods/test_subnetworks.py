"""Methods that train a part of the weights, held to NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness import pretrained_weights, setup_of, tiny_model
from three_weights import DATA, PRETRAINED, batch, by_path, flat, gradient, setup, take_step

from agwm_jax.errors import AgwmError
from agwm_jax.methods.bitfit import BitFit
from agwm_jax.methods.dps import DPS, bernoulli, keep_of_each, mean_score, sums_in
from agwm_jax.methods.gradient_importance import GradientImportance, random_mask
from agwm_jax.methods.interface import Context
from agwm_jax.methods.learned_gates import Gates, LearnedGates, draw, open_probability, settled, spread
from agwm_jax.methods.subnetwork import lowest_share
from agwm_jax.models.weights import Weight

W0 = flat(PRETRAINED)
MOVED = by_path(W0 + np.array([0.3, -0.2, 0.4, 0.1, -0.5]))
KERNEL = "encoder.query.kernel"


def as_arrays(weights) -> dict:
    return {path: jnp.asarray(weight, jnp.float32) for path, weight in weights.items()}


def loss_at(vector, rows) -> float:
    rows = rows[rows >= 0]
    return 0.5 * np.mean((DATA["x"][rows] @ vector - DATA["y"][rows]) ** 2)


def mu(state, collection="task") -> dict:
    """What reached the optimiser, by path: Adam's first moment after one step is (1 - b1) of it."""
    states = state.opt_state
    if isinstance(states, optax.transforms.PartitionState):
        states = states.inner_states[collection]
    return jax.tree.map(lambda x: np.asarray(x) / (1 - 0.9), optax.tree.get(states, "mu")[collection])


@pytest.mark.parametrize("score", ["taylor", "magnitude"])
@pytest.mark.parametrize("keep", ["highest", "lowest"])
def test_the_mask_keeps_the_weights_with_the_highest_or_lowest_scores(score, keep):
    method = GradientImportance(p=0.4, score=score, keep=keep).build(setup(eps=1.0))
    scores, finetune = method.phases
    initial = method.init(PRETRAINED, jax.random.key(0))
    context = Context(PRETRAINED, initial, initial)
    state = scores.start(context, jax.random.key(0))
    read = jax.jit(scores.step)
    for step, rows in enumerate(scores.plan["train"]):
        state, _ = read(state, context, {"train": batch(rows)}, jax.random.key(0), jnp.int32(step))
    factor = abs(W0) if score == "taylor" else 1.0
    expected = np.mean([factor * abs(gradient(W0, rows)) for rows in scores.plan["train"]], axis=0)[1:4]
    np.testing.assert_allclose([*state[KERNEL].ravel(), *state["encoder.query.bias"]], expected, rtol=1e-5)
    assert np.argmax(expected) != np.argmax(expected / abs(W0[1:4])) or score == "magnitude", "the scores differ"
    learnt = jax.jit(scores.finish)(context, state)
    # numpy.quantile's bound lies between two of three: the upper one is kept, or the lower one.
    kept = expected >= np.quantile(expected, 0.6) if keep == "highest" else expected <= np.quantile(expected, 0.4)
    assert kept.sum() == 1
    mask = learnt["mask"]
    np.testing.assert_array_equal([*mask[KERNEL].ravel(), *mask["encoder.query.bias"]], kept)
    after, _, rows = take_step(finetune, learnt, initial=initial)
    np.testing.assert_allclose(flat(mu(after)), gradient(W0, rows) * [1, *kept, 1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("p", [1.0, 0.7, 0.3, 0.04])
def test_the_lowest_share_is_that_of_numpys_quantile(p):
    rng = np.random.default_rng(0)
    scores = {"a": rng.random((2, 5, 3)) ** 8, "b": np.zeros(4), "c": np.repeat([0.3, 0.4], 4)}
    scores = {path: x.astype(np.float32) for path, x in scores.items()}
    bound = np.quantile(np.concatenate([-x.ravel() for x in scores.values()]).astype(np.float64), 1 - p)
    for path, mask in jax.jit(lowest_share, static_argnums=1)(as_arrays(scores), p).items():
        np.testing.assert_array_equal(mask, -scores[path] >= bound)


def test_a_random_mask_has_its_share_and_is_new_for_every_key():
    weights = {"a": jnp.zeros((40, 50)), "b": jnp.zeros(2000)}
    masks = [random_mask(jax.random.key(seed), weights, ("a", "b"), 0.3) for seed in (0, 1)]
    for mask in masks:
        assert abs(sum(int(x.sum()) for x in mask.values()) - 1200) <= 2
        assert abs(float(mask["a"].mean()) - 0.3) < 4 * np.sqrt(0.21 / 2000)
    assert np.any(masks[0]["a"] != masks[1]["a"])
    method = GradientImportance(keep="random").build(setup())
    assert [phase.name for phase in method.phases] == ["finetune"]  # no look at the data
    mask = method.init(PRETRAINED, jax.random.key(5))["mask"]
    assert sum(int(x.sum()) for x in mask.values()) == 1


class Adam:
    """Steps by NumPy with eps 1, a constant rate of 0.5 and no clip."""

    def __init__(self):
        self.first, self.second, self.count = np.zeros(5), np.zeros(5), 0

    def step(self, vector, g):
        self.count += 1
        self.first, self.second = 0.9 * self.first + 0.1 * g, 0.999 * self.second + 0.001 * g**2
        corrected = self.first / (1 - 0.9**self.count)
        return vector - 0.5 * corrected / (np.sqrt(self.second / (1 - 0.999**self.count)) + 1)


@pytest.mark.parametrize("stages", ["dense", "mix"])
def test_dps_trains_all_and_then_the_entries_with_the_largest_squared_gradients(stages):
    """Nine steps, two a stage: whole runs by NumPy, in which the noise of mix is taken as it was drawn."""
    p, length = 0.5, 2
    method = DPS(stages=stages, p=p, update_ratio=0.25).build(setup(eps=1.0, epochs=3, learning_rate=0.5))
    (phase,) = method.phases
    initial = method.init(PRETRAINED, jax.random.key(0))
    context = Context(PRETRAINED, initial, initial)
    state, take = phase.start(context, jax.random.key(0)), jax.jit(phase.step)
    adam, w, masks = Adam(), W0.copy(), []
    sums = counts = target = chosen = None
    means_decide = stages == "dense"
    for number, rows in enumerate(phase.plan["train"]):
        key, at = jax.random.fold_in(jax.random.key(10), number), number % (2 * length)
        if at == 0:
            sums, counts = np.zeros(2), np.zeros(2)
        if at == length:
            scores = sums / np.maximum(counts, 1) if stages == "mix" else sums
            chosen, target = scores == scores.max(), w[1:3].copy()  # one of two is kept
            masks.append(tuple(chosen))
            means_decide |= np.argmax(scores) != np.argmax(sums)
        mask = np.ones(2) if at < length else chosen
        if stages == "mix" and at < length:
            mask = np.asarray(bernoulli(key, {KERNEL: (2, 1)}, 1 - p)[KERNEL]).ravel()
        point = w.copy()
        if stages == "mix":
            t = W0[1:3] if at < length else target
            point[1:3] = (mask * w[1:3] + (1 - mask) * t - p * t) / (1 - p)
        g = gradient(point, rows)
        g[1:3] *= mask / (1 - p) if stages == "mix" else mask
        sums, counts = sums + g[1:3] ** 2, counts + mask
        state, info = take(state, context, {"train": batch(rows)}, key, jnp.int32(number))
        np.testing.assert_allclose(info["loss"], loss_at(point, rows), rtol=1e-4, err_msg=str(number))
        if at < length:
            np.testing.assert_allclose(sums_in(state.training)[KERNEL].ravel(), sums, rtol=1e-3, err_msg=str(number))
        w = adam.step(w, g)
        np.testing.assert_allclose(flat(state.training.params["task"]), w, rtol=1e-4, atol=3e-5, err_msg=str(number))
    assert len(masks) == 2
    assert means_decide, "of mix: the mean of an entry, not its sum"
    learnt = phase.finish(context, state)
    np.testing.assert_array_equal(flat(method.merge(PRETRAINED, learnt)), flat(learnt["task"]))  # evaluation sees W


def test_dps_chooses_a_share_of_each_layer_and_discounts_what_noise_kept_often():
    rng = np.random.default_rng(0)
    scores = rng.random((2, 5, 7)).astype(np.float32)
    scores[1] *= 1e-6  # a bound for both layers together would take nothing of this one
    weights = {
        "stacked": Weight("kernel", ("layers", "width", "heads")),
        "alone": Weight("kernel", ("width", "width"), 3),
    }
    for p, keep in ((0.0, 35), (0.3, 25), (0.5, 18), (0.99, 1)):
        for path, x in (("stacked", scores), ("alone", scores[0])):
            mask = np.asarray(keep_of_each(weights, path, jnp.asarray(x), p))
            for own, layer in zip(mask.reshape(-1, 35), x.reshape(-1, 35), strict=True):
                assert own.sum() == keep
                assert layer[own].min() >= np.sort(layer)[-keep]
    sums, counts = jnp.array([[6.0, 0.0, 8.0]]), jnp.array([[3, 0, 2]])
    np.testing.assert_allclose(mean_score(sums, counts, 49), [[2, 0, 4]])
    np.testing.assert_allclose(mean_score(sums, counts, 60), [[2 * np.exp(-0.05), 0, 4 * np.exp(-1 / 30)]], rtol=1e-6)


def test_dps_counts_its_stages_from_the_steps_and_takes_one_at_least():
    """A third of the steps of one pass is one, and so is a hundredth: the masks change at the same steps."""
    for ratio in (0.3, 0.01):
        (phase,) = DPS(p=0.5, update_ratio=ratio).build(setup(epochs=1)).phases
        assert phase.num_steps == 3
        initial = {"task": as_arrays(PRETRAINED)}
        context = Context(PRETRAINED, initial, initial)
        state = phase.start(context, jax.random.key(0))
        kept = []
        for number, rows in enumerate(phase.plan["train"]):
            state, _ = jax.jit(phase.step)(state, context, {"train": batch(rows)}, jax.random.key(0), jnp.int32(number))
            kept.append(int(state.mask[KERNEL].sum()))
        assert kept == [2, 1, 1]


def hard_concrete(log_alpha, u):
    """The paper's equations 10 and 11."""
    s = 1 / (1 + np.exp(-(np.log(u) - np.log(1 - u) + log_alpha) / (2 / 3)))
    return np.clip(s * 1.2 - 0.1, 0, 1)


def test_gates_are_hard_concrete():
    log_alpha = np.array([-3.0, -1.0, 0.0, 2.0, 4.0])
    u = np.linspace(0.001, 0.999, 200_001)
    drawn = jax.jit(jax.vmap(draw))(
        jax.random.split(jax.random.key(0), 5), jnp.tile(jnp.asarray(log_alpha[:, None], jnp.float32), (1, 40_000))
    )
    for own, each in zip(log_alpha, np.asarray(drawn), strict=True):
        exact = hard_concrete(own, u)
        np.testing.assert_allclose(each.mean(), exact.mean(), atol=0.01)
        np.testing.assert_allclose((each > 0).mean(), (exact > 0).mean(), atol=0.01)
        np.testing.assert_allclose((each == 1).mean(), (exact == 1).mean(), atol=0.01)
        np.testing.assert_allclose(open_probability(jnp.float32(own)), (exact > 0).mean(), atol=0.003)
    sigmoid = 1 / (1 + np.exp(-log_alpha))
    np.testing.assert_allclose(settled(jnp.asarray(log_alpha)), np.clip(1.2 * sigmoid - 0.1, 0, 1), rtol=1e-5)


def test_a_gate_stands_between_w_and_w0_and_open_weights_have_a_price():
    settings = LearnedGates(group="matrix", penalty=0.7, optimizer={"learning_rate": 0.25, "warmup_fraction": 0.0})
    method = settings.build(setup(eps=1.0, gradient_clip=0.1))
    (phase,) = method.phases
    assert method.init(PRETRAINED, jax.random.key(0))["gates"][KERNEL].shape == (1, 1)
    log_alpha, key = -0.5, jax.random.key(2)
    learnt = {"task": as_arrays(MOVED), "gates": {KERNEL: jnp.full((1, 1), log_alpha)}}
    for number in range(20):  # a gate that is neither 0 nor 1
        key = jax.random.key(number)
        variables = {name: learnt[name] for name in learnt}
        kernel = Gates(settings, setup()).forward(PRETRAINED, variables, key)[KERNEL]
        moved, start = flat(MOVED), W0
        z = float(((np.asarray(kernel).ravel() - start[1:3]) / (moved - start)[1:3]).mean())
        if 0.1 < z < 0.9:
            break
    after, info, rows = take_step(phase, learnt, key=key)
    a = np.array([1, z, z, 1, 1])
    effective = a * moved + (1 - a) * start
    g = gradient(effective, rows)
    chance = 1 / (1 + np.exp(-(log_alpha + 2 / 3 * np.log(11))))
    np.testing.assert_allclose(info["loss"], loss_at(effective, rows) + 0.7 * chance, rtol=1e-4)
    of_task = a * g * min(1, 0.1 / np.linalg.norm(a * g))  # gates have no part in W's clip
    np.testing.assert_allclose(flat(mu(after)), of_task, rtol=1e-3, atol=1e-6)
    s = (z + 0.1) / 1.2
    slope = 1.2 * s * (1 - s) * 1.5  # dz / d log alpha
    of_gate = np.sum((g * (moved - start))[1:3]) * slope + 0.7 * chance * (1 - chance)
    np.testing.assert_allclose(mu(after, "gates")[KERNEL].item(), of_gate, rtol=1e-3)
    np.testing.assert_allclose(after.params["gates"][KERNEL].item(), log_alpha - 0.25 * np.sign(of_gate), rtol=1e-4)

    still = np.clip(1.2 / (1 + np.exp(0.5)) - 0.1, 0, 1)
    a = np.array([1, still, still, 1, 1])
    np.testing.assert_allclose(flat(method.merge(PRETRAINED, learnt)), a * moved + (1 - a) * start, rtol=1e-5)


def test_gates_have_the_shapes_of_their_groups_and_heads_are_columns_or_rows():
    weights = {
        "layers.query.kernel": Weight("kernel", ("layers", "width", "heads")),
        "layers.attention_output.kernel": Weight("kernel", ("layers", "heads", "width")),
        "layers.intermediate.kernel": Weight("kernel", ("layers", "width", "mlp")),
        "pooler.kernel": Weight("kernel", ("width", "width"), 3),
    }
    shapes = {"layers.query.kernel": (2, 6, 6), "layers.attention_output.kernel": (2, 6, 6)}
    shapes |= {"layers.intermediate.kernel": (2, 6, 8), "pooler.kernel": (6, 6)}
    pretrained = {path: jnp.zeros(shape) for path, shape in shapes.items()}
    model = tiny_model()._replace(weights=weights, num_heads=3)
    made = setup_of()._replace(model=model, shapes=jax.eval_shape(lambda: pretrained))
    expected = {
        "matrix": [(2, 1, 1), (2, 1, 1), (2, 1, 1), (1, 1)],
        "neuron": [(2, 1, 6), (2, 1, 6), (2, 1, 8), (1, 6)],
        "head": [(2, 1, 3), (2, 3, 1), (2, 1, 1), (1, 1)],
    }
    for group, found in expected.items():
        gates = Gates(LearnedGates(group=group), made).start(pretrained, 0.0)
        assert [gates[path].shape for path in weights] == found
    z = jnp.arange(6.0).reshape(2, 1, 3)
    np.testing.assert_array_equal(spread(z, pretrained["layers.query.kernel"])[1, 0], [3, 3, 4, 4, 5, 5])
    rows = spread(z.reshape(2, 3, 1), pretrained["layers.attention_output.kernel"])
    np.testing.assert_array_equal(rows[1, :, 0], [3, 3, 4, 4, 5, 5])
    # The share counts weights, not gates: 48 of all 276 have a gate that is open for sure, the others one that is shut.
    gates = {path: jnp.full(shape, -30.0) for path, shape in zip(weights, expected["matrix"], strict=True)}
    gates["layers.intermediate.kernel"] = jnp.array([30.0, -30.0]).reshape(2, 1, 1)
    share = Gates(LearnedGates(group="matrix"), made).open_share(pretrained, gates)
    np.testing.assert_allclose(share, 48 / (72 + 72 + 96 + 36), rtol=1e-6)
    with pytest.raises(AgwmError, match="does not say how many attention heads"):
        Gates(LearnedGates(group="head"), made._replace(model=model._replace(num_heads=None)))
    with pytest.raises(AgwmError, match="gates no kernel with heads"):
        Gates(LearnedGates(group="head", gated=r"pooler\.kernel"), made)
    with pytest.raises(AgwmError, match="no kernel to gate"):
        Gates(LearnedGates(), made._replace(frozen=tuple(weights)))


def test_bitfit_trains_all_bias_terms_and_the_head_at_its_own_rate():
    made = setup_of(learning_rate=0.5, schedule="constant", warmup_fraction=0.0)
    model = made.model._replace(
        weights={**made.model.weights, "encoder.layers.norm.bias": Weight("norm", ("layers", "vector"))}
    )
    pretrained = {**pretrained_weights(), "encoder.layers.norm.bias": jnp.zeros((2, 6))}
    variables = BitFit().build(made._replace(model=model)).init(pretrained, jax.random.key(0))
    head = {"classifier.kernel", "classifier.bias"}
    biases = {"encoder.layers.query.bias", "encoder.layers.norm.bias", "pooler.bias"}
    assert variables["task"].keys() == head | biases

    method = BitFit(learning_rate=0.03).build(setup(eps=1.0))
    after, _, rows = take_step(method.phases[0], method.init(PRETRAINED, jax.random.key(0)))
    g = gradient(W0, rows)
    expected = {
        path: x for path, x in by_path(W0 - 0.03 * g / (abs(g) + 1)).items() if path.endswith("bias") or "class" in path
    }
    assert after.params["task"].keys() == expected.keys() == optax.tree.get(after.opt_state, "mu")["task"].keys()
    for path, weight in expected.items():
        np.testing.assert_allclose(after.params["task"][path], weight, rtol=1e-5)
    frozen = tuple(expected)
    with pytest.raises(AgwmError, match="nothing to train"):
        BitFit().build(setup(frozen=frozen))


def test_dps_without_kernels_is_refused():
    with pytest.raises(AgwmError, match="dps has none to choose from"):
        DPS().build(setup(frozen=(KERNEL,)))
