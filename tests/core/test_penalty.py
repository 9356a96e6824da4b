"""The fully first-order estimator against closed forms of its two inner copies."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agwm_jax import Problem, hypergrad
from tests.core.problems import darts_toy, estimates_at, ridge


def penalised_solution(case, weight):
    """argmin f + g / lambda."""
    x, y = case.validation
    return np.linalg.solve(case.hessian + x.T @ x / (weight * len(y)), case.moment + x.T @ y / (weight * len(y)))


def at_the_solutions(case, weight):
    """``d_o g + lambda (d_o f(y) - d_o f(z))`` with d_o f = |w|^2 / 2."""
    y, z = penalised_solution(case, weight), case.solution()
    return 0.2 * case.penalty + weight * 0.5 * (y @ y - z @ z)


def solved(case, *, calls=1, **options):
    """Enough inner steps that both copies converge within one outer step."""
    estimator = hypergrad.penalty(**options)
    start, penalty = jnp.zeros(4), jnp.asarray(case.penalty)
    return estimates_at(case.problem, estimator, start, penalty, calls=calls, tx=optax.sgd(0.3), num_steps=1000)


def test_ridge_solved_is_its_own_closed_form(x64):
    case, errors = ridge(), []
    exact = case.exact(case.solution())
    for weight in (100.0, 1000.0, 10000.0):
        (estimate,) = solved(case, weight=weight)
        expected = at_the_solutions(case, weight)
        np.testing.assert_allclose(estimate.hypergradient, expected, rtol=1e-8)
        np.testing.assert_allclose(estimate.inner.params, case.solution(), rtol=1e-10)
        np.testing.assert_allclose(estimate.state.copy.params, penalised_solution(case, weight), rtol=1e-10)
        x, y = case.validation
        at_copy = 0.5 * np.mean((x @ estimate.state.copy.params - y) ** 2) + 0.1 * case.penalty**2
        np.testing.assert_allclose(estimate.info["outer_loss"], at_copy, rtol=1e-10)
        errors.append(abs(expected - exact))
    # Its distance to the exact hypergradient falls as 1 / lambda.
    np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 10, rtol=0.03)


def test_the_weight_grows(x64):
    case = ridge()
    estimates = solved(case, weight=5.0, growth=2.5, calls=3)
    for estimate, weight in zip(estimates, (5.0, 7.5, 10.0), strict=True):
        assert float(estimate.info["penalty_weight"]) == weight
        np.testing.assert_allclose(estimate.hypergradient, at_the_solutions(case, weight), rtol=1e-8)
    assert int(estimates[-1].state.num_steps) == 3


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10])
def test_ridge_step_by_step(x64, num_steps):
    """The copy goes on from where it was; the inner variable is given anew at each call."""
    case = ridge()
    (x, y), start = case.validation, np.arange(4.0)
    estimates = estimates_at(
        case.problem,
        hypergrad.penalty(weight=4.0, growth=1.0),
        jnp.asarray(start),
        jnp.asarray(case.penalty),
        calls=3,
        tx=optax.sgd(0.3),
        num_steps=num_steps,
    )
    copy = start
    for estimate, weight in zip(estimates, (4.0, 5.0, 6.0), strict=True):
        for _ in range(num_steps):
            of_outer = x.T @ (x @ copy - y) / len(y)
            copy = copy - 0.3 * (case.hessian @ copy - case.moment + of_outer / weight)
        w = case.descend(start, 0.3, num_steps)
        expected = 0.2 * case.penalty + weight * 0.5 * (copy @ copy - w @ w)
        np.testing.assert_allclose(estimate.hypergradient, expected, rtol=1e-9)
        np.testing.assert_allclose(estimate.inner.params, w, rtol=1e-12)
        np.testing.assert_allclose(estimate.state.copy.params, copy, rtol=1e-12)


@pytest.mark.parametrize("weight", [1.0, 8.0])
def test_toy_solved_by_one_step(weight):
    """y = a - a / 2 lambda at a = 2: the estimate is y - 2 + a = 2 - 1 / lambda, where 2 is exact."""
    two = jnp.float32(2)
    (estimate,) = estimates_at(darts_toy(), hypergrad.penalty(weight=weight), two, two, calls=1, tx=optax.sgd(0.5))
    assert float(estimate.hypergradient) == 2 - 1 / weight


def test_each_loss_sees_its_own_batch():
    """One step of 0.5 from w = 2 on f = (w - o b)^2: z = o b, and y that less 0.25 d_w g; J's batch is the last."""
    problem = Problem(lambda w, o, b: (w - o * b) ** 2, lambda w, o, b: w * o * b)
    (estimate,) = estimates_at(
        problem,
        hypergrad.penalty(weight=2.0),
        jnp.float32(2),
        jnp.float32(3),
        calls=1,
        tx=optax.sgd(0.5),
        inner_batches=jnp.array([5.0, 1.0]),
        outer_batch=jnp.float32(0.5),
    )
    z, y = 3.0, 3.0 - 0.5 * 1.5 / 2
    assert float(estimate.inner.params) == z
    assert float(estimate.state.copy.params) == y
    assert float(estimate.info["outer_loss"]) == y * 1.5
    assert float(estimate.hypergradient) == y * 0.5 + 2 * (-2 * (y - 3) + 2 * (z - 3))
