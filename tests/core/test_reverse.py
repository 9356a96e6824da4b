"""Reverse mode with few states: the same answer, and what it costs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agwm_jax import AgwmError, Problem, bilevel, hypergrad, hypergradient
from agwm_jax.core import reverse
from tests.core.problems import conjugate_gradient


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 8, 10, 31, 100, 1000, 4097])
def test_strides_keep_to_the_budget_and_need_few_states(steps):
    least = next(n for n in itertools.count(1) if _fits(steps, n))
    assert least <= max(1, 2 * int(np.ceil(np.log2(steps))))
    for states in {least, max(least, 20), max(least, 2 * int(np.ceil(steps**0.5))), steps + 3}:
        found = reverse.strides(steps, states)
        lengths = [steps, *found]
        assert found[-1] == 1
        assert sum(-(-outer // inner) for outer, inner in itertools.pairwise(lengths)) <= states
    assert reverse.strides(steps, steps) == [1]


def _fits(steps, states):
    try:
        return bool(reverse.strides(steps, states))
    except AgwmError:
        return False


def test_too_few_states_are_refused_with_the_least():
    with pytest.raises(AgwmError, match=r"unrolled\(states=5\): 100 steps need 14 states or more"):
        reverse.strides(100, 5)
    with pytest.raises(AgwmError, match=r"unrolled\(states=0\): expected 1 state or more"):
        hypergrad.unrolled(states=0)


@pytest.mark.parametrize(("steps", "states"), [(1, 1), (7, 6), (7, 7), (10, 8), (64, 12), (64, 16), (50, 15)])
def test_every_state_is_met_once_and_in_order(steps, states):
    """A walk whose state is the number of the step, so that each adjoint shows which state it was given."""
    count = jnp.zeros((), jnp.int32)

    def forward(state, i):
        return (state[0] + 1, state[1])

    def backward(adjoint, state, i):
        met, right = adjoint
        return met + 1, right & (state[0] == i) & (i == steps - 1 - met)

    def walk():
        last, kept = reverse.run(forward, (count, jnp.ones(3)), steps, states)
        return last[0], reverse.back(forward, backward, kept, (count, jnp.bool_(True)), steps, states)

    last, (met, right) = jax.jit(walk)()
    assert (int(last), int(met), bool(right)) == (steps, steps, True)


def case():
    x = jax.random.normal(jax.random.key(0), (30, 5))
    y = jnp.sign(x[:, 0] + x[:, 1])

    def inner_loss(w, o, batch):
        rows = x if batch is None else x[batch]
        labels = y if batch is None else y[batch]
        return jnp.mean(jax.nn.softplus(-labels * (rows @ w))) + jnp.sum(jnp.exp(o["penalty"]) * w**2)

    problem = Problem(inner_loss, lambda w, o, _: jnp.mean((x @ w - y) ** 2))
    return problem, jnp.full(5, 0.1), {"penalty": jnp.linspace(-4, -1, 5), "rate": jnp.asarray(-3.0)}


@pytest.mark.parametrize("options", [{}, {"num_steps": 20}, {"hvp": "jvp"}, {"hvp": "reverse"}])
def test_few_states_give_the_hypergradient_of_all(x64, options):
    problem, w, o = case()
    rows = jax.random.randint(jax.random.key(1), (33, 8), 0, 30)

    def optimizer(o):
        return optax.adamw(optax.linear_schedule(1.0, 0.0, 40)(jnp.int32(3)) * jnp.exp(o["rate"]), weight_decay=0.1)

    def of(**more):
        estimator = hypergrad.unrolled(**options, **more)
        return jax.jit(lambda w, o: hypergradient(problem, estimator, w, o, rows, inner_tx=optimizer))(w, o)

    expected = of()
    assert np.abs(expected.hypergradient["rate"]) > 1e-3
    for states in (12, 20, 40):
        found = of(states=states)
        for name in o:
            np.testing.assert_allclose(found.hypergradient[name], expected.hypergradient[name], rtol=1e-10)
        np.testing.assert_allclose(found.inner.params, expected.inner.params, rtol=1e-12)
        np.testing.assert_allclose(found.info["inner_loss"], expected.info["inner_loss"], rtol=1e-12)


def test_what_few_states_cost(x64):
    """Evaluations are counted as they happen; memory is the compiler's."""
    steps, count = 100, [0]
    problem, w, o = case()
    o = {"penalty": o["penalty"]}

    def told(w, o, batch):
        jax.debug.callback(lambda: count.__setitem__(0, count[0] + 1))
        return problem.inner_loss(w, o, batch)

    evaluations, size = {}, {}
    for states in (20, 14):
        for loss in (told, problem.inner_loss):
            estimator = hypergrad.unrolled(states=states)
            one = problem._replace(inner_loss=loss)

            def estimate(w, o, one=one, estimator=estimator):
                tx = optax.sgd(0.1)
                return hypergradient(one, estimator, w, o, num_steps=steps, inner_tx=tx).hypergradient

            if loss is told:
                count[0] = 0
                jax.block_until_ready(jax.jit(estimate)(w, o))
                jax.effects_barrier()
                evaluations[states] = count[0]
    # The look-ahead; with two levels each segment of 10 again but for its last step; one linearisation a step.
    assert evaluations[20] == steps + 10 * 9 + steps
    assert evaluations[20] < evaluations[14] <= 7 * steps

    def temporaries(states):
        w = jnp.zeros(2000)

        def estimate(w, o):
            loss = Problem(lambda w, o, _: jnp.sum(jnp.exp(o) * jnp.cos(w)), lambda w, o, _: jnp.sum(w**2))
            estimator = hypergrad.unrolled(states=states)
            return hypergradient(loss, estimator, w, o, num_steps=steps, inner_tx=optax.adam(0.1)).hypergradient

        return jax.jit(estimate).lower(w, w).compile().memory_analysis().temp_size_in_bytes

    size = {states: temporaries(states) for states in (None, 20)}
    assert size[20] < size[None] / 4


def test_full_batch_needs_no_batches(x64):
    problem, w, o = case()
    o = {"penalty": o["penalty"]}
    for estimator in (hypergrad.unrolled(), conjugate_gradient(3)):
        given = Problem(lambda w, o, _: problem.inner_loss(w, o, None), problem.outer_loss)
        tx = optax.sgd(0.1)
        expected = hypergradient(given, estimator, w, o, jnp.zeros(4), jnp.zeros(()), inner_tx=tx)
        found = hypergradient(problem, estimator, w, o, num_steps=4, inner_tx=tx)
        np.testing.assert_array_equal(found.hypergradient["penalty"], expected.hypergradient["penalty"])
        solver = bilevel(problem, estimator, inner_tx=tx, outer_tx=optax.sgd(0.1), num_steps=4)
        state, info = jax.jit(solver.step)(solver.init(w, o))
        np.testing.assert_allclose(info["hypergradient_norm"], expected.info["hypergradient_norm"], rtol=1e-12)
        np.testing.assert_allclose(state.inner.params, expected.inner.params, rtol=1e-12)


def test_full_batch_of_several_inner_problems(x64):
    problem, w, o = case()
    o = {"penalty": o["penalty"]}
    tx = optax.sgd(0.1)
    solver = bilevel(problem, hypergrad.unrolled(), inner_tx=tx, outer_tx=optax.sgd(0.1), num_steps=3, num_inner=2)
    _, info = jax.jit(solver.step)(solver.init(jnp.stack([w, 2 * w]), o))
    found = [hypergradient(problem, hypergrad.unrolled(), s * w, o, num_steps=3, inner_tx=tx) for s in (1, 2)]
    mean = np.mean([f.hypergradient["penalty"] for f in found], axis=0)
    np.testing.assert_allclose(info["hypergradient_norm"], np.linalg.norm(mean), rtol=1e-12)


def test_batches_and_a_number_of_steps_are_too_much():
    problem, w, o = case()
    with pytest.raises(AgwmError, match=r"num_steps=2 is for losses that close over their data, and inner_batches"):
        hypergradient(problem, hypergrad.unrolled(), w, o, jnp.zeros((2, 3)), num_steps=2, inner_tx=optax.sgd(0.1))
    with pytest.raises(AgwmError, match=r"inner_batches is None: expected batches, .* or, .* num_steps=k"):
        hypergradient(problem, hypergrad.unrolled(), w, o, inner_tx=optax.sgd(0.1))
    solver = bilevel(problem, hypergrad.unrolled(), inner_tx=optax.sgd(0.1), outer_tx=optax.sgd(0.1))
    with pytest.raises(AgwmError, match=r"inner_batches is None: expected batches"):
        solver.step(solver.init(w, o))
    with pytest.raises(AgwmError, match=r"num_steps=2: a solution from elsewhere takes no steps"):
        hypergradient(problem, conjugate_gradient(3), w, o, num_steps=2)
    with pytest.raises(AgwmError, match=r"num_steps=0: expected 1 inner step or more"):
        hypergradient(problem, hypergrad.unrolled(), w, o, num_steps=0, inner_tx=optax.sgd(0.1))


def test_restart_solves_anew_at_every_step(x64):
    problem, w, o = case()
    o = {"penalty": o["penalty"]}
    options = {"inner_tx": optax.adam(0.1), "outer_tx": optax.sgd(1.0), "num_steps": 5}
    cold = bilevel(problem, hypergrad.unrolled(), restart=True, **options)
    state = cold.init(w, o)
    step = jax.jit(cold.step)
    for _ in range(3):
        expected = hypergradient(
            problem, hypergrad.unrolled(), w, state.outer, num_steps=5, inner_tx=options["inner_tx"]
        )
        before = state.outer["penalty"]
        state, _ = step(state)
        np.testing.assert_allclose(state.inner.params, expected.inner.params, rtol=1e-10)
        np.testing.assert_allclose(before - state.outer["penalty"], expected.hypergradient["penalty"], rtol=1e-8)
    warm = bilevel(problem, hypergrad.unrolled(), **options)
    other = jax.jit(warm.step)(warm.step(warm.init(w, o))[0])[0]
    assert np.abs(other.inner.params - state.inner.params).max() > 1e-2


def test_what_does_not_go_with_restart_and_full_batches():
    problem, _, _ = case()
    options = {"inner_tx": optax.sgd(0.1), "outer_tx": optax.sgd(0.1)}
    with pytest.raises(AgwmError, match="has no look-ahead to take back"):
        bilevel(problem, hypergrad.unrolled(), restart=True, rollback=True, **options)
    with pytest.raises(AgwmError, match="without batches there is nothing to renew"):
        bilevel(problem, hypergrad.unrolled(), num_steps=2, renew=lambda batch, number: batch, **options)
