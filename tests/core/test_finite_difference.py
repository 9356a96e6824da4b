"""The response along the outer gradient, by a central difference, against what it is a difference of."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agwm_jax import Problem, hypergrad
from tests.core.problems import NO_BATCH, TRANSFORMS, estimate_at, ridge, warm_state


@pytest.mark.parametrize("step_size", [1.0, 0.25])
@pytest.mark.parametrize("num_steps", [1, 3])
def test_ridge_is_its_own_closed_form(x64, step_size, num_steps):
    """x = step_size * v with v after the look-ahead, J before its last update; exact, for d_o f is quadratic in w."""
    case, start = ridge(), np.arange(4.0)
    estimate = estimate_at(
        case.problem,
        hypergrad.finite_difference(step_size=step_size),
        jnp.asarray(start),
        jnp.asarray(case.penalty),
        tx=optax.sgd(0.3),
        num_steps=num_steps,
    )
    before, after = (case.descend(start, 0.3, n) for n in (num_steps - 1, num_steps))
    expected = case.hypergradient(before, step_size * case.outer_gradient(after))
    np.testing.assert_allclose(estimate.hypergradient, expected, rtol=1e-10)
    np.testing.assert_allclose(estimate.inner.params, after, rtol=1e-12)
    losses = [float(case.problem.inner_loss(case.descend(start, 0.3, n), case.penalty, None)) for n in range(num_steps)]
    np.testing.assert_allclose(estimate.info["inner_loss"], np.mean(losses), rtol=1e-12)


@pytest.mark.parametrize("radius", [0.1, 0.5])
def test_radius_is_the_norm_of_the_step(x64, radius):
    """f = o sum(w^3) / 3, x = v: the difference is sum(w^2 x) + e^2 sum(x^3) / 3 with e = radius / |x|."""
    v, w = np.array([1.0, -2.0, 2.0]), np.array([1.0, 0.5, 2.0])
    problem = Problem(lambda w, o, _: o * jnp.sum(w**3) / 3, lambda w, o, _: jnp.sum(jnp.asarray(v) * w))
    estimate = estimate_at(problem, hypergrad.finite_difference(radius=radius), jnp.asarray(w), jnp.ones(()))
    expected = -(np.sum(w**2 * v) + (radius / 3) ** 2 * np.sum(v**3) / 3)
    np.testing.assert_allclose(estimate.hypergradient, expected, rtol=1e-10)


def test_preconditioned_by_gradient_descent_is_a_step_size(x64):
    """For sgd(eta) x is eta v; and where f is quadratic that is reverse mode through the last update."""
    case, start = ridge(), jnp.arange(4.0)
    hypergradients = [
        estimate_at(case.problem, estimator, start, jnp.asarray(case.penalty), tx=optax.sgd(0.3), num_steps=3)
        for estimator in (
            hypergrad.finite_difference(precondition="adjoint"),
            hypergrad.finite_difference(step_size=0.3),
            hypergrad.unrolled(num_steps=1),
        )
    ]
    before, after = (case.descend(np.arange(4.0), 0.3, n) for n in (2, 3))
    expected = case.hypergradient(before, 0.3 * case.outer_gradient(after))
    for estimate in hypergradients:
        np.testing.assert_allclose(estimate.hypergradient, expected, rtol=1e-10)


def scaled_features():
    """Logistic regression on features scaled by exp(o): d_o f is not quadratic in w, as it is for a penalty exp(o)."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 20, 3)), rng.integers(0, 2, (2, 20)) * 2.0 - 1

    def loss(side, w, o):
        return jnp.mean(jax.nn.softplus(-jnp.asarray(y[side]) * (jnp.asarray(x[side]) @ (jnp.exp(o) * w))))

    return Problem(lambda w, o, _: loss(0, w, o) + 0.1 * jnp.sum(w**2), lambda w, o, _: loss(1, w, o))


@pytest.mark.parametrize("tx", TRANSFORMS.values(), ids=TRANSFORMS)
def test_preconditioned_tends_to_the_last_update_unrolled(x64, tx):
    """With an error that is quadratic in the radius, in size as in direction, from a warm state of any optimiser."""
    problem = scaled_features()
    o = jnp.array([-1.0, -0.5, 0.2])
    warm = warm_state(problem, tx, o)
    exact = estimate_at(problem, hypergrad.unrolled(num_steps=1), warm, o, tx=tx, num_steps=2).hypergradient
    errors = []
    for radius in (0.4, 0.2, 0.1, 1e-4):
        estimator = hypergrad.finite_difference(radius=radius, precondition="adjoint")
        found = estimate_at(problem, estimator, warm, o, tx=tx, num_steps=2).hypergradient
        errors.append(np.linalg.norm(found - exact))
    np.testing.assert_allclose(np.divide(errors[:2], errors[1:3]), 4, rtol=0.1)
    first = estimate_at(problem, hypergrad.first_order(), warm, o, tx=tx, num_steps=2).hypergradient
    assert np.linalg.norm(first - exact) > 1e3 * errors[-1]  # there is something to differentiate


@pytest.mark.parametrize("precondition", ["none", "adjoint"])
def test_without_an_outer_gradient_the_direct_term_remains(precondition):
    problem = Problem(lambda w, o, _: (w - o) ** 2, lambda w, o, _: o**2 + 0 * w)
    estimator = hypergrad.finite_difference(precondition=precondition)
    estimate = estimate_at(problem, estimator, jnp.float32(1), jnp.float32(3), tx=optax.sgd(0.1))
    assert float(estimate.hypergradient) == 6


def test_the_last_inner_batch_is_differentiated():
    problem = Problem(lambda w, o, h: 0.5 * h * (w - o) ** 2, lambda w, o, _: 3 * w)
    estimate = estimate_at(
        problem,
        hypergrad.finite_difference(step_size=0.25),
        jnp.float32(1),
        jnp.float32(0),
        inner_batches=jnp.array([5.0, 2.0]),
        outer_batch=NO_BATCH,
    )
    assert float(estimate.hypergradient) == pytest.approx(2 * 0.25 * 3, rel=1e-5)
