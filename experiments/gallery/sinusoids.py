"""MAML and iMAML: a start of a network from which a sinusoid is learnt from ten points.

Command: python experiments/gallery/sinusoids.py
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from agwm_jax import Composite, Problem, bilevel, hypergrad, hypergradient, inner_steps, linear_solve
from agwm_jax.bench.gallery import Solved, below, equal, run
from agwm_jax.core.inner import InnerState

TASKS, SHOTS, OUTER_STEPS = 25, 10, 2000
PULL = 1.0  # of iMAML's tasks towards the start
MAML, IMAML = optax.sgd(0.05), optax.sgd(0.01)


def network(w, x):
    """One number in, one out, two hidden layers of 40."""
    hidden = jnp.tanh(x[:, None] @ w["first"] + w["bias"])
    return (jnp.tanh(hidden @ w["second"] + w["bias2"]) @ w["third"])[:, 0]


def tasks(key, count, shots=SHOTS):
    """Sinusoids of random amplitude and phase: x and y ``[count, shots]``."""
    of_x, of_amplitude, of_phase = jax.random.split(key, 3)
    x = jax.random.uniform(of_x, (count, shots), minval=-5, maxval=5)
    amplitude = jax.random.uniform(of_amplitude, (count, 1), minval=0.1, maxval=5)
    return x, amplitude * jnp.sin(x + jax.random.uniform(of_phase, (count, 1), maxval=jnp.pi))


def halves(data):
    """The first ten points to learn from, the others to be judged by."""
    return tuple(v[:, :SHOTS] for v in data), tuple(v[:, SHOTS:] for v in data)


def error(change, start, data):
    """Mean squared error; a task's weights are the start plus its change."""
    return jnp.mean((network(jax.tree.map(jnp.add, start, change), data[0]) - data[1]) ** 2)


def _outputs(change, start, data):
    return network(jax.tree.map(jnp.add, start, change), data[0]), change


def _criterion(outputs, data):
    predicted, change = outputs
    return jnp.mean((predicted - data[1]) ** 2) + PULL / 2 * sum(jnp.sum(x**2) for x in jax.tree.leaves(change))


pulled = Composite(_outputs, _criterion)  # the same with iMAML's pull of the change towards zero


def learn(start, inner_loss, estimator, tx, steps):
    """The start after `OUTER_STEPS` steps; a step averages over 25 tasks, each with its own change."""
    solver = bilevel(
        Problem(inner_loss, error), estimator, inner_tx=tx, outer_tx=optax.adam(1e-3), num_inner=TASKS, restart=True
    )
    zeros = jax.tree.map(lambda x: jnp.zeros((TASKS, *x.shape)), start)

    def step(state, key):
        few, judged = halves(tasks(key, TASKS, 2 * SHOTS))
        batches = jax.tree.map(lambda x: jnp.repeat(x[:, None], steps, axis=1), few)
        state, info = solver.step(state, batches, judged)
        return state, info["outer_loss"]

    keys = jax.random.split(jax.random.key(1), OUTER_STEPS)
    state, losses = jax.jit(lambda state: jax.lax.scan(step, state, keys))(solver.init(zeros, start))
    return state.outer, losses


def jointly(start):
    """The control: one network for all tasks, trained on as many points."""

    def step(carry, key):
        w, state = carry
        x, y = tasks(key, TASKS, 2 * SHOTS)
        updates, state = tx.update(jax.grad(lambda w: jnp.mean((network(w, x.ravel()) - y.ravel()) ** 2))(w), state)
        return (optax.apply_updates(w, updates), state), None

    tx = optax.adam(1e-3)
    keys = jax.random.split(jax.random.key(1), OUTER_STEPS)
    return jax.jit(lambda w: jax.lax.scan(step, (w, tx.init(w)), keys)[0][0])(start)


def adapted(start, inner_loss, tx, steps, few):
    """The weights' change for each task of `few`."""

    def one(few):
        zeros = jax.tree.map(jnp.zeros_like, start)
        batches = jax.tree.map(lambda x: jnp.repeat(x[None], steps, axis=0), few)
        return inner_steps(inner_loss, tx, InnerState(zeros, tx.init(zeros)), start, batches)[0].params

    return jax.jit(jax.vmap(one))(few)


def solve() -> Solved:
    """MAML's gradient against plain JAX, and errors on 400 new sinusoids."""
    keys = jax.random.split(jax.random.key(0), 6)
    start = {
        "first": jax.random.normal(keys[0], (1, 40)),
        "bias": jax.random.normal(keys[1], (40,)),
        "second": jax.random.normal(keys[2], (40, 40)) / 40**0.5,
        "bias2": jnp.zeros(40),
        "third": jax.random.normal(keys[3], (40, 1)) / 40**0.5,
    }
    few, judged = halves(tasks(keys[4], 1, 2 * SHOTS))
    few, judged = jax.tree.map(lambda x: x[0], (few, judged))

    def maml(start):
        """Its paper's formula, one step."""
        zeros = jax.tree.map(jnp.zeros_like, start)
        grads = jax.grad(lambda w: error(zeros, w, few))(start)
        return error(zeros, jax.tree.map(lambda w, g: w - 0.05 * g, start, grads), judged)

    zeros = jax.tree.map(jnp.zeros_like, start)
    one_batch = jax.tree.map(lambda x: x[None], few)
    found = hypergradient(
        Problem(error, error), hypergrad.unrolled(), zeros, start, one_batch, judged, inner_tx=MAML
    ).hypergradient

    def flat(tree):
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])

    answers = [equal("MAML: gradient of the start", flat(found), flat(jax.grad(maml)(start)), "jax.grad", rtol=1e-10)]
    solved = hypergrad.implicit(linear_solve.conjugate_gradient(num_steps=5), curvature="gauss_newton")
    starts = {
        "MAML, 5 steps": (learn(start, error, hypergrad.unrolled(), MAML, 5)[0], error, MAML, 5),
        "iMAML, 30 steps": (learn(start, pulled, solved, IMAML, 30)[0], pulled, IMAML, 30),
    }
    joint = jointly(start)
    few, judged = halves(tasks(keys[5], 400, SHOTS + 100))

    def judge(start, loss, tx, steps):
        change = adapted(start, loss, tx, steps, few)
        return float(jnp.mean(jax.vmap(error, (0, None, 0))(change, start, judged)))

    control = min(judge(joint, error, optax.sgd(rate), n) for rate in (0.01, 0.05, 0.1) for n in (1, 5, 20, 100))
    scratch = min(judge(start, error, optax.sgd(rate), n) for rate in (0.01, 0.05, 0.1) for n in (1, 5, 20, 100))
    print(f"jointly trained, then the best of 12 ways to adapt: {control:.3f}; from the random start: {scratch:.3f}")
    for name, made in starts.items():
        source = "a jointly trained network's, adapted in the best of 12 ways"
        answers.append(below(f"{name}: error on new sinusoids", judge(*made), control, source))

    def draw(figure):
        grid = jnp.linspace(-5, 5, 200)
        for axes, pick in zip(figure.subplots(1, 2, sharey=True), (0, 1), strict=True):
            own = jax.tree.map(lambda x, pick=pick: x[pick : pick + 1], few)
            whole = np.argsort(np.asarray(judged[0][pick]))
            axes.plot(judged[0][pick][whole], judged[1][pick][whole], color="#aaaaaa", lw=4, label="truth")
            axes.plot(own[0][0], own[1][0], "ko", ms=4, label="ten points")
            for name, (start, loss, tx, steps) in {**starts, "jointly trained": (joint, error, MAML, 5)}.items():
                change = jax.tree.map(lambda x: x[0], adapted(start, loss, tx, steps, own))
                axes.plot(grid, network(jax.tree.map(jnp.add, start, change), grid), label=name)
            axes.set(xlabel="x", title=f"new sinusoid {pick + 1}")
        figure.axes[1].legend(fontsize=8)

    return Solved(answers, "A start from which ten points are enough", draw)


if __name__ == "__main__":
    sys.exit(run("sinusoids", __doc__, solve))
