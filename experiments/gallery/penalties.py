"""A penalty for each of 20 features of a logistic regression, by the loss of a validation set.

Command: python experiments/gallery/penalties.py
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize

from agwm_jax import bilevel, hypergrad, hypergradient, linear_solve
from agwm_jax.bench.analytic import logistic_regression
from agwm_jax.bench.gallery import Solved, below, equal, run

OUTER_STEPS = 500
BOUNDS = -12, 0  # of the logarithm of a penalty


def solve() -> Solved:
    """The hypergradient at a solution, and the search of three estimators against SciPy's."""
    case = logistic_regression()
    f, g = case.problem

    @jax.jit
    def solution(o):
        """By Newton's method, which uses nothing of what is tested."""

        def newton(w, _):
            return w - jnp.linalg.solve(jax.hessian(f)(w, o, None), jax.grad(f)(w, o, None)), None

        return jax.lax.scan(newton, jnp.asarray(case.start), length=30)[0]

    o, w = case.outer, solution(case.outer)
    # By hand: the penalty of feature i moves w by -H^-1 e_i exp(o_i) w_i.
    response = np.linalg.solve(jax.hessian(f)(w, o, None), np.diag(np.exp(o) * w))
    by_hand = -np.asarray(jax.grad(g)(w, o, None)) @ response
    answers = []
    for name, estimator in (
        ("conjugate gradients, 20 steps", hypergrad.implicit(linear_solve.conjugate_gradient(num_steps=20))),
        ("unrolled, 400 steps from zero", hypergrad.unrolled()),
        ("unrolled, the same with 40 states", hypergrad.unrolled(states=40)),
    ):
        steps = {} if "conj" in name else {"inner_tx": optax.sgd(case.step_size), "num_steps": 400}
        at = jnp.asarray(case.start if steps else w)
        found = hypergradient(case.problem, estimator, at, jnp.asarray(o), **steps).hypergradient
        answers.append(equal(f"hypergradient: {name}", found, by_hand, "Newton's method, by hand", rtol=1e-5))

    def value_and_gradient(o):
        w = solution(o)
        exact = hypergrad.implicit(linear_solve.dense())
        return float(g(w, o, None)), np.asarray(hypergradient(case.problem, exact, w, jnp.asarray(o)).hypergradient)

    best = scipy.optimize.minimize(value_and_gradient, o, jac=True, method="L-BFGS-B", bounds=[BOUNDS] * 20)
    step_size = 1 / (1 / case.step_size + np.exp(BOUNDS[1]))  # stable at every penalty
    curves = {}
    for name, estimator in {
        "unrolled": hypergrad.unrolled(),
        "conjugate gradients, 5 steps": hypergrad.implicit(linear_solve.conjugate_gradient(num_steps=5)),
        "Neumann series, 20 terms": hypergrad.implicit(linear_solve.neumann(num_terms=20, step_size=step_size)),
    }.items():
        solver = bilevel(
            case.problem,
            estimator,
            inner_tx=optax.sgd(step_size),
            outer_tx=optax.adam(0.1),
            project=lambda o: jnp.clip(o, *BOUNDS),
            num_steps=20,
        )
        state = solver.init(jnp.asarray(case.start), jnp.asarray(o))

        def step(state, _, solver=solver):
            state, info = solver.step(state)
            return state, info["outer_loss"]

        state, curves[name] = jax.jit(lambda state, step=step: jax.lax.scan(step, state, length=OUTER_STEPS))(state)
        reached = float(g(solution(state.outer), state.outer, None))
        source = "1.02 times that of SciPy's L-BFGS on the exact value function"
        answers.append(below(f"validation loss by {name}", reached, 1.02 * best.fun, source))

    def draw(figure):
        axes = figure.subplots()
        for name, curve in curves.items():
            axes.plot(curve, label=name)
        axes.axhline(best.fun, color="#222222", ls=":", label="SciPy on the exact value function")
        axes.set(xlabel="outer step (20 inner steps each)", ylabel="validation loss")
        axes.legend()

    return Solved(answers, "Twenty penalties learnt while the weights are", draw)


if __name__ == "__main__":
    sys.exit(run("penalties", __doc__, solve))
