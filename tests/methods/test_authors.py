"""The authors' algorithm by our options, against recordings of their libraries and against a plain loop."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness import Runner, phase_key, setup_of

from agwm_jax import LowRank, Problem, hypergrad, hypergradient
from agwm_jax.core.deferred import materialise
from agwm_jax.errors import AgwmError
from agwm_jax.methods.interface import Context, Hooks
from agwm_jax.methods.optimizers import OptimizerSettings, schedule
from agwm_jax.methods.training import Finetune, training_phase
from agwm_jax.models.model import Model
from agwm_jax.models.weights import Weight
from agwm_jax.settings import load_config

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIGS = Path(__file__).parents[2] / "configs"
RECORDED = json.loads((Path(__file__).parent / "authors_recorded.json").read_text(encoding="utf-8"))
PRESETS = {"meant": "authors", "as_run": "authors_as_run"}
KERNEL = "encoder.layers.query.kernel"
BIAS = "encoder.layers.query.bias"
WEIGHTS = {
    KERNEL: Weight("kernel", ("layers", "width", "heads")),
    BIAS: Weight("bias", ("layers", "heads")),
    "pooler.norm.scale": Weight("norm", ("vector",), 3),
    "pooler.norm.bias": Weight("norm", ("vector",), 3),
    "classifier.kernel": Weight("head", ("width", "classes"), 3),
    "classifier.bias": Weight("head", ("classes",), 3),
}
LAYERS = 2


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def drop(x, key, layer):
    kept = jax.random.bernoulli(jax.random.fold_in(key, layer), 0.9, x.shape)
    return jnp.where(kept, x / 0.9, 0)


def head(weights, x):
    x = x - x.mean(-1, keepdims=True)
    x = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    x = x * weights["pooler.norm.scale"][None] + weights["pooler.norm.bias"][None]
    return x @ weights["classifier.kernel"] + weights["classifier.bias"][None]


def cross_entropy(logits, batch):
    each = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, batch["y"][:, None], -1)[:, 0]
    return jnp.sum(each * batch["weight"]) / jnp.sum(batch["weight"])


def loss_of(dropout: bool):
    """Of the two-layer model as the library calls it: scanned, each layer's kernel mixed within."""

    def loss(weights, batch):
        def layer(x, per_layer):
            (kernel, bias), number = materialise(per_layer[0]), per_layer[1]
            y = jnp.tanh(x @ kernel + bias[None])
            return x + (drop(y, batch["key"], number) if dropout else y), None

        x, _ = jax.lax.scan(layer, batch["x"], ((weights[KERNEL], weights[BIAS]), jnp.arange(LAYERS)))
        return cross_entropy(head(weights, x), batch)

    return loss


def preset(name: str, *, epochs: int, search_epochs: int, rates=(2e-2, 5e-2), **search):
    """Method and finetune settings of a preset, at a size and with rates at which a few steps show everything."""
    config = load_config(CONFIGS / f"{PRESETS[name]}.yaml")
    inner = {"learning_rate": rates[0], "weight_decay": 0.1, "warmup_fraction": 0.25, "gradient_clip": 0.5}
    outer = {"learning_rate": rates[1], "warmup_fraction": 0.28}
    found = config.method.search
    found = found.model_copy(
        update={
            "inner": found.inner.model_copy(update=inner),
            "outer": found.outer.model_copy(update=outer),
            "epochs": search_epochs,
            "leverage": False,
            **search,
        }
    )
    mixup = config.method.mixup.model_copy(update={"noise": 0.05})
    method = config.method.model_copy(update={"search": found, "mixup": mixup})
    optimizer = config.finetune.optimizer.model_copy(update={**inner, "gradient_clip": 0.3})
    return method, Finetune(epochs=epochs, optimizer=optimizer)


def setup(finetune, first, *, rows: int, dropout: bool):
    """The two-layer model on as many rows, in batches of 4."""
    found = setup_of(model=Model(embed=None, features=None, logits=None, weights=WEIGHTS))
    return found._replace(
        loss=lambda *, reverse_only: loss_of(dropout),
        criterion=None,
        shapes=jax.eval_shape(lambda: first),
        finetune=finetune,
        num_examples=rows,
    )


def arrays(tree):
    return jax.tree.map(jnp.asarray, tree, is_leaf=lambda x: isinstance(x, list))


def close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", PRESETS)
def test_a_preset_follows_what_their_libraries_did(mode):
    """Eight iterations of search and six of finetune by Betty 0.2.0, transformers' AdamW and PyTorch's; no dropout."""
    first, x, y = arrays(RECORDED["first"]), arrays(RECORDED["x"]), arrays(RECORDED["y"])
    settings, finetune = preset(
        mode, epochs=1, num_splits=1, search_epochs=2, extra_step=False, validation_fraction=1 / 3, dropout="shared"
    )
    method = settings.build(setup(finetune, first["task"], rows=24, dropout=False))
    (search,), (tune,) = method.stages
    assert (search.num_steps, tune.num_steps) == (8, 6)
    alpha = {KERNEL: LowRank(first["left"], first["right"])}
    learnt = {"task": first["task"], "alpha": alpha}
    key = jax.random.key(0)

    def batch(number):
        rows = slice(4 * number, 4 * number + 4)
        return {"x": x[rows], "y": y[rows], "weight": jnp.ones(4), "key": key}

    def follow(phase, state, context, batches, expected):
        step = jax.jit(phase.step)
        for index in range(phase.num_steps):
            state, _ = step(state, context, batches(index), key, jnp.int32(index))
            if str(index) in expected:
                want = arrays(expected[str(index)])
                close(phase.finish(context, state), {**learnt, **of_recorded(want)})
        return state

    def of_recorded(want):
        return {"task": want["task"], "alpha": {KERNEL: LowRank(want["left"], want["right"])}}

    def search_batches(index):
        return {"inner": jax.tree.map(lambda a: a[None], batch(index % 4)), "outer": batch(4 + index % 2)}

    context = Context(first["task"], learnt, learnt)
    start = search.start(context, key)._replace(outer=alpha)
    state = follow(search, start, context, search_batches, RECORDED[mode]["search"])
    context = context._replace(learnt=search.finish(context, state))
    tuned = follow(tune, tune.start(context, key), context, lambda i: {"train": batch(i)}, RECORDED[mode]["finetune"])
    assert np.abs(tuned.params["task"][KERNEL] - first["task"][KERNEL]).max() > 0.05  # it went somewhere


# The same once more, as a loop over tensors of single layers, with dropout and two splits.


def plain(weights, alpha, pretrained, batch, key):
    x = batch["x"]
    for layer in range(LAYERS):
        left, right = alpha[f"left {layer}"], alpha[f"right {layer}"]
        kernel = (left @ right) * weights[f"{KERNEL} {layer}"] + ((1 - left) @ (1 - right)) * pretrained[layer]
        x = x + drop(jnp.tanh(x @ kernel + weights[f"{BIAS} {layer}"][None]), key, layer)
    return cross_entropy(head(weights, x), batch)


by_weights, by_both, by_alpha, by_all = (jax.jit(jax.grad(plain, argnums)) for argnums in (0, (0, 1), 1, (0, 1, 2)))


def unstacked(weights):
    found = {path: np.asarray(w) for path, w in weights.items() if path not in (KERNEL, BIAS)}
    return found | {f"{path} {i}": np.asarray(weights[path][i]) for path in (KERNEL, BIAS) for i in range(LAYERS)}


def factors(alpha):
    return {f"{side} {i}": np.asarray(getattr(alpha, side)[i]) for side in ("left", "right") for i in range(LAYERS)}


def norm(*trees):
    return math.sqrt(sum(float(np.sum(np.square(g))) for g in jax.tree.leaves(trees)))


def clip_factor(max_norm, total):
    return min(1.0, max_norm / (total + 1e-6))


class Moments:
    def __init__(self, weights):
        self.t, self.m, self.v = 0, {k: 0 * w for k, w in weights.items()}, {k: 0 * w for k, w in weights.items()}

    def take(self, grads):
        self.t += 1
        for k, g in grads.items():
            self.m[k] = 0.9 * self.m[k] + 0.1 * np.asarray(g)
            self.v[k] = 0.999 * self.v[k] + 0.001 * np.asarray(g) ** 2


def transformers_step(weights, grads, moments, rate):
    moments.take(grads)
    size = rate * math.sqrt(1 - 0.999**moments.t) / (1 - 0.9**moments.t)
    found = {k: w - size * moments.m[k] / (np.sqrt(moments.v[k]) + 1e-8) for k, w in weights.items()}
    return {k: w - rate * 0.1 * w if "kernel" in k else w for k, w in found.items()}


def torch_step(weights, grads, moments, rate, decay):
    moments.take(grads)
    found = {}
    for k, w in weights.items():
        w = w * (1 - rate * decay) if "kernel" in k else w
        root = np.sqrt(moments.v[k] / (1 - 0.999**moments.t)) + 1e-8
        found[k] = w - rate * moments.m[k] / (1 - 0.9**moments.t) / root
    return found


def linear_rate(peak, t, steps, warmup):
    return peak * (t / max(1, warmup) if t < warmup else (steps - t) / max(1, steps - warmup))


def cosine_rate(peak, t, steps, warmup):
    done = (t - warmup) / max(1, steps - warmup)
    return peak * (t / max(1, warmup) if t < warmup else 0.5 * (1 + math.cos(math.pi * done)))


def searched(mode, weights, alpha, pretrained, batches, steps):
    """``batches(step) -> (inner, outer)``; W and alpha after so many steps."""
    inner_moments, outer_moments = Moments(weights), Moments(alpha)
    for t in range(steps):
        inner, outer = batches(t)
        rate = linear_rate(2e-2, t, steps, steps * 0.25 // 1)
        keys = [inner["key"]] * 4  # the look-ahead, the two ends, the step anew
        if mode == "as_run":
            keys = [inner["key"], *(jax.random.fold_in(inner["key"], n) for n in (1, 2, 3))]
        before, first = weights, t == 0

        def descend(weights, moments, key, alpha=alpha, inner=inner, rate=rate):
            grads = by_weights(weights, alpha, pretrained, inner, key)
            factor = clip_factor(0.5, norm(grads))
            return transformers_step(weights, {k: factor * g for k, g in grads.items()}, moments, rate)

        saved = Moments(weights)
        saved.t, saved.m, saved.v = inner_moments.t, dict(inner_moments.m), dict(inner_moments.v)
        weights = descend(weights, inner_moments, keys[0])
        v, direct = by_both(weights, alpha, pretrained, outer, outer["key"])
        v = {k: np.asarray(g) for k, g in v.items()}
        if mode == "as_run":
            bias = math.sqrt(1 - 0.999**inner_moments.t)
            v = {k: g * bias / (np.sqrt(np.mean(0.999 * inner_moments.v[k])) + 1e-8) for k, g in v.items()}
        e = 0.01 / norm(v)
        upper, lower = ({k: w + sign * e * v[k] for k, w in weights.items()} for sign in (1, -1))
        above = by_alpha(upper, alpha, pretrained, inner, keys[1])
        below = by_alpha(lower, alpha, pretrained, inner, keys[2])
        grads = {k: direct[k] - (above[k] - below[k]) / (2 * e) for k in alpha}
        outer_rate = cosine_rate(5e-2, t, steps, steps * 0.28)
        alpha = torch_step(alpha, grads, outer_moments, outer_rate, 0.0)
        alpha = {k: np.clip(a, 0, 1) for k, a in alpha.items()}
        if mode == "as_run":
            weights = lower
            inner_moments = saved if first else inner_moments
        else:
            weights, inner_moments = before, saved
        weights = descend(weights, inner_moments, keys[3], alpha)
    return weights, alpha


@pytest.mark.parametrize("mode", PRESETS)
def test_a_preset_is_a_plain_loop_of_its_description(mode):
    """Two splits of n // b + 1 = 5 steps an epoch, their average and the finetune stage, with dropout."""
    rng, rows = np.random.default_rng(0), 20
    data = {"x": jnp.asarray(rng.normal(size=(rows, 5))), "y": jnp.asarray(rng.integers(0, 3, rows))}
    first = arrays(RECORDED["first"])["task"]
    settings, finetune = preset(mode, epochs=2, num_splits=2, search_epochs=2)
    method = settings.build(setup(finetune, first, rows=rows, dropout=True))
    key, pretrained = jax.random.key(5), list(np.asarray(first[KERNEL]))
    trained = Runner(method, data=data).run(first, key)

    def batch_of(rows, key):
        real = rows >= 0
        return {
            **{n: c[np.where(real, rows, 0)] for n, c in data.items()},
            "weight": jnp.asarray(real * 1.0),
            "key": key,
        }

    def keys(phase, t, number):
        _, dropout = jax.random.split(jax.random.fold_in(phase_key(key, phase.name), t))
        return jax.random.split(dropout, number)

    weights, alpha, starts = unstacked(first), {}, []
    results = []
    for phase in method.stages[0]:
        assert phase.num_steps == 10

        def batches(t, phase=phase):
            inner, outer = keys(phase, t, 2)
            inner = jax.random.split(inner, 1)[0]
            return batch_of(phase.plan["inner"][t, 0], inner), batch_of(phase.plan["outer"][t], outer)

        context = Context(first, *[{"task": first}] * 2)
        starts.append(factors(phase.start(context, phase_key(key, phase.name)).outer[KERNEL]))
        results.append(searched(mode, weights, starts[-1], pretrained, batches, 10))
    assert norm({k: starts[0][k] - starts[1][k] for k in starts[0]}) > 0.01  # a fresh alpha a split
    weights, alpha = ({k: (a[k] + b[k]) / 2 for k in a} for a, b in zip(*results, strict=True))
    moments, (tune,) = Moments(weights), method.stages[1]
    for t in range(10):
        batch = batch_of(tune.plan["train"][t], keys(tune, t, 1)[0])
        found = by_all(weights, alpha, pretrained, batch, batch["key"])
        factor = clip_factor(0.3, norm(found))
        grads = {k: factor * g for k, g in found[0].items()}
        weights = torch_step(weights, grads, moments, linear_rate(2e-2, t, 10, math.ceil(2.5)), 0.1)
    close(unstacked(trained.learnt["task"]), weights)
    close(factors(trained.learnt["alpha"][KERNEL]), alpha)


def test_what_was_run_runs_mapped_over_seeds():
    """Each as alone; the harness donates the state and traces a step once."""
    starts = [jax.tree.map(lambda w, by=by: by * w, arrays(RECORDED["first"])["task"]) for by in (1.0, 0.9)]
    rng = np.random.default_rng(0)
    data = {"x": jnp.asarray(rng.normal(size=(20, 5))), "y": jnp.asarray(rng.integers(0, 3, 20))}
    settings, finetune = preset("as_run", epochs=1, num_splits=2, search_epochs=1)
    method = settings.build(setup(finetune, starts[0], rows=20, dropout=True))
    keys = jax.random.split(jax.random.key(7))
    together = Runner(method, data=data, members=True).run(jax.tree.map(lambda *w: jnp.stack(w), *starts), keys)
    runner = Runner(method, data=data)
    for index, (start, key) in enumerate(zip(starts, keys, strict=True)):
        alone = runner.run(start, key)
        close(jax.tree.map(lambda x, i=index: x[i], together.learnt), alone.learnt)


def test_extra_step_counts_as_their_script_does():
    """n // b + 1 steps an epoch: 16, 15 and 17 examples in batches of 4, of which every fifth example is alpha's."""
    for rows, steps in ((20, 5), (19, 4), (21, 5)):
        settings, finetune = preset("meant", epochs=1, num_splits=2, search_epochs=2)
        first = arrays(RECORDED["first"])["task"]
        for plan in settings.search.plans(setup(finetune, first, rows=rows, dropout=False)):
            assert (len(plan["inner"]), len(plan["outer"])) == (2 * steps, 2 * steps)
            assert (plan["inner"] >= 0).any((1, 2)).all()  # none is empty
            n = rows - round(rows / 5)
            assert len(set(plan["inner"][: math.ceil(n / 4)].ravel()) - {-1}) == n  # and passes stay whole


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("rounding", "warmup"), [("down", 2), ("up", 3), ("none", 2.5)])
def test_warm_up_ends_where_its_rounding_says(kind, rounding, warmup):
    settings = OptimizerSettings(learning_rate=0.5, schedule=kind, warmup_fraction=0.25, warmup_rounding=rounding)
    rate = schedule(settings, num_steps=10)
    expected = {"linear": linear_rate, "cosine": cosine_rate}.get(kind)
    for t in range(10):
        value = 0.5 * min(1, t / warmup) if expected is None else expected(0.5, t, 10, warmup)
        np.testing.assert_allclose(rate(jnp.int32(t)), value, rtol=1e-14)


def test_adamw_of_transformers_by_hand():
    """Two steps of a kernel and a bias; eps is so large that its place shows."""
    weights = {"classifier.kernel": np.array([[2.0, -1.0]]), "classifier.bias": np.array([3.0])}
    metadata = {path: WEIGHTS[path] for path in weights}
    settings = OptimizerSettings(
        learning_rate=0.1, weight_decay=0.5, schedule="constant", warmup_fraction=0.0, gradient_clip=None, eps=0.01
    ).model_copy(update={"variant": "transformers_4_24"})
    tx = settings.build(num_steps=2, weights=metadata)
    state, found = tx.init(weights), weights
    for grad in (0.5, -0.2):
        updates, state = tx.update(jax.tree.map(lambda w, g=grad: jnp.full_like(w, g), found), state, found)
        found = optax.apply_updates(found, updates)
    first = 0.1 * math.sqrt(0.001) / 0.1 * 0.05 / (math.sqrt(0.001) * 0.5 + 0.01)
    m, v = 0.9 * 0.05 - 0.1 * 0.2, 0.999 * 0.00025 + 0.001 * 0.04
    second = 0.1 * math.sqrt(1 - 0.999**2) / (1 - 0.81) * m / (math.sqrt(v) + 0.01)
    np.testing.assert_allclose(found["classifier.bias"], 3 - first - second, rtol=1e-12)
    kernel = ((weights["classifier.kernel"] - first) * 0.95 - second) * 0.95
    np.testing.assert_allclose(found["classifier.kernel"], kernel, rtol=1e-12)


def test_adamw_of_transformers_is_differentiated_through():
    """The last update unrolled, against a difference of the whole of it; from a warm state and from none."""
    settings = OptimizerSettings(learning_rate=0.1, weight_decay=0.5, schedule="constant", warmup_fraction=0.0)
    settings = settings.model_copy(update={"variant": "transformers_4_24", "eps": 0.05, "clip_eps": 1e-6})
    tx = settings.build(num_steps=9, weights={"w": Weight("kernel", ("width", "heads"), 1)})
    problem = Problem(
        lambda w, o, _: jnp.sum(jnp.sin(o * w["w"]) ** 2 + w["w"] ** 2), lambda w, o, _: jnp.sum(jnp.cos(w["w"]) * o)
    )
    start = {"w": jnp.array([[0.3, -1.0], [2.0, 0.7]])}

    def value(o, steps):
        inner, state = start, tx.init(start)
        for _ in range(steps):
            updates, state = tx.update(jax.grad(problem.inner_loss)(inner, o, None), state, inner)
            inner = optax.apply_updates(inner, updates)
        return problem.outer_loss(inner, o, None)

    o = jnp.array([[0.5, 1.5], [-0.4, 0.9]])
    for steps in (1, 3):
        found = hypergradient(
            problem, hypergrad.unrolled(), start, o, jnp.zeros(steps), jnp.zeros(()), inner_tx=tx
        ).hypergradient
        np.testing.assert_allclose(found, jax.grad(value)(o, steps), rtol=1e-8)


def test_a_clip_over_all_is_refused_beside_what_takes_the_gradient_elsewhere():

    elsewhere = Hooks(differentiate=lambda value_and_grad, trained: value_and_grad(trained))
    with pytest.raises(AgwmError, match=r"method\.finetune_clip"):
        training_phase(setup_of(), hooks=(elsewhere,), clip_with=lambda context: {})


def test_a_gate_in_the_clip_makes_it_clip_more():
    """Norms add up: trained, and alpha's, and W0's."""
    first = arrays(RECORDED["first"])["task"]
    moved = []
    for over in ("trained", "gate", "all"):
        settings, finetune = preset("meant", epochs=1, num_splits=1, search_epochs=1)
        finetune = finetune.model_copy(
            update={"optimizer": finetune.optimizer.model_copy(update={"warmup_fraction": 0.0, "eps": 10.0})}
        )
        settings = settings.model_copy(update={"finetune_clip": over})
        phase = settings.build(setup(finetune, first, rows=20, dropout=False)).stages[1][0]
        alpha = {KERNEL: LowRank(0.3 * jnp.ones((2, 5, 1)), 0.3 * jnp.ones((2, 1, 5)))}
        context = Context(first, *[{"task": first, "alpha": alpha}] * 2)
        data = {"x": arrays(RECORDED["x"])[:4], "y": arrays(RECORDED["y"])[:4]}
        batch = {**data, "weight": jnp.ones(4), "key": jax.random.key(0)}
        state, _ = jax.jit(phase.step)(
            phase.start(context, jax.random.key(0)), context, {"train": batch}, batch["key"], 0
        )
        moved.append(norm({"b": state.params["task"]["classifier.bias"] - first["classifier.bias"]}))
    assert moved[0] > 1.0001 * moved[1] > 1.0001**2 * moved[2]


def test_weights_left_at_an_end_are_not_rolled_back():
    with pytest.raises(AgwmError, match=r"search\.rollback: got true; allowed: false or from_look_ahead"):
        load_config(CONFIGS / "authors_as_run.yaml", ["--method.search.rollback", "true"])
