"""The order of one outer iteration, what it reports, and where it leads."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agwm_jax import (
    Composite,
    Problem,
    bilevel,
    gradient_step,
    hypergrad,
    init_alpha,
    inner_steps,
    linear_solve,
    project_alpha,
)
from tests.core.problems import (
    ALL,
    NO_BATCH,
    conjugate_gradient,
    darts_toy,
    dense,
    network,
    neumann,
)


@pytest.mark.parametrize(
    ("estimator", "end"),
    [
        (hypergrad.first_order(), 2.0),
        (hypergrad.unrolled(), 1.0),
        (hypergrad.unrolled(num_steps=2, hvp="jvp"), 1.0),
        (neumann(1, 0.5), 1.0),
        (dense(), 1.0),
        (conjugate_gradient(1), 1.0),
        (hypergrad.implicit(linear_solve.gradient_descent(step_size=0.1)), 1.0),  # one product an outer step
        (hypergrad.finite_difference(precondition="adjoint"), 1.0),
        # The copy is at y = a - a/2l, so that the estimate vanishes where a = 2 / (2 - 1/2l).
        (hypergrad.penalty(weight=10.0), 2 / 1.95),
    ],
    ids=[
        *("first_order", "unrolled", "unrolled_jvp", "neumann", "dense", "conjugate_gradient"),
        *("gradient_descent", "finite_difference", "penalty"),
    ],
)
def test_where_descent_on_the_toy_ends(estimator, end):
    # Two steps of 0.5 solve the inner problem exactly, so that the unrolled gradient is the total derivative too.
    solver = bilevel(darts_toy(), estimator, inner_tx=optax.sgd(0.5), outer_tx=optax.sgd(0.1))
    state = solver.init(jnp.float32(-2), jnp.float32(0.5))
    run = jax.jit(lambda s: jax.lax.scan(lambda s, _: solver.step(s, jnp.zeros(2), NO_BATCH), s, length=120))
    state, info = run(state)
    assert float(state.outer) == pytest.approx(end, abs=1e-5)
    assert float(state.inner.params) == pytest.approx(end, abs=1e-5)
    assert float(info["hypergradient_norm"][-1]) == pytest.approx(0, abs=1e-4)


def recorder():
    """f = 0.5 sum (w - o b)^2: the inner result tells which outer variable and which batches it has seen."""
    inner = Composite(lambda w, o, b: w - o * b, lambda z, b: 0.5 * jnp.sum(z**2))
    return Problem(inner, lambda w, o, b: o * b + 0 * jnp.sum(w))


@pytest.mark.parametrize("rollback", [True, False])
@pytest.mark.parametrize("name", ALL)
def test_order_of_one_step(name, rollback):
    estimator = ALL[name]
    solver = bilevel(recorder(), estimator, inner_tx=optax.adam(0.1), outer_tx=optax.sgd(1.0), rollback=rollback)
    state = solver.init(jnp.ones(5), jnp.float32(3))
    batches, outer_batch = jnp.array([1.0, -2.0]), jnp.float32(0.5)
    after, info = jax.jit(solver.step)(state, batches, outer_batch)

    # g does not depend on w: every estimator gives d_o g = 0.5, and the new outer variable is 2.5.
    assert float(after.outer) == pytest.approx(2.5)
    update = partial(gradient_step, recorder().inner_loss, optax.adam(0.1))
    expected, losses = state.inner, []
    for batch in batches:
        expected, _ = update(expected, after.outer if rollback else state.outer, batch)
    look_ahead = state.inner
    for batch in batches:
        look_ahead, loss = update(look_ahead, state.outer, batch)
        losses.append(float(loss))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), after.inner, expected)
    assert int(after.inner.opt_state[0].count) == 2  # k, not 2k: the look-ahead is thrown away
    assert float(info["inner_loss"]) == pytest.approx(np.mean(losses))
    assert float(info["outer_loss"]) == pytest.approx(1.5)
    assert float(info["hypergradient_norm"]) == pytest.approx(0.5)
    assert ("residual" in info) == name.startswith(("implicit", "neumann", "conjugate_gradient"))
    if name == "penalty":
        # g does not pull at its copy of the inner variable, which so goes the same way, back and forth too.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), after.estimator.copy, expected)
        assert int(after.estimator.num_steps) == 1


def test_outer_optimiser_and_projection():
    seen = []
    solver = bilevel(
        recorder(),
        hypergrad.first_order(),
        inner_tx=optax.sgd(0.1),
        outer_tx=optax.sgd(1.0, momentum=0.5),
        project=lambda o: jnp.clip(o, 0, 1),
    )
    state = solver.init(jnp.float32(0), jnp.float32(3))
    assert float(state.outer) == 1  # projected at the start
    step = jax.jit(solver.step)
    for outer_batch in (0.5, -2.0, 0.125):
        state, info = step(state, jnp.ones(1), jnp.float32(outer_batch))
        seen.append((float(state.outer), float(info["hypergradient_norm"])))
    # Momenta 0.5, -1.75, -0.75: 1 - 0.5, then clipped to 1, twice.
    assert seen == [(0.5, 0.5), (1.0, 2.0), (1.0, 0.125)]


def test_norm_is_over_the_whole_tree():
    problem = Problem(lambda w, o, _: w**2, lambda w, o, _: 3 * o["a"] + 4 * o["b"][0] + 0 * w)
    solver = bilevel(problem, hypergrad.first_order(), inner_tx=optax.sgd(0.1), outer_tx=optax.sgd(0.1))
    state = solver.init(jnp.float32(0), {"a": jnp.float32(0), "b": [jnp.float32(0)]})
    assert float(solver.step(state, jnp.zeros(1), NO_BATCH)[1]["hypergradient_norm"]) == pytest.approx(5)


@pytest.mark.parametrize(
    ("name", "rollback"), [("first_order", False), ("unrolled", True), ("unrolled jvp", False), ("neumann", True)]
)
def test_alpha_held_at_one_is_plain_training_bit_for_bit(full_optimization, name, rollback):
    net, k = network(), 2
    inner_tx = optax.sgd(0.25, momentum=0.5)  # powers of two round nothing, however a compiler contracts the update
    solver = bilevel(
        net.problem(net.params, anchor=0.0),
        ALL[name],
        inner_tx=inner_tx,
        outer_tx=optax.set_to_zero(),
        project=project_alpha,
        rollback=rollback,
    )

    def plain(params, _, batch):
        return net.loss(params, batch)

    train = jax.jit(lambda inner, batches: inner_steps(plain, inner_tx, inner, None, batches))
    state = solver.init(net.partition.task, init_alpha(jax.random.key(0), net.partition, noise=0.0))
    expected, step = state.inner, jax.jit(solver.step)
    for index in range(5):
        batches = net.batches(index, k)
        state, info = step(state, batches, net.batches(100 + index))
        expected, losses = train(expected, batches)
        assert float(info["inner_loss"]) == float(np.mean(np.asarray(losses)))
        jax.tree.map(np.testing.assert_array_equal, state.inner, expected)
    assert float(info["hypergradient_norm"]) > 0  # the step did estimate one


def test_donating_the_state_deletes_nothing_of_the_user():
    net = network()
    alpha = init_alpha(jax.random.key(0), net.partition)
    solver = bilevel(
        net.problem(net.params),
        neumann(2, 0.1),
        inner_tx=optax.adamw(0.05),
        outer_tx=optax.adamw(0.05),
        project=project_alpha,
    )
    first = state = solver.init(net.params, alpha)  # the very arrays that are W0
    step = jax.jit(solver.step, donate_argnums=0)
    for index in range(3):
        state, _ = step(state, net.batches(index, 1), net.batches(9))
    assert all(w.is_deleted() for w in jax.tree.leaves((first.inner.params, first.outer)))  # else this shows nothing
    assert not any(w.is_deleted() for w in jax.tree.leaves((net.params, alpha)))
    np.testing.assert_array_equal(net.params["first.kernel"], network().params["first.kernel"])
    assert not jnp.array_equal(state.inner.params["first.kernel"], net.params["first.kernel"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_an_outer_variable_in_few_bits_moves(dtype):
    """50 steps of Adam along a constant gradient are 50 learning rates, to rounding; 0.75 + 0.001 is no bfloat16."""
    problem = Problem(lambda w, o, _: jnp.sum((w - o.astype(dtype)) ** 2), lambda w, o, _: o + 0 * w.astype("float32"))
    solver = bilevel(problem, hypergrad.first_order(), inner_tx=optax.sgd(0.1), outer_tx=optax.adam(1e-3))
    state = solver.init(jnp.zeros((), dtype), jnp.asarray(0.75, dtype))
    state, _ = jax.jit(lambda s: jax.lax.scan(lambda s, _: solver.step(s, jnp.zeros(1), NO_BATCH), s, length=50))(state)
    assert (state.outer.dtype, state.inner.params.dtype) == ("float32", dtype)
    assert float(state.outer) == pytest.approx(0.7, abs=1e-5)
