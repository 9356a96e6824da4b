"""A DARTS cell of two operations, of which the data say which one is right.

Command: python experiments/gallery/cell.py
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from agwm_jax import Problem, bilevel, hypergrad
from agwm_jax.bench.gallery import Solved, above, run

OUTER_STEPS, LENGTH, RATE = 300, 32, 0.1
OPERATIONS = ("convolution", "maximum")
ESTIMATORS = {
    "first_order": hypergrad.first_order(),
    "finite_difference (DARTS)": hypergrad.finite_difference(step_size=RATE),
    "unrolled": hypergrad.unrolled(),
}


def neighbours(x):
    """The signal beside itself, shifted by -1, 0 and 1: ``[n, 3, LENGTH]``."""
    return jnp.stack([jnp.roll(x, shift, axis=-1) for shift in (-1, 0, 1)], axis=1)


def operations(w, x):
    """A convolution with a learnt kernel, and the largest of three neighbours times a learnt number."""
    beside = neighbours(x)
    return jnp.stack([jnp.einsum("k,nkl->nl", w["kernel"], beside), w["scale"] * beside.max(axis=1)])


def search(right: int, estimator):
    """Softmax weight of the right operation after each outer step."""
    rng = np.random.default_rng(right)

    def data(n):
        x = rng.normal(size=(n, LENGTH))
        true = {"kernel": jnp.array([0.5, -1.0, 0.5]), "scale": jnp.float64(1)}
        return x, operations(true, x)[right] + 0.3 * rng.normal(size=(n, LENGTH))

    train, validation = data(20), data(20)

    def loss(w, o, data):
        return jnp.mean((jnp.tensordot(jax.nn.softmax(o), operations(w, data[0]), 1) - data[1]) ** 2)

    problem = Problem(lambda w, o, _: loss(w, o, train), lambda w, o, _: loss(w, o, validation))
    solver = bilevel(problem, estimator, inner_tx=optax.sgd(RATE), outer_tx=optax.adam(0.02), num_steps=1)
    start = solver.init({"kernel": jnp.full(3, 0.1), "scale": jnp.float64(0.1)}, jnp.zeros(2))

    def step(state, _):
        state, _ = solver.step(state)
        return state, jax.nn.softmax(state.outer)[right]

    return np.asarray(jax.jit(lambda s: jax.lax.scan(step, s, length=OUTER_STEPS)[1])(start))


def solve() -> Solved:
    """Each operation is the right one once."""
    curves = {(right, name): search(right, e) for right in range(2) for name, e in ESTIMATORS.items()}
    answers = [
        above(f"{OPERATIONS[right]} is right: its weight by {name}", curve[-1], 0.8, "made so")
        for (right, name), curve in curves.items()
    ]

    def draw(figure):
        for right, axes in enumerate(figure.subplots(1, 2, sharey=True)):
            for name in ESTIMATORS:
                axes.plot(curves[right, name], label=name)
            axes.set(title=f"the {OPERATIONS[right]} is right", xlabel="outer step", ylim=(0, 1.02))
        figure.axes[0].set_ylabel("its softmax weight")
        figure.axes[0].legend(loc="lower right")

    return Solved(answers, "A cell finds the operation that made the data", draw)


if __name__ == "__main__":
    sys.exit(run("cell", __doc__, solve))
