"""What more terms and more steps buy, on a logistic regression with a penalty for each of its features."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agwm_jax import hypergrad
from tests.core.problems import conjugate_gradient, estimate_at, logistic, neumann

COUNTS = [1, 2, 5, 10, 20, 50, 100]


@pytest.fixture(scope="module")
def case():
    return logistic(n=500, log_penalty=np.random.default_rng(7).uniform(-2.5, -0.5, 20))


def solved_by_descent(case, make, count):
    """The hypergradient at the end of 100 gradient steps of 1 / L from 0, and how far it is from the exact one."""
    step_size = 1 / np.linalg.eigvalsh(case.hessian)[-1]
    tx, o = optax.sgd(step_size), jnp.asarray(case.log_penalty)
    estimate = estimate_at(case.problem, make(count, step_size), jnp.zeros(20), o, tx=tx, num_steps=100)
    np.testing.assert_allclose(estimate.inner.params, case.optimum, rtol=1e-10, atol=1e-12)
    found = np.asarray(estimate.hypergradient)
    return found, np.linalg.norm(found - case.hypergradient) / np.linalg.norm(case.hypergradient)


TRUNCATED = {
    "neumann": lambda count, step_size: neumann(count, step_size),
    "unrolled": lambda count, step_size: hypergrad.unrolled(num_steps=count),
    "conjugate_gradient": lambda count, step_size: conjugate_gradient(count),
}


@pytest.fixture(scope="module")
def found(case):
    """Hypergradients and their errors by name, one a count."""
    with jax.enable_x64(True):
        return {name: [solved_by_descent(case, make, count) for count in COUNTS] for name, make in TRUNCATED.items()}


@pytest.mark.parametrize("name", TRUNCATED)
def test_errors_fall_with_the_count(case, found, name):
    errors = [error for _, error in found[name]]
    floor = 1e-12  # of rounding
    assert all(later < earlier or later < floor for earlier, later in itertools.pairwise(errors))
    assert errors[0] > 1e-3
    assert errors[-1] < 1e-12
    # At the optimum what K terms leave over is (I - H/L)^K; conjugate gradients leave the square root of the exponent.
    eigenvalues = np.linalg.eigvalsh(case.hessian)
    if name == "conjugate_gradient":
        root = np.sqrt(eigenvalues[-1] / eigenvalues[0])
        bounds = [2 * root * ((root - 1) / (root + 1)) ** count for count in COUNTS]
    else:
        bounds = [(1 - eigenvalues[0] / eigenvalues[-1]) ** count for count in COUNTS]
    gain = np.linalg.norm(np.exp(case.log_penalty) * case.optimum, np.inf) / np.linalg.norm(case.hypergradient)
    norm = np.linalg.norm(case.solution)
    assert all(error <= gain * norm * bound + floor for error, bound in zip(errors, bounds, strict=True))


def test_neumann_is_reverse_mode_through_the_last_steps(found):
    for (series, _), (reverse, _) in zip(found["neumann"], found["unrolled"], strict=True):
        np.testing.assert_allclose(series, reverse, rtol=1e-6, atol=1e-12)


def test_conjugate_gradients_are_the_fastest(found):
    for count, (_, of_series), (_, of_gradients) in zip(
        COUNTS, found["neumann"], found["conjugate_gradient"], strict=True
    ):
        assert of_gradients < of_series or count == 100  # there both are at the floor
