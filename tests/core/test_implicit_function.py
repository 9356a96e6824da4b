"""A solution as a function of the outer variable: against closed forms, and composed with the rest of JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agwm_jax import AgwmError, hypergrad, implicit_function, linear_solve

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(10, 3)), RNG.normal(size=10)
EXACT = hypergrad.implicit(linear_solve.dense())


def ridge(w, penalty):
    return 0.5 * jnp.sum((jnp.asarray(X) @ w - Y) ** 2) + 0.5 * jnp.sum(penalty * w**2)


def closed_form(penalty):
    return jnp.linalg.solve(X.T @ X + jnp.diag(penalty), X.T @ Y)


def by_numpy(penalty):
    """A solver that JAX cannot look into."""
    spec = jax.ShapeDtypeStruct((3,), jnp.float64)
    return jax.pure_callback(lambda p: np.linalg.solve(X.T @ X + np.diag(p), X.T @ Y), spec, penalty)


def by_optax(penalty):
    """A loop with a stopping rule, which has no reverse mode."""
    tx = optax.sgd(0.04)

    def turn(state):
        w, opt_state, _ = state
        grads = jax.grad(ridge)(w, penalty)
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(w, updates), opt_state, jnp.linalg.norm(grads)

    start = jnp.zeros(3)
    return jax.lax.while_loop(lambda state: state[2] > 1e-12, turn, (start, tx.init(start), jnp.float64(1)))[0]


@pytest.mark.parametrize("solve", [by_numpy, by_optax])
def test_its_jacobian_is_that_of_the_closed_form(x64, solve):
    solution, penalty = implicit_function(solve, ridge, EXACT), jnp.array([0.5, 1.0, 2.0])
    np.testing.assert_allclose(solution(penalty), closed_form(penalty), rtol=1e-9)
    expected = jax.jacrev(closed_form)(penalty)
    np.testing.assert_allclose(jax.jit(jax.jacrev(solution))(penalty), expected, rtol=1e-8)


def test_two_solutions_in_one_loss(x64):
    solution = implicit_function(by_optax, ridge, EXACT)

    def outer(solution, o):
        return jnp.sum(jnp.sin(solution(jnp.exp(o)) * solution(2 * jnp.ones(3) + o**2)))

    at = jnp.array([0.1, -0.3, 0.4])
    expected = jax.grad(lambda o: outer(closed_form, o))(at)
    np.testing.assert_allclose(jax.grad(lambda o: outer(solution, o))(at), expected, rtol=1e-8)


def test_any_pytree(x64):
    solution = implicit_function(
        lambda o: {"w": by_optax(o["penalty"])}, lambda w, o: ridge(w["w"], o["penalty"]), EXACT
    )
    found = jax.grad(lambda o: jnp.sum(solution(o)["w"] ** 2))({"penalty": jnp.ones(3)})
    expected = jax.grad(lambda p: jnp.sum(closed_form(p) ** 2))(jnp.ones(3))
    np.testing.assert_allclose(found["penalty"], expected, rtol=1e-8)


def test_what_is_refused(x64):
    with pytest.raises(AgwmError, match="unrolled needs the steps of an inner optimiser"):
        jax.grad(lambda p: implicit_function(by_optax, ridge, hypergrad.unrolled())(p).sum())(jnp.ones(3))

    def through_the_data(data):
        solution = implicit_function(lambda p: data / (1 + p), lambda w, p: jnp.sum((w - data) ** 2 + p * w**2), EXACT)
        return solution(jnp.ones(3)).sum()

    with pytest.raises(Exception, match="closed-over value"):
        jax.grad(jax.jit(through_the_data))(jnp.ones(3))
