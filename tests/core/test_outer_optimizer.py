"""An inner optimiser that is a function of the outer variable: its learning rates, decay and momentum are learnt."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agwm_jax import AgwmError, Problem, bilevel, hypergrad, hypergradient, linear_solve
from agwm_jax.core.inner import InnerState, inner_steps

CURVATURE, START, STEPS = np.array([0.5, 1.0, 2.0]), np.array([1.0, -2.0, 0.5]), 6
BOWL = Problem(lambda w, o, _: 0.5 * jnp.sum(jnp.asarray(CURVATURE) * w**2), lambda w, o, _: 0.5 * jnp.sum(w**2))


def estimated(problem, tx, outer, hvp="linearize"):
    estimator = hypergrad.forward_mode() if hvp == "forward" else hypergrad.unrolled(hvp=hvp)
    batches = jnp.zeros(STEPS)
    start = jnp.asarray(START)
    return hypergradient(problem, estimator, start, outer, batches, jnp.zeros(()), inner_tx=tx).hypergradient


@pytest.mark.parametrize("hvp", ["linearize", "jvp", "reverse", "forward"])
def test_learning_rates_of_descent_in_a_bowl(x64, hvp):
    """w_k = (1 - a h)^k w_0, so that the derivative of |w_k|^2 / 2 is -k h (1 - a h)^(2k - 1) w_0^2, a weight."""
    rates = jnp.array([0.3, 0.2, 0.1])
    exact = -STEPS * CURVATURE * (1 - np.asarray(rates) * CURVATURE) ** (2 * STEPS - 1) * START**2

    def rate_a_weight(rates):
        return optax.stateless(lambda grads, _: jax.tree.map(lambda g, a: -a * g, grads, rates))

    np.testing.assert_allclose(estimated(BOWL, rate_a_weight, rates, hvp), exact, rtol=1e-12)
    one = jnp.float64(0.2)
    exact = np.sum(-STEPS * CURVATURE * (1 - 0.2 * CURVATURE) ** (2 * STEPS - 1) * START**2)
    np.testing.assert_allclose(estimated(BOWL, optax.sgd, one, hvp), exact, rtol=1e-12)


def test_decay_and_momenta_of_adam_are_those_of_reverse_mode(x64):
    """Beside an outer variable that a loss reads."""
    outer = {name: jnp.float64(x) for name, x in {"rate": 0.05, "decay": 0.1, "b1": 0.8, "pull": 0.3}.items()}

    def tx(o):
        return optax.adamw(o["rate"], b1=o["b1"], weight_decay=o["decay"])

    def pulled(w, o, batch):
        return jnp.sum(jnp.tanh(w) ** 2) + o["pull"] * jnp.sum((w - 1) ** 2)

    problem = Problem(pulled, BOWL.outer_loss)

    def through(o):
        start = InnerState(jnp.asarray(START), tx(o).init(jnp.asarray(START)))
        return BOWL.outer_loss(inner_steps(pulled, tx(o), start, o, jnp.zeros(STEPS))[0].params, o, None)

    exact, found = jax.grad(through)(outer), estimated(problem, tx, outer)
    for name, value in exact.items():
        assert abs(value) > 1e-4
        np.testing.assert_allclose(found[name], value, rtol=1e-8, err_msg=name)


def test_a_learning_rate_is_learnt(x64):
    """In the bowl of curvature 2 the best rate is 1/2; the weights start anew in every outer step."""
    steep = Problem(lambda w, o, _: jnp.sum(w**2), BOWL.outer_loss)
    rate, tx = jnp.float64(0.1), optax.adam(0.05)
    state = tx.init(rate)

    @jax.jit
    def outer_step(rate, state):
        gradient = estimated(steep, optax.sgd, rate)
        updates, state = tx.update(gradient, state, rate)
        return optax.apply_updates(rate, updates), state

    for _ in range(100):
        rate, state = outer_step(rate, state)
    assert abs(rate - 0.5) < 0.03


def test_a_solver_takes_its_steps_at_the_new_rate(x64):
    solver = bilevel(BOWL, hypergrad.unrolled(), inner_tx=optax.sgd, outer_tx=optax.sgd(0.01), rollback=True)
    state = solver.init(jnp.asarray(START), jnp.float64(0.2))
    after, info = jax.jit(solver.step)(state, jnp.zeros(1), jnp.zeros(()))
    slope = np.sum(-CURVATURE * (1 - 0.2 * CURVATURE) * START**2)
    np.testing.assert_allclose(after.outer, 0.2 - 0.01 * slope, rtol=1e-12)
    np.testing.assert_allclose(after.inner.params, (1 - np.asarray(after.outer) * CURVATURE) * START, rtol=1e-12)
    np.testing.assert_allclose(info["hypergradient_norm"], abs(slope), rtol=1e-12)


@pytest.mark.parametrize(
    "estimator",
    [
        hypergrad.first_order(),
        hypergrad.finite_difference(precondition="adjoint"),
        hypergrad.penalty(weight=1.0),
        hypergrad.implicit(linear_solve.neumann(num_terms=2, step_size=0.1)),
    ],
    ids=["first_order", "finite_difference", "penalty", "implicit"],
)
def test_other_estimators_refuse(estimator):
    with pytest.raises(AgwmError, match=r"inner_tx is a function of the outer variable.*use hypergrad.unrolled\(\)"):
        hypergradient(BOWL, estimator, jnp.ones(3), jnp.float32(0.1), jnp.zeros(1), jnp.zeros(()), inner_tx=optax.sgd)


def test_an_optimiser_that_was_not_called_is_none_of_the_outer_variable():
    with pytest.raises(AgwmError, match=re.escape("inner_tx is the function adam, which makes no optimiser of the")):
        estimated(BOWL, optax.adam, {"rate": jnp.float32(0.1)})


def test_a_leaf_that_neither_loss_nor_optimiser_reads():
    outer = {"rate": jnp.float32(0.1), "idle": jnp.float32(0.0)}
    with pytest.raises(AgwmError, match=re.escape("nothing depends on outer['idle']")):
        estimated(BOWL, lambda o: optax.sgd(o["rate"]), outer)
