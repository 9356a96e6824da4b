"""The quadratic problem of the bilevel benchmark of benchopt, with its constants and its solvers' step sizes.

Command: python experiments/gallery/quadratic.py

1024 rank-one samples of dimension 100 at both levels, eigenvalues of the mean curvature 0.1 to 1, coupling 0.1 to
0.1 (its `datasets/quadratic.py`); the draw of the samples is our own. Steps and numbers of terms are those which its
`config/quadratics_021424_best_params.yml` found for stocBiO, AmIGO and F2SA.
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from agwm_jax import Problem, bilevel, hypergrad, hypergradient, linear_solve
from agwm_jax.bench.gallery import Solved, below, equal, run

SAMPLES, DIM, BATCH, INNER = 1024, 100, 64, 10
LOW, HIGH, CROSS = 0.1, 1.0, 0.1


def level(rng) -> dict:
    """The samples of one level; each is a quadratic of two variables with curvatures of rank one."""

    def basis():
        return np.linalg.qr(rng.normal(size=(DIM, DIM)))[0]

    def rows(roots):
        directions = basis()
        return rng.normal(size=(SAMPLES, DIM)) @ (directions * roots) @ directions.T

    spread = np.geomspace(LOW, HIGH, DIM) ** 0.5
    z = rng.normal(size=(SAMPLES, DIM))
    return {
        "inner": rows(spread),
        "outer": rows(np.r_[0, spread[1:]]),
        "cross_outer": z @ (basis() * np.geomspace(LOW, CROSS, DIM)).T,
        "cross_inner": z @ basis().T,
        "linear_inner": rng.normal(size=(SAMPLES, DIM)),
        "linear_outer": rng.normal(size=(SAMPLES, DIM)),
    }


def loss(w, o, s):
    """The mean over samples of ``(a.w)^2 / 2 + (b.o)^2 / 2 + (c.o)(d.w) + e.w + f.o``."""
    each = (s["inner"] @ w) ** 2 / 2 + (s["outer"] @ o) ** 2 / 2 + (s["cross_outer"] @ o) * (s["cross_inner"] @ w)
    return jnp.mean(each + s["linear_inner"] @ w + s["linear_outer"] @ o)


class Exact:
    """Solution, value function and its gradient in closed form."""

    def __init__(self, f: dict, g: dict) -> None:
        zero = jnp.zeros(DIM)
        self.g = g
        self.hessian = np.asarray(jax.hessian(loss)(zero, zero, f))
        self.cross = np.asarray(jax.jacfwd(jax.grad(loss, 1))(zero, zero, f))  # outer x inner
        self.linear = f["linear_inner"].mean(axis=0)

    def solution(self, o):
        return np.linalg.solve(self.hessian, -self.linear - self.cross.T @ o)

    def value(self, o) -> float:
        return float(loss(self.solution(o), o, self.g))

    def gradient(self, o):
        of_w, of_o = jax.grad(loss, (0, 1))(self.solution(o), o, self.g)
        return np.asarray(of_o) - self.cross @ np.linalg.solve(self.hessian, np.asarray(of_w))

    def least(self):
        """Where the gradient, which is linear, vanishes."""
        at_zero = self.gradient(np.zeros(DIM))
        matrix = np.stack([self.gradient(e) - at_zero for e in np.eye(DIM)], axis=1)
        assert np.linalg.eigvalsh((matrix + matrix.T) / 2).min() > 0
        return np.linalg.solve(matrix, -at_zero)


def solve() -> Solved:
    """Value function against outer steps."""
    rng = np.random.default_rng(2442)
    f, g = level(rng), level(rng)
    exact = Exact(f, g)
    best = exact.value(exact.least())
    o = rng.normal(size=DIM)
    problem = Problem(loss, loss)
    conjugate = hypergrad.implicit(linear_solve.conjugate_gradient(num_steps=30))
    whole = jax.tree.map(lambda x: jnp.asarray(x)[None], f)
    found = hypergradient(problem, conjugate, jnp.asarray(exact.solution(o)), jnp.asarray(o), whole, g).hypergradient
    answers = [equal("hypergradient", found, exact.gradient(o), "closed form", rtol=1e-6)]

    stochastic = {
        "stocBiO": (
            hypergrad.implicit(linear_solve.neumann(num_terms=10, step_size=0.1), hvp="jvp", resample=True),
            0.1,
            0.1,
        ),
        "AmIGO": (
            hypergrad.implicit(linear_solve.gradient_descent(num_steps=10, step_size=0.01), hvp="jvp", resample=True),
            0.01,
            0.1,
        ),
        "F2SA": (hypergrad.penalty(weight=1.0, growth=0.01), 0.1, 0.1),
        "unrolled": (hypergrad.unrolled(), 0.1, 0.1),
    }
    curves = {}
    for name, (estimator, rate, outer_rate) in stochastic.items():
        curves[name] = _search(problem, exact, f, g, estimator, rate, outer_rate, steps=4000, batch=BATCH)
    curves["full batch, conjugate gradients"] = _search(
        problem, exact, f, g, hypergrad.implicit(linear_solve.conjugate_gradient(num_steps=30)), 1.0, 0.5, 400, None
    )
    gap = {name: exact.value(np.zeros(DIM)) - best for name in curves}
    for name, (steps, values, seconds) in curves.items():
        share = (values[-1] - best) / gap[name]
        bound, why = (
            (1e-6, "converged") if name.startswith("full") else (0.5, "constant steps leave the batches' noise")
        )
        answers.append(below(f"{name}: part of the start's excess that is left", share, bound, why))
        print(f"{name}: {steps[-1]} outer steps in {seconds:.1f} s, compiling included")

    def draw(figure):
        axes = figure.subplots()
        for name, (steps, values, _) in curves.items():
            line = "--" if name == "unrolled" else "-"  # the curve of stocBiO, whose series has as many terms
            axes.plot(steps, np.maximum(np.asarray(values) - best, 1e-9), line, label=name)
        axes.set(yscale="log", xlabel="outer step", ylabel="value function above its least")
        axes.legend(fontsize=8)

    return Solved(answers, "benchopt's quadratic problem", draw)


def _search(problem, exact, f, g, estimator, rate, outer_rate, steps, batch):
    solver = bilevel(problem, estimator, inner_tx=optax.sgd(rate), outer_tx=optax.sgd(outer_rate))
    every = 100 if batch else 10

    def draw_batches(key):
        if batch is None:
            return jax.tree.map(lambda x: jnp.broadcast_to(x, (INNER, *x.shape)), f), g
        rows = jax.random.randint(key, (INNER + 1, batch), 0, SAMPLES)
        return jax.tree.map(lambda x: x[rows[:-1]], f), jax.tree.map(lambda x: x[rows[-1]], g)

    def step(state, key):
        return solver.step(state, *draw_batches(key))[0], None

    run_ten = jax.jit(lambda state, keys: jax.lax.scan(step, state, keys)[0])
    f, g = (jax.tree.map(jnp.asarray, level) for level in (f, g))
    state = solver.init(jnp.zeros(DIM), jnp.zeros(DIM))
    keys = jax.random.split(jax.random.key(0), steps).reshape(-1, every)
    at, values, began = [0], [exact.value(np.zeros(DIM))], time.perf_counter()
    for i, some in enumerate(keys):
        state = run_ten(state, some)
        at.append(every * (i + 1))
        values.append(exact.value(np.asarray(state.outer)))
    return at, values, time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(run("quadratic", __doc__, solve))
