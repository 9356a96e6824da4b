"""Forward mode is reverse mode: exact tangents, random ones on average; memory that does not grow with the steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agwm_jax import AgwmError, Problem, bilevel, hypergrad, hypergradient
from tests.core.problems import TRANSFORMS, logistic

STEPS = 7
DIRECTIONS = 4


@pytest.fixture(scope="module")
def case():
    return logistic()


def estimated(case, estimator, tx, *, num_steps=STEPS):
    outer, batches = jnp.asarray(case.log_penalty), jnp.zeros(num_steps)
    return hypergradient(case.problem, estimator, jnp.zeros(3), outer, batches, jnp.zeros(()), inner_tx=tx)


@pytest.mark.parametrize("name", [*TRANSFORMS, "sgd"])
def test_it_is_reverse_mode_to_rounding(x64, case, name):
    tx = TRANSFORMS.get(name, optax.sgd(0.3))
    found, exact = (estimated(case, each, tx) for each in (hypergrad.forward_mode(), hypergrad.unrolled()))
    assert np.linalg.norm(exact.hypergradient) > 1e-3
    np.testing.assert_allclose(found.hypergradient, exact.hypergradient, rtol=1e-10)
    np.testing.assert_allclose(found.inner.params, exact.inner.params, rtol=1e-12)
    assert found.info.keys() == exact.info.keys()


def test_where_the_joint_hessian_is_not_symmetric(x64):
    """A stop_gradient in the inner loss, which misleads products that take the Hessian for symmetric."""

    def inner_loss(w, o, _):
        return jnp.sum(jax.lax.stop_gradient(w[1] * o) * w[0] + (w - o) ** 2)

    problem = Problem(inner_loss, lambda w, o, _: jnp.sum(w**2) * o[0])
    start, outer, tx = jnp.array([0.4, -0.3]), jnp.array([0.7, 0.2]), optax.sgd(0.1)

    def through(outer):
        w = start
        for _ in range(STEPS):
            w = w - 0.1 * jax.grad(inner_loss)(w, outer, None)
        return problem.outer_loss(w, outer, None)

    found = hypergradient(
        problem, hypergrad.forward_mode(), start, outer, jnp.zeros(STEPS), jnp.zeros(()), inner_tx=tx
    ).hypergradient
    np.testing.assert_allclose(found, jax.grad(through)(outer), rtol=1e-12)


def test_a_coordinate_that_no_loss_reads_makes_no_nan(x64):
    """Adam's root of a second moment that is 0 has no derivative."""
    problem = Problem(lambda w, o, _: jnp.sum(o * (w["seen"] - 1) ** 2), lambda w, o, _: jnp.sum(w["seen"] ** 2))
    start, outer = {"seen": jnp.zeros(2), "unseen": jnp.ones(2)}, jnp.array([0.3, 0.9])
    found, exact = (
        hypergradient(problem, each, start, outer, jnp.zeros(3), jnp.zeros(()), inner_tx=optax.adam(0.1)).hypergradient
        for each in (hypergrad.forward_mode(), hypergrad.unrolled())
    )
    assert np.isfinite(exact).all()
    np.testing.assert_allclose(found, exact, rtol=1e-10, atol=1e-14)


def test_random_directions_are_right_on_average_and_drawn_anew(x64, case):
    estimator, tx = hypergrad.forward_mode(directions=DIRECTIONS), optax.sgd(0.3)
    exact = np.asarray(estimated(case, hypergrad.unrolled(), tx).hypergradient)
    outer, inner = jnp.asarray(case.log_penalty), jnp.zeros(3)
    solver = bilevel(case.problem, estimator, inner_tx=tx, outer_tx=optax.sgd(0.0))
    begun = solver.init(inner, outer)

    @jax.jit
    def many(state):
        def step(state, _):
            found = hypergradient(
                case.problem, estimator, inner, outer, jnp.zeros(STEPS), jnp.zeros(()), inner_tx=tx, state=state
            )
            return found.state, found.hypergradient

        return jax.lax.scan(step, state, None, length=4000)

    last, found = many(begun.estimator)
    assert int(last) == 4000
    assert len(np.unique(np.round(found, 12), axis=0)) > 4
    error = found.std(axis=0) / np.sqrt(len(found))
    assert (np.abs(found.mean(axis=0) - exact) < 5 * error).all()
    assert (error < 0.1 * np.abs(exact).max()).all()


def test_memory_does_not_grow_with_the_steps(case):
    def temporaries(estimator, num_steps):
        def run(outer, batches):
            return hypergradient(
                case.problem, estimator, jnp.zeros(3), outer, batches, jnp.zeros(()), inner_tx=optax.adam(0.1)
            ).hypergradient

        arguments = jnp.asarray(case.log_penalty, jnp.float32), jnp.zeros(num_steps)
        return jax.jit(run).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    short, long = (temporaries(hypergrad.forward_mode(), steps) for steps in (10, 1000))
    assert long - short < 8 * 1000  # the losses, and no state of a step
    assert temporaries(hypergrad.unrolled(), 1000) > 10 * long


def test_bad_options(case):
    with pytest.raises(AgwmError, match=r"forward_mode\(directions=0\): expected 1 or more"):
        hypergrad.forward_mode(directions=0)
    with pytest.raises(AgwmError, match=r"each of 3 outer numbers, and its limit is 2: say directions"):
        estimated(case, hypergrad.forward_mode(limit=2), optax.sgd(0.1))
