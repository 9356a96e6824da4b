"""Several inner problems that share the outer variable, against a loop over them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agwm_jax import (
    AgwmError,
    InnerState,
    bilevel,
    hypergrad,
    hypergradient,
    init_alpha,
    inner_steps,
    mixup_problem,
    partition,
    project_alpha,
)
from agwm_jax.core.inner import optimizer_steps
from tests.core.problems import dense, neumann

K, STEPS, INNER = 3, 3, 2
ESTIMATORS = {
    "first_order": hypergrad.first_order(),
    "unrolled": hypergrad.unrolled(),
    "implicit dense": dense(),
    "neumann": neumann(3, 0.1),
    "finite_difference": hypergrad.finite_difference(),
    "penalty": hypergrad.penalty(),  # carries an inner variable of its own
}
INNER_TX, OUTER_TX = optax.adam(0.05), optax.sgd(0.3, momentum=0.9)


def stacked(trees):
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


class Net:
    """A regression through one hidden layer, in whatever precision JAX is in."""

    def __init__(self):
        rng = np.random.default_rng(0)
        weights = {"first.kernel": rng.normal(size=(4, 6)) / 2, "second.kernel": rng.normal(size=(6, 3)) / 2}
        self.partition = partition(jax.tree.map(jnp.asarray, weights), mixed=r".*kernel")

    @property
    def problem(self):
        def loss(params, batch):
            return jnp.mean((jnp.tanh(batch["x"] @ params["first.kernel"]) @ params["second.kernel"] - batch["y"]) ** 2)

        return mixup_problem(loss, self.partition, anchor=0.1)

    def batches(self, seed, *lead):
        rng = np.random.default_rng(seed)
        return {"x": jnp.asarray(rng.normal(size=(*lead, 8, 4))), "y": jnp.asarray(rng.normal(size=(*lead, 8, 3)))}


def starts(net):
    """An inner start of its own for each, and a gate inside [0, 1]."""
    inner = [jax.tree.map(lambda x, i=i: x * (1 + 0.1 * i), net.partition.task) for i in range(K)]
    return inner, init_alpha(jax.random.key(0), net.partition, start=0.8, noise=0.05)


def batches_of(net, step):
    inner = [net.batches(10 * step + index, INNER) for index in range(K)]
    return inner, [net.batches(1000 + 10 * step + index) for index in range(K)]


@pytest.mark.parametrize("rollback", [False, True])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_step_is_a_loop_of_hypergradients_their_mean_and_one_update(x64, name, rollback):
    net, estimator = Net(), ESTIMATORS[name]
    problem, (inner, alpha) = net.problem, starts(net)
    solver = bilevel(
        problem,
        estimator,
        inner_tx=INNER_TX,
        outer_tx=OUTER_TX,
        project=project_alpha,
        rollback=rollback,
        num_inner=K,
    )
    state, step = solver.init(stacked(inner), alpha), jax.jit(solver.step)

    solve, outer_state = optimizer_steps(INNER_TX), OUTER_TX.init(alpha)
    each = [InnerState(w, INNER_TX.init(w)) for w in inner]
    own = [estimator.init(w, alpha) for w in each]
    estimate = jax.jit(
        lambda w, alpha, ib, ob, state: hypergradient(
            problem, estimator, w, alpha, ib, ob, inner_tx=INNER_TX, state=state
        )
    )
    for index in range(STEPS):
        inner_batches, outer_batches = batches_of(net, index)
        state, info = step(state, stacked(inner_batches), stacked(outer_batches))
        found = [
            estimate(w, alpha, ib, ob, before)
            for w, ib, ob, before in zip(each, inner_batches, outer_batches, own, strict=True)
        ]
        mean = jax.tree.map(lambda *x: sum(x) / K, *(one.hypergradient for one in found))
        assert float(info["hypergradient_norm"]) == pytest.approx(float(optax.tree.norm(mean)), rel=1e-10)
        for key in ("inner_loss", "outer_loss"):
            assert float(info[key]) == pytest.approx(float(np.mean([one.info[key] for one in found])), rel=1e-10)
        updates, outer_state = OUTER_TX.update(mean, outer_state, alpha)
        alpha = project_alpha(optax.apply_updates(alpha, updates))
        if rollback and estimator.retake is not None:
            own = [
                estimator.retake(problem, solve, before, alpha, ib, ob)
                for before, ib, ob in zip(own, inner_batches, outer_batches, strict=True)
            ]
        else:
            own = [one.state for one in found]
        if rollback:
            each = [
                inner_steps(problem.inner_loss, INNER_TX, w, alpha, ib)[0]
                for w, ib in zip(each, inner_batches, strict=True)
            ]
        else:
            each = [one.inner for one in found]
        expected = (stacked(each), alpha, stacked(own))
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-10),
            (state.inner, state.outer, state.estimator),
            expected,
        )


def test_identical_inner_problems_are_a_single_one(x64):
    net = Net()
    problem, (inner, alpha) = net.problem, starts(net)
    options = {"inner_tx": INNER_TX, "outer_tx": OUTER_TX, "project": project_alpha, "rollback": True}
    one = bilevel(problem, hypergrad.unrolled(), **options)
    several = bilevel(problem, hypergrad.unrolled(), **options, num_inner=K)
    single, state = one.init(inner[0], alpha), several.init(stacked(inner[:1] * K), alpha)
    for index in range(STEPS):
        inner_batch, outer_batch = net.batches(index, INNER), net.batches(100 + index)
        single, info = jax.jit(one.step)(single, inner_batch, outer_batch)
        state, of_all = jax.jit(several.step)(state, stacked([inner_batch] * K), stacked([outer_batch] * K))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10), of_all, info)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, np.stack([y] * K), rtol=1e-10, atol=1e-12), state.inner, single.inner
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10), state.outer, single.outer)


def test_the_state_may_be_donated_and_nothing_of_the_user_is():
    net = Net()
    problem, (inner, alpha) = net.problem, starts(net)
    solver = bilevel(problem, hypergrad.unrolled(), inner_tx=INNER_TX, outer_tx=OUTER_TX, num_inner=K)
    given = stacked(inner)
    state = solver.init(given, alpha)
    inner_batches, outer_batches = batches_of(net, 0)
    jax.jit(solver.step, donate_argnums=0)(state, stacked(inner_batches), stacked(outer_batches))
    assert not any(x.is_deleted() for x in jax.tree.leaves((given, alpha)))


def test_what_lacks_the_axis_is_refused(without_type_checks):
    net = Net()
    problem, (inner, alpha) = net.problem, starts(net)
    made = {"inner_tx": INNER_TX, "outer_tx": OUTER_TX}
    for wrong in (0, 1.5):
        with pytest.raises(AgwmError, match=rf"num_inner = {wrong}: expected an integer of 1 or more"):
            bilevel(problem, hypergrad.unrolled(), **made, num_inner=wrong)
    solver = bilevel(problem, hypergrad.unrolled(), **made, num_inner=K)
    with pytest.raises(AgwmError, match=r"inner_params\['.*'\] has shape .*: expected \[3, ...\], one entry an inner"):
        solver.init(inner[0], alpha)
    state = solver.init(stacked(inner), alpha)
    inner_batches, outer_batches = batches_of(net, 0)
    with pytest.raises(AgwmError, match=r"inner_batches.* has shape \(2, .*: expected \[3, ...\]"):
        solver.step(state, inner_batches[0], stacked(outer_batches))
    with pytest.raises(AgwmError, match=r"outer_batch.* has shape .*: expected \[3, ...\]"):
        solver.step(state, stacked(inner_batches), outer_batches[0])
