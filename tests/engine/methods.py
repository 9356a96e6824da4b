"""Small hand-written methods and a model of three weights, so that the engine's tests need nothing else."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from agwm_jax.core.types import LowRank
from agwm_jax.data.plan import epoch_plan
from agwm_jax.engine.group import Layout, Member
from agwm_jax.engine.loop import fit
from agwm_jax.engine.observer import InMemory
from agwm_jax.engine.sharding import make_placement
from agwm_jax.methods.interface import Method, Phase
from agwm_jax.models.weights import Weight

LAYERS, WIDTH, MLP, EXAMPLES, BATCH = 2, 8, 16, 24, 8
UP, DOWN, HEAD = "layers.up.kernel", "layers.down.kernel", "classifier.kernel"
WEIGHTS = {
    UP: Weight("kernel", ("layers", "width", "mlp")),
    DOWN: Weight("kernel", ("layers", "mlp", "width")),
    HEAD: Weight("head", ("width", "classes"), LAYERS + 1),
}


def loss(params, batch):
    """Mean squared error of a residual network with dropout."""

    def layer(x, kernels):
        up, down = kernels
        return x + jnp.tanh(x @ up) @ down, None

    x = jax.lax.scan(layer, batch["x"], (params[UP], params[DOWN]))[0]
    x = jnp.where(jax.random.bernoulli(batch["key"], 0.9, x.shape), x, 0)
    error = (x @ params[HEAD])[:, 0] - batch["labels"]
    return jnp.sum(batch["weight"] * error**2) / jnp.sum(batch["weight"])


class State(NamedTuple):
    params: dict
    opt_state: optax.OptState


def descend(tx, state, value_and_grads):
    value, grads = value_and_grads
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    return State(optax.apply_updates(state.params, updates), opt_state), {
        "loss": value,
        "grad_norm": optax.tree.norm(grads),
    }


def finetune(seed, *, tx=None, epochs=2, forward=lambda context, task, key: task, keeps=()):
    """Plain training of all weights, from where the phases before left them."""
    tx = optax.adam(0.02) if tx is None else tx

    def start(context, key):
        task = context.learnt["task"]
        return State(task, tx.init(task))

    def step(state, context, batches, key, step):
        def objective(task):
            return loss(forward(context, task, key), batches["train"])

        return descend(tx, state, jax.value_and_grad(objective)(state.params))

    def finish(context, state):
        return {"task": state.params, **{name: context.learnt[name] for name in keeps}}

    rng = np.random.default_rng([seed, 99])
    plan = {"train": epoch_plan(np.arange(EXAMPLES - 1), batch_size=BATCH, epochs=epochs, rng=rng)}
    return Phase("finetune", plan, start, step, finish)


def plain(seed, **options):
    """Nothing is mixed."""
    return Method(lambda w0, key: {"task": dict(w0)}, ((finetune(seed, **options),),), lambda w0, own: own["task"])


def mixed(seed, *, splits=2):
    """Searches side by side for a gate near one, their mean, then training at that gate, with noise on the weights."""
    tx = optax.adam(0.02)

    def init(w0, key):
        return {"task": dict(w0), "gate": gates(w0, key)}

    def gates(w0, key):
        left, right = ((*w0[UP].shape[:-1], 1), (LAYERS, 1, MLP))
        noise = jax.random.normal(key, right)
        return {UP: LowRank(jnp.ones(left), 1 + 0.1 * noise)}

    def merge(w0, task, gate):
        a = gate[UP].left @ gate[UP].right
        return {**task, UP: a * task[UP] + (1 - a) * w0[UP]}

    def start(context, key):
        params = {"task": context.initial["task"], "gate": gates(context.pretrained, key)}
        return State(params, tx.init(params))

    def step(state, context, batches, key, step):
        del step

        def objective(params):
            head = params["task"][HEAD]
            noisy = {**params["task"], HEAD: head + 1e-2 * jax.random.normal(key, head.shape)}
            return loss(merge(context.pretrained, noisy, params["gate"]), batches["a"]) + loss(noisy, batches["b"])

        return descend(tx, state, jax.value_and_grad(objective)(state.params))

    def finish(index):
        def mean(context, state):
            if index == 0:
                return state.params
            return jax.tree.map(lambda m, x: m + (x - m) / (index + 1), context.learnt, state.params)

        return mean

    def plan(index, name):
        rng = np.random.default_rng([seed, index, ord(name)])
        return epoch_plan(np.arange(EXAMPLES), batch_size=BATCH, epochs=2, rng=rng)

    def monitor(state):
        return {"gate_mean": jnp.mean(state.params["gate"][UP].right)}

    searches = tuple(
        Phase(f"search-{i}", {"a": plan(i, "a"), "b": plan(i, "b")}, start, step, finish(i), monitor)
        for i in range(splits)
    )
    last = finetune(
        seed,
        forward=lambda context, task, key: merge(context.pretrained, task, context.learnt["gate"]),
        keeps=("gate",),
    )
    return Method(init, (searches, (last,)), lambda w0, own: merge(w0, own["task"], own["gate"]))


def pretrained():
    """Encoder weights that members share."""
    rng = np.random.default_rng(9)
    return {
        UP: rng.normal(0, 0.5, (LAYERS, WIDTH, MLP)).astype(np.float32),
        DOWN: rng.normal(0, 0.5, (LAYERS, MLP, WIDTH)).astype(np.float32),
    }


def build_members(make, seeds, *, encoder=None, labels=None):
    """One member a seed: its own head, its own examples, its own order."""
    encoder = pretrained() if encoder is None else encoder
    members = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(EXAMPLES, WIDTH)).astype(np.float32)
        head = rng.normal(0, 0.1, (WIDTH, 1)).astype(np.float32)
        data = {"x": x, "labels": np.sin(x.sum(1)) if labels is None else labels}
        members.append(Member(seed, make(seed), {**encoder, HEAD: head}, data, jax.random.key(seed + 100)))
    return members


def layout(seed=1, data=1, model=1, *, fully_sharded=False, together=False):
    return Layout(make_placement(seed=seed, data=data, model=model, fully_sharded=fully_sharded), together)


def train(members, where=None, *, observer=None, **options):
    """What `fit` gives, and the observer."""
    observer = InMemory(len(members)) if observer is None else observer
    outcome = fit(
        members, weights=WEIGHTS, layout=where or layout(), observer=observer, **{"chunk_steps": 4, **options}
    )
    return outcome, observer
