"""The same hypergradient by this library, JAXopt, lineax and plain JAX: error and time on one machine.

Command: python experiments/peers.py --output runs/peers        (pip install "agwm-jax[peers]")

A logistic regression of 2000 examples with a penalty for each of its features; the solution is given, in float64. All
solve the same linear system by conjugate gradients with the same number of steps, or go back through the same steps.
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from agwm_jax import Problem, hypergrad, hypergradient, linear_solve
from agwm_jax.report.table import markdown_table

EXAMPLES, ROUNDS = 2000, 15


def problem(features: int):
    """Losses, their solution and the exact hypergradient there."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=features) / features**0.5
    x, x_val = (jnp.asarray(rng.normal(size=(EXAMPLES, features))) for _ in range(2))
    y, y_val = (jnp.sign(jnp.asarray(a @ truth + rng.normal(size=EXAMPLES))) for a in (x, x_val))
    outer = jnp.full(features, jnp.log(1e-2))

    def inner_loss(w, o):
        return jnp.mean(jax.nn.softplus(-y * (x @ w))) + jnp.sum(jnp.exp(o) * w**2) / 2

    def outer_loss(w):
        return jnp.mean(jax.nn.softplus(-y_val * (x_val @ w)))

    gradient, hessian = jax.jit(jax.grad(inner_loss)), jax.jit(jax.hessian(inner_loss))
    w = jnp.zeros(features)
    for _ in range(12):
        w = w - jnp.linalg.solve(hessian(w, outer), gradient(w, outer))
    exact = -jnp.exp(outer) * w * jnp.linalg.solve(hessian(w, outer), jax.grad(outer_loss)(w))
    step_size = 1 / float(jnp.linalg.norm(hessian(jnp.zeros(features), outer), 2))
    return inner_loss, outer_loss, outer, w, exact, step_size


def ours(inner_loss, outer_loss, estimator, **steps):
    """Of this library."""
    both = Problem(lambda w, o, _: inner_loss(w, o), lambda w, o, _: outer_loss(w))
    return lambda w, o: hypergradient(both, estimator, w, o, **steps).hypergradient


def by_jaxopt(inner_loss, outer_loss, count):
    """JAXopt's vector-Jacobian product of a root."""
    from jaxopt.implicit_diff import root_vjp
    from jaxopt.linear_solve import solve_cg

    def estimate(w, o):
        solve = partial(solve_cg, maxiter=count, tol=0.0)
        return root_vjp(jax.grad(inner_loss), w, (o,), jax.grad(outer_loss)(w), solve=solve)[0]

    return estimate


def by_lineax(inner_loss, outer_loss, count):
    """Lineax's conjugate gradients, for a matrix that is said to be positive definite. (Optimistix's `ImplicitAdjoint`
    does not say it, so that lineax refuses these there.)"""
    import lineax

    def estimate(w, o):
        gradient = jax.grad(inner_loss)
        _, product = jax.linearize(lambda w: gradient(w, o), w)
        matrix = lineax.FunctionLinearOperator(product, jax.eval_shape(lambda: w), lineax.positive_semidefinite_tag)
        solver = lineax.CG(rtol=0.0, atol=0.0, max_steps=count)
        x = lineax.linear_solve(matrix, jax.grad(outer_loss)(w), solver, throw=False).value
        return -jax.vjp(lambda o: gradient(w, o), o)[1](x)[0]

    return estimate


def by_jax(inner_loss, outer_loss, count):
    """Plain JAX: its conjugate gradients and a product by `jax.vjp`."""

    def estimate(w, o):
        gradient = jax.grad(inner_loss)
        _, product = jax.linearize(lambda w: gradient(w, o), w)
        x, _ = jax.scipy.sparse.linalg.cg(product, jax.grad(outer_loss)(w), maxiter=count, tol=0.0)
        return -jax.vjp(lambda o: gradient(w, o), o)[1](x)[0]

    return estimate


def through_scan(inner_loss, outer_loss, step_size, count):
    """Plain JAX: reverse mode through gradient descent."""

    def value(o, w):
        move = jax.grad(inner_loss)
        w, _ = jax.lax.scan(lambda w, _: (w - step_size * move(w, o), None), w, length=count)
        return outer_loss(w)

    return lambda w, o: jax.grad(value)(o, w)


def measure(made: dict, w, o, exact) -> list[dict]:
    """Rows; rounds go over all in turn, so that a busy machine slows them alike."""
    rows, compiled, seconds = [], {}, {}
    for name, estimate in made.items():
        compiled[name] = jax.jit(estimate).lower(w, o).compile()
        jax.block_until_ready(compiled[name](w, o))
    for _ in range(ROUNDS):
        for name, program in compiled.items():
            began = time.perf_counter()
            jax.block_until_ready(program(w, o))
            seconds.setdefault(name, []).append(time.perf_counter() - began)
    first = next(iter(compiled))
    for name, program in compiled.items():
        found = program(w, o)
        ratios = np.array(seconds[name]) / np.array(seconds[first])
        rows.append(
            {
                "by": name,
                "relative error": f"{float(jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact)):.1e}",
                "ms": f"{1e3 * np.median(seconds[name]):.1f}",
                "time / ours": f"{np.median(ratios):.2f}",
                "temporary MB": f"{program.memory_analysis().temp_size_in_bytes / 1e6:.1f}",
            }
        )
    return rows


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=Path("runs/peers"))
    output = parser.parse_args().output
    tables = {}
    with jax.enable_x64(True):
        for features in (200, 2000):
            f, g, o, w, exact, step_size = problem(features)
            for count in (10, 50):
                solver = linear_solve.conjugate_gradient(num_steps=count)
                made = {
                    "agwm_jax": ours(f, g, hypergrad.implicit(solver)),
                    "JAXopt": by_jaxopt(f, g, count),
                    "lineax": by_lineax(f, g, count),
                    "plain JAX": by_jax(f, g, count),
                }
                tables[f"{features} features, {count} steps of conjugate gradients"] = measure(made, w, o, exact)
            steps = {"inner_tx": optax.sgd(step_size), "num_steps": 100}
            made = {
                "agwm_jax": ours(f, g, hypergrad.unrolled(), **steps),
                "agwm_jax, 20 states": ours(f, g, hypergrad.unrolled(states=20), **steps),
                "plain JAX": through_scan(f, g, step_size, 100),
            }
            tables[f"{features} features, through 100 steps of gradient descent"] = measure(made, w, o, exact)
    text = "\n".join(f"### {name}\n\n{markdown_table(rows)}" for name, rows in tables.items())
    output.mkdir(parents=True, exist_ok=True)
    (output / "peers.md").write_text(text)
    (output / "peers.json").write_text(json.dumps(tables, indent=1) + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
