"""What Betty does differently, as options of the core: each by its own formula."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agwm_jax import AgwmError, InnerState, Problem, bilevel, hypergrad
from agwm_jax.hypergrad import rms_scale
from tests.core.problems import NO_BATCH, estimate_at, ridge


def cubic():
    """f = o . w^3 / 3 and g = v . w: J x = w^2 x + e^2 x^3 / 3 entry by entry, at whatever w it is taken."""
    v = jnp.array([1.0, -2.0, 2.0])
    return Problem(lambda w, o, _: jnp.sum(o * w**3) / 3, lambda w, o, _: jnp.sum(v * w)), np.array(v)


START, OUTER = np.array([1.0, 0.5, 2.0]), np.array([0.3, -0.2, 0.4])


def stepped(rate=0.1):
    return START - rate * OUTER * START**2


def response(w, x, radius):
    return w**2 * x + (radius / np.linalg.norm(x)) ** 2 * x**3 / 3


@pytest.mark.parametrize("at", ["before", "after"])
def test_the_difference_is_taken_around_the_weights_that_at_names(x64, at):
    problem, v = cubic()
    estimator = hypergrad.finite_difference(radius=0.2, step_size=0.5, at=at)
    found = estimate_at(problem, estimator, jnp.asarray(START), jnp.asarray(OUTER), tx=optax.sgd(0.1))
    w = START if at == "before" else stepped()
    np.testing.assert_allclose(found.hypergradient, -response(w, 0.5 * v, 0.2), rtol=1e-10)
    np.testing.assert_allclose(found.inner.params, stepped(), rtol=1e-14)


def test_at_after_on_ridge_after_several_steps(x64):
    case, start = ridge(), np.arange(4.0)
    found = estimate_at(
        case.problem,
        hypergrad.finite_difference(at="after"),
        jnp.asarray(start),
        jnp.asarray(case.penalty),
        tx=optax.sgd(0.3),
        num_steps=3,
    )
    after = case.descend(start, 0.3, 3)
    np.testing.assert_allclose(found.hypergradient, case.hypergradient(after, case.outer_gradient(after)), rtol=1e-10)


def test_weights_that_are_not_restored_are_left_at_the_lower_end(x64):
    problem, v = cubic()
    estimator = hypergrad.finite_difference(radius=0.2, at="after", restore=False)
    found = estimate_at(problem, estimator, jnp.asarray(START), jnp.asarray(OUTER), tx=optax.sgd(0.1))
    np.testing.assert_allclose(found.inner.params, stepped() - 0.2 * v / np.linalg.norm(v), rtol=1e-12)
    np.testing.assert_allclose(found.hypergradient, -response(stepped(), v, 0.2), rtol=1e-10)


def test_rms_is_one_number_a_tensor_of_a_layer(x64):
    """Two steps of Adam by hand, on a stacked weight [2, 3] and one that is not."""
    v = {"stacked": np.array([[1.0, -2.0, 0.5], [0.3, 0.1, -1.0]]), "single": np.array([2.0, -0.7])}
    scale = {"stacked": np.array([[1.0, 3.0, 5.0], [0.2, 0.1, 0.4]]), "single": np.array([1.0, 2.0])}  # gradients of f
    problem = Problem(
        lambda w, o, _: sum(jnp.sum(jnp.asarray(scale[k]) * w[k]) + o * jnp.sum(w[k] ** 2) / 2 for k in w),
        lambda w, o, _: sum(jnp.sum(jnp.asarray(v[k]) * w[k]) for k in w),
    )
    tx = optax.chain(optax.clip_by_global_norm(1e9), optax.adam(optax.linear_schedule(0.1, 0.0, 9), b2=0.9))
    start = jax.tree.map(jnp.zeros_like, {k: jnp.asarray(x) for k, x in v.items()})
    estimator = hypergrad.finite_difference(
        precondition="rms",
        step_size=0.5,
        scale=rms_scale(b2=0.9, eps=0.25, stacked=lambda path: path[-1].key == "stacked"),
        at="after",
    )
    found = estimate_at(problem, estimator, start, jnp.zeros(()), tx=tx, num_steps=2)
    expected = 0.0
    for k in v:
        nu = (1 - 0.9**2) * scale[k] ** 2  # f's gradient is the same at both steps, for o = 0
        mean = np.mean(0.9 * nu, axis=-1, keepdims=True)
        x = 0.5 * v[k] * np.sqrt(1 - 0.9**2) / (np.sqrt(mean) + 0.25)
        expected -= np.sum(np.asarray(found.inner.params[k]) * x)
    np.testing.assert_allclose(found.hypergradient, expected, rtol=1e-9)


def test_rms_reads_one_adam():
    problem, _ = cubic()
    estimator = hypergrad.finite_difference(precondition="rms")
    with pytest.raises(AgwmError, match=r"holds those of 0 Adams"):
        estimate_at(problem, estimator, jnp.asarray(START), jnp.asarray(OUTER), tx=optax.sgd(0.1))
    with pytest.raises(AgwmError, match=r"precondition='rms'\) needs the steps of an inner optimiser"):
        estimate_at(problem, estimator, jnp.asarray(START), jnp.asarray(OUTER))


def noisy():
    """The batch is its own randomness: f = batch . (o w)."""
    return Problem(lambda w, o, batch: jnp.sum(batch * o * w), lambda w, o, batch: jnp.sum(batch * w))


def test_each_pass_gets_a_batch_of_its_own_where_it_is_renewed(x64):
    """Ends 1 and 2, the updates taken anew 3; the look-ahead and the outer loss the given ones."""

    def renew(batch, number):
        return batch + 10.0**number

    w, o, batches = jnp.array([1.0, 2.0]), jnp.array([0.5, 3.0]), jnp.array([[1.0, 4.0], [2.0, -1.0]])
    v = np.array([0.6, 0.8])
    solver = bilevel(
        noisy(),
        hypergrad.finite_difference(radius=0.5, at="after", renew=renew),
        inner_tx=optax.sgd(0.1),
        outer_tx=optax.sgd(1.0),
        rollback=True,
        renew=renew,
    )
    state, _ = jax.jit(solver.step)(solver.init(w, o), batches, jnp.asarray(v))
    after = np.array(w) - 0.1 * np.array(batches).sum(0) * np.array(o)
    e, last = 0.5, np.array(batches[-1])
    difference = (last + 10) * (after + e * v) - (last + 100) * (after - e * v)
    outer = np.array(o) + difference / (2 * e)
    np.testing.assert_allclose(state.outer, outer, rtol=1e-10)
    np.testing.assert_allclose(state.inner.params, w - 0.1 * (np.array(batches).sum(0) + 2000) * outer, rtol=1e-10)


def test_steps_taken_anew_from_the_look_ahead(x64):
    """W and the moments go on, schedules do not count them, and the first iteration starts its optimiser anew."""
    tx = optax.adam(optax.linear_schedule(0.1, 0.0, 6))
    problem = Problem(lambda w, o, h: jnp.sum((w - o * h) ** 2), lambda w, o, h: jnp.sum((w - h) ** 2) + jnp.sum(o))
    solver = bilevel(
        problem, hypergrad.first_order(), inner_tx=tx, outer_tx=optax.sgd(0.01), rollback="from_look_ahead"
    )
    w, o = jnp.array([1.0, -2.0]), jnp.array([0.5, 0.3])
    state, step = solver.init(w, o), jax.jit(solver.step)
    plain, moments = np.array(w), (0, np.zeros(2), np.zeros(2))

    def adam(w, moments, gradient, rate):
        t, m, v = moments[0] + 1, 0.9 * moments[1] + 0.1 * gradient, 0.999 * moments[2] + 0.001 * gradient**2
        return w - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8), (t, m, v)

    outer = np.array(o)
    for iteration in range(3):
        h, rate = 1.0 + iteration, 0.1 * (1 - iteration / 6)
        state, _ = step(state, jnp.array([h]), jnp.asarray(h))
        before = moments
        plain, moments = adam(plain, moments, 2 * (plain - outer * h), rate)
        outer = outer - 0.01  # of the direct term
        plain, moments = adam(plain, before if iteration == 0 else moments, 2 * (plain - outer * h), rate)
        np.testing.assert_allclose(state.inner.params, plain, rtol=1e-6)  # optax's rate is a float32
    assert int(state.inner.opt_state[0].count) == 5
    assert int(state.inner.opt_state[1].count) == 3


def test_an_optimiser_without_a_count_goes_on_from_the_look_ahead():
    problem = Problem(lambda w, o, _: w * o, lambda w, o, _: w + 0 * o)
    solver = bilevel(
        problem, hypergrad.first_order(), inner_tx=optax.sgd(0.1), outer_tx=optax.sgd(0.0), rollback="from_look_ahead"
    )
    state, _ = solver.step(solver.init(jnp.float32(1), jnp.float32(2)), jnp.zeros(1), NO_BATCH)
    assert float(state.inner.params) == pytest.approx(1 - 2 * 0.2)


def test_the_penalty_s_copy_goes_on_too():
    """Both copies take their k steps on top of the look-ahead's."""
    problem = Problem(lambda w, o, _: w * o, lambda w, o, _: w * 3 + 0 * o)
    options = {"inner_tx": optax.sgd(0.1), "outer_tx": optax.sgd(0.0)}
    solver = bilevel(problem, hypergrad.penalty(weight=1.0), rollback="from_look_ahead", **options)
    once = bilevel(problem, hypergrad.penalty(weight=1.0), **options)
    state = solver.init(jnp.float32(1), jnp.float32(2))
    twice, _ = solver.step(state, jnp.zeros(1), NO_BATCH)
    expected = once.step(once.step(state, jnp.zeros(1), NO_BATCH)[0], jnp.zeros(1), NO_BATCH)[0]
    for found, want in zip(jax.tree.leaves(twice.estimator), jax.tree.leaves(expected.estimator), strict=True):
        if jnp.issubdtype(jnp.result_type(found), jnp.floating):
            np.testing.assert_allclose(found, want, rtol=1e-6)


def test_what_cannot_be_is_refused(without_type_checks):
    for message, make in {
        r"precondition=True\): expected one of 'none', 'adjoint', 'rms'": lambda: hypergrad.finite_difference(
            precondition=True
        ),
        r"at='middle'\): expected one of 'before', 'after'": lambda: hypergrad.finite_difference(at="middle"),
        r"restore=False, at='before'": lambda: hypergrad.finite_difference(restore=False),
        r"rollback='look'\): expected True, False or 'from_look_ahead'": lambda: bilevel(
            noisy(), hypergrad.first_order(), inner_tx=optax.sgd(0.1), outer_tx=optax.sgd(0.1), rollback="look"
        ),
    }.items():
        with pytest.raises(AgwmError, match=message):
            make()


def test_the_state_is_of_one_structure_under_every_option():
    problem, _ = cubic()
    solver = bilevel(
        problem,
        hypergrad.finite_difference(precondition="rms", at="after", restore=False),
        inner_tx=optax.adamw(optax.cosine_decay_schedule(0.1, 9)),
        outer_tx=optax.sgd(0.1),
        rollback="from_look_ahead",
    )
    state = solver.init(jnp.asarray(START, jnp.float32), jnp.asarray(OUTER, jnp.float32))
    after, _ = jax.jit(solver.step, donate_argnums=0)(jax.tree.map(jnp.copy, state), jnp.zeros(1), NO_BATCH)
    assert isinstance(after.inner, InnerState)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
