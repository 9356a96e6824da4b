"""Weights of two auxiliary tasks, of which one helps the main task and the other harms it.

Command: python experiments/gallery/loss_weights.py
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize

from agwm_jax import Problem, bilevel, hypergrad, hypergradient, linear_solve
from agwm_jax.bench.gallery import Solved, below, equal, run

FEATURES, OUTER_STEPS = 20, 600


def solve() -> Solved:
    """Against weighted least squares in closed form, optimised by SciPy."""
    rng = np.random.default_rng(0)
    truth, other = rng.normal(size=(2, FEATURES))

    def task(n, w, noise):
        x = rng.normal(size=(n, FEATURES))
        return x, x @ w + noise * rng.normal(size=n)

    main_task, validation, test = (task(n, truth, 1.0) for n in (15, 40, 1000))
    auxiliary = [task(200, truth + 0.2 * rng.normal(size=FEATURES), 1.0), task(200, other, 1.0)]

    def error(w, data):
        return jnp.mean((data[0] @ w - data[1]) ** 2) / 2

    def inner_loss(w, o, _):
        return error(w, main_task) + sum(jnp.exp(o[i]) * error(w, data) for i, data in enumerate(auxiliary))

    problem = Problem(inner_loss, lambda w, o, _: error(w, validation))

    def closed_form(o):
        parts = [(1.0, main_task), *zip(np.exp(o), auxiliary, strict=True)]
        left = sum(weight * x.T @ x / len(x) for weight, (x, _) in parts)
        right = sum(weight * x.T @ y / len(x) for weight, (x, y) in parts)
        return np.linalg.solve(left, right)

    def value(o):
        return float(error(closed_form(o), validation))

    at = np.array([-0.5, 0.3])
    differences = [(value(at + d) - value(at - d)) / 2e-5 for d in 1e-5 * np.eye(2)]
    exact = hypergrad.implicit(linear_solve.conjugate_gradient(num_steps=FEATURES))
    found = hypergradient(problem, exact, jnp.asarray(closed_form(at)), jnp.asarray(at)).hypergradient
    answers = [equal("hypergradient", found, differences, "differences of closed forms", rtol=1e-5)]

    bounds = [(-8, 3)] * 2
    best = min(
        (scipy.optimize.minimize(value, x0, bounds=bounds, method="L-BFGS-B") for x0 in ([0, 0], [2, -6], [-6, 2])),
        key=lambda found: found.fun,
    )
    solver = bilevel(
        problem,
        exact,
        inner_tx=optax.sgd(0.1, momentum=0.9),
        outer_tx=optax.adam(0.2),
        project=lambda o: jnp.clip(o, -8, 3),
        num_steps=20,
    )

    def step(state, _):
        state, _ = solver.step(state)
        return state, state.outer

    start = solver.init(jnp.zeros(FEATURES), jnp.zeros(2))
    state, path = jax.jit(lambda s: jax.lax.scan(step, s, length=OUTER_STEPS))(start)
    reached = value(np.asarray(state.outer))
    answers.append(
        below("validation loss", reached, best.fun * 1.005, "1.005 times SciPy's on the closed form, 3 starts")
    )
    weights = np.exp(np.asarray(state.outer))
    answers.append(
        below("weight of the harmful task over that of the helpful", weights[1] / weights[0], 0.02, "made so")
    )
    on_test = {
        name: float(error(closed_form(np.asarray(o)), test))
        for name, o in {"learnt": state.outer, "equal": [0, 0], "main task alone": [-30, -30]}.items()
    }
    answers.append(
        below("loss on new examples", on_test["learnt"], min(on_test["equal"], on_test["main task alone"]), "controls")
    )
    print("loss on new examples:", {name: round(found, 3) for name, found in on_test.items()})

    def draw(figure):
        axes = figure.subplots()
        for i, name in enumerate(("task that helps", "task that harms")):
            axes.plot(np.exp(np.asarray(path[:, i])), label=name)
            axes.axhline(np.exp(best.x[i]), color=f"C{i}", ls=":", lw=1)
        axes.set(yscale="log", xlabel="outer step", ylabel="weight of the loss")
        axes.legend(title="dotted: SciPy on the closed form")

    return Solved(answers, "The weight of a loss that does not help goes to zero", draw)


if __name__ == "__main__":
    sys.exit(run("loss_weights", __doc__, solve))
