"""Ridge and elastic net: derivatives of solutions that scikit-learn or a formula found.

Command: python experiments/gallery/ridge.py
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import make_regression
from sklearn.linear_model import ElasticNet

from agwm_jax import Problem, hypergrad, hypergradient, implicit_function, linear_solve
from agwm_jax.bench.gallery import Answer, Solved, equal, run


def ridge() -> Answer:
    """How each weight moves with the penalty."""
    x, y = make_regression(n_samples=10, n_features=3, random_state=0)

    def inner_loss(w, penalty):
        return jnp.mean((x @ w - y) ** 2) / 2 + penalty * w @ w / 2

    def solve(penalty):
        return jnp.linalg.solve(x.T @ x + len(x) * penalty * jnp.eye(3), x.T @ y)

    w = implicit_function(solve, inner_loss, hypergrad.implicit(linear_solve.conjugate_gradient(num_steps=3)))
    known = [-2.501716, -1.267183, -3.542637]
    return equal("ridge: dw / dpenalty at 5", jax.jacrev(w)(5.0), known, "JAXopt 0.8, its ridge example", rtol=1e-6)


class ElasticNetProblem:
    """120 noisy examples of 30 features, of which 5 count; both penalties by the loss of the second half."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        x = rng.normal(size=(120, 30))
        y = x[:, :5] @ rng.normal(size=5) + rng.normal(size=120)
        (self.x, self.x_val), (self.y, self.y_val) = np.split(x, 2), np.split(y, 2)

    def solve(self, log_penalties):
        l1, l2 = np.exp(log_penalties)
        model = ElasticNet(alpha=l1 + l2, l1_ratio=l1 / (l1 + l2), fit_intercept=False, tol=1e-14, max_iter=100000)
        return model.fit(self.x, self.y).coef_

    def loss(self, log_penalties) -> float:
        return float(np.mean((self.x_val @ self.solve(log_penalties) - self.y_val) ** 2))

    def hypergradient(self, log_penalties):
        """On the support alone, where the loss is smooth and the signs are constants (Bertrand et al. 2020)."""
        w = self.solve(log_penalties)
        support = np.flatnonzero(w)
        x, x_val, signs = self.x[:, support], self.x_val[:, support], np.sign(w[support])

        def inner_loss(w, o, _):
            l1, l2 = jnp.exp(o)
            return jnp.mean((x @ w - self.y) ** 2) / 2 + l1 * signs @ w + l2 * w @ w / 2

        problem = Problem(inner_loss, lambda w, o, _: jnp.mean((x_val @ w - self.y_val) ** 2))
        exact = hypergrad.implicit(linear_solve.dense())
        return np.asarray(
            hypergradient(problem, exact, jnp.asarray(w[support]), jnp.asarray(log_penalties)).hypergradient
        )


def solve() -> Solved:
    """Both, and the path of the elastic net."""
    net, at = ElasticNetProblem(), np.log([0.1, 0.05])
    step = 1e-5 * np.eye(2)
    differences = [(net.loss(at + d) - net.loss(at - d)) / 2e-5 for d in step]
    answers = [
        ridge(),
        equal("elastic net: hypergradient", net.hypergradient(at), differences, "differences of refits", rtol=1e-5),
    ]
    path = [np.array([l1, at[1]]) for l1 in np.linspace(np.log(0.005), np.log(1), 60)]

    def draw(figure):
        axes = figure.subplots()
        axes.plot([np.exp(o[0]) for o in path], [net.loss(o) for o in path], color="#0072B2", label="scikit-learn")
        for i, o in enumerate(path[4::10]):
            slope, reach = net.hypergradient(o)[0], np.array([-0.35, 0.35])
            label = None if i else "slope of the hypergradient"
            axes.plot(np.exp(o[0] + reach), net.loss(o) + slope * reach, color="#D55E00", lw=2, label=label)
        axes.set(xscale="log", xlabel="l1 penalty", ylabel="validation loss")
        axes.legend()

    return Solved(answers, "The slope of an elastic net's path, from one solution each", draw)


if __name__ == "__main__":
    sys.exit(run("ridge", __doc__, solve))
