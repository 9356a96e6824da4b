"""A scan that keeps what differs between its steps alone: its values, and the memory of `unrolled`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agwm_jax import Problem, hypergrad, hypergradient
from agwm_jax.core.inner import InnerState, inner_steps
from agwm_jax.core.scan import scan_keeping


def test_everything_kept_is_found_again_and_only_what_differs_is_stacked():
    constant, xs = jnp.arange(4.0), jnp.arange(12.0).reshape(3, 4)

    def body(carry, x):
        after = carry * constant + x
        kept = {"x": x, "constant": constant, "of it": jnp.sin(constant), "one": 1.0, "carry": carry, "again": carry}
        return after, (after.sum(), kept)

    expected_carry, (expected_ys, expected) = jax.lax.scan(body, jnp.ones(4), xs)

    @jax.jit
    def scanned(xs):
        found = scan_keeping(body, jnp.ones(4), xs)
        return found.carry, found.ys, found.stack, jax.lax.map(lambda each: found.restore(*each), (found.stack, xs))

    carry, ys, stack, kept = scanned(xs)
    assert [x.shape for x in stack] == [(3, 4)], "the carry, once"
    np.testing.assert_allclose(carry, expected_carry)
    np.testing.assert_allclose(ys, expected_ys)
    for name, value in expected.items():
        np.testing.assert_allclose(kept[name], value, err_msg=name)


def _mixup(rng, k, d=64):
    """Two mixed kernels with gates of rank 4."""
    kernels = {name: jnp.asarray(rng.normal(size=(d, d)) / d**0.5, jnp.float32) for name in "ab"}
    gates = {name: (jnp.full((d, 4), 0.3), jnp.full((4, d), 0.2)) for name in kernels}

    def loss(w, o, batch):
        gate = {name: jnp.clip(left @ right, 0, 1) for name, (left, right) in o.items()}
        mixed = {name: gate[name] * w[name] + (1 - gate[name]) * kernels[name] for name in w}
        return jnp.mean((jnp.tanh(batch @ mixed["a"]) @ mixed["b"] - batch) ** 2)

    return loss, kernels, gates, jnp.asarray(rng.normal(size=(k, 16, d)), jnp.float32)


def _logistic(rng, k, n=200, d=100):
    """A penalty a feature; the data are closed over."""
    x, y = jnp.asarray(rng.normal(size=(n, d)), jnp.float32), jnp.asarray(rng.integers(0, 2, n), jnp.float32)

    def loss(w, o, batch):
        del batch
        score = x @ w
        return jnp.mean(jax.nn.softplus(score) - y * score) + 0.5 * jnp.sum(jnp.exp(o) * w * w)

    return loss, jnp.zeros(d), jnp.full(d, -3.0), jnp.zeros((k, 1))


# Small vectors of which a linearised gradient keeps more; the data, 200 times the weights, would be there 16 times.
@pytest.mark.parametrize(("make", "tx", "most"), [(_mixup, optax.adam(1e-2), 1.0), (_logistic, optax.sgd(0.1), 2.0)])
def test_unrolled_stacks_no_more_than_a_gradient_through_a_scan(make, tx, most):
    loss, w, o, batches = make(np.random.default_rng(0), k=16)

    def plain(w, o, batches):
        def outer(o):
            return loss(inner_steps(loss, tx, InnerState(w, tx.init(w)), o, batches)[0].params, o, batches[0])

        return jax.grad(outer)(o)

    def ours(w, o, batches):
        estimator = hypergrad.unrolled()
        return hypergradient(Problem(loss, loss), estimator, w, o, batches, batches[0], inner_tx=tx).hypergradient

    programs = [jax.jit(fn).lower(w, o, batches).compile() for fn in (plain, ours)]
    expected, found = (program(w, o, batches) for program in programs)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6), found, expected)
    of_plain, of_ours = (program.memory_analysis().temp_size_in_bytes for program in programs)
    assert of_ours <= most * of_plain, of_ours / of_plain
