"""The learning rate of each of 100 steps and the weight decay of a small network, through the whole training.

Command: python experiments/gallery/schedule.py
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from agwm_jax import Problem, bilevel, hypergrad, hypergradient
from agwm_jax.bench.gallery import Answer, Solved, below, equal, run

STEPS, OUTER_STEPS = 100, 100


def solve() -> Solved:
    """Reverse mode with all states and with few, against plain JAX; then the learnt schedule."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))[:900]
    parts = [(jnp.asarray(x[rows] / 16), jnp.asarray(y[rows])) for rows in np.split(order, 3)]
    train, validation, test = parts

    def loss(w, data):
        logits = jnp.tanh(data[0] @ w["first"]) @ w["second"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, data[1]).mean()

    keys = jax.random.split(jax.random.key(0))
    start = {"first": jax.random.normal(keys[0], (64, 32)) / 8, "second": jax.random.normal(keys[1], (32, 10)) / 6}
    outer = {"log_rates": jnp.full(STEPS, jnp.log(0.5)), "log_decay": jnp.log(1e-3)}
    problem = Problem(lambda w, o, _: loss(w, train), lambda w, o, _: loss(w, validation))

    def training(o):
        decay, rates = jnp.exp(o["log_decay"]), jnp.exp(o["log_rates"])
        return optax.chain(optax.add_decayed_weights(decay), optax.sgd(lambda count: rates[count]))

    def plain(o, judged=validation):
        """Twelve lines of JAX that know nothing of the library."""

        def step(w, log_rate):
            grads = jax.grad(loss)(w, train)
            move = jnp.exp(log_rate)
            return jax.tree.map(lambda w, g: w - move * (g + jnp.exp(o["log_decay"]) * w), w, grads), None

        return loss(jax.lax.scan(step, start, o["log_rates"])[0], judged)

    def flat(tree):
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])

    reference = jax.jit(jax.grad(plain)).lower(outer).compile()
    wanted, megabytes = flat(reference(outer)), {"jax.grad": reference.memory_analysis().temp_size_in_bytes / 1e6}
    answers = []
    for name, estimator in {
        "unrolled, all states": hypergrad.unrolled(),
        "unrolled, 20 states": hypergrad.unrolled(states=20),
        "unrolled, 14 states": hypergrad.unrolled(states=14),
    }.items():

        def estimate(o, estimator=estimator):
            return hypergradient(problem, estimator, start, o, inner_tx=training, num_steps=STEPS).hypergradient

        compiled = jax.jit(estimate).lower(outer).compile()
        megabytes[name] = compiled.memory_analysis().temp_size_in_bytes / 1e6
        answers.append(equal(f"hypergradient: {name}", flat(compiled(outer)), wanted, "jax.grad", rtol=1e-9))
    source = "a fifth of what jax.grad keeps (MB)"
    answers.append(
        below("20 states: temporary memory, MB", megabytes["unrolled, 20 states"], megabytes["jax.grad"] / 5, source)
    )
    print("temporary memory, MB:", {name: round(value, 1) for name, value in megabytes.items()})

    solver = bilevel(
        problem,
        hypergrad.unrolled(states=20),
        inner_tx=training,
        outer_tx=optax.chain(optax.clip_by_global_norm(0.1), optax.adam(optax.cosine_decay_schedule(0.1, OUTER_STEPS))),
        num_steps=STEPS,
        restart=True,
        project=lambda o: {**o, "log_rates": jnp.minimum(o["log_rates"], jnp.log(1.0))},
    )
    step = jax.jit(solver.step)
    state = solver.init(start, outer)
    losses = []
    for _ in range(OUTER_STEPS):
        state, info = step(state)
        losses.append(float(info["outer_loss"]))
    constant = {
        (rate, decay): float(jax.jit(plain)({"log_rates": jnp.full(STEPS, jnp.log(rate)), "log_decay": jnp.log(decay)}))
        for rate in (0.1, 0.3, 0.5, 1.0, 2.0)
        for decay in (1e-4, 1e-3, 3e-3, 1e-2)
    }
    best = min(constant, key=constant.__getitem__)
    source = f"the best of 20 pairs, constant rate {best[0]:g} and decay {best[1]:g}"
    answers.append(below("validation loss of the learnt schedule", losses[-1], constant[best], source))
    on_test = [
        float(jax.jit(lambda o: plain(o, test))(o))
        for o in (state.outer, {"log_rates": jnp.full(STEPS, jnp.log(best[0])), "log_decay": jnp.log(best[1])})
    ]
    answers.append(
        Answer("loss on new examples", f"{on_test[0]:.4f}", f"{on_test[1]:.4f}", "the same pair; told, not asked", True)
    )

    def draw(figure):
        left, right = figure.subplots(1, 2)
        left.plot(np.exp(np.asarray(state.outer["log_rates"])), color="#0072B2")
        left.axhline(best[0], color="#555555", ls=":")
        decay = float(jnp.exp(state.outer["log_decay"]))
        left.set(title=f"learnt rates; decay {decay:.2g}", xlabel="inner step", ylabel="learning rate")
        right.plot(losses, color="#0072B2", label="learnt schedule")
        right.axhline(constant[best], color="#555555", ls=":", label="best constant pair of 20")
        right.set(title="validation loss", xlabel="outer step")
        right.legend()

    return Solved(answers, "101 hyperparameters of one training", draw)


if __name__ == "__main__":
    sys.exit(run("schedule", __doc__, solve))
